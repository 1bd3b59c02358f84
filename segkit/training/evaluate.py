"""Evaluation: compare predictions with labels; integer counts, summed over the ranks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segkit.core.distributed import Progress, all_reduce, rank, world_size
from segkit.data.loader import eval_batches
from segkit.data.source import Source
from segkit.training.metrics import counts_of, image_matrices

Watch = Callable[[int, Tensor, Tensor, Tensor], None]
"""Evaluation callback: called with an image's index, predicted mask, true mask, counts (C, 3)."""


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
    for batch in eval_batches(
        source,
        indices,
        labels=labels,
        batch_size=batch_size,
        workers=workers,
        left_out=left_out,
    ):
        truth = batch.masks if batch.masks is not None else [None] * len(batch.indices)
        yield from zip(batch.indices, predict(batch.images), truth, strict=True)


def tally(
    predicted: Iterable[tuple[int, Tensor, Tensor | None]],
    source: Source,
    indices: Sequence[int],
    *,
    device: torch.device,
    description: str = "evaluate",
    watch: Watch | None = None,
) -> Evaluation:
    """Compare predicted masks with labels; every image counts once for any number of ranks.

    Args:
        predicted: (index, predicted mask, true mask) for this rank's share.
        source: The images.
        indices: All evaluated images, over all ranks.
        device: Device on which ranks exchange their counts.
        description: Label of the progress bar.
        watch: Called with each image of this rank's share.
    """
    classes = len(source.classes)
    counts = torch.zeros(len(indices), classes, 3, dtype=torch.int64)
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    row = {index: number for number, index in enumerate(indices)}
    share = len(indices[rank() :: world_size()])
    for index, mask, truth in Progress(predicted, description, total=share, unit="image"):
        mask = mask.cpu()
        [image_matrix] = image_matrices(mask[None], truth[None], classes)
        counts[row[index]] = counts_of(image_matrix)
        matrix += image_matrix
        if watch is not None:
            watch(index, mask, truth, counts[row[index]])
    return Evaluation(
        names=[source.names[index] for index in indices],
        counts=all_reduce(counts.to(device)).cpu(),
        matrix=all_reduce(matrix.to(device)).cpu(),
    )


def evaluate(
    predict: Callable[[Tensor], Tensor],
    source: Source,
    indices: Sequence[int],
    *,
    device: torch.device,
    batch_size: int = 1,
    workers: int = 0,
    description: str = "evaluate",
    watch: Watch | None = None,
) -> Evaluation:
    """Return :func:`tally` of :func:`predictions`; ``predict`` maps images to masks."""
    predicted = predictions(
        predict, source, indices, labels=True, batch_size=batch_size, workers=workers
    )
    return tally(predicted, source, indices, device=device, description=description, watch=watch)
