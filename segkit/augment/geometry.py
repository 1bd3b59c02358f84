"""Geometry: every operation is a 3×3 matrix, and the pixels are read once, through their product.

Points, not pixels: pixel i covers [i, i + 1) and its center is i + 0.5, so that resizing is a pure
scaling and flipping is ``width - x``. A matrix takes a point (x, y, 1) of the output to the point
of the input it is read from.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segkit.augment.ranges import check, check_size, draw
from segkit.core.errors import ConfigError
from segkit.core.labels import IGNORE

Size = tuple[int, int]

IDENTITY = np.eye(3)

_EXACT = 1e-9  # what products of float64 matrices miss whole numbers by is far less
_SOFT_SHRINK = math.sqrt(2)  # up to here bilinear reads every pixel that matters
_CAP_TRIES = 10
_CAP_GRID = 32


@dataclass(frozen=True)
class Canvas:
    """What geometry has come to so far, without a pixel touched.

    Args:
        size: Height and width.
        matrix: (3, 3), takes its points to points of the last pixels there are.
        before: (3, 3), takes those to points of the source.
        source: The source's mask, read by operations that look where classes are.
    """

    size: Size
    matrix: np.ndarray = field(default_factory=lambda: IDENTITY)
    before: np.ndarray = field(default_factory=lambda: IDENTITY)
    source: Tensor | None = None

    def then(self, matrix: np.ndarray, size: Size | None = None) -> "Canvas":
        """The canvas after one more operation."""
        return dataclasses.replace(self, size=size or self.size, matrix=self.matrix @ matrix)

    def rendered(self) -> "Canvas":
        """The canvas once its pixels are there."""
        return dataclasses.replace(self, matrix=IDENTITY, before=self.before @ self.matrix)

    def largest_class_share(self, top: int, left: int, size: Size) -> float:
        """Of a crop, looked up in the source at a coarse grid; 1 where it holds no label."""
        if self.source is None:
            return 0.0
        (height, width), n = size, _CAP_GRID
        x = left + (np.arange(n) + 0.5) * (width / n)
        y = top + (np.arange(n) + 0.5) * (height / n)
        points = np.stack([*np.meshgrid(x, y), np.ones((n, n))]).reshape(3, -1)
        px, py, w = self.before @ self.matrix @ points
        px, py = np.floor(px / w).astype(int), np.floor(py / w).astype(int)
        rows, columns = self.source.shape
        inside = (px >= 0) & (px < columns) & (py >= 0) & (py < rows)
        labels = self.source[torch.from_numpy(py[inside]), torch.from_numpy(px[inside])]
        counts = torch.bincount(labels[labels != IGNORE].int())
        return float(counts.max() / counts.sum()) if len(counts) else 1.0


def shifting(x: float, y: float) -> np.ndarray:
    """Reads from (x, y) further right and down."""
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def scaling(x: float, y: float) -> np.ndarray:
    """Reads at x and y times the coordinates: above one, the content shrinks."""
    return np.diag([x, y, 1.0])


def resizing(old: Size, new: Size) -> np.ndarray:
    """Stretches a canvas to another size, exactly edge to edge."""
    return scaling(old[1] / new[1], old[0] / new[0])


def flipping(width: int) -> np.ndarray:
    """Left and right change places."""
    return shifting(width, 0) @ scaling(-1, 1)


def _about_center(matrix: np.ndarray, size: Size) -> np.ndarray:
    x, y = size[1] / 2, size[0] / 2
    return shifting(x, y) @ matrix @ shifting(-x, -y)


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Stretch to a size, without regard for the proportions.

    Args:
        size: Height and width.
    """

    size: tuple[int, int]

    def __post_init__(self) -> None:
        check_size("size", self.size)

    def __call__(self, canvas: Canvas, rng: np.random.Generator) -> Canvas:
        return canvas.then(resizing(canvas.size, self.size), self.size)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Resize by a random factor, the canvas with its content.

    Args:
        range: Of the factor, drawn uniformly; 2 doubles height and width.
    """

    range: tuple[float, float]

    def __post_init__(self) -> None:
        check("range", self.range, low=0, above=True)

    def __call__(self, canvas: Canvas, rng: np.random.Generator) -> Canvas:
        factor = draw(rng, self.range)
        height, width = canvas.size
        size = max(1, round(height * factor)), max(1, round(width * factor))
        return canvas.then(resizing(canvas.size, size), size)


@dataclass(frozen=True, kw_only=True)
class ResizedCrop:
    """A random part of the canvas, of random area and proportions, stretched to a size.

    Szegedy et al. 2014, https://arxiv.org/abs/1409.4842

    Where its pixels are whole pixels of the image, the part is cut out before it is resized, as
    torchvision does: its outermost pixels see nothing beyond it. Their content lies inwards of
    where their labels are read: when enlarged, by less than half a pixel of the image; when
    shrunk, by a tenth of a pixel of the result.

    Args:
        size: Height and width of the result.
        area: Range of the part's share of the canvas's area.
        ratio: Range of the part's width over its height, drawn uniformly in its logarithm.
    """

    size: tuple[int, int]
    area: tuple[float, float] = (0.25, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)

    def __post_init__(self) -> None:
        check_size("size", self.size)
        check("area", self.area, low=0, high=1, above=True)
        check("ratio", self.ratio, low=0, above=True)

    def __call__(self, canvas: Canvas, rng: np.random.Generator) -> Canvas:
        rows, columns = canvas.size
        area = rows * columns * draw(rng, self.area)
        stretch = math.exp(draw(rng, (math.log(self.ratio[0]), math.log(self.ratio[1]))) / 2)
        # What does not fit is cut to the canvas, in place of trying again as the paper's code does.
        height = min(rows, max(1, round(math.sqrt(area) / stretch)))
        width = min(columns, max(1, round(math.sqrt(area) * stretch)))
        top = int(rng.integers(rows - height + 1))
        left = int(rng.integers(columns - width + 1))
        part = shifting(left, top) @ resizing((height, width), self.size)
        return canvas.then(part, self.size)


@dataclass(frozen=True, kw_only=True)
class Rotate:
    """Rotate about the center by any angle; the canvas keeps its size.

    Args:
        degrees: Range of the angle, counterclockwise.
    """

    degrees: tuple[float, float]

    def __post_init__(self) -> None:
        check("degrees", self.degrees)

    def __call__(self, canvas: Canvas, rng: np.random.Generator) -> Canvas:
        angle = math.radians(draw(rng, self.degrees))
        cos, sin = math.cos(angle), math.sin(angle)
        turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
        return canvas.then(_about_center(turn, canvas.size))


@dataclass(frozen=True, kw_only=True)
class QuarterTurn:
    """Rotate by 90, 180 or 270 degrees, each as likely; height and width change places with it.

    Args:
        turns: Quarter turns to choose from, counterclockwise.
    """

    turns: tuple[int, ...] = (1, 2, 3)

    def __post_init__(self) -> None:
        if not self.turns or not set(self.turns) <= {0, 1, 2, 3}:
            raise ConfigError(f"turns: expected some of 0, 1, 2, 3; got {list(self.turns)}")

    def __call__(self, canvas: Canvas, rng: np.random.Generator) -> Canvas:
        for _ in range(int(rng.choice(self.turns))):
            height, width = canvas.size
            turn = np.array([[0.0, -1.0, width], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
            canvas = canvas.then(turn, (width, height))
        return canvas


@dataclass(frozen=True, kw_only=True)
class HorizontalFlip:
    """Left and right change places. Half of the time unless ``p`` says otherwise."""

    default_p: ClassVar[float] = 0.5

    def __call__(self, canvas: Canvas, rng: np.random.Generator) -> Canvas:
        return canvas.then(flipping(canvas.size[1]))


@dataclass(frozen=True, kw_only=True)
class VerticalFlip:
    """Top and bottom change places. Half of the time unless ``p`` says otherwise."""

    default_p: ClassVar[float] = 0.5

    def __call__(self, canvas: Canvas, rng: np.random.Generator) -> Canvas:
        return canvas.then(shifting(0, canvas.size[0]) @ scaling(1, -1))


@dataclass(frozen=True, kw_only=True)
class Shift:
    """Move the content; what comes in is padding.

    Args:
        x: Range of the way to the right, as a share of the width.
        y: Range of the way down, as a share of the height.
    """

    x: tuple[float, float] = (-0.1, 0.1)
    y: tuple[float, float] = (-0.1, 0.1)

    def __post_init__(self) -> None:
        check("x", self.x, low=-1, high=1)
        check("y", self.y, low=-1, high=1)

    def __call__(self, canvas: Canvas, rng: np.random.Generator) -> Canvas:
        x, y = draw(rng, self.x) * canvas.size[1], draw(rng, self.y) * canvas.size[0]
        return canvas.then(shifting(-x, -y))


@dataclass(frozen=True, kw_only=True)
class Shear:
    """Lean the content about the center, as torchvision's ``affine`` does, signs included.

    Args:
        x: Range in degrees by which vertical lines lean, their top to the right.
        y: Range in degrees by which horizontal lines lean, their right end up.
    """

    x: tuple[float, float] = (-10.0, 10.0)
    y: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        check("x", self.x, low=-60, high=60)
        check("y", self.y, low=-60, high=60)

    def __call__(self, canvas: Canvas, rng: np.random.Generator) -> Canvas:
        x, y = (math.tan(math.radians(draw(rng, lean))) for lean in (self.x, self.y))
        across = np.array([[1.0, x, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        down = np.array([[1.0, 0.0, 0.0], [y, 1.0, 0.0], [0.0, 0.0, 1.0]])
        return canvas.then(_about_center(across @ down, canvas.size))


@dataclass(frozen=True, kw_only=True)
class Perspective:
    """See the image as a plane from a little aside: each corner moves inwards on its own.

    Args:
        amount: Range of the furthest a corner moves, as a share of half a side.
    """

    amount: tuple[float, float] = (0.0, 0.3)

    def __post_init__(self) -> None:
        check("amount", self.amount, low=0, high=0.9)

    def __call__(self, canvas: Canvas, rng: np.random.Generator) -> Canvas:
        height, width = canvas.size
        corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=float)
        inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * [width / 2, height / 2]
        moved = corners + inwards * draw(rng, self.amount) * rng.random((4, 2))
        return canvas.then(_through_corners(moved, corners))


def _through_corners(output: np.ndarray, source: np.ndarray) -> np.ndarray:
    """The matrix that takes four points (4, 2) to four others, by its eight linear equations."""
    rows, values = [], []
    for (x, y), (u, v) in zip(output, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(values)), 1.0).reshape(3, 3)


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A random part of one size; a canvas that is smaller lies somewhere in it, padded.

    Args:
        size: Height and width.
        max_class_share: A part in which one class has more of the labelled pixels is given up for
            another, up to 10 times; the last one stays. Looked up at a 32×32 grid of the source.
    """

    size: tuple[int, int]
    max_class_share: float = 1.0

    def __post_init__(self) -> None:
        check_size("size", self.size)
        if not 0 < self.max_class_share <= 1:
            raise ConfigError(
                f"max_class_share: expected above 0, to 1; got {self.max_class_share}"
            )

    def __call__(self, canvas: Canvas, rng: np.random.Generator) -> Canvas:
        spare = [have - want for have, want in zip(canvas.size, self.size, strict=True)]
        tries = 1 if self.max_class_share == 1 else _CAP_TRIES
        for _ in range(tries):
            top, left = (int(rng.integers(min(0, s), max(0, s) + 1)) for s in spare)
            if tries == 1:
                break
            if canvas.largest_class_share(top, left, self.size) <= self.max_class_share:
                break
        return canvas.then(shifting(left, top), self.size)


@dataclass(frozen=True, kw_only=True)
class Pad:
    """Pad to at least a size, the same on both sides.

    Args:
        size: Least height and width.
    """

    size: tuple[int, int]

    def __post_init__(self) -> None:
        check_size("size", self.size)

    def __call__(self, canvas: Canvas, rng: np.random.Generator) -> Canvas:
        height, width = (max(have, want) for have, want in zip(canvas.size, self.size, strict=True))
        top, left = (height - canvas.size[0]) // 2, (width - canvas.size[1]) // 2
        return canvas.then(shifting(-left, -top), (height, width))


def warp(
    image: Tensor, mask: Tensor | None, matrix: np.ndarray, size: Size
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Read an image and its mask through one matrix.

    Flips, quarter turns and whole-pixel moves copy. Anything else is bilinear for the image and
    nearest for the mask. What shrinks is averaged down to the right number of pixels first: always
    along the axes; when turned, from a factor of √2 (in perspective, that of the output's center;
    where the horizon crosses the output, no more than that of the image's center).

    Args:
        image: Of any number type; floats come out where it is not copied.
        mask: Of the image, or ``None``.
        matrix: (3, 3), takes points of the output to points of the image.
        size: Height and width of the output.

    Shape:
        image: (C, H, W); mask: (H, W)

    Returns:
        The image, its border continued outwards; the mask, :data:`IGNORE` outside the image; and 1
        where the output lies inside the image, else 0 (h, w), ``None`` for 1 everywhere. They may
        share memory with the input.
    """
    matrix = _settled(matrix)
    axes = _axes(matrix)
    if axes is None:
        return _warp_freely(image, mask, matrix, size)
    return _warp_along_axes(image, mask, matrix, axes, size)


def _settled(matrix: np.ndarray) -> np.ndarray:
    """Whole numbers are whole again after a product of matrices."""
    matrix = matrix / matrix[2, 2]
    nearest = np.rint(matrix)
    return np.where(np.abs(matrix - nearest) < _EXACT, nearest, matrix)


@dataclass(frozen=True)
class _Axes:
    """A matrix that keeps rows and columns straight: for each, the factor and offset to read at."""

    swap: bool
    rows: tuple[float, float]
    columns: tuple[float, float]

    @property
    def copies(self) -> bool:
        return all(
            abs(f) == 1 and offset == round(offset) for f, offset in (self.rows, self.columns)
        )


def _axes(matrix: np.ndarray) -> _Axes | None:
    (a, b, x), (c, d, y), (p, q, _) = matrix.tolist()
    if p or q:
        return None
    if not b and not c:
        return _Axes(False, (d, y), (a, x))
    return _Axes(True, (b, x), (c, y)) if not a and not d else None


def _warp_along_axes(
    image: Tensor, mask: Tensor | None, matrix: np.ndarray, axes: _Axes, size: Size
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rows, columns, inside = _lines(axes, size, image)
    if mask is not None:
        mask = _pick(mask, axes.swap, rows, columns)
        if inside is not None:
            mask = torch.where(inside > 0, mask, IGNORE)
    if not axes.copies:
        image, matrix, _ = _reduced(image, matrix, size, along_axes=True)
        rest = _axes(matrix)
        if rest is None or not rest.copies:
            return _sampled(image, _grid(matrix, size, image)), mask, inside
        rows, columns, _ = _lines(rest, size, image)
    return _pick(image, axes.swap, rows, columns), mask, inside


def _warp_freely(
    image: Tensor, mask: Tensor | None, matrix: np.ndarray, size: Size
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    part, rest, box = _reduced(image, matrix, size, along_axes=False)
    grid = _grid(rest, size, part)
    sampled = _sampled(part, grid)
    leaves = _leaves(matrix, size, image)
    if mask is None and not leaves:
        return sampled, None, None
    # Labels are counted from 1, for 0 is what is read outside the image.
    # The grid is relative to the box, so it fits the mask's box at full size too.
    labels = image.new_zeros(image.shape[-2:]) if mask is None else mask
    found = F.grid_sample(
        labels[box].float().add_(1)[None, None], grid, mode="nearest", align_corners=False
    )[0, 0]
    if mask is not None:
        mask = found.short().sub_(1).to(torch.uint8)  # -1 becomes IGNORE
    return sampled, mask, found.clamp_(max=1) if leaves else None


def _lines(axes: _Axes, size: Size, image: Tensor) -> tuple[np.ndarray, np.ndarray, Tensor | None]:
    """Which row and column each row and column is read from, and what lies inside the image."""
    have = image.shape[-2:]
    found, within = [], []
    for (factor, offset), wanted, available in zip(
        (axes.rows, axes.columns), size, have[::-1] if axes.swap else have, strict=True
    ):
        at = np.floor((np.arange(wanted) + 0.5) * factor + offset + _EXACT).astype(np.int64)
        found.append(at.clip(0, available - 1))
        within.append((at >= 0) & (at < available))
    if all(line.all() for line in within):
        return found[0], found[1], None
    inside = torch.from_numpy(within[0][:, None] & within[1]).to(image.device).float()
    return found[0], found[1], inside


def _pick(image: Tensor, swap: bool, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """Rows and columns of an image, after they changed places with ``swap``: a view if possible."""
    if swap:
        image = image.transpose(-1, -2)
    for dim, lines in ((-2, rows), (-1, columns)):
        steps = np.diff(lines)
        if (steps == 1).all():
            image = image.narrow(dim, int(lines[0]), len(lines))
        elif (steps == -1).all():
            image = image.narrow(dim, int(lines[-1]), len(lines)).flip(dim)
        else:
            break
    else:
        return image
    if dim == -1:
        rows = np.arange(len(rows))  # they are in place
    at = torch.from_numpy(rows[:, None] * image.shape[-1] + columns).flatten().to(image.device)
    picked = image.flatten(-2).index_select(-1, at)  # faster than along one dimension at a time
    return picked.unflatten(-1, (len(rows), len(columns)))


def _corners(matrix: np.ndarray, size: Size) -> tuple[list[float], list[float]]:
    """The x and the y of the image at which the output's corners are read.

    Where a perspective's horizon crosses the output, its corners bound nothing: then, all numbers.
    """
    (a, b, c), (d, e, f), (p, q, r) = matrix.tolist()  # numbers: arrays of four are slower
    height, width = size
    xs, ys = [], []
    for x, y in ((0, 0), (width, 0), (width, height), (0, height)):
        w = p * x + q * y + r
        if w * r <= 0:
            return [-math.inf, math.inf], [-math.inf, math.inf]
        xs.append((a * x + b * y + c) / w)
        ys.append((d * x + e * y + f) / w)
    return xs, ys


def _leaves(matrix: np.ndarray, size: Size, image: Tensor) -> bool:
    have = image.shape[:-3:-1]  # x before y, as in points
    corners = _corners(matrix, size)
    return any(min(at) < 0 or max(at) > sides for at, sides in zip(corners, have, strict=True))


def _reduced(
    image: Tensor, matrix: np.ndarray, size: Size, *, along_axes: bool
) -> tuple[Tensor, np.ndarray, tuple[slice, slice]]:
    """The part of an image that is read, averaged down if need be; the matrix to read that part.

    Along the axes, a part that is whole pixels is enlarged too.

    Returns:
        The part, the matrix, and the part's rows and columns in the image.
    """
    have = image.shape[:-3:-1]  # x before y here, as in points
    corners = _corners(matrix, size)
    steps = _steps(matrix, (size[1] / 2, size[0] / 2))
    if math.isinf(corners[0][0]):  # a center near the horizon tells too much: take the less of two
        x, y, w = np.linalg.inv(matrix) @ [have[0] / 2, have[1] / 2, 1]
        other = _steps(matrix, (x / w, y / w))
        steps = min(steps[0], other[0]), min(steps[1], other[1])
    whole = along_axes and all(abs(x - round(x)) < _EXACT for at in corners for x in at)
    fits = whole and not _leaves(matrix, size, image)
    shrinks = [step > (1 if along_axes else _SOFT_SHRINK) for step in steps]
    boxes, lengths = [], []
    for at, available, step, shrink in zip(corners, have, steps, shrinks, strict=True):
        factor = step if shrink or fits else 1.0
        low, high = min(at), max(at)
        if along_axes and not whole and any(shrinks):
            low, high = 0, available  # whole images resize to whole pixels, their parts do not
        elif not whole:
            low, high = low - 2 * factor, high + 2 * factor
        first = min(math.floor(max(low + _EXACT, 0)), available - 1)
        last = max(math.ceil(min(high - _EXACT, available)), first + 1)
        boxes.append(slice(first, last))
        lengths.append(max(1, round((last - first) / factor)))
    columns, rows = boxes
    part = image[..., rows, columns]
    matrix = shifting(-columns.start, -rows.start) @ matrix
    old, new = (part.shape[-2], part.shape[-1]), (lengths[1], lengths[0])
    if new != old:
        part = _resized(part, new)
        matrix = resizing(new, old) @ matrix
    return part, _settled(matrix), (rows, columns)


def _resized(image: Tensor, size: Size) -> Tensor:
    """Bilinear, anti-aliased, and rounded where levels come as bytes."""
    # The kernel for bytes is several times faster, but only on packed memory, and on the CPU.
    packed = torch.channels_last if image.stride(0) == 1 else torch.contiguous_format
    batch = image[None].contiguous(memory_format=packed)
    if image.is_floating_point() or image.device.type == "cpu":
        return F.interpolate(batch, size, mode="bilinear", antialias=True)[0]
    return F.interpolate(batch.float(), size, mode="bilinear", antialias=True)[0].round_()


def _steps(matrix: np.ndarray, at: tuple[float, float]) -> tuple[float, float]:
    """How far apart in the image's x and y the output's pixels are read, at one of its points."""
    (a, b, c), (d, e, f), (p, q, r) = matrix.tolist()
    x, y = at
    w = p * x + q * y + r
    u, v = (a * x + b * y + c) / w, (d * x + e * y + f) / w
    return math.hypot(a - u * p, b - u * q) / abs(w), math.hypot(d - v * p, e - v * q) / abs(w)


def _grid(matrix: np.ndarray, size: Size, image: Tensor) -> Tensor:
    """Where to read each pixel, in the units of ``grid_sample``: -1 to 1 from edge to edge."""
    height, width = image.shape[-2:]
    matrix = shifting(-1, -1) @ scaling(2 / width, 2 / height) @ matrix
    x = torch.arange(size[1], device=image.device) + 0.5
    y = torch.arange(size[0], device=image.device)[:, None] + 0.5
    (a, b, c), (d, e, f), (p, q, r) = matrix.tolist()
    planes = torch.empty((1, 2, *size), device=image.device)  # x apart from y: faster to read too
    torch.add(x * a, y * b + c, out=planes[0, 0])
    torch.add(x * d, y * e + f, out=planes[0, 1])
    if p or q:
        planes /= x * p + (y * q + r)
    return planes.permute(0, 2, 3, 1)


def _sampled(image: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(image.float()[None], grid, padding_mode="border", align_corners=False)[0]


GEOMETRY: dict[str, Callable[..., Callable[[Canvas, np.random.Generator], Canvas]]] = {
    "resize": Resize,
    "scale": Scale,
    "resized_crop": ResizedCrop,
    "rotate": Rotate,
    "quarter_turn": QuarterTurn,
    "hflip": HorizontalFlip,
    "vflip": VerticalFlip,
    "shift": Shift,
    "shear": Shear,
    "perspective": Perspective,
    "crop": Crop,
    "pad": Pad,
}
