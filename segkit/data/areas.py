"""Connected areas of a mask."""

from typing import NamedTuple

import numpy as np

from segkit.core.labels import IGNORE

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels; right and bottom are exclusive."""


class Instance(NamedTuple):
    """An object; if labels are masks, a connected area of one class."""

    class_index: int
    area: int
    box: Box
    annotation: int | None = None


def connected_areas(mask: np.ndarray) -> list[Instance]:
    """Return the 4-connected areas of each class; ignored pixels belong to none."""
    first, _, label = _joined_runs(mask)
    order = np.argsort(label, kind="stable")
    roots, area_starts = np.unique(label[order], return_index=True)

    def over_areas(function: np.ufunc, values: np.ndarray) -> list[int]:
        return function.reduceat(values[order], area_starts).tolist()

    row, column = np.divmod(first, mask.shape[1])
    length = np.diff(first, append=mask.size)
    low = over_areas(np.minimum, column), over_areas(np.minimum, row)
    high = over_areas(np.maximum, column + length), over_areas(np.maximum, row + 1)
    values = mask.ravel()[first[roots]].tolist()
    areas = zip(values, over_areas(np.add, length), zip(*low, *high, strict=True), strict=True)
    return [Instance(value, area, box) for value, area, box in areas if value != IGNORE]


def connected_regions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each pixel's region of connected equal values, and each region's value.

    Shape:
        mask: (H, W)
        numbers: (H, W) int64, from 0
        values: (regions,), of the mask's type
    """
    first, run, label = _joined_runs(mask)
    roots, number = np.unique(label, return_inverse=True)
    return number.reshape(-1)[run], mask.ravel()[first[roots]]


def _joined_runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join the runs of equal values in rows to 4-connected areas.

    Returns:
        The first pixel of each run, as an index of the flat mask; the run of each pixel, (H, W);
        and for each run the first run of its area.
    """
    starts = np.ones(mask.shape, bool)
    starts[:, 1:] = mask[:, 1:] != mask[:, :-1]
    run = starts.cumsum().reshape(mask.shape) - 1
    first = np.flatnonzero(starts)
    below = mask[1:] == mask[:-1]
    pairs = np.unique(run[:-1][below] * len(first) + run[1:][below])
    upper, lower = np.divmod(pairs, len(first))
    label = np.arange(len(first))
    while (label[upper] != label[lower]).any():
        a, b = label[upper], label[lower]
        np.minimum.at(label, a, b)
        np.minimum.at(label, b, a)
        while (label != label[label]).any():
            label = label[label]
    return first, run, label
