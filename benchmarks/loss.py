"""Losses against segmentation_models.pytorch's, forward and backward: time and peak memory.

    python -m benchmarks.loss [--json] [--rounds 25] [--threads 2]

Logits (4, 11, 512, 512) of fp32, every pixel labelled. Each task is the sum of two losses. The
script fails if both sides compute the same loss and their values in float64 differ. (In fp32 theirs
is off by 1e-5, because its Dice adds millions of numbers in sequence.) GB/s are the bytes of the
logits and of their gradient in a side's time, and the rate at which memory is copied.
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
from segkit.training.losses import build_loss

SHAPE = (4, 11, 512, 512)

TASKS = {
    "cross-entropy + Dice": ["cross_entropy", "dice"],
    "one-vs-rest sigmoid focal + Dice": ["sigmoid_focal", "dice"],
    "softmax focal + Dice (theirs sigmoid)": ["focal", "dice"],
}

Side = Callable[[Tensor, Tensor], Tensor]


def batch(device: str = "cpu", size: int = SHAPE[2]) -> tuple[Tensor, Tensor]:
    """Return logits that require a gradient, and a target."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*SHAPE[:2], size, size, generator=generator)
    target = torch.randint(SHAPE[1], (SHAPE[0], size, size), generator=generator)
    return logits.to(device).requires_grad_(), target.to(device)


def segkit(task: str) -> Side:
    """Return this library's side."""
    criterion = build_loss(TASKS[task], num_classes=SHAPE[1])
    return lambda logits, target: criterion(logits, target)


def smp(task: str) -> Side:
    """Return segmentation_models.pytorch's side; its users take PyTorch's cross-entropy."""
    from segmentation_models_pytorch import losses

    dice = losses.DiceLoss("multiclass")
    other = losses.FocalLoss("multiclass") if "focal" in task else torch.nn.CrossEntropyLoss()
    return lambda logits, target: other(logits, target) + dice(logits, target)


def forward_and_backward(side: Side, logits: Tensor, target: Tensor) -> Tensor:
    """Return the loss after forward and backward."""
    logits.grad = None
    loss = side(logits, target)
    loss.backward()
    return loss.detach()


def memory(make: Callable[[str], Side], task: str, *where: Any) -> None:
    """Make a batch and run a side on it; a new process measures its memory."""
    forward_and_backward(make(task), *batch(*where))


def figures(
    rounds: int, threads: int, device: str = "cpu", size: int = SHAPE[2]
) -> Iterator[Figure]:
    """Yield for each task the time, then the memory in addition to logits and target."""
    torch.set_num_threads(threads)
    package = "segmentation-models-pytorch"
    if not (version := version_of(package)):
        return
    logits, target = batch(device, size)
    rate, moved = copy_rate(device), 2 * logits.nbytes / 1e9
    start = peak_memory(batch, device, size, device=device)
    for task in TASKS:
        ours, theirs = segkit(task), smp(task)
        if "theirs" not in task:
            exact = logits.detach().double()
            torch.testing.assert_close(ours(exact, target), theirs(exact, target))
        turns = take_turns(
            lambda side=ours: forward_and_backward(side, logits, target),
            lambda side=theirs: forward_and_backward(side, logits, target),
            rounds=rounds,
            clock=clock_for(threads, device),
        )
        reached = moved / turns.ours, moved / turns.theirs, rate
        yield Figure(task, package, version, *turns[:2], threads, *reached, "GB/s")
        used = [
            peak_memory(memory, side, task, device, size, device=device) - start
            for side in (segkit, smp)
        ]
        ratio = used[1] / used[0]
        yield Figure(
            f"memory, {task}", package, version, ratio, (ratio, ratio), threads, *used, unit="MiB"
        )


if __name__ == "__main__":
    options = arguments(__doc__ or "").parse_args()
    show(figures(options.rounds, options.threads), as_json=options.json)
