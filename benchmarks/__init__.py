"""Ratios against other projects, measured by alternating in one process; never a test."""

import argparse
import ctypes
import importlib.metadata
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from segkit.training.step import autocast_dtype


@dataclass(frozen=True)
class Figure:
    """A comparison.

    Args:
        name: The task.
        peer: The other project.
        peer_version: Its version.
        ratio: The peer's time, or memory, over ours: above 1 is better.
        spread: Lower and upper quartile of the ratio over the rounds.
        threads: Number of threads of each side.
        ours: Our result, in ``unit``.
        theirs: The peer's result.
        limit: The machine's own rate, where it was measured.
        unit: Unit of these three.
    """

    name: str
    peer: str
    peer_version: str
    ratio: float
    spread: tuple[float, float]
    threads: int
    ours: float | None = None
    theirs: float | None = None
    limit: float | None = None
    unit: str = ""


class Turns(NamedTuple):
    """The median ratio of some rounds, its quartiles, and the medians of both sides' seconds."""

    ratio: float
    spread: tuple[float, float]
    ours: float
    theirs: float


def alternate(
    sides: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of each side in each round.

    The order is reversed in every round, so that other work of the machine affects both sides.
    For work of one thread, ``time.process_time`` as the clock leaves out waiting for a core (see
    :func:`clock_for`). Work that a side leaves to a GPU is waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-warm_up, rounds):
        for name in list(sides) if turn % 2 else reversed(list(sides)):
            took = _seconds(sides[name], clock)
            if turn >= 0:
                seconds[name].append(took)
    return seconds


def ratio_of(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of the rounds' ratios ``theirs / ours``, and its quartiles."""
    ratios = [peer / mine for peer, mine in zip(theirs, ours, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def take_turns(
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    rounds: int,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Turns:
    """Return the ratio of the peer's time over ours; see :func:`alternate`."""
    sides = {"ours": ours, "peer": peer}
    seconds = alternate(sides, rounds=rounds, warm_up=warm_up, clock=clock)
    middle, low, high = ratio_of(seconds["peer"], seconds["ours"])
    medians = (statistics.median(seconds[side]) for side in sides)
    return Turns(middle, (low, high), *medians)


def clock_for(threads: int, device: str = "cpu") -> Callable[[], float]:
    """Return the clock of the processor's time for work of one thread, else the wall clock."""
    return time.process_time if threads == 1 and device == "cpu" else time.perf_counter


def _seconds(function: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def version_of(package: str) -> str | None:
    """Return the version of a peer, or None, with a sentence on stderr, if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        print(f"missing: {package}; install it with: pip install '.[bench]'", file=sys.stderr)
        return None


def bf16(device: str = "cpu") -> torch.dtype | None:
    """Return ``torch.bfloat16``, or None, with a sentence on stderr, if it would be emulated."""
    if autocast_dtype("auto", torch.device(device)) is torch.bfloat16:
        return torch.bfloat16
    print(f"{device} has no bf16 arithmetic; its rows are left out", file=sys.stderr)
    return None


def matmul_rate(dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """Return the GFLOP/s of a product of large square matrices."""
    side = 2048 if device == "cpu" else 8192
    x = torch.ones(side, side, dtype=dtype, device=device)
    return 2 * side**3 / 1e9 / best_of(lambda: x @ x)


def copy_rate(device: str = "cpu") -> float:
    """Return the GB/s read and written by copying a tensor much larger than a cache."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / 1e9 / best_of(lambda: target.copy_(source))


def best_of(function: Callable[[], object], times: int = 7) -> float:
    """Return the smallest time of some calls, in seconds."""
    clock = clock_for(torch.get_num_threads(), "cuda" if torch.cuda.is_available() else "cpu")
    return min(_seconds(function, clock) for _ in range(times))


def peak_memory(work: Callable[..., object], *arguments: object, device: str = "cpu") -> float:
    """Return the MiB that a call adds at its peak; on the CPU, its second call in a new process."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work(*arguments)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (work, arguments))


def _peak(work: Callable[..., object], arguments: tuple) -> float:
    work(*arguments)
    ctypes.CDLL(None).malloc_trim(0)  # else the call reuses memory that the first one freed
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    work(*arguments)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def arguments(description: str, *, rounds: int = 25) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON per figure")
    parser.add_argument("--rounds", type=int, default=rounds, help="measurements of each side")
    parser.add_argument("--threads", type=int, default=2, help="of each side, where they can vary")
    return parser


def show(figures: Iterable[Figure], *, as_json: bool) -> None:
    """Print figures as they come."""
    for figure in figures:
        if as_json:
            print(json.dumps(asdict(figure)), flush=True)
        else:
            low, high = figure.spread
            peer = f"{figure.peer} {figure.peer_version}"
            reached = "" if figure.ours is None else f"  {figure.ours:.4g}"
            if figure.theirs is not None:
                reached += f" to {figure.theirs:.4g}"
            if figure.limit is not None:
                reached += f" of {figure.limit:.4g}"
            print(
                f"{figure.name:<56} {peer:<38}{figure.ratio:6.2f}x  ({low:.2f} to {high:.2f})"
                f"{reached} {figure.unit}".rstrip(),
                flush=True,
            )
