"""What being seen costs a training: its page, its pictures and every tracker, against none of them.

    python -m benchmarks.seeing [--json] [--rounds 5]

The first fold of the demo set, trained for half of its epochs each time; 0.98 or more means that
seeing costs at most 2 %. Weights & Biases is offline. What starting the trackers takes is counted,
and so weighs more here, in a minute, than in a training of hours. Times are of the processors,
those of the trackers' own processes with them, so that other work on the machine weighs little.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

import train
from benchmarks import Figure, arguments, show, take_turns

TRACKERS = '["csv", "tensorboard", {"name": "wandb", "mode": "offline"}]'


def seen(folder: Path, *settings: str) -> Callable[[], None]:
    """A training into a new run each time."""
    settings += (f"data.train.root={folder / 'demo'}", f"data.cache={folder / 'cache'}")
    settings += ("train.epochs=9",)
    options = [part for one in settings for part in ("--set", one)]
    turn = iter(range(10**9))

    def run() -> None:
        words = ("--cfg", "demo", "--folds", "0", "--quiet")
        train.main([*words, "--run-dir", str(folder / f"run{next(turn)}"), *options])

    return run


def unseen(run: Callable[[], None]) -> Callable[[], None]:
    """The same training without its page."""

    def bare() -> None:
        with mock.patch("train.write_run_page"), mock.patch("train.score_table"):
            run()

    return bare


def processors() -> float:
    """Seconds that this process and those it started and waited for have computed."""
    return sum(os.times()[:4])


def figures(rounds: int) -> Iterator[Figure]:
    """One ratio."""
    os.environ["WANDB_SILENT"] = "true"
    with tempfile.TemporaryDirectory() as root:
        ours = seen(Path(root, "seen"), f"track.trackers={TRACKERS}")
        peer = unseen(seen(Path(root, "unseen"), "track.images=0"))
        ratio, spread, *_ = take_turns(ours, peer, rounds=rounds, warm_up=1, clock=processors)
        yield Figure(
            "a training that is seen", "unseen", "", ratio, spread, torch.get_num_threads()
        )


if __name__ == "__main__":
    options = arguments(__doc__ or "", rounds=5).parse_args()
    show(figures(options.rounds), as_json=options.json)
