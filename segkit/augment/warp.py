"""Resampling of an image and its mask through a 3×3 matrix."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segkit.augment.geometry import resize_matrix, scale_matrix, shift_matrix
from segkit.core.labels import IGNORE, Size

_EXACT = 1e-9  # tolerance for whole numbers; products of float64 matrices are far more exact
_SOFT_SHRINK = math.sqrt(2)  # up to this factor, bilinear sampling skips no pixel that matters

Parts = tuple[Tensor, Tensor | None, Tensor | None]
"""An image (C, H, W), its mask (H, W), and 1 where the image is not padding, else 0 (H, W), or None
if there is no padding."""


def warp(image: Tensor, mask: Tensor | None, matrix: np.ndarray, size: Size) -> Parts:
    """Resample an image and its mask through one matrix.

    Flips, quarter turns and integer shifts copy pixels. Otherwise, the image is read bilinearly and
    the mask with nearest neighbor. An image that shrinks is first downsampled with anti-aliasing:
    always for matrices along the axes, from a factor of √2 for others. The factor of a perspective
    is measured at the output's center; if the horizon crosses the output, it is at most the one at
    the image's center.

    Args:
        image: (C, H, W) of any dtype; the result is float unless pixels are copied.
        mask: (H, W), or ``None``.
        matrix: (3, 3), maps points of the output to points of the image.
        size: Height and width of the output.

    Returns:
        The image with its border replicated outwards, and the mask with :data:`IGNORE` outside the
        image; they may share memory with the input.
    """
    matrix = _rounded(matrix)
    axes = _axes(matrix)
    if axes is None:
        return _warp_freely(image, mask, matrix, size)
    return _warp_along_axes(image, mask, matrix, axes, size)


def _rounded(matrix: np.ndarray) -> np.ndarray:
    """Normalize a matrix, and remove the rounding errors of numbers that should be integers."""
    matrix = matrix / matrix[2, 2]
    nearest = np.rint(matrix)
    return np.where(np.abs(matrix - nearest) < _EXACT, nearest, matrix)


class _Axes(NamedTuple):
    """A matrix that maps rows and columns to rows or columns: the factor and offset of each."""

    swap: bool
    rows: tuple[float, float]
    columns: tuple[float, float]

    @property
    def copies(self) -> bool:
        return all(
            abs(f) == 1 and offset == round(offset) for f, offset in (self.rows, self.columns)
        )


def _axes(matrix: np.ndarray) -> _Axes | None:
    (a, b, x), (c, d, y), (p, q, _) = matrix.tolist()
    if p or q:
        return None
    if not b and not c:
        return _Axes(False, (d, y), (a, x))
    return _Axes(True, (b, x), (c, y)) if not a and not d else None


def _warp_along_axes(
    image: Tensor, mask: Tensor | None, matrix: np.ndarray, axes: _Axes, size: Size
) -> Parts:
    rows, columns, inside = _source_lines(axes, size, image)
    if mask is not None:
        mask = _gather(mask, axes.swap, rows, columns)
        if inside is not None:
            mask = torch.where(inside > 0, mask, IGNORE)
    if not axes.copies:
        image, matrix, _ = _prepared(image, matrix, size, along_axes=True)
        rest = _axes(matrix)
        if rest is None or not rest.copies:
            return _sample(image, _grid(matrix, size, image)), mask, inside
        rows, columns, _ = _source_lines(rest, size, image)
    return _gather(image, axes.swap, rows, columns), mask, inside


def _warp_freely(image: Tensor, mask: Tensor | None, matrix: np.ndarray, size: Size) -> Parts:
    part, rest, box = _prepared(image, matrix, size, along_axes=False)
    grid = _grid(rest, size, part)
    sampled = _sample(part, grid)
    leaves = _extends_outside(matrix, size, image)
    if mask is None and not leaves:
        return sampled, None, None
    # Labels are shifted by 1, because grid_sample reads 0 outside the image.
    # The grid is relative to the box, so it applies to the mask's box at full size too.
    labels = image.new_zeros(image.shape[-2:]) if mask is None else mask
    shifted = F.grid_sample(
        labels[box].float().add_(1)[None, None], grid, mode="nearest", align_corners=False
    )[0, 0]
    if mask is not None:
        mask = shifted.short().sub_(1).to(torch.uint8)  # -1 becomes IGNORE
    return sampled, mask, shifted.clamp_(max=1) if leaves else None


def _source_lines(
    axes: _Axes, size: Size, image: Tensor
) -> tuple[np.ndarray, np.ndarray, Tensor | None]:
    """Return the rows and columns to read from, and 1 where the output lies inside the image."""
    have = image.shape[-2:]
    lines, within = [], []
    for (factor, offset), wanted, available in zip(
        (axes.rows, axes.columns), size, have[::-1] if axes.swap else have, strict=True
    ):
        at = np.floor((np.arange(wanted) + 0.5) * factor + offset + _EXACT).astype(np.int64)
        lines.append(at.clip(0, available - 1))
        within.append((at >= 0) & (at < available))
    if all(valid.all() for valid in within):
        return lines[0], lines[1], None
    inside = torch.from_numpy(within[0][:, None] & within[1]).to(image.device).float()
    return lines[0], lines[1], inside


def _gather(image: Tensor, swap: bool, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """Return rows and columns of an image, transposed first if ``swap``; a view if possible."""
    if swap:
        image = image.transpose(-1, -2)
    for dim, lines in ((-2, rows), (-1, columns)):
        steps = np.diff(lines)
        if (steps == 1).all():
            image = image.narrow(dim, int(lines[0]), len(lines))
        elif (steps == -1).all():
            image = image.narrow(dim, int(lines[-1]), len(lines)).flip(dim)
        else:
            break
    else:
        return image
    if dim == -1:
        rows = np.arange(len(rows))  # rows are already selected
    at = torch.from_numpy(rows[:, None] * image.shape[-1] + columns).flatten().to(image.device)
    picked = image.flatten(-2).index_select(-1, at)  # faster than along one dimension at a time
    return picked.unflatten(-1, (len(rows), len(columns)))


def _corners(matrix: np.ndarray, size: Size) -> tuple[list[float], list[float]]:
    """Return the x and the y in the image of the output's corners.

    If a perspective's horizon crosses the output, its corners are no bounds: returns ±infinity.
    """
    (a, b, c), (d, e, f), (p, q, r) = matrix.tolist()  # Python floats: faster than arrays of four
    height, width = size
    xs, ys = [], []
    for x, y in ((0, 0), (width, 0), (width, height), (0, height)):
        w = p * x + q * y + r
        if w * r <= 0:
            return [-math.inf, math.inf], [-math.inf, math.inf]
        xs.append((a * x + b * y + c) / w)
        ys.append((d * x + e * y + f) / w)
    return xs, ys


def _extends_outside(matrix: np.ndarray, size: Size, image: Tensor) -> bool:
    """Return whether the output extends outside the image."""
    have = image.shape[:-3:-1]  # x before y, as in points
    corners = _corners(matrix, size)
    return any(min(at) < 0 or max(at) > sides for at, sides in zip(corners, have, strict=True))


def _prepared(
    image: Tensor, matrix: np.ndarray, size: Size, *, along_axes: bool
) -> tuple[Tensor, np.ndarray, tuple[slice, slice]]:
    """Return the part of an image that is read, downsampled where needed, and its matrix.

    If ``along_axes``, a part with integer coordinates is upsampled to the output size too.

    Returns:
        The part, the matrix that reads it, and the part's rows and columns in the image.
    """
    have = image.shape[:-3:-1]  # x before y here, as in points
    corners = _corners(matrix, size)
    steps = _distances(matrix, (size[1] / 2, size[0] / 2))
    if math.isinf(corners[0][0]):  # near the horizon the factor is too large: take the smaller
        x, y, w = np.linalg.inv(matrix) @ [have[0] / 2, have[1] / 2, 1]
        other = _distances(matrix, (x / w, y / w))
        steps = min(steps[0], other[0]), min(steps[1], other[1])
    whole = along_axes and all(abs(x - round(x)) < _EXACT for at in corners for x in at)
    fits = whole and not _extends_outside(matrix, size, image)
    shrinks = [step > (1 if along_axes else _SOFT_SHRINK) for step in steps]
    boxes, lengths = [], []
    for at, available, step, shrink in zip(corners, have, steps, shrinks, strict=True):
        factor = step if shrink or fits else 1.0
        low, high = min(at), max(at)
        if along_axes and not whole and any(shrinks):
            low, high = 0, available  # only whole images resize to integer coordinates
        elif not whole:
            low, high = low - 2 * factor, high + 2 * factor
        first = min(math.floor(max(low + _EXACT, 0)), available - 1)
        last = max(math.ceil(min(high - _EXACT, available)), first + 1)
        boxes.append(slice(first, last))
        lengths.append(max(1, round((last - first) / factor)))
    columns, rows = boxes
    part = image[..., rows, columns]
    matrix = shift_matrix(-columns.start, -rows.start) @ matrix
    old, new = (part.shape[-2], part.shape[-1]), (lengths[1], lengths[0])
    if new != old:
        part = _resize(part, new)
        matrix = resize_matrix(new, old) @ matrix
    return part, _rounded(matrix), (rows, columns)


def _resize(image: Tensor, size: Size) -> Tensor:
    """Resize bilinearly with anti-aliasing; the result is rounded if the image is uint8."""
    # The uint8 kernel is several times as fast, but only on contiguous memory and on the CPU.
    packed = torch.channels_last if image.stride(0) == 1 else torch.contiguous_format
    batch = image[None].contiguous(memory_format=packed)
    if image.is_floating_point() or image.device.type == "cpu":
        return F.interpolate(batch, size, mode="bilinear", antialias=True)[0]
    return F.interpolate(batch.float(), size, mode="bilinear", antialias=True)[0].round_()


def _distances(matrix: np.ndarray, at: tuple[float, float]) -> tuple[float, float]:
    """Return the distance in x and in y between neighboring samples, at a point of the output."""
    (a, b, c), (d, e, f), (p, q, r) = matrix.tolist()
    x, y = at
    w = p * x + q * y + r
    u, v = (a * x + b * y + c) / w, (d * x + e * y + f) / w
    return math.hypot(a - u * p, b - u * q) / abs(w), math.hypot(d - v * p, e - v * q) / abs(w)


def _grid(matrix: np.ndarray, size: Size, image: Tensor) -> Tensor:
    """Return the grid for ``grid_sample``, whose coordinates are -1 to 1 from edge to edge."""
    height, width = image.shape[-2:]
    matrix = shift_matrix(-1, -1) @ scale_matrix(2 / width, 2 / height) @ matrix
    x = torch.arange(size[1], device=image.device) + 0.5
    y = torch.arange(size[0], device=image.device)[:, None] + 0.5
    (a, b, c), (d, e, f), (p, q, r) = matrix.tolist()
    planes = torch.empty(
        (1, 2, *size), device=image.device
    )  # separate planes for x and y are faster
    torch.add(x * a, y * b + c, out=planes[0, 0])
    torch.add(x * d, y * e + f, out=planes[0, 1])
    if p or q:
        planes /= x * p + (y * q + r)
    return planes.permute(0, 2, 3, 1)


def _sample(image: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(image.float()[None], grid, padding_mode="border", align_corners=False)[0]
