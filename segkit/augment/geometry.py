"""Geometric operations: 3×3 matrices, multiplied so that the pixels are resampled once.

Coordinates are continuous: pixel i covers [i, i + 1) and its center is i + 0.5, so that resizing is
a pure scaling and flipping is ``width - x``. A matrix maps a point (x, y, 1) of the output to the
point of the input that is read there.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from segkit.augment.ranges import Angle, PositiveFactor, Range, Sides, between, draw, within
from segkit.core.errors import ConfigError
from segkit.core.labels import IGNORE, Size

IDENTITY = np.eye(3)

_CAP_TRIES = 10
_CAP_GRID, _AIM_GRID = 32, 64


@dataclass(frozen=True)
class Canvas:
    """The geometric operations planned so far; no pixel has been read.

    ``matrix`` (3, 3) maps points of the canvas to points of the last rendered image, and ``before``
    those to points of the source. ``source`` is the mask of the source, for operations that depend
    on the positions of classes.
    """

    size: Size
    matrix: np.ndarray = field(default_factory=lambda: IDENTITY)
    before: np.ndarray = field(default_factory=lambda: IDENTITY)
    source: Tensor | None = None

    def then(self, matrix: np.ndarray, size: Size | None = None) -> "Canvas":
        """Return the canvas after one more operation."""
        return dataclasses.replace(self, size=size or self.size, matrix=self.matrix @ matrix)

    def rendered(self) -> "Canvas":
        """Return the canvas after its pixels have been rendered."""
        return dataclasses.replace(self, matrix=IDENTITY, before=self.before @ self.matrix)

    def largest_class_share(self, top: int, left: int, size: Size) -> float:
        """Return the largest class's share of a crop's labelled pixels, or 1 if there are none.

        Looked up in the source at a coarse grid.
        """
        if self.source is None:
            return 0.0
        labels, _ = self._labels(top, left, size, _CAP_GRID)
        counts = torch.bincount(labels)
        return float(counts.max() / counts.sum()) if len(counts) else 1.0

    def point_of_a_class(self, rng: Generator) -> tuple[int, int] | None:
        """Return row and column of a pixel of a class drawn at random from those in the image.

        Looked up in the source at a grid; ``None`` if it has no labelled pixel.
        """
        if self.source is None:
            return None
        labels, places = self._labels(0, 0, self.size, _AIM_GRID)
        if not len(labels):
            return None
        chosen = rng.choice(labels.unique().numpy())
        x, y = rng.choice(places[:, labels.numpy() == chosen], axis=1)
        return int(y), int(x)

    def _labels(self, top: int, left: int, size: Size, n: int) -> tuple[Tensor, np.ndarray]:
        """Return the labelled classes at n x n points of a part, and the points' x and y."""
        assert self.source is not None
        x = left + (np.arange(n) + 0.5) * (size[1] / n)
        y = top + (np.arange(n) + 0.5) * (size[0] / n)
        points = np.stack([*np.meshgrid(x, y), np.ones((n, n))]).reshape(3, -1)
        px, py, w = self.before @ self.matrix @ points
        px, py = np.floor(px / w).astype(int), np.floor(py / w).astype(int)
        rows, columns = self.source.shape
        inside = (px >= 0) & (px < columns) & (py >= 0) & (py < rows)
        labels = self.source[torch.from_numpy(py[inside]), torch.from_numpy(px[inside])].int()
        known = labels != IGNORE
        return labels[known], points[:2, inside][:, known.numpy()]


def shift_matrix(x: float, y: float) -> np.ndarray:
    """Return the matrix that reads x further right and y further down."""
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def scale_matrix(x: float, y: float) -> np.ndarray:
    """Return the matrix that multiplies coordinates: factors above 1 shrink the content."""
    return np.diag([x, y, 1.0])


def resize_matrix(old: Size, new: Size) -> np.ndarray:
    """Return the matrix that stretches a canvas to another size, edge to edge."""
    return scale_matrix(old[1] / new[1], old[0] / new[0])


def flip_matrix(width: int) -> np.ndarray:
    """Return the matrix of a horizontal flip."""
    return shift_matrix(width, 0) @ scale_matrix(-1, 1)


def _about_center(matrix: np.ndarray, size: Size) -> np.ndarray:
    x, y = size[1] / 2, size[0] / 2
    return shift_matrix(x, y) @ matrix @ shift_matrix(-x, -y)


def resize(canvas: Canvas, rng: Generator, *, size: Sides) -> Canvas:
    """Resize to a fixed size; the aspect ratio is not kept.

    Args:
        size: Height and width.
    """
    return canvas.then(resize_matrix(canvas.size, size), size)


def scale(canvas: Canvas, rng: Generator, *, range: PositiveFactor) -> Canvas:
    """Resize the canvas and its content by a random factor.

    Args:
        range: Range of the factor, drawn uniformly; 2 doubles height and width.
    """
    factor = draw(rng, range)
    height, width = canvas.size
    size = max(1, round(height * factor)), max(1, round(width * factor))
    return canvas.then(resize_matrix(canvas.size, size), size)


def resized_crop(
    canvas: Canvas,
    rng: Generator,
    *,
    size: Sides,
    area: Annotated[Range, between(0, 1, above=True)] = (0.25, 1.0),
    ratio: PositiveFactor = (0.75, 4 / 3),
) -> Canvas:
    """Crop a random part of the canvas, of random area and aspect ratio, and resize it.

    Szegedy et al. 2014, https://arxiv.org/abs/1409.4842

    If the crop has integer coordinates in the image, it is cut out before it is resized, as in
    torchvision: its outermost pixels do not depend on pixels outside it. There, the image is
    shifted inwards relative to the mask: by less than half a pixel of the image when enlarged, by a
    tenth of a pixel of the result when shrunk.

    Args:
        size: Height and width of the result.
        area: Range of the crop's area as a share of the canvas's area.
        ratio: Range of the crop's width / height; the logarithm is drawn uniformly.
    """
    rows, columns = canvas.size
    pixels = rows * columns * draw(rng, area)
    stretch = math.exp(draw(rng, (math.log(ratio[0]), math.log(ratio[1]))) / 2)
    # A crop that does not fit is clipped to the canvas; the paper's code draws again.
    height = min(rows, max(1, round(math.sqrt(pixels) / stretch)))
    width = min(columns, max(1, round(math.sqrt(pixels) * stretch)))
    top = int(rng.integers(rows - height + 1))
    left = int(rng.integers(columns - width + 1))
    return canvas.then(shift_matrix(left, top) @ resize_matrix((height, width), size), size)


def rotate(canvas: Canvas, rng: Generator, *, degrees: Angle) -> Canvas:
    """Rotate about the center by a random angle; the canvas keeps its size.

    Args:
        degrees: Range of the angle, counterclockwise.
    """
    angle = math.radians(draw(rng, degrees))
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    return canvas.then(_about_center(turn, canvas.size))


def _check_turns(turns: tuple[int, ...], path: str) -> None:
    if not turns or not set(turns) <= {0, 1, 2, 3}:
        raise ConfigError(f"{path}: expected some of 0, 1, 2, 3; got {list(turns)}")


def quarter_turn(
    canvas: Canvas, rng: Generator, *, turns: Annotated[tuple[int, ...], _check_turns] = (1, 2, 3)
) -> Canvas:
    """Rotate by 90, 180 or 270 degrees with equal probability; the canvas rotates too.

    Args:
        turns: Numbers of quarter turns to choose from, counterclockwise.
    """
    for _ in range(int(rng.choice(turns))):
        height, width = canvas.size
        turn = np.array([[0.0, -1.0, width], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        canvas = canvas.then(turn, (width, height))
    return canvas


def hflip(canvas: Canvas, rng: Generator) -> Canvas:
    """Flip left and right. ``p`` is 0.5 by default."""
    return canvas.then(flip_matrix(canvas.size[1]))


def vflip(canvas: Canvas, rng: Generator) -> Canvas:
    """Flip top and bottom. ``p`` is 0.5 by default."""
    return canvas.then(shift_matrix(0, canvas.size[0]) @ scale_matrix(1, -1))


def shift(
    canvas: Canvas,
    rng: Generator,
    *,
    x: Annotated[Range, between(-1, 1)] = (-0.1, 0.1),
    y: Annotated[Range, between(-1, 1)] = (-0.1, 0.1),
) -> Canvas:
    """Translate the content; uncovered areas are padding.

    Args:
        x: Range of the shift to the right, as a share of the width.
        y: Range of the shift down, as a share of the height.
    """
    right, down = draw(rng, x) * canvas.size[1], draw(rng, y) * canvas.size[0]
    return canvas.then(shift_matrix(-right, -down))


def shear(
    canvas: Canvas,
    rng: Generator,
    *,
    x: Annotated[Range, between(-60, 60)] = (-10.0, 10.0),
    y: Annotated[Range, between(-60, 60)] = (0.0, 0.0),
) -> Canvas:
    """Shear the content about the center, with the signs of torchvision's ``affine``.

    Args:
        x: Range of the angle in degrees between sheared and vertical lines, tops to the right.
        y: Range of the angle in degrees between sheared and horizontal lines, right ends up.
    """
    right, up = (math.tan(math.radians(draw(rng, degrees))) for degrees in (x, y))
    across = np.array([[1.0, right, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    down = np.array([[1.0, 0.0, 0.0], [up, 1.0, 0.0], [0.0, 0.0, 1.0]])
    return canvas.then(_about_center(across @ down, canvas.size))


def perspective(
    canvas: Canvas, rng: Generator, *, amount: Annotated[Range, between(0, 0.9)] = (0.0, 0.3)
) -> Canvas:
    """Apply a random perspective transform: each corner moves inwards independently.

    Args:
        amount: Range of the largest distance a corner moves, as a share of half a side.
    """
    height, width = canvas.size
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=float)
    inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * [width / 2, height / 2]
    moved = corners + inwards * draw(rng, amount) * rng.random((4, 2))
    return canvas.then(_through_corners(moved, corners))


def _through_corners(output: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Return the matrix that maps four points (4, 2) to four others: eight linear equations."""
    rows, values = [], []
    for (x, y), (u, v) in zip(output, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(values)), 1.0).reshape(3, 3)


def _check_share(share: float, path: str) -> None:
    if not 0 < share <= 1:
        raise ConfigError(f"{path}: expected above 0, to 1; got {share}")


def crop(
    canvas: Canvas,
    rng: Generator,
    *,
    size: Sides,
    max_class_share: Annotated[float, _check_share] = 1.0,
    aim: Annotated[float, within(0, 1)] = 0.0,
) -> Canvas:
    """Crop a random part of fixed size; a smaller canvas is padded, at a random position.

    Args:
        size: Height and width.
        max_class_share: A crop in which one class has a larger share of the labelled pixels is
            rejected, at most 10 crops are drawn, and the last one is kept. Evaluated at a 32×32
            grid of the source.
        aim: Probability of a crop around a pixel of a class drawn at random from those in the
            image, so that rare classes are seen more often.
    """
    tries = 1 if max_class_share == 1 else _CAP_TRIES
    for _ in range(tries):
        top, left = _corner(canvas, rng, size, aim)
        if tries == 1 or canvas.largest_class_share(top, left, size) <= max_class_share:
            break
    return canvas.then(shift_matrix(left, top), size)


def _corner(canvas: Canvas, rng: Generator, size: Size, aim: float) -> list[int]:
    """Draw the first row and column of a crop."""
    spare = [have - want for have, want in zip(canvas.size, size, strict=True)]
    if aim and rng.random() < aim and (point := canvas.point_of_a_class(rng)):
        return [
            min(max(at - int(rng.integers(side)), min(0, s)), max(0, s))
            for at, side, s in zip(point, size, spare, strict=True)
        ]
    return [int(rng.integers(min(0, s), max(0, s) + 1)) for s in spare]


def pad(canvas: Canvas, rng: Generator, *, size: Sides) -> Canvas:
    """Pad to a minimum size, equally on both sides.

    Args:
        size: Minimum height and width.
    """
    height, width = (max(have, want) for have, want in zip(canvas.size, size, strict=True))
    top, left = (height - canvas.size[0]) // 2, (width - canvas.size[1]) // 2
    return canvas.then(shift_matrix(-left, -top), (height, width))


GEOMETRY: dict[str, Callable[..., Canvas]] = {
    operation.__name__: operation
    for operation in (
        resize,
        scale,
        resized_crop,
        rotate,
        quarter_turn,
        hflip,
        vflip,
        shift,
        shear,
        perspective,
        crop,
        pad,
    )
}
