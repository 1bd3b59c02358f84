"""Stratified folds, and the selection set that is held out from all of them."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from segkit.core.errors import ConfigError, DataError, quoted
from segkit.core.files import matches_schema
from segkit.data.inputs import read_json
from segkit.data.loader import digests
from segkit.data.memo import MEMO, on_threads
from segkit.data.source import Source

SHARE_BINS = 3
"""Number of bins of a class's share of the pixels, used as labels for stratification."""


@dataclass(frozen=True)
class Split:
    """The validation images of each fold, and the selection set, as file names.

    Args:
        folds: The validation images of each fold.
        selection: Images that no fold uses for training or validation.
        train: Training images of every fold, if validation images come from another source;
            default: each fold trains on the validation images of the others.
    """

    folds: tuple[tuple[str, ...], ...]
    selection: tuple[str, ...] = ()
    train: tuple[str, ...] | None = None

    def training(self, fold: int) -> tuple[str, ...]:
        """Return the training images of ``fold``."""
        if self.train is not None:
            return self.train
        others = (names for other, names in enumerate(self.folds) if other != fold)
        return tuple(itertools.chain.from_iterable(others))

    @classmethod
    def load(cls, path: Path | str) -> "Split":
        """Read a split from a file of its fields as JSON.

        Raises:
            DataError: The file is not a split.
        """
        content = {"train": None, **read_json(path)}
        schema = {"folds": [[str]], "selection": [str], "train": ([str], None)}
        if not matches_schema(content, schema) or not content["folds"]:
            raise DataError(
                f"{path} is not a split; expected 'folds' and 'selection', lists of names"
            )
        train = content["train"]
        return cls(
            folds=tuple(map(tuple, content["folds"])),
            selection=tuple(content["selection"]),
            train=None if train is None else tuple(train),
        )


def class_pixels(source: Source, workers: int = 0) -> np.ndarray:
    """Count the pixels of each class in each mask; counts in the memo are used again.

    Returns:
        (N, num_classes) int64; ignored pixels are not counted.
    """
    images = digests(source, range(len(source)))

    def count(i: int) -> list[int]:
        key = f"{images[i]} {source.label_digest(i)} class pixels"
        known = MEMO.numbers(key)
        if known is None or len(known) != len(source.classes):
            values = source.mask(i).numpy().ravel()
            known = np.bincount(values, minlength=256)[: len(source.classes)].tolist()
            MEMO.keep(key, known)
        return known

    counts = on_threads(count, range(len(source)), "counting", threads=max(1, workers))
    return np.array(counts, np.int64)


def repeat_factors(pixels: np.ndarray, threshold: float) -> tuple[float, ...]:
    """Return how often each image is used, more often if it has a class that few images have.

    A class that is in a share f of the images has the factor max(1, sqrt(threshold / f)), an image
    the largest factor of its classes (Gupta et al. 2019, https://arxiv.org/abs/1908.03195).
    """
    present = pixels > 0
    share = present.mean(0)
    factors = np.sqrt(np.maximum(1.0, threshold / np.maximum(share, 1 / len(pixels))))
    return tuple(np.maximum(1.0, (present * factors).max(1)).tolist())


def make_folds(
    names: Sequence[str],
    pixels: np.ndarray,
    *,
    folds: int,
    selection: float,
    seed: int,
    groups: Mapping[str, str | int] | None = None,
    stratify: bool = True,
) -> Split:
    """Divide images into a selection set and folds with similar class distributions.

    Iterative stratification: Sechidis, Tsoumakas, Vlahavas 2011,
    https://doi.org/10.1007/978-3-642-23808-6_10

    The labels of an image are its classes and, for each, whether its share of the pixels is small,
    medium or large. The selection set is split off first.

    Args:
        names: File names; their order does not matter.
        pixels: (N, num_classes), result of :func:`class_pixels`.
        folds: Number of folds, at least 2.
        selection: Share of the images, 0 to below 1; with 0 there is no selection set.
        seed: Seed of the random order that breaks ties.
        groups: Group of each file name; images of a group stay together.
        stratify: Divide by the labels; if false, at random, to parts of the same sizes.

    Raises:
        ConfigError: ``folds`` or ``selection`` is out of range.
        DataError: There are too few images or groups for that many parts.

    Departs from the paper: assigns groups of images with their label counts, those with the highest
    count of the current label first; without ``groups``, each image is a group. A part that has its
    number of images gets no more, so its size is off by less than one group.
    """
    if folds < 2 or not 0 <= selection < 1:
        raise ConfigError(
            f"expected at least 2 folds and a selection of 0 to below 1, got {folds}, {selection}"
        )
    order = sorted(range(len(names)), key=lambda i: names[i])
    labels = _labels(pixels if stratify else np.zeros((len(names), 0)))[order]
    ordered = [names[i] for i in order]
    keys = [str(groups[name]) if groups else name for name in ordered]
    unit_of = {key: unit for unit, key in enumerate(dict.fromkeys(keys))}
    owner = np.array([unit_of[key] for key in keys])
    # label counts of each unit; the last column is its number of images
    counts = np.zeros((len(unit_of), labels.shape[1] + 1), np.int64)
    np.add.at(counts, owner, np.column_stack([labels, np.ones(len(ordered), np.int64)]))

    rng = np.random.default_rng(seed)
    part = np.ones(len(unit_of), np.int64)  # 0: the selection set; 1, 2, ...: the folds
    if selection:
        part = _distribute(counts, np.array([selection, 1 - selection]), rng)
    rest = np.flatnonzero(part == 1)
    part[rest] = 1 + _distribute(counts[rest], np.full(folds, 1 / folds), rng)

    parts: list[list[str]] = [[] for _ in range(folds + 1)]
    for name, unit in zip(ordered, owner, strict=True):
        parts[part[unit]].append(name)
    if not all(parts[1:]) or (selection and not parts[0]):
        units = f"{len(unit_of)} groups of images" if groups else f"{len(names)} images"
        raise DataError(
            f"{units} are too few for {folds} folds and a selection of {selection:g}; "
            "take fewer folds, another selection, or more images"
        )
    return Split(tuple(map(tuple, parts[1:])), tuple(parts[0]))


def read_groups(
    file: str | None, pattern: str | None, names: Sequence[str]
) -> dict[str, str] | None:
    """Return the group of each image, from a JSON file or from its name.

    Args:
        file: JSON object {file name: group}; it may contain other names too.
        pattern: Regular expression with one capturing group, searched for in the file name.
        names: File names of the images.

    Returns:
        Group by file name, or ``None`` if neither ``file`` nor ``pattern`` is given.

    Raises:
        ConfigError: Both are given, or ``pattern`` is invalid.
        DataError: An image has no group.
    """
    if file is not None and pattern is not None:
        raise ConfigError("data.groups and data.group_pattern: expected one of them, not both")
    if file is not None:
        content = read_json(file)
        for name in names:
            if not matches_schema(content.get(name), (str, int)):
                raise DataError(
                    f"{file} gives {quoted(name)} no group; "
                    "expected a string or an integer for each image"
                )
        return {name: str(content[name]) for name in names}
    if pattern is None:
        return None
    try:
        expression = re.compile(pattern)
    except re.error as error:
        sentence = f"data.group_pattern: {quoted(pattern)} is malformed ({error})"
        raise ConfigError(sentence) from error
    if expression.groups != 1:
        raise ConfigError(
            f"data.group_pattern: {quoted(pattern)} has {expression.groups} parentheses; "
            "expected one"
        )
    groups = {}
    for name in names:
        match = expression.search(name)
        if match is None or match[1] is None:
            raise DataError(
                f"{quoted(name)} does not match data.group_pattern {quoted(pattern)}; correct it"
            )
        groups[name] = match[1]
    return groups


class PartShares(NamedTuple):
    """Class shares of a fold or the selection set: of its images and of its pixels."""

    title: str
    images: int
    with_class: list[float]
    of_pixels: list[float]


def shares(split: Split, names: Sequence[str], pixels: np.ndarray) -> list[PartShares]:
    """Return the class shares of each part; arguments as in :func:`table`."""
    index = {name: i for i, name in enumerate(names)}
    parts = {"selection": split.selection} if split.selection else {}
    parts |= {f"fold {number}": fold for number, fold in enumerate(split.folds)}
    described = []
    for title, members in parts.items():
        counts = pixels[[index[name] for name in members]]
        of_pixels = counts.sum(0) / max(1, counts.sum())
        with_class = (counts > 0).mean(0).tolist()
        described.append(PartShares(title, len(members), with_class, of_pixels.tolist()))
    return described


def table(split: Split, names: Sequence[str], pixels: np.ndarray, classes: Sequence[str]) -> str:
    """Return a table of class shares: percent of a part's images with a class, and of its pixels.

    It has at most 80 columns; parts that do not fit are in further blocks below. ``pixels`` is the
    result of :func:`class_pixels`, in the order of ``names``.
    """
    columns = []
    for part in shares(split, names, pixels):
        pairs = zip(part.with_class, part.of_pixels, strict=True)
        cells = [f"{100 * a:3.0f} {100 * b:5.1f}" for a, b in pairs]
        columns.append([part.title, f"{part.images}", "img   px%", *cells])
    first = ["", "images", "", *(f"{name:.16}" for name in classes)]
    blocks = []
    for start in range(0, len(columns), 6):  # as many as fit in 80 columns
        rows = zip(first, *columns[start : start + 6], strict=True)
        lines = [f"{title:16}" + "".join(f"{c:>10}" for c in cells) for title, *cells in rows]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _labels(pixels: np.ndarray) -> np.ndarray:
    """Return (N, labels) of 0 and 1: presence of each class, then each bin of its pixel share."""
    present = pixels > 0
    share = pixels / np.maximum(1, pixels.sum(1, keepdims=True))
    columns = [present]
    for of_class, shown in zip(share.T, present.T, strict=True):
        if not shown.any():
            continue
        inner = np.quantile(of_class[shown], np.arange(1, SHARE_BINS) / SHARE_BINS)
        bins = np.searchsorted(inner, of_class)
        columns.append((bins[:, None] == np.arange(SHARE_BINS)) & shown[:, None])
    return np.concatenate(columns, axis=1).astype(np.int64)


def _distribute(counts: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Assign each unit to a part so that every label is divided according to ``shares``.

    Shape:
        counts: (units, labels + 1), label counts; the last column is the number of images
        shares: (parts,), whose sum is 1
        returns: (units,), the part of each unit
    """
    desired = shares[:, None] * counts.sum(0)
    part = np.full(len(counts), -1)
    while (part < 0).any():
        open_units = np.flatnonzero(part < 0)
        left = (counts[open_units, :-1] > 0).sum(0)
        # the rarest remaining label; units without labels are assigned by their size alone
        label = int(np.where(left > 0, left, len(counts) + 1).argmin()) if left.any() else -1
        holders = rng.permutation(open_units[counts[open_units, label] > 0])
        for unit in holders[np.argsort(-counts[holders, label], kind="stable")]:
            room = rng.permutation(np.flatnonzero(desired[:, -1] > 1e-9))
            chosen = max(room, key=lambda k: desired[k, [label, -1]].round(9).tolist())
            part[unit] = chosen
            desired[chosen] -= counts[unit]
    return part
