"""Filters: operations that read a pixel's neighbors, or noise; each touches the pixels on its own.

An operation draws its numbers and gives a :data:`Run`, a function of the image, in levels from 0 to
255 of any number type, and of the mask. At the border, the outermost pixels go on. A filter is
``linear`` if a matrix of colors may as well be applied after it as before.
"""

import functools
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segkit.augment.median import median
from segkit.augment.ranges import check, draw
from segkit.core.errors import ConfigError
from segkit.core.labels import IGNORE

Run = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def _check_sizes(name: str, sizes: Sequence[int]) -> None:
    if not sizes or any(size < 1 or size % 2 == 0 for size in sizes):
        raise ConfigError(f"{name}: expected odd numbers of pixels; got {list(sizes)}")


@dataclass(frozen=True, kw_only=True)
class Blur:
    """The mean of a square.

    Args:
        sizes: Sides in pixels to choose from, odd.
    """

    sizes: tuple[int, ...] = (3, 5)
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_sizes("sizes", self.sizes)

    def __call__(self, rng: np.random.Generator) -> Run:
        size = int(rng.choice(self.sizes))
        return functools.partial(_convolve, weights=[1 / size] * size)


@dataclass(frozen=True, kw_only=True)
class GaussianBlur:
    """A Gaussian, cut off at three deviations.

    Args:
        sigma: Range of the deviation in pixels.
    """

    sigma: tuple[float, float] = (0.5, 2.0)
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check("sigma", self.sigma, low=0, high=100, above=True)

    def __call__(self, rng: np.random.Generator) -> Run:
        sigma = draw(rng, self.sigma)
        reach = math.ceil(3 * sigma)
        weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        return functools.partial(_convolve, weights=(weights / weights.sum()).tolist())


@dataclass(frozen=True, kw_only=True)
class MedianBlur:
    """The median of a square, in whole levels.

    Args:
        sizes: Sides in pixels to choose from, odd.
    """

    sizes: tuple[int, ...] = (3, 5)

    def __post_init__(self) -> None:
        _check_sizes("sizes", self.sizes)
        if max(self.sizes) > 9:
            raise ConfigError(f"sizes: expected at most 9; got {list(self.sizes)}")

    def __call__(self, rng: np.random.Generator) -> Run:
        return functools.partial(_median, size=int(rng.choice(self.sizes)))


@dataclass(frozen=True, kw_only=True)
class Sharpen:
    """Away from, or towards, a light blur, as torchvision's ``adjust_sharpness`` does.

    Args:
        range: Of the factor: 0 is the blur, 1 the image, 2 sharpens.
    """

    range: tuple[float, float] = (1.0, 2.0)

    def __post_init__(self) -> None:
        check("range", self.range, low=0)

    def __call__(self, rng: np.random.Generator) -> Run:
        return functools.partial(_sharpen, factor=draw(rng, self.range))


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Gaussian noise, on each channel of each pixel its own.

    Args:
        levels: Range of the deviation, in levels of 255.
    """

    levels: tuple[float, float] = (2.0, 10.0)

    def __post_init__(self) -> None:
        check("levels", self.levels, low=0, high=255)

    def __call__(self, rng: np.random.Generator) -> Run:
        seed = int(rng.integers(2**63))
        return functools.partial(_add_noise, deviation=draw(rng, self.levels), seed=seed)


@dataclass(frozen=True, kw_only=True)
class JPEG:
    """The traces of a JPEG file.

    Args:
        quality: Least and most, as JPEG counts it, 1 to 100.
    """

    quality: tuple[int, int] = (40, 90)

    def __post_init__(self) -> None:
        check("quality", self.quality, low=1, high=100)

    def __call__(self, rng: np.random.Generator) -> Run:
        low, high = self.quality
        return functools.partial(_through_jpeg, quality=int(rng.integers(low, high + 1)))


@dataclass(frozen=True, kw_only=True)
class _Morphology:
    """What :class:`Closing` and :class:`Opening` share: a square, on the image or on the mask.

    Args:
        sizes: Sides of the square in pixels to choose from, odd.
        on: The image, each channel on its own, or the mask.
        classes: Of the mask, one after the other.
    """

    sizes: tuple[int, ...] = (3, 5)
    on: Literal["image", "mask"] = "image"
    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_sizes("sizes", self.sizes)
        if (self.on == "mask") != bool(self.classes):
            raise ConfigError("classes: expected with on='mask', and only there")


class Closing(_Morphology):
    """Fill what is darker and narrower than a square; of a mask's class, its gaps.

    A gap takes the class, whatever other class it had; ignored pixels stay ignored.
    """

    def __call__(self, rng: np.random.Generator) -> Run:
        size = int(rng.choice(self.sizes))
        if self.on == "image":
            return functools.partial(_close_image, size=size)
        return functools.partial(_close_classes, size=size, classes=self.classes)


class Opening(_Morphology):
    """Take away what is brighter and narrower than a square; of a mask's class, its specks.

    A speck becomes class 0, the background.
    """

    def __call__(self, rng: np.random.Generator) -> Run:
        size = int(rng.choice(self.sizes))
        if self.on == "image":
            return functools.partial(_open_image, size=size)
        return functools.partial(_open_classes, size=size, classes=self.classes)


def _continued(image: Tensor, reach: int, dim: int) -> Tensor:
    """The image with its border continued outwards on both sides of one dimension."""
    shape = [*image.shape]
    shape[dim] = reach
    before, after = image.narrow(dim, 0, 1), image.narrow(dim, image.shape[dim] - 1, 1)
    return torch.cat([before.expand(shape), image, after.expand(shape)], dim)


def _moved(image: Tensor, size: int, dim: int) -> list[Tensor]:
    """Views of the image moved by each step of a window along one dimension, border continued."""
    padded = _continued(image, size // 2, dim)
    return [padded.narrow(dim, start, image.shape[dim]) for start in range(size)]


def _convolve(
    image: Tensor, mask: Tensor | None, weights: Sequence[float]
) -> tuple[Tensor, Tensor | None]:
    image = image.float()
    for dim in (-2, -1):
        first, *others = _moved(image, len(weights), dim)
        image = first * weights[0]
        for moved, weight in zip(others, weights[1:], strict=True):
            image.add_(moved, alpha=weight)
    return image, mask


def _median(image: Tensor, mask: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
    if image.is_floating_point():
        image = image.round().clamp_(0, 255).to(torch.uint8)
    for dim in (-2, -1):
        image = _continued(image, size // 2, dim)
    return median(image, size), mask


def _sharpen(image: Tensor, mask: Tensor | None, factor: float) -> tuple[Tensor, Tensor | None]:
    image = image.float()
    mean, _ = _convolve(image, None, [1 / 3] * 3)
    smooth = mean.mul_(9 / 13).add_(image, alpha=4 / 13)  # a square of ones with five in its middle
    return smooth.lerp_(image, factor).clamp_(0, 255), mask


def _add_noise(
    image: Tensor, mask: Tensor | None, deviation: float, seed: int
) -> tuple[Tensor, Tensor | None]:
    # Drawn on the CPU wherever the image is: devices have generators of their own.
    noise = np.random.default_rng(seed).standard_normal(tuple(image.shape), dtype=np.float32)
    added = torch.from_numpy(noise).to(image.device).mul_(deviation)
    return added.add_(image).clamp_(0, 255), mask


def _through_jpeg(image: Tensor, mask: Tensor | None, quality: int) -> tuple[Tensor, Tensor | None]:
    levels = image.round() if image.is_floating_point() else image
    pixels = levels.to("cpu", torch.uint8).permute(1, 2, 0).contiguous().numpy()
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        with Image.open(file) as photograph:
            read = np.array(photograph)
    return torch.from_numpy(read).permute(2, 0, 1).to(image.device), mask


def _grown(image: Tensor, size: int) -> Tensor:
    """The most of a square around each pixel."""
    for dim in (-2, -1):  # max_pool2d takes ten times as long
        image = functools.reduce(torch.maximum, _moved(image, size, dim))
    return image


def _shrunk(image: Tensor, size: int) -> Tensor:
    for dim in (-2, -1):
        image = functools.reduce(torch.minimum, _moved(image, size, dim))
    return image


def _closed(image: Tensor, size: int) -> Tensor:
    return _shrunk(_grown(image, size), size)


def _opened(image: Tensor, size: int) -> Tensor:
    return _grown(_shrunk(image, size), size)


def _close_image(image: Tensor, mask: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
    return _closed(image, size), mask


def _open_image(image: Tensor, mask: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
    return _opened(image, size), mask


def _close_classes(
    image: Tensor, mask: Tensor | None, size: int, classes: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    if mask is not None:
        ignored = mask == IGNORE
        for index in classes:
            covered = _closed(mask == index, size)
            mask = torch.where(covered & ~ignored, index, mask)
    return image, mask


def _open_classes(
    image: Tensor, mask: Tensor | None, size: int, classes: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    if mask is not None:
        for index in classes:
            own = mask == index
            kept = _opened(own, size)
            mask = torch.where(own & ~kept, 0, mask)
    return image, mask


FILTERS: dict[str, Callable[..., Callable[[np.random.Generator], Run]]] = {
    "blur": Blur,
    "gaussian_blur": GaussianBlur,
    "median_blur": MedianBlur,
    "sharpen": Sharpen,
    "noise": Noise,
    "jpeg": JPEG,
    "closing": Closing,
    "opening": Opening,
}
