"""Logits to a confusion matrix against torchmetrics, and against a plain argmax and bincount.

    python -m benchmarks.evaluation [--json] [--rounds 25] [--threads 2]

Logits (8, 11, 512, 512) of fp32. torchmetrics' multiclass Jaccard index is updated with logits; its
mean IoU averages over images and is another quantity. The script fails if the three matrices
differ. Memory is in addition to the inputs; an int64 map of classes takes 16 MiB. GB/s are the
bytes of the logits in a side's time, and the rate at which memory is copied.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import (
    Figure,
    arguments,
    clock_for,
    copy_rate,
    peak_memory,
    show,
    take_turns,
    version_of,
)
from segkit.training.metrics import confusion_matrix

SHAPE = (8, 11, 512, 512)

Side = Callable[[Tensor, Tensor], Tensor]


def batch(device: str = "cpu", size: int = SHAPE[2]) -> tuple[Tensor, Tensor]:
    """Return logits, and masks as the loader yields them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*SHAPE[:2], size, size, generator=generator)
    shape = SHAPE[0], size, size
    target = torch.randint(SHAPE[1], shape, generator=generator, dtype=torch.uint8)
    return logits.to(device), target.to(device)


def segkit(logits: Tensor, target: Tensor) -> Tensor:
    """Return this library's matrix."""
    return confusion_matrix(logits, target, SHAPE[1])


def torchmetrics(logits: Tensor, target: Tensor) -> Tensor:
    """Return torchmetrics' matrix, without its checks of the input."""
    from torchmetrics import JaccardIndex

    metric = JaccardIndex("multiclass", num_classes=SHAPE[1], validate_args=False)
    metric = metric.to(logits.device)
    metric.update(logits, target)
    return metric.confmat


def argmax_and_bincount(logits: Tensor, target: Tensor) -> Tensor:
    """Return the matrix as it is computed by hand."""
    codes = target.long() * SHAPE[1] + logits.argmax(1)
    return torch.bincount(codes.flatten(), minlength=SHAPE[1] ** 2).view(SHAPE[1], SHAPE[1])


def memory(side: Side, *where: Any) -> None:
    """Make a batch and run a side on it; a new process measures its memory."""
    side(*batch(*where))


def figures(
    rounds: int, threads: int, device: str = "cpu", size: int = SHAPE[2]
) -> Iterator[Figure]:
    """Yield time and memory against each peer."""
    torch.set_num_threads(threads)
    logits, target = batch(device, size)
    rate, read = copy_rate(device), logits.nbytes / 1e9
    start = peak_memory(batch, device, size, device=device)
    mine = peak_memory(memory, segkit, device, size, device=device) - start
    peers = {"torchmetrics": torchmetrics, "argmax and bincount": argmax_and_bincount}
    for name, peer in peers.items():
        version = version_of(name) if peer is torchmetrics else torch.__version__
        if not version:
            continue
        assert torch.equal(segkit(logits, target), peer(logits, target))
        turns = take_turns(
            lambda: segkit(logits, target),
            lambda peer=peer: peer(logits, target),
            rounds=rounds,
            clock=clock_for(threads, device),
        )
        reached = read / turns.ours, read / turns.theirs, rate
        task = "logits to confusion matrix"
        yield Figure(task, name, version, *turns[:2], threads, *reached, "GB/s")
        used = peak_memory(memory, peer, device, size, device=device) - start
        ratio = used / mine
        yield Figure(
            f"memory, {task}", name, version, ratio, (ratio, ratio), threads, mine, used, unit="MiB"
        )


if __name__ == "__main__":
    options = arguments(__doc__ or "").parse_args()
    show(figures(options.rounds, options.threads), as_json=options.json)
