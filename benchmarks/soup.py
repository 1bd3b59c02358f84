"""Soups against reading their ingredients: time, and memory in state dicts.

    python -m benchmarks.soup [--json] [--rounds 5] [--threads 2]

Ten checkpoints of about a hundred million parameters each, 4 GB in total, in the system's cache.
The peers are reading with ``segkit.core.checkpoint.load``, which verifies the SHA-256, and with
``torch.load``, which does not. GB/s are the bytes of the files in a side's time, and the rate of
reading without keeping the bytes. Memory is compared with that of two state dicts.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import Figure, arguments, best_of, peak_memory, show, take_turns
from segkit.core import checkpoint
from segkit.inference import soup
from segkit.models.segmenter import build_model

INGREDIENTS = 10
MODEL = "resnet101", {"name": "upernet", "width": 640}


def write(folder: Path) -> list[Path]:
    """Write checkpoints with different weights."""
    paths = [folder / f"{seed}.pt" for seed in range(INGREDIENTS)]
    model = build_model(*MODEL, num_classes=11)
    for path in paths:
        for parameter in model.parameters():
            parameter.data *= 1.001
        about = {"classes": ["a"], "init": "same", "trained_on": []}
        checkpoint.save({"model": model.state_dict(), **about}, path)
    return paths


def mix(paths: Sequence[Path]) -> object:
    """Return this library's soup."""
    return soup.uniform(paths)


def verified(paths: Sequence[Path]) -> None:
    """Load each state dict, and compare its digest."""
    for path in paths:
        checkpoint.load(path)


def plain(paths: Sequence[Path]) -> None:
    """Load each state dict."""
    for path in paths:
        torch.load(path, weights_only=True)


def scan(paths: Sequence[Path]) -> None:
    """Read every byte."""
    block = memoryview(bytearray(1 << 22))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def figures(rounds: int, threads: int) -> Iterator[Figure]:
    """Yield time against both ways of reading, then memory."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder))
        size = sum(path.stat().st_size for path in paths) / 1e9
        name = f"uniform soup of {INGREDIENTS}"
        rate = size / best_of(lambda: scan(paths), times=3)
        for peer, read in {"reading, verified": verified, "reading, torch.load": plain}.items():
            turns = take_turns(
                lambda: mix(paths), lambda read=read: read(paths), rounds=rounds, warm_up=1
            )
            reached = size / turns.ours, size / turns.theirs, rate
            yield Figure(name, peer, torch.__version__, *turns[:2], threads, *reached, "GB/s")
        used = peak_memory(mix, paths)
        two = 2 * paths[0].stat().st_size / 2**20
        ratio = two / used
        yield Figure(
            f"memory, {name}", "two state dicts", "", ratio, (ratio,) * 2, threads, used, two,
            unit="MiB",
        )  # fmt: skip


if __name__ == "__main__":
    options = arguments(__doc__ or "", rounds=5).parse_args()
    show(figures(options.rounds, options.threads), as_json=options.json)
