"""Filters: operations on a neighborhood of each pixel, noise, and JPEG compression.

Calling an operation draws its random numbers and returns a function of an image with values in
0..255, of any dtype, or of a mask where ``on`` is ``"mask"``. Borders are padded with the outermost
pixels.
"""

import functools
import io
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor

from segkit.augment.median import median
from segkit.augment.ranges import Factor, Range, WindowSizes, between, draw, odd
from segkit.core.labels import IGNORE

Run = Callable[[Tensor], Tensor]


def blur(rng: Generator, *, sizes: WindowSizes = (3, 5)) -> Run:
    """Blur with the mean of a square.

    Args:
        sizes: Side lengths in pixels to choose from, odd.
    """
    size = int(rng.choice(sizes))
    return functools.partial(_convolve, kernel=[1 / size] * size)


def gaussian_blur(
    rng: Generator, *, sigma: Annotated[Range, between(0, 100, above=True)] = (0.5, 2.0)
) -> Run:
    """Blur with a Gaussian, truncated at three standard deviations.

    Args:
        sigma: Range of the standard deviation in pixels.
    """
    deviation = draw(rng, sigma)
    reach = math.ceil(3 * deviation)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    return functools.partial(_convolve, kernel=(kernel / kernel.sum()).tolist())


def median_blur(rng: Generator, *, sizes: Annotated[tuple[int, ...], odd(9)] = (3, 5)) -> Run:
    """Replace each pixel by the median of a square, after rounding to 8 bits.

    Args:
        sizes: Side lengths in pixels to choose from, odd, at most 9.
    """
    return functools.partial(_median, size=int(rng.choice(sizes)))


def sharpen(rng: Generator, *, range: Factor = (1.0, 2.0)) -> Run:
    """Interpolate or extrapolate from a light blur, as torchvision's ``adjust_sharpness`` does.

    Args:
        range: Range of the factor: 0 is the blurred image, 1 the image, 2 sharpens.
    """
    return functools.partial(_sharpen, factor=draw(rng, range))


def noise(rng: Generator, *, levels: Annotated[Range, between(0, 255)] = (2.0, 10.0)) -> Run:
    """Add Gaussian noise, independent for each channel and pixel.

    Args:
        levels: Range of the standard deviation, in 8-bit levels.
    """
    seed = int(rng.integers(2**63))
    return functools.partial(_add_noise, deviation=draw(rng, levels), seed=seed)


def jpeg(rng: Generator, *, quality: Annotated[tuple[int, int], between(1, 100)] = (40, 90)) -> Run:
    """Add the artifacts of JPEG compression.

    Args:
        quality: Lowest and highest JPEG quality, 1 to 100.
    """
    return functools.partial(_compress, quality=int(rng.integers(quality[0], quality[1] + 1)))


def closing(
    rng: Generator,
    *,
    sizes: WindowSizes = (3, 5),
    on: Literal["image", "mask"] = "image",
    classes: tuple[int, ...] = (),
) -> Run:
    """Remove dark details narrower than a square, or fill gaps in a class of the mask.

    Filled pixels get the class, whichever class they had; ignored pixels stay ignored.

    Args:
        sizes: Side lengths in pixels to choose from, odd.
        on: ``"image"`` (each channel independently) or ``"mask"``.
        classes: Classes of the mask to process, in order.
    """
    return _morphology(rng, sizes, on, classes, _close, _close_classes)


def opening(
    rng: Generator,
    *,
    sizes: WindowSizes = (3, 5),
    on: Literal["image", "mask"] = "image",
    classes: tuple[int, ...] = (),
) -> Run:
    """Remove bright details narrower than a square, or small regions of a class of the mask.

    Removed pixels of the mask become class 0, the background.

    Args:
        sizes: Side lengths in pixels to choose from, odd.
        on: ``"image"`` (each channel independently) or ``"mask"``.
        classes: Classes of the mask to process, in order.
    """
    return _morphology(rng, sizes, on, classes, _open, _open_classes)


def _morphology(
    rng: Generator,
    sizes: Sequence[int],
    on: str,
    classes: Sequence[int],
    of_image: Callable[..., Tensor],
    of_classes: Callable[..., Tensor],
) -> Run:
    size = int(rng.choice(sizes))
    if on == "image":
        return functools.partial(of_image, size=size)
    return functools.partial(of_classes, size=size, classes=classes)


def _padded(image: Tensor, reach: int, dim: int) -> Tensor:
    """Return the image with its border replicated on both sides of one dimension."""
    shape = [*image.shape]
    shape[dim] = reach
    before, after = image.narrow(dim, 0, 1), image.narrow(dim, image.shape[dim] - 1, 1)
    return torch.cat([before.expand(shape), image, after.expand(shape)], dim)


def _shifted(image: Tensor, size: int, dim: int) -> list[Tensor]:
    """Return views shifted to each position of a window along one dimension, border replicated."""
    padded = _padded(image, size // 2, dim)
    return [padded.narrow(dim, start, image.shape[dim]) for start in range(size)]


def _convolve(image: Tensor, kernel: Sequence[float]) -> Tensor:
    image = image.float()
    for dim in (-2, -1):
        first, *others = _shifted(image, len(kernel), dim)
        image = first * kernel[0]
        for shifted, coefficient in zip(others, kernel[1:], strict=True):
            image.add_(shifted, alpha=coefficient)
    return image


def _median(image: Tensor, size: int) -> Tensor:
    if image.is_floating_point():
        image = image.round().clamp_(0, 255).to(torch.uint8)
    for dim in (-2, -1):
        image = _padded(image, size // 2, dim)
    return median(image, size)


def _sharpen(image: Tensor, factor: float) -> Tensor:
    image = image.float()
    mean = _convolve(image, [1 / 3] * 3)
    smooth = mean.mul_(9 / 13).add_(image, alpha=4 / 13)  # kernel: 3×3 ones with 5 in the center
    return smooth.lerp_(image, factor).clamp_(0, 255)


def _add_noise(image: Tensor, deviation: float, seed: int) -> Tensor:
    # Drawn on the CPU, so that every device gives the same noise.
    noise = np.random.default_rng(seed).standard_normal(tuple(image.shape), dtype=np.float32)
    added = torch.from_numpy(noise).to(image.device).mul_(deviation)
    return added.add_(image).clamp_(0, 255)


def _compress(image: Tensor, quality: int) -> Tensor:
    levels = image.round() if image.is_floating_point() else image
    pixels = levels.to("cpu", torch.uint8).permute(1, 2, 0).contiguous().numpy()
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        with Image.open(file) as compressed:
            decoded = np.array(compressed)
    return torch.from_numpy(decoded).permute(2, 0, 1).to(image.device)


def _dilate(image: Tensor, size: int) -> Tensor:
    for dim in (-2, -1):  # ten times as fast as max_pool2d
        image = functools.reduce(torch.maximum, _shifted(image, size, dim))
    return image


def _erode(image: Tensor, size: int) -> Tensor:
    for dim in (-2, -1):
        image = functools.reduce(torch.minimum, _shifted(image, size, dim))
    return image


def _close(image: Tensor, size: int) -> Tensor:
    return _erode(_dilate(image, size), size)


def _open(image: Tensor, size: int) -> Tensor:
    return _dilate(_erode(image, size), size)


def _close_classes(mask: Tensor, size: int, classes: Sequence[int]) -> Tensor:
    ignored = mask == IGNORE
    for index in classes:
        mask = torch.where(_close(mask == index, size) & ~ignored, index, mask)
    return mask


def _open_classes(mask: Tensor, size: int, classes: Sequence[int]) -> Tensor:
    for index in classes:
        inside = mask == index
        mask = torch.where(inside & ~_open(inside, size), 0, mask)
    return mask


FILTERS: dict[str, Callable[..., Run]] = {
    operation.__name__: operation
    for operation in (blur, gaussian_blur, median_blur, sharpen, noise, jpeg, closing, opening)
}

LINEAR = {"blur", "gaussian_blur"}
"""Filters that commute with a color matrix."""
