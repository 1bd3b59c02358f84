"""infer.py: candidates, leaks, interruptions, pseudo labels, damaged photographs."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks

from segkit import infer
from segkit.core import checkpoint
from segkit.core.errors import CheckpointError, ConfigError, DataError, SegkitError
from segkit.core.run import Run
from segkit.data.coco import CocoSource
from segkit.data.loader import digests
from segkit.data.photos import PhotoSource
from segkit.inference import soup
from segkit.inference.predictor import Predictor
from segkit.inference.results import Results
from segkit.inference.run_soups import _parts_of
from segkit.inference.trained_run import TrainedRun
from segkit.models.segmenter import Segmenter, build_model, create_model
from segkit.train import main as train
from segkit.training.objects import SIZES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two folds, ``runs/a``, and one of another kind, ``runs/b``."""
    home = tmp_path_factory.mktemp("home")
    demo = {"name": "demo", "root": "demo", "train": 20, "test": 5, "size": 64}
    parts = {part: {**demo, "part": part} for part in ("train", "test", "test_labels")}
    cfg = {
        "data": {**parts, "folds": 2, "selection": 0.2, "workers": 0},
        "model": {
            "weights": None,
            "backbone": "resnet18_half",
            "decoder": {"name": "upernet", "width": 8, "aux_width": None},
        },
        "augment": {"train": [{"name": "crop", "size": [64, 64]}]},
        "optim": {"lr": 0.003, "warmup_steps": 2},
        "train": {"epochs": 2, "batch_size": 4, "amp": "off", "evaluate_every": 2},
    }
    (home / "tiny.json").write_text(json.dumps(cfg))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train(["--cfg", "tiny.json", "--run-dir", "runs/a", "--quiet"])
        other = [
            "infer.details=always",
            "model.decoder=fcn",
            "model.backbone=resnet18",
            "infer.size=48",
            "train.epochs=1",
        ]
        options = [part for setting in other for part in ("--set", setting)]
        train(["--cfg", "tiny.json", "--run-dir", "runs/b", "--folds", "0", "--quiet", *options])
    return home


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def run(*arguments: str) -> Path:
    """Run infer.py and return its folder of results."""
    out = Path(arguments[arguments.index("--out") + 1])
    infer.main([*arguments, *([] if "--run-dir" in arguments else ["--run-dir", "a"])])
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each result except the scores."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "scores.json"
    }


PLAIN = ["fold0", "fold1", "greedy soup", "uniform soup", "learned soup"]
PLAIN += ["stock soup", "pruned soup", "partwise soup"]
PLAIN += ["soft vote", "hard vote", "weighted vote"]


@pytest.fixture(scope="module")
def compared(home: Path) -> tuple[list[dict[str, Any]], str]:
    """Rows and table of all candidates of a run."""
    options = ["--soup", "--tta", "--weigh-views", "--compare", "--out", "all"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "infer.py"), "--run-dir", "runs/a", *options],
        cwd=home, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return read(home / "all/scores.json"), done.stdout


def test_everything_is_compared(compared: tuple[list[dict[str, Any]], str]) -> None:
    rows, shown = compared
    names = [row["name"] for row in rows]
    assert names == [*PLAIN, *(f"{name}, views" for name in PLAIN), "greedy soup, views fitted"]
    for line in shown.splitlines()[:-2]:
        assert len(line) <= 82, line
    for row in rows:
        for column in ("selection", "test"):
            low, high = row[column]["interval"]
            assert low <= row[column]["miou"] <= high
            assert row[column]["trained_on"] == 0


def test_boundaries_and_objects_are_scored(
    compared: tuple[list[dict[str, Any]], str], home: Path
) -> None:
    rows, shown = compared
    for row in rows:
        for column in ("selection", "test"):
            details = row[column]["details"]
            assert [*details] == ["boundary_iou", "boundary_f", *(f"recall_{x}" for x in SIZES)]
            for score in details.values():
                assert len(score["per_class"]) == len(score["per_class_intervals"]) == 11
            low, high = details["boundary_iou"]["interval"]
            assert low <= details["boundary_iou"]["mean"] <= high
            assert details["recall_large"]["mean"] is None  # of 64 x 64 pixels
    (title,) = [line for line in shown.splitlines() if line.startswith("on test")]
    last = shown.splitlines()[shown.splitlines().index(title) + len(rows)]
    assert f"{rows[-1]['test']['details']['boundary_iou']['mean']:.3f}" in last
    page = (home / "runs/a/report.html").read_text()
    assert "boundary IoU" not in page  # it shows only the results in the run's folder


def test_evaluations_of_a_training_have_details_if_asked(home: Path) -> None:
    logged = {
        name: [event for event in Run.open(name).events() if event["event"] == "evaluate"]
        for name in ("a", "b")
    }
    assert not any("details" in event for event in logged["a"])
    for event in logged["b"]:
        assert 0 < event["details"]["boundary_iou"]["mean"] < event["miou"] + 0.2


def test_details_can_be_left_out() -> None:
    out = run("--soup", "--brief", "--out", "once", "--set", "infer.details=off")
    assert read(out / "scores.json")[-1]["test"]["details"] == {}


def test_without_test_data_the_models_are_scored_on_the_selection_set(
    capsys: pytest.CaptureFixture,
) -> None:
    none = ["--set", "data.test=null", "--set", "data.test_labels=null"]
    out = run("--soup", "--tta", "--out", "scored", *none)
    told = capsys.readouterr().out
    assert told.startswith("data.test: is missing, so the models are only scored, on the selection")
    rows = read(out / "scores.json")
    assert {"fold0", "fold1", "uniform soup", "soft vote"} <= {row["name"] for row in rows}
    assert rows[-1]["name"] == "greedy soup, views"
    assert all("selection" in row and "test" not in row for row in rows)
    assert not list(out.rglob("*.png"))
    run("--soup", "--tta", "--out", "scored")  # a result folder like any other
    assert (out / "masks").is_dir()
    run("--soup", "--tta", "--out", "scored", *none)
    assert len(read(out / "scores.json")) == len(rows)
    with pytest.raises(ConfigError, match=r"data\.test: is missing, so there is nothing"):
        run("--out", "none", *none, "--pseudo", "labels")


def test_differences_are_paired_with_the_last_line(
    compared: tuple[list[dict[str, Any]], str],
) -> None:
    rows, shown = compared
    for column in ("selection", "test"):
        assert "final_minus_this" not in rows[-1][column]
        for row in rows[:-1]:
            paired = row[column]["final_minus_this"]
            expected = rows[-1][column]["miou"] - row[column]["miou"]
            assert paired["difference"] == pytest.approx(expected, abs=1e-9)
            low, high = paired["interval"]
            assert low <= high
            sign = "<" if low > 0 else ">" if high < 0 else "="
            line = next(line for line in shown.splitlines() if line.startswith(f"{row['name']}  "))
            assert f"[{row[column]['interval'][0]:.3f}" in line
            assert f"] {sign}" in line


def test_view_coefficients_are_fitted_on_the_selection_set(
    compared: tuple[list[dict[str, Any]], str],
) -> None:
    (weights,) = compared[0][-1]["view_weights"]
    assert len(weights) == 4
    assert sum(weights) == pytest.approx(1)
    assert max(weights) - min(weights) > 1e-3


def test_a_soup_records_its_recipe(home: Path, compared: tuple[list[dict[str, Any]], str]) -> None:
    state = checkpoint.load(home / "all/greedy-soup-of-a.pt")
    recipe = state["soup"]
    folds = [Path("runs/a/fold0/best.pt"), Path("runs/a/fold1/best.pt")]
    assert [entry["sha256"] for entry in recipe["ingredients"]] == [
        checkpoint.digest(home / path) for path in folds
    ]
    assert len(recipe["steps"]) == len(recipe["barriers"]) == 1
    step, wall = recipe["steps"][0]["score"], recipe["barriers"][0]["barrier"]
    own = [entry["score"] for entry in recipe["ingredients"]]
    assert wall == pytest.approx(sum(own) / 2 - step)  # of two, the first trial is the midpoint
    assert recipe["leaked"] == 0
    soups = {row["name"]: row["soups"] for row in compared[0]}
    assert soups["fold0"] == []
    assert soups["greedy soup"] == [recipe]


def test_all_folds_start_from_the_same_weights_decoder_included(home: Path) -> None:
    """The promise of docs/combining.md; this start is the anchor of a stock soup."""
    anchor = TrainedRun(Run.open("a")).initial_weights()
    for fold in (0, 1):
        state = checkpoint.load(home / f"runs/a/fold{fold}/best.pt")
        assert state["init"] == checkpoint.digest_tensors(anchor)
        moved = [
            key for key, value in state["model"].items() if not torch.equal(value, anchor[key])
        ]
        assert any(key.startswith("decoder.") for key in moved)


def test_a_stock_soup_lies_between_the_start_and_the_mean(
    home: Path, compared: tuple[list[dict[str, Any]], str]
) -> None:
    made, mean = (
        checkpoint.load(home / f"all/{kind}-soup-of-a.pt") for kind in ("stock", "uniform")
    )
    anchor = TrainedRun(Run.open("a")).initial_weights()
    assert made["soup"]["anchor"] == made["init"]
    assert 0 < made["soup"]["ratio"] < 1
    for key, value in made["model"].items():
        if value.is_floating_point() and "running" not in key:
            low, high = (
                torch.minimum(anchor[key], mean["model"][key]),
                torch.maximum(anchor[key], mean["model"][key]),
            )
            rounding = 1e-5 * high.abs().max()
            assert (value >= low - rounding).all()
            assert (value <= high + rounding).all()


def test_a_run_with_another_start_has_no_stock_soup(
    home: Path, compared: tuple[list[dict[str, Any]], str]
) -> None:
    other = home / "runs/seeded"
    shutil.copytree(home / "runs/a", other)
    settings = read(other / "config.json")
    settings["train"]["seed"] = 5
    (other / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SegkitError, match=r"fold0.best\.pt: did not start from the weights"):
        run("--run-dir", "seeded", "--soup", "stock", "--brief", "--out", "seeded")


def test_parts_are_the_stages_and_the_decoder(
    home: Path, compared: tuple[list[dict[str, Any]], str]
) -> None:
    state = checkpoint.load(home / "all/partwise-soup-of-a.pt")
    assert [*state["soup"]["parts"]] == [*(f"stage {i}" for i in range(5)), "decoder"]
    modules = [f"{module}." for part in _parts_of(load_model_of(state)).values() for module in part]
    for key in state["model"]:
        assert sum(key.startswith(module) for module in modules) == 1, key


def load_model_of(state: dict[str, Any]) -> Segmenter:
    model = state["config"]["model"]
    return build_model(model["backbone"], model["decoder"], num_classes=len(state["classes"]))


@pytest.mark.parametrize("backbone", ["swin_t", "hrnet_w18", "mobilenet_v2", "convnext_tiny"])
def test_every_entry_is_in_one_part(backbone: str) -> None:
    with torch.device("meta"):
        model = create_model("fcn", backbone, num_classes=2)
    modules = [f"{module}." for part in _parts_of(model).values() for module in part]
    for key in model.state_dict():
        assert sum(key.startswith(module) for module in modules) == 1, key


def test_calibrated_probabilities_leave_the_masks_alone(tmp_path: Path) -> None:
    outputs = ("--set", 'infer.outputs=["soft","confidence"]', "--brief", "--tta", "hflip")
    plain = run("--soup", *outputs, "--out", str(tmp_path / "plain"))
    out = run("--soup", "--calibrate", *outputs, "--out", str(tmp_path / "calibrated"))
    (row,) = read(out / "scores.json")
    assert row["temperature"] not in (0, 1)
    assert "temperature" not in read(plain / "scores.json")[0]
    for key in ("ece", "brier"):
        details = row["selection"]["details"]
        assert details[key]["mean"] != details[f"{key}_before"]["mean"]
    assert len(row["test"]["details"]["ece"]["per_class_intervals"]) == 11
    for path in (plain / "masks").rglob("*.png"):
        name = path.relative_to(plain / "masks")
        assert path.read_bytes() == (out / "masks" / name).read_bytes()
        before, after = (
            torch.from_numpy(np.load((folder / "soft" / name).with_suffix(".npy"))).float()
            for folder in (plain, out)
        )
        expected = (before.clamp_min(1e-12).log() / row["temperature"]).softmax(0)
        torch.testing.assert_close(after, expected, atol=2e-3, rtol=0)
        with Image.open(out / "confidence" / name) as picture:
            levels = torch.from_numpy(np.array(picture)).float()
        assert picture.mode == "L"
        assert (levels / 255 - after.amax(0)).abs().max() < 0.004


def test_voters_are_calibrated_if_asked(tmp_path: Path) -> None:
    out = run(
        "--calibrate", "voters", "--vote", "weighted", "--brief", "--out", str(tmp_path / "o")
    )
    models = read(out / "origin.json")["models"]
    assert [model["temperature"] != 1 for model in models] == [True, True]
    (row,) = read(out / "scores.json")
    assert row["name"] == "weighted vote calibrated"
    with pytest.raises(SegkitError, match="hard vote has no probabilities"):
        run("--calibrate", "--vote", "hard", "--brief", "--out", str(tmp_path / "hard"))


def test_pseudo_labels_may_be_of_calibrated_probabilities(tmp_path: Path) -> None:
    options = ("--brief", "--soup", "--quantile", "0.5", "--pseudo", str(tmp_path / "pseudo"))
    run(*options, "--calibrate", "--out", str(tmp_path / "teacher"))
    info = read(tmp_path / "pseudo/pseudo.json")["info"]
    assert info["temperature"] == read(tmp_path / "teacher/scores.json")[0]["temperature"]


def test_a_soup_is_made_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(run("--soup", "--brief", "--out", "once"))
    monkeypatch.setattr(soup, "greedy", None)
    assert files(run("--soup", "--brief", "--out", "once")) == before
    monkeypatch.undo()
    monkeypatch.chdir(home)
    monkeypatch.setattr(soup, "greedy", lambda *_, **__: pytest.fail("made again"))
    with pytest.raises(pytest.fail.Exception, match="made again"):
        run("--soup", "--brief", "--out", "once", "--set", "infer.batch_norm_images=8")


def test_an_interrupted_inference_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = run("--brief", "--out", "steady")
    write, written = Results.write, []

    def note(self: Results, index: int, *arguments: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(index)
        write(self, index, *arguments)

    monkeypatch.setattr(Results, "write", note)
    with pytest.raises(KeyboardInterrupt):
        run("--brief", "--out", "cut")
    assert not Path("cut/submission.csv").exists()
    first = written.copy()
    written[:] = [-1] * 9  # no more interruptions
    assert files(run("--brief", "--out", "cut")) == files(steady)
    assert sorted([*first, *written[9:]]) == list(range(5))

    written[:] = [-1] * 9
    masks = files(run("--brief", "--out", "cut", "--tta", "rot90"))
    assert sorted(written[9:]) == list(range(5))  # another way of predicting: nothing is kept
    assert masks["submission.csv"] != files(steady)["submission.csv"]
    written[:] = [-1] * 9
    run("--brief", "--out", "cut", "--tta", "rot90")
    assert written == [-1] * 9


def test_soft_maps(home: Path) -> None:
    outputs = ("--set", 'infer.outputs=["soft"]')
    out = run("--brief", "--out", "soft", *outputs)
    assert not (out / "overlays").exists()
    for path in (out / "masks").rglob("*.png"):
        soft = np.load((out / "soft" / path.relative_to(out / "masks")).with_suffix(".npy"))
        assert soft.dtype == np.float16
        assert soft.shape == (11, 64, 64)
        chosen = np.take_along_axis(soft, np.array(Image.open(path))[None], 0)[0]
        assert (chosen == soft.max(0)).all()
    with pytest.raises(SegkitError, match="hard vote has no probabilities"):
        run("--brief", "--vote", "hard", "--out", "soft-hard", *outputs)


@pytest.mark.parametrize("vote", ["soft", "hard", "weighted"])
def test_votes_of_other_models_and_sizes(vote: str) -> None:
    options = ("--run-dir", "a", "--run-dir", "b", "--vote", vote, "--tta", "hflip")
    out = run(*options, "--out", f"vote-{vote}")
    rows = {row["name"]: row for row in read(out / "scores.json")}
    assert {"a fold0", "a fold1", "b fold0", f"{vote} vote", f"{vote} vote, views"} <= set(rows)
    assert rows["b fold0"]["selection"]["images"] == 4  # both runs held the same ones out


def test_runs_are_compared_on_what_all_of_them_held_out(home: Path) -> None:
    shutil.copytree(home / "runs/a", home / "runs/fewer")
    folds = read(home / "runs/fewer/folds.json")
    dropped = folds["selection"].pop()
    (home / "runs/fewer/folds.json").write_text(json.dumps(folds))
    out = run("--run-dir", "a", "--run-dir", "fewer", "--soup", "--out", "runs-of-two")
    rows = {row["name"]: row["selection"] for row in read(out / "scores.json")}
    assert dropped
    assert {row["images"] for row in rows.values()} == {3}
    assert rows["a fold0"]["miou"] == rows["fewer fold0"]["miou"]
    for name in ("a greedy soup", "fewer greedy soup"):
        assert "final_minus_this" in rows[name]


def test_a_leaking_selection_set_is_refused_or_recorded(home: Path) -> None:
    leaky = home / "runs/leaky"
    shutil.copytree(home / "runs/a", leaky)
    folds = read(leaky / "folds.json")
    folds["selection"] += folds["folds"][0][:2]
    (leaky / "folds.json").write_text(json.dumps(folds))
    options = ("--run-dir", "leaky", "--soup", "--out", "leaky")
    with pytest.raises(
        SegkitError, match=r"2 of the 6 images .*fold1.*pass --allow-leak$"
    ) as error:
        run(*options)
    assert isinstance(error.value.__cause__, soup.LeakError)
    out = run(*options, "--allow-leak")
    assert checkpoint.load(out / "greedy-soup-of-leaky.pt")["soup"]["leaked"] == 2
    rows = {row["name"]: row["selection"]["trained_on"] for row in read(out / "scores.json")}
    assert rows["fold0"] == 0
    assert rows["fold1"] == rows["uniform soup"] == 2


def test_view_coefficients_need_the_mean(home: Path) -> None:
    with pytest.raises(ConfigError, match="mean of probabilities"):
        run("--tta", "--weigh-views", "--set", "infer.merge=max", "--out", "max")


@pytest.fixture(scope="module")
def labels(home: Path) -> Path:
    """A folder of pseudo labels of the test images; half of the pixels are ignored."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        run("--brief", "--pseudo", "pseudo", "--quantile", "0.5", "--out", "teacher")
    return home / "pseudo"


def test_pseudo_labels_are_the_confident_half(labels: Path) -> None:
    source = CocoSource(
        annotations=str(labels / "pseudo.json"),
        images=str(labels / "images"),
        background="Background",
    )
    masks = torch.stack([source.mask(i) for i in range(len(source))])
    predicted = torch.stack(
        [torch.from_numpy(np.array(Image.open(f"teacher/masks/{Path(name).with_suffix('.png')}")))
         for name in source.names]
    )  # fmt: skip
    sure = masks != 255
    assert torch.equal(masks[sure], predicted[sure])
    for value in predicted.unique():
        assert sure[predicted == value].float().mean() >= 0.5
    assert sure.float().mean() < 0.8
    assert source.info["round"] == 1
    models = [checkpoint.digest(Path(f"runs/a/fold{n}/best.pt")) for n in (0, 1)]
    assert sorted(source.info["models"]) == sorted(models)


def _spec(labels: Path) -> str:
    spec = {"annotations": str(labels / "pseudo.json"), "images": str(labels / "images")}
    return "data.pseudo=" + json.dumps({"name": "coco", "background": "Background", **spec})


def test_pseudo_labels_are_trained_on_and_recorded(labels: Path) -> None:
    options = ("--set", "data.pseudo_weight=0.5", "--folds", "0", "--quiet")
    train(["--cfg", "tiny.json", "--run-dir", "runs/student", "--set", _spec(labels), *options])
    student = Run.open("student")
    (event,) = [event for event in student.events() if event["event"] == "pseudo"]
    assert (event["round"], event["images"]) == (1, 5)
    state, teacher = (
        checkpoint.load(Path(f"runs/{name}/fold0/best.pt")) for name in ("student", "a")
    )
    assert state["pseudo_round"] == 1
    source = CocoSource(annotations="demo/test.json", images="demo")
    marks = digests(source, range(len(source)))
    assert set(state["trained_on"]) == {*teacher["trained_on"], *marks}
    assert student.read("folds.json") == Run.open("a").read("folds.json")
    assert state["step"] == 2 * ((8 + 2) // 4)  # 8 images of the fold and half of 5
    rows = read(run("--run-dir", "student", "--out", "student") / "scores.json")
    assert rows[-1]["test"]["trained_on"] == 5
    assert rows[-1]["selection"]["trained_on"] == 0


def test_pseudo_labels_never_leak_into_what_chooses(labels: Path) -> None:
    options = ("--cfg", "tiny.json", "--set", _spec(labels), "--quiet")
    with pytest.raises(DataError, match=r"trained on 9 of the 10 images that choose"):
        train([*options, "--run-dir", "runs/other", "--set", "data.selection=0.5"])


def test_labelled_images_get_no_pseudo_labels(home: Path, labels: Path) -> None:
    photo = home / "demo" / read(home / "demo/train.json")["images"][3]["file_name"]
    (home / "known").mkdir()
    shutil.copy(photo, home / "known")  # under another name, too
    with pytest.raises(DataError, match="no pixel was labelled"):
        run("--images", "known", "--pseudo", "none", "--out", "none-teacher")
    copied = home / "copied"
    shutil.copytree(labels, copied)
    shutil.copy(photo, copied / "images" / read(copied / "pseudo.json")["images"][0]["file_name"])
    with pytest.raises(DataError, match="1 of its images are labelled already"):
        train(["--cfg", "tiny.json", "--run-dir", "runs/again", "--set", _spec(copied)])


def paint(path: Path, color: int, size: tuple[int, int] = (40, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (color, 0, 0)).save(path)
    return path


def relative(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_out_of_memory_names_the_settings_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(Predictor, "_logits", full)
    sentence = (
        "CUDA is out of memory (2.00 GiB more were needed): lower infer.batch_size, or set "
        "infer.tile to a smaller side"
    )
    with pytest.raises(SegkitError, match=f"^{re.escape(sentence)}$"):
        run("--out", str(tmp_path / "oom"))


def test_images_with_equal_names_keep_results_of_their_own(tmp_path: Path) -> None:
    for number, name in enumerate(["p/a.jpg", "p/a.png", "p/b.png", "q/b.png", "q/sub/B.jpg"]):
        paint(tmp_path / name, 50 * number, size=(40 + number, 32))
    files = [tmp_path / "p", tmp_path / "p/a.jpg", tmp_path / "q/b.png", tmp_path / "q/sub/B.jpg"]
    outputs = ("--set", 'infer.outputs=["overlays","sheets","soft","coco"]')
    out = run("--images", *map(str, files), "--brief", "--out", "equal-names", *outputs)
    names = {"a.jpg": 40, "a.png": 41, "p/b": 42, "q/b": 43, "B": 44}
    for kind, suffix in (("masks", "png"), ("overlays", "jpg"), ("sheets", "jpg"), ("soft", "npy")):
        assert relative(out / kind) == {f"{name}.{suffix}" for name in names}
    for name, width in names.items():
        with Image.open(out / "masks" / f"{name}.png") as mask:
            assert mask.width == width


def test_names_of_photographs(tmp_path: Path) -> None:
    files = [paint(tmp_path / name, 0) for name in ("x/r/a.jpg", "y/r/a.jpg", "r/a.jpg", "b.jpg")]
    (tmp_path / "link").symlink_to(tmp_path / "x")
    given = (tmp_path / "x", *files, tmp_path / "link/r/a.jpg", tmp_path / "x/../b.jpg")
    source = PhotoSource(paths=tuple(map(str, given)))
    assert source.names == ("x/r/a.jpg", "y/r/a.jpg", f"{tmp_path.name}/r/a.jpg", "b.jpg")
    assert [source.path(i) for i in range(4)] == files


def test_a_folder_with_other_files_is_refused_and_unchanged(tmp_path: Path) -> None:
    for name in read(Path("demo/test.json"))["images"][:2]:
        paint(tmp_path / "masks" / Path(name["file_name"]).with_suffix(".png"), 3)
    before = files(tmp_path)
    for option in ("--out", "--pseudo"):
        with pytest.raises(SegkitError, match="is not empty and holds no results of segkit"):
            infer.main(["--run-dir", "a", "--brief", option, str(tmp_path)])
    assert files(tmp_path) == before


def test_results_of_another_command_are_deleted_and_other_files_stay(tmp_path: Path) -> None:
    paint(tmp_path / "photos/a.png", 50)
    paint(tmp_path / "other/b.png", 90)
    out = tmp_path / "out"
    keep = ("--set", 'infer.outputs=["overlays","csv"]', "--brief", "--out", str(out))
    run("--images", str(tmp_path / "photos"), *keep)
    (out / "masks/notes.txt").write_text("mine")
    run("--images", str(tmp_path / "other"), *keep)
    assert relative(out / "masks") == {"b.png", "notes.txt"}
    assert relative(out / "overlays") == {"b.jpg"}
    (tmp_path / "other/b.png").rename(tmp_path / "other/c.png")  # the same bytes
    run("--images", str(tmp_path / "other"), *keep[2:], "--set", "infer.outputs=[]")
    assert relative(out) == {"masks/c.png", "masks/notes.txt", "scores.json", "origin.json"}
    paint(tmp_path / "other/notes.png", 1)
    mine = paint(out / "masks/notes.png", 9).read_bytes()
    with pytest.raises(SegkitError, match=r"notes\.png: a result needs this path"):
        run("--images", str(tmp_path / "other"), *keep)
    assert (out / "masks/notes.png").read_bytes() == mine
    with pytest.raises(SegkitError, match="holds the images to predict"):
        run("--images", str(out / "masks"), *keep)


def test_photographs_leave_the_results_of_the_test_set_alone(tmp_path: Path, home: Path) -> None:
    infer.main(["--run-dir", "a", "--brief", "--quiet"])
    before = files(home / "runs/a/infer")
    assert "submission.csv" in before
    page = (home / "runs/a/report.html").read_bytes()
    photo = paint(tmp_path / "photo.png", 70)
    infer.main(["--run-dir", "a", "--brief", "--quiet", "--images", str(photo)])
    assert files(home / "runs/a/infer") == before
    assert (home / "runs/a/report.html").read_bytes() == page
    assert relative(home / "runs/a/infer-images/masks") == {"photo.png"}
    assert read(home / "runs/a/infer-images/scores.json") == []


def test_photographs_are_scored_on_the_selection_set_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = paint(tmp_path / "photo.png", 70)
    options = ("--images", str(photo), "--out", str(tmp_path / "out"))
    rows = read(run("--compare", *options) / "scores.json")
    assert all("selection" in row for row in rows)
    monkeypatch.setattr(infer, "common_selection", lambda _: pytest.fail("is scored unasked"))
    assert read(run(*options) / "scores.json") == []


def test_what_is_no_soup_is_not_overwritten(home: Path) -> None:
    out = run("--brief", "--out", "no-soup")
    shutil.copy(home / "runs/a/fold0/best.pt", out / "greedy-soup-of-a.pt")
    with pytest.raises(CheckpointError, match=r"greedy-soup-of-a\.pt: holds no soup"):
        run("--brief", "--soup", "--out", "no-soup")


def test_pseudo_labels_of_other_images_leave_no_old_ones(tmp_path: Path, home: Path) -> None:
    options = ("--brief", "--pseudo", "renewed", "--confidence", "0", "--out", "renewed-teacher")
    run(*options)
    assert len(relative(Path("renewed/images"))) == 5
    for record in read(home / "demo/test.json")["images"][:2]:
        shutil.copy(home / "demo" / record["file_name"], tmp_path)
    run(*options, "--images", str(tmp_path))
    names = [record["file_name"] for record in read(Path("renewed/pseudo.json"))["images"]]
    assert relative(Path("renewed/images")) == set(names) == relative(tmp_path)
    with pytest.raises(SegkitError, match="is the folder of the results"):
        run(*options[:-1], "renewed")


def damaged_photographs(folder: Path) -> None:
    """Write four intact photographs, and damaged ones before, between and after them."""
    for number, name in enumerate(["b", "d", "f", "h"]):
        paint(folder / f"{name}.png", 60 * number)
    noise = Image.effect_noise((64, 48), 80).convert("RGB")
    noise.save(folder / "c.jpg")
    noise.save(folder / "e.png")
    for name in ("c.jpg", "e.png"):  # only their pixels are damaged
        (folder / name).write_bytes((folder / name).read_bytes()[:1500])
    (folder / "a.png").write_bytes(b"")
    (folder / "i.jpg").write_text("no image")
    (folder / "g.png").symlink_to("nowhere")
    (folder / "folder.png").mkdir()


DAMAGED = ("a.png is empty", "c.jpg cannot be", "e.png cannot be", "g.png does not", "i.jpg is")


@pytest.mark.parametrize("options", [("--run-dir", "a", "--vote", "hard"), ("--run-dir", "b")])
def test_photographs_that_cannot_be_read_are_left_out_and_named(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged_photographs(tmp_path / "photos")
    out = tmp_path / "out"
    command = ("--images", str(tmp_path / "photos"), "--brief", "--out", str(out), "--quiet")
    for _ in range(2):
        with pytest.raises(DataError, match="5 of 9 images cannot be read"):
            run(*command, *options, "--set", "infer.batch_size=2")
        named = [line for line in capsys.readouterr().err.splitlines() if "left out: " in line]
        assert len(named) == 5
        assert all(any(part in line for line in named) for part in DAMAGED)
        assert relative(out / "masks") == {"b.png", "d.png", "f.png", "h.png"}
        rows = (out / "submission.csv").read_text().splitlines()
        assert [row.split(",")[0] for row in rows[1:]] == ["b.png", "d.png", "f.png", "h.png"]
    for name in ("c.jpg", "e.png"):
        shutil.copy(tmp_path / "photos/h.png", tmp_path / "photos" / name)
    for name in ("a.png", "g.png", "i.jpg"):
        (tmp_path / "photos" / name).unlink()
    run(*command, *options)
    assert relative(out / "masks") == {f"{name}.png" for name in "bcdefh"}


def test_photographs_of_which_none_can_be_read_are_one_sentence(tmp_path: Path) -> None:
    paint(tmp_path / "p/a.png", 0)
    (tmp_path / "p/a.png").write_bytes((tmp_path / "p/a.png").read_bytes()[:60])
    (tmp_path / "q").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "q" / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.png cannot be .*none of the images can be read"):
        run("--images", str(tmp_path / "p"), "--brief", "--out", str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"a\.png is empty .*\(and 1 more\); no image is left"):
        run("--images", str(tmp_path / "q"), "--brief", "--out", str(tmp_path / "out"))


def test_a_damaged_image_of_the_test_set_ends_the_inference(tmp_path: Path, home: Path) -> None:
    shutil.copytree(home / "demo", tmp_path / "demo")
    name = read(home / "demo/test.json")["images"][2]["file_name"]
    photo = tmp_path / "demo" / name
    photo.write_bytes(photo.read_bytes()[:900])
    test = {"name": "coco", "annotations": str(tmp_path / "demo/test.json")}
    options = ("--set", f"data.test={json.dumps(test)}", "--set", "data.test_labels=null")
    with pytest.raises(DataError, match=name):
        run("--brief", "--out", str(tmp_path / "out"), *options)


def infer_on_rank(home: Path, *arguments: str) -> str:
    """Return the error of infer.py on a rank."""
    os.chdir(home)
    infer.distributed.session = lambda *_, **__: nullcontext(torch.device("cpu"))  # it is open
    try:
        infer.main(arguments)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_two_ranks_leave_out_the_same_photographs(tmp_path: Path, home: Path) -> None:
    damaged_photographs(tmp_path / "photos")
    options = ["--run-dir", "b", "--images", str(tmp_path / "photos"), "--brief", "--quiet"]
    ends = run_ranks(infer_on_rank, 2, home, *options, "--out", str(tmp_path / "two"))
    assert ends == ["5 of 9 images cannot be read and have no results", ""]
    with pytest.raises(DataError):
        infer.main([*options, "--out", str(tmp_path / "one")])
    assert files(tmp_path / "two") == files(tmp_path / "one")


_PEAK = """
import resource, sys, infer
infer.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_is_flat_from_50_to_500_images(home: Path) -> None:
    photo = Image.effect_noise((128, 128), 60).convert("RGB")
    peaks = []
    for count in (50, 500):
        folder = home / f"photos{count}"
        folder.mkdir()
        for number in range(count):
            photo.rotate(number % 4 * 90).save(folder / f"{number}.png")
        options = ["--images", str(folder), "--soup", "--tta", "--brief", "--out", f"flat{count}"]
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, "--run-dir", "runs/a", *options], cwd=home,
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 24 * 1024


def test_results_elsewhere_leave_the_run_as_it_is(home: Path) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        files = (home / "runs/b").rglob("*")
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}

    before = state()
    run("--run-dir", "runs/b", "--brief", "--out", "elsewhere")
    assert state() == before
