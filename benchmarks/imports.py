"""Start-up time: a new interpreter that imports segkit or prints help, against torch's own.

    python -m benchmarks.imports [--json] [--rounds 15]

The peer is a new interpreter that imports torch and torchvision. Times are of the processor, and
files are in the system's cache.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
import torchvision

from benchmarks import Figure, arguments, show, take_turns

SIDES = {
    "import segkit": ["-c", "import segkit"],
    "train.py --help": ["train.py", "--help"],
    "infer.py --help": ["infer.py", "--help"],
}
PEER = ["-c", "import torch, torchvision"]


def started(command: list[str]) -> Callable[[], object]:
    """Return a function that runs a process."""
    return lambda: subprocess.run([sys.executable, *command], check=True, capture_output=True)


def childrens() -> float:
    """Return the processor time of finished child processes, in seconds."""
    times = os.times()
    return times.children_user + times.children_system


def figures(rounds: int, threads: int) -> Iterator[Figure]:
    """Yield the time of each command."""
    version = f"{torch.__version__}, {torchvision.__version__}"
    for name, command in SIDES.items():
        ours, theirs = started(command), started(PEER)
        turns = take_turns(ours, theirs, rounds=rounds, warm_up=1, clock=childrens)
        reached = turns.ours, turns.theirs
        yield Figure(name, "torch, torchvision", version, *turns[:2], threads, *reached, unit="s")


if __name__ == "__main__":
    options = arguments(__doc__ or "", rounds=15).parse_args()
    show(figures(options.rounds, options.threads), as_json=options.json)
