"""The vocabulary of drawn things: noise, colors, outlines, and surfaces for light to fall on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.floating]
Noise = Callable[..., Array]  # of the features' size, or height and width -> a field over a window

OUTLINE_POINTS = 72


@dataclass(frozen=True)
class Surface:
    """What the light meets: all fields have the window's shape (h, w), or are numbers."""

    color: Array  # (h, w, 3) in 0..1
    height: Array  # in the object's own units; its slope is what light and shade are made of
    opacity: Array | float = 1.0
    gloss: float = 0.0


@dataclass(frozen=True)
class Thing:
    """One object in its own units: it lies along x in -1..1, and y is across it."""

    outlines: Sequence[Array]  # (points, 2) each
    surface: Callable[[Array, Array, Noise], Surface]  # of (x, y, noise)


def value_noise(rng: np.random.Generator, shape: Sequence[int], cell: tuple[float, float]) -> Array:
    """Smooth noise around 0.5 whose features are about `cell` (rows, columns) pixels large."""
    rows, columns = (max(2, round(n / c) + 1) for n, c in zip(shape, cell, strict=True))
    grid = Image.fromarray(rng.random((rows, columns), dtype=np.float32))
    return np.asarray(grid.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def pick(rng: np.random.Generator, *colors: str, spread: float = 0.06) -> Array:
    """One of the colors (RRGGBB), a little off, as no two objects are alike."""
    color = np.array(list(bytes.fromhex(str(rng.choice(colors)))), np.float32) / 255
    color = color * (1 + rng.normal(0, spread)) + rng.normal(0, spread / 3, 3)
    return np.clip(color, 0.02, 0.98).astype(np.float32)


def mix(first: Array, second: Array, share: Array) -> Array:
    """`first` where share is 0, `second` where it is 1."""
    weight = np.clip(share, 0, 1)[..., None].astype(np.float32)
    return first + (second - first) * weight


def step(x: Array, width: float = 0.03) -> Array:
    """A soft 0 to 1 at x = 0."""
    return np.clip(x / width + 0.5, 0, 1)


def profile(*points: tuple[float, float]) -> Array:
    """The outline of a body that is symmetric about its length: (x, half width) along it."""
    half = np.array(points, np.float32)
    return np.concatenate([half, half[::-1] * (1, -1)]).astype(np.float32)


def rounded(a: float, b: float, power: float) -> Array:
    """A superellipse: power 2 is an ellipse, 8 nearly a rectangle."""
    angle = np.linspace(0, 2 * np.pi, OUTLINE_POINTS, endpoint=False)
    radius = (np.abs(np.cos(angle)) ** power + np.abs(np.sin(angle)) ** power) ** (-1 / power)
    return np.stack([a * radius * np.cos(angle), b * radius * np.sin(angle)], 1).astype(np.float32)


def blob(rng: np.random.Generator, roughness: float, aspect: float = 0.8) -> Array:
    """A closed curve with lobes, the finer the smaller."""
    angle = np.linspace(0, 2 * np.pi, OUTLINE_POINTS, endpoint=False)
    radius = np.ones_like(angle)
    for wave in range(2, 12):
        radius += roughness / wave * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    curve = np.stack([radius * np.cos(angle), aspect * radius * np.sin(angle)], 1)
    return (curve / np.abs(curve[:, 0]).max()).astype(np.float32)


def resampled(outline: Array) -> Array:
    """The same closed curve as OUTLINE_POINTS points at equal distances."""
    closed = np.concatenate([outline, outline[:1]])
    along = np.concatenate([[0], np.hypot(*np.diff(closed, axis=0).T).cumsum()])
    at = np.linspace(0, along[-1], OUTLINE_POINTS, endpoint=False)
    return np.stack([np.interp(at, along, axis) for axis in closed.T], 1).astype(np.float32)


def polygon_area(outline: Array) -> float:
    """The area inside a simple polygon, by the shoelace formula."""
    x, y = np.asarray(outline, np.float64).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)
