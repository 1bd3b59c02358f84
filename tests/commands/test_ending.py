"""Commands end within seconds after any error anywhere, with the message last."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import plant
from test_reliability import CONFIG, HERE, arguments, free_port, torchrun

from segkit import train
from segkit.commands import console
from segkit.core import checkpoint, distributed
from segkit.core.errors import SegkitError
from segkit.core.run import Run
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
    os.setpgid(0, 0)
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
    console.run(train.main)


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
        """Exit code and printed lines.

        All processes must end within the limit: of the message, or of now if there is none.
        """
        lines: list[str] = []
        seen = time.monotonic()
        alarm = threading.Timer(100, self.process.kill)  # a hang must not last
        alarm.start()
        for line in self._output:
            lines.append(line.rstrip("\n"))
            seen = time.monotonic()
        alarm.cancel()
        self.process.join(LIMIT)
        assert time.monotonic() - seen < LIMIT, lines
        return self.process.exitcode, lines


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 90
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
    assert not list((folder / "runs" / name).rglob(".*.writing"))
    is_bug = "this is a bug" in sentence
    assert ("Traceback (most recent call last):" in lines) == is_bug, lines
    assert is_bug or len(lines) == 1
    if "memory" in kind and phase != "worker":
        for word in (
            "--resume",
            "infer.batch_size" if phase == "evaluation" else "train.recompute",
        ):
            assert word in lines[-1]


@pytest.mark.slow
def test_sigterm_to_workers_too_ends_a_training_saved(folder: Path) -> None:
    """As Slurm sends it: to every process of the job."""
    words = arguments("runs/term", {**WORKERS, "train.epochs": 500})
    started = Command(folder, "term", words)
    wait_for(folder / "runs/term/fold0/last.pt")
    assert started.process.pid is not None
    os.killpg(started.process.pid, signal.SIGTERM)
    assert started.end() == (0, [])
    steps = [event["step"] for event in Run(folder / "runs/term").events()]
    assert weights_step(folder / "runs/term") == steps[-1] < 1000


def weights_step(run: Path) -> int:
    return checkpoint.load(run / "fold0/last.pt")["step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_second_signal_ends_a_training_at_once(folder: Path, number: int) -> None:
    name = f"twice{int(number)}"
    started = Command(folder, name, arguments(f"runs/{name}", WORKERS), ("sleep", "step"))
    wait_for(folder / f"{name}.0.out.struck")
    assert started.process.pid is not None
    for _ in range(2):
        os.killpg(started.process.pid, number)
        time.sleep(1)
    assert started.end() == (130, ["interrupted"])


@pytest.mark.slow
def test_workers_end_with_a_training_that_was_killed(folder: Path) -> None:
    started = Command(folder, "shot", arguments("runs/shot", WORKERS), ("sleep", "step"))
    wait_for(folder / "shot.0.out.struck")
    started.process.kill()
    assert started.end() == (-signal.SIGKILL, [])


@pytest.mark.slow
def test_a_tracker_that_cannot_be_closed_does_not_hold_the_end(folder: Path) -> None:
    words = arguments("runs/closing", {**WORKERS, "track.trackers": ["csv"]})
    code, lines = Command(folder, "closing", words, ("bug", "tracker that does not close")).end()
    assert code == 1
    assert lines[-1] == "this is a bug, of segkit or of a package: KeyError: 'planted'"


def both(
    folder: Path, name: str, fault: tuple[str, str], **settings: Any
) -> list[tuple[int | None, list[str]]]:
    """Return how two ranks end, the second with a fault."""
    words, port = arguments(f"runs/{name}", {**WORKERS, **settings}), free_port()
    started = [
        Command(folder, name, words, fault if rank else None, rank=rank, ranks=2, port=port)
        for rank in range(2)
    ]
    return [process.end() for process in reversed(started)]


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


@pytest.mark.slow
@pytest.mark.parametrize("fault", [("raise", "evaluation"), ("kill", "worker"), ("bug", "page")])
def test_an_error_of_one_rank_ends_torchrun(folder: Path, fault: tuple[str, str]) -> None:
    """Rank 0 fails, with workers; torchrun's report ends with the sentence."""
    name = "-".join(fault)
    words = ("--standalone", "--nproc-per-node=2", str(HERE / "faults.py"))
    options = arguments(f"runs/torchrun-{name}", WORKERS)
    process = torchrun(folder, *words, *fault, "0", f"{name}.raised", *options)
    assert process.stdout is not None
    lines: list[str] = []
    sentence, printed = "", 0.0
    for line in process.stdout:
        lines.append(line.strip())
        if line.startswith(("planted", "DataLoader worker", "this is a bug")) and not sentence:
            sentence, printed = line.strip(), time.monotonic()
    assert process.wait() != 0
    assert sentence, lines
    assert time.monotonic() - printed < LIMIT
    assert any(line.endswith(sentence) for line in lines[-3:]), lines


@pytest.mark.slow
def test_a_stopped_rank_ends_torchrun_after_the_timeout(folder: Path) -> None:
    """torchrun gives a rank that does not answer SIGTERM 30 seconds."""
    words = ("--standalone", "--nproc-per-node=2", str(HERE / "faults.py"))
    options = arguments("runs/stopped", {**WORKERS, "train.timeout": 0.3})
    process = torchrun(folder, *words, "stop", "step", "1", "stopped.raised", *options)
    wait_for(folder / "stopped.raised")
    since = time.monotonic()
    out, _ = process.communicate(timeout=150)
    assert time.monotonic() - since < 18 + 30 + LIMIT
    assert process.returncode != 0
    assert "another rank ended, or did not answer within train.timeout" in out


@pytest.mark.slow
def test_sigterm_to_torchrun_and_its_ranks_saves(folder: Path) -> None:
    """Each rank gets the signal twice: from whoever ends the job, and from torchrun."""
    words = ("--standalone", "--nproc-per-node=2", str(HERE.parent / "train.py"))
    options = arguments("runs/all-term", {**WORKERS, "train.epochs": 500, "train.save_every": 0})
    process = torchrun(folder, *words, *options, start_new_session=True)
    run = folder / "runs/all-term"
    wait_for(run / "fold0/last.pt")
    os.killpg(process.pid, signal.SIGTERM)
    since = time.monotonic()
    process.communicate(timeout=100)
    assert time.monotonic() - since < 2 * LIMIT
    steps = [event["step"] for event in Run(run).events() if event["event"] == "step"]
    assert weights_step(run) == steps[-1] < 1000


def test_output_goes_on_when_its_reader_is_gone() -> None:
    for unbuffered in (False, True):
        reader, writer = os.pipe()
        os.close(reader)
        stream = open(writer, "w", encoding="utf-8")  # noqa: SIM115
        stream.reconfigure(write_through=unbuffered)
        output = console._open_output(stream)
        print("lost " * 10000, file=output, flush=True)
        output.close()
        stream.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["train.py", "--help"],
        ["infer.py", "--help"],
        ["-m", "segkit", "weights", "--help"],
        ["-m", "segkit", "check", "--cfg", "tiny.json"],
    ],
)
def test_a_closed_pipe_is_no_traceback(folder: Path, words: list[str]) -> None:
    script = [str(HERE.parent / words[0]), *words[1:]] if words[0] != "-m" else words
    process = subprocess.Popen(
        [sys.executable, *script], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(), errors) == (0, "")


@pytest.mark.parametrize("name", ["banana", "meta", "cuda:7", "xpu", "cpu:x"])
def test_a_device_that_is_not_here_is_one_sentence(name: str) -> None:
    sentence = rf"device {name}: does not exist here.*expected one of"
    with pytest.raises(SegkitError, match=sentence), distributed.session(name):
        pass


def test_ranks_get_the_devices_of_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name, index in (("cuda", 1), ("cuda:0", 0)):
        with distributed.session(name) as device:
            assert device == torch.device("cuda", index)
    assert chosen == [1, 0]
    with distributed.session("cpu") as device:
        assert device == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    sentence = r"device cuda:2: .*at most 2 ranks"
    with pytest.raises(SegkitError, match=sentence), distributed.session("cuda"):
        pass


def test_a_training_leaves_signals_as_they_were() -> None:
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in numbers]
    with console.Stop() as stop:
        assert signal.getsignal(signal.SIGTERM) == stop._receive
    assert [signal.getsignal(number) for number in numbers] == before


BUG_WHILE_A_WORKER_ENDS = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
from segkit.commands import console

class Bug(Exception):
    def __str__(self):  # read while the error is reported
        os.kill(os.getpid(), signal.SIGCHLD)
        return "planted"

def report(*_):  # as torch's handler
    raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")

def main(_):
    signal.signal(signal.SIGCHLD, report)
    raise Bug

console.run(main)
"""


def test_a_worker_that_ends_during_the_report_of_an_error_changes_nothing() -> None:
    command = [sys.executable, "-c", BUG_WHILE_A_WORKER_ENDS, str(HERE.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    last = done.stderr.strip().splitlines()[-1]
    assert (done.returncode, last) == (1, "this is a bug, of segkit or of a package: Bug: planted")
