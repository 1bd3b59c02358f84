"""The promises of docs/reliability.md: kills, restarts, ranks, full disks, long runs."""

import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from ranks import share_of_the_way
from torch import nn

from segkit import train
from segkit.core import checkpoint
from segkit.core.background import Background
from segkit.core.errors import DataError
from segkit.core.run import Run
from segkit.data.demo import draw_demo
from segkit.models import layers
from segkit.models.segmenter import build_model

HERE = Path(__file__).parent
CONFIG: dict[str, Any] = {
    "data": {
        "train": {"name": "coco", "annotations": "demo/train.json"},
        "folds": 2,
        "selection": 0.2,
        "workers": 0,
    },
    "model": {
        "weights": None,
        "backbone": "resnet18_half",
        "decoder": {"name": "fcn", "width": 8, "aux": False},
    },
    "augment": {"train": ["hflip", {"name": "crop", "size": [32, 32]}]},
    "optim": {"lr": 0.001, "optimizer": "sgd"},
    "train": {"epochs": 2, "batch_size": 4, "amp": "off", "save_every": 1, "log_every": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs are started: a configuration and a demo set of 20 images."""
    folder = tmp_path_factory.mktemp("work")
    draw_demo(folder / "demo", train=20, test=1, size=64)
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    return folder


def arguments(run: str, settings: Mapping[str, Any] = {}) -> list[str]:
    pairs = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    options = [part for pair in pairs for part in ("--set", pair)]
    return ["--cfg", "tiny.json", "--folds", "0", "--run-dir", run, "--quiet", *options]


def launch(folder: Path, *words: str, **options: Any) -> subprocess.Popen:
    """Python with one thread, in ``folder``."""
    return subprocess.Popen(
        [sys.executable, *words], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


def torchrun(folder: Path, *words: str, **options: Any) -> subprocess.Popen:
    return launch(folder, "-m", "torch.distributed.run", *words, **options)


def weights(folder: Path, run: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / run / "fold0" / "last.pt")["model"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def steady(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of two ranks that nothing happened to."""
    words = ("--standalone", "--nproc-per-node=2", str(HERE.parent / "train.py"))
    process = torchrun(folder, *words, *arguments("runs/steady"))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return weights(folder, "runs/steady")


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("phase", ["start", "step", "evaluation", "save"])
def test_a_rank_killed_anywhere_is_restarted_and_goes_on(
    folder: Path, steady: dict[str, torch.Tensor], phase: str, rank: str
) -> None:
    run = f"runs/{phase}{rank}"
    words = ("--standalone", "--nproc-per-node=2", "--max-restarts=1", str(HERE / "faults.py"))
    fault = ("kill", phase, rank, f"{phase}{rank}.struck")
    process = torchrun(folder, *words, *fault, *arguments(run))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert (folder / fault[-1]).exists()
    torch.testing.assert_close(weights(folder, run), steady, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["start", "step", "evaluation"])
def test_an_error_on_one_rank_ends_all_with_its_message(folder: Path, phase: str) -> None:
    words = ("--standalone", "--nproc-per-node=2", str(HERE / "faults.py"))
    fault = ("raise", phase, "1", f"{phase}.raised")
    process = torchrun(folder, *words, *fault, *arguments(f"runs/raise-{phase}"))
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"[rank 1] planted in {phase}" in out
    assert "Error: " not in out.split("planted in")[0]  # no other rank's traceback before it


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["start", "step"])
def test_a_machine_that_is_lost_leaves_the_other_to_go_on(folder: Path, phase: str) -> None:
    """Two agents of torchrun stand for two machines; one is killed with its rank.

    Right after the start it dies amid the broadcast of weights, which gloo may miss until
    ``train.timeout``.
    """
    name = f"lost-{phase}"
    run = Run(folder / "runs" / name)
    endpoint = f"localhost:{free_port()}"
    words = ("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d")
    words += (f"--rdzv-endpoint={endpoint}", f"--rdzv-id={name}")
    settings = {"train.epochs": 60, "train.timeout": 0.5}
    script = (str(HERE.parent / "train.py"), *arguments(f"runs/{name}", settings))
    stays, goes = (  # the meeting place lies on the machine that stays
        torchrun(folder, *words, f"--rdzv-conf=last_call_timeout=10,is_host={host}", *script)
        for host in (1, 0)
    )
    deadline = time.monotonic() + 120
    while not any(event["event"] == phase for event in run.events()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert run.read("environment.json")["world_size"] == 2
    for child in children(goes.pid):
        os.kill(child, signal.SIGKILL)
    goes.kill()
    goes.communicate()
    out, _ = stays.communicate(timeout=300)
    assert stays.returncode == 0, out
    steps = [event["step"] for event in run.events() if event["event"] == "step"]
    assert steps == list(range(1, 121))


def children(pid: int) -> list[int]:
    """Processes that ``pid`` started."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    if not listed.exists():
        pytest.skip("this system does not list the children of a process")
    return [int(word) for word in listed.read_text().split()]


def one_rank(
    rank: int, world_size: int, port: int, folder: Path, words: list[str], batch_norm: bool
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    os.chdir(folder)
    torch.set_num_threads(1)
    if not batch_norm:
        layers.BatchNorm2d = partial(nn.GroupNorm, 1)  # type: ignore[misc, assignment]
    train.main(words)


def ranks(
    folder: Path, words: list[str], world_size: int = 2, *, batch_norm: bool = True
) -> list[Any]:
    """Ranks of a training, forked from a process that has imported it: they start at once."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["train"])
    port = free_port()
    started = [
        context.Process(target=one_rank, args=(rank, world_size, port, folder, words, batch_norm))
        for rank in range(world_size)
    ]
    for process in started:
        process.start()
    return started


def finish(started: list[Any]) -> None:
    """Wait for ranks that must succeed."""
    for process in started:
        process.join()
    assert all(process.exitcode == 0 for process in started)


@pytest.mark.slow
def test_fifty_kills_change_no_bit_of_the_weights(folder: Path) -> None:
    settings = {"train.epochs": 200, "train.evaluate_every": 10}
    steps = 400
    finish(ranks(folder, arguments("runs/calm", settings)))
    rng = random.Random(0)
    kills, saved, step, longest = 0, set(), -1, 3.0
    while kills < 50:
        started = ranks(folder, [*arguments("runs/shot", settings), "--resume"])
        started[0].join(rng.uniform(0.2, longest))
        assert started[0].exitcode is None, f"the training ended after {kills} kills"
        for process in started:
            process.kill()
            process.join()
        kills += 1
        before, run = step, folder / "runs/shot"
        if (run / "config.json").exists():
            Run.open(run).read("config.json")
            list(Run(run).events())
            state = Run(run).load_last_state(0)
            step = -1 if state is None else state["step"]
            saved.add(step)
        assert step >= before  # what was saved is never lost
        if step > steps * kills / 80:  # a fast machine: it must not be done before 50 kills
            longest = max(0.8, longest / 2)
        elif step == before:  # a slow one: some kills must come after the start
            longest = min(20.0, longest * 1.25)
    assert len(saved) > 10, "the kills came before anything was trained"
    finish(ranks(folder, [*arguments("runs/shot", settings), "--resume"]))
    calm_weights, shot = weights(folder, "runs/calm"), weights(folder, "runs/shot")
    torch.testing.assert_close(shot, calm_weights, rtol=0, atol=0)
    counts = [Run(folder / run).read("summary.json")["fold0"] for run in ("runs/calm", "runs/shot")]
    assert counts[0]["miou"] == counts[1]["miou"]


# No dropout, which differs with the number of parts over all ranks; no BatchNorm, which sees each
# part of a batch alone.
SMOOTH = {
    "augment.train": ["hflip", {"name": "resize", "size": [64, 64]}],
    "model.backbone": {"name": "convnext_tiny", "drop_path": 0.0},
    "model.decoder": {"name": "fcn", "width": 16, "dropout": 0.0, "aux": False},
    "train.epochs": 10,
    "train.evaluate_every": 10,
}


def smooth_start() -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "BatchNorm2d", partial(nn.GroupNorm, 1))
        parts = SMOOTH["model.backbone"], SMOOTH["model.decoder"]
        return build_model(*parts, num_classes=11, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "accumulate", "workers", "cache_gb"),
    [(1, 2, 1, 0), (1, 4, 2, 1), (2, 1, 1, 1), (2, 2, 0, 0), (4, 1, 0, 0)],
)
def test_ranks_parts_workers_and_cache_change_nothing(
    folder: Path, alone: Path, world_size: int, accumulate: int, workers: int, cache_gb: int
) -> None:
    """The same global batches give the same weights, but for rounding."""
    run = f"runs/{world_size}-{accumulate}-{workers}"
    settings = {**SMOOTH, "train.accumulate": accumulate, "data.workers": workers}
    settings["data.cache_gb"] = cache_gb
    finish(ranks(folder, arguments(run, settings), world_size, batch_norm=False))
    state, reference = (
        checkpoint.load(path / "fold0" / "last.pt") for path in (folder / run, alone)
    )
    assert state["step"] == reference["step"] == 20
    assert share_of_the_way(smooth_start(), reference["model"], state["model"]) < 5e-3
    ours, theirs = (Run(path).read("fold0/evaluation.json") for path in (folder / run, alone))
    ours, theirs = torch.tensor(ours["matrix"]), torch.tensor(theirs["matrix"])
    assert torch.equal(ours.sum(1), theirs.sum(1))  # the same pixels, each counted once
    assert int((ours - theirs).abs().sum()) <= 2e-3 * int(theirs.sum())


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_and_workers(folder: Path, alone: Path) -> None:
    run = folder / "runs/grown"
    (first,) = ranks(folder, arguments("runs/grown", SMOOTH), 1, batch_norm=False)
    while not (run / "fold0/last.previous.pt").exists():
        assert first.exitcode is None
        time.sleep(0.05)
    first.kill()
    first.join()
    state = Run(run).load_last_state(0)
    assert state is not None
    assert 0 < state["step"] < 20
    words = [*arguments("runs/grown", {**SMOOTH, "data.workers": 2}), "--resume"]
    finish(ranks(folder, words, 2, batch_norm=False))
    ours, theirs = (checkpoint.load(path / "fold0" / "last.pt") for path in (run, alone))
    assert ours["step"] == theirs["step"] == 20
    assert share_of_the_way(smooth_start(), theirs["model"], ours["model"]) < 5e-3


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """A run of one process without workers, accumulation or cache."""
    settings = {**SMOOTH, "data.cache_gb": 0}
    finish(ranks(folder, arguments("runs/alone", settings), 1, batch_norm=False))
    return folder / "runs/alone"


@pytest.mark.slow
def test_two_hundred_epochs_leave_memory_and_files_flat(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system has no /proc to count open files and memory in")
    used: list[tuple[int, int]] = []
    start = Background.start

    def watched(self: Background, job: Callable[[], None]) -> None:
        self.wait()  # the last checkpoint is written and closed
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        used.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))
        start(self, job)

    monkeypatch.setattr(Background, "start", watched)
    monkeypatch.chdir(folder)
    settings = {"train.epochs": 200, "train.evaluate_every": 5, "train.save_every": 0}
    train.main(arguments("runs/long", {**settings, "train.log_every": 20, "train.keep": 2}))
    assert len(used) >= 200
    (early, files), (late, open_files) = used[50], used[-1]
    assert open_files == files
    assert late < early + 32 * 2**20
    kept = sorted(path.name for path in (folder / "runs/long/fold0").iterdir())
    assert len(kept) == 6  # two epochs, best.pt, its evaluation, last.pt and the one before it
    events = list(Run(folder / "runs/long").events())
    assert len(events) == 1 + 200 + 40  # start, the last step of each epoch, scores


@pytest.mark.parametrize("limit", [1 << 20, 1 << 24])
def test_a_full_disk_is_one_sentence_and_what_was_saved_stays(folder: Path, limit: int) -> None:
    """A limit on the size of files stands for a disk that fills up."""
    run = f"runs/full{limit}"
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv.pop(1)); "
        "from segkit import train; from segkit.commands import console; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); console.run(train.main)"
    )
    words = arguments(run, {"train.save_every": 0, "data.workers": 2})
    process = launch(folder, "-c", code, str(HERE.parent), *words)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    name = "epoch0001.pt" if limit < 1 << 22 else "last.pt"
    assert out.strip().endswith(f"{name}: File too large"), out
    assert len(out.strip().splitlines()) == 1
    assert not list((folder / run).rglob(".*.writing"))
    finish(ranks(folder, [*words, "--resume"], 1))


def test_a_read_only_run_folder_is_one_sentence(folder: Path) -> None:
    (folder / "locked").write_text("a file where the folder should be")
    process = launch(folder, str(HERE.parent / "train.py"), *arguments("locked/run"))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out == "locked/run: cannot be made (Not a directory); choose another folder\n"


def rename(labels: dict[str, Any], _: Path) -> None:
    labels["categories"][0]["name"] = "renamed"


def number_anew(labels: dict[str, Any], _: Path) -> None:
    for record, key in [(entry, "id") for entry in labels["categories"]] + [
        (entry, "category_id") for entry in labels["annotations"]
    ]:
        record[key] += 100


def reverse(labels: dict[str, Any], _: Path) -> None:
    ids = [entry["id"] for entry in labels["categories"]]
    for record, key in zip(labels["categories"], reversed(ids), strict=True):
        record["id"] = key


def relabel(labels: dict[str, Any], _: Path) -> None:
    triangle = {"segmentation": [[1, 1, 30, 1, 30, 30]], "bbox": [1, 1, 29, 29], "area": 420.5}
    labels["annotations"][0].update(triangle)


def repaint(labels: dict[str, Any], images: Path) -> None:
    path = images / labels["images"][0]["file_name"]
    with Image.open(path) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)


def touch(labels: dict[str, Any], images: Path) -> None:
    for record in labels["images"]:
        os.utime(images / record["file_name"])


@pytest.fixture(scope="module")
def begun(folder: Path) -> Path:
    """A run of one step, of data of its own."""
    draw_demo(folder / "own", train=20, test=1, size=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "evaluate", lambda *_, **__: sys.exit(0))
        with pytest.raises(SystemExit):
            train.main(arguments("runs/own", OWN))
    return folder / "runs/own"


OWN = {"data.train.annotations": "own/train.json", "train.epochs": 1, "data.cache_gb": 0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename, ["other classes: 'renamed' was '"]),
        (number_anew, ["other category ids"]),
        (reverse, ["other classes: ", "(and "]),
        (relabel, ["other labels in data.train: '"]),
        (repaint, ["other pixels in data.train: '"]),
        (touch, []),
    ],
)
def test_a_run_goes_on_with_its_own_data_only(
    folder: Path,
    begun: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any], Path], None],
    words: list[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Run, "begin", lambda *_: sys.exit(3))
    before = shutil.copytree("own", "before")
    path = Path("own/train.json")
    labels = json.loads(path.read_text())
    change(labels, Path("own"))
    path.write_text(json.dumps(labels))
    with pytest.raises((SystemExit, DataError)) as ended:
        train.main([*arguments("runs/own", OWN), "--resume"])
    shutil.rmtree("own")
    Path(before).rename("own")
    if words:
        assert str(ended.value).startswith("runs/own: the data changed since the run began (")
    else:
        assert str(ended.value) == "3"  # equal bytes are the same data, whenever they were written
    for word in words:
        assert word in str(ended.value)


def test_a_run_without_a_record_of_its_data_gets_one(
    folder: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: sys.exit(0))
    warnings.filterwarnings("ignore", message=".*left out")  # pytest restores the filters
    record = begun / "data.json"
    content = record.read_text()
    for damage in ("damaged", "gone", "all gone"):  # of earlier versions, or their failed starts
        if damage == "damaged":
            record.write_text("[]")
        else:
            record.unlink()
        if damage == "all gone":
            (begun / "folds.json").unlink()
            (begun / "classes.json").unlink()
        with pytest.raises(SystemExit):
            train.main([*arguments("runs/own", OWN), "--resume"])
        assert record.read_text() == content
