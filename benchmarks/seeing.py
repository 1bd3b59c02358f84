"""What being seen costs a training: its page, its pictures and every tracker.

    python -m benchmarks.seeing [--json] [--rounds 2]

``train.py --cfg demo``, all four folds. 0.98 or more means that seeing takes at most 2 %: it is the
share of a training's processor time that is left when what its page, its gallery and its trackers
take is left out. (Two trainings side by side differ by more than that by chance.) Counted are the
calls that show something, the start of the trackers and the import of their packages among them
(which weighs more here, in minutes, than in a training of hours), the threads that trackers
start, and the process of Weights & Biases, which is offline.
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
SHOWING: list[tuple[Any, str]] = [
    *((train, name) for name in ("record", "score_table", "write_run_page")),
    *((train.Gallery, name) for name in ("__init__", "add")),
    (tracking, "check"),
    *((tracking.Followers, name) for name in ("event", "pictures")),
]


class Meter:
    """Seconds that this thread has spent in the calls it was told to count, no call twice."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = False

    def count(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, its time counted."""

        def counted(*args: Any, **options: Any) -> Any:
            if self._inside:
                return call(*args, **options)
            self._inside, start = True, time.thread_time()
            try:
                return call(*args, **options)
            finally:
                self._inside = False
                self.seconds += time.thread_time() - start

        return counted


def background() -> float:
    """Seconds that the other threads of Python, those alive, have computed in all."""
    others = (one.ident for one in threading.enumerate() if one is not threading.main_thread())
    clocks = (time.pthread_getcpuclockid(ident) for ident in others if ident is not None)
    return sum(map(time.clock_gettime, clocks))


def children() -> float:
    """Seconds that processes which were started here, and have ended, have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def share(words: list[str]) -> float:
    """Of a training's processor time, on one thread, what is left when seeing is left out."""
    torch.set_num_threads(1)
    meter = Meter()
    close = tracking.Followers.close

    def last_words(self: tracking.Followers) -> None:  # of threads that outlive it
        meter.seconds += background()
        meter.count(close)(self)

    with ExitStack() as patches:
        for owner, name in SHOWING:
            counted = meter.count(getattr(owner, name))
            patches.enter_context(mock.patch.object(owner, name, counted))
        patches.enter_context(mock.patch.object(tracking.Followers, "close", last_words))
        before = time.process_time()
        train.main(words)
        trained = time.process_time() - before
    importlib.import_module("wandb").teardown()  # ends its process; imported by the training
    return (trained - meter.seconds) / (trained + children())


def figures(rounds: int) -> Iterator[Figure]:
    """One share."""
    os.environ["WANDB_SILENT"] = "true"
    with tempfile.TemporaryDirectory() as root:
        settings = [f"data.train.root={root}/demo", f"data.cache={root}/cache"]
        settings += [f"track.trackers={TRACKERS}", "data.workers=0"]
        options = [part for one in settings for part in ("--set", one)]
        words = ["--cfg", "demo", "--quiet", *options]
        shares = []
        for i in range(rounds):  # each in a process of its own, which imports the trackers anew
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                run = [*words, "--run-dir", str(Path(root, f"run{i}"))]
                shares.append(pool.submit(share, run).result())
    low, middle, high = statistics.quantiles(shares, n=4)
    yield Figure("a training that is seen", "itself, unseen", "", middle, (low, high), 1)


if __name__ == "__main__":
    options = arguments(__doc__ or "", rounds=2).parse_args()
    show(figures(options.rounds), as_json=options.json)
