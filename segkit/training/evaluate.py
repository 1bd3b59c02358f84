"""Evaluation: compare predictions with labels; integer counts, summed over the ranks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segkit.core.config import Config
from segkit.core.distributed import Progress, all_reduce, rank, world_size
from segkit.core.labels import Size
from segkit.data.loader import EvalBatches
from segkit.data.source import Source
from segkit.training.details import Details
from segkit.training.metrics import counts_of, matrices_of, pixel_counts

Callback = Callable[[int, Tensor, Tensor, Tensor], None]
"""Evaluation callback: called with an image's index, predicted mask, true mask, counts (C, 3)."""

PENDING = 2**24
"""Number of pixels after which an evaluation waits for the device, to add up its counts."""


@dataclass(frozen=True)
class Evaluation:
    """Integer counts of an evaluation, equal on every rank.

    Shape:
        counts: (N, C, 3) int64; correct, true and predicted pixels of each image and class.
        matrix: (C, C) int64, rows are the truth; the sum over all images.
        details: Counts of boundaries and objects, if they were asked for.
    """

    names: list[str]
    counts: Tensor
    matrix: Tensor
    details: Details | None = None


class Counter:
    """Counts pixels of predicted masks on their device, and waits for it only from time to time.

    Args:
        indices: All evaluated images, over all ranks.
        device: Device on which ranks exchange their counts.
        callbacks: Called with each image of this rank's share, some batches later.
    """

    def __init__(
        self,
        source: Source,
        indices: Sequence[int],
        device: torch.device,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self._source, self._indices, self._device = source, indices, device
        self._callbacks = callbacks
        self._row = {index: number for number, index in enumerate(indices)}
        self._classes = max(2, len(source.classes))  # 1 is binary
        self._counts = torch.zeros(len(indices), self._classes, 3, dtype=torch.int64)
        self._matrix = torch.zeros(self._classes, self._classes, dtype=torch.int64)
        self._images: list[tuple[int, Tensor, Tensor]] = []
        self._pixel_counts: list[Tensor] = []

    def add(
        self, indices: Sequence[int], predicted: Tensor, truth: Tensor, sizes: Sequence[Size]
    ) -> None:
        """Count the pixels of a batch of images with these ``indices`` and (unpadded) ``sizes``.

        Shape:
            predicted, truth: (B, H, W) uint8; truth is 255 in the padding below and to the right
        """
        there = truth.to(predicted.device, non_blocking=True)
        self._pixel_counts.append(pixel_counts(predicted, there, self._classes))
        for index, mask, true, (height, width) in zip(
            indices, predicted, truth, sizes, strict=True
        ):
            self._images.append((index, mask[:height, :width], true[:height, :width]))
        if sum(mask.numel() for _, mask, _ in self._images) > PENDING:
            self._finish_pending()

    def result(self) -> Evaluation:
        """Return the counts, summed over the ranks; all ranks call this."""
        self._finish_pending()
        return Evaluation(
            names=[self._source.names[index] for index in self._indices],
            counts=all_reduce(self._counts.to(self._device)).cpu(),
            matrix=all_reduce(self._matrix.to(self._device)).cpu(),
        )

    def _finish_pending(self) -> None:
        """Wait for the counts of the pending images, add them up, and call the callbacks."""
        if not self._images:
            return
        matrices = matrices_of(torch.cat(self._pixel_counts)).cpu()
        self._matrix += matrices.sum(0)
        for (index, mask, true), counts in zip(self._images, counts_of(matrices), strict=True):
            self._counts[self._row[index]] = counts
            for callback in self._callbacks:
                callback(index, mask, true, counts)
        self._images.clear()
        self._pixel_counts.clear()


def evaluate(
    predict: Callable[[Tensor], Tensor],
    batches: EvalBatches,
    *,
    device: torch.device,
    callbacks: Sequence[Callback] = (),
) -> Evaluation:
    """Compare the masks that ``predict`` returns with the true ones; each image counts once.

    Args:
        predict: Maps images, (B, 3, H, W) uint8, to masks, (B, H, W) uint8.
        batches: Labelled images; this rank's share.
        device: Device of ``predict``.
        callbacks: Called with each image of this rank's share.
    """
    counter = Counter(batches.source, batches.indices, device, callbacks)
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
    callbacks: Sequence[Callback] = (),
) -> Evaluation:
    """Compare predicted masks with labels; each image counts once for any number of ranks.

    As :func:`evaluate`; ``predicted`` has (index, predicted mask, true mask) of this rank's share,
    ``indices`` all images.
    """
    counter = Counter(source, indices, device, callbacks)
    share = len(indices[rank() :: world_size()])
    for index, mask, truth in Progress(predicted, description, total=share, unit="image"):
        assert truth is not None
        counter.add([index], mask[None], truth[None], [(truth.shape[0], truth.shape[1])])
    return counter.result()


def validation_batches(
    cfg: Config, source: Source, validation: Sequence[int], device: torch.device
) -> EvalBatches:
    """Return the batches of evaluations; images are padded as the predictor pads them."""
    whole = cfg.infer.size is None and cfg.infer.tile is None
    return EvalBatches(
        source,
        validation,
        labels=True,
        batch_size=cfg.infer.batch_size,
        workers=cfg.data.workers,
        pad=cfg.infer.pad or 1 if whole else 1,
        device=device,
    )
