"""A new user's path: a folder that nobody prepared, ``plan``, ``train`` and ``infer``."""

import json
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import segkit
from segkit import infer, train
from segkit.commands import plan
from segkit.core import config
from segkit.core.errors import CheckpointError, ConfigError, DataError, SegkitError
from segkit.core.machine import Machine
from segkit.core.run import Run
from segkit.data.formats import coco_files
from segkit.models.pretrained import published
from segkit.models.segmenter import build_model
from segkit.training.rules import Choice


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a network and without weights, and with an empty current folder."""

    def refuse(url: str, argument: str) -> Path:
        raise CheckpointError(f"{argument}: {url} cannot be downloaded")

    monkeypatch.setattr(published, "_download", refuse)
    monkeypatch.chdir(tmp_path)


def scene(i: int) -> tuple[np.ndarray, np.ndarray]:
    """A photograph of one of several sizes, and its mask: two kinds of bright rectangles."""
    rng = np.random.default_rng(i)
    height, width = 40 + 8 * (i % 3), 56 + 8 * (i % 2)
    pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    for kind in (1, 2):
        top, left = rng.integers(0, height - 20), rng.integers(0, width - 20)
        pixels[top : top + 16, left : left + 16, kind] += 150
        mask[top : top + 16, left : left + 16] = kind
    return pixels, mask


def photographs(folder: Path, start: int, count: int, *, suffix: str = ".jpg") -> list[np.ndarray]:
    folder.mkdir(parents=True)
    masks = []
    for i in range(start, start + count):
        pixels, mask = scene(i)
        Image.fromarray(pixels).save(folder / f"photo {i}{suffix}")
        masks.append(mask)
    return masks


def as_coco(root: Path) -> None:
    for part, start, count in (("train", 0, 16), ("test", 16, 3)):
        images: list[Any] = []
        annotations: list[Any] = []
        for i, mask in enumerate(photographs(root / "images" / part, start, count)):
            height, width = mask.shape
            name = f"{part}/photo {start + i}.jpg"
            images.append({"id": i, "file_name": name, "height": height, "width": width})
            for kind in (1, 2):
                rle = coco_mask.encode(np.asfortranarray(mask == kind))
                rle["counts"] = rle["counts"].decode()
                about = {"id": len(annotations), "image_id": i, "category_id": 7 + kind}
                annotations.append({**about, "segmentation": rle, "iscrowd": 0})
        categories = [{"id": 8, "name": "can"}, {"id": 9, "name": "bag"}]
        path = root / f"annotations/instances_{part}.json"
        path.parent.mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": categories}
        path.write_text(json.dumps(content))


def as_palette(root: Path) -> None:
    for part, start, count in (("train", 0, 12), ("val", 12, 4), ("test", 16, 3)):
        (root / f"{part}annot").mkdir(parents=True)
        for i, mask in enumerate(photographs(root / part, start, count)):
            image = Image.fromarray(np.where(mask == 2, 255, mask).astype(np.uint8)).convert("P")
            image.putpalette([0, 0, 0, 200, 0, 0] + 254 * [9, 9, 9])
            image.save(root / f"{part}annot" / f"photo {start + i}.png")


def as_binary(root: Path) -> None:
    (root / "gt").mkdir(parents=True)
    for i, mask in enumerate(photographs(root / "JPEGImages", 0, 16)):
        pixels = np.where(mask > 0, 255, 0).astype(np.uint8)
        Image.fromarray(pixels).save(root / "gt" / f"photo {i}_mask.png")


FOLDERS = {
    "coco": (as_coco, 3, ["background", "can", "bag"]),
    "palette": (as_palette, 3, ["class 0", "class 1"]),
    "binary": (as_binary, 0, ["background", "object"]),
}


@pytest.mark.parametrize(
    "kind",
    ["binary", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("coco", "palette"))],
)
def test_a_folder_becomes_a_model_without_any_edit(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, tests, classes = FOLDERS[kind]
    make(Path("photos"))
    plan.main(["photos", "--hours", "0.0001", "--device", "cpu"])
    said = capsys.readouterr().out
    assert all(len(line) <= 80 or " " not in line.strip() for line in said.splitlines())
    assert "next: segkit train --cfg photos.json" in said
    assert "random weights" in said
    cfg = config.load("photos.json")
    train.main(["--cfg", "photos.json", "--run-dir", "run", "--device", "cpu"])
    run = Run(Path("run"))
    assert run.read("classes.json")["classes"] == classes
    assert run.read("config.json")["optim"]["lr"] == cfg.optim.lr
    if tests:
        infer.main(["--run-dir", "run", "--device", "cpu"])
        assert len(json.loads(Path("run/infer/scores.json").read_text())) >= 1
    else:
        photo = str(next(Path("photos/JPEGImages").iterdir()))
        infer.main(["--run-dir", "run", "--images", photo, "--device", "cpu"])
    written = Path("run/infer/masks" if tests else "run/infer-images/masks")
    assert len(list(written.rglob("*.png"))) == max(1, tests)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are not run: each takes a second."""
    monkeypatch.setattr(plan, "check_memory", lambda *_, **__: 1.0)


@pytest.mark.usefixtures("quick")
def test_a_plan_says_why(tmp_path: Path) -> None:
    as_binary(Path("photos"))
    made = segkit.plan("photos", hours=1)
    assert made.config["note"].startswith("Planned by segkit for 16 images of photos")
    assert all(choice.reason for choice in made.choices)
    made.save(tmp_path / "made.json")
    assert json.loads((tmp_path / "made.json").read_text())["data"]["train"] == {
        "name": "masks",
        "images": "photos/JPEGImages",
        "masks": "photos/gt",
        "mask_suffix": "_mask",
        "classes": ["background", "object"],
        "values": {"0": 0, "255": 1},
    }


@pytest.mark.usefixtures("quick")
def test_given_weights_choose_their_backbone(tmp_path: Path) -> None:
    as_binary(Path("photos"))
    model = build_model("resnet18", "fcn", num_classes=2)
    torch.save(model.backbone.state_dict(), "given.pth")
    cfg = segkit.plan("photos", weights="given.pth").config
    assert cfg["model"]["backbone"] == {"name": "resnet18"}
    assert cfg["model"]["weights"] == "given.pth"
    assert cfg["optim"]["backbone_lr_factor"] == 0.1
    assert "mean" not in cfg["data"]


@pytest.mark.usefixtures("quick")
def test_near_duplicates_stay_together() -> None:
    as_binary(Path("photos"))
    for name in ("JPEGImages/photo {}.jpg", "gt/photo {}_mask.png"):
        image = Image.open("photos/" + name.format(3))
        image.save("photos/" + name.format(99))
    plan.main(["photos", "--device", "cpu"])
    groups = json.loads(Path("photos-groups.json").read_text())
    assert config.load("photos.json").data.groups == "photos-groups.json"
    assert groups["photo 99.jpg"] == groups["photo 3.jpg"]
    assert len(set(groups.values())) == 16


def test_a_batch_that_the_device_cannot_hold_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(cfg: config.Config, *_: Any, **__: Any) -> float:
        if cfg.train.accumulate < 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    monkeypatch.setattr(plan, "check_memory", step)
    as_binary(Path("photos"))
    made = segkit.plan("photos")
    (parts,) = (choice for choice in made.choices if choice.key == "train.accumulate")
    assert made.config["train"]["accumulate"] == parts.value == 2
    assert "ran out of memory" in parts.reason


def test_a_coco_file_is_read_once_to_find_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of hundreds of megabytes takes many seconds."""
    as_coco(Path("photos"))
    read = []
    original = coco_files.read_json
    monkeypatch.setattr(coco_files, "read_json", lambda path: read.append(path) or original(path))
    assert {*plan.find_parts(Path("photos"))} == {"train", "test"}
    assert len(read) == len({*read}) == 2
    path = Path("photos/annotations/instances_test.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "images": []}))
    assert {*plan.find_parts(Path("photos"))} == {"train"}


def test_masks_of_small_values_in_jpeg_are_named() -> None:
    """JPEG makes 0 or 2 of a 1, so no value is sure; the reason is said instead of a guess."""
    root = Path("photos")
    for i, mask in enumerate(photographs(root / "images", 0, 4)):
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / f"masks/photo {i}.jpg")
    with pytest.raises(
        DataError, match=r"masks: its JPEG files look like .* expected masks in PNG"
    ):
        segkit.plan("photos")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["empty"], "empty: has no labels that segkit recognizes"),
        (["empty", "--out", "no/where.json"], "there is no folder no; make it first"),
        (["empty", "--out", "own.json"], "own.json: exists and was not planned by segkit"),
        (["empty", "--out", "empty"], "--out empty: is a folder"),
        (["empty", "--device", "abacus"], "device abacus: does not exist here"),
    ],
)
def test_mistakes_are_sentences(words: list[str], sentence: str) -> None:
    Path("empty").mkdir()
    Path("empty/a.txt").write_text("")
    Path("own.json").write_text('{"note": "mine"}')
    with pytest.raises(SegkitError, match=sentence):
        plan.main(words)
    Path("empty/a.txt").unlink()
    with pytest.raises(DataError, match=r"\(it is empty\)"):
        plan.main(["empty"])
    with pytest.raises(SystemExit):
        plan.main(["/"])
    assert json.loads(Path("own.json").read_text()) == {"note": "mine"}


def test_a_folder_or_labels_in_place_of_a_configuration_are_named() -> None:
    as_coco(Path("photos"))
    with pytest.raises(ConfigError, match=r"photos: is a folder; .* segkit plan photos writes"):
        train.main(["--cfg", "photos"])
    with pytest.raises(ConfigError, match=r"is a COCO file; .* segkit plan writes"):
        train.main(["--cfg", "photos/annotations/instances_train.json"])


def test_a_damaged_coco_file_beside_others_is_said(quick: None) -> None:
    as_coco(Path("photos"))
    Path("photos/annotations/instances_val.json").write_text('{"images": [')
    warnings = plan.plan("photos", hours=0.0001, device="cpu").warnings
    assert any(text.startswith("left out: photos/annotations/inst") for text in warnings)


def test_commands_to_copy_are_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_binary(Path("my photos"))
    plan.main(["my photos", "--hours", "0.0001", "--device", "cpu"])
    assert "next: segkit train --cfg 'my photos.json'" in capsys.readouterr().out
    cfg, run = config.load("my photos.json"), Run(tmp_path / "my run")
    said = train.next_commands(cfg, run)
    assert f"--run-dir '{run.folder}' --images" in said
    assert f"--cfg '{run.folder}/config.json'" in said


def test_files_in_place_of_a_folder_and_one_image_are_named() -> None:
    photographs(Path("photos/images"), 0, 1)
    with ZipFile("photos.zip", "w") as file:
        file.write("photos/images/photo 0.jpg")
    with pytest.raises(DataError, match=r"photos.zip: is not a folder; .*: unzip it"):
        plan.main(["photos.zip"])
    Path("photos/masks").mkdir()
    Image.fromarray(scene(0)[1]).save("photos/masks/photo 0.png")
    with pytest.raises(DataError, match="photos: has 1 labelled image; expected 2 or more"):
        plan.main(["photos"])


def test_a_folder_without_write_permission_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.os, "access", lambda *_: False)
    with pytest.raises(SegkitError, match=r"--out a.json: no file may be written in .* --out"):
        plan.check_out(Path("a.json"))


@pytest.mark.parametrize("count", [2, 3])
def test_few_images_can_be_trained(quick: None, count: int) -> None:
    for i, mask in enumerate(photographs(Path("photos/images"), 0, count)):
        Path("photos/masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(f"photos/masks/photo {i}.png")
    batch = plan.plan("photos", hours=0.001, device="cpu").config["train"]["batch_size"]
    assert batch == 1  # a fold trains on the smaller half


def test_a_given_file_of_no_weights_is_named() -> None:
    as_binary(Path("photos"))
    Path("a.pth").write_text("no weights")
    with pytest.raises((SegkitError, DataError), match=r"a\.pth"):
        segkit.plan("photos", weights="a.pth")


def test_the_machine_is_read() -> None:
    machine = plan.read_machine(torch.device("cpu"), Path())
    assert isinstance(machine, Machine)
    assert machine.device == "cpu"
    assert 0 < machine.memory < 1e5
    assert machine.cores >= 1
    assert machine.disk > 0


def test_values_are_short() -> None:
    assert plan._short({"name": "unet", "widths": [8]}) == "unet (widths [8])"
    assert plan._short([{"name": "dice"}, {"name": "focal"}]) == "dice, focal"
    assert Choice("a.b", None, "why").key == "a.b"
