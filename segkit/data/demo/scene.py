"""One photograph-like scene: things on the ground, lit from one side, seen through a lens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from segkit.data.demo.ground import GROUNDS, leaf, pebble
from segkit.data.demo.litter import LITTER
from segkit.data.demo.shapes import (
    Array,
    Noise,
    Surface,
    Thing,
    polygon_area,
    resampled,
    value_noise,
)

OVERSAMPLING = 2  # the canvas is this much finer than the photograph
AMBIENT = 0.45  # the share of light that comes from everywhere


@dataclass(frozen=True)
class Scene:
    """A photograph and what is known about it.

    Shape:
        image: uint8 (size, size, 3)
        mask: uint8 (size, size), class indices
        objects: (class index, outlines in pixels) in the order of drawing: largest first.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    objects: list[tuple[int, list[Array]]]


@dataclass(frozen=True)
class Placed:
    """A thing and where it lies: `matrix` and `center` take its own units to pixels."""

    thing: Thing
    matrix: Array
    center: tuple[float, float]
    outlines: list[Array]

    @property
    def area(self) -> float:
        """In square pixels, of what lies in the frame."""
        return sum(map(polygon_area, self.outlines))


class Canvas:
    """A scene in the making: things are laid on the ground, lit from one side.

    Args:
        size: Side of the photograph in pixels; the canvas is OVERSAMPLING times finer.
        rng: Where all chance comes from.
    """

    def __init__(self, *, size: int, rng: np.random.Generator) -> None:
        self.rng = rng
        self.size = size
        self.side = size * OVERSAMPLING
        toward, elevation = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.15)
        level = np.cos(elevation)
        self.light = np.array([level * np.cos(toward), level * np.sin(toward), np.sin(elevation)])
        self.shadow = rng.uniform(0.3, 0.6)
        ground = GROUNDS[rng.integers(len(GROUNDS))](rng, self._noise((self.side,) * 2, self.side))
        self.pixels = self._lit(ground, self.side)

    def place(self, thing: Thing, *, center: tuple[float, float], length: float) -> Placed:
        """Turn, scale and slightly shear a thing, and cut it off at the frame."""
        turn, shear = self.rng.uniform(0, 2 * np.pi), self.rng.normal(0, 0.06)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        matrix = length * rotation @ [[1, shear], [0, self.rng.uniform(0.9, 1.1)]]
        outlines = [resampled(outline) @ matrix.T + center for outline in thing.outlines]
        # the points are dense, so moving the outer ones onto the frame cuts the shape off there
        outlines = [np.clip(outline, 0, self.size).round(2) for outline in outlines]
        return Placed(thing, matrix, center, [o for o in outlines if polygon_area(o) > 1])

    def lay(self, placed: Placed) -> NDArray[np.bool_]:
        """Paint a thing and its shadow, and return which of the photograph's pixels it covers."""
        coverage = Image.new("L", (self.side, self.side))
        for outline in placed.outlines:
            # Pillow counts from the middle of the first pixel, outlines from its corner
            points = (outline * OVERSAMPLING - 0.5).ravel().tolist()
            ImageDraw.Draw(coverage).polygon(points, fill=255)
        left, top, right, bottom = coverage.getbbox() or (0, 0, 0, 0)
        # a pixel more on every side, for the slopes at the rim
        window = slice(max(top - 1, 0), bottom + 1), slice(max(left - 1, 0), right + 1)
        inside = np.asarray(coverage, np.float32)[window] / 255

        y, x = (np.indices(inside.shape, np.float32) + 0.5) / OVERSAMPLING
        x += window[1].start / OVERSAMPLING - placed.center[0]
        y += window[0].start / OVERSAMPLING - placed.center[1]
        (a, b), (c, d) = np.linalg.inv(placed.matrix).astype(np.float32)
        unit = float(np.sqrt(abs(np.linalg.det(placed.matrix)))) * OVERSAMPLING
        surface = placed.thing.surface(a * x + b * y, c * x + d * y, self._noise(x.shape, unit))

        self._shade(coverage, 0.09 * unit)
        opacity = np.asarray(inside * surface.opacity, np.float32)[..., None]
        self.pixels[window] += (self._lit(surface, unit) - self.pixels[window]) * opacity
        return np.asarray(coverage.reduce(OVERSAMPLING)) >= 128

    def photograph(self) -> NDArray[np.uint8]:
        """Through a lens onto a sensor: uneven light, white balance, blur, noise."""
        rng = self.rng
        y, x = np.indices((self.side, self.side), np.float32) / self.side - 0.5
        toward = rng.uniform(0, 2 * np.pi)
        light = 1 + rng.uniform(0, 0.5) * (x * np.cos(toward) + y * np.sin(toward))
        light = light * (1 - rng.uniform(0, 0.5) * (x**2 + y**2)) * rng.uniform(0.8, 1.15)
        balance = rng.normal(1, 0.03, 3).astype(np.float32)
        exposed = np.clip(self.pixels * light[..., None].astype(np.float32) * balance, 0, 1)
        image = Image.fromarray((exposed * 255).astype(np.uint8))
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.5) * OVERSAMPLING))
        sensor = np.asarray(image.reduce(OVERSAMPLING), np.float64)
        sensor = sensor + rng.normal(0, rng.uniform(1, 5), sensor.shape)
        return np.clip(sensor, 0, 255).round().astype(np.uint8)

    def _noise(self, shape: Sequence[int], unit: float) -> Noise:
        def noise(height: float, width: float | None = None) -> Array:
            return value_noise(self.rng, shape, (height * unit, (width or height) * unit))

        return noise

    def _lit(self, surface: Surface, unit: float) -> Array:
        """Lambert's law and a highlight; `unit` is the length of 1 in canvas pixels."""
        slope_y, slope_x = np.gradient(np.float32(unit) * surface.height.astype(np.float32))
        steep = 1 / np.sqrt(slope_x**2 + slope_y**2 + 1)

        def facing(direction: Array) -> Array:
            x, y, z = direction.astype(np.float32)
            return np.clip((z - x * slope_x - y * slope_y) * steep, 0, 1)

        diffuse = AMBIENT + (1 - AMBIENT) * facing(self.light) / np.float32(self.light[2])
        color = surface.color * diffuse[..., None]
        if surface.gloss:
            half = self.light + np.array([0, 0, 1])  # between the light and the eye, straight above
            shine = surface.gloss * facing(half / np.linalg.norm(half)) ** 30
            color = color + shine[..., None]
        return color.astype(np.float32)

    def _shade(self, coverage: Image.Image, height: float) -> None:
        """Darken what a thing of some height hides from the light."""
        soft = coverage.filter(ImageFilter.BoxBlur(max(1.0, height)))
        x, y, z = self.light
        hidden = Image.new("L", soft.size)
        hidden.paste(soft, (round(-height * x / z), round(-height * y / z)))
        self.pixels *= 1 - np.float32(self.shadow / 255) * np.asarray(hidden, np.float32)[..., None]


def draw_scene(rng: np.random.Generator, *, size: int, classes: Sequence[int]) -> Scene:
    """Draw one scene with an object of each of the given class indices (1 to 10, repeats allowed).

    Args:
        rng: Where all chance comes from; the same state gives the same scene.
        size: Side of the square photograph in pixels.
        classes: One class index an object.
    """
    canvas = Canvas(size=size, rng=rng)
    for _ in range(rng.integers(0, 8)):
        clutter = leaf(rng) if rng.random() < 0.5 else pebble(rng)
        x, y = rng.uniform(0.05 * size, 0.95 * size, 2).tolist()
        length = max(2, size * rng.uniform(0.02, 0.06))
        canvas.lay(canvas.place(clutter, center=(x, y), length=length))

    taken: list[tuple[float, float, float]] = []
    objects = []
    for index in classes:
        kind = LITTER[index - 1]
        length = size * rng.uniform(*kind.half_length)
        center = _free_place(rng, size, length, taken)
        taken.append((*center, length))
        objects.append((index, canvas.place(kind.draw(rng), center=center, length=length)))

    # labels are painted in the order of falling area: so is the scene, and they agree
    objects.sort(key=lambda item: -item[1].area)
    mask = np.zeros((size, size), np.uint8)
    for index, placed in objects:
        mask[canvas.lay(placed)] = index
    return Scene(canvas.photograph(), mask, [(index, placed.outlines) for index, placed in objects])


def _free_place(
    rng: np.random.Generator, size: int, length: float, taken: Sequence[tuple[float, float, float]]
) -> tuple[float, float]:
    """The first of ten places that leaves the others mostly in sight, or the last one tried."""
    for _ in range(10):
        x, y = rng.uniform(0.06 * size, 0.94 * size, 2).tolist()
        if all(np.hypot(x - u, y - v) > 0.62 * (length + other) for u, v, other in taken):
            break
    return x, y
