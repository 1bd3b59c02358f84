"""Metrics computed from one integer confusion matrix, summed over images and ranks.

Counts are int64 and additive, so the shards of a data set sum to the whole. Ratios come last.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segkit.core.backend import on_cpu
from segkit.core.labels import IGNORE

FEW_IMAGES = 30
"""With fewer images, tables note that intervals of the mean IoU may be unreliable."""


def classes_of(logits: Tensor) -> Tensor:
    """Return the class of the largest logit at each pixel; the lowest index among equal logits.

    One logit plane is binary: class 1 where the logit is above 0.

    Shape:
        logits: (B, C, H, W), C up to 255
        classes: (B, H, W) uint8
    """
    if logits.shape[1] > IGNORE:
        raise ValueError(f"expected at most {IGNORE} classes, got {logits.shape[1]}")
    if logits.shape[1] == 1 or not on_cpu(logits):
        return _largest(logits).to(torch.uint8)
    # On the CPU, comparing planes is many times faster than argmax over an axis that is not the
    # last in memory.
    classes = torch.zeros_like(logits[:, 0], dtype=torch.uint8)
    for image, mask in zip(logits, classes, strict=True):
        if image.stride(0) == 1 and image.numel() > len(image):  # channels_last
            mask.copy_(image.argmax(0))
            continue
        best = image[0].clone()
        for c, plane in enumerate(image[1:], 1):
            better = (plane > best).view(torch.uint8).mul_(c)
            torch.maximum(mask, better, out=mask)  # c grows, so the last improvement remains
            torch.maximum(best, plane, out=best)
    return classes


def pixel_counts(
    predicted: Tensor, target: Tensor, num_classes: int, *, per_image: bool = True
) -> Tensor:
    """Count the pixels of each pair of true and predicted class, without waiting for a GPU.

    :func:`matrices_of` turns the counts of any number of batches into confusion matrices.

    Args:
        predicted: (B, C, H, W) logits, or (B, H, W) class indices.
        target: (B, H, W) class indices, 255 for ignored pixels.
        num_classes: C; 1 is binary and counts as 2.
        per_image: Count each image; else all of them together, as one image.

    Shape:
        counts: (B, C + 2, C + 1) int64; row 0 has ignored pixels, rows 1 to C the classes; the last
            row and column have values that are no class index

    Raises:
        ValueError: The sizes differ; on the CPU also for a value that is no class index.
    """
    classes = max(2, num_classes)
    logits = predicted if predicted.dim() == 4 else None
    if logits is not None:
        predicted = classes_of(logits) if on_cpu(logits) else _largest(logits)
    if predicted.shape != target.shape:
        raise ValueError(
            f"expected predictions and target of the same size, "
            f"got {tuple(predicted.shape)} and {tuple(target.shape)}"
        )
    if on_cpu(target):
        counts = _pixel_counts_cpu(predicted, target, classes)
        return counts if per_image else counts.sum(0, keepdim=True)
    rows, columns, images = classes + 2, classes + 1, len(target) if per_image else 1
    if target.dtype != torch.uint8:  # any value that is neither a class nor 255 becomes C
        target = torch.where((target < 0) | (target > IGNORE), classes, target).to(torch.uint8)
    row = (target + 1).clamp_max_(min(classes + 1, IGNORE))  # 255 + 1 is 0
    column = predicted
    if logits is None or logits.shape[1] > classes:  # any value that is no class becomes C
        column = torch.where((predicted < 0) | (predicted >= classes), classes, predicted.int())
    code = torch.add(column, row, alpha=columns)
    bins = images * rows * columns
    if images > 1:
        code += torch.arange(0, bins, rows * columns, device=code.device)[:, None, None]
    if code.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        counts = torch.histc(code, bins, 0, bins)  # bincount would wait for the device
    else:
        counts = torch.bincount(code.flatten(), minlength=bins)
    return counts.view(-1, rows, columns).long()


def _pixel_counts_cpu(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    predicted, target = _as_bytes(predicted, "prediction"), _as_bytes(target, "target")
    if predicted.numel() and (largest := int(predicted.max())) >= classes:
        raise ValueError(f"prediction holds {largest}, but there are {classes} classes")
    # Each uint8 value has a row, so no pixel needs a test: ignored and invalid values are
    # separated after counting.
    columns = classes + 1
    bins = (IGNORE + 1) * columns
    code_type = torch.int16 if bins <= torch.iinfo(torch.int16).max else torch.int32
    counts = torch.empty(len(target), IGNORE + 1, columns, dtype=torch.int64)
    for b, (mask, truth) in enumerate(zip(predicted, target, strict=True)):
        code = truth.to(code_type).mul_(columns).add_(mask)
        counts[b] = torch.bincount(code.flatten(), minlength=bins).view(-1, columns)
    invalid = counts[:, classes:IGNORE].sum((0, 2))
    if invalid.any():
        value = classes + int(invalid.nonzero()[0])
        raise ValueError(
            f"target holds {value}, but there are {classes} classes and {IGNORE} for ignored"
        )
    none = torch.zeros_like(counts[:, :1])
    return torch.cat([counts[:, IGNORE:], counts[:, :classes], none], 1)


def matrices_of(counts: Tensor) -> Tensor:
    """Return the confusion matrices of :func:`pixel_counts`; rows are the truth.

    Shape:
        counts: (B, C + 2, C + 1)
        matrices: (B, C, C) int64

    Raises:
        ValueError: A target or a prediction has a value that is no class index.
    """
    classes = counts.shape[2] - 1
    if counts[:, -1].sum() + counts[:, :, -1].sum() > 0:
        labels = int(counts[:, -1].sum())
        what, pixels = ("target", labels) if labels else ("prediction", int(counts[..., -1].sum()))
        raise ValueError(
            f"{what} holds no class index in {pixels} pixels; expected 0 to {classes - 1}, or "
            f"{IGNORE} for ignored pixels of a target"
        )
    return counts[:, 1:-1, :-1]


def confusion_matrix(predicted: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Return the confusion matrix of all images together, (C, C) int64; rows are the truth.

    Arguments as in :func:`pixel_counts`.

    Raises:
        ValueError: The target or the prediction holds a value that is no class index.
    """
    return matrices_of(pixel_counts(predicted, target, num_classes, per_image=False))[0]


def counts_of(matrices: Tensor) -> Tensor:
    """Return (correct, true, predicted) pixels of each class: (..., C, C) to (..., C, 3)."""
    right = matrices.diagonal(dim1=-2, dim2=-1)
    return torch.stack([right, matrices.sum(-1), matrices.sum(-2)], -1)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of a set of images, in 0..1; None for a class in neither truth nor prediction."""

    miou: float | None
    mean_dice: float | None
    pixel_accuracy: float | None
    iou: tuple[float | None, ...]
    dice: tuple[float | None, ...]
    absent: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as JSON values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def scores(matrix: Tensor, *, include_background: bool = True) -> Scores:
    """Return the scores of a confusion matrix of any number of images.

    Args:
        include_background: Include class 0 in the means.

    Shape:
        matrix: (C, C) integer counts; rows are the truth
    """
    right, true, predicted = counts_of(matrix).double().unbind(-1)
    iou = right / (true + predicted - right)
    dice = 2 * right / (true + predicted)
    first = 0 if include_background else 1
    return Scores(
        miou=_number(iou[first:].nanmean()),
        mean_dice=_number(dice[first:].nanmean()),
        pixel_accuracy=_number(right.sum() / true.sum()),
        iou=tuple(map(_number, iou)),
        dice=tuple(map(_number, dice)),
        absent=tuple(iou.isnan().nonzero()[:, 0].tolist()),
    )


def per_image_miou(counts: Tensor) -> Tensor:
    """Return each image's mean IoU over its true or predicted classes; NaN if it has none.

    Shape:
        counts: (..., C, 3), from :func:`counts_of`
        miou: (...), float64
    """
    return class_iou(counts).nanmean(-1)


def class_iou(counts: Tensor) -> Tensor:
    """Return the IoU of each class, (..., C, 3) to (..., C) float64; NaN if it has no pixel."""
    right, true, predicted = counts.double().unbind(-1)
    return right / (true + predicted - right)


Statistic = Callable[[Tensor], Tensor]
"""Maps counts of each class, (..., C, K), to a value of each class, (..., C), or NaN. The second
count is that of the truth."""


def bootstrap_interval(
    counts: Tensor, *, level: float = 0.95, rounds: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return a bootstrap confidence interval of the mean IoU.

    Efron 1979, https://doi.org/10.1214/aos/1176344552
    Hesterberg 2015, https://doi.org/10.1080/00031305.2015.1089789

    Args:
        level: Confidence level.
        rounds: Number of bootstrap samples.
        seed: Seed of the samples.

    Shape:
        counts: (N, C, 3), from :func:`counts_of`

    Departs from the plain percentile interval, which is too low if few images have a class: a
    sample without any image of a class leaves that class out of its mean (false predictions alone
    would count as IoU 0), and the quantiles are Hesterberg's expanded ones. Bias-corrected
    quantiles (BC, BCa) contain the mean IoU less often.
    """
    values = _bootstrap(counts, class_iou, rounds, seed)
    return _interval(values.nanmean(-1), _expanded(level, len(counts)))


def summary(counts: Tensor, statistic: Statistic) -> dict[str, Any]:
    """Return a statistic's mean over classes and its classes' values, with bootstrap intervals.

    Shape:
        counts: (N, C, K), counts of the images, which sum

    Returns:
        ``mean``, ``interval``, ``per_class`` and ``per_class_intervals``; None where no image has
        a class. JSON values.
    """
    values = statistic(counts.sum(0))
    redrawn = _bootstrap(counts, statistic, 1000, 0)
    level = _expanded(0.95, len(counts))
    columns = [redrawn.nanmean(-1), *redrawn.unbind(-1)]
    numbers = [_number(value) for value in (values.nanmean(), *values)]
    intervals = [
        None if number is None else [*_interval(column, level)]
        for number, column in zip(numbers, columns, strict=True)
    ]
    return {
        "mean": numbers[0],
        "interval": intervals[0],
        "per_class": numbers[1:],
        "per_class_intervals": intervals[1:],
    }


def paired_difference(
    counts_a: Tensor, counts_b: Tensor, *, level: float = 0.95, rounds: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean IoU of b minus that of a on the same images, and its interval (low, high).

    Both are scored on the same bootstrap samples, so the samples' difficulty cancels out.
    Arguments as in :func:`bootstrap_interval`.
    """
    if counts_a.shape != counts_b.shape:
        raise ValueError(
            f"expected counts of the same images and classes, "
            f"got {tuple(counts_a.shape)} and {tuple(counts_b.shape)}"
        )
    samples = _resamples(len(counts_a), rounds, seed)
    whole = torch.ones(1, len(counts_a), dtype=torch.float64)
    difference, redrawn = (
        per_image_miou(_resampled(draws, counts_b)) - per_image_miou(_resampled(draws, counts_a))
        for draws in (whole, samples)
    )
    return (float(difference), *_interval(redrawn, level))


def _largest(logits: Tensor) -> Tensor:
    """Return :func:`classes_of` as int64."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def _as_bytes(x: Tensor, what: str) -> Tensor:
    """Return class indices as uint8, after checking their range."""
    if x.dtype != torch.uint8 and x.numel():
        for extreme in map(int, x.aminmax()):
            if not 0 <= extreme <= IGNORE:
                raise ValueError(f"{what} holds {extreme}; class indices are 0 to {IGNORE}")
    return x.to(torch.uint8)


def _number(x: Tensor) -> float | None:
    return None if x.isnan() else x.item()


def _resamples(images: int, rounds: int, seed: int) -> Tensor:
    """Return the number of times that each round draws each image, (rounds, images)."""
    if not images:
        raise ValueError("expected counts of at least one image")
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.multinomial(images, [1 / images] * images, rounds)).double()


def _bootstrap(counts: Tensor, statistic: Statistic, rounds: int, seed: int) -> Tensor:
    """Return a statistic of bootstrap samples, (rounds, C)."""
    redrawn = _resampled(_resamples(len(counts), rounds, seed), counts)
    labelled = redrawn[..., 1] > 0
    redrawn[~labelled & counts[..., 1].any(0).cpu()] = 0  # no true or predicted pixel: no value
    return statistic(redrawn)


def _resampled(draws: Tensor, counts: Tensor) -> Tensor:
    """Return the counts of bootstrap samples, (rounds, C, K)."""
    return (draws @ counts.cpu().flatten(1).double()).view(len(draws), *counts.shape[1:])


def _expanded(level: float, images: int) -> float:
    """Return the level whose percentile interval is as wide as Student's t interval at ``level``.

    The variance of bootstrap samples is too small by ``(N - 1) / N``, and so is the normal quantile
    if the variance is estimated from few images (Hesterberg 2015, section 3.2).
    """
    if images == 1:
        return level
    normal, others = NormalDist(), images - 1
    z = normal.inv_cdf((1 + level) / 2)
    # Abramowitz and Stegun 1964, 26.7.5
    t = z + (z**3 + z) / (4 * others) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * others**2)
    return 2 * normal.cdf(t * sqrt(images / others)) - 1


def _interval(values: Tensor, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.nanquantile(values.numpy(), [tail, 1 - tail])
    return float(low), float(high)
