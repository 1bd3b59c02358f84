"""Boundary metrics of masks, as integer counts that sum over images and ranks.

A pixel is within distance d of its class's boundary if a pixel of another class, or one outside of
the image, is in the square of side 2 d + 1 around it. Ignored pixels are in no class: they are
counted nowhere and make no boundary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from segkit.core.labels import IGNORE
from segkit.training.metrics import counts_of, matrices_of, pixel_counts

BAND = 0.02
"""Width of the boundary of Boundary IoU, as a share of the image's diagonal (its paper's)."""

TOLERANCE = 0.0075
"""Distance at which contours match, as a share of the diagonal (Csurka et al. 2013)."""

_BITS = 8
"""Classes whose contours are bits of a uint8 value, and are widened together."""


def boundary_counts(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Return the counts of Boundary IoU: pixel counts, of pixels near their class's boundary only.

    Cheng et al. 2021, https://arxiv.org/abs/2103.16562. The IoU of these counts is Boundary IoU;
    the distance is 2 % of the diagonal.

    Shape:
        predicted, truth: (H, W) integer, 255 for ignored pixels of the truth
        counts: (C, 3) int64, as of :func:`segkit.training.metrics.counts_of`
    """
    distance = _distance(truth, BAND)
    ignored = truth == IGNORE
    ours, theirs = (
        torch.where(near_boundary(mask, ignored, distance), mask, num_classes)
        for mask in (predicted, truth)
    )
    return _counts(ours, theirs, ignored, num_classes)


def contour_counts(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Return the counts of the boundary F-score; :func:`boundary_f` computes it.

    Csurka et al. 2013, https://doi.org/10.5244/C.27.32. A contour is the pixels within distance 1
    of their class's boundary; a contour pixel matches if the other mask has a contour pixel of its
    class at a distance of at most 0.75 % of the diagonal.

    Departs from the paper: distances are those of squares, and counts are summed over images.

    Shape:
        predicted, truth: (H, W) integer, 255 for ignored pixels of the truth
        counts: (C, 4) int64; matched true, true, predicted and matched predicted contour pixels
    """
    tolerance, ignored = _distance(truth, TOLERANCE), truth == IGNORE
    masks = predicted.to(torch.uint8), truth.to(torch.uint8)
    contours = [near_boundary(mask, ignored, 1) for mask in masks]
    matched = [torch.zeros_like(ignored), torch.zeros_like(ignored)]
    for first in range(0, num_classes, _BITS):
        bits = [
            (contour & (mask >= first) & (mask < first + _BITS)).to(torch.uint8) << mask % _BITS
            for mask, contour in zip(masks, contours, strict=True)
        ]
        for at in (0, 1):
            near = _window(bits[1 - at], tolerance, torch.bitwise_or)
            matched[at] |= (bits[at] & near) != 0
    columns = []
    for at, mask in enumerate(masks):
        own = torch.where(contours[at], mask, num_classes)
        same = torch.where(matched[at], mask, num_classes)
        columns.append(_counts(same, own, ignored, num_classes)[:, :2])
    (hit, predicted_pixels), (reached, true_pixels) = (pair.unbind(1) for pair in columns)
    return torch.stack([reached, true_pixels, predicted_pixels, hit], 1)


def boundary_f(counts: Tensor) -> Tensor:
    """Return the boundary F-score of each class; NaN for a class without contours.

    Shape:
        counts: (..., C, 4), from :func:`contour_counts`
        f: (..., C) float64
    """
    reached, true, predicted, hit = counts.double().unbind(-1)
    recall, precision = reached / true, hit / predicted
    f = (2 * recall * precision / (recall + precision)).nan_to_num(0.0)
    return torch.where((true > 0) | (predicted > 0), f, math.nan)


def near_boundary(mask: Tensor, ignored: Tensor, distance: int) -> Tensor:
    """Return which pixels are within a distance of their class's boundary.

    Two windowed extrema of the class indices answer for all classes at once.

    Shape:
        mask, ignored: (H, W) integer, and boolean
        near: (H, W) boolean
    """
    values = mask.to(torch.uint8)
    # Ignored pixels are 0 in both planes, less than any class's value.
    planes = torch.stack([values + 1, 255 - values]).masked_fill_(ignored, 0)
    largest, smallest = _window(planes, distance, torch.maximum)
    near = largest + smallest != 0  # uint8: (c + 1) + (255 - c) is 256, which is 0
    near[:distance] = near[-distance:] = True
    near[:, :distance] = near[:, -distance:] = True
    return near & ~ignored


def _distance(mask: Tensor, share: float) -> int:
    """Return a share of an image's diagonal in pixels, at least 1."""
    return max(1, round(share * math.hypot(*mask.shape)))


def _counts(predicted: Tensor, truth: Tensor, ignored: Tensor, num_classes: int) -> Tensor:
    """Return the counts of each class; ``num_classes`` stands for pixels that do not count."""
    target = torch.where(ignored, IGNORE, truth)
    matrices = matrices_of(pixel_counts(predicted[None], target[None], num_classes + 1))
    return counts_of(matrices)[0, :num_classes]


def _window(x: Tensor, distance: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine the values in the square of side 2 ``distance`` + 1 around each; 0 lies outside.

    Windows of 1, 2, 4, ... values are combined, so that the cost grows with their logarithm.
    """
    for dim in (-1, -2):
        size = 2 * distance + 1
        padding = [0, 0, 0, 0]
        padding[2 * (-1 - dim)] = padding[2 * (-1 - dim) + 1] = distance
        length, width = x.shape[dim], 1
        x = torch.nn.functional.pad(x, padding)
        while width < size:
            step = min(width, size - width)
            rest = x.shape[dim] - step
            x = combine(x.narrow(dim, 0, rest), x.narrow(dim, step, rest))
            width += step
        x = x.narrow(dim, 0, length)
    return x
