"""Ingredients of a soup and their mixtures, streamed from files.

At most two sets of weights are in memory: the soup so far, and an ingredient, mapped from its file,
that the next mixture replaces. Floating-point tensors are averaged in float32 or better.
Integer buffers (Swin's index tables, BatchNorm's counters) are those of the first ingredient mixed.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from segkit.core import checkpoint
from segkit.core.errors import CheckpointError, quoted
from segkit.models.pretrained.reading import read_file

State = dict[str, Tensor]

Ingredient: TypeAlias = str | Path | Mapping[str, Tensor]
"""A state dict, or a file of one: a checkpoint, a ``.pth`` or a ``.safetensors`` of any program."""

Score = Callable[[State], float]
"""Returns the score of weights on the selection set; higher is better. For models with BatchNorm,
this function must call :func:`segkit.soup.reestimate_batchnorm` before it evaluates."""

NEEDS = ("classes", "model")
"""Entries of an ingredient."""


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


class Mixture:
    """A soup in the making: its weights, coefficients, score and steps so far."""

    def __init__(self, kind: str, ingredients: Sequence[Ingredient]) -> None:
        if not ingredients:
            raise CheckpointError("a soup needs at least one checkpoint")
        self.kind, self.ingredients = kind, ingredients
        self.names = [name_of(ingredient, number) for number, ingredient in enumerate(ingredients)]
        for name, ingredient in zip(self.names, ingredients, strict=True):
            _check_type(name, ingredient)
        self.sha256 = [_digest(ingredient) for ingredient in ingredients]
        self.scores: list[float | None] = [None] * len(ingredients)
        self.best = math.nan
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
        pairs = combinations(starts, 2)
        differing = [f"{a} and {b}" for (a, i), (b, j) in pairs if i and j and i != j]
        if differing:
            warnings.warn(
                "these were initialized with different weights, so a soup of them may be of no "
                f"use: {'; '.join(differing)}",
                stacklevel=3,
            )

    def start(self, score: Score, scores: Sequence[float] | None) -> list[int]:
        """Begin with the best ingredient; return all from best to worst, a score of NaN last."""
        if scores is None:
            scores = [score(read_weights(ingredient)) for ingredient in self.ingredients]
        ranked = [nan_last(value) for value in scores]
        self.scores = [*ranked]
        self.order = sorted(range(len(ranked)), key=ranked.__getitem__, reverse=True)
        self.best = ranked[self.order[0]]
        self.weights = read_weights(self.ingredients[self.order[0]])
        self.coefficients = [float(index == self.order[0]) for index in range(len(ranked))]
        return self.order

    def add(self, index: int, alpha: float, score: Score, *, if_equal: bool = False) -> bool:
        """Mix an ingredient in if that raises the score; return whether it did."""
        candidate = mixed(self.weights, self.ingredients[index], alpha)
        value = score(candidate)
        kept = value > self.best or (if_equal and value == self.best)
        if self.note(index, alpha, value, kept=kept):
            self.weights, self.best = candidate, value
            self.coefficients = shifted(self.coefficients, index, alpha)
        return kept

    def note(self, index: int, share: float, score: float, *, kept: bool, **others: Any) -> bool:
        """Record a step, in which an ingredient got a share; return ``kept``."""
        step = {"file": self.names[index], "share": share, "score": score, "kept": kept}
        self.steps.append({**step, **others})
        return kept

    def mean(self, members: Sequence[int]) -> State:
        """Return the mean of ingredients."""
        mean = read_weights(self.ingredients[members[0]])
        for count, index in enumerate(members[1:], 2):
            mean = mixed(mean, self.ingredients[index], 1 / count)
        return mean

    def set_members(self, members: Collection[int]) -> None:
        """Set the coefficients to those of the mean of these ingredients."""
        for index in range(len(self.ingredients)):
            self.coefficients[index] = 1 / len(members) if index in members else 0.0

    def check_fit(self, name: str, other: Ingredient) -> str:
        """Return the SHA-256 of weights that are no ingredient but of the same architecture.

        Raises:
            CheckpointError: They are of another architecture, or have other classes.
        """
        _check_type(name, other)
        _compare(self.names[0], _entries(self.ingredients[0]), name, _entries(other))
        return _digest(other)

    def soup(self, **others: Any) -> Soup:
        """Return the soup, its tensors in the types of the first ingredient.

        ``others`` are further entries of its recipe.
        """
        keys = ("file", "sha256", "score", "weight")
        columns = zip(self.names, self.sha256, self.scores, self.coefficients, strict=True)
        ingredients: list[dict[str, Any]] = [dict(zip(keys, row, strict=True)) for row in columns]
        recipe = {
            "kind": self.kind,
            "score": None if math.isnan(self.best) else self.best,
            "ingredients": ingredients,
            "steps": self.steps,
            "refused": [entry["file"] for entry in ingredients if entry["weight"] == 0],
            **others,
        }
        weights = {key: tensor.to(self.dtypes[key]) for key, tensor in self.weights.items()}
        return Soup(weights, recipe)


def name_of(ingredient: Ingredient, number: int) -> str:
    """Return what messages and recipes call an ingredient."""
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
        return checkpoint.entries(Path(ingredient), NEEDS)
    return {"model": read_file(Path(ingredient), keep_prefixes=True)}


def _digest(ingredient: Ingredient) -> str:
    """Return the SHA-256 of an ingredient; a checkpoint is verified."""
    if isinstance(ingredient, str | Path) and _is_checkpoint(Path(ingredient)):
        return checkpoint.digest(Path(ingredient))
    return checkpoint.digest_tensors(_entries(ingredient)["model"])


def _is_checkpoint(path: Path) -> bool:
    """Return whether segkit wrote the file; True if it is missing, so that loading reports that."""
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


def nan_last(score: float) -> float:
    """Return a score, minus infinity for NaN."""
    return -math.inf if math.isnan(score) else float(score)


def read_weights(ingredient: Ingredient) -> State:
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


def mixed(soup: State, ingredient: Ingredient, alpha: float | Mapping[str, float]) -> State:
    """Return ``(1 - alpha) * soup + alpha * ingredient``.

    ``alpha`` may be given for each tensor; those that it lacks, and integers, are the soup's.
    """
    mixture = read_weights(ingredient)
    for key, mine in soup.items():
        share = alpha.get(key) if isinstance(alpha, Mapping) else alpha
        if share is not None and mine.is_floating_point():
            for ours, theirs in _pieces(mine, mixture[key]):
                # In this form equal values stay equal to the bit, even the sign of a zero.
                torch.sub(ours, ours - theirs, alpha=share, out=theirs)
        else:
            mixture[key] = mine
    return mixture


def shifted(coefficients: Sequence[float], index: int, share: float) -> list[float]:
    """Return coefficients after an ingredient got a share."""
    return [x * (1 - share) + share * (i == index) for i, x in enumerate(coefficients)]


def inner_products(a: State, b: State) -> dict[str, float]:
    """Return the inner product of each floating-point tensor of two states, in float64."""
    return {
        key: sum(float((x.double() * y.double()).sum()) for x, y in _pieces(mine, b[key]))
        for key, mine in a.items()
        if mine.is_floating_point()
    }


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the rows of tensors of one shape, at most :data:`_PIECE` values at a time."""
    rows = max(1, _PIECE // max(1, math.prod(tensors[0].shape[1:])))
    yield from zip(*(torch.atleast_1d(x).split(rows) for x in tensors), strict=True)
