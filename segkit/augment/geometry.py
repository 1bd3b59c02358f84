"""Geometric operations: 3×3 matrices, multiplied so that the pixels are resampled once.

Coordinates are continuous: pixel i covers [i, i + 1) and its center is i + 0.5, so that resizing is
a pure scaling and flipping is ``width - x``. A matrix maps a point (x, y, 1) of the output to the
point of the input that is read there.
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

_EXACT = 1e-9  # tolerance for whole numbers; products of float64 matrices are far more exact
_SOFT_SHRINK = math.sqrt(2)  # up to this factor, bilinear reading skips no pixel that matters
_CAP_TRIES = 10
_CAP_GRID = 32


@dataclass(frozen=True)
class Canvas:
    """The geometric operations planned so far; no pixel has been read.

    Args:
        size: Height and width.
        matrix: (3, 3), maps points of the canvas to points of the last rendered image.
        before: (3, 3), maps points of the last rendered image to points of the source.
        source: Mask of the source, for operations that depend on the positions of classes.
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
    """Return the matrix that reads x further right and y further down."""
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def scaling(x: float, y: float) -> np.ndarray:
    """Return the matrix that multiplies coordinates: factors above 1 shrink the content."""
    return np.diag([x, y, 1.0])


def resizing(old: Size, new: Size) -> np.ndarray:
    """Return the matrix that stretches a canvas to another size, edge to edge."""
    return scaling(old[1] / new[1], old[0] / new[0])


def flipping(width: int) -> np.ndarray:
    """Return the matrix of a horizontal flip."""
    return shifting(width, 0) @ scaling(-1, 1)


def _about_center(matrix: np.ndarray, size: Size) -> np.ndarray:
    x, y = size[1] / 2, size[0] / 2
    return shifting(x, y) @ matrix @ shifting(-x, -y)


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Resize to a fixed size; the aspect ratio is not kept.

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
    """Resize the canvas and its content by a random factor.

    Args:
        range: Range of the factor, drawn uniformly; 2 doubles height and width.
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
        # A crop that does not fit is clipped to the canvas; the paper's code draws again.
        height = min(rows, max(1, round(math.sqrt(area) / stretch)))
        width = min(columns, max(1, round(math.sqrt(area) * stretch)))
        top = int(rng.integers(rows - height + 1))
        left = int(rng.integers(columns - width + 1))
        part = shifting(left, top) @ resizing((height, width), self.size)
        return canvas.then(part, self.size)


@dataclass(frozen=True, kw_only=True)
class Rotate:
    """Rotate about the center by a random angle; the canvas keeps its size.

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
    """Rotate by 90, 180 or 270 degrees with equal probability; the canvas rotates too.

    Args:
        turns: Numbers of quarter turns to choose from, counterclockwise.
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
    """Flip left and right. ``p`` is 0.5 by default."""

    default_p: ClassVar[float] = 0.5

    def __call__(self, canvas: Canvas, rng: np.random.Generator) -> Canvas:
        return canvas.then(flipping(canvas.size[1]))


@dataclass(frozen=True, kw_only=True)
class VerticalFlip:
    """Flip top and bottom. ``p`` is 0.5 by default."""

    default_p: ClassVar[float] = 0.5

    def __call__(self, canvas: Canvas, rng: np.random.Generator) -> Canvas:
        return canvas.then(shifting(0, canvas.size[0]) @ scaling(1, -1))


@dataclass(frozen=True, kw_only=True)
class Shift:
    """Translate the content; uncovered areas are padding.

    Args:
        x: Range of the shift to the right, as a share of the width.
        y: Range of the shift down, as a share of the height.
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
    """Shear the content about the center, with the signs of torchvision's ``affine``.

    Args:
        x: Range of the angle in degrees between sheared and vertical lines, tops to the right.
        y: Range of the angle in degrees between sheared and horizontal lines, right ends up.
    """

    x: tuple[float, float] = (-10.0, 10.0)
    y: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        check("x", self.x, low=-60, high=60)
        check("y", self.y, low=-60, high=60)

    def __call__(self, canvas: Canvas, rng: np.random.Generator) -> Canvas:
        x, y = (math.tan(math.radians(draw(rng, degrees))) for degrees in (self.x, self.y))
        across = np.array([[1.0, x, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        down = np.array([[1.0, 0.0, 0.0], [y, 1.0, 0.0], [0.0, 0.0, 1.0]])
        return canvas.then(_about_center(across @ down, canvas.size))


@dataclass(frozen=True, kw_only=True)
class Perspective:
    """Apply a random perspective transform: each corner moves inwards independently.

    Args:
        amount: Range of the largest distance a corner moves, as a share of half a side.
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
    """Return the matrix that maps four points (4, 2) to four others: eight linear equations."""
    rows, values = [], []
    for (x, y), (u, v) in zip(output, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(values)), 1.0).reshape(3, 3)


@dataclass(frozen=True, kw_only=True)
class Crop:
    """Crop a random part of fixed size; a smaller canvas is padded, at a random position.

    Args:
        size: Height and width.
        max_class_share: A crop in which one class has a larger share of the labelled pixels is
            rejected, at most 10 crops are drawn, and the last one is kept. Evaluated at a 32×32
            grid of the source.
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
    """Pad to a minimum size, equally on both sides.

    Args:
        size: Minimum height and width.
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
    """Resample an image and its mask through one matrix.

    Flips, quarter turns and integer shifts copy pixels. Otherwise, the image is read bilinearly and
    the mask with nearest neighbor. An image that shrinks is first downsampled with anti-aliasing:
    always for matrices along the axes, from a factor of √2 for others. The factor of a perspective
    is measured at the output's center; if the horizon crosses the output, it is at most the one at
    the image's center.

    Args:
        image: Image of any dtype; the result is float unless pixels are copied.
        mask: Mask of the image, or ``None``.
        matrix: (3, 3), maps points of the output to points of the image.
        size: Height and width of the output.

    Shape:
        image: (C, H, W); mask: (H, W)

    Returns:
        The image with its border replicated outwards; the mask with :data:`IGNORE` outside the
        image; and (h, w) with 1 where the output lies inside the image, else 0, or ``None`` if it
        is 1 everywhere. They may share memory with the input.
    """
    matrix = _settled(matrix)
    axes = _axes(matrix)
    if axes is None:
        return _warp_freely(image, mask, matrix, size)
    return _warp_along_axes(image, mask, matrix, axes, size)


def _settled(matrix: np.ndarray) -> np.ndarray:
    """Normalize a matrix, and remove the rounding errors of numbers that should be integers."""
    matrix = matrix / matrix[2, 2]
    nearest = np.rint(matrix)
    return np.where(np.abs(matrix - nearest) < _EXACT, nearest, matrix)


@dataclass(frozen=True)
class _Axes:
    """A matrix that maps rows and columns to rows or columns: the factor and offset of each."""

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
    # Labels are shifted by 1, because grid_sample reads 0 outside the image.
    # The grid is relative to the box, so it applies to the mask's box at full size too.
    labels = image.new_zeros(image.shape[-2:]) if mask is None else mask
    shifted = F.grid_sample(
        labels[box].float().add_(1)[None, None], grid, mode="nearest", align_corners=False
    )[0, 0]
    if mask is not None:
        mask = shifted.short().sub_(1).to(torch.uint8)  # -1 becomes IGNORE
    return sampled, mask, shifted.clamp_(max=1) if leaves else None


def _lines(axes: _Axes, size: Size, image: Tensor) -> tuple[np.ndarray, np.ndarray, Tensor | None]:
    """Return the rows and columns to read from, and 1 where the output lies inside the image."""
    have = image.shape[-2:]
    lines, within = [], []
    for (factor, offset), wanted, available in zip(
        (axes.rows, axes.columns), size, have[::-1] if axes.swap else have, strict=True
    ):
        at = np.floor((np.arange(wanted) + 0.5) * factor + offset + _EXACT).astype(np.int64)
        lines.append(at.clip(0, available - 1))
        within.append((at >= 0) & (at < available))
    if all(valid.all() for valid in within):
        return lines[0], lines[1], None
    inside = torch.from_numpy(within[0][:, None] & within[1]).to(image.device).float()
    return lines[0], lines[1], inside


def _pick(image: Tensor, swap: bool, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """Return rows and columns of an image, transposed first if ``swap``; a view if possible."""
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
        rows = np.arange(len(rows))  # rows are already selected
    at = torch.from_numpy(rows[:, None] * image.shape[-1] + columns).flatten().to(image.device)
    picked = image.flatten(-2).index_select(-1, at)  # faster than along one dimension at a time
    return picked.unflatten(-1, (len(rows), len(columns)))


def _corners(matrix: np.ndarray, size: Size) -> tuple[list[float], list[float]]:
    """Return the x and the y in the image of the output's corners.

    If a perspective's horizon crosses the output, its corners are no bounds: returns ±infinity.
    """
    (a, b, c), (d, e, f), (p, q, r) = matrix.tolist()  # Python floats: faster than arrays of four
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
    """Return whether the output extends outside the image."""
    have = image.shape[:-3:-1]  # x before y, as in points
    corners = _corners(matrix, size)
    return any(min(at) < 0 or max(at) > sides for at, sides in zip(corners, have, strict=True))


def _reduced(
    image: Tensor, matrix: np.ndarray, size: Size, *, along_axes: bool
) -> tuple[Tensor, np.ndarray, tuple[slice, slice]]:
    """Return the part of an image that is read, downsampled where needed, and its matrix.

    If ``along_axes``, a part with integer coordinates is upsampled to the output size too.

    Returns:
        The part, the matrix that reads it, and the part's rows and columns in the image.
    """
    have = image.shape[:-3:-1]  # x before y here, as in points
    corners = _corners(matrix, size)
    steps = _steps(matrix, (size[1] / 2, size[0] / 2))
    if math.isinf(corners[0][0]):  # near the horizon the factor is too large: take the smaller
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
            low, high = 0, available  # only whole images resize to integer coordinates
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
    """Resize bilinearly with anti-aliasing; the result is rounded if the image is uint8."""
    # The uint8 kernel is several times as fast, but only on contiguous memory and on the CPU.
    packed = torch.channels_last if image.stride(0) == 1 else torch.contiguous_format
    batch = image[None].contiguous(memory_format=packed)
    if image.is_floating_point() or image.device.type == "cpu":
        return F.interpolate(batch, size, mode="bilinear", antialias=True)[0]
    return F.interpolate(batch.float(), size, mode="bilinear", antialias=True)[0].round_()


def _steps(matrix: np.ndarray, at: tuple[float, float]) -> tuple[float, float]:
    """Return the distance in x and in y between neighboring samples, at a point of the output."""
    (a, b, c), (d, e, f), (p, q, r) = matrix.tolist()
    x, y = at
    w = p * x + q * y + r
    u, v = (a * x + b * y + c) / w, (d * x + e * y + f) / w
    return math.hypot(a - u * p, b - u * q) / abs(w), math.hypot(d - v * p, e - v * q) / abs(w)


def _grid(matrix: np.ndarray, size: Size, image: Tensor) -> Tensor:
    """Return the grid for ``grid_sample``, whose coordinates are -1 to 1 from edge to edge."""
    height, width = image.shape[-2:]
    matrix = shifting(-1, -1) @ scaling(2 / width, 2 / height) @ matrix
    x = torch.arange(size[1], device=image.device) + 0.5
    y = torch.arange(size[0], device=image.device)[:, None] + 0.5
    (a, b, c), (d, e, f), (p, q, r) = matrix.tolist()
    planes = torch.empty(
        (1, 2, *size), device=image.device
    )  # separate planes for x and y are faster
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
