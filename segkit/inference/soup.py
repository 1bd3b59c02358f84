"""Model soups: one model whose weights are the mean of several models' weights.

Wortsman et al. 2022, https://arxiv.org/abs/2203.05482

``mixture`` reads the ingredients; ``batch_norm`` estimates the statistics that a soup needs.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segkit.core import checkpoint
from segkit.core.errors import ArgumentError, CheckpointError
from segkit.inference.batch_norm import reestimate_batchnorm
from segkit.inference.mixture import (
    NEEDS,
    Ingredient,
    Mixture,
    Score,
    Soup,
    State,
    inner_products,
    mixed,
    name_of,
    nan_last,
    read_weights,
    shifted,
)
from segkit.training.metrics import paired_difference, per_image_miou

__all__ = [
    "Counts",
    "Ingredient",
    "LeakError",
    "Score",
    "Soup",
    "State",
    "as_checkpoint",
    "check_barriers",
    "check_selection",
    "greedy",
    "learned",
    "partwise",
    "pruned",
    "reestimate_batchnorm",
    "stock",
    "trained_on",
    "uniform",
]

Counts = Callable[[State], Tensor]
"""Returns the pixel counts of weights on each image of the selection set, (N, C, 3), from
:func:`segkit.training.metrics.counts_of`. BatchNorm: as for :data:`Score`."""


class LeakError(ArgumentError, CheckpointError):
    """A checkpoint trained, or may have trained, on images that are to choose."""


def uniform(ingredients: Sequence[Ingredient]) -> Soup:
    """Return the mean of all ingredients.

    Args:
        ingredients: Files or state dicts of one architecture; they are not changed.

    Raises:
        CheckpointError: An ingredient cannot be read, or does not match the first one.
    """
    mixture = Mixture("uniform", ingredients)
    mixture.weights = mixture.mean(range(len(ingredients)))
    mixture.set_members(range(len(ingredients)))
    return mixture.soup()


def stock(ingredients: Sequence[Ingredient], anchor: Ingredient) -> Soup:
    """Return the mean of all ingredients, moved towards the weights that they started from.

    Model Stock, Jang et al. 2024, https://arxiv.org/abs/2403.19522. Each tensor is
    ``t * mean + (1 - t) * anchor`` with ``t = N * c / (1 + (N - 1) * c)``, where c is the mean
    cosine of the angles between the N ingredients' differences from the anchor. No images choose.

    Departs from the paper: a tensor is a layer; c below 0 counts as 0; a tensor in which fewer than
    two ingredients differ from the anchor has no angle and becomes the mean.

    Args:
        ingredients: As in :func:`uniform`; two or more.
        anchor: The weights that training started from, such as pretrained ones.

    Raises:
        CheckpointError: As in :func:`uniform`, or there is only one ingredient.
    """
    mixture = Mixture("stock", ingredients)
    if len(ingredients) < 2:
        raise CheckpointError("a stock soup needs at least two checkpoints, got 1")
    extra = mixture.check_fit("anchor", anchor)
    grams = _gram_matrices([anchor, *ingredients])
    ratios = {key: _stock_ratio(gram) for key, gram in grams.items()}
    mean = mixture.mean(range(len(ingredients)))
    mixture.weights = mixed(mean, anchor, {key: 1 - ratio for key, ratio in ratios.items()})
    mixture.set_members(range(len(ingredients)))
    sizes = torch.tensor([mean[key].numel() for key in ratios]).double()
    ratio = float(torch.tensor([*ratios.values()]).double() @ sizes / sizes.sum())
    return mixture.soup(anchor=extra, ratio=ratio)


def greedy(
    ingredients: Sequence[Ingredient], score: Score, *, scores: Sequence[float] | None = None
) -> Soup:
    """Return the mean of ingredients added from best to worst unless one lowers the score.

    Args:
        ingredients: As in :func:`uniform`.
        score: On images that no ingredient trained on; see :func:`check_selection`.
        scores: Scores of the ingredients alone; computed by default.
    """
    mixture = Mixture("greedy", ingredients)
    _add_equal_shares(mixture, score, scores)
    return mixture.soup()


def pruned(
    ingredients: Sequence[Ingredient], score: Score, *, scores: Sequence[float] | None = None
) -> Soup:
    """Return the mean of all ingredients without those whose removal raises the score.

    Dansereau et al. 2023, https://arxiv.org/abs/2301.10092. The soup begins as the mean of all. The
    ingredients are tried from worst to best, until a pass over them removes none. Each mean is
    computed anew, so that a diverged ingredient leaves no trace.

    Args:
        ingredients, score, scores: As in :func:`greedy`.
    """
    mixture = Mixture("pruned", ingredients)
    members = mixture.start(score, scores).copy()
    mixture.weights = {}
    mixture.best, before = nan_last(score(mixture.mean(members))), 0
    while before != len(members):
        before = len(members)
        for index in reversed(mixture.order):
            rest = [member for member in members if member != index]
            if rest and index in members:
                value = score(mixture.mean(rest))
                if mixture.note(index, 0.0, value, kept=value > mixture.best):
                    members, mixture.best = rest, value
    mixture.weights = mixture.mean(members)
    mixture.set_members(members)
    return mixture.soup()


def learned(
    ingredients: Sequence[Ingredient],
    score: Score,
    *,
    scores: Sequence[float] | None = None,
    shares: Sequence[float] = (0.5, 0.25, 0.1),
    rounds: int = 2,
) -> Soup:
    """Return a mixture whose coefficients are optimized by line search on the score.

    The soup begins as the best ingredient. For each ingredient it tries the shares in order and
    keeps the first mixture that raises the score.

    Departs from the paper: that optimizes a loss by gradient, with all ingredients in memory.

    Args:
        ingredients, score, scores: As in :func:`greedy`.
        shares: Coefficients of the added ingredient to try, in this order.
        rounds: Passes over the ingredients; ends early if a pass changes nothing.
    """
    mixture = Mixture("learned", ingredients)
    mixture.start(score, scores)
    for _ in range(rounds):
        before = mixture.best
        for index in mixture.order:
            if mixture.coefficients[index] < 1:
                any(mixture.add(index, alpha, score) for alpha in shares)  # the first that is kept
        if mixture.best == before:
            break
    return mixture.soup()


def partwise(
    ingredients: Sequence[Ingredient],
    counts: Counts,
    *,
    parts: Mapping[str, Sequence[str]],
    scores: Sequence[float] | None = None,
    shares: Sequence[float] = (0.5,),
    level: float = 0.95,
) -> Soup:
    """Return a soup whose coefficients may differ between parts of the model, such as its stages.

    The soup begins as the greedy one. For each part and ingredient, it tries the shares in order
    and mixes in the first whose gain is significant: the paired bootstrap interval of the mean IoU
    is above 0, at a level that allows for the number of trials (Bonferroni).

    Args:
        ingredients: As in :func:`uniform`.
        counts: On images that no ingredient trained on; see :func:`check_selection`.
        parts: The modules, or parameters, of each part, such as ``{"decoder": ["decoder"]}``.
        scores: As in :func:`greedy`.
        shares: Coefficients of the added ingredient to try.
        level: Probability that no part changes if no trial is truly better.

    Returns:
        The soup; its recipe has the coefficients of each part (``parts``), whose mean is the
        ``weight`` of an ingredient.
    """
    mixture = Mixture("partwise", ingredients)
    _add_equal_shares(mixture, lambda weights: _miou(counts(weights)), scores)
    before = counts(mixture.weights)
    trials = len(parts) * len(ingredients) * len(shares)
    coefficients = {part: [*mixture.coefficients] for part in parts}
    for part, modules in parts.items():
        prefixes = tuple(f"{module}." for module in modules)
        keys = [key for key in mixture.weights if f"{key}.".startswith(prefixes)]
        for index in mixture.order:
            for share in shares:
                candidate = mixed(mixture.weights, ingredients[index], dict.fromkeys(keys, share))
                after = counts(candidate)
                _, low, _ = paired_difference(
                    before, after, level=1 - (1 - level) / trials, rounds=_ROUNDS
                )
                if mixture.note(index, share, _miou(after), kept=low > 0, part=part):
                    mixture.weights, mixture.best, before = candidate, _miou(after), after
                    coefficients[part] = shifted(coefficients[part], index, share)
                    break
                del candidate  # before the next is read
    columns = zip(*coefficients.values(), strict=True)
    mixture.coefficients = [sum(column) / len(parts) for column in columns]
    return mixture.soup(parts=coefficients)


def check_barriers(
    ingredients: Sequence[Ingredient], score: Score, *, scores: Sequence[float]
) -> list[dict[str, Any]]:
    """Return the barrier between the best ingredient and each other one.

    It is the mean score of the two minus the score of their midpoint. Far above zero, the two are
    not linearly mode-connected and every soup of them is worse than they are, usually because their
    decoders were initialized differently. A midpoint that scores below both is warned of.

    Args:
        ingredients, scores: As in :func:`greedy`.
        score: Scores a midpoint.

    Returns:
        ``files`` and ``barrier`` of each pair; JSON-serializable.
    """
    names = [name_of(ingredient, number) for number, ingredient in enumerate(ingredients)]
    best = max(range(len(ingredients)), key=lambda index: nan_last(scores[index]))
    barriers = []
    for index, ingredient in enumerate(ingredients):
        if index == best:
            continue
        ends = scores[best], scores[index]
        height = sum(ends) / 2 - score(mixed(read_weights(ingredients[best]), ingredient, 0.5))
        barriers.append({"files": [names[best], names[index]], "barrier": height})
        if height > sum(ends) / 2 - min(ends):
            warnings.warn(
                f"{names[best]} and {names[index]} are not linearly mode-connected: the score of "
                f"their midpoint is {height:.3f} below the mean of their own, so a soup of both is "
                "of no use; let them vote, or train both from the same pretrained weights",
                stacklevel=2,
            )
    return barriers


def check_selection(
    paths: Sequence[Path], selection: Collection[str], *, allow_leak: bool = False
) -> int:
    """Return how many images of a selection set an ingredient trained on; refuse any by default.

    A score on such images is too high for that ingredient and for every soup it is in. Each fold of
    a k-fold trains on the other folds' validation images.

    Args:
        paths: Checkpoints, which record the digests of the images they trained on.
        selection: Digests of the images that choose.
        allow_leak: Return the number even if it is not zero.

    Raises:
        LeakError: Images leak, or a checkpoint does not record what it trained on.
    """
    chosen, leaked, leaking = set(selection), set[str](), []
    for path in paths:
        state = checkpoint.entries(path, NEEDS)
        if "trained_on" not in state and not allow_leak:
            raise LeakError(
                f"{path}: does not record which images it trained on, so its score may be too high",
                "use another checkpoint",
                allow_leak=[True],
            )
        seen = chosen.intersection(state.get("trained_on", ()))
        leaked |= seen
        leaking += [str(path)] if seen else []
    if leaked and not allow_leak:
        raise LeakError(
            f"{len(leaked)} of the {len(chosen)} images that would choose were trained on by "
            f"{', '.join(leaking)}",
            "hold out a selection set (data.selection)",
            allow_leak=[True],
        )
    return len(leaked)


def trained_on(states: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return the digests of all images that any of these checkpoints trained on."""
    return {image for state in states for image in state.get("trained_on", ())}


def as_checkpoint(soup: Soup) -> dict[str, Any]:
    """Return the entries of the checkpoint of a soup of checkpoints.

    Its ``trained_on`` has every image that any member trained on.
    """
    states = [checkpoint.entries(Path(file), NEEDS) for file in soup.members]
    kept = ("config", "classes", "mean", "std", "init", "fold", "epoch", "step")
    return {
        **{key: states[0][key] for key in kept if key in states[0]},
        "model": soup.weights,
        "score": soup.recipe["score"],
        "trained_on": sorted(trained_on(states)),
        "soup": soup.recipe,
    }


_ROUNDS = 10_000
"""Bootstrap samples of a part's trial: its level is near 1, so its quantile is far out."""


def _add_equal_shares(mixture: Mixture, score: Score, scores: Sequence[float] | None) -> None:
    """Add ingredients to the best in order of score, with equal shares, unless it lowers."""
    members = mixture.start(score, scores)[:1]
    for index in mixture.order[1:]:
        if mixture.add(index, 1 / (len(members) + 1), score, if_equal=True):
            members.append(index)
    mixture.set_members(members)


def _miou(counts: Tensor) -> float:
    return float(per_image_miou(counts.sum(0)))


def _gram_matrices(points: Sequence[Ingredient]) -> dict[str, Tensor]:
    """Return the inner products of all pairs of points, for each floating-point tensor."""
    grams: dict[str, Tensor] = {}
    for i, point in enumerate(points):
        first = read_weights(point)
        for j in range(i, len(points)):
            for key, product in inner_products(first, read_weights(points[j])).items():
                gram = grams.setdefault(key, torch.zeros(len(points), len(points)).double())
                gram[i, j] = gram[j, i] = product
    return grams


def _stock_ratio(gram: Tensor) -> float:
    """Return the share of the mean, of the inner products of the anchor and the ingredients."""
    products = (gram - gram[:1] - gram[:, :1] + gram[0, 0])[1:, 1:]  # of differences
    lengths = products.diagonal().clamp(min=0).sqrt()
    both = torch.outer(lengths, lengths)
    others = ~torch.eye(len(lengths), dtype=torch.bool) & (both > 0)
    if not others.any():
        return 1.0
    cosine = float((products[others] / both[others]).mean().clamp(0, 1))
    return len(lengths) * cosine / (1 + (len(lengths) - 1) * cosine)
