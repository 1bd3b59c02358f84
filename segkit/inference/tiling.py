"""Tiles of a large image, and the bands of rows that are made from them."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

STRIDE = 32
"""The deepest stride of any backbone. Tiles start at multiples of it, so that strided layers sample
the same pixels as in the whole image."""

Tile = tuple[int, int, Tensor]
"""A tile along one axis: start, stop, and the coefficient of each position between them."""


def tiles(length: int, tile: int | None, overlap: float) -> list[Tile]:
    """Return tiles that cover ``length`` positions, with coefficients that sum to one at each."""
    if tile is None or length <= tile:
        return [(0, length, torch.ones(length))]
    step = max(STRIDE, int(tile * (1 - overlap)) // STRIDE * STRIDE)
    last = math.ceil((length - tile) / STRIDE) * STRIDE
    starts = [*range(0, last, step), last]
    shared = max(0, tile - step)
    unused = shared // 4
    windows, total = [], torch.zeros(length, dtype=torch.float64)
    for start in starts:
        stop = min(start + tile, length)
        position = torch.arange(start, stop, dtype=torch.float64) + 0.5
        # No window falls at the image's own edges, where no other tile covers the pixels.
        before = position - start if start > 0 else torch.full_like(position, math.inf)
        after = stop - position if stop < length else torch.full_like(position, math.inf)
        depth = (torch.minimum(before, after) - unused) / max(1, shared - 2 * unused)
        window = torch.sin(depth.clamp(0, 1) * (math.pi / 2)) ** 2
        total[start:stop] += window
        windows.append((start, stop, window))
    return [(start, stop, window / total[start:stop]) for start, stop, window in windows]


def resized_rows(scores: Tensor, top: int, bottom: int, height: int, width: int) -> Tensor:
    """Return rows ``top`` to ``bottom`` of ``scores`` resized (bilinear) to (height, width)."""
    rows = scores.shape[2]
    position = (torch.arange(top, bottom, device=scores.device) + 0.5) * (rows / height) - 0.5
    position = position.clamp(0, rows - 1)
    above = position.floor().long()
    below = (above + 1).clamp(max=rows - 1)
    fraction = (position - above).view(-1, 1)
    band = torch.lerp(scores[:, :, above], scores[:, :, below], fraction)
    return F.interpolate(band, (bottom - top, width), mode="bilinear", align_corners=False)


def concat_bands(bands: Iterable[tuple[int, Tensor]], height: int) -> Tensor:
    """Return bands as one preallocated tensor; concatenation would need twice the memory."""
    whole: Tensor | None = None
    for top, band in bands:
        if band.shape[-2] == height:
            return band
        if whole is None:
            whole = band.new_empty(*band.shape[:-2], height, band.shape[-1])
        whole[..., top : top + band.shape[-2], :] = band
    assert whole is not None
    return whole
