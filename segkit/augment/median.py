"""The median of a square around each pixel, from minima and maxima of whole images.

Fast on bytes, where a sort of each window is not: windows share their columns, so the values of
each column are sorted first, as images, and then the rows of each rank. That leaves a square whose
rows and columns are both sorted, around whose median few values can lie.

A network of such steps is found once for each size, and freed of all that the median does not need.
That of 5 × 5 has 116. Sharing columns: Adams 2021, https://doi.org/10.1145/3450626.3459773
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Plane(NamedTuple):
    """An image, read from some rows further down and columns further right.

    Args:
        number: 0 is the image itself, above it the result of that step.
        down: Rows.
        right: Columns.
    """

    number: int
    down: int
    right: int


class Step(NamedTuple):
    """A minimum or maximum of two planes.

    Args:
        number: Of the result.
        function: ``minimum`` or ``maximum``, in NumPy as in PyTorch.
        one: An operand.
        other: An operand.
        done: Numbers of planes that no later step needs.
    """

    number: int
    function: str
    one: Plane
    other: Plane
    done: frozenset[int]


def median(image: Tensor, size: int) -> Tensor:
    """The median of each square of ``size`` × ``size`` pixels within an image.

    Shape:
        image: (C, H + size - 1, W + size - 1), of any number type -> (C, H, W)
    """
    _, height, width = image.shape
    # The planes of a channel fit the cache, and a call of NumPy costs a fraction of PyTorch's.
    library, channels = (np, image.numpy()) if image.device.type == "cpu" else (torch, image)
    flat = [torch.as_tensor(_run(library, one.reshape(-1), size, width)) for one in channels]
    shape = height - size + 1, width - size + 1
    return torch.stack([plane.as_strided(shape, (width, 1)) for plane in flat])


def _run(library: Any, plane: Any, size: int, width: int) -> Any:
    """The medians of the squares that begin at each pixel of a flat image, those at its end aside.

    A square's first pixel is moved by adding to its place. What is read across an edge belongs to
    squares that are not within the image.
    """
    planes = {0: plane}
    for number, function, one, other, done in network(size):
        first, second = planes[one.number], planes[other.number]
        start, begin = one.down * width + one.right, other.down * width + other.right
        length = min(len(first) - start, len(second) - begin)
        planes[number] = getattr(library, function)(
            first[start : start + length], second[begin : begin + length]
        )
        for unneeded in done:
            del planes[unneeded]
    (result,) = planes.values()
    return result


@functools.cache
def network(size: int) -> tuple[Step, ...]:
    """The steps that lead from an image to the medians of its squares of an odd size."""
    draft = _Draft()
    columns = draft.sort([Plane(0, down, 0) for down in range(size)])
    square = [
        draft.sort([Plane(rank.number, rank.down, right) for right in range(size)])
        for rank in columns
    ]
    return draft.needed(draft.middle(_candidates(square)))


class _Ranked(NamedTuple):
    """A plane, and what is known of its order among others: see :func:`_candidates`."""

    plane: Plane
    known: int


class _Draft:
    """A network in the making, each of its steps once."""

    def __init__(self) -> None:
        self._steps: dict[tuple[str, Plane, Plane], int] = {}

    def pair(self, one: Plane, other: Plane) -> tuple[Plane, Plane]:
        """The least and the most of two planes."""
        return self._step("minimum", one, other), self._step("maximum", one, other)

    def _step(self, function: str, one: Plane, other: Plane) -> Plane:
        one, other = sorted((one, other))
        down, right = min(one.down, other.down), min(one.right, other.right)
        one, other = (Plane(at.number, at.down - down, at.right - right) for at in (one, other))
        number = self._steps.setdefault((function, one, other), len(self._steps) + 1)
        return Plane(number, down, right)

    def sort(self, planes: list[Plane]) -> list[Plane]:
        """Planes from least to most, pixel by pixel."""
        for low, high in _exchanges(len(planes)):
            planes[low], planes[high] = self.pair(planes[low], planes[high])
        return planes

    def ranked_pair(self, one: _Ranked, other: _Ranked) -> tuple[_Ranked, _Ranked]:
        """The least and the most; no step where it is known which is which."""
        both, either = one.known & other.known, one.known | other.known
        if both == one.known:
            return one, other
        if both == other.known:
            return other, one
        least, most = self.pair(one.plane, other.plane)
        return _Ranked(least, both), _Ranked(most, either)

    def middle(self, values: list[_Ranked]) -> Plane:
        """The median of an odd number of planes, pixel by pixel.

        Of just over half of the values, the least and the most cannot be the median: they are
        found, forgotten, and one more value is looked at, until one is left.
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
        """The steps that a plane depends on."""
        needed, alive = [], {result.number}
        for (function, one, other), number in reversed(self._steps.items()):
            if number in alive:
                done = frozenset({one.number, other.number} - alive)
                needed.append(Step(number, function, one, other, done))
                alive |= done
        return tuple(reversed(needed))


def _exchanges(count: int) -> Iterator[tuple[int, int]]:
    """Places to compare in turn, to sort any numbers: Batcher's merge exchange.

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
    """Where the median of a square can be that is sorted along its rows and its columns.

    What is at most, or at least, as large as more than half of the square is not the median, and
    as many are left out on either side. Of the others it is known for each way in which such a
    square can be zeros and ones, a bit each, whether they are one: a plane is never above another
    if all of its bits are the other's too (the zero-one principle, Knuth 5.3.4). The last come
    first: of the orders that were tried, this leaves the fewest steps.
    """
    size = len(square)
    ones = np.array(list(itertools.combinations_with_replacement(range(size + 1), size)))
    half = size * size // 2 + 1
    found = []
    for row, column in itertools.product(reversed(range(size)), repeat=2):
        if (row + 1) * (column + 1) <= half and (size - row) * (size - column) <= half:
            bits = np.packbits(ones[:, row] >= size - column).tobytes()
            found.append(_Ranked(square[row][column], int.from_bytes(bits, "big")))
    return found
