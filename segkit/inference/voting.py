"""Hard and soft votes of several models over many images, one model at a time."""

import math
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, int]

IN_MEMORY = 2**28
"""Largest number of bytes of votes kept in memory; larger votes are kept in a file."""


class HardVote:
    """Majority vote per pixel: every model has one vote, and the class with most votes wins.

    A tie is won by the class that the best-ranked voter chose, not by the lowest class index, which
    would favor the background. All votes are stored, one byte per pixel and voter, so that the
    result does not depend on the order of the voters.

    Args:
        shapes: (H, W) of every image.
        num_classes: Number of classes, at most 255.
        coefficients: Of the votes: (voters, C), such as each model's validation IoU of each class
            (NaN counts as 0), or (voters,); default: 1.
        max_bytes: A voter's masks are kept in memory up to this size, and in a file above it.
        folder: Folder of such files; they are unnamed and disappear with the process.

    Shape:
        prediction: (H, W) class indices, or (C, H, W) probabilities
        result: (H, W), uint8
    """

    def __init__(
        self,
        shapes: Sequence[Size],
        num_classes: int,
        *,
        coefficients: Tensor | None = None,
        max_bytes: int = IN_MEMORY,
        folder: Path | None = None,
    ) -> None:
        self.shapes = tuple(shapes)
        self.num_classes = num_classes
        self.coefficients = coefficients
        self.max_bytes = max_bytes
        self.folder = folder
        self._masks: dict[int, _Planes] = {}
        self._cast: set[tuple[int, int]] = set()

    def add(self, image: int, prediction: Tensor, *, voter: int) -> None:
        """Add a voter's prediction of an image. Voters are numbered by rank, from 0 for the best.

        Raises:
            ValueError: The voter has voted on this image, or the prediction does not fit.
        """
        mask = prediction.max(0).indices if prediction.dim() == 3 else prediction
        _check(image, mask.shape, self.shapes[image])
        if int(mask.max()) >= self.num_classes:
            raise ValueError(
                f"image {image}: prediction holds class {int(mask.max())}, "
                f"but there are {self.num_classes} classes"
            )
        if (voter, image) in self._cast:
            raise ValueError(f"voter {voter} has voted on image {image} already")
        if voter not in self._masks:
            self._masks[voter] = _Planes(self.shapes, 1, "uint8", self.max_bytes, self.folder)
        self._masks[voter][image][0] = mask.to(torch.uint8).cpu().numpy()
        self._cast.add((voter, image))

    def result(self, image: int) -> Tensor:
        """Return the class with most votes at every pixel.

        Raises:
            ValueError: No voter has voted on this image.
        """
        voters = [voter for voter in sorted(self._masks) if (voter, image) in self._cast]
        if not voters:
            raise ValueError(f"no voter has voted on image {image}")
        coefficients = [
            _coefficients(self.coefficients, voter, self.num_classes) for voter in voters
        ]
        masks = [self._masks[voter][image][0] for voter in voters]
        winner = torch.empty(self.shapes[image], dtype=torch.uint8)
        for rows in _bands(self.shapes[image], self.num_classes):
            winner[rows] = _most_votes([torch.tensor(mask[rows]) for mask in masks], coefficients)
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


class SoftVote:
    """Soft vote per pixel: the class with the largest weighted sum of probabilities wins.

    Args:
        shapes: (H, W) of every image.
        num_classes: Number of classes.
        coefficients: Of the probabilities, (voters, C) or (voters,); default: 1.
        dtype: Type of the sums. ``"float16"`` needs half the space, with three digits per sum.
        max_bytes: The sums are kept in memory up to this size, and in a file above it.
        folder: Folder of such a file; it is unnamed and disappears with the process.

    Shape:
        probabilities: (C, H, W)
        result: (H, W), uint8
    """

    def __init__(
        self,
        shapes: Sequence[Size],
        num_classes: int,
        *,
        coefficients: Tensor | None = None,
        dtype: Literal["float16", "float32"] = "float32",
        max_bytes: int = IN_MEMORY,
        folder: Path | None = None,
    ) -> None:
        self.shapes = tuple(shapes)
        self.num_classes = num_classes
        self.coefficients = coefficients
        self._sums = _Planes(self.shapes, num_classes, dtype, max_bytes, folder)
        self._cast: set[tuple[int, int]] = set()

    def add(self, image: int, probabilities: Tensor, *, voter: int) -> None:
        """Add a voter's probabilities of an image.

        Raises:
            ValueError: The voter has voted on this image, or the probabilities do not fit.
        """
        _check(image, probabilities.shape, (self.num_classes, *self.shapes[image]))
        if (voter, image) in self._cast:
            raise ValueError(f"voter {voter} has voted on image {image} already")
        coefficients = _coefficients(self.coefficients, voter, self.num_classes).float()
        sums = torch.from_numpy(self._sums[image])
        sums += (probabilities.float().cpu() * coefficients.view(-1, 1, 1)).to(sums.dtype)
        self._cast.add((voter, image))

    def probabilities(self, image: int) -> Tensor:
        """Return the weighted mean of the probabilities, (C, H, W), float32, with a sum of one.

        Raises:
            ValueError: No voter has voted on this image.
        """
        sums = torch.from_numpy(self._counted(image).astype(np.float32))
        return sums / sums.sum(0, keepdim=True)

    def result(self, image: int) -> Tensor:
        """Return the class with the largest sum; the lowest index among equal sums.

        Raises:
            ValueError: No voter has voted on this image.
        """
        sums = self._counted(image)
        winner = torch.empty(self.shapes[image], dtype=torch.uint8)
        for rows in _bands(self.shapes[image], self.num_classes):
            winner[rows] = torch.tensor(sums[:, rows]).max(0).indices.to(torch.uint8)
        return winner

    def _counted(self, image: int) -> np.ndarray:
        if not any(voted == image for _, voted in self._cast):
            raise ValueError(f"no voter has voted on image {image}")
        return self._sums[image]


class _Planes:
    """Arrays (planes, H, W) of many images in one block, initialized with zeros.

    The block is kept in memory, or above ``max_bytes`` in a file. Only the image in use is mapped
    from the file, so that resident memory does not grow with the number of images.
    """

    def __init__(
        self, shapes: Sequence[Size], planes: int, dtype: str, max_bytes: int, folder: Path | None
    ) -> None:
        self.shapes = [(planes, *shape) for shape in shapes]
        self.dtype = np.dtype(dtype)
        sizes = [math.prod(shape) * self.dtype.itemsize for shape in self.shapes]
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


def _coefficients(coefficients: Tensor | None, voter: int, num_classes: int) -> Tensor:
    """Return the coefficients of a voter's votes for each class, (C,)."""
    if coefficients is None:
        return torch.ones(num_classes, dtype=torch.float64)
    return coefficients[voter].double().nan_to_num(0.0).expand(num_classes)


def _check(image: int, shape: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(shape) != tuple(expected):
        raise ValueError(f"image {image}: expected shape {tuple(expected)}, got {tuple(shape)}")


def _bands(shape: Size, num_classes: int) -> Iterator[slice]:
    """Return slices of rows with at most 16 million scores each."""
    step = max(1, 2**24 // (shape[1] * num_classes))
    return (slice(top, top + step) for top in range(0, shape[0], step))
