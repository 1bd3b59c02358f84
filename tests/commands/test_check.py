"""``segkit check`` reports every fault of a data set, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segkit.commands.check import faults, main
from segkit.core.config import DataConfig, parse
from segkit.core.errors import ConfigError, DataError

SIZE = 16
SQUARE = [2, 2, 9, 2, 9, 9, 2, 9]
RUNS = {"size": [SIZE, SIZE]}

# what is done to a sound annotation, for each fault of its own image
ANNOTATION_FAULTS: list[dict[str, Any]] = [
    {"segmentation": [[1, 1, 4, 1]]},
    {"segmentation": [[1, 1, 4, 1, 4]]},
    {"segmentation": [[1, 1, 4, 1, 4, float("nan")]]},
    {"segmentation": [[1, 1, 4, 1, 4, float("inf")]]},
    {"segmentation": [[1, 1, 4, 1, 4, 1e300]]},
    {"segmentation": [[1, 1, 2, 2, 3, 3]]},
    {"segmentation": [[20, 1, 24, 1, 24, 9]]},
    {"segmentation": [["1", 1, 4, 1, 4, 9]]},
    {"segmentation": []},
    {"segmentation": {**RUNS, "counts": [100, 100]}},
    {"segmentation": {**RUNS, "counts": [300, -44]}},
    {"segmentation": {**RUNS, "counts": [10**15]}},
    {"segmentation": {**RUNS, "counts": [256]}},
    {"segmentation": {**RUNS, "counts": "PPPP"}},
    {"segmentation": {**RUNS, "counts": "0"}},
    {"segmentation": {"size": [1, 256], "counts": [100, 156]}},
    {"area": 0},
    {"area": float("nan")},
    {"iscrowd": 3},
    {"category_id": 77},
    {"image_id": 777},
    {"id": 0},
    {"id": None},
]


def record(key: int, **changes: Any) -> dict[str, Any]:
    sound = {"id": key, "image_id": key, "category_id": 1, "area": 49, "segmentation": [SQUARE]}
    return {**sound, **changes}


def plant(folder: Path) -> tuple[DataConfig, set[tuple[str, int | None]]]:
    """Write a COCO set with 40 faults; return them as (file, annotation)."""
    folder.mkdir()
    picture = Image.new("RGB", (SIZE, SIZE))
    whole: dict[str, Any] = {"categories": [{"id": 1, "name": "can"}]}
    images = whole["images"] = []
    annotations = whole["annotations"] = []
    expected: set[tuple[str, int | None]] = set()

    def add(name: str | None = None, **changes: Any) -> str:
        key = len(images)
        name = name or f"{key:02d}.png"
        images.append({"id": key, "file_name": name, "height": SIZE, "width": SIZE, **changes})
        annotations.append(record(key))
        return name

    for _ in range(3):  # sound images before, between and after the faulty ones
        picture.save(folder / add())
    for changes in ANNOTATION_FAULTS:
        name = add()
        picture.save(folder / name)
        annotations[-1] |= changes
        file = str(folder / "some.json") if "image_id" in changes else name
        expected.add((file, annotations[-1]["id"]))
    picture.save(folder / add())

    broken = {
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("no image"),
        "cut": lambda path: path.write_bytes((folder / "00.png").read_bytes()[:50]),
        "gone": lambda path: None,
        "large": lambda path: Image.new("RGB", (SIZE, SIZE + 1)).save(path),
        "bomb": lambda path: Image.new("1", (9000, 9000)).save(path),
        "float": lambda path: Image.fromarray(np.ones((SIZE, SIZE), np.float32)).save(path, "TIFF"),
        "link": lambda path: path.symlink_to(outside),
    }
    outside = folder.parent / "outside.png"
    picture.save(outside)
    for name, spoil in broken.items():
        spoil(folder / add(f"{name}.png"))
        expected.add((f"{name}.png", None))
    bad_records: list[dict[str, Any]] = [
        {"file_name": "../outside.png"},
        {"file_name": str(outside)},
        {"file_name": "nul\0.png"},
        {"height": -1, "file_name": "negative.png"},
        {"height": 10**6, "width": 10**6, "file_name": "vast.png"},
        {"width": "16", "file_name": "word.png"},
        {"file_name": "00.png"},
        {"width": None, "file_name": "none.png"},
    ]
    for changes in bad_records:
        add(**changes)
        expected.add((changes["file_name"], None))
    # one id twice: its annotation belongs to the first of the two
    images.append({**images[1], "file_name": "twice.png"})
    expected.add(("twice.png", None))
    picture.save(folder / add())
    (folder / "some.json").write_text(json.dumps(whole))
    train = {"name": "coco", "annotations": str(folder / "some.json")}
    return parse({"data": {"train": train}}).data, expected


def test_finds_exactly_the_40_planted_faults(tmp_path: Path) -> None:
    data, expected = plant(tmp_path / "data")
    assert len(expected) == 40
    listed = list(faults(data))
    assert {(fault.file, fault.annotation) for fault in listed} == expected
    assert len(listed) == 40
    assert all(fault.sentence.startswith("data.train: ") for fault in listed)
    assert all("\n" not in fault.sentence for fault in listed)


def write_masks(folder: Path, values: int) -> dict[str, Any]:
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (9, 7)).save(folder / f"images/{i}.jpg")
        Image.new("L", (9, 7), i % values).save(folder / f"masks/{i}.png")
    paths = {part: str(folder / part) for part in ("images", "masks")}
    return {"name": "masks", **paths, "classes": ["ground", "can"]}


def test_every_part_is_read(tmp_path: Path) -> None:
    """Train is valid, val has a wrong value, test_labels other classes, test cannot be opened."""
    data = {
        "train": write_masks(tmp_path / "train", 2),
        "val": write_masks(tmp_path / "val", 3),
        "test": {"name": "masks", "images": str(tmp_path / "gone"), "classes": ["a"]},
        "test_labels": {**write_masks(tmp_path / "test", 2), "classes": ["ground", "bag"]},
    }
    sentences = [fault.sentence for fault in faults(parse({"data": data}).data)]
    assert len(sentences) == 3
    assert "data.val: " in sentences[0]
    assert "2.png has the values 2" in sentences[0]
    assert sentences[1].startswith("data.test: ")
    assert "is not a folder" in sentences[1]
    assert sentences[2].startswith("data.test_labels has the classes ground, bag, but")


def test_groups_are_checked(tmp_path: Path) -> None:
    data = {"train": write_masks(tmp_path / "train", 2), "group_pattern": "^(x)"}
    (fault,) = faults(parse({"data": data}).data)
    assert "does not match data.group_pattern" in fault.sentence


def test_a_misspelt_argument_is_the_configurations_fault() -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.annotation: .*did you mean 'annotations'"):
        list(faults(parse({"data": {"train": {"name": "coco", "annotation": "a"}}}).data))


def test_nothing_to_check_is_no_success() -> None:
    with pytest.raises(ConfigError, match="names no images"):
        list(faults(DataConfig()))


def test_demo_set_has_no_faults(tmp_path: Path) -> None:
    demo = {"name": "demo", "root": str(tmp_path / "demo"), "train": 2, "test": 1, "size": 64}
    assert list(faults(parse({"data": {"train": demo}}).data)) == []


def test_main_prints_each_fault_and_fails(tmp_path: Path, capsys) -> None:
    config = tmp_path / "some.json"
    config.write_text(json.dumps({"data": {"train": write_masks(tmp_path / "data", 3)}}))
    with pytest.raises(DataError, match="faults found: 1"):
        main(["--cfg", str(config), "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["file"] == "2.jpg"
    main(["--cfg", str(config), "--set", 'data.train.classes=["background", "b", "c"]'])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"data.train: 3 images, 3 classes from masks in {tmp_path / 'data/masks'}",
        "data.train: warning: 1 of 3 images have no labelled object, such as 0.jpg: right if there "
        "is none; else label or remove them",
        "no faults found; training would see 3 images with background 33.3 %, b 33.3 %, c 33.3 % "
        "of the labelled pixels; 0 % of all pixels are ignored",
    ]


def test_command_exits_with_1(tmp_path: Path) -> None:
    config = tmp_path / "some.json"
    config.write_text(json.dumps({"data": {"train": write_masks(tmp_path / "data", 3)}}))
    done = subprocess.run(
        [sys.executable, "-m", "segkit", "check", "--cfg", str(config)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "2.png has the values 2" in done.stdout
    assert done.stderr.strip() == "faults found: 1; correct them, or set on_error to 'skip'"


def test_contradictions_and_crowds_are_said(tmp_path: Path, capsys) -> None:
    runs = {"size": [SIZE, SIZE], "counts": [100, 56, 100]}
    annotations = [
        record(0, segmentation=runs, area=56, iscrowd=1),
        record(1, bbox=[13, 13, 2, 2], category_id=2),
    ]
    images = [{"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in range(2)]
    for image in images:
        Image.new("RGB", (SIZE, SIZE)).save(tmp_path / str(image["file_name"]))
    categories = [{"id": 1, "name": "can"}, {"id": 2, "name": "bag"}, {"id": 3, "name": "cup"}]
    whole = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "some.json").write_text(json.dumps(whole))
    config = tmp_path / "config.json"
    train = {"name": "coco", "annotations": str(tmp_path / "some.json")}
    config.write_text(json.dumps({"data": {"train": train}}))
    with pytest.raises(DataError, match="faults found: 1"):
        main(["--cfg", str(config)])
    lines = capsys.readouterr().out.splitlines()
    assert "annotation 1 of 1.png: bbox reaches from 13, 13 to 15, 15, but its shape" in lines[0]
    assert lines[1] == "data.train: 2 images, 4 classes from some.json"
    assert "'can' is labelled: 1 of 1 annotations are crowds" in lines[2]
    assert "'bag' is labelled: no annotation without a fault uses it; correct" in lines[3]
    assert "'cup' is labelled: no annotation without a fault uses it; correct" in lines[4]
    assert "every labelled pixel is 'background'" in lines[5]
    ignored = 100 * (56 + 4) / (2 * SIZE**2)  # the crowd, and the box of the faulty object
    assert lines[-1] == (
        "training would see 2 images with background 100 %, can 0 %, bag 0 %, cup 0 % of the "
        f"labelled pixels; {ignored:.3g} % of all pixels are ignored"
    )


def test_near_duplicates_between_parts_are_said(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for folder in ("images", "masks"):
            (tmp_path / part / folder).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((64, 64))
            if (part, i) == ("val", 1):
                image = Image.open(tmp_path / "train/images/2.png").resize((48, 48))
            image.save(tmp_path / part / f"images/{i}.png")
            mask = np.ones(image.size, np.uint8)
            mask[:9] = 0
            Image.fromarray(mask).save(tmp_path / part / f"masks/{i}.png")
    spec = {"name": "masks", "classes": ["a", "b"]}
    parts = {
        part: {**spec, **{key: str(tmp_path / part / key) for key in ("images", "masks")}}
        for part in ("train", "val")
    }
    (tmp_path / "cfg.json").write_text(json.dumps({"data": parts}))
    main(["--cfg", str(tmp_path / "cfg.json")])
    assert (
        "warning: 1 images of data.val are near-duplicates of images of data.train, such as 1.png "
        "of 2.png"
    ) in capsys.readouterr().out
