"""Filters: operations on a neighborhood of each pixel, noise, and JPEG compression.

Calling an operation draws its random numbers and returns a :data:`Run`, a function of (image, mask)
for images with values in 0..255 of any dtype. Borders are padded with the outermost pixels. A
filter is ``linear`` if it commutes with a color matrix.
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
    """Blur with the mean of a square.

    Args:
        sizes: Side lengths in pixels to choose from, odd.
    """

    sizes: tuple[int, ...] = (3, 5)
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_sizes("sizes", self.sizes)

    def __call__(self, rng: np.random.Generator) -> Run:
        size = int(rng.choice(self.sizes))
        return functools.partial(_convolve, kernel=[1 / size] * size)


@dataclass(frozen=True, kw_only=True)
class GaussianBlur:
    """Blur with a Gaussian, truncated at three standard deviations.

    Args:
        sigma: Range of the standard deviation in pixels.
    """

    sigma: tuple[float, float] = (0.5, 2.0)
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check("sigma", self.sigma, low=0, high=100, above=True)

    def __call__(self, rng: np.random.Generator) -> Run:
        sigma = draw(rng, self.sigma)
        reach = math.ceil(3 * sigma)
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        return functools.partial(_convolve, kernel=(kernel / kernel.sum()).tolist())


@dataclass(frozen=True, kw_only=True)
class MedianBlur:
    """Replace each pixel by the median of a square, after rounding to 8 bits.

    Args:
        sizes: Side lengths in pixels to choose from, odd, at most 9.
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
    """Interpolate or extrapolate from a light blur, as torchvision's ``adjust_sharpness`` does.

    Args:
        range: Range of the factor: 0 is the blurred image, 1 the image, 2 sharpens.
    """

    range: tuple[float, float] = (1.0, 2.0)

    def __post_init__(self) -> None:
        check("range", self.range, low=0)

    def __call__(self, rng: np.random.Generator) -> Run:
        return functools.partial(_sharpen, factor=draw(rng, self.range))


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Add Gaussian noise, independent for each channel and pixel.

    Args:
        levels: Range of the standard deviation, in 8-bit levels.
    """

    levels: tuple[float, float] = (2.0, 10.0)

    def __post_init__(self) -> None:
        check("levels", self.levels, low=0, high=255)

    def __call__(self, rng: np.random.Generator) -> Run:
        seed = int(rng.integers(2**63))
        return functools.partial(_add_noise, deviation=draw(rng, self.levels), seed=seed)


@dataclass(frozen=True, kw_only=True)
class JPEG:
    """Add the artifacts of JPEG compression.

    Args:
        quality: Lowest and highest JPEG quality, 1 to 100.
    """

    quality: tuple[int, int] = (40, 90)

    def __post_init__(self) -> None:
        check("quality", self.quality, low=1, high=100)

    def __call__(self, rng: np.random.Generator) -> Run:
        low, high = self.quality
        return functools.partial(_through_jpeg, quality=int(rng.integers(low, high + 1)))


@dataclass(frozen=True, kw_only=True)
class _Morphology:
    """Arguments of :class:`Closing` and :class:`Opening` with a square structuring element.

    Args:
        sizes: Side lengths in pixels to choose from, odd.
        on: ``"image"`` (each channel independently) or ``"mask"``.
        classes: Classes of the mask to process, in order.
    """

    sizes: tuple[int, ...] = (3, 5)
    on: Literal["image", "mask"] = "image"
    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_sizes("sizes", self.sizes)
        if (self.on == "mask") != bool(self.classes):
            raise ConfigError("classes: expected with on='mask', and only there")


class Closing(_Morphology):
    """Remove dark details narrower than a square, or fill gaps in a class of the mask.

    Filled pixels get the class, whichever class they had; ignored pixels stay ignored.
    """

    def __call__(self, rng: np.random.Generator) -> Run:
        size = int(rng.choice(self.sizes))
        if self.on == "image":
            return functools.partial(_close_image, size=size)
        return functools.partial(_close_classes, size=size, classes=self.classes)


class Opening(_Morphology):
    """Remove bright details narrower than a square, or small regions of a class of the mask.

    Removed pixels of the mask become class 0, the background.
    """

    def __call__(self, rng: np.random.Generator) -> Run:
        size = int(rng.choice(self.sizes))
        if self.on == "image":
            return functools.partial(_open_image, size=size)
        return functools.partial(_open_classes, size=size, classes=self.classes)


def _continued(image: Tensor, reach: int, dim: int) -> Tensor:
    """Return the image with its border replicated on both sides of one dimension."""
    shape = [*image.shape]
    shape[dim] = reach
    before, after = image.narrow(dim, 0, 1), image.narrow(dim, image.shape[dim] - 1, 1)
    return torch.cat([before.expand(shape), image, after.expand(shape)], dim)


def _moved(image: Tensor, size: int, dim: int) -> list[Tensor]:
    """Return views shifted to each position of a window along one dimension, border replicated."""
    padded = _continued(image, size // 2, dim)
    return [padded.narrow(dim, start, image.shape[dim]) for start in range(size)]


def _convolve(
    image: Tensor, mask: Tensor | None, kernel: Sequence[float]
) -> tuple[Tensor, Tensor | None]:
    image = image.float()
    for dim in (-2, -1):
        first, *others = _moved(image, len(kernel), dim)
        image = first * kernel[0]
        for moved, coefficient in zip(others, kernel[1:], strict=True):
            image.add_(moved, alpha=coefficient)
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
    smooth = mean.mul_(9 / 13).add_(image, alpha=4 / 13)  # kernel: 3×3 ones with 5 in the center
    return smooth.lerp_(image, factor).clamp_(0, 255), mask


def _add_noise(
    image: Tensor, mask: Tensor | None, deviation: float, seed: int
) -> tuple[Tensor, Tensor | None]:
    # Drawn on the CPU, so that every device gives the same noise.
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
    """Return the maximum of a square around each pixel."""
    for dim in (-2, -1):  # ten times as fast as max_pool2d
        image = functools.reduce(torch.maximum, _moved(image, size, dim))
    return image


def _shrunk(image: Tensor, size: int) -> Tensor:
    """Return the minimum of a square around each pixel."""
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
