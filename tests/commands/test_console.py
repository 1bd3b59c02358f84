"""Output of commands: lines, progress bars and progress lines."""

import io

import pytest
from tqdm import tqdm

from segkit.commands import console
from segkit.core import distributed


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    console.printer()("hello")
    assert capsys.readouterr().out == "hello\n"
    assert list(distributed.Progress("abc", "counting")) == list("abc")
    assert terminal.getvalue() == ""  # bars appear after two seconds
    at_once = {"delay": 0, "mininterval": 0}
    monkeypatch.setattr(distributed, "tqdm", lambda **options: tqdm(**{**options, **at_once}))
    progress = distributed.Progress(None, "counting", total=4)
    for _ in range(2):
        progress.update(1, lambda: "loss 0.5")
    progress.close()
    assert "counting:  50%" in terminal.getvalue()
    assert "loss 0.5" in terminal.getvalue()
    console.printer(verbose=True)
    assert console.is_verbose()


def test_quiet_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    console.printer(quiet=True)("hello")
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", stream)
        assert list(distributed.Progress("abc", "counting", delay=0)) == list("abc")
        assert stream.getvalue() == capsys.readouterr().out == ""
    console.printer()


def test_progress_lines_without_a_terminal(
    capsys: pytest.CaptureFixture,
) -> None:
    clock = Clock()
    images = distributed.Progress(range(200), "predict", unit="image", delay=0, clock=clock)
    for _ in images:
        clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10  # a tenth takes 20 seconds
    assert lines[0] == "predict: 20 of 200 images, 1 images/s, 0:03:00 left"
    assert lines[-1] == "predict: 200 of 200 images, 1 images/s, done in 0:03:20"
    for _ in distributed.Progress(range(10), "predict", unit="image", delay=0, clock=clock):
        clock.now += 0.1
    *others, last = capsys.readouterr().err.splitlines()
    assert all("0:00:0" in line and "left" in line for line in others)  # not done before the end
    assert last.endswith("done in 0:00:01")
    for _ in distributed.Progress(range(30), "evaluate", unit="image", clock=clock):
        clock.now += 45
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 + 10  # and one a minute between the tenths
    for _ in distributed.Progress(range(30), "write", unit="image", clock=clock):
        clock.now += 0.3
    for _ in distributed.Progress(iter(range(20)), "search", clock=clock):
        clock.now += 5
    assert capsys.readouterr().err == "search: 12 items, 0.2 items/s\n"
    list(distributed.Progress(range(1), "BatchNorm", unit="batch", delay=0))
    assert capsys.readouterr().err.startswith("BatchNorm: 1 of 1 batches, ")


def test_progress_lines_of_epochs(capsys: pytest.CaptureFixture) -> None:
    clock = Clock()
    progress = distributed.Progress(
        None, "fold 1", total=1200, initial=600, unit="image", parts=4, delay=0, clock=clock
    )
    for step in range(51, 101):
        clock.now += 3
        progress.update(12, lambda: f"step {step}, loss 0.5")  # noqa: B023
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fold 1: 840 of 1,200 images, 4 images/s, 0:01:30 left, step 70, loss 0.5"
    assert [line.split(",")[-2] for line in lines] == [f" step {n}" for n in (70, 75, 95, 100)]


def test_other_ranks_print_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "1")
    console.printer()("hello")
    assert capsys.readouterr().out == ""


def test_a_warning_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("a.jpg is damaged", "b.jpg is damaged", "a.jpg is damaged"):
        console._show(text)
    assert capsys.readouterr().err == "warning: a.jpg is damaged\nwarning: b.jpg is damaged\n"
