"""Predict probabilities and masks of a photograph, at its own size, with views and tiles."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segkit.core.backend import cudnn_autotuning
from segkit.inference.tta import Merge, View, merge_views

# The deepest stride of any backbone. Tiles start at multiples of it, so that strided layers sample
# the same pixels as in the whole image; smaller images are padded to it.
STRIDE = 32

Tile = tuple[int, int, Tensor]
"""A tile along one axis: start, stop, and the coefficient of each position between them."""


class Predictor:
    """Predicts photographs with a model, which it sets to evaluation mode.

    Normalization, resizing, views, tiles and precision are all handled here, so that validation,
    inference and serving give equal results.

    Tiles overlap. Each is multiplied by a window that falls smoothly from its middle to its edges;
    the windows sum to one at every pixel. The outer quarter of an overlap is not used, so a model
    whose receptive field reaches no further gives the same result as on the whole image.

    Args:
        model: Maps a normalized image to ``{"out": logits}`` of the image's size.
        mean: Means of R, G and B, in 0..1.
        std: Standard deviations of R, G and B, in 0..1.
        size: The photograph is resized to this longest side; None for no resize.
        views: Test-time augmentations; see ``segkit.inference.tta``. Empty: the image itself.
        merge: How the views are merged; see ``segkit.inference.tta.merge_views``.
        weights: One coefficient per view; default: equal.
        tile: Side of the tiles, in pixels after the resize; None for the whole image at once.
        overlap: Share of a tile that its neighbor also covers, 0 to 0.9.
        amp: Precision of autocast, such as ``torch.bfloat16``; None turns autocast off.
        channels_last: Use the channels_last memory format.

    Raises:
        ValueError: An image has the wrong shape or type.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: int | None = None,
        views: Sequence[View] = (),
        merge: Merge = "mean",
        weights: Sequence[float] | None = None,
        tile: int | None = None,
        overlap: float = 0.25,
        amp: torch.dtype | None = None,
        channels_last: bool = False,
    ) -> None:
        if tile is not None and tile < STRIDE:
            raise ValueError(f"tiles must be at least {STRIDE} pixels wide, not {tile}")
        self.model = model.eval()
        self.size = size
        self.views = views
        self.merge = merge
        self.weights = weights
        self.tile = tile
        self.overlap = overlap
        self.amp = amp
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        first = next(model.parameters(), torch.empty(0))
        self.device = first.device
        # (image / 255 - mean) / std as one multiplication and one addition.
        spread = torch.tensor(std, device=self.device).view(3, 1, 1)
        self._scale = 1 / (255 * spread)
        self._shift = -torch.tensor(mean, device=self.device).view(3, 1, 1) / spread

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """Return the probabilities of every class at every pixel, on the model's device.

        Shape:
            image: (3, H, W) or (B, 3, H, W), uint8 -> (C, H, W) or (B, C, H, W), float32
        """
        scores = _joined(self._bands(_as_batch(image)), image.shape[-2])
        return scores if image.dim() == 4 else scores[0]

    @torch.inference_mode()
    def mask(self, image: Tensor) -> Tensor:
        """Return the most probable class at every pixel; holds probabilities of few rows.

        Shape:
            image: (3, H, W) or (B, 3, H, W), uint8 -> (H, W) or (B, H, W), uint8
        """
        return _joined(self.bands(image), image.shape[-2])

    @torch.inference_mode()
    def bands(self, image: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the mask in bands of rows, from top to bottom, for images larger than memory.

        Yields:
            The first row of the band, and its classes, uint8, (h, W) or (B, h, W).
        """
        for top, scores in self._bands(_as_batch(image)):
            # Over an axis that is not the last in memory, max is four times as fast as argmax.
            classes = scores.max(1).indices.to(torch.uint8)
            del scores  # frees the memory before the next band is computed
            yield top, classes if image.dim() == 4 else classes[0]

    def _bands(self, image: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield probabilities in bands of rows, at the photograph's own size."""
        height, width = image.shape[-2:]
        shape = _fit(height, width, self.size)
        if shape == (height, width):
            yield from self._tiled(image)
            return
        # The CPU resizes uint8 directly, without a float copy of the photograph.
        image = F.interpolate(image.cpu(), shape, mode="bilinear", antialias=True)
        scores = _joined(self._tiled(image), image.shape[-2])
        rows = max(1, 2**24 // (width * scores.shape[1]))
        for top in range(0, height, rows):
            yield top, _resized_rows(scores, top, min(top + rows, height), height, width)

    def _tiled(self, image: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield probabilities in bands of rows, each as soon as no later tile covers it."""
        height, width = image.shape[-2:]
        across = _tiles(width, self.tile, self.overlap)
        down = _tiles(height, self.tile, self.overlap)
        later_tops = [top for top, _, _ in down[1:]] + [height]
        carried: Tensor | None = None
        for (top, bottom, down_weight), next_top in zip(down, later_tops, strict=True):
            band: Tensor | None = None
            for left, right, across_weight in across:
                part = self._probabilities(image[..., top:bottom, left:right])
                if len(down) == len(across) == 1:
                    yield 0, part
                    return
                part *= (down_weight[:, None] * across_weight).to(part)
                if band is None:
                    band = part.new_zeros(*part.shape[:2], bottom - top, width)
                    if carried is not None:
                        band[:, :, : carried.shape[2]] = carried
                band[..., left:right] += part
            assert band is not None
            done = next_top - top
            carried = band[:, :, done:].clone()
            yield top, band[:, :, :done]

    def _probabilities(self, image: Tensor) -> Tensor:
        image = torch.addcmul(self._shift, image.to(self.device).float(), self._scale)
        return merge_views(
            self._logits, image, views=self.views, merge=self.merge, weights=self.weights
        )

    def _logits(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if min(height, width) < STRIDE:
            missing = (0, max(0, STRIDE - width), 0, max(0, STRIDE - height))
            image = F.pad(image, missing, mode="replicate")
        image = image.contiguous(memory_format=self.memory_format)
        precision = torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)
        with precision, cudnn_autotuning(False):
            return self.model(image)["out"][..., :height, :width]


def _as_batch(image: Tensor) -> Tensor:
    if image.dtype != torch.uint8 or image.dim() not in (3, 4) or image.shape[-3] != 3:
        raise ValueError(
            f"expected uint8 (3, H, W) or (B, 3, H, W), got {image.dtype} {tuple(image.shape)}"
        )
    return image if image.dim() == 4 else image[None]


def _joined(bands: Iterable[tuple[int, Tensor]], height: int) -> Tensor:
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


def _fit(height: int, width: int, size: int | None) -> tuple[int, int]:
    """Return (height, width) scaled so that the longer side is ``size``."""
    if size is None:
        return height, width
    factor = size / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def _tiles(length: int, tile: int | None, overlap: float) -> list[Tile]:
    """Return tiles that cover ``length`` positions, with coefficients that sum to one at each."""
    if tile is None or length <= tile:
        return [(0, length, torch.ones(length))]
    step = max(STRIDE, int(tile * (1 - overlap)) // STRIDE * STRIDE)
    last = math.ceil((length - tile) / STRIDE) * STRIDE
    starts = [*range(0, last, step), last]
    shared = max(0, tile - step)
    unused = shared // 4
    weights, total = [], torch.zeros(length, dtype=torch.float64)
    for start in starts:
        stop = min(start + tile, length)
        place = torch.arange(start, stop, dtype=torch.float64) + 0.5
        # No window falls at the image's own edges, where no other tile covers the pixels.
        before = place - start if start > 0 else torch.full_like(place, math.inf)
        after = stop - place if stop < length else torch.full_like(place, math.inf)
        depth = (torch.minimum(before, after) - unused) / max(1, shared - 2 * unused)
        weight = torch.sin(depth.clamp(0, 1) * (math.pi / 2)) ** 2
        total[start:stop] += weight
        weights.append((start, stop, weight))
    return [(start, stop, weight / total[start:stop]) for start, stop, weight in weights]


def _resized_rows(scores: Tensor, top: int, bottom: int, height: int, width: int) -> Tensor:
    """Return rows ``top`` to ``bottom`` of ``scores`` resized (bilinear) to (height, width)."""
    rows = scores.shape[2]
    place = (torch.arange(top, bottom, device=scores.device) + 0.5) * (rows / height) - 0.5
    place = place.clamp(0, rows - 1)
    above = place.floor().long()
    below = (above + 1).clamp(max=rows - 1)
    share = (place - above).view(-1, 1)
    band = torch.lerp(scores[:, :, above], scores[:, :, below], share)
    return F.interpolate(band, (bottom - top, width), mode="bilinear", align_corners=False)
