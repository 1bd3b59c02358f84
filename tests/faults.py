"""train.py with a fault planted: ``faults.py KIND PHASE RANK MARKER [arguments of train.py]``.

KIND is ``kill`` or ``stop`` (a signal), ``sleep``, or one of ERRORS. The fault strikes once: MARKER
is a file that says it has.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from segkit import train
from segkit.commands import console
from segkit.core import files
from segkit.core.errors import DataError, SegkitError
from segkit.data.loader import EvalImages, TrainImages
from segkit.training import fold_checkpoints, tracking

PHASES: dict[str, tuple[Any, str, int]] = {
    "start": (fold_checkpoints, "build_training", 1),
    "step": (train, "train_step", 3),
    "evaluation": (train, "evaluate", 1),
    "save": (files, "flush", 2),  # of the first epoch's last.pt: rank 0 has written its draft
    "page": (train, "write_run_page", 1),
    "tracker": (tracking.CSVTracker, "event", 2),
    "tracker that does not close": (tracking.CSVTracker, "event", 2),
    "worker": (TrainImages, "__getitem__", 2),
    "image": (EvalImages, "__getitem__", 1),
}
"""Where each phase is met, and at which call of it the fault strikes."""

ERRORS: dict[str, Exception] = {
    "damage": DataError("planted.png is damaged"),
    "bug": KeyError("planted"),
    "memory": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
    ),
    "host memory": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 1099511627776 bytes. Error code 12 (Cannot allocate memory)"
    ),
}
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def plant(kind: str, phase: str, marker: Path) -> None:
    """Make a function fail at one of its calls, unless it has before."""
    owner, name, at = PHASES[phase]
    if phase == "save" and os.environ.get("RANK", "0") != "0":
        owner, name, at = console.Stop, "asked", 2  # the others wait there meanwhile
    if phase == "tracker that does not close":
        tracking.CSVTracker.close = lambda self: time.sleep(90)  # type: ignore[method-assign]
    whole: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def faulty(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and not marker.exists():
            marker.touch()
            if kind in SIGNALS:
                os.kill(os.getpid(), SIGNALS[kind])
            if kind == "sleep":
                for _ in range(900):  # one long sleep is deaf to a signal just before it
                    time.sleep(0.1)
                return whole(*args, **options)
            if kind == "damage":
                return ERRORS[kind]  # as a worker returns it
            raise SegkitError(f"planted in {phase}") if kind == "raise" else ERRORS[kind]
        return whole(*args, **options)

    setattr(owner, name, faulty)


if __name__ == "__main__":
    kind, phase, rank, marker, *rest = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        plant(kind, phase, Path(marker))
    sys.argv[1:] = rest
    console.run(train.main)
