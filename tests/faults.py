"""train.py with a fault planted: ``faults.py KIND PHASE RANK MARKER [arguments of train.py]``.

KIND is ``kill`` or ``raise``. The fault strikes once: MARKER is a file that says it has.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from segkit import command, files
from segkit.errors import SegkitError

PHASES: dict[str, tuple[Any, str, int]] = {
    "start": (train, "build_model", 2),  # the first call only checks the configuration
    "step": (train, "train_step", 3),
    "evaluation": (train, "evaluate", 1),
    "save": (files, "flush", 2),  # of the first epoch's last.pt: rank 0 has written its draft
}
"""Where each phase is met, and at which call of it the fault strikes."""


def plant(kind: str, phase: str, marker: Path) -> None:
    """Make a function fail at one of its calls, unless it has before."""
    owner, name, at = PHASES[phase]
    if phase == "save" and os.environ["RANK"] != "0":
        owner, name, at = train.Stop, "asked", 2  # the others wait there meanwhile
    whole: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def faulty(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and not marker.exists():
            marker.touch()
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise SegkitError(f"planted in {phase}")
        return whole(*args, **options)

    setattr(owner, name, faulty)


if __name__ == "__main__":
    kind, phase, rank, marker, *rest = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        plant(kind, phase, Path(marker))
    sys.argv[1:] = rest
    command.run(train.main)
