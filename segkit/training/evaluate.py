"""Evaluation: compare predictions with labels; integer counts, summed over the ranks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segkit.core.distributed import Progress, all_reduce, rank, world_size
from segkit.data.loader import EvalBatches
from segkit.data.source import Source
from segkit.training.metrics import counts_of, image_matrices

Callback = Callable[[int, Tensor, Tensor, Tensor], None]
"""Evaluation callback: called with an image's index, predicted mask, true mask, counts (C, 3)."""

Size = tuple[int, int]
"""Height and width."""

PENDING = 2**24
"""Number of pixels of predicted masks that wait for an evaluation callback."""


@dataclass(frozen=True)
class Evaluation:
    """Integer counts of an evaluation, equal on every rank.

    Shape:
        counts: (N, C, 3) int64; correct, true and predicted pixels of each image and class.
        matrix: (C, C) int64, rows are the truth; the sum over all images.
    """

    names: list[str]
    counts: Tensor
    matrix: Tensor


class Counter:
    """Counts pixels of predicted masks, on the masks' device.

    Args:
        source: The images.
        indices: All evaluated images, over all ranks.
        device: Device of the counts.
        callback: Called with each image of this rank's share, some batches later: copying counts to
            the CPU waits for the device.
    """

    def __init__(
        self,
        source: Source,
        indices: Sequence[int],
        device: torch.device,
        callback: Callback | None = None,
    ) -> None:
        self._source, self._indices, self._device = source, indices, device
        self._callback = callback
        classes = len(source.classes)
        self._matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        self._counted: list[int] = []
        self._counts = [torch.zeros(0, classes, 3, dtype=torch.int64, device=device)]
        self._pending: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def add(
        self, indices: Sequence[int], predicted: Tensor, truth: Tensor, sizes: Sequence[Size]
    ) -> None:
        """Count the pixels of a batch.

        Args:
            indices: Indices of its images.
            predicted: Predicted masks.
            truth: True masks; 255 where an image is padded.
            sizes: Height and width of each image; what lies below and to the right is padding.

        Shape:
            predicted, truth: (B, H, W) uint8
        """
        there = truth.to(predicted.device, non_blocking=True)
        matrices = image_matrices(predicted, there, len(self._matrix)).to(self._device)
        counts = counts_of(matrices)
        self._matrix += matrices.sum(0)
        self._counted += indices
        self._counts.append(counts)
        if self._callback is None:
            return
        for index, mask, true, own, (height, width) in zip(
            indices, predicted, truth, counts, sizes, strict=True
        ):
            self._pending.append((index, mask[:height, :width], true[:height, :width], own))
        if sum(mask.numel() for _, mask, _, _ in self._pending) > PENDING:
            self._call_back()

    def result(self) -> Evaluation:
        """Return the counts, summed over the ranks; all ranks call this."""
        self._call_back()
        counted = torch.cat(self._counts)
        row = {index: number for number, index in enumerate(self._indices)}
        counts = counted.new_zeros(len(row), *counted.shape[1:])
        counts[[row[index] for index in self._counted]] = counted
        return Evaluation(
            names=[self._source.names[index] for index in self._indices],
            counts=all_reduce(counts).cpu(),
            matrix=all_reduce(self._matrix).cpu(),
        )

    def _call_back(self) -> None:
        """Pass the pending images to the callback, with their counts copied at once."""
        if self._callback is None or not self._pending:
            return
        indices, predicted, truth, counts = zip(*self._pending, strict=True)
        self._pending.clear()
        for image in zip(indices, predicted, truth, torch.stack(counts).cpu(), strict=True):
            self._callback(*image)


def evaluate(
    predict: Callable[[Tensor], Tensor],
    batches: EvalBatches,
    *,
    device: torch.device,
    callback: Callback | None = None,
) -> Evaluation:
    """Compare the masks that ``predict`` returns with the true ones; each image counts once.

    Args:
        predict: Maps images, (B, 3, H, W) uint8, to masks, (B, H, W) uint8.
        batches: Labelled images; this rank's share.
        device: Device of ``predict``.
        callback: Called with each image of this rank's share.
    """
    counter = Counter(batches.source, batches.indices, device, callback)
    progress = Progress(None, "evaluate", total=len(batches.share), unit="image")
    for batch in batches:
        assert batch.masks is not None
        counter.add(batch.indices, predict(batch.images), batch.masks, batch.sizes)
        progress.update(len(batch.indices))
    progress.close()
    return counter.result()


def count(
    predicted: Iterable[tuple[int, Tensor, Tensor | None]],
    source: Source,
    indices: Sequence[int],
    *,
    device: torch.device,
    description: str = "evaluate",
    callback: Callback | None = None,
) -> Evaluation:
    """Compare predicted masks with labels; each image counts once for any number of ranks.

    Args:
        predicted: (index, predicted mask, true mask) of this rank's share.
        source: The images.
        indices: All evaluated images, over all ranks.
        device: Device on which ranks exchange their counts.
        description: Label of the progress bar.
        callback: Called with each image of this rank's share.
    """
    counter = Counter(source, indices, device, callback)
    share = len(indices[rank() :: world_size()])
    for index, mask, truth in Progress(predicted, description, total=share, unit="image"):
        assert truth is not None
        counter.add([index], mask[None], truth[None], [(truth.shape[0], truth.shape[1])])
    return counter.result()


def predictions(
    predict: Callable[[Tensor], Tensor],
    source: Source,
    indices: Sequence[int],
    *,
    labels: bool,
    batch_size: int = 1,
    workers: int = 0,
    left_out: dict[int, str] | None = None,
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yield (index, prediction, true mask or None) for this rank's share of ``indices``.

    Args:
        predict: Maps images, (B, 3, H, W) uint8, to masks or probabilities.
        source: The images.
        indices: Images to predict, over all ranks.
        labels: Also read the true masks.
        batch_size: Number of images of equal size that are predicted together.
        workers: Number of processes that read images.
        left_out: Filled with an error message for each image that cannot be read, by index; without
            it, the first such image raises an error.
    """
    batches = EvalBatches(
        source, indices, labels=labels, batch_size=batch_size, workers=workers, left_out=left_out
    )
    for batch in batches:
        truth = batch.masks if batch.masks is not None else [None] * len(batch.indices)
        yield from zip(batch.indices, predict(batch.images), truth, strict=True)
