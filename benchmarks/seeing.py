"""Time that a training spends on its page, its pictures and its trackers.

    python -m benchmarks.seeing [--json] [--rounds 2]

``train.py --cfg demo``, all four folds. The figure is the share of a training's processor time that
is not spent on page, gallery and trackers; 0.98 or more means at most 2 %. (Two trainings differ by
more than that by chance.) Counted are the calls that show something, with the start of the trackers
and the import of their packages (a larger share here than in a training of hours), the threads that
trackers start, and the process of Weights & Biases, which is offline.
"""

import importlib
import os
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import Figure, arguments, show
from segkit import train
from segkit.training import tracking

TRACKERS = '["csv", "tensorboard", {"name": "wandb", "mode": "offline"}]'
BACKGROUND = "background"
"""Name of the thread that draws the page: the functions that it calls are counted."""
SHOWING: list[tuple[Any, str]] = [
    *((train, name) for name in ("record", "score_table", "write_run_page")),
    *((train.Gallery, name) for name in ("__init__", "add")),
    (tracking, "check"),
    *((tracking.Trackers, name) for name in ("event", "pictures")),
]


class Meter:
    """Sums the seconds that threads spend in some functions; nested calls count once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._local = threading.local()

    def count(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call`` with its time counted."""

        def counted(*args: Any, **options: Any) -> Any:
            if getattr(self._local, "inside", False):
                return call(*args, **options)
            self._local.inside, start = True, time.thread_time()
            try:
                return call(*args, **options)
            finally:
                self._local.inside = False
                self.seconds += time.thread_time() - start

        return counted


def background() -> float:
    """Return the processor time of the trackers' living threads, in seconds."""
    others = (
        thread.ident
        for thread in threading.enumerate()
        if thread is not threading.main_thread() and not thread.name.startswith(BACKGROUND)
    )
    clocks = (time.pthread_getcpuclockid(ident) for ident in others if ident is not None)
    return sum(map(time.clock_gettime, clocks))


def children() -> float:
    """Return the processor time of child processes that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def share(words: list[str]) -> float:
    """Return the share of a training's processor time that is not spent on showing it."""
    torch.set_num_threads(1)
    meter = Meter()
    close = tracking.Trackers.close

    def last_words(self: tracking.Trackers) -> None:  # of threads that outlive it
        meter.seconds += background()
        meter.count(close)(self)

    with ExitStack() as patches:
        for owner, name in SHOWING:
            counted = meter.count(getattr(owner, name))
            patches.enter_context(mock.patch.object(owner, name, counted))
        patches.enter_context(mock.patch.object(tracking.Trackers, "close", last_words))
        before = time.process_time()
        train.main(words)
        trained = time.process_time() - before
    importlib.import_module("wandb").teardown()  # ends its process; imported by the training
    return (trained - meter.seconds) / (trained + children())


def figures(rounds: int) -> Iterator[Figure]:
    """Yield the share."""
    os.environ["WANDB_SILENT"] = "true"
    with tempfile.TemporaryDirectory() as root:
        settings = [f"data.train.root={root}/demo", f"data.cache={root}/cache"]
        settings += [f"track.trackers={TRACKERS}", "data.workers=0"]
        options = [part for setting in settings for part in ("--set", setting)]
        words = ["--cfg", "demo", "--quiet", *options]
        shares = []
        for i in range(rounds):  # each in its own process, which imports the trackers
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                run = [*words, "--run-dir", str(Path(root, f"run{i}"))]
                shares.append(pool.submit(share, run).result())
    low, middle, high = statistics.quantiles(shares, n=4)
    yield Figure("with page and trackers", "without them", "", middle, (low, high), 1)


if __name__ == "__main__":
    options = arguments(__doc__ or "", rounds=2).parse_args()
    show(figures(options.rounds), as_json=options.json)
