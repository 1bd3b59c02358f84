"""Model soups: one model whose weights are the mean of several models' weights.

Wortsman et al. 2022, https://arxiv.org/abs/2203.05482

At most two sets of weights are in memory: the soup so far, and an ingredient, mapped from its file,
that the next mixture overwrites in place. Floating-point tensors are averaged in float32 or better.
Integer buffers (Swin's index tables, BatchNorm's counters) are those of the first ingredient mixed.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segkit.core import checkpoint
from segkit.core.distributed import all_reduce
from segkit.core.errors import ArgumentError, CheckpointError, quoted
from segkit.models.pretrained.reading import read_file

State = dict[str, Tensor]

Ingredient: TypeAlias = str | Path | Mapping[str, Tensor]
"""A state dict, or a file of one: a checkpoint, a ``.pth`` or a ``.safetensors`` of any program."""

Score = Callable[[State], float]
"""Returns the score of weights on the selection set; higher is better. For models with BatchNorm,
this function must call :func:`reestimate_batchnorm` before it evaluates."""

_NEEDS = ("classes", "model")
"""Entries of an ingredient."""


class LeakError(ArgumentError, CheckpointError):
    """A checkpoint trained, or may have trained, on images that are to choose."""


@dataclass(frozen=True)
class Soup:
    """Mixed weights, and a record of how they were mixed.

    Args:
        weights: A state dict.
        recipe: The kind, every ingredient's file, SHA-256, own score and coefficient (``weight``),
            the score after each step and whether it was kept; JSON-serializable.
    """

    weights: State
    recipe: dict[str, Any]

    @property
    def members(self) -> list[str]:
        """The files of the ingredients whose coefficient is above zero."""
        return [entry["file"] for entry in self.recipe["ingredients"] if entry["weight"] > 0]


def uniform(ingredients: Sequence[Ingredient]) -> Soup:
    """Return the mean of all ingredients.

    Args:
        ingredients: Files or state dicts of one architecture; they are not changed.

    Raises:
        CheckpointError: An ingredient cannot be read, or does not match the first one.
    """
    mixture = _Mixture("uniform", ingredients)
    mixture.weights = _weights(ingredients[0])
    for count, ingredient in enumerate(ingredients[1:], 2):
        _interpolate(mixture.weights, _weights(ingredient), 1 / count, into=mixture.weights)
    mixture.coefficients = [1 / len(ingredients)] * len(ingredients)
    return mixture.soup()


def greedy(
    ingredients: Sequence[Ingredient], score: Score, *, scores: Sequence[float] | None = None
) -> Soup:
    """Return the mean of ingredients added from best to worst unless one lowers the score.

    Args:
        ingredients: As in :func:`uniform`.
        score: On images that no ingredient trained on; see :func:`check_selection`.
        scores: Scores of the ingredients alone; computed by default.
    """
    mixture = _Mixture("greedy", ingredients)
    members = mixture.start(score, scores)[:1]
    for index in mixture.order[1:]:
        if mixture.add(index, 1 / (len(members) + 1), score, if_equal=True):
            members.append(index)
    equal = 1 / len(members)
    mixture.coefficients = [equal if index in members else 0.0 for index in range(len(ingredients))]
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
    mixture = _Mixture("learned", ingredients)
    mixture.start(score, scores)
    for _ in range(rounds):
        before = mixture.best
        for index in mixture.order:
            if mixture.coefficients[index] < 1:
                any(mixture.add(index, alpha, score) for alpha in shares)  # the first that is kept
        if mixture.best == before:
            break
    return mixture.soup()


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
    names = [_name(ingredient, number) for number, ingredient in enumerate(ingredients)]
    best = max(range(len(ingredients)), key=lambda index: _nan_last(scores[index]))
    barriers = []
    for index in range(len(ingredients)):
        if index == best:
            continue
        midpoint = _weights(ingredients[index])
        _interpolate(_weights(ingredients[best]), midpoint, 0.5, into=midpoint)
        ends = scores[best], scores[index]
        height = sum(ends) / 2 - score(midpoint)
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
        state = checkpoint.entries(path, _NEEDS)
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
    states = [checkpoint.entries(Path(file), _NEEDS) for file in soup.members]
    kept = ("config", "classes", "mean", "std", "init", "fold", "epoch", "step")
    return {
        **{key: states[0][key] for key in kept if key in states[0]},
        "model": soup.weights,
        "score": soup.recipe["score"],
        "trained_on": sorted(trained_on(states)),
        "soup": soup.recipe,
    }


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace BatchNorm's statistics by those of one pass over training images.

    A soup needs this: the mean of several models' statistics is not the statistics of the mean
    model. The new ones are the exact mean and variance of all values that reach the layer, over all
    ranks and batch sizes (Wu and Johnson 2021, https://arxiv.org/abs/2105.07576). Unlike them, the
    running mean of ``torch.optim.swa_utils.update_bn`` counts a short last batch like a full one
    and omits the variance between batches.

    Args:
        model: Layers that stay in evaluation mode (frozen) do not change. Dropout is off.
        batches: Normalized images, two or more at a time, on the model's device. Not read if no
            layer needs them; without any, a ValueError is raised.

    Returns:
        The number of layers that were changed.
    """
    training = model.training
    layers = [
        layer
        for layer in model.train().modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None
    ]
    model.eval()
    sums = {}
    for layer in layers:
        assert layer.running_mean is not None
        sums[layer] = layer.running_mean.new_zeros(3, layer.num_features, dtype=torch.float64)

    def count(layer: _BatchNorm, inputs: tuple[Tensor]) -> None:
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
            continue  # the layer is of an auxiliary head, which runs in training only
        mean = values / total
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_((squares / total - mean**2) * total / (total - 1))
        changed += 1
    if layers and not changed:
        raise ValueError("BatchNorm statistics need at least one batch of images")
    return changed


class _Mixture:
    """A soup in the making: its weights, coefficients, score and steps so far."""

    def __init__(self, kind: str, ingredients: Sequence[Ingredient]) -> None:
        if not ingredients:
            raise CheckpointError("a soup needs at least one checkpoint")
        self.kind, self.ingredients = kind, ingredients
        self.names = [_name(ingredient, number) for number, ingredient in enumerate(ingredients)]
        for name, ingredient in zip(self.names, ingredients, strict=True):
            _check_type(name, ingredient)
        self.sha256 = [_digest(ingredient) for ingredient in ingredients]
        self.scores: list[float | None] = [None] * len(ingredients)
        self.best: float | None = None
        self.order: list[int] = []
        self.weights: State = {}
        self.coefficients = [0.0] * len(ingredients)
        self.steps: list[dict[str, Any]] = []
        states = [_entries(ingredient) for ingredient in ingredients]
        for name, state in zip(self.names[1:], states[1:], strict=True):
            _compare(self.names[0], states[0], name, state)
        weights = checkpoint.weights(states[0])
        self.dtypes = {key: tensor.dtype for key, tensor in weights.items()}
        starts = zip(self.names, [state.get("init") for state in states], strict=True)
        differing = [
            f"{a} and {b}" for (a, i), (b, j) in combinations(starts, 2) if i and j and i != j
        ]
        if differing:
            warnings.warn(
                "these were initialized with different weights, so a soup of them may be of no "
                f"use: {'; '.join(differing)}",
                stacklevel=3,
            )

    def start(self, score: Score, scores: Sequence[float] | None) -> list[int]:
        """Begin with the best ingredient; return all from best to worst, a score of NaN last."""
        if scores is None:
            scores = [score(_weights(ingredient)) for ingredient in self.ingredients]
        ranked = [_nan_last(value) for value in scores]
        self.scores = [*ranked]
        self.order = sorted(range(len(ranked)), key=ranked.__getitem__, reverse=True)
        self.best = ranked[self.order[0]]
        self.weights = _weights(self.ingredients[self.order[0]])
        self.coefficients = [float(index == self.order[0]) for index in range(len(ranked))]
        return self.order

    def add(self, index: int, alpha: float, score: Score, *, if_equal: bool = False) -> bool:
        """Mix an ingredient in if that raises the score; return whether it did."""
        assert self.best is not None
        candidate = _weights(self.ingredients[index])
        _interpolate(self.weights, candidate, alpha, into=candidate)
        value = score(candidate)
        kept = value > self.best or (if_equal and value == self.best)
        step = {"file": self.names[index], "share": alpha, "score": value, "kept": kept}
        self.steps.append(step)
        if kept:
            self.weights, self.best = candidate, value
            self.coefficients = [value * (1 - alpha) for value in self.coefficients]
            self.coefficients[index] += alpha
        return kept

    def soup(self) -> Soup:
        """Return the soup, its tensors in the types of the first ingredient."""
        columns = zip(self.names, self.sha256, self.scores, self.coefficients, strict=True)
        ingredients = [
            {"file": name, "sha256": digest, "score": score, "weight": coefficient}
            for name, digest, score, coefficient in columns
        ]
        recipe = {
            "kind": self.kind,
            "score": self.best,
            "ingredients": ingredients,
            "steps": self.steps,
            "refused": [entry["file"] for entry in ingredients if entry["weight"] == 0],
        }
        weights = {key: tensor.to(self.dtypes[key]) for key, tensor in self.weights.items()}
        return Soup(weights, recipe)


def _name(ingredient: Ingredient, number: int) -> str:
    return str(ingredient) if isinstance(ingredient, str | Path) else f"ingredients[{number}]"


def _check_type(name: str, ingredient: Any) -> None:
    if not isinstance(ingredient, str | Path | Mapping):
        raise CheckpointError(
            f"{name}: expected a path or a state dict, got {type(ingredient).__name__}"
        )
    for key, value in ingredient.items() if isinstance(ingredient, Mapping) else ():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name}: {quoted(key)} is no tensor; expected a state dict")


def _entries(ingredient: Ingredient) -> Mapping[str, Any]:
    """Return a checkpoint's entries, unverified; of anything else, its weights as ``model``."""
    if isinstance(ingredient, Mapping):
        return {"model": ingredient}
    if _is_checkpoint(Path(ingredient)):
        return checkpoint.entries(Path(ingredient), _NEEDS)
    return {"model": read_file(Path(ingredient), keep_prefixes=True)}


def _digest(ingredient: Ingredient) -> str:
    """Return the SHA-256 of an ingredient; a checkpoint is verified."""
    if isinstance(ingredient, str | Path) and _is_checkpoint(Path(ingredient)):
        return checkpoint.digest(Path(ingredient))
    return checkpoint.digest_tensors(_entries(ingredient)["model"])


def _is_checkpoint(path: Path) -> bool:
    """Return whether segkit wrote the file.

    Also True for a missing file, so that loading reports the error.
    """
    return not path.is_file() or checkpoint.stored_digest(path) is not None


def _compare(
    name: str, state: Mapping[str, Any], other_name: str, other: Mapping[str, Any]
) -> None:
    """Refuse an ingredient that is not the same architecture with the same classes."""
    if "classes" in state and "classes" in other and state["classes"] != other["classes"]:
        raise CheckpointError(f"{other_name}: has other classes than {name}; they cannot be mixed")
    ours, theirs = _shapes(checkpoint.weights(state)), _shapes(checkpoint.weights(other))
    differing = sorted(ours.items() ^ theirs.items())
    if differing:
        key, (shape, _) = differing[0]
        raise CheckpointError(
            f"{other_name}: is another architecture than {name} ('{key}' {list(shape)} is not in "
            f"both, and {len(differing) - 1} others); they cannot be mixed"
        )


def _shapes(weights: State) -> dict[str, tuple[tuple[int, ...], bool]]:
    return {key: (tuple(x.shape), x.is_floating_point()) for key, x in weights.items()}


def _nan_last(score: float) -> float:
    return -math.inf if math.isnan(score) else float(score)


def _weights(ingredient: Ingredient) -> State:
    """Return writable weights (EMA if present); half precision becomes float32.

    Files are mapped privately: writing to the weights does not change the file.
    """
    weights = {}
    for key, tensor in checkpoint.weights(_entries(ingredient)).items():
        narrow = tensor.is_floating_point() and tensor.element_size() < 4
        dtype = torch.float32 if narrow else tensor.dtype
        weights[key] = tensor.detach().to("cpu", dtype, copy=isinstance(ingredient, Mapping))
    return weights


_PIECE = 2**18
"""Values mixed at a time, so that temporary tensors are small."""


def _interpolate(soup: State, other: State, alpha: float, *, into: State) -> None:
    """Write ``(1 - alpha) * soup + alpha * other`` into one of the two."""
    for key, mine in soup.items():
        if mine.is_floating_point():
            rows = max(1, _PIECE // max(1, math.prod(mine.shape[1:])))
            parts = (torch.atleast_1d(x).split(rows) for x in (mine, other[key], into[key]))
            for ours, theirs, result in zip(*parts, strict=True):
                # In this form equal values stay equal to the bit, even the sign of a zero.
                torch.sub(ours, ours - theirs, alpha=alpha, out=result)
        else:
            into[key] = mine
