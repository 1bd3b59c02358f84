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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segkit.core import checkpoint
from segkit.core.distributed import all_reduce
from segkit.core.errors import CheckpointError

_NEEDS = ("classes", "model")
"""Entries of an ingredient."""

State = dict[str, Tensor]
Score = Callable[[State], float]
"""Returns the score of weights on the selection set; higher is better. A model with BatchNorm calls
:func:`reestimate_batchnorm` first."""


class LeakError(CheckpointError):
    """A checkpoint trained, or may have trained, on images that are to choose."""


@dataclass(frozen=True)
class Soup:
    """Mixed weights, and a record of how they were mixed.

    Args:
        model: A state dict.
        recipe: The kind, every ingredient's file, SHA-256, own score and coefficient (``weight``),
            the score after each step and whether it was kept; JSON can hold it.
    """

    model: State
    recipe: dict[str, Any]

    @property
    def members(self) -> list[Path]:
        """The ingredients whose coefficient is above zero."""
        ingredients = self.recipe["ingredients"]
        return [Path(entry["file"]) for entry in ingredients if entry["weight"] > 0]


def uniform(paths: Sequence[Path]) -> Soup:
    """Return the mean of all ingredients.

    Args:
        paths: Checkpoints.

    Raises:
        CheckpointError: A checkpoint cannot be read, or does not match the first one.
    """
    recipe = _Recipe("uniform", paths)
    soup = _weights(paths[0])
    for count, path in enumerate(paths[1:], 2):
        _mix(soup, _weights(path), 1 / count, into=soup)
    return recipe.soup(soup, [1 / len(paths)] * len(paths))


def greedy(paths: Sequence[Path], score: Score, *, scores: Sequence[float] | None = None) -> Soup:
    """Return the mean of ingredients added from best to worst unless one lowers the score.

    All members have the same coefficient.

    Args:
        paths: Checkpoints.
        score: On images that no ingredient trained on; see :func:`check_selection`.
        scores: Scores of the ingredients alone; computed by default.

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
    coefficients = [1 / len(members) if index in members else 0.0 for index in range(len(paths))]
    return recipe.soup(soup, coefficients, best)


def learned(
    paths: Sequence[Path],
    score: Score,
    *,
    scores: Sequence[float] | None = None,
    shares: Sequence[float] = (0.5, 0.25, 0.1),
    rounds: int = 2,
) -> Soup:
    """Return a mixture whose coefficients are found by line search on the score.

    The soup begins as the best ingredient. For each ingredient it tries the shares in order and
    keeps the first mixture that raises the score.

    Departs from the paper: that optimizes a loss by gradient, with all ingredients in memory.

    Args:
        paths: Checkpoints.
        score: On images that no ingredient trained on; see :func:`check_selection`.
        scores: Scores of the ingredients alone; computed by default.
        shares: Coefficients of the added ingredient to try, in this order.
        rounds: Passes over the ingredients; ends early if a pass changes nothing.

    Raises:
        CheckpointError: A checkpoint cannot be read, or does not match the first one.
    """
    recipe = _Recipe("learned", paths)
    order = recipe.rank(score, scores)
    best = recipe.score(order[0])
    coefficients = [float(index == order[0]) for index in range(len(paths))]
    soup = _weights(paths[order[0]])
    for _ in range(rounds):
        before = best
        for index in order:
            if coefficients[index] == 1:
                continue
            for share in shares:
                candidate = _weights(paths[index])
                _mix(soup, candidate, share, into=candidate)
                value = score(candidate)
                if recipe.step(index, share, value, kept=value > best):
                    soup, best = candidate, value
                    coefficients = [value * (1 - share) for value in coefficients]
                    coefficients[index] += share
                    break
                del candidate
        if best == before:
            break
    return recipe.soup(soup, coefficients, best)


def barrier(first: Path, second: Path, score: Score, *, scores: tuple[float, float]) -> float:
    """Return the mean score of two ingredients minus the score of their midpoint.

    Far above zero, the two are not linearly mode-connected and every soup of them is worse than
    they are, usually because their decoders were initialized differently.

    Args:
        first: A checkpoint.
        second: Another checkpoint.
        score: Scores the midpoint.
        scores: Scores of the two ingredients.
    """
    midpoint = _weights(second)
    _mix(_weights(first), midpoint, 0.5, into=midpoint)
    return sum(scores) / 2 - score(midpoint)


def check_barriers(
    paths: Sequence[Path], score: Score, *, scores: Sequence[float]
) -> list[dict[str, Any]]:
    """Return the :func:`barrier` between the best ingredient and each other one.

    Warns of a midpoint that scores below both ingredients.

    Args:
        paths: Checkpoints.
        score: Scores a midpoint.
        scores: Scores of the ingredients alone.

    Returns:
        ``files`` and ``barrier`` of each pair; JSON can hold it.
    """
    best = max(range(len(paths)), key=lambda index: _ordered(scores[index]))
    barriers = []
    for index in range(len(paths)):
        if index == best:
            continue
        ends = scores[best], scores[index]
        height = barrier(paths[best], paths[index], score, scores=ends)
        barriers.append({"files": [str(paths[best]), str(paths[index])], "barrier": height})
        if height > sum(ends) / 2 - min(ends):
            warnings.warn(
                f"{paths[best]} and {paths[index]} are not linearly mode-connected: the score of "
                f"their midpoint is {height:.3f} below the mean of their own, so a soup of both is "
                "of no use; let them vote, or train both from the same pretrained weights",
                stacklevel=2,
            )
    return barriers


def check_selection(
    paths: Sequence[Path], selection: Collection[str], *, allow_leak: bool = False
) -> int:
    """Return how many images of a selection set an ingredient trained on; refuse any by default.

    A score on such images is too high for that ingredient and for every soup it is in, so it must
    not choose anything. Each fold of a k-fold trains on the other folds' validation images.

    Args:
        paths: Checkpoints, which record the digests of the images they trained on.
        selection: Digests of the images that choose.
        allow_leak: Return the number even if it is not zero.

    Raises:
        LeakError: Images leak, or a checkpoint does not record what it trained on.
    """
    chosen, leaked, guilty = set(selection), set[str](), []
    for path in paths:
        state = checkpoint.entries(path, _NEEDS)
        if "trained_on" not in state and not allow_leak:
            raise LeakError(
                f"{path}: does not record which images it trained on, so its score may be too "
                "high; use another checkpoint, or pass allow_leak=True"
            )
        seen = chosen.intersection(state.get("trained_on", ()))
        leaked |= seen
        guilty += [str(path)] if seen else []
    if leaked and not allow_leak:
        raise LeakError(
            f"{len(leaked)} of the {len(chosen)} images that would choose were trained on by "
            f"{', '.join(guilty)}; hold out a selection set (data.selection), or pass "
            "allow_leak=True"
        )
    return len(leaked)


def as_checkpoint(soup: Soup) -> dict[str, Any]:
    """Return the entries of a soup's checkpoint, which loads like that of a trained model.

    Its ``trained_on`` has every image that any member trained on.
    """
    states = [checkpoint.entries(path, _NEEDS) for path in soup.members]
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

    A soup needs this: the mean of several models' statistics is not the statistics of the mean
    model. The new ones are the exact mean and variance of all values that reach the layer, over all
    ranks and batch sizes (Wu and Johnson 2021, https://arxiv.org/abs/2105.07576). Unlike them, the
    running mean of ``torch.optim.swa_utils.update_bn`` counts a short last batch like a full one
    and omits the variance between batches.

    Args:
        model: Its frozen layers (those that stay in evaluation mode) do not change. Dropout is off
            during the pass.
        batches: Normalized images, two or more at a time, on the model's device. Not read if no
            layer needs them.

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


class _Recipe:
    """Compares ingredients with the first of them, and records the soup's making."""

    def __init__(self, kind: str, paths: Sequence[Path]) -> None:
        if not paths:
            raise CheckpointError("a soup needs at least one checkpoint")
        self.kind = kind
        self.paths = paths
        self.sha256 = [checkpoint.digest(path) for path in paths]
        self.scores: list[float | None] = [None] * len(paths)
        self.steps: list[dict[str, Any]] = []
        first, *others = states = [checkpoint.entries(path, _NEEDS) for path in paths]
        for path, other in zip(paths[1:], others, strict=True):
            _compare(paths[0], first, path, other)
        self.dtypes = {key: tensor.dtype for key, tensor in checkpoint.weights(first).items()}
        starts = {str(path): state.get("init") for path, state in zip(paths, states, strict=True)}
        apart = [f"{a} and {b}" for a, b in combinations(starts, 2) if starts[a] != starts[b]]
        if apart:
            warnings.warn(
                "these were initialized with different weights, so a soup of them may be of no "
                f"use: {'; '.join(apart)}",
                stacklevel=3,
            )

    def rank(self, score: Score, scores: Sequence[float] | None) -> list[int]:
        """Return ingredients from best to worst; those with a score of NaN come last."""
        if scores is None:
            scores = [score(_weights(path)) for path in self.paths]
        self.scores = [_ordered(value) for value in scores]
        return sorted(range(len(self.paths)), key=self.score, reverse=True)

    def score(self, index: int) -> float:
        """Return the score of an ingredient alone."""
        value = self.scores[index]
        assert value is not None
        return value

    def step(self, index: int, share: float, score: float, *, kept: bool) -> bool:
        """Record a trial mixture, and return ``kept``."""
        file = str(self.paths[index])
        self.steps.append({"file": file, "share": share, "score": score, "kept": kept})
        return kept

    def soup(self, model: State, coefficients: Sequence[float], score: float | None = None) -> Soup:
        """Return the soup, its tensors in the types of the first ingredient."""
        columns = zip(self.paths, self.sha256, self.scores, coefficients, strict=True)
        ingredients = [
            {"file": str(path), "sha256": digest, "score": own, "weight": coefficient}
            for path, digest, own, coefficient in columns
        ]
        recipe = {
            "kind": self.kind,
            "score": score,
            "ingredients": ingredients,
            "steps": self.steps,
            "refused": [entry["file"] for entry in ingredients if entry["weight"] == 0],
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
    return {key: (tuple(x.shape), x.is_floating_point()) for key, x in model.items()}


def _ordered(score: float) -> float:
    """Return the score, minus infinity in place of NaN."""
    return -math.inf if math.isnan(score) else float(score)


def _weights(path: Path) -> State:
    """Return a checkpoint's weights, averaged ones where it has them, in float32 or better.

    They are mapped from the file privately: writing to them does not change the file.
    """
    state = checkpoint.weights(checkpoint.entries(path, _NEEDS))
    return {
        key: tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if tensor.is_floating_point()
        else tensor
        for key, tensor in state.items()
    }


_PIECE = 2**18
"""Values mixed at a time, so that temporary tensors are small."""


def _mix(soup: State, other: State, share: float, *, into: State) -> None:
    """Write ``(1 - share) * soup + share * other`` into one of the two."""
    for key, mine in soup.items():
        if mine.is_floating_point():
            rows = max(1, _PIECE // max(1, math.prod(mine.shape[1:])))
            parts = (torch.atleast_1d(x).split(rows) for x in (mine, other[key], into[key]))
            for own, another, result in zip(*parts, strict=True):
                # In this form equal values stay equal to the bit, even the sign of a zero.
                torch.sub(own, own - another, alpha=share, out=result)
        else:
            into[key] = mine
