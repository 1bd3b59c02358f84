"""Model soups: one model whose weights are the mean of several models' weights.

Wortsman et al. 2022, https://arxiv.org/abs/2203.05482

However many ingredients, there are never more than two sets of weights in memory: the soup so far
and one ingredient, mapped from its file, that turns into the next candidate where it lies. Floating
tensors are averaged in float32 or better; integer buffers (Swin's index tables, BatchNorm's
counters) stay as they are in the ingredient the soup began with.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segkit.core import checkpoint
from segkit.core.distributed import all_reduce
from segkit.core.errors import CheckpointError

State = dict[str, Tensor]
Score = Callable[[State], float]
"""Rates weights on the selection set; higher is better. See ``reestimate_batchnorm`` first."""


@dataclass(frozen=True)
class Soup:
    """A mixture and how it came about.

    Args:
        model: A state dict.
        recipe: Its kind, every ingredient's file, SHA-256, own score and weight in the mixture,
            the score after each step and whether it was kept; JSON can hold it.
    """

    model: State
    recipe: dict[str, Any]

    @property
    def members(self) -> list[Path]:
        """The ingredients that are in the mixture."""
        return [Path(one["file"]) for one in self.recipe["ingredients"] if one["weight"] > 0]


def uniform(paths: Sequence[Path]) -> Soup:
    """The mean of all ingredients.

    Raises:
        CheckpointError: A checkpoint cannot be read, or does not match the first one.
    """
    recipe = _Recipe("uniform", paths)
    soup = _weights(paths[0])
    for count, path in enumerate(paths[1:], 2):
        _mix(soup, _weights(path), 1 / count, into=soup)
    return recipe.soup(soup, [1 / len(paths)] * len(paths))


def greedy(paths: Sequence[Path], score: Score, *, scores: Sequence[float] | None = None) -> Soup:
    """Ingredients from best to worst, each added to the mean unless that lowers the score.

    All members weigh the same: the mean runs over whole ingredients, not over halves of halves.

    Args:
        paths: Checkpoints.
        score: On images that no ingredient trained on; see ``check_selection``.
        scores: Of each ingredient alone, where they are known; default ``score`` of each.

    Raises:
        CheckpointError: A checkpoint cannot be read, or does not match the first one.
    """
    recipe = _Recipe("greedy", paths)
    order = recipe.rank(score, scores)
    members, best = [order[0]], recipe.score(order[0])
    soup = _weights(paths[order[0]])
    for index in order[1:]:
        candidate = _weights(paths[index])
        _mix(soup, candidate, 1 / (len(members) + 1), into=candidate)
        value = score(candidate)
        if recipe.step(index, 1 / (len(members) + 1), value, kept=value >= best):
            soup, best = candidate, value
            members.append(index)
        del candidate
    weights = [1 / len(members) if index in members else 0.0 for index in range(len(paths))]
    return recipe.soup(soup, weights, best)


def learned(
    paths: Sequence[Path],
    score: Score,
    *,
    scores: Sequence[float] | None = None,
    shares: Sequence[float] = (0.5, 0.25, 0.1),
    rounds: int = 2,
) -> Soup:
    """A weight for each ingredient, found by line search on the score itself.

    From the best ingredient on, the soup moves towards each ingredient by the first share that
    raises the score. (The paper's own learned soup descends the gradient of a loss with all
    ingredients in memory; this one needs two, and climbs the score that counts.)

    Args:
        paths: Checkpoints.
        score: On images that no ingredient trained on; see ``check_selection``.
        scores: Of each ingredient alone, where they are known; default ``score`` of each.
        shares: Of the ingredient in the moved soup, each tried in this order.
        rounds: Passes over the ingredients; ends early when one changes nothing.

    Raises:
        CheckpointError: A checkpoint cannot be read, or does not match the first one.
    """
    recipe = _Recipe("learned", paths)
    order = recipe.rank(score, scores)
    best = recipe.score(order[0])
    weights = [float(index == order[0]) for index in range(len(paths))]
    soup = _weights(paths[order[0]])
    for _ in range(rounds):
        before = best
        for index in order:
            if weights[index] == 1:
                continue
            for share in shares:
                candidate = _weights(paths[index])
                _mix(soup, candidate, share, into=candidate)
                value = score(candidate)
                if recipe.step(index, share, value, kept=value > best):
                    soup, best = candidate, value
                    weights = [weight * (1 - share) for weight in weights]
                    weights[index] += share
                    break
                del candidate
        if best == before:
            break
    return recipe.soup(soup, weights, best)


def barrier(first: Path, second: Path, score: Score, *, scores: tuple[float, float]) -> float:
    """How far the score at the midpoint of two ingredients falls below the mean of their own.

    Far above zero, the two lie in different valleys of the loss, and no soup of them is any good:
    as a rule, because their decoders started from different random weights.

    Args:
        first: A checkpoint.
        second: Another one.
        score: Rates the midpoint.
        scores: The two ingredients' own.
    """
    midpoint = _weights(second)
    _mix(_weights(first), midpoint, 0.5, into=midpoint)
    return sum(scores) / 2 - score(midpoint)


def check_barriers(
    paths: Sequence[Path], score: Score, *, scores: Sequence[float]
) -> list[dict[str, Any]]:
    """The :func:`barrier` between the best ingredient and each other one.

    Warns of a midpoint below both of its ends: there mixing can only do harm.

    Args:
        paths: Checkpoints.
        score: Rates a midpoint.
        scores: Of each ingredient alone.

    Returns:
        ``files`` and ``barrier`` of each pair; JSON can hold it.
    """
    best = max(range(len(paths)), key=lambda index: _ordered(scores[index]))
    found = []
    for index in range(len(paths)):
        if index == best:
            continue
        ends = scores[best], scores[index]
        height = barrier(paths[best], paths[index], score, scores=ends)
        found.append({"files": [str(paths[best]), str(paths[index])], "barrier": height})
        if height > sum(ends) / 2 - min(ends):
            warnings.warn(
                f"{paths[best]} and {paths[index]} lie in different valleys: midway between them "
                f"the score is {height:.3f} below the mean of their own, so a soup of both is of "
                "no use; let them vote, or train both from the same pretrained weights",
                stacklevel=2,
            )
    return found


def check_selection(
    paths: Sequence[Path], selection: Collection[str], *, allow_leak: bool = False
) -> int:
    """Count the images of a selection set that an ingredient trained on; refuse any.

    A score on such images is too good for that ingredient and for every soup it is in, so it may
    not choose anything: each fold of a k-fold has trained on the other folds' validation images.

    Args:
        paths: Checkpoints, which record the digests of the images they trained on.
        selection: Digests of the images that choose.
        allow_leak: Return the number instead of refusing.

    Raises:
        CheckpointError: Images leak, or a checkpoint does not record what it trained on.
    """
    chosen, leaked, guilty = set(selection), set[str](), []
    for path in paths:
        state = _state(path)
        if "trained_on" not in state and not allow_leak:
            raise CheckpointError(
                f"{path}: does not record which images it trained on, so a score may be too good; "
                "pass --allow-leak to use it all the same"
            )
        found = chosen.intersection(state.get("trained_on", ()))
        leaked |= found
        guilty += [str(path)] if found else []
    if leaked and not allow_leak:
        raise CheckpointError(
            f"{len(leaked)} of the {len(chosen)} images that would choose were trained on by "
            f"{', '.join(guilty)}; hold out a selection set (data.selection), or pass --allow-leak"
        )
    return len(leaked)


def as_checkpoint(soup: Soup) -> dict[str, Any]:
    """A checkpoint of a soup, to save: whatever reads a model's checkpoint reads it too.

    It counts as trained on every image that any member trained on.
    """
    states = [_state(path) for path in soup.members]
    trained_on = sorted({image for state in states for image in state.get("trained_on", ())})
    kept = ("config", "classes", "init", "fold", "epoch", "step")
    return {
        **{key: states[0][key] for key in kept if key in states[0]},
        "model": soup.model,
        "score": soup.recipe["score"],
        "trained_on": trained_on,
        "soup": soup.recipe,
    }


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace BatchNorm's statistics by those of one pass over training images.

    The mean of several models' statistics is not the statistics of their mean. The new ones are
    the exact mean and variance of every value that reached the layer in the whole pass, over all
    ranks, whatever the batch sizes (Wu and Johnson 2021, https://arxiv.org/abs/2105.07576); a
    running mean of batch statistics, as ``torch.optim.swa_utils.update_bn`` takes, weighs a short
    last batch like a full one and leaves out the variance between batches.

    Args:
        model: Its frozen layers (those that stay in evaluation mode) are left alone, and dropout is
            off during the pass.
        batches: Normalized images, two or more at a time, on the model's device. Not read when no
            layer needs it.

    Returns:
        The number of layers that were changed.

    Raises:
        ValueError: There were no batches.
    """
    training = model.training
    layers = [
        layer
        for layer in model.train().modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None
    ]
    model.eval()
    sums: dict[nn.Module, Tensor] = {
        layer: layer.running_mean.new_zeros(3, layer.num_features, dtype=torch.float64)
        for layer in layers
        if layer.running_mean is not None
    }

    def count(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].float()
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        moments = torch.stack([torch.ones_like(mean), mean, variance + mean**2]).double()
        sums[layer] += moments * (x.numel() / x.shape[1])

    hooks = [layer.train().register_forward_pre_hook(count) for layer in layers]
    try:
        for batch in batches if layers else ():
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    changed = 0
    for layer in layers:
        total, values, squares = all_reduce(sums[layer])
        if not total.any():
            continue  # it belongs to an auxiliary head, which only training runs
        mean = values / total
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_((squares / total - mean**2) * total / (total - 1))
        changed += 1
    if layers and not changed:
        raise ValueError("BatchNorm statistics need at least one batch of images")
    return changed


class _Recipe:
    """Checks ingredients against the first of them, and writes down what becomes of them."""

    def __init__(self, kind: str, paths: Sequence[Path]) -> None:
        if not paths:
            raise CheckpointError("a soup needs at least one checkpoint")
        self.kind = kind
        self.paths = paths
        self.sha256 = [checkpoint.digest(path) for path in paths]
        self.scores: list[float | None] = [None] * len(paths)
        self.steps: list[dict[str, Any]] = []
        first, *others = states = [_state(path) for path in paths]
        for path, other in zip(paths[1:], others, strict=True):
            _compare(paths[0], first, path, other)
        self.dtypes = {key: tensor.dtype for key, tensor in checkpoint.weights(first).items()}
        starts = {str(path): state.get("init") for path, state in zip(paths, states, strict=True)}
        apart = [f"{a} and {b}" for a, b in combinations(starts, 2) if starts[a] != starts[b]]
        if apart:
            warnings.warn(
                f"these started from different weights, and a soup of them may be no model at all: "
                f"{'; '.join(apart)}",
                stacklevel=3,
            )

    def rank(self, score: Score, scores: Sequence[float] | None) -> list[int]:
        """Ingredients from best to worst; one whose score is not a number comes last."""
        found = [score(_weights(path)) for path in self.paths] if scores is None else scores
        self.scores = [_ordered(one) for one in found]
        return sorted(range(len(self.paths)), key=self.score, reverse=True)

    def score(self, index: int) -> float:
        """An ingredient's own score."""
        value = self.scores[index]
        assert value is not None
        return value

    def step(self, index: int, share: float, score: float, *, kept: bool) -> bool:
        """Note a candidate; returns whether it was kept."""
        file = str(self.paths[index])
        self.steps.append({"file": file, "share": share, "score": score, "kept": kept})
        return kept

    def soup(self, model: State, weights: Sequence[float], score: float | None = None) -> Soup:
        """The finished soup, in its ingredients' own types."""
        columns = zip(self.paths, self.sha256, self.scores, weights, strict=True)
        ingredients = [
            {"file": str(path), "sha256": digest, "score": own, "weight": weight}
            for path, digest, own, weight in columns
        ]
        recipe = {
            "kind": self.kind,
            "score": score,
            "ingredients": ingredients,
            "steps": self.steps,
            "refused": [one["file"] for one in ingredients if one["weight"] == 0],
        }
        return Soup({key: tensor.to(self.dtypes[key]) for key, tensor in model.items()}, recipe)


def _compare(
    path: Path, state: Mapping[str, Any], other_path: Path, other: Mapping[str, Any]
) -> None:
    """Refuse a checkpoint that is not the same architecture with the same classes."""
    if list(state["classes"]) != list(other["classes"]):
        raise CheckpointError(f"{other_path}: has other classes than {path}; they cannot be mixed")
    ours, theirs = _shapes(checkpoint.weights(state)), _shapes(checkpoint.weights(other))
    differing = sorted(ours.items() ^ theirs.items())
    if differing:
        key, (shape, _) = differing[0]
        raise CheckpointError(
            f"{other_path}: is another architecture than {path} ('{key}' {list(shape)} is not in "
            f"both, and {len(differing) - 1} others); they cannot be mixed"
        )


def _shapes(model: State) -> dict[str, tuple[tuple[int, ...], bool]]:
    return {key: (tuple(one.shape), one.is_floating_point()) for key, one in model.items()}


def _ordered(score: float) -> float:
    """A score that can be compared: what is not a number is below all."""
    return -math.inf if math.isnan(score) else float(score)


def _state(path: Path) -> dict[str, Any]:
    """A checkpoint, its tensors left in the file, which is verified elsewhere and once only."""
    return checkpoint.load(path, mmap=True, verify=False, needs=("classes", "model"))


def _weights(path: Path) -> State:
    """A checkpoint's weights, averaged ones where it has them, in float32 or better.

    They are mapped from the file privately: writing to them copies the page and not the file.
    """
    state = checkpoint.weights(_state(path))
    return {
        key: tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if tensor.is_floating_point()
        else tensor
        for key, tensor in state.items()
    }


_PIECE = 2**18
"""Numbers that are mixed at a time: the largest weights would be a quarter of a state dict more."""


def _mix(soup: State, other: State, share: float, *, into: State) -> None:
    """``(1 - share) * soup + share * other``, written over one of the two."""
    for key, mine in soup.items():
        if mine.is_floating_point():
            rows = max(1, _PIECE // max(1, math.prod(mine.shape[1:])))
            parts = (torch.atleast_1d(one).split(rows) for one in (mine, other[key], into[key]))
            for own, another, result in zip(*parts, strict=True):
                # In this form a difference of zero changes nothing, not even the sign of a zero.
                torch.sub(own, own - another, alpha=share, out=result)
        else:
            into[key] = mine
