"""Hard and soft votes of several models over many images, one model at a time."""

import math
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from segkit.inference.prediction import predicted_classes

IN_MEMORY = 2**28
"""Largest number of bytes of votes kept in memory; larger votes are kept in a file."""


class Vote(ABC):
    """Per-pixel vote of several models on many images.

    Args:
        shapes: (H, W) of every image.
        num_classes: Number of classes, at most 255.
        coefficients: Coefficients of a soft vote, (voters, C), such as each model's validation IoU
            of each class; default: 1.
        max_bytes: Votes are kept in memory up to this size, and in a file above it.
        folder: Folder of such files; they are unnamed and disappear with the process.

    Raises:
        ValueError: A prediction does not fit, a voter repeats or skips rows, or the result of an
            image without votes is asked for.

    Shape:
        probabilities: (C, h, W), rows of the image from ``top``
        result: (H, W), uint8
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        num_classes: int,
        *,
        coefficients: Tensor | None = None,
        max_bytes: int = IN_MEMORY,
        folder: Path | None = None,
    ) -> None:
        self._shapes, self._num_classes, self._coefficients = shapes, num_classes, coefficients
        self._max_bytes, self._folder = max_bytes, folder
        self._rows: list[dict[int, int]] = [{} for _ in shapes]  # rows received so far, by voter
        self._arrays: dict[int, _MemmapArrays] = {}

    def _stored(self, number: int, image: int, planes: int, dtype: type[np.generic]) -> Tensor:
        """Return a view of array ``number`` of an image, (planes, H, W)."""
        if number not in self._arrays:
            shapes = [(planes, *shape) for shape in self._shapes]
            arrays = _MemmapArrays(shapes, np.dtype(dtype), self._max_bytes, self._folder)
            self._arrays[number] = arrays
        return torch.from_numpy(self._arrays[number][image])

    def add(self, image: int, probabilities: Tensor, *, voter: int, top: int = 0) -> None:
        """Add the next rows of a voter's prediction of an image, which begin at ``top``.

        Voters are numbered by rank, from 0 for the best.
        """
        height, width = self._shapes[image]
        rows = probabilities.shape[-2]
        if tuple(probabilities.shape) != (self._num_classes, rows, width) or top + rows > height:
            raise ValueError(
                f"image {image}: expected shape {(self._num_classes, height - top, width)}, "
                f"got {tuple(probabilities.shape)}"
            )
        expected = self._rows[image].get(voter, 0)
        if top != expected:
            raise ValueError(
                f"image {image}, voter {voter}: expected rows from {expected}, got top={top}"
            )
        self._rows[image][voter] = top + rows
        self._add(image, probabilities, voter, slice(top, top + rows))

    def _complete_voters(self, image: int) -> list[int]:
        """Return the voters that have voted on all rows of an image, the best first."""
        height, _ = self._shapes[image]
        voters = sorted(voter for voter, rows in self._rows[image].items() if rows == height)
        if not voters:
            raise ValueError(f"no voter has voted on image {image}")
        return voters

    def result(self, image: int) -> Tensor:
        """Return the class that wins at every pixel."""
        self._complete_voters(image)
        height, width = self._shapes[image]
        winners = torch.empty(height, width, dtype=torch.uint8)
        for rows in self._bands(height, width):
            winners[rows] = self._winners(image, rows)
        return winners

    def _bands(self, height: int, width: int) -> list[slice]:
        """Return slices of rows with at most 4 million scores each; only those are mapped."""
        rows = max(1, 2**22 // (width * self._num_classes))
        return [slice(top, top + rows) for top in range(0, height, rows)]

    @abstractmethod
    def _add(self, image: int, probabilities: Tensor, voter: int, rows: slice) -> None: ...

    @abstractmethod
    def _winners(self, image: int, rows: slice) -> Tensor: ...


class HardVote(Vote):
    """Majority vote per pixel: every model has one vote, and the class with most votes wins.

    A tie is won by the class that the best-ranked voter chose, not by the lowest class index, which
    would favor the background. All votes are stored, one byte per pixel and voter, so that the
    result does not depend on the order of the voters.
    """

    def _add(self, image: int, probabilities: Tensor, voter: int, rows: slice) -> None:
        self._stored(voter, image, 1, np.uint8)[0, rows] = predicted_classes(probabilities)

    def _winners(self, image: int, rows: slice) -> Tensor:
        voters = self._complete_voters(image)
        votes = torch.cat([self._stored(n, image, 1, np.uint8)[:, rows] for n in voters])
        counts = torch.stack([(votes == vote).sum(0) for vote in votes])
        return votes.gather(0, counts.max(0, keepdim=True).indices)[0]  # the first of the largest


class SoftVote(Vote):
    """Soft vote per pixel: the class with the largest weighted sum of probabilities wins.

    The lowest index wins among equal sums.
    """

    def _add(self, image: int, probabilities: Tensor, voter: int, rows: slice) -> None:
        if self._coefficients is not None:
            coefficients = self._coefficients[voter].to(probabilities)
            probabilities = probabilities * coefficients.view(-1, 1, 1)
        self._sums(image)[:, rows].add_(probabilities.cpu())

    def probabilities(self, image: int) -> Tensor:
        """Return the weighted mean of the probabilities, (C, H, W), float32, with a sum of one."""
        self._complete_voters(image)
        sums = self._sums(image)
        return sums / sums.sum(0, keepdim=True)

    def _winners(self, image: int, rows: slice) -> Tensor:
        return predicted_classes(self._sums(image)[:, rows])

    def _sums(self, image: int) -> Tensor:
        return self._stored(0, image, self._num_classes, np.float32)


class _MemmapArrays:
    """Arrays of given shapes in one block, initialized with zeros.

    The block is kept in memory, or above ``max_bytes`` in a file. An array is mapped from the file
    only as long as it is used, so that resident memory does not grow with the images.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        dtype: np.dtype,
        max_bytes: int,
        folder: Path | None,
    ) -> None:
        self.shapes, self.dtype = shapes, dtype
        sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
        self.starts = np.cumsum([0, *sizes]).tolist()
        self.memory: np.ndarray | None = None
        if self.starts[-1] <= max_bytes:
            self.memory = np.zeros(self.starts[-1], np.uint8)
        else:
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, open as long as self
            self.file.truncate(self.starts[-1])
            weakref.finalize(self, self.file.close)

    def __getitem__(self, image: int) -> np.ndarray:
        start, shape = self.starts[image], self.shapes[image]
        if self.memory is not None:
            return np.ndarray(shape, self.dtype, self.memory, start)
        return np.memmap(self.file, self.dtype, "r+", start, shape)
