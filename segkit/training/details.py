"""Boundary and object scores of an evaluation, from counts of each image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from segkit.core.distributed import all_reduce
from segkit.training.boundary import boundary_counts, boundary_f, contour_counts
from segkit.training.metrics import class_iou, summary
from segkit.training.objects import SIZES, object_counts


@dataclass(frozen=True)
class Details:
    """Counts of boundaries and objects, int64, equal on every rank."""

    boundaries: Tensor  # (N, C, 3), of boundary_counts
    contours: Tensor  # (N, C, 4), of contour_counts
    objects: Tensor  # (N, C, sizes, 2), of object_counts

    def to_dict(self) -> dict[str, Any]:
        """Return the means and classes' values of each score with their intervals, as JSON."""
        return {
            "boundary_iou": summary(self.boundaries, class_iou),
            "boundary_f": summary(self.contours, boundary_f),
        } | {
            f"recall_{size}": summary(self.objects[:, :, i], _recall)
            for i, size in enumerate(SIZES)
        }


class DetailCounter:
    """Counts boundaries and objects of images; :meth:`add` is a callback of an evaluation."""

    def __init__(self, indices: Sequence[int], num_classes: int) -> None:
        self._row = {index: number for number, index in enumerate(indices)}
        self._classes = classes = max(2, num_classes)  # 1 is binary
        shapes = (classes, 3), (classes, 4), (classes, len(SIZES), 2)
        self._counts = [torch.zeros(len(indices), *shape, dtype=torch.int64) for shape in shapes]

    def add(self, index: int, predicted: Tensor, truth: Tensor, _: Tensor) -> None:
        """Count an image of this rank's share: masks (H, W) uint8."""
        there = truth.to(predicted.device)
        functions = boundary_counts, contour_counts, object_counts
        for counts, function in zip(self._counts, functions, strict=True):
            counts[self._row[index]] = function(predicted, there, self._classes).cpu()

    def result(self, device: torch.device) -> Details:
        """Return the counts, summed over the ranks; all ranks call this."""
        return Details(*(all_reduce(counts.to(device)).cpu() for counts in self._counts))


def _recall(counts: Tensor) -> Tensor:
    """Return the share of recognized objects of each class, (..., C, 2) to (..., C)."""
    recognized, objects = counts.double().unbind(-1)
    return recognized / objects
