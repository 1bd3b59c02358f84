"""Hard and soft votes of several models over many images, one model at a time."""

import math
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from segkit.inference.prediction import predicted_classes

Shape = tuple[int, ...]

IN_MEMORY = 2**28
"""Largest number of bytes of votes kept in memory; larger votes are kept in a file."""


class Vote:
    """Per-pixel vote of several models on many images.

    Args:
        shapes: (H, W) of every image.
        num_classes: Number of classes, at most 255.
        coefficients: Coefficients of the votes, (voters, C), such as each model's validation IoU of
            each class (NaN counts as 0), or (voters,); default: 1.
        max_bytes: Votes are kept in memory up to this size, and in a file above it.
        folder: Folder of such files; they are unnamed and disappear with the process.

    Raises:
        ValueError: A prediction does not fit, a voter repeats or skips rows, or the result of an
            image without votes is asked for.
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
        self.shapes, self.num_classes = tuple(shapes), num_classes
        self._max_bytes, self._folder = max_bytes, folder
        self._given = None if coefficients is None else coefficients.double().nan_to_num(0.0)
        self._rows: list[dict[int, int]] = [{} for _ in shapes]  # rows received so far, by voter
        self._stored: dict[int, _MemmapArrays] = {}

    def _register_rows(
        self, image: int, voter: int, top: int, prediction: Tensor, *planes: int
    ) -> slice:
        """Check that a prediction continues a voter's rows; return the slice of its rows."""
        height, width = self.shapes[image]
        rows = prediction.shape[-2]
        if tuple(prediction.shape) != (*planes, rows, width) or top + rows > height:
            raise ValueError(
                f"image {image}: expected shape {(*planes, height - top, width)}, "
                f"got {tuple(prediction.shape)}"
            )
        expected = self._rows[image].get(voter, 0)
        if top != expected:
            raise ValueError(
                f"image {image}, voter {voter}: expected rows from {expected}, got top={top}"
            )
        self._rows[image][voter] = top + rows
        return slice(top, top + rows)

    def _complete_voters(self, image: int) -> list[int]:
        """Return the voters that have voted on all rows of an image, the best first."""
        height, _ = self.shapes[image]
        voters = [voter for voter, rows in self._rows[image].items() if rows == height]
        if not voters:
            raise ValueError(f"no voter has voted on image {image}")
        return sorted(voters)

    def _coefficients(self, voter: int) -> Tensor:
        """Return a voter's coefficient for each class, (C,)."""
        if self._given is None:
            return torch.ones(self.num_classes, dtype=torch.float64)
        return self._given[voter].expand(self.num_classes)

    def _arrays(self, planes: int, dtype: type[np.generic]) -> "_MemmapArrays":
        shapes = [(planes, *shape) for shape in self.shapes]
        return _MemmapArrays(shapes, np.dtype(dtype), self._max_bytes, self._folder)


class HardVote(Vote):
    """Majority vote per pixel: every model has one vote, and the class with most votes wins.

    A tie is won by the class that the best-ranked voter chose, not by the lowest class index, which
    would favor the background. All votes are stored, one byte per pixel and voter, so that the
    result does not depend on the order of the voters. Arguments are those of :class:`Vote`.

    Shape:
        prediction: (H, W) class indices, or (C, H, W) probabilities
        result: (H, W), uint8
    """

    def add(self, image: int, prediction: Tensor, *, voter: int, top: int = 0) -> None:
        """Add a voter's prediction of an image, or of its next rows, which begin at ``top``.

        Voters are numbered by rank, from 0 for the best.
        """
        mask = prediction.max(0).indices if prediction.dim() == 3 else prediction
        if int(mask.max()) >= self.num_classes:
            raise ValueError(
                f"image {image}: prediction holds class {int(mask.max())}, "
                f"but there are {self.num_classes} classes"
            )
        rows = self._register_rows(image, voter, top, mask)
        if voter not in self._stored:
            self._stored[voter] = self._arrays(1, np.uint8)
        self._stored[voter][image][0, rows] = mask.to(torch.uint8).cpu().numpy()

    def result(self, image: int) -> Tensor:
        """Return the class with most votes at every pixel."""
        voters = self._complete_voters(image)
        coefficients = [self._coefficients(voter) for voter in voters]
        winner = torch.empty(self.shapes[image], dtype=torch.uint8)
        for rows in _bands(self.shapes[image], self.num_classes):
            votes = [torch.tensor(self._stored[voter][image][0, rows]) for voter in voters]
            winner[rows] = _most_votes(votes, coefficients)
        return winner


def _most_votes(votes: list[Tensor], coefficients: list[Tensor]) -> Tensor:
    """Return the winner at every pixel of votes (H, W), by rank, with coefficients (C,) each."""
    choices = [vote.long()[None] for vote in votes]
    scores = torch.zeros(len(coefficients[0]), *votes[0].shape, dtype=torch.float64)
    for choice, by_class in zip(choices, coefficients, strict=True):
        scores.scatter_add_(0, choice, by_class[choice])
    most = scores.amax(0, keepdim=True)
    winner = choices[-1]
    for choice in reversed(choices):
        winner = torch.where(scores.gather(0, choice) == most, choice, winner)
    return winner[0].to(torch.uint8)


class SoftVote(Vote):
    """Soft vote per pixel: the class with the largest weighted sum of probabilities wins.

    Arguments are those of :class:`Vote`.

    Shape:
        probabilities: (C, H, W)
        result: (H, W), uint8
    """

    def add(self, image: int, probabilities: Tensor, *, voter: int, top: int = 0) -> None:
        """Add a voter's probabilities of an image, or of its next rows, which begin at ``top``."""
        rows = self._register_rows(image, voter, top, probabilities, self.num_classes)
        sums = torch.from_numpy(self._sums[image])[:, rows]
        sums += probabilities.float().cpu() * self._coefficients(voter).float().view(-1, 1, 1)

    def probabilities(self, image: int) -> Tensor:
        """Return the weighted mean of the probabilities, (C, H, W), float32, with a sum of one."""
        self._complete_voters(image)
        sums = torch.tensor(self._sums[image])
        return sums / sums.sum(0, keepdim=True)

    def result(self, image: int) -> Tensor:
        """Return the class with the largest sum; the lowest index among equal sums."""
        self._complete_voters(image)
        winner = torch.empty(self.shapes[image], dtype=torch.uint8)
        for rows in _bands(self.shapes[image], self.num_classes):
            sums = torch.tensor(self._sums[image][:, rows])
            winner[rows] = predicted_classes(sums)
        return winner

    @cached_property
    def _sums(self) -> "_MemmapArrays":
        return self._arrays(self.num_classes, np.float32)


class _MemmapArrays:
    """Arrays of given shapes in one block, initialized with zeros.

    The block is kept in memory, or above ``max_bytes`` in a file. An array is mapped from the file
    only as long as it is used, so that resident memory does not grow with the images.
    """

    def __init__(
        self, shapes: Sequence[Shape], dtype: np.dtype, max_bytes: int, folder: Path | None
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


def _bands(shape: Shape, num_classes: int) -> Iterator[slice]:
    """Return slices of rows with at most 4 million scores each."""
    step = max(1, 2**22 // (shape[1] * num_classes))
    return (slice(top, top + step) for top in range(0, shape[0], step))
