"""Mixing operations: paste parts of a second image into the first.

For a given canvas size, an operation requests another image, draws its scale, flip and position,
and returns a step that pastes parts of it. Put mixing operations first in the list, so that all
following operations apply to the mixed image.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor

from segkit.augment.geometry import flip_matrix, scale_matrix, shift_matrix
from segkit.augment.ranges import PositiveFactor, Range, between, draw
from segkit.augment.warp import Parts, warp
from segkit.core.labels import IGNORE, Size

Others = Callable[[Generator], tuple[Tensor, Tensor]]
"""Function that draws another labelled image with a generator: (3, H, W) and (H, W), uint8."""

Step = Callable[[Tensor, Tensor | None, Tensor | None], Parts]

_COARSE = 64  # longest side of the grid on which connected regions are searched


def copy_paste(
    canvas_size: Size,
    rng: Generator,
    others: Others,
    *,
    scale: PositiveFactor = (0.8, 1.25),
    objects: Annotated[tuple[int, int], between(1)] = (1, 3),
    rare: tuple[int, ...] = (),
    background: int = 0,
) -> Step:
    """Paste objects of another image at a random position and scale.

    Ghiasi et al. 2021, https://arxiv.org/abs/2012.07177

    Args:
        scale: Range of the other image's scale, relative to its own size.
        objects: Minimum and maximum number of objects to paste.
        rare: Classes to paste first if the other image contains one of them.
        background: Class that is never pasted.

    Departs from the paper: an object is a connected region of one class, because masks contain
    no instances; edges are hard (the paper found blending to make no difference).
    """
    image, mask = others(rng)
    count = int(rng.integers(objects[0], objects[1] + 1))
    chosen = _objects(mask, count, rng, rare, background)
    matrix = _placement(mask, canvas_size, draw(rng, scale), rng)
    return functools.partial(_paste, other=image, labels=mask, chosen=chosen, matrix=matrix)


def cutmix(
    canvas_size: Size,
    rng: Generator,
    others: Others,
    *,
    area: Annotated[Range, between(0, 1)] = (0.1, 0.5),
    scale: PositiveFactor = (1.0, 1.5),
) -> Step:
    """Replace a rectangle by a part of another image.

    Yun et al. 2019, https://arxiv.org/abs/1905.04899

    Args:
        area: Range of the rectangle's share of the canvas; it has the canvas's aspect ratio.
        scale: Range of the other image's scale, relative to the size that just covers the canvas.
    """
    image, mask = others(rng)
    side = math.sqrt(draw(rng, area))
    height, width = (max(1, round(length * side)) for length in canvas_size)
    top = rng.integers(canvas_size[0] - height + 1)
    left = rng.integers(canvas_size[1] - width + 1)
    window = torch.zeros(canvas_size, dtype=torch.bool)
    window[top : top + height, left : left + width] = True
    matrix = _placement(mask, canvas_size, _cover(mask, canvas_size) * draw(rng, scale), rng)
    return functools.partial(_paste, other=image, labels=mask, window=window, matrix=matrix)


def classmix(
    canvas_size: Size, rng: Generator, others: Others, *, scale: PositiveFactor = (1.0, 1.5)
) -> Step:
    """Paste all pixels of half of another image's classes.

    Olsson et al. 2020, https://arxiv.org/abs/2007.07936

    Args:
        scale: Range of the other image's scale, relative to the size that just covers the canvas.

    Departs from the paper: pastes annotated labels; the paper pastes predictions of a model.
    """
    image, mask = others(rng)
    classes = [int(index) for index in mask.unique() if index != IGNORE]
    half = rng.permutation(classes)[: (len(classes) + 1) // 2]
    chosen = torch.isin(mask, torch.as_tensor(half, dtype=torch.uint8))
    matrix = _placement(mask, canvas_size, _cover(mask, canvas_size) * draw(rng, scale), rng)
    return functools.partial(_paste, other=image, labels=mask, chosen=chosen, matrix=matrix)


def _cover(mask: Tensor, size: Size) -> float:
    """Return the scale at which an image just covers a canvas."""
    return max(size[0] / mask.shape[0], size[1] / mask.shape[1])


def _placement(mask: Tensor, size: Size, scale: float, rng: Generator) -> np.ndarray:
    """Return the matrix from the canvas to the other image, with random flip and position.

    The overlap with the canvas is as large as possible.
    """
    height, width = mask.shape[-2] * scale, mask.shape[-1] * scale
    top, left = rng.random() * (height - size[0]), rng.random() * (width - size[1])
    flip = flip_matrix(mask.shape[-1]) if rng.random() < 0.5 else np.eye(3)
    return flip @ scale_matrix(1 / scale, 1 / scale) @ shift_matrix(left, top)


def _objects(
    mask: Tensor, count: int, rng: Generator, rare: Sequence[int], background: int
) -> Tensor:
    """Return the pixels of up to ``count`` random objects, which are connected regions."""
    free = (mask != background) & (mask != IGNORE)
    chosen = torch.zeros_like(free)
    for _ in range(count):
        classes = mask[free & ~chosen].unique()
        if not len(classes):
            break
        preferred = [int(index) for index in classes if index in rare] or classes.tolist()
        inside = (mask == int(rng.choice(preferred))) & ~chosen
        pixels = inside.nonzero()
        chosen |= _region(inside, pixels[int(rng.integers(len(pixels)))])
    return chosen


def _region(inside: Tensor, seed: Tensor) -> Tensor:
    """Return the region of ``inside`` around ``seed``; connectivity is that on a coarse grid."""
    height, width = inside.shape
    cell = max(1, math.ceil(max(height, width) / _COARSE))
    coarse = F.max_pool2d(inside[None].float(), cell, ceil_mode=True)
    reached = torch.zeros_like(coarse)
    reached[0, int(seed[0]) // cell, int(seed[1]) // cell] = 1
    while True:
        grown = F.max_pool2d(reached, 3, stride=1, padding=1) * coarse
        if torch.equal(grown, reached):
            break
        reached = grown
    fine = reached[0].repeat_interleave(cell, 0).repeat_interleave(cell, 1)[:height, :width]
    return inside & (fine > 0)


def _paste(
    image: Tensor,
    mask: Tensor | None,
    inside: Tensor | None,
    *,
    other: Tensor,
    labels: Tensor,
    matrix: np.ndarray,
    chosen: Tensor | None = None,
    window: Tensor | None = None,
) -> Parts:
    """Paste the chosen pixels of another image into an image, within a window of it."""
    size, device = (image.shape[-2], image.shape[-1]), image.device
    pasted, pasted_labels, covered = warp(other.to(device), labels.to(device), matrix, size)
    over = torch.ones(size, dtype=torch.bool) if window is None else window
    over = over.to(device)
    if covered is not None:
        over = over & (covered > 0)
    if chosen is not None:
        _, picked, _ = warp(other[:1].to(device), chosen.to(device, torch.uint8), matrix, size)
        over = over & (picked == 1)
    if pasted.is_floating_point() and not image.is_floating_point():
        pasted = pasted.round()
    image = torch.where(over, pasted.to(image.dtype), image)
    if mask is not None and pasted_labels is not None:
        mask = torch.where(over, pasted_labels, mask)
    return image, mask, inside if inside is None else inside.maximum(over.float())


MIX: dict[str, Callable[..., Step]] = {
    operation.__name__: operation for operation in (copy_paste, cutmix, classmix)
}
