"""Calibration: a temperature for probabilities, and their distance from frequencies.

Guo et al. 2017, https://arxiv.org/abs/1706.04599
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from segkit.core.distributed import all_reduce
from segkit.core.labels import IGNORE
from segkit.inference.tta import sample_pixels
from segkit.training.metrics import summary

BINS = 15
"""Number of equal bins of confidence."""

_STEPS = 16  # per factor of 2
_TEMPERATURES = torch.exp2(torch.arange(-3 * _STEPS, 3 * _STEPS + 1) / _STEPS).double()


def sharpened(probabilities: Tensor, temperature: float) -> Tensor:
    """Return probabilities to the power of 1 / temperature, with a sum of 1.

    Of a softmax, this is the softmax of the logits divided by the temperature. Their order stays.

    Shape:
        probabilities: (..., C, H, W)
    """
    if temperature == 1:
        return probabilities
    return (probabilities.clamp_min(1e-30).log() / temperature).softmax(-3)


class TemperatureFit:
    """Fits the temperature with the highest likelihood of the true classes.

    All images, ``indices`` over all ranks, count equally. The likelihood of 97 temperatures from
    1/8 to 8 is computed at 1024 pixels of each image, in one pass; a parabola through the best and
    its neighbors gives the result.
    """

    def __init__(self, indices: Sequence[int]) -> None:
        self._row = {index: number for number, index in enumerate(indices)}
        self._losses = torch.zeros(len(indices), len(_TEMPERATURES), dtype=torch.float64)

    def add(self, index: int, probabilities: Tensor, target: Tensor) -> None:
        """Add an image of this rank's share.

        Shape:
            probabilities: (C, H, W)
            target: (H, W), 255 for ignored pixels
        """
        chosen = sample_pixels(target)
        if not len(chosen):
            return
        logs = probabilities.flatten(1)[:, chosen.to(probabilities.device)].cpu().double()
        logs = logs.clamp_min(1e-30).log()
        true = logs.gather(0, target.flatten()[chosen].long().cpu()[None])[0].mean()
        for i, temperature in enumerate(_TEMPERATURES):
            total = (logs / temperature).logsumexp(0).mean()
            self._losses[self._row[index], i] = total - true / temperature

    def temperature(self, device: torch.device) -> float:
        """Return the fitted temperature; all ranks call this."""
        losses = all_reduce(self._losses.to(device)).cpu().sum(0)
        best = min(max(int(losses.argmin()), 1), len(losses) - 2)
        left, middle, right = losses[best - 1 : best + 2].tolist()
        curvature = left - 2 * middle + right
        shift = 0.5 * (left - right) / curvature if curvature > 0 else 0.0
        return float(_TEMPERATURES[best]) * 2 ** (min(max(shift, -1.0), 1.0) / _STEPS)


class CalibrationCounter:
    """Sums for the expected calibration error and the Brier score of each class."""

    def __init__(self, indices: Sequence[int], num_classes: int) -> None:
        self._row = {index: number for number, index in enumerate(indices)}
        shape = len(indices), max(2, num_classes)  # 1 is binary
        self._errors = torch.zeros(*shape, 2 + BINS, dtype=torch.float64)
        self._squares = torch.zeros(*shape, 2, dtype=torch.float64)

    def add(self, index: int, probabilities: Tensor, target: Tensor) -> None:
        """Count an image of this rank's share.

        Shape:
            probabilities: (C, H, W)
            target: (H, W), 255 for ignored pixels
        """
        valid = (target != IGNORE).to(probabilities.device)
        p, y = probabilities[:, valid], target.to(probabilities.device)[valid].long()
        classes, row = len(p), self._row[index]
        confidence, predicted = p.max(0)
        pixels = torch.bincount(predicted, minlength=classes)
        bins = predicted * BINS + (confidence * BINS).long().clamp_(max=BINS - 1)
        surplus = (predicted == y).double() - confidence.double()
        gaps = torch.bincount(bins, surplus, minlength=classes * BINS).view(classes, BINS)
        self._errors[row] = torch.cat([pixels[:, None].expand(-1, 2).double(), gaps], 1).cpu()
        p[y, torch.arange(len(y), device=p.device)] -= 1
        self._squares[row, :, 0] = p.double().square().sum(1).cpu()
        self._squares[row, :, 1] = len(y)

    def result(self, device: torch.device) -> dict[str, Any]:
        """Return ``ece`` and ``brier`` with their intervals, as JSON; all ranks call this."""
        errors, squares = (
            all_reduce(sums.to(device)).cpu() for sums in (self._errors, self._squares)
        )
        return {"ece": summary(errors, _error), "brier": summary(squares, _mean_square)}


def _error(sums: Tensor) -> Tensor:
    """Return the calibration error of each predicted class, (..., C, 2 + bins) to (..., C)."""
    return sums[..., 2:].abs().sum(-1) / sums[..., 0].where(sums[..., 0] > 0, math.nan)


def _mean_square(sums: Tensor) -> Tensor:
    """Return the Brier score of each class, (..., C, 2) to (..., C)."""
    return sums[..., 0] / sums[..., 1].where(sums[..., 1] > 0, math.nan)
