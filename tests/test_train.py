"""train.py and infer.py, as a user runs them, on a small demo set."""

import csv
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import share_of_the_way

from segkit import train as train_module
from segkit.core import checkpoint
from segkit.core.config import Config
from segkit.core.errors import DataError, SegkitError
from segkit.core.run import Run
from segkit.data.demo import draw_demo
from segkit.models.segmenter import build_model
from segkit.train import main as train_main
from segkit.training import preparation
from segkit.training.evaluate import Evaluation
from segkit.training.optim import WindowMean, build_schedule

ROOT = Path(__file__).parents[1]
AVERAGES = ("ema", "window")
DRAWN = {"train": 20, "test": 5, "size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: a configuration, the demo set, and later ``runs``."""
    folder = tmp_path_factory.mktemp("work")
    demo = {"name": "demo", "root": "demo", **DRAWN}
    cfg = {
        "data": {
            **{part: {**demo, "part": part} for part in ("train", "test", "test_labels")},
            "folds": 2,
            "selection": 0.2,
            "workers": 0,
        },
        "model": {
            "weights": None,
            "backbone": "resnet18",
            "decoder": {"name": "upernet", "width": 8, "aux_width": 8},
        },
        "augment": {
            "train": [
                {"name": "crop", "size": [64, 64]},
                "hflip",
                {"name": "hue", "degrees": [0, 9]},
            ]
        },
        "loss": {"terms": ["cross_entropy", "dice"]},
        "optim": {"lr": 0.001, "warmup_steps": 2},
        "train": {"epochs": 2, "batch_size": 4, "ema": 0.9, "log_every": 1},
        "track": {"trackers": ["csv"], "images": 4},
    }
    (folder / "tiny.json").write_text(json.dumps(cfg))
    return folder


def start(
    folder: Path, script: str, *arguments: str, ranks: int = 0, **options: Any
) -> subprocess.Popen:
    program = [sys.executable, str(ROOT / script)]
    if ranks:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        program[1:1] = torchrun
    return subprocess.Popen(
        [*program, *arguments], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, _ = process.communicate(timeout=400)
    assert process.returncode == code, out
    return out


def train(folder: Path, run: str, *arguments: str, ranks: int = 0, code: int = 0) -> str:
    arguments = ("--cfg", "tiny.json", "--run-dir", run, *arguments)
    return finish(start(folder, "train.py", *arguments, ranks=ranks), code)


def sets(settings: Mapping[str, Any]) -> list[str]:
    """Settings as options of a command."""
    pairs = (f"{key}={json.dumps(value)}" for key, value in settings.items())
    return [part for pair in pairs for part in ("--set", pair)]


def last(folder: Path, run: str, fold: int = 0) -> dict[str, Any]:
    return checkpoint.load(folder / run / f"fold{fold}" / "last.pt")


def assert_same(ours: Any, theirs: Any, atol: float = 0.0) -> None:
    """Equal trees of tensors and values."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key], atol)
    elif isinstance(ours, list | tuple):
        for first, second in zip(ours, theirs, strict=True):
            assert_same(first, second, atol)
    elif isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0, equal_nan=True)
    else:
        assert ours == theirs


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A run of both folds."""
    train(folder, "runs/whole")
    return folder / "runs" / "whole"


def test_the_run_folder_explains_itself(trained: Path) -> None:
    run = Run.open(trained)
    assert run.folds() == [0, 1]
    assert run.read("config.json")["train"]["batch_size"] == 4
    assert len(run.read("classes.json")["classes"]) == 11
    assert run.read("environment.json")["torch"] == torch.__version__
    assert set(run.read("summary.json")) == {"fold0", "fold1"}
    shares = run.read("summary.json")["fold0"]["shares"]
    assert set(shares) == {"steps", "loading", "evaluation", "saving"}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert all(0 < share < 1 for share in shares.values())
    events = list(run.events())
    steps = [event["step"] for event in events if event["event"] == "step" and event["fold"] == 0]
    assert steps == [1, 2, 3, 4]
    page = (trained / "report.html").read_text()
    assert "mean of 2 folds" in page
    assert page.count('"photograph":') == 8  # the four pictures of each fold
    evaluated = [
        event["epoch"] for event in events if event["event"] == "evaluate" and event["fold"] == 0
    ]
    assert evaluated == [1, 2]


def test_folds_and_selection_divide_the_images(trained: Path) -> None:
    folds = json.loads((trained / "folds.json").read_text())
    parts = [*folds["folds"], folds["selection"]]
    names = [name for part in parts for name in part]
    assert len(names) == len(set(names)) == DRAWN["train"]
    assert all(parts)


def test_checkpoints_tell_what_they_trained_on(trained: Path) -> None:
    first, second = (checkpoint.load(trained / f"fold{n}" / "best.pt") for n in (0, 1))
    assert not set(first["trained_on"]) & set(second["trained_on"])
    assert first["init"] == second["init"]
    best = json.loads((trained / "summary.json").read_text())["fold0"]
    assert (first["score"], first["epoch"]) == (best["miou"], best["epoch"])


def test_infer_writes_everything(folder: Path, trained: Path) -> None:
    shown = finish(start(folder, "infer.py", "--soup", "--tta"))
    for name in ("fold0", "fold1", "uniform soup", "greedy soup, views", "soft vote, views"):
        assert name in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if "[" in line)
    out = trained / "infer"
    names = [
        image["file_name"]
        for image in json.loads((folder / "demo/test.json").read_text())["images"]
    ]
    csv.field_size_limit(1 << 20)  # 65536 classes of two digits are more than its default
    with (out / "submission.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image_id", "PredictionString"]
    assert [row[0] for row in rows[1:]] == names
    for name, row in zip(names, rows[1:], strict=True):
        with Image.open((out / "masks" / name).with_suffix(".png")) as image:
            mask = np.array(image)
        assert mask.shape == (64, 64)
        assert np.array_equal(np.array(row[1].split(), int).reshape(256, 256)[::4, ::4], mask)
        assert (out / "overlays" / name).is_file()
    assert {result["image_id"] for result in json.loads((out / "coco.json").read_text())} <= set(
        range(5)
    )
    rows = json.loads((out / "scores.json").read_text())
    assert rows[-1]["name"] == "greedy soup, views"
    low, high = rows[-1]["test"]["interval"]
    assert low <= high


def test_two_ranks_infer_the_same(folder: Path, trained: Path) -> None:
    options = ("--vote", "hard", "--brief", "--out")
    finish(start(folder, "infer.py", *options, "one"))
    finish(start(folder, "infer.py", *options, "two", ranks=2))
    for path in sorted((folder / "one").rglob("*")):
        if path.is_file():
            other = folder / "two" / path.relative_to(folder / "one")
            assert path.read_bytes() == other.read_bytes(), path


def test_plain_photographs_of_any_size(folder: Path, trained: Path) -> None:
    Image.new("RGB", (97, 65), "red").save(folder / "odd.png")
    finish(start(folder, "infer.py", "--images", "odd.png", "--out", "photo", "--tta", "rot90"))
    with Image.open(folder / "photo/masks/odd.png") as image:
        assert image.size == (97, 65)


def test_killed_in_mid_epoch_and_resumed_is_the_same_to_the_bit(
    folder: Path, trained: Path
) -> None:
    options = ("--set", "train.save_every=1", "--folds", "0")
    train(folder, "runs/steady", *options)
    arguments = ("--cfg", "tiny.json", "--run-dir", "runs/killed", *options)
    process = start(folder, "train.py", *arguments)
    while not (folder / "runs/killed/fold0/last.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert last(folder, "runs/killed")["step"] < 4
    assert "going on after step" in train(folder, "runs/killed", *options, "--resume")
    ours, theirs = last(folder, "runs/killed"), last(folder, "runs/steady")
    assert ours.pop("seconds") > 0
    assert theirs.pop("seconds") > 0
    assert_same(ours, theirs)
    whole = last(folder, "runs/whole")
    assert_same(ours["model"], whole["model"])  # saving changes nothing either
    events = [list(Run(folder / run).events()) for run in ("runs/killed", "runs/steady")]
    kept = [
        [
            (event["event"], event["step"], event.get("loss"))
            for event in part
            if event["event"] != "resume"
        ]
        for part in events
    ]
    assert kept[0] == kept[1]
    tables = [
        np.genfromtxt(folder / run / "fold0/steps.csv", delimiter=",", names=True)
        for run in ("runs/killed", "runs/steady")
    ]
    for column in ("step", "loss", "losscross_entropy"):
        assert tables[0][column].tolist() == tables[1][column].tolist()


def test_sigterm_saves_and_exits_with_zero(folder: Path, trained: Path) -> None:
    options = ("--set", "train.epochs=500", "--folds", "0")
    arguments = ("--cfg", "tiny.json", "--run-dir", "runs/term", *options)
    process = start(folder, "train.py", *arguments)
    log = folder / "runs/term/log.jsonl"
    while not log.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out = finish(process, code=0)
    assert "--resume" in out
    steps = [
        event["step"] for event in Run(folder / "runs/term").events() if event["event"] == "step"
    ]
    assert last(folder, "runs/term")["step"] == steps[-1] < 1000


@pytest.mark.slow
def test_two_ranks_take_the_twenty_steps_of_one_process(folder: Path, trained: Path) -> None:
    # Cross-entropy and Dice over both ranks' pixels, BatchNorm synchronized. Only rounding differs;
    # BatchNorm over few or nearly equal values would magnify that, hence LayerNorm in the backbone.
    decoder = {"name": "unet", "widths": [32, 16, 16, 8]}
    settings = {
        "augment.train": ["hflip", {"name": "resize", "size": [96, 96]}],
        "model.backbone": "convnext_tiny",
        "model.decoder": decoder,
        "optim.optimizer": {"name": "sgd"},
        "optim.lr": 0.001,
        "train.amp": "off",
        "train.epochs": 10,
        "train.evaluate_every": 10,
    }
    options = ["--folds", "0", *sets(settings)]
    train(folder, "runs/one-rank", *options)
    train(folder, "runs/two-ranks", *options, ranks=2)
    alone, pair = last(folder, "runs/one-rank"), last(folder, "runs/two-ranks")
    assert alone["step"] == pair["step"] == 20
    start = build_model("convnext_tiny", decoder, num_classes=11, seed=0)
    assert share_of_the_way(start, alone["model"], pair["model"]) < 5e-3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "data.train=null"], ["data.train", "missing"]),
        (["--set", "model.backbone=resnet81"], ["model.backbone.name", "resnet18"]),
        (["--set", "model.decoder.width=true"], ["model.decoder.width", "true"]),
        (["--set", "loss.terms.0.name=dise"], ["loss.terms[0].name", "'dice'"]),
        (["--set", "optim.optimizer=adamv"], ["optim.optimizer.name", "'adamw'"]),
        (["--set", "optim.schedule=cosin"], ["optim.schedule.name", "'cosine'"]),
        (["--set", "augment.train.0.size=[0,1]"], ["augment.train[0]"]),
        (["--set", "data.test.root=3"], ["data.test.root", "a string"]),
        (["--set", 'infer.tta=["hflop"]'], ["hflop"]),
        (["--set", "train.batch_size=1000"], ["train.batch_size", "1000"]),
        (["--set", 'data.train={"name":"coco","annotations":"no.json"}'], ["no.json", "exist"]),
        (["--set", "model.weights=no.pt"], ["no.pt"]),
        (["--folds", "7"], ["--folds 7"]),
        (["--cfg", "tini.json"], ["tini.json"]),
    ],
)
def test_mistakes_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(folder)
    run = f"runs/bad{len(list(folder.glob('runs/*')))}"
    with pytest.raises(SegkitError) as caught:
        train_main(["--cfg", "tiny.json", "--run-dir", run, *arguments])
    for word in words:
        assert word in str(caught.value)
    assert not (folder / run).exists()  # what can be checked is, before a folder is made


def test_a_warm_up_longer_than_the_training_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    options = [*sets({"optim.warmup_steps": 4, "train.batch_size": 4}), "--run-dir", "runs/warm"]
    monkeypatch.setattr(Run, "begin", lambda *_: sys.exit(3))
    with pytest.warns(UserWarning, match=r"is 4, but there are 4 steps"), pytest.raises(SystemExit):
        train_main(["--cfg", "tiny.json", "--folds", "0", *options])


def test_too_little_memory_is_known_before_a_folder_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    shapes: list[torch.Size] = []
    averages = lambda: sum(type(x) is WindowMean for x in gc.get_objects())  # noqa: E731
    before = averages()

    def step(_net: Any, _criterion: Any, _optimizer: Any, parts: Any, **_: Any) -> None:
        assert averages() == before + 1  # the mean of the window is held meanwhile
        shapes.extend([images.shape for images, _ in parts])
        if len(shapes) == 4:  # the second step, beside the optimizer's state
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train_module, "CHECKED_FOR_MEMORY", ("cpu",))
    monkeypatch.setattr(preparation, "train_step", step)
    settings = {"train.batch_size": 8, "train.accumulate": 2, "train.average": 0.5}
    options = ["--run-dir", "runs/memory", *sets(settings)]
    with pytest.raises(SegkitError, match=r"out of memory \(2\.00 GiB.*lower train\.batch_size"):
        train_main(["--cfg", "tiny.json", *options])
    assert shapes == [(4, 3, 64, 64)] * 4
    assert not (folder / "runs/memory").exists()


def test_a_step_tried_for_its_memory_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(train_module, "CHECKED_FOR_MEMORY", (device,))
        options = ["--folds", "0", "--run-dir", f"runs/tried-{device}", "--quiet"]
        train_main(["--cfg", "tiny.json", *options, *sets({"train.epochs": 1})])
    assert_same(last(folder, "runs/tried-cpu")["model"], last(folder, "runs/tried-cuda")["model"])


def test_a_mistake_is_one_sentence_and_exit_code_1(folder: Path) -> None:
    arguments = ("--cfg", "tiny.json", "--set", "model.backbone=resnet81")
    shown = finish(start(folder, "train.py", *arguments), code=1)
    assert shown.startswith("model.backbone.name: unknown 'resnet81'")
    assert len(shown.splitlines()) == 1
    assert "Traceback" in finish(start(folder, "train.py", *arguments, "--debug"), code=1)
    finish(start(folder, "train.py"), code=2)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_value_that_is_no_class_ends_the_run_before_it_begins(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.chdir(folder)
    settings: dict[str, Any] = {"data.cache_gb": 0}  # the cache reads every mask, too
    for role in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / role / kind).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (64, 64), "red").save(tmp_path / role / f"images/{number}.png")
            value = 2 if (role, number) == (part, 3) else 1
            Image.new("L", (64, 64), value).save(tmp_path / role / f"masks/{number}.png")
        paths = {kind: str(tmp_path / role / kind) for kind in ("images", "masks")}
        settings[f"data.{role}"] = {"name": "masks", "classes": ["ground", "can"], **paths}
    run = f"runs/value-in-{part}"
    with pytest.raises(DataError, match=rf"{part}/masks/3\.png has the values? 2"):
        train_main(["--cfg", "tiny.json", "--run-dir", run, *sets(settings)])
    assert not (folder / run).exists()


def test_a_run_starts_from_another_runs_best_and_says_what_it_took(
    folder: Path, trained: Path
) -> None:
    best = trained / "fold0" / "best.pt"
    out = train(folder, "runs/next", "--folds", "1", *sets({"model.weights": str(best)}))
    assert re.search(r"best\.pt: segkit's checkpoint; \d+ entries loaded\n", out)
    init = last(folder, "runs/next", 1)["init"]
    assert init == checkpoint.digest_tensors(checkpoint.load(best)["model"])


@pytest.fixture
def signals() -> Iterator[None]:
    """Takes back what a training in this process does to signals."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_an_epoch_of_few_steps_has_its_loss_told_and_logged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(folder)
    arguments = ["--cfg", "tiny.json", "--run-dir", "runs/few", "--folds", "0"]
    train_main([*arguments, *sets({"train.log_every": 20, "track.trackers": []})])
    steps = [event for event in Run(folder / "runs/few").events() if event["event"] == "step"]
    assert [event["step"] for event in steps] == [2, 4]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fold 0: ")]
    assert [line.split(",")[0] for line in lines] == [
        "fold 0: 8 of 16 images",
        "fold 0: 16 of 16 images",
    ]
    for line, event in zip(lines, steps, strict=True):
        assert f", epoch {event['epoch']} of 2, loss {event['loss']:.4g}, lr " in line


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("better", ["ema", "window"])
def test_the_better_average_is_saved(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, better: str
) -> None:
    monkeypatch.chdir(folder)
    evaluated: list[Evaluation] = []

    def evaluate(*arguments: Any, **options: Any) -> Evaluation:
        """Score the average that is not the better one as wrong everywhere."""
        result = train_module_evaluate(*arguments, **options)
        evaluated.append(result)
        if (better == "window") == (len(evaluated) % 2 == 1):
            return replace(result, matrix=result.matrix.roll(1, 1) * (1 - torch.eye(11).long()))
        return replace(result, matrix=result.matrix.sum(1).diag())

    train_module_evaluate = train_module.evaluate
    monkeypatch.setattr(train_module, "evaluate", evaluate)
    settings = {"train.average": 0.25, "train.epochs": 1, "track.images": 0}
    arguments = ["--cfg", "tiny.json", "--run-dir", f"runs/{better}", "--folds", "0"]
    train_main([*arguments, *sets(settings)])
    assert len(evaluated) == 2  # each average once
    state = last(folder, f"runs/{better}")
    saved = checkpoint.load(folder / "runs" / better / "fold0" / "best.pt")
    assert (saved["average"], saved["score"]) == (better, 1.0)
    assert_same(saved["model"], state[better]["model"])
    # a quarter of 2 steps is 1 step, so that the mean is the weights themselves
    assert_same(state["window"]["model"], state["model"])
    assert not torch.equal(*(state[name]["model"]["backbone.conv1.weight"] for name in AVERAGES))
    [event] = [event for event in Run(folder / f"runs/{better}").events() if "averages" in event]
    assert (event["average"], event["averages"][better]) == (better, 1.0)
    assert f"mIoU 1.0000 of {better} (best 1.0000)" in capsys.readouterr().out


@pytest.mark.usefixtures("signals")
def test_a_finished_run_goes_on_with_more_epochs(
    folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(folder)
    shutil.copytree(trained, folder / "runs/longer")
    run = Run(Path("runs/longer"))

    def resume(epochs: int) -> list[str]:
        options = ["--folds", "0", "--resume", "--set", f"train.epochs={epochs}"]
        train_main(["--cfg", "tiny.json", "--run-dir", str(run.folder), *options])
        return capsys.readouterr().out.splitlines()

    before = run.read("summary.json")
    said = resume(2)
    assert "fold 0: all 2 epochs are done; to go on, add --set train.epochs=4" in said
    assert said[-3:] == [
        "  segkit infer --run-dir runs/longer --soup --tta",
        "  segkit train --cfg runs/longer/config.json \\",
        "    --run-dir runs/longer --resume --set train.epochs=4",
    ]
    [line] = [line for line in resume(3) if "going on after step 4" in line]
    assert "train.epochs is 3 now and was 2, so the learning rate follows" in line
    steps = [event for event in run.events() if event["event"] == "step" and event["fold"] == 0]
    schedule = build_schedule("cosine", total=6, warmup=2)
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5, 6]
    assert [event["lr"] for event in steps[4:]] == [0.001 * schedule(4), 0.001 * schedule(5)]
    after = run.read("summary.json")
    assert after["fold1"] == before["fold1"]
    assert after["fold0"]["steps"] == 6
    assert len(run.load_last_state(0)["top"]) == 3
    best = checkpoint.load(run.fold(0) / "best.pt")
    assert best["score"] == after["fold0"]["miou"] >= before["fold0"]["miou"]
    assert run.read("config.json")["train"]["epochs"] == 3
    with pytest.raises(SegkitError, match=r"train\.epochs: is 2, but .* has begun epoch 3; give 3"):
        resume(2)
    assert run.read("config.json")["train"]["epochs"] == 3


def test_a_fold_that_is_trained_further_is_not_in_the_summary(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write("summary.json", {"fold0": {"seconds": 1.0}, "fold1": {"seconds": 2.0}})
    run.reopen(0)
    assert run.read("summary.json") == {"fold1": {"seconds": 2.0}}
    run.reopen(1)
    run.reopen(1)
    assert not (tmp_path / "summary.json").exists()


def test_a_run_is_not_overwritten(folder: Path, trained: Path) -> None:
    assert "--resume" in train(folder, "runs/whole", code=1)
    changed = train(folder, "runs/whole", "--resume", "--set", "optim.lr=0.1", code=1)
    assert "optim.lr" in changed
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("")
    assert "not empty" in train(folder, "mine", code=1)


def test_infer_without_runs_says_what_to_do(tmp_path: Path) -> None:
    assert "train one" in finish(start(tmp_path, "infer.py"), code=1)


@pytest.mark.slow
def test_the_contest_s_configuration_starts_on_four_ranks(tmp_path: Path) -> None:
    data = tmp_path / "input" / "data"
    draw_demo(data, train=20, test=2, size=64)  # the contest's layout, but for one name
    (data / "train.json").rename(data / "train_all.json")
    settings = {
        "model.backbone": {"name": "swin_t"},
        "augment.train.2.size": [64, 64],
        "train.batch_size": 8,
        "train.epochs": 2,
        "train.evaluate_every": 2,
        "data.workers": 1,
    }
    arguments = ["--cfg", "swin.json", "--folds", "0", "--run-dir", "run", *sets(settings)]
    finish(start(tmp_path, "train.py", *arguments, ranks=4))
    assert Run(tmp_path / "run").read("summary.json")["fold0"]["steps"] == 2


def test_the_last_lines_fit_a_terminal() -> None:
    run = Run(Path("runs/photographs-20261127-123625"))
    lines = train_module.next_commands(Config(), run).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-2].endswith("\\")  # goes on in the next line
