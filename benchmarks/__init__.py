"""Ratios against other projects, measured in one process by taking turns; never a test."""

import argparse
import ctypes
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One comparison.

    Args:
        name: What was done.
        peer: Who else did it.
        peer_version: Of the peer.
        ratio: The peer's time, or memory, over ours: above 1 is better.
        spread: Lower and upper quartile of the ratio over the rounds.
        threads: That each side was given.
    """

    name: str
    peer: str
    peer_version: str
    ratio: float
    spread: tuple[float, float]
    threads: int


def take_turns(
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    rounds: int,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, tuple[float, float]]:
    """The median of peer's time over ours, and its quartiles, a ratio a round.

    Who is first changes with each round, so that what else the machine does falls on both alike.
    For work of one thread, ``time.process_time`` as the clock leaves out waiting for a core.
    """
    ratios = []
    for turn in range(-warm_up, rounds):
        pair = (ours, peer) if turn % 2 else (peer, ours)
        times = {side: _seconds(side, clock) for side in pair}
        if turn >= 0:
            ratios.append(times[peer] / times[ours])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, (low, high)


def _seconds(function: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    function()
    return clock() - start


def peak_memory(work: Callable[..., object], *arguments: object) -> float:
    """MiB that a call adds at its peak to a fresh process that has made one such call (Linux)."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (work, arguments))


def _peak(work: Callable[..., object], arguments: tuple) -> float:
    work(*arguments)
    ctypes.CDLL(None).malloc_trim(0)  # or the call finds what the first one freed
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    work(*arguments)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def arguments(description: str) -> argparse.ArgumentParser:
    """The parser every benchmark starts from."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one line of JSON a figure")
    parser.add_argument("--rounds", type=int, default=25, help="turns each side takes")
    return parser


def show(figures: Iterable[Figure], *, as_json: bool) -> None:
    """Print figures as they come."""
    for figure in figures:
        if as_json:
            print(json.dumps(asdict(figure)), flush=True)
        else:
            low, high = figure.spread
            peer = f"{figure.peer} {figure.peer_version}"
            print(
                f"{figure.name:<44}{peer:<24}{figure.ratio:6.2f}x  ({low:.2f} to {high:.2f})",
                flush=True,
            )
