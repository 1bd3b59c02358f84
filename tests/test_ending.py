"""How commands end: by any error, anywhere, within seconds, with the message last."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import plant
from test_reliability import CONFIG, arguments, free_port

import train
from segkit import command, distributed
from segkit.data.demo import draw_demo

WORKERS = {"data.workers": 2}
LIMIT = 10.0
"""Seconds within which all processes end after the message."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs are started: a configuration and a demo set of 20 images."""
    folder = tmp_path_factory.mktemp("work")
    draw_demo(folder / "demo", train=20, test=1, size=64)
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    return folder


def _as_command(
    folder: Path, output: Path, fault: tuple[str, str] | None, rank: int, ranks: int, port: int,
    words: list[str],
) -> None:  # fmt: skip
    """A process that has become ``train.py``; it writes to a FIFO."""
    handle = os.open(output, os.O_WRONLY)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    os.chdir(folder)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of workers, which inherit the fault
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    if fault is not None:
        plant(*fault, Path(f"{output}.struck"))
    sys.argv = ["train.py", *words]
    command.run(train.main)


class Command:
    """A forked ``train.py``, which starts at once, and what it prints.

    The FIFO that it writes to ends with the last process that holds it, a worker included.
    """

    def __init__(
        self, folder: Path, name: str, words: list[str], fault: tuple[str, str] | None = None,
        *, rank: int = 0, ranks: int = 1, port: int = 0,
    ) -> None:  # fmt: skip
        output = folder / f"{name}.{rank}.out"
        os.mkfifo(output)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["faults"])
        self.process = context.Process(
            target=_as_command, args=(folder, output, fault, rank, ranks, port, words)
        )
        self.process.start()
        self._output = output.open()

    def end(self) -> tuple[int | None, list[str]]:
        """Exit code and printed lines, once all processes have ended within the limit."""
        lines, seen = [], None
        alarm = threading.Timer(100, self.process.kill)  # a hang must not last
        alarm.start()
        for line in self._output:
            lines.append(line.rstrip("\n"))
            seen = time.monotonic()
        alarm.cancel()
        self.process.join(LIMIT)
        assert seen is not None, self.process.exitcode
        assert time.monotonic() - seen < LIMIT, lines
        return self.process.exitcode, lines


QUICK = [
    ("memory", "step", "CUDA is out of memory (2.00 GiB more were needed): "),
    ("kill", "worker", "DataLoader worker (pid"),
    ("bug", "tracker", "this is a bug, of segkit or of a package: KeyError: 'planted'"),
]
SLOW = [
    ("raise", "start", "planted in start"),
    ("raise", "step", "planted in step"),
    ("bug", "step", "this is a bug, of segkit or of a package: KeyError: 'planted'"),
    ("raise", "evaluation", "planted in evaluation"),
    ("damage", "image", "planted.png is damaged"),
    ("host memory", "step", "the machine is out of memory (1099511627776 bytes more were needed)"),
    ("memory", "evaluation", "CUDA is out of memory (2.00 GiB more were needed): in an evaluation"),
    ("raise", "save", "planted in save"),
    ("bug", "page", "this is a bug, of segkit or of a package: KeyError: 'planted'"),
    ("bug", "worker", "this is a bug, of segkit or of a package: KeyError: "),
    ("host memory", "worker", "the machine is out of memory"),
]


@pytest.mark.parametrize(
    ("kind", "phase", "sentence"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_an_error_anywhere_ends_all_processes(
    folder: Path, kind: str, phase: str, sentence: str
) -> None:
    name = f"{kind}-{phase}".replace(" ", "-")
    words = arguments(f"runs/{name}", {**WORKERS, "track.trackers": ["csv"]})
    code, lines = Command(folder, name, words, (kind, phase)).end()
    assert code == 1
    assert lines[-1].startswith(sentence), lines
    is_bug = "this is a bug" in sentence
    assert ("Traceback (most recent call last):" in lines) == is_bug, lines
    assert is_bug or len(lines) == 1
    if "memory" in kind and phase != "worker":
        for word in (
            "--resume",
            "infer.batch_size" if phase == "evaluation" else "train.recompute",
        ):
            assert word in lines[-1]


def both(
    folder: Path, name: str, fault: tuple[str, str], **settings: Any
) -> list[tuple[int | None, list[str]]]:
    """What two ranks end with, the second with a fault."""
    words, port = arguments(f"runs/{name}", {**WORKERS, **settings}), free_port()
    started = [
        Command(folder, name, words, fault if rank else None, rank=rank, ranks=2, port=port)
        for rank in range(2)
    ]
    return [one.end() for one in reversed(started)]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["start", "step", "evaluation"])
def test_an_error_of_one_rank_ends_the_other(folder: Path, phase: str) -> None:
    (code, lines), (other_code, others) = both(folder, f"raise-{phase}-1", ("raise", phase))
    assert (code, lines[-1]) == (1, f"[rank 1] planted in {phase}")
    assert other_code == 1
    assert len(others) == 1
    assert others[0].startswith("another rank ended, or did not answer")


def _lose_rank(rank: int, world_size: int, port: int, kind: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with distributed.session("cpu", on_lost=partial(os._exit, 7)):
        if rank == 1:
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            return
        time.sleep(60 if kind == "killed" else 3)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [("killed", 7), ("ended", 0)])
def test_a_rank_notices_without_communication_that_another_was_killed(kind: str, code: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults"])
    port = free_port()
    ranks = [context.Process(target=_lose_rank, args=(rank, 3, port, kind)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(50)
    assert [process.exitcode for process in ranks] == [
        code, -signal.SIGKILL if kind == "killed" else 0, code,
    ]  # fmt: skip
