"""The folder of a run: choosing one, damaged files, locks and states."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from made_run import begin_run, made_run
from ranks import run_ranks

from segkit.commands.report import main as report
from segkit.core import distributed, files
from segkit.core.config import Config, override, to_dict
from segkit.core.errors import ArgumentError, SegkitError
from segkit.core.run import Run, find_run, runs
from segkit.data.folds import Split
from segkit.training.tracking import CSVTracker


def add_run(name: str, started: float) -> Path:
    """A folder in ``runs/`` whose configuration was written at a given time."""
    folder = Path("runs", name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({}))
    os.utime(folder / "config.json", (started, started))
    return folder


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_newest_run_of_a_name_is_of_that_name_alone() -> None:
    own = add_run("one-20260101-000000", 1)
    for started, name in enumerate(
        ["one-small-20260101-000000", "one-2-20260101-000000", "one-mine"], 2
    ):
        add_run(name, started)
    assert [run.folder for run in runs("one")] == [own]
    assert not runs("o")
    assert len(runs()) == 4
    assert runs()[0].folder == Path("runs/one-mine")


def test_brackets_in_a_name_are_literal() -> None:
    add_run("a-20260101-000000", 2)
    own = add_run("[ab]-20260101-000000", 1)
    assert [run.folder for run in runs("[ab]")] == [own]
    assert not runs("?")


def test_other_files_with_names_of_a_run_s_files_are_not_overwritten() -> None:
    for name in ("classes.json", "environment.json", ".classes.json.writing"):
        path = Path("mine", name)
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        with pytest.raises(SegkitError, match="is not empty and holds no run"):
            begin_run(path.parent, {})
        assert path.read_text() == "mine"
        path.unlink()
    Path("mine/lock").touch()  # a kill at the start left both
    Path("mine/environment.json").write_text("{}")
    begin_run(Path("mine"), {})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every file that is read again."""
    run = made_run(tmp_path_factory.mktemp("made") / "run", folds=2, steps=20, images=3)
    run.write("status.json", {"state": "done", "sentence": ""})
    run.write("folds.json", {"folds": [["a"], ["b"]], "selection": ["c"]})
    tracker = CSVTracker(run=run, fold=0, step=0)
    for event in run.events():
        if event.get("fold") == 0:
            tracker.event(event)
    return run.folder


FILES = [
    *(
        "status.json",
        "config.json",
        "classes.json",
        "environment.json",
        "folds.json",
        "summary.json",
    ),
    *("shares.json", "infer/scores.json", "fold0/evaluation.json", "log.jsonl", "fold0/steps.csv"),
]
SHAPES = [None, 1, "a", [], [1], [[]], {}, {"a": 1}, {"fold0": 1}, {"classes": [1]}]
SHAPES += [{"classes": ["a"], "category_ids": {"a": 1}}, [{"name": "a", "test": 3}]]


def damages(content: bytes) -> list[bytes]:
    """Contents that a file may have after a power cut, or from another program."""
    half = len(content) // 2
    cut = [b"", content[:half], content[:-1], b"\0" * 50, content[:half] + b"\0" * 50, content * 2]
    text = [b"\xff\xfe{}", b"{", b"[" * 100_000, "text\n".encode("utf-16")]
    shapes = [json.dumps(value).encode() + b"\n" for value in SHAPES]
    return [*cut, *text, *shapes]


def resume(run: Run, config: dict[str, Any]) -> None:
    """Read and write the files of a run as a resumed training does."""
    begin_run(run.folder, config, resume=True)
    run.log(event="fault", file="a", sentence="a is empty")
    run.rewind(0, 10)
    CSVTracker(run=run, fold=0, step=10)
    Split.load(run.folder / "folds.json")


def refusal(read: Callable[[], Any]) -> str:
    """The sentence that reading ends with, if it does."""
    try:
        read()
    except SegkitError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore:.*left out")
def test_a_damaged_file_is_a_sentence_or_repaired(made: Path, name: str) -> None:
    config = json.loads((made / "config.json").read_bytes())
    folder, other = Path("runs/run"), Path("runs/other")
    shutil.copytree(made, other)
    for damage in damages((made / name).read_bytes()):
        shutil.copytree(made, folder, dirs_exist_ok=True)
        (folder / name).write_bytes(damage)
        run = Run(folder)
        report(["runs"])  # damage to a run does not keep others from their pages
        readers = [partial(report, [str(folder)]), run.category_ids, run.interrupted_here]
        for read in [*readers, partial(resume, run, config)]:
            sentence = refusal(read)
            assert not sentence or str(folder) in sentence


def test_events_after_a_cut_line_are_kept(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run", {})
    run.log(event="pseudo", round=1)
    with (run.folder / "log.jsonl").open("a") as file:
        file.write('{"time": 1.5, "event": "st')
    resumed = begin_run(tmp_path / "run", {}, resume=True)
    resumed.log(event="fault", file="a.jpg", sentence="a.jpg is empty")
    assert [event["event"] for event in resumed.events()] == ["pseudo", "fault"]


def test_damaged_lines_give_a_warning_and_other_versions_events_are_kept(
    tmp_path: Path,
) -> None:
    run = begin_run(tmp_path / "run", {})
    run.log(event="start", fold=0, step=0)  # without parameters
    with (run.folder / "log.jsonl").open("a") as file:
        file.write("\0\0\0\n")
    run.log(event="new kind", fold=0, step=3)
    with pytest.warns(UserWarning, match="2 lines are damaged .* first is line 1"):
        assert [event["event"] for event in run.events()] == ["new kind"]
    run.rewind(0, 5)
    lines = (run.folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["start", "new kind"]


def test_a_list_as_config_is_no_run(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run", {})
    (run.folder / "config.json").write_text("[]")
    with pytest.raises(SegkitError, match=r"config\.json: is damaged"):
        begin_run(run.folder, {}, resume=True)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SegkitError, match=r"run: cannot be made \(.*\); choose another folder"):
        begin_run(tmp_path / "file/run", {})


def test_a_run_resumes_with_settings_that_do_not_change_the_weights(tmp_path: Path) -> None:
    before = to_dict(Config())
    del before["infer"]["graphs"]  # of a version that did not have it
    run = begin_run(tmp_path / "run", before)
    after = override(Config(), ["note=b", "data.workers=3", "infer.graphs=false"])
    run.check(to_dict(after), resume=True)
    with pytest.raises(ArgumentError, match=r"holds a run already; .* pass resume=True"):
        run.check(before, resume=False)
    with pytest.raises(SegkitError, match=r"another configuration \(optim.lr\)"):
        run.check(to_dict(override(Config(), ["optim.lr=0.5"])), resume=True)


def test_only_one_process_continues_a_run_until_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (  # the child stands for data-loader workers, which outlive a killed process
        "import os, time; from pathlib import Path; from segkit.core.run import Run; "
        "run = Run(Path('run')); run.begin({}); child = os.fork(); "
        "print(child, flush=True) if child else None; time.sleep(60)"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    try:
        run = Run(Path("run"))
        monkeypatch.setattr(files, "LOCK_TIMEOUT", 0)
        assert run.state() == ("running", "")
        with pytest.raises(SegkitError, match=f"run: process {process.pid} on .* trains in it"):
            run.check({}, resume=True)
        process.kill()
        process.wait()
        os.kill(worker, 0)  # it lives
        assert run.state() == ("stopped", "")
        run.check({}, resume=True)
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)


def test_missing_file_locks_give_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    with pytest.warns(UserWarning, match="file locks do not work here"):
        begin_run(tmp_path / "run", {})


def test_a_run_killed_while_it_was_created_is_created_again(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run", {})
    (run.folder / "config.json").unlink()
    begin_run(tmp_path / "run", {"note": "another"})
    assert run.read("config.json") == {"note": "another"}


def test_without_a_name_the_newest_run_with_a_model_is_opened() -> None:
    with pytest.raises(SegkitError, match=r"no run in .* has a model"):
        Run.open(None)
    trained = add_run("one-20260101-000000", 1)
    add_run("one-20260101-000001", 2)
    (trained / "fold0").mkdir()
    (trained / "fold0/best.pt").write_text("")
    assert Run.open(None).folder == trained


def test_the_status_has_the_cause_though_another_rank_notices_it_first(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run", {})

    def fail(error: Exception) -> None:
        with suppress(Exception), run.recording():
            raise error

    lost = threading.Thread(target=fail, args=(RuntimeError("Connection reset by peer"),))
    lost.start()
    time.sleep(0.3)
    fail(SegkitError("a.jpg is damaged"))
    lost.join()
    assert run.read("status.json") == {"state": "failed", "sentence": "a.jpg is damaged"}


def test_ranks_that_end_together_record_it_together(tmp_path: Path) -> None:
    """Each writes a draft of its own: with one name, the first to end renames that of another."""
    run = begin_run(tmp_path / "run", {})

    def end(_: int) -> None:
        with pytest.raises(SystemExit), run.recording():
            raise SystemExit(0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(end, range(80)))
    assert run.read("status.json") == {"state": "stopped", "sentence": ""}
    assert not list(run.folder.glob(".*writing"))


def _status_on_entry(folder: Path) -> str:
    run = Run(folder)
    if distributed.is_main():
        record = run._record
        run._record = lambda *what: (time.sleep(1), record(*what))  # type: ignore[method-assign]
    with run.recording():
        return run.read("status.json")["state"]


def test_no_rank_goes_on_before_the_run_is_recorded(tmp_path: Path) -> None:
    run = begin_run(tmp_path / "run", {})
    run.write("status.json", {"state": "stopped", "sentence": ""})
    assert run_ranks(_status_on_entry, 2, run.folder) == ["running"] * 2


def test_a_run_keeps_how_it_ended(tmp_path: Path) -> None:
    def end(error: BaseException | None) -> tuple[str, str]:
        with suppress(BaseException), run.recording():
            assert run.read("status.json")["state"] == "running"
            if error is not None:
                raise error
        return run.state()

    run = begin_run(tmp_path / "run", {})
    assert run.state() == ("stopped", "")
    assert end(SegkitError("the loss was not finite")) == ("failed", "the loss was not finite")
    assert not run.resumable()
    assert end(OSError(28, "No space left", "last.pt")) == ("failed", "last.pt: No space left")
    assert end(ZeroDivisionError("by 0")) == ("failed", "ZeroDivisionError: by 0")
    killed = RuntimeError("DataLoader worker (pid 10815) is killed by signal: Killed. ")
    assert "lower data.workers" in end(killed)[1]  # as the command prints it
    assert end(SystemExit(0)) == ("stopped", "")
    assert end(None) == ("done", "")
    (run.folder / "status.json").unlink()  # of a version that kept none
    run.write("summary.json", {"fold0": {"seconds": 1.0}})
    assert run.state() == ("done", "")


def test_resume_picks_no_run_that_failed_before_it_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "check", lambda *_, **__: None)

    def picked() -> Path:
        return find_run("one", None, resume=True)[0].folder

    first = add_run("one-20260101-000000", 1)
    second = add_run("one-20260101-000001", 2)
    assert picked() == second
    Run(second).write("status.json", {"state": "failed", "sentence": "a.jpg is empty"})
    assert picked() == first
    (second / "fold0").mkdir()
    (second / "fold0/last.pt").write_text("")
    assert picked() == second


def test_only_the_same_torchrun_goes_on_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun without --rdzv-id
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run = begin_run(tmp_path / "run", {})
    assert run.interrupted_here()
    starter = os.getppid()
    monkeypatch.setattr(os, "getppid", lambda: starter + 1)  # started by another process
    assert not run.interrupted_here()


def test_the_index_shows_each_run_s_state(made: Path) -> None:
    sentence = "<b>: No space left on device"
    for state in ("done", "stopped", "failed"):
        folder = shutil.copytree(made, f"runs/{state}")
        Run(Path(folder)).write("status.json", {"state": state, "sentence": ""})
    Run(Path("runs/failed")).write("status.json", {"state": "failed", "sentence": sentence})
    report(["runs"])
    page = Path("runs/index.html").read_text()
    for text in (">done<", ">stopped<", ">failed<small>&lt;b&gt;: No space left on device<"):
        assert text in page
