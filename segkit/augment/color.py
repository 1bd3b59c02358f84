"""Color: every operation is a 4×4 matrix on (R, G, B, 1) in 0..1; a curve is one lookup table.

Matrices multiply and are applied once. Nothing is cut off to 0..1 between them, only after their
product: a pixel too bright for one operation comes back with the next, where a chain of 8-bit
images would have lost it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from segkit.augment.ranges import check, draw
from segkit.core.errors import ConfigError

NO_CHANGE = np.eye(4)
UNLIMITED = np.tile([-math.inf, math.inf], (3, 1))

_LUMA = np.array([0.2989, 0.587, 0.114])  # Rec. 601, in torchvision's digits
_STEPS = 16  # of a curve's table, a level of 8 bits


def affine(linear: np.ndarray, offset: np.ndarray | float = 0.0) -> np.ndarray:
    """The 4×4 matrix of a 3×3 one and of what is added after it."""
    matrix = NO_CHANGE.copy()
    matrix[:3, :3], matrix[:3, 3] = linear, offset
    return matrix


def brightening(factor: float) -> np.ndarray:
    """Multiplies all channels."""
    return affine(factor * np.eye(3))


def contrasting(factor: float, pivot: float) -> np.ndarray:
    """Multiplies distances from ``pivot``."""
    return affine(factor * np.eye(3), (1 - factor) * pivot)


def saturating(factor: float) -> np.ndarray:
    """Multiplies distances from gray: 0 is grayscale, 1 is the image."""
    return affine(factor * np.eye(3) + (1 - factor) * np.tile(_LUMA, (3, 1)))


def turning_hue(degrees: float) -> np.ndarray:
    """Turns colors about the gray axis, red towards yellow towards green."""
    angle = math.radians(degrees)
    cross = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    keep = math.cos(angle) * np.eye(3)
    return affine(keep + math.sin(angle) * cross + (1 - math.cos(angle)) * np.full((3, 3), 1 / 3))


@dataclass(frozen=True, kw_only=True)
class Brightness:
    """Multiply all channels by a random factor, as torchvision's ``adjust_brightness`` does.

    Args:
        range: Of the factor; 1 is the image.
    """

    range: tuple[float, float]

    def __post_init__(self) -> None:
        check("range", self.range, low=0)

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        return brightening(draw(rng, self.range))


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Multiply distances from a fixed gray.

    Departs from torchvision, whose gray is the mean luma of each image: a matrix that depends on no
    pixel composes with the others.

    Args:
        range: Of the factor; 1 is the image.
        pivot: The gray that stays, in 0..1.
    """

    range: tuple[float, float]
    pivot: float = 0.5

    def __post_init__(self) -> None:
        check("range", self.range, low=0)

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        return contrasting(draw(rng, self.range), self.pivot)


@dataclass(frozen=True, kw_only=True)
class Saturation:
    """Multiply distances from each pixel's own gray, as torchvision's ``adjust_saturation`` does.

    Args:
        range: Of the factor; 0 is grayscale, 1 is the image.
    """

    range: tuple[float, float]

    def __post_init__(self) -> None:
        check("range", self.range, low=0)

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        return saturating(draw(rng, self.range))


@dataclass(frozen=True, kw_only=True)
class Hue:
    """Turn colors about the gray axis.

    Departs from a turn in HSV by design: that one is not linear. Grays stay, the mean of R, G and B
    stays, and at 120 degrees red is green in both.

    Args:
        degrees: Range of the turn; 360 is the image again.
    """

    degrees: tuple[float, float]

    def __post_init__(self) -> None:
        check("degrees", self.degrees)

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        return turning_hue(draw(rng, self.degrees))


@dataclass(frozen=True, kw_only=True)
class RGBShift:
    """Add a number of its own to each channel.

    Args:
        levels: Range of the numbers, in levels of 255.
    """

    levels: tuple[float, float]

    def __post_init__(self) -> None:
        check("levels", self.levels, low=-255, high=255)

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        return affine(np.eye(3), rng.uniform(*self.levels, 3) / 255)


@dataclass(frozen=True, kw_only=True)
class Grayscale:
    """The luma in all three channels. One time in ten unless ``p`` says otherwise."""

    default_p: ClassVar[float] = 0.1

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        return saturating(0)


@dataclass(frozen=True, kw_only=True)
class Photometric:
    """The distortions of SSD, in its order, each half of the time.

    Brightness, then contrast, saturation and hue, or saturation, hue and contrast, as likely.
    Liu et al. 2015, https://arxiv.org/abs/1512.02325

    Args:
        levels: Furthest that brightness adds, in levels of 255.
        contrast: Range of the factor, about black as there.
        saturation: Range of the factor.
        degrees: Furthest that hue turns; OpenCV's 8-bit hue of 18 is 36 degrees.

    Departs from the paper's code: saturation and hue are linear (:class:`Saturation`,
    :class:`Hue`), not steps in HSV, and channels are not swapped.
    """

    levels: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    degrees: float = 36.0

    def __post_init__(self) -> None:
        check("levels", (0, self.levels), low=0, high=255)
        check("contrast", self.contrast, low=0)
        check("saturation", self.saturation, low=0)
        check("degrees", (0, self.degrees), low=0)

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        apply = rng.random(4) < 0.5
        contrast_first = rng.random() < 0.5
        brightness = affine(np.eye(3), draw(rng, (-self.levels, self.levels)) / 255)
        contrast = contrasting(draw(rng, self.contrast), 0)
        saturation = saturating(draw(rng, self.saturation))
        hue = turning_hue(draw(rng, (-self.degrees, self.degrees)))
        brightness, contrast, saturation, hue = (
            matrix if applied else np.eye(4)
            for applied, matrix in zip(apply, (brightness, contrast, saturation, hue), strict=True)
        )
        if contrast_first:
            return hue @ saturation @ contrast @ brightness
        return contrast @ hue @ saturation @ brightness


@dataclass(frozen=True, kw_only=True)
class Gamma:
    """Raise to a random power, as torchvision's ``adjust_gamma`` does.

    Args:
        range: Of the power; below 1 brightens.
    """

    range: tuple[float, float]

    def __post_init__(self) -> None:
        check("range", self.range, low=0, above=True)

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        power = draw(rng, self.range)
        return curve(lambda value: value**power)


@dataclass(frozen=True, kw_only=True)
class Posterize:
    """Keep the first bits of each channel's eight.

    Args:
        bits: How many.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"bits: expected 1 to 8; got {self.bits}")

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        step = 2 ** (8 - self.bits)
        return curve(lambda value: np.floor(np.rint(value * 255) / step) * step / 255)


@dataclass(frozen=True, kw_only=True)
class Solarize:
    """Invert what is brighter than a random threshold.

    Args:
        range: Of the threshold, in levels of 255.
    """

    range: tuple[float, float] = (128.0, 255.0)

    def __post_init__(self) -> None:
        check("range", self.range, low=0, high=256)

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        threshold = draw(rng, self.range) / 255
        return curve(lambda value: np.where(value >= threshold, 1 - value, value))


def curve(function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The table of a function from 0..1 to 0..1, at 16 steps a level."""
    return function(np.linspace(0, 1, 255 * _STEPS + 1)).astype(np.float32)


def recolored(
    image: Tensor, matrix: np.ndarray, unit: float = 255.0, limits: np.ndarray = UNLIMITED
) -> Tensor:
    """Apply a color matrix.

    Args:
        image: In levels, 0 to 255, of any number type.
        matrix: (4, 4), from 0..1.
        unit: What one is in the result: 255 for levels again.
        limits: (3, 2), the least and most of each channel, in the result's unit.

    Shape:
        image: (3, H, W), float32 in the result
    """
    scaled = torch.from_numpy(matrix[:3] * [*[unit / 255] * 3, unit]).float().to(image.device)
    levels = image.to(torch.float32, memory_format=torch.contiguous_format).reshape(3, -1)
    result = torch.addmm(scaled[:, 3:], scaled[:, :3], levels).view(image.shape)
    for channel, (low, high) in zip(result, limits.tolist(), strict=True):
        channel.clamp_(low, high)  # one after the other: a channel fits the cache
    return result


def curved(image: Tensor, table: np.ndarray) -> Tensor:
    """Look every value of an image, in levels, up in a curve's table; levels again, float32."""
    steps = image.float().mul(_STEPS).round_().clamp_(0, 255 * _STEPS).int()
    levels = torch.from_numpy(table).to(image.device).mul(255)
    return levels.index_select(0, steps.flatten()).view(image.shape)


COLOR: dict[str, Callable[..., Callable[[np.random.Generator], np.ndarray]]] = {
    "brightness": Brightness,
    "contrast": Contrast,
    "saturation": Saturation,
    "hue": Hue,
    "rgb_shift": RGBShift,
    "grayscale": Grayscale,
    "photometric": Photometric,
}

CURVES: dict[str, Callable[..., Callable[[np.random.Generator], np.ndarray]]] = {
    "gamma": Gamma,
    "posterize": Posterize,
    "solarize": Solarize,
}
