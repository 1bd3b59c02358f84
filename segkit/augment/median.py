"""Median filter computed with elementwise minima and maxima of shifted images.

Faster on uint8 than sorting each window: neighboring windows share columns, so each column is
sorted once for all of them, then the rows of equal rank are sorted. In the resulting square, sorted
along both rows and columns, few values can be the median.

The sorting network of each size is built once and pruned to the steps that the median depends on
(116 steps for 5 × 5). Sharing columns: Adams 2021, https://doi.org/10.1145/3450626.3459773
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Plane(NamedTuple):
    """An image with an offset to read it at.

    Args:
        number: 0 is the input image, n > 0 the result of step n.
        down: Offset in rows.
        right: Offset in columns.
    """

    number: int
    down: int
    right: int


class Step(NamedTuple):
    """A minimum or maximum of two planes.

    Args:
        number: Number of the result.
        function: ``minimum`` or ``maximum``, a function of both NumPy and PyTorch.
        first: First operand.
        second: Second operand.
        done: Numbers of planes that no later step reads.
    """

    number: int
    function: str
    first: Plane
    second: Plane
    done: frozenset[int]


def median(image: Tensor, size: int) -> Tensor:
    """Return the median of each square of ``size`` × ``size`` pixels of an image.

    Shape:
        image: (C, H + size - 1, W + size - 1), of any dtype -> (C, H, W)
    """
    _, height, width = image.shape
    # By channel, whose planes fit in the cache; NumPy has less overhead per call than PyTorch.
    library, channels = (np, image.numpy()) if image.device.type == "cpu" else (torch, image)
    flat = [
        torch.as_tensor(_run(library, channel.reshape(-1), size, width)) for channel in channels
    ]
    shape = height - size + 1, width - size + 1
    return torch.stack([plane.as_strided(shape, (width, 1)) for plane in flat])


def _run(library: Any, plane: Any, size: int, width: int) -> Any:
    """Return the median of the square that begins at each pixel of a flattened image.

    Shifting a plane is an offset into the flattened image. Squares that cross the right edge give
    meaningless values, which the caller drops; those that cross the end are left out.
    """
    planes = {0: plane}
    for number, function, first, second, done in network(size):
        a = planes[first.number][first.down * width + first.right :]
        b = planes[second.number][second.down * width + second.right :]
        length = min(len(a), len(b))
        planes[number] = getattr(library, function)(a[:length], b[:length])
        for unneeded in done:
            del planes[unneeded]
    (result,) = planes.values()
    return result


@functools.cache
def network(size: int) -> tuple[Step, ...]:
    """Return the steps that compute the median of squares of an odd size."""
    draft = _Draft()
    columns = draft.sort([Plane(0, down, 0) for down in range(size)])
    square = [
        draft.sort([Plane(rank.number, rank.down, right) for right in range(size)])
        for rank in columns
    ]
    return draft.needed(draft.middle(_candidates(square)))


class _Ranked(NamedTuple):
    """A plane, and a bit set that encodes its known order: see :func:`_candidates`."""

    plane: Plane
    known: int


class _Draft:
    """Builder of a network; equal steps are stored once."""

    def __init__(self) -> None:
        self._steps: dict[tuple[str, Plane, Plane], int] = {}

    def pair(self, first: Plane, second: Plane) -> tuple[Plane, Plane]:
        """Return the minimum and the maximum of two planes."""
        return self._step("minimum", first, second), self._step("maximum", first, second)

    def _step(self, function: str, first: Plane, second: Plane) -> Plane:
        first, second = sorted((first, second))
        down, right = min(first.down, second.down), min(first.right, second.right)
        first, second = (
            Plane(plane.number, plane.down - down, plane.right - right) for plane in (first, second)
        )
        number = self._steps.setdefault((function, first, second), len(self._steps) + 1)
        return Plane(number, down, right)

    def sort(self, planes: list[Plane]) -> list[Plane]:
        """Sort planes in ascending order, pixel by pixel."""
        for low, high in _exchanges(len(planes)):
            planes[low], planes[high] = self.pair(planes[low], planes[high])
        return planes

    def ranked_pair(self, first: _Ranked, second: _Ranked) -> tuple[_Ranked, _Ranked]:
        """Return the minimum and the maximum; adds no step where their order is known."""
        both, either = first.known & second.known, first.known | second.known
        if both == first.known:
            return first, second
        if both == second.known:
            return second, first
        minimum, maximum = self.pair(first.plane, second.plane)
        return _Ranked(minimum, both), _Ranked(maximum, either)

    def middle(self, values: list[_Ranked]) -> Plane:
        """Return the median of an odd number of planes, pixel by pixel.

        Among just over half of the values, neither the minimum nor the maximum can be the median:
        drop both, add the next value, and repeat until one is left.
        """
        start = len(values) // 2 + 2
        held, waiting = values[:start], values[start:]
        while len(held) > 1:
            last = len(held) - 1
            pairs = [(place, last - place) for place in range(len(held) // 2)]
            pairs += [(0, place) for place in range(1, (last + 2) // 2)]
            pairs += [(place, last) for place in range(len(held) // 2, last)]
            for low, high in pairs:
                held[low], held[high] = self.ranked_pair(held[low], held[high])
            held = held[1:-1] + waiting[:1]
            waiting = waiting[1:]
        return held[0].plane

    def needed(self, result: Plane) -> tuple[Step, ...]:
        """Return the steps that a plane depends on."""
        needed, alive = [], {result.number}
        for (function, first, second), number in reversed(self._steps.items()):
            if number in alive:
                done = frozenset({first.number, second.number} - alive)
                needed.append(Step(number, function, first, second, done))
                alive |= done
        return tuple(reversed(needed))


def _exchanges(count: int) -> Iterator[tuple[int, int]]:
    """Yield the index pairs to compare and exchange, in order, to sort: Batcher's merge exchange.

    Knuth, The Art of Computer Programming 3, algorithm 5.2.2M.
    """
    block = 1
    while block < count:
        distance = block
        while distance:
            for start in range(distance % block, count - distance, 2 * distance):
                for low in range(start, min(start + distance, count - distance)):
                    if low // (2 * block) == (low + distance) // (2 * block):
                        yield low, low + distance
            distance //= 2
        block *= 2


def _candidates(square: list[list[Plane]]) -> list[_Ranked]:
    """Return the planes that can be the median of a square sorted along rows and columns.

    A value that is <= or >= more than half of the square cannot be the median; equally many are
    left out on both sides. ``known`` of a remaining plane has one bit for each sorted 0/1 square:
    the plane's value in it. A plane is never greater than another if its bits are a subset of the
    other's (zero-one principle, Knuth 5.3.4). Rows and columns are in descending order: of the
    orders tried, this needs the fewest steps.
    """
    size = len(square)
    ones = np.array(list(itertools.combinations_with_replacement(range(size + 1), size)))
    half = size * size // 2 + 1
    candidates = []
    for row, column in itertools.product(reversed(range(size)), repeat=2):
        if (row + 1) * (column + 1) <= half and (size - row) * (size - column) <= half:
            bits = np.packbits(ones[:, row] >= size - column).tobytes()
            candidates.append(_Ranked(square[row][column], int.from_bytes(bits, "big")))
    return candidates
