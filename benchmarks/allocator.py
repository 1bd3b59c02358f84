"""Training steps in a process that keeps freed memory, against one that returns it (glibc).

    python -m benchmarks.allocator [--json] [--rounds 7] [--threads 2] [--case NAME ...]
        [--size 256] [--amp] [--inference]

``--inference``: forward passes of ``benchmarks.inference`` in place of steps.

The setting is one of the whole process, so each side is a process of its own; they alternate. See
``segkit.core.backend.keep_freed_memory``. The last two figures are the peaks of both in MiB.
"""

import multiprocessing
import resource
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import torch

import segkit
from benchmarks import Figure, alternate, ratio_of, show
from benchmarks.inference import our_pass
from benchmarks.step import CASES, chosen, model_arguments, our_step
from segkit.core.backend import keep_freed_memory


def serve(
    pipe: Connection,
    keep: bool,
    build: Callable[..., Callable[[], object]],
    threads: int,
    name: str,
    size: int,
    amp: bool,
) -> None:
    """Run a step whenever the other end asks for one; at the end, send the peak in MiB."""
    if keep:
        keep_freed_memory()
    torch.set_num_threads(threads)
    step = build(CASES[name], size, torch.bfloat16 if amp else None, "cpu")
    while pipe.recv():
        step()
        pipe.send(True)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


class Side:
    """A process that runs steps."""

    def __init__(self, keep: bool, *settings: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, keep, *settings))
        self.process.start()

    def step(self) -> None:
        self.pipe.send(True)
        self.pipe.recv()

    def end(self) -> float:
        """Return the peak in MiB."""
        self.pipe.send(False)
        peak: float = self.pipe.recv()
        self.process.join()
        return peak


def figures(
    rounds: int,
    threads: int,
    *,
    names: list[str],
    size: int,
    amp: torch.dtype | None,
    inference: bool,
) -> Iterator[Figure]:
    """Yield each model's step or pass."""
    for name in names:
        settings = our_pass if inference else our_step, threads, name, size, amp is not None
        sides = {"keeping": Side(True, *settings), "returning": Side(False, *settings)}
        steps = {keeps: side.step for keeps, side in sides.items()}
        seconds = alternate(steps, rounds=rounds, warm_up=2)
        ratio, low, high = ratio_of(seconds["returning"], seconds["keeping"])
        peaks = [side.end() for side in sides.values()]
        about = f"{name}, {size}, {'bf16' if amp else 'fp32'}"
        yield Figure(
            about, "returning", segkit.__version__, ratio, (low, high), threads, *peaks, unit="MiB"
        )


if __name__ == "__main__":
    parser = model_arguments(__doc__)
    parser.set_defaults(rounds=7)
    parser.add_argument("--inference", action="store_true", help="forward passes, not steps")
    options = parser.parse_args()
    settings = {**chosen(options), "inference": options.inference}
    show(figures(options.rounds, options.threads, **settings), as_json=options.json)
