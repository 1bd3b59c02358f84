"""Votes of several models over many images, one model at a time."""

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
"""Bytes of votes that stay in memory before they go to a file."""


class HardVote:
    """Every model casts one vote a pixel; the class with most votes wins.

    A tie goes to the tied class that the best-ranked voter chose, and not to the lowest class
    index, which would favor the background. The votes themselves are kept, a byte a pixel and
    voter, so ranks and weights hold exactly in whatever order the voters come.

    Args:
        shapes: (H, W) of every image.
        num_classes: At most 255.
        weights: What a vote counts. Weights (voters, C) such as each model's validation IoU of
            each class (NaN counts nothing), or (voters,); default one each.
        max_bytes: A voter's masks are kept in memory up to this size, and in a file above it.
        folder: Where such files go; they have no name there and vanish with the process.

    Shape:
        prediction: (H, W) class indices, or (C, H, W) probabilities
        result: (H, W), uint8
    """

    def __init__(
        self,
        shapes: Sequence[Size],
        num_classes: int,
        *,
        weights: Tensor | None = None,
        max_bytes: int = IN_MEMORY,
        folder: Path | None = None,
    ) -> None:
        self.shapes = tuple(shapes)
        self.num_classes = num_classes
        self.weights = weights
        self.max_bytes = max_bytes
        self.folder = folder
        self._masks: dict[int, _Planes] = {}
        self._cast: set[tuple[int, int]] = set()

    def add(self, image: int, prediction: Tensor, *, voter: int) -> None:
        """Cast a voter's vote on an image. Voters are numbered by rank, 0 being the best.

        Raises:
            ValueError: The voter has voted on this image, or the prediction does not fit.
        """
        mask = prediction.max(0).indices if prediction.dim() == 3 else prediction
        _check(image, mask.shape, self.shapes[image])
        if int(mask.max()) >= self.num_classes:
            raise ValueError(f"image {image}: class {int(mask.max())} of {self.num_classes}")
        if (voter, image) in self._cast:
            raise ValueError(f"voter {voter} has voted on image {image} already")
        if voter not in self._masks:
            self._masks[voter] = _Planes(self.shapes, 1, "uint8", self.max_bytes, self.folder)
        self._masks[voter][image][0] = mask.to(torch.uint8).cpu().numpy()
        self._cast.add((voter, image))

    def result(self, image: int) -> Tensor:
        """The class most voters chose.

        Raises:
            ValueError: No voter has voted on this image.
        """
        voters = [voter for voter in sorted(self._masks) if (voter, image) in self._cast]
        if not voters:
            raise ValueError(f"no voter has voted on image {image}")
        worths = [_worth(self.weights, voter, self.num_classes) for voter in voters]
        masks = [self._masks[voter][image][0] for voter in voters]
        winner = torch.empty(self.shapes[image], dtype=torch.uint8)
        for rows in _bands(self.shapes[image], self.num_classes):
            winner[rows] = _most_votes([torch.tensor(mask[rows]) for mask in masks], worths)
        return winner


def _most_votes(votes: list[Tensor], worths: list[Tensor]) -> Tensor:
    """The winner at every pixel, of votes (H, W) in order of rank, each worth (C,)."""
    choices = [vote.long()[None] for vote in votes]
    scores = torch.zeros(len(worths[0]), *votes[0].shape, dtype=torch.float64)
    for choice, worth in zip(choices, worths, strict=True):
        scores.scatter_add_(0, choice, worth[choice])
    most = scores.amax(0, keepdim=True)
    winner = choices[-1]
    for choice in reversed(choices):
        winner = torch.where(scores.gather(0, choice) == most, choice, winner)
    return winner[0].to(torch.uint8)


class SoftVote:
    """The class with the largest weighted sum of the models' probabilities wins.

    Args:
        shapes: (H, W) of every image.
        num_classes: Planes of the probabilities.
        weights: What a voter's probabilities count, (voters, C) or (voters,); default one each.
        dtype: Of the sums. ``"float16"`` halves the space and rounds each sum to three digits.
        max_bytes: The sums are kept in memory up to this size, and in a file above it.
        folder: Where such a file goes; it has no name there and vanishes with the process.

    Shape:
        probabilities: (C, H, W)
        result: (H, W), uint8
    """

    def __init__(
        self,
        shapes: Sequence[Size],
        num_classes: int,
        *,
        weights: Tensor | None = None,
        dtype: Literal["float16", "float32"] = "float32",
        max_bytes: int = IN_MEMORY,
        folder: Path | None = None,
    ) -> None:
        self.shapes = tuple(shapes)
        self.num_classes = num_classes
        self.weights = weights
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
        worth = _worth(self.weights, voter, self.num_classes).float()
        sums = torch.from_numpy(self._sums[image])
        sums += (probabilities.float().cpu() * worth.view(-1, 1, 1)).to(sums.dtype)
        self._cast.add((voter, image))

    def probabilities(self, image: int) -> Tensor:
        """The weighted mean of the probabilities, (C, H, W), float32, summing to one.

        Raises:
            ValueError: No voter has voted on this image.
        """
        sums = torch.from_numpy(self._counted(image).astype(np.float32))
        return sums / sums.sum(0, keepdim=True)

    def result(self, image: int) -> Tensor:
        """The class with the largest sum; the lowest index where two are equal.

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
    """Arrays (planes, H, W) of many images in one block, zero at first.

    Kept in memory, or above ``max_bytes`` in a file of which only the image in use is mapped, so
    that resident memory does not grow with the number of images.
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
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, open while this lives
            self.file.truncate(self.starts[-1])
            weakref.finalize(self, self.file.close)

    def __getitem__(self, image: int) -> np.ndarray:
        start, shape = self.starts[image], self.shapes[image]
        if self.memory is not None:
            return np.ndarray(shape, self.dtype, self.memory, start)
        return np.memmap(self.file, self.dtype, "r+", start, shape)


def _worth(weights: Tensor | None, voter: int, num_classes: int) -> Tensor:
    """What a voter's vote for each class counts, (C,)."""
    if weights is None:
        return torch.ones(num_classes, dtype=torch.float64)
    return weights[voter].double().nan_to_num(0.0).expand(num_classes)


def _check(image: int, shape: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(shape) != tuple(expected):
        raise ValueError(f"image {image}: expected shape {tuple(expected)}, got {tuple(shape)}")


def _bands(shape: Size, num_classes: int) -> Iterator[slice]:
    """Rows, so many at a time that 16 million scores fit."""
    step = max(1, 2**24 // (shape[1] * num_classes))
    return (slice(top, top + step) for top in range(0, shape[0], step))
