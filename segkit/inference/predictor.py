"""Predict probabilities and masks of a photograph, at its own size, with views and tiles."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segkit.core.backend import cudnn_autotuning
from segkit.core.config import IMAGENET_MEAN, IMAGENET_STD
from segkit.data.samples import SampleRange
from segkit.inference.calibration import sharpened
from segkit.inference.prediction import Photo, Prediction, as_tensor, predicted_classes
from segkit.inference.tiling import STRIDE, concat_bands, resized_rows, tiles
from segkit.inference.tta import Merge, Views, merge_views, parse_views
from segkit.models.kernels.graphs import Graphs
from segkit.models.segmenter import Segmenter


class Predictor:
    """Predicts photographs with a model, which it sets to evaluation mode.

    Normalization, resizing, views, tiles and precision are all handled here, so that validation,
    inference and serving give equal results.

    A model with one plane of logits is binary: its probabilities are those of background and
    foreground, ``1 - sigmoid`` and ``sigmoid``, and its mask is 1 where the latter is above 0.5.

    Tiles overlap. Each is multiplied by a window that falls smoothly from its middle to its edges;
    the windows sum to one at every pixel. The outer quarter of an overlap is not used, so a model
    whose receptive field reaches no further gives the same result as on the whole image.

    Args:
        model: Maps normalized images to logits of the images' size, as a tensor (B, C, H, W) or
            as ``out`` of a dict.
        mean: Mean of each channel, in 0..1; default: ImageNet's.
        std: Standard deviation of each channel, in 0..1; default: ImageNet's.
        classes: Class names, for :class:`Prediction`; of a binary model both names, or the
            foreground's only.
        size: The photograph is resized to this longest side; None for no resize.
        views: Test-time augmentations, such as ``"flips"``; see
            :func:`segkit.inference.tta.parse_views`. Empty: the image itself.
        merge: How the views are merged; see :func:`segkit.inference.tta.merge_views`.
        coefficients: One per view; default: equal.
        tile: Side of the tiles, in pixels after the resize; None for the whole image at once.
        overlap: Share of a tile that its neighbor also covers, 0 to 0.9.
        pad: Images (or tiles) are padded to sides that are multiples of this.
        amp: Precision of autocast, such as ``torch.bfloat16``; None turns autocast off.
        channels_last: Use the channels_last memory format.
        graphs: On CUDA, replay a :class:`Segmenter` as a CUDA graph for image sizes that recur.
        temperature: Calibrates the probabilities; see :mod:`segkit.inference.calibration`. The mask
            does not depend on it.
        range: Samples of files that become 0 and 255; see :func:`segkit.data.images.read_image`.

    Raises:
        ValueError: An image has the wrong shape or type.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        classes: Sequence[str] = (),
        size: int | None = None,
        views: Views = (),
        merge: Merge = "mean",
        coefficients: Sequence[float] | None = None,
        tile: int | None = None,
        overlap: float = 0.25,
        pad: int | None = None,
        amp: torch.dtype | None = None,
        channels_last: bool = False,
        graphs: bool = True,
        temperature: float = 1.0,
        range: SampleRange | None = None,
    ) -> None:
        if tile is not None and tile < STRIDE:
            raise ValueError(f"tiles must be at least {STRIDE} pixels wide, not {tile}")
        self._graphs = graphs
        self.model, self.classes = model, tuple(classes)
        self.size, self.tile, self.overlap, self.pad = size, tile, overlap, pad
        self.views, self.merge, self.coefficients = parse_views(views), merge, coefficients
        self.amp, self.temperature, self.range = amp, temperature, range
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.device = next(model.parameters(), torch.empty(0)).device
        # (image / 255 - mean) / std as one multiplication and one addition.
        std_tensor = torch.tensor(std, device=self.device).view(-1, 1, 1)
        self._scale = 1 / (255 * std_tensor)
        self._shift = -torch.tensor(mean, device=self.device).view(-1, 1, 1) / std_tensor

    @property
    def model(self) -> nn.Module:
        """The model, in evaluation mode; may be replaced."""
        return self._model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._model = model.eval()
        self._forward: Callable[[Tensor], Tensor] = partial(_forward, model)
        if self._graphs and isinstance(model, Segmenter):
            self._forward = Graphs(self._forward, model)

    @overload
    def __call__(self, photo: Photo) -> Prediction: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, photo: Sequence[Photo]) -> list[Prediction]: ...

    def __call__(self, photo: Photo | Sequence[Photo]) -> Prediction | list[Prediction]:
        """Predict a photograph, or each of a list.

        Args:
            photo: A file, a Pillow image, a uint8 array (H, W, C), a uint8 tensor (C, H, W) or
                (B, C, H, W), or a list of these. C is the model's number of channels, such as 3.

        Raises:
            DataError: A file cannot be read.
        """
        if isinstance(photo, Sequence) and not isinstance(photo, str):
            return [self(part) for part in photo]
        image = as_tensor(photo, range=self.range, channels=len(self._scale))
        with torch.inference_mode():
            unscaled = concat_bands(self._unscaled_bands(image), image.shape[-2])
            mask, scores = predicted_classes(unscaled), sharpened(unscaled, self.temperature)
        binary = scores.shape[-3] == 2 and len(self.classes) == 1
        classes = ("background", *self.classes) if binary else self.classes
        return Prediction(image.cpu(), mask.cpu(), scores.cpu(), classes)

    @torch.inference_mode()
    def probabilities(self, image: Tensor) -> Tensor:
        """Return the probabilities of every class at every pixel, on the model's device.

        Shape:
            image: (3, H, W) or (B, 3, H, W), uint8 -> (C, H, W) or (B, C, H, W), float32
        """
        return concat_bands(self.probability_bands(image), image.shape[-2])

    @torch.inference_mode()
    def mask(self, image: Tensor) -> Tensor:
        """Return the most probable class at every pixel; holds probabilities of few rows.

        Shape:
            image: (3, H, W) or (B, 3, H, W), uint8 -> (H, W) or (B, H, W), uint8
        """
        return concat_bands(self.bands(image), image.shape[-2])

    @torch.inference_mode()
    def bands(self, image: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the mask in bands of rows, from top to bottom, for images larger than memory.

        Yields:
            The first row of the band, and its classes, uint8, (h, W) or (B, h, W).
        """
        for top, scores in self._unscaled_bands(image):
            classes = predicted_classes(scores)
            del scores  # frees the memory before the next band is computed
            yield top, classes

    @torch.inference_mode()
    def probability_bands(self, image: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the probabilities in bands of rows, from top to bottom.

        Yields:
            The first row of the band, and its probabilities, (C, h, W) or (B, C, h, W).
        """
        for top, scores in self._unscaled_bands(image):
            yield top, sharpened(scores, self.temperature)
            del scores

    def _unscaled_bands(self, image: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the probabilities before the temperature, which does not change their order."""
        channels = len(self._scale)
        if image.dtype != torch.uint8 or image.dim() not in (3, 4) or image.shape[-3] != channels:
            raise ValueError(
                f"image: expected uint8 ({channels}, H, W) or (B, {channels}, H, W), "
                f"got {image.dtype} {tuple(image.shape)}"
            )
        for top, scores in self._bands(image if image.dim() == 4 else image[None]):
            yield top, scores if image.dim() == 4 else scores[0]
            del scores

    def _bands(self, image: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield probabilities in bands of rows, at the photograph's own size."""
        height, width = image.shape[-2:]
        shape = _fit(height, width, self.size)
        if shape == (height, width):
            yield from self._tiled(image)
            return
        # The CPU resizes uint8 directly, without a float copy of the photograph.
        image = F.interpolate(image.cpu(), shape, mode="bilinear", antialias=True)
        scores = concat_bands(self._tiled(image), image.shape[-2])
        rows = max(1, 2**24 // (width * scores.shape[1]))
        for top in range(0, height, rows):
            yield top, resized_rows(scores, top, min(top + rows, height), height, width)

    def _tiled(self, image: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield probabilities in bands of rows, each as soon as no later tile covers it."""
        height, width = image.shape[-2:]
        across = tiles(width, self.tile, self.overlap)
        down = tiles(height, self.tile, self.overlap)
        if len(down) == len(across) == 1:
            yield 0, self.batch_probabilities(image)
            return
        later_tops = [top for top, _, _ in down[1:]] + [height]
        overlap_rows: Tensor | None = None
        for (top, bottom, down_window), next_top in zip(down, later_tops, strict=True):
            band: Tensor | None = None
            for left, right, across_window in across:
                part = self.batch_probabilities(image[..., top:bottom, left:right])
                part *= (down_window[:, None] * across_window).to(part)
                if band is None:
                    band = part.new_zeros(*part.shape[:2], bottom - top, width)
                    if overlap_rows is not None:
                        band[:, :, : overlap_rows.shape[2]] = overlap_rows
                band[..., left:right] += part
            assert band is not None
            finished_rows = next_top - top
            overlap_rows = band[:, :, finished_rows:].clone()
            yield top, band[:, :, :finished_rows]

    def batch_probabilities(self, image: Tensor) -> Tensor:
        """Return the probabilities of images as they are: not resized, tiled or calibrated.

        Shape:
            image: (B, 3, H, W), 0 to 255 of any type -> (B, C, H, W), float32
        """
        image = torch.addcmul(
            self._shift, image.to(self.device, non_blocking=True).float(), self._scale
        )
        return merge_views(
            self._logits, image, views=self.views, merge=self.merge, coefficients=self.coefficients
        )

    def _logits(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        multiple = self.pad or 1
        right, bottom = (
            max(STRIDE, math.ceil(side / multiple) * multiple) - side for side in (width, height)
        )
        if right or bottom:
            image = F.pad(image, (0, right, 0, bottom), mode="replicate")
        image = image.contiguous(memory_format=self.memory_format)
        precision = torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)
        with precision, cudnn_autotuning(False):
            logits = self._forward(image)[..., :height, :width]
        if logits.shape[1] == 1:  # the softmax of (0, x) is (1 - sigmoid(x), sigmoid(x))
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        return logits


def _forward(model: nn.Module, image: Tensor) -> Tensor:
    """Return the logits in a model's output; they need the image's size."""
    output = model(image)
    logits = output.get("out") if isinstance(output, Mapping) else output
    if not isinstance(logits, Tensor):
        keys = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise TypeError(
            f"model: returned {type(output).__name__}{keys}; expected logits as a tensor, or as "
            "'out' of a dict"
        )
    if logits.dim() != 4 or logits.shape[-2:] != image.shape[-2:]:
        raise ValueError(
            f"model: returned logits {tuple(logits.shape)} for images {tuple(image.shape)}; "
            "expected (B, C, H, W) of the same height and width"
        )
    return logits


def _fit(height: int, width: int, size: int | None) -> tuple[int, int]:
    """Return (height, width) scaled so that the longer side is ``size``."""
    if size is None:
        return height, width
    factor = size / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))
