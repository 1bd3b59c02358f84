"""Color operations: 4×4 matrices on (R, G, B, 1) in 0..1, and curves as lookup tables.

They change what is RGB or gray. Of images with more bands, the first three are taken as R, G, B.

Matrices are multiplied and applied once. Values are clipped to 0..1 only after the product: a value
that one operation pushes above 1 and the next brings back is kept, where a chain of 8-bit images
would lose it.
"""

import math
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from segkit.augment.ranges import Angle, Factor, PositiveFactor, Range, between, draw, within

IDENTITY = np.eye(4)
_LUMA = np.array([0.2989, 0.587, 0.114])  # Rec. 601, in torchvision's digits
_STEPS = 16  # entries of a curve's table per 8-bit level


def affine(linear: np.ndarray, offset: np.ndarray | float = 0.0) -> np.ndarray:
    """Return the matrix, such as 4×4, of a linear one such as 3×3, followed by an offset."""
    matrix = np.eye(len(linear) + 1)
    matrix[:-1, :-1], matrix[:-1, -1] = linear, offset
    return matrix


def colored(bands: int) -> int:
    """Return how many of an image's first bands color operations change."""
    return {1: 1, 2: 0}.get(bands, 3)


def of_bands(matrix: np.ndarray, bands: int) -> np.ndarray:
    """Return a color matrix (4, 4) for images of another number of bands, (bands + 1, bands + 1).

    A gray image is changed as its RGB copy, whose channels are then averaged.
    """
    if bands == 3:
        return matrix
    result = np.eye(bands + 1)
    if bands == 1:
        result[0] = matrix[:3, :3].sum(1).mean(), matrix[:3, 3].mean()
    elif bands > 3:
        places = [0, 1, 2, bands]
        result[np.ix_(places, places)] = matrix
    return result


def brightness_matrix(factor: float) -> np.ndarray:
    """Return the matrix that multiplies all channels by ``factor``."""
    return affine(factor * np.eye(3))


def contrast_matrix(factor: float, pivot: float) -> np.ndarray:
    """Return the matrix that multiplies differences from ``pivot`` by ``factor``."""
    return affine(factor * np.eye(3), (1 - factor) * pivot)


def saturation_matrix(factor: float) -> np.ndarray:
    """Return the matrix that multiplies differences from gray: 0 is grayscale, 1 the image."""
    return affine(factor * np.eye(3) + (1 - factor) * np.tile(_LUMA, (3, 1)))


def hue_matrix(degrees: float) -> np.ndarray:
    """Return the matrix that rotates colors about the gray axis, from red to yellow to green."""
    angle = math.radians(degrees)
    cross = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    keep = math.cos(angle) * np.eye(3)
    return affine(keep + math.sin(angle) * cross + (1 - math.cos(angle)) * np.full((3, 3), 1 / 3))


def brightness(rng: Generator, *, range: Factor) -> np.ndarray:
    """Multiply all channels by a random factor, as torchvision's ``adjust_brightness`` does.

    Args:
        range: Range of the factor; 1 leaves the image unchanged.
    """
    return brightness_matrix(draw(rng, range))


def contrast(rng: Generator, *, range: Factor, pivot: float = 0.5) -> np.ndarray:
    """Multiply differences from a fixed gray.

    Departs from torchvision, which uses the mean luma of each image: a matrix that is independent
    of the pixels can be multiplied with the others.

    Args:
        range: Range of the factor; 1 leaves the image unchanged.
        pivot: The gray that does not change, in 0..1.
    """
    return contrast_matrix(draw(rng, range), pivot)


def saturation(rng: Generator, *, range: Factor) -> np.ndarray:
    """Multiply differences from each pixel's luma, as torchvision's ``adjust_saturation`` does.

    Args:
        range: Range of the factor; 0 is grayscale, 1 leaves the image unchanged.
    """
    return saturation_matrix(draw(rng, range))


def hue(rng: Generator, *, degrees: Angle) -> np.ndarray:
    """Rotate colors about the gray axis.

    Departs from a hue rotation in HSV, which is not linear. In both, grays and the mean of R, G and
    B do not change, and 120 degrees turn red into green.

    Args:
        degrees: Range of the angle; 360 leaves the image unchanged.
    """
    return hue_matrix(draw(rng, degrees))


def rgb_shift(rng: Generator, *, levels: Annotated[Range, between(-255, 255)]) -> np.ndarray:
    """Add a different random number to each channel.

    Args:
        levels: Range of the numbers, in 8-bit levels.
    """
    return affine(np.eye(3), rng.uniform(*levels, 3) / 255)


def grayscale(rng: Generator) -> np.ndarray:
    """Replace all three channels by the luma. ``p`` is 0.1 by default."""
    return saturation_matrix(0)


def photometric(
    rng: Generator,
    *,
    levels: Annotated[float, within(0, 255)] = 32.0,
    contrast: Factor = (0.5, 1.5),
    saturation: Factor = (0.5, 1.5),
    degrees: Annotated[float, within(0)] = 36.0,
) -> np.ndarray:
    """Apply the photometric distortions of SSD, each with probability 0.5.

    The order is brightness, then either contrast, saturation, hue or saturation, hue, contrast,
    with equal probability. Liu et al. 2015, https://arxiv.org/abs/1512.02325

    Args:
        levels: Largest brightness offset, in 8-bit levels.
        contrast: Range of the contrast factor, relative to black as in the paper's code.
        saturation: Range of the saturation factor.
        degrees: Largest hue rotation; 18 in OpenCV's 8-bit hue is 36 degrees.

    Departs from the paper's code: saturation and hue are linear (:func:`saturation`, :func:`hue`),
    not computed in HSV, and channels are not swapped.
    """
    applied = rng.random(4) < 0.5
    contrast_first = rng.random() < 0.5
    matrices = [
        affine(np.eye(3), draw(rng, (-levels, levels)) / 255),
        contrast_matrix(draw(rng, contrast), 0),
        saturation_matrix(draw(rng, saturation)),
        hue_matrix(draw(rng, (-degrees, degrees))),
    ]
    light, sharp, vivid, turned = (
        matrix if use else np.eye(4) for use, matrix in zip(applied, matrices, strict=True)
    )
    if contrast_first:
        return turned @ vivid @ sharp @ light
    return sharp @ turned @ vivid @ light


def gamma(rng: Generator, *, range: PositiveFactor) -> np.ndarray:
    """Raise values to a random power, as torchvision's ``adjust_gamma`` does.

    Args:
        range: Range of the power; below 1 brightens.
    """
    power = draw(rng, range)
    return curve(lambda value: value**power)


def posterize(rng: Generator, *, bits: Annotated[int, within(1, 8)] = 4) -> np.ndarray:
    """Keep only the most significant bits of each channel.

    Args:
        bits: Number of bits to keep, 1 to 8.
    """
    step = 2 ** (8 - bits)
    return curve(lambda value: np.floor(np.rint(value * 255) / step) * step / 255)


def solarize(
    rng: Generator, *, range: Annotated[Range, between(0, 256)] = (128.0, 255.0)
) -> np.ndarray:
    """Invert values at or above a random threshold.

    Args:
        range: Range of the threshold, in 8-bit levels.
    """
    threshold = draw(rng, range) / 255
    return curve(lambda value: np.where(value >= threshold, 1 - value, value))


def curve(function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the lookup table of a function from 0..1 to 0..1, with 16 entries per 8-bit level."""
    return function(np.linspace(0, 1, 255 * _STEPS + 1)).astype(np.float32)


def apply_matrix(
    image: Tensor, matrix: np.ndarray, unit: float = 255.0, limits: np.ndarray | None = None
) -> Tensor:
    """Apply a color matrix.

    Args:
        image: Values in 0..255, of any dtype.
        matrix: (C + 1, C + 1), for values in 0..1.
        unit: Scale of the result: 255 gives values in 0..255 again.
        limits: (C, 2), the minimum and maximum of each channel, in the result's unit.

    Shape:
        image: (C, H, W); the result is float32
    """
    bands = len(image)
    scaled = torch.from_numpy(matrix[:-1] * [*[unit / 255] * bands, unit]).float().to(image.device)
    levels = image.to(torch.float32, memory_format=torch.contiguous_format).reshape(bands, -1)
    result = torch.addmm(scaled[:, bands:], scaled[:, :bands], levels).view(image.shape)
    if limits is not None:
        for channel, (low, high) in zip(result, limits.tolist(), strict=True):
            channel.clamp_(low, high)  # one at a time: a channel fits in the cache
    return result


def apply_table(image: Tensor, table: np.ndarray) -> Tensor:
    """Look up each value of an image (0..255) in a curve's table; return float32 in 0..255."""
    rgb, others = image.float().split([bands := colored(len(image)), len(image) - bands])
    steps = rgb.mul(_STEPS).round_().clamp_(0, 255 * _STEPS).int()
    levels = torch.from_numpy(table).to(image.device).mul(255)
    changed = levels.index_select(0, steps.flatten()).view(rgb.shape)
    return torch.cat([changed, others]) if len(others) else changed


COLOR: dict[str, Callable[..., np.ndarray]] = {
    operation.__name__: operation
    for operation in (brightness, contrast, saturation, hue, rgb_shift, grayscale, photometric)
}

CURVES: dict[str, Callable[..., np.ndarray]] = {
    operation.__name__: operation for operation in (gamma, posterize, solarize)
}
