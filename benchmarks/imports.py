"""What starting costs: a fresh interpreter that imports segkit, or helps, against torch's own.

    python -m benchmarks.imports [--json] [--rounds 15]

The peer is a fresh interpreter that imports torch and torchvision. Times are of the processor, and
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
    """A process from its start to its end."""
    return lambda: subprocess.run([sys.executable, *command], check=True, capture_output=True)


def childrens() -> float:
    """Seconds of the processor that finished child processes took."""
    times = os.times()
    return times.children_user + times.children_system


def figures(rounds: int, threads: int) -> Iterator[Figure]:
    """Each command."""
    version = f"{torch.__version__}, {torchvision.__version__}"
    for name, command in SIDES.items():
        ours, theirs = started(command), started(PEER)
        turns = take_turns(ours, theirs, rounds=rounds, warm_up=1, clock=childrens)
        reached = turns.ours, turns.theirs
        yield Figure(name, "torch, torchvision", version, *turns[:2], threads, *reached, unit="s")


if __name__ == "__main__":
    options = arguments(__doc__ or "", rounds=15).parse_args()
    show(figures(options.rounds, options.threads), as_json=options.json)
