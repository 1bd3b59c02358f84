"""Median filter computed with elementwise minima and maxima of shifted images.

Faster on uint8 than sorting each window: neighboring windows share columns, so each column is
sorted once for all of them, then the rows of equal rank are sorted. In the resulting square, sorted
along both rows and columns, few values can be the median.

The sorting network of each size is built once and pruned to the steps that the median depends on
(116 steps for 5 × 5). Sharing columns: Adams 2021, https://doi.org/10.1145/3450626.3459773
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Plane = tuple[int, int, int]
"""Number of an image (0: the input, n: the result of step n), and offset in rows and columns."""

Pair = Callable[[Plane, Plane], tuple[Plane, Plane]]


class Extremum(NamedTuple):
    """A minimum or maximum of two planes."""

    number: int  # of the result
    function: str  # minimum or maximum, a function of both NumPy and PyTorch
    first: Plane
    second: Plane
    done: frozenset[int]  # numbers of the images that no later step reads


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


def _run(library: Any, image: Any, size: int, width: int) -> Any:
    """Return the median of the square that begins at each pixel of a flattened image.

    Shifting is an offset into the flattened image. Squares that cross the right edge give
    meaningless values, which the caller drops; those that cross the end are left out.
    """
    images = {0: image}
    for number, function, *planes, done in network(size):
        a, b = (images[source][down * width + right :] for source, down, right in planes)
        length = min(len(a), len(b))
        images[number] = getattr(library, function)(a[:length], b[:length])
        for unneeded in done:
            del images[unneeded]
    (result,) = images.values()
    return result


@functools.cache
def network(size: int) -> tuple[Extremum, ...]:
    """Return the steps that compute the median of squares of an odd size."""
    steps: dict[tuple[str, Plane, Plane], int] = {}  # equal steps are stored once

    def step(function: str, first: Plane, second: Plane) -> Plane:
        first, second = sorted((first, second))
        down, right = min(first[1], second[1]), min(first[2], second[2])
        first, second = ((n, d - down, r - right) for n, d, r in (first, second))
        return steps.setdefault((function, first, second), len(steps) + 1), down, right

    def pair(first: Plane, second: Plane) -> tuple[Plane, Plane]:
        return step("minimum", first, second), step("maximum", first, second)

    columns = _sorted([(0, down, 0) for down in range(size)], pair)
    square = [
        _sorted([(number, down, right) for right in range(size)], pair)
        for number, down, _ in columns
    ]
    median, _, _ = _middle(_candidates(square), pair)
    needed, alive = [], {median}
    for (function, first, second), number in reversed(steps.items()):
        if number in alive:
            done = frozenset({first[0], second[0]} - alive)
            needed.append(Extremum(number, function, first, second, done))
            alive |= done
    return tuple(reversed(needed))


def _sorted(planes: list[Plane], pair: Pair) -> list[Plane]:
    """Return planes in ascending order, pixel by pixel."""
    for low, high in _exchanges(len(planes)):
        planes[low], planes[high] = pair(planes[low], planes[high])
    return planes


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


def _candidates(square: list[list[Plane]]) -> list[tuple[Plane, int]]:
    """Return the planes that can be the median of a square sorted along rows and columns.

    A value that is <= or >= more than half of the square cannot be the median; equally many are
    left out on both sides. Each plane comes with a bit set, one bit for each sorted 0/1 square: the
    plane's value in it. A plane is never greater than another if its bits are a subset of the
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
            candidates.append((square[row][column], int.from_bytes(bits, "big")))
    return candidates


def _middle(values: list[tuple[Plane, int]], pair: Pair) -> Plane:
    """Return the median of an odd number of planes, pixel by pixel.

    Among just over half of the values, neither the minimum nor the maximum can be the median: drop
    both, add the next value, and repeat until one is left. Planes whose order is known by their bit
    sets need no step.
    """
    start = len(values) // 2 + 2
    held, waiting = values[:start], values[start:]
    while len(held) > 1:
        last = len(held) - 1
        pairs = [(place, last - place) for place in range(len(held) // 2)]
        pairs += [(0, place) for place in range(1, (last + 2) // 2)]
        pairs += [(place, last) for place in range(len(held) // 2, last)]
        for low, high in pairs:
            (first, some), (second, others) = held[low], held[high]
            if some & others == others:
                held[low], held[high] = held[high], held[low]
            elif some & others != some:
                minimum, maximum = pair(first, second)
                held[low], held[high] = (minimum, some & others), (maximum, some | others)
        held = held[1:-1] + waiting[:1]
        waiting = waiting[1:]
    return held[0][0]
