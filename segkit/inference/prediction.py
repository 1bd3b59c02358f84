"""Prediction of a photograph, and the forms in which photographs are given."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segkit.data.images import read_image, to_tensor
from segkit.data.samples import SampleRange
from segkit.inference.outputs import SAFE, Color, overlay

Photo: TypeAlias = str | Path | Image.Image | np.ndarray[Any, Any] | Tensor
"""A file, a Pillow image, a uint8 array (H, W, C), or a uint8 tensor (C, H, W) or (B, C, H, W)."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """Prediction of a photograph; all tensors are on the CPU.

    That of a batch has the additional axis B; ``prediction[i]`` is that of one image.

    Args:
        image: The photograph, upright; RGB, or the bands that the model takes.
        mask: The most probable class at every pixel.
        probabilities: Probabilities of the classes; of background and foreground for a model with
            one plane of logits.
        classes: Class names, or ``()`` if the predictor has none.

    Shape:
        image: uint8 (3, H, W), or another number of bands
        mask: uint8 (H, W)
        probabilities: float32 (C, H, W)
    """

    image: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)
    probabilities: Tensor = field(repr=False)
    classes: tuple[str, ...] = ()

    def overlay(
        self,
        *,
        colors: Sequence[Color] = SAFE,
        opacity: float = 0.5,
        background: int | None = 0,
        legend: bool = True,
    ) -> Image.Image:
        """Return the photograph blended with the classes' colors; see :func:`segkit.overlay`."""
        if self.image.dim() == 4:
            raise ValueError("overlay() draws one image; use prediction[i].overlay()")
        return overlay(
            self.image, self.mask, classes=self.classes, colors=colors, opacity=opacity,
            background=background, legend=legend,
        )  # fmt: skip

    def __getitem__(self, index: int) -> "Prediction":
        if self.image.dim() != 4:
            raise TypeError("only the prediction of a batch has items")
        image, mask, probabilities = self.image[index], self.mask[index], self.probabilities[index]
        return Prediction(image, mask, probabilities, self.classes)


def predicted_classes(scores: Tensor) -> Tensor:
    """Return the class with the largest score at every pixel: (..., C, H, W) -> (..., H, W), uint8.

    The lowest index wins among equal scores.
    """
    # Over an axis that is not the last in memory, max is four times as fast as argmax.
    return scores.max(-3).indices.to(torch.uint8)


def as_tensor(photo: Photo, *, range: SampleRange | None = None, channels: int = 3) -> Tensor:
    """Return a photograph as a uint8 tensor, (C, H, W), or (B, C, H, W) for a batch.

    Files and Pillow images are rotated to their EXIF orientation and converted to RGB or gray.

    Args:
        photo: The photograph.
        range, channels: For files and Pillow images, as in :func:`segkit.data.images.read_image`.

    Raises:
        DataError: A file cannot be read.
        TypeError: ``photo`` is none of the types of :data:`Photo`.
        ValueError: An array has another type or shape.
    """
    if isinstance(photo, str | Path):
        return read_image(photo, range=range, channels=channels)
    if isinstance(photo, Image.Image):
        return to_tensor(photo, range=range, channels=channels)
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != channels:
            raise ValueError(
                f"photo: expected a uint8 array (H, W, {channels}), got {photo.dtype} "
                f"{photo.shape}; give images with the channels first as a tensor"
            )
        return torch.from_numpy(np.ascontiguousarray(photo)).permute(2, 0, 1)
    if isinstance(photo, Tensor):
        return photo
    raise TypeError(
        "photo: expected a path, a Pillow image, an array, a tensor, or a list of these; "
        f"got {type(photo).__name__}"
    )
