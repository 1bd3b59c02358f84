import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from segkit.commands.demo import main
from segkit.core.errors import DataError
from segkit.data import demo
from segkit.data.demo import CLASSES, draw_demo, open_demo
from segkit.data.demo.scene import LITTER, draw_scene

SMALL = {"train": 6, "test": 4, "size": 65, "seed": 3}
COMMAND = [sys.executable, "-m", "segkit", "demo"]
OPTIONS = [f"--{name}={value}" for name, value in SMALL.items()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "set"
    assert draw_demo(folder, **SMALL)
    return folder


def test_two_processes_at_once_draw_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    commands = [
        subprocess.Popen([*COMMAND, str(tmp_path / "set"), *OPTIONS], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = {process.communicate()[0].decode().split(": ")[1].strip() for process in commands}
    assert [process.returncode for process in commands] == [0, 0]
    assert "drawn" in outputs
    assert files(tmp_path / "set") == files(folder)
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]


def test_the_process_that_comes_second_takes_what_the_first_has_drawn(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(rng, *, size, classes):
        if not (tmp_path / "set").exists():
            folder.rename(tmp_path / "set")
        return draw_scene(rng, size=size, classes=classes)

    before = files(folder)
    monkeypatch.setattr(demo, "draw_scene", overtaken)
    try:
        assert not draw_demo(tmp_path / "set", **SMALL)
        assert list(tmp_path.iterdir()) == [tmp_path / "set"]
        assert files(tmp_path / "set") == before
    finally:
        (tmp_path / "set").rename(folder)


def test_layout_is_the_contest_s(folder: Path) -> None:
    names = set(files(folder))
    photographs = {f"batch_01/{i:04d}.jpg" for i in range(6)}
    photographs |= {f"batch_02/{i:04d}.jpg" for i in range(4)}
    labels = {"train.json", "test.json", "test_labels.json", "demo.json"}
    assert names == photographs | labels
    train = json.loads((folder / "train.json").read_text())
    assert [image["id"] for image in train["images"]] == list(range(6))
    assert [c["id"] for c in train["categories"]] == list(range(1, 11))
    assert "annotations" not in json.loads((folder / "test.json").read_text())


@pytest.mark.parametrize("part", ["train", "test_labels"])
def test_annotations_agree_with_their_polygons(folder: Path, part: str) -> None:
    content = json.loads((folder / f"{part}.json").read_text())
    assert [a["id"] for a in content["annotations"]] == list(range(len(content["annotations"])))
    for annotation in content["annotations"]:
        area = 0.0
        for polygon in annotation["segmentation"]:
            points = np.array(polygon).reshape(-1, 2)
            assert points.min() >= 0
            assert points.max() <= 65
            x, y = points.T
            area += abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2
        everything = np.concatenate(annotation["segmentation"]).reshape(-1, 2)
        low, high = everything.min(0), everything.max(0)
        assert annotation["bbox"] == pytest.approx([*low, *(high - low)], abs=0.01)
        assert annotation["area"] == pytest.approx(area, abs=0.01)


@pytest.mark.parametrize("part", ["train", "test_labels"])
def test_every_class_is_in_every_part(folder: Path, part: str) -> None:
    source = open_demo(root=str(folder), part=part, **SMALL)
    assert source.classes == CLASSES
    seen = torch.cat([source.mask(i).flatten() for i in range(len(source))]).unique()
    assert seen.tolist() == list(range(11))


def test_test_images_come_with_and_without_labels(folder: Path) -> None:
    hidden = open_demo(root=str(folder), part="test", **SMALL)
    known = open_demo(root=str(folder), part="test_labels", **SMALL)
    assert not hidden.labelled
    assert known.labelled
    assert hidden.names == known.names
    assert hidden.image(0).shape == (3, 65, 65)


def test_annotations_are_rendered_as_the_scene_is_drawn(tmp_path: Path) -> None:
    source = open_demo(root=str(tmp_path / "set"), train=8, test=1, size=128, seed=7)
    for i, classes in enumerate(demo._choose_classes(8, np.random.default_rng((7, 0)))):
        scene = draw_scene(np.random.default_rng((7, 0, i)), size=128, classes=classes)
        differs = source.mask(i).numpy() != scene.mask
        assert differs.mean() < 0.02
        assert (scene.mask > 0).mean() > 0.1


@pytest.mark.parametrize("index", range(1, 11), ids=[kind.name for kind in LITTER])
def test_objects_stand_out_from_the_ground(index: int) -> None:
    """An object changes the picture where it lies."""
    scene = draw_scene(np.random.default_rng(index), size=96, classes=[index] * 3)
    assert set(np.unique(scene.mask)) == {0, index}
    assert [i for i, _ in scene.objects] == [index] * 3
    on, off = scene.image[scene.mask == index], scene.image[scene.mask == 0]
    distance = np.abs(np.quantile(on, (0.1, 0.5, 0.9), 0) - np.quantile(off, (0.1, 0.5, 0.9), 0))
    assert distance.max() > 20


def test_another_seed_is_another_set_and_parts_differ(folder: Path, tmp_path: Path) -> None:
    draw_demo(tmp_path / "other", **{**SMALL, "seed": 4})
    ours, theirs = files(folder), files(tmp_path / "other")
    # without labels, test.json is the same list of names and sizes
    assert [name for name in ours if ours[name] == theirs[name]] == ["test.json"]
    assert len({content for name, content in ours.items() if name.endswith(".jpg")}) == 10


def test_shares_of_classes_are_uneven_and_sum_to_one() -> None:
    shares = [kind.share for kind in LITTER]
    assert sum(shares) == pytest.approx(1)
    classes = demo._choose_classes(400, np.random.default_rng(0))
    counts = np.bincount(np.concatenate(classes), minlength=11)[1:]
    np.testing.assert_allclose(counts / counts.sum(), shares, atol=0.03)


def test_a_folder_in_use_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="in use and holds no demo set"):
        main([str(tmp_path)])
    with pytest.raises(DataError, match=r"'seed': 3.* not of .*'seed': 5"):
        open_demo(root=str(folder), **{**SMALL, "seed": 5})
    assert files(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("bad", [{"train": 0}, {"test": 0}, {"size": 8}, {"seed": -1}])
def test_impossible_numbers_are_refused(tmp_path: Path, bad: dict[str, int]) -> None:
    with pytest.raises(DataError, match="cannot be drawn"):
        draw_demo(tmp_path / "set", **{**SMALL, **bad})
    assert not list(tmp_path.iterdir())


def test_an_interrupted_drawing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "draw_scene", interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw_demo(tmp_path / "set", **SMALL)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_and_the_present_one_are_taken(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw_demo(tmp_path, train=1, test=1, size=32)
    main([str(folder), *OPTIONS])
    assert capsys.readouterr().out == f"{folder}: is there already\n"
