"""Parts of a data set in names, and data sets in folders that nobody prepared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segkit.commands.plan import find_parts
from segkit.core.errors import DataError
from segkit.data.formats import coco_files, mask_folders, recognize
from segkit.data.formats.mask_folders import ignored, named_by_value
from segkit.data.masks import MaskSource
from segkit.data.parts import part_of


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train/0001.json", "train"),
        ("instances_val2017.json", "val"),
        ("trainannot", "train"),
        ("TestImages", "test"),
        ("valid/_annotations.coco.json", "val"),
        ("test/train", "train"),  # the last word
        ("Training", "train"),
        ("latest.json", None),
        ("constraints", None),
        ("photos", None),
    ],
)
def test_parts_in_names(name: str, part: str | None) -> None:
    assert part_of(name) == part


def photographs(folder: Path, *stems: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for stem in stems:
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{stem}.jpg")


def masks(folder: Path, *stems: str, values: tuple[int, ...] = (0, 1, 2)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.array(values, np.uint8)[np.arange(40 * 48).reshape(40, 48) % len(values)]
    for stem in stems:
        Image.fromarray(pixels).save(folder / f"{stem}.png")


def coco(path: Path, *names: str, labels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": i, "file_name": x, "height": 40, "width": 48} for i, x in enumerate(names)]
    square = [[0, 0, 20, 0, 20, 20, 0, 20]]
    annotations: list[dict[str, Any]] = [
        {"id": i, "image_id": 0, "category_id": 1, "segmentation": square} for i in range(labels)
    ]
    content = {"images": images, "annotations": annotations, "categories": []}
    path.write_text(json.dumps({**content, "categories": [{"id": 1, "name": "can"}]}))


def test_coco_files_of_parts(tmp_path: Path) -> None:
    photographs(tmp_path / "train2017", "a", "b")
    photographs(tmp_path / "images" / "val", "c")
    coco(tmp_path / "annotations/instances_train2017.json", "a.jpg", "b.jpg")
    coco(tmp_path / "annotations/instances_val.json", "c.jpg")
    coco(tmp_path / "annotations/image_info_test.json", "gone.jpg")  # its images are not here
    (tmp_path / "notes.json").write_text('{"images": "none"}')
    assert recognize(tmp_path, "train") == {
        "name": "coco",
        "annotations": str(tmp_path / "annotations/instances_train2017.json"),
        "images": str(tmp_path / "train2017"),
    }
    val = coco_files.recognize(tmp_path, "val")
    assert val is not None
    assert val["images"] == str(tmp_path / "images/val")
    assert coco_files.recognize(tmp_path, "test") is None


def test_a_coco_file_beside_its_images(tmp_path: Path) -> None:
    photographs(tmp_path / "valid", "a")
    coco(tmp_path / "valid/_annotations.coco.json", "a.jpg")
    photographs(tmp_path, "b")
    coco(tmp_path / "result.json", "b.jpg", labels=2)
    coco(tmp_path / "older.json", "b.jpg", labels=1)
    assert coco_files.recognize(tmp_path, "train") == {"annotations": str(tmp_path / "result.json")}
    path = str(tmp_path / "valid/_annotations.coco.json")
    assert coco_files.recognize(tmp_path, "val") == {"annotations": path}


def test_a_coco_file_without_labels_is_a_test_part_only(tmp_path: Path) -> None:
    photographs(tmp_path, "a")
    coco(tmp_path / "train.json", "a.jpg", labels=0)
    coco(tmp_path / "test.json", "a.jpg", labels=0)
    assert coco_files.recognize(tmp_path, "train") is None
    assert coco_files.recognize(tmp_path, "test") is not None


@pytest.mark.parametrize(
    ("images", "labels", "ending"),
    [
        ("images", "masks", ""),
        ("JPEGImages", "SegmentationClass", ""),
        ("img", "gt", "_mask"),
        ("a/train", "b/train", "_L"),
        ("train", "trainannot", ""),
    ],
)
def test_folders_of_masks(tmp_path: Path, images: str, labels: str, ending: str) -> None:
    photographs(tmp_path / images, "1", "2", "12", "unlabelled")
    masks(tmp_path / labels, *(f"{stem}{ending}" for stem in ("1", "2", "12")))
    expected = {
        "images": str(tmp_path / images),
        "masks": str(tmp_path / labels),
        "classes": ["class 0", "class 1", "class 2"],
    }
    if ending:
        expected["mask_suffix"] = ending
    assert mask_folders.recognize(tmp_path, "train") == expected
    assert mask_folders.recognize(tmp_path, "val") is None


@pytest.mark.parametrize(
    ("image", "mask", "settings"),
    [
        ("img_{}", "mask_{}", {"image_prefix": "img_", "mask_prefix": "mask_"}),
        ("{}", "GT-{}", {"mask_prefix": "GT-"}),
        ("{}_rgb", "{}_label", {"image_suffix": "_rgb", "mask_suffix": "_label"}),
        ("IMG_2026{}", "IMG_2026{}_segmentation", {"mask_suffix": "_segmentation"}),
        ("v1.{}", "v1.{}.mask", {"mask_suffix": ".mask"}),
    ],
)
@pytest.mark.parametrize("labels", ["images", "masks"])
def test_names_with_beginnings_and_ends(
    tmp_path: Path, image: str, mask: str, settings: dict[str, str], labels: str
) -> None:
    """In two folders, and in one."""
    numbers = ("1", "2", "11", "12")
    photographs(tmp_path / "images", *map(image.format, numbers))
    masks(tmp_path / labels, *map(mask.format, numbers))
    spec = mask_folders.recognize(tmp_path, "train")
    assert spec is not None
    assert {k: v for k, v in spec.items() if k.endswith(("prefix", "suffix"))} == settings
    source = MaskSource(**spec)
    assert [Path(name).stem for name in source.names] == sorted(map(image.format, numbers))
    assert source.faults == ()


def test_names_with_dots(tmp_path: Path) -> None:
    photographs(tmp_path / "images", "2026.11.28 at 1.5", "2026.11.28 at 2.5")
    masks(tmp_path / "masks", "2026.11.28 at 1.5", "2026.11.28 at 2.5")
    spec = mask_folders.recognize(tmp_path, "train")
    assert spec is not None
    assert len(MaskSource(**spec)) == 2


def test_a_test_part_does_not_take_the_masks_of_the_training(tmp_path: Path) -> None:
    photographs(tmp_path / "images/train", "train_1", "train_2")
    photographs(tmp_path / "images/test", "test_1", "test_2")
    masks(tmp_path / "masks", "train_1", "train_2")
    spec = mask_folders.recognize(tmp_path, "test")
    assert spec is not None
    assert "masks" not in spec


def test_parts_of_masks_and_a_test_part_without_labels(tmp_path: Path) -> None:
    for part in ("train", "val"):
        photographs(tmp_path / "images" / part, "1", "2")
        masks(tmp_path / "masks" / part, "1", "2")
    photographs(tmp_path / "images" / "test", "3")
    (tmp_path / "classes.txt").write_text("ground\ncan\nvoid\n")
    val, test = (mask_folders.recognize(tmp_path, part) for part in ("val", "test"))
    names = str(tmp_path / "classes.txt")
    assert val is not None
    assert (val["classes"], val["ignore_index"]) == (names, 2)
    assert test == {"images": str(tmp_path / "images/test"), "classes": names}


def test_folders_below_folders_are_joined(tmp_path: Path) -> None:
    for scene in ("east", "west"):
        photographs(tmp_path / "images" / scene, "1", "2")
        masks(tmp_path / "masks" / scene, "1", "2", values=(0, 1))
    spec = mask_folders.recognize(tmp_path, "train")
    assert spec == {
        "images": str(tmp_path / "images"),
        "masks": str(tmp_path / "masks"),
        "classes": ["background", "object"],
    }


def test_photographs_and_masks_in_one_folder(tmp_path: Path) -> None:
    stems = [f"photo {i}" for i in range(1, 12)]  # "photo 1" and "photo 11" are no pair
    photographs(tmp_path, *stems)
    masks(tmp_path, *(f"{stem}_mask" for stem in stems), values=(0, 255))
    (tmp_path / "_classes.csv").write_text("Pixel Value, Class\n0, ground\n255, can\n")
    spec = mask_folders.recognize(tmp_path, "train")
    assert spec == {
        "images": str(tmp_path),
        "masks": str(tmp_path),
        "mask_suffix": "_mask",
        "classes": str(tmp_path / "_classes.csv"),
    }
    source = MaskSource(**spec)
    assert source.classes == ("ground", "can")
    assert source.mask(3).unique().tolist() == [0, 1]


def test_other_folders_are_not_recognized(tmp_path: Path) -> None:
    photographs(tmp_path / "holiday", "1", "2")
    masks(tmp_path / "icons", "x", "y")
    assert recognize(tmp_path) is None
    assert recognize(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("values", "arguments"),
    [
        ([0, 1], {"classes": ["background", "object"]}),
        ([0, 255], {"classes": ["background", "object"], "values": {"0": 0, "255": 1}}),
        ([0, 1, 255], {"classes": ["class 0", "class 1"], "ignore_index": 255}),
        ([1, 2], {"classes": ["value 1", "value 2"], "values": {"1": 0, "2": 1}}),
        ([0, 2, 3], {"classes": ["class 0", "class 1", "class 2", "class 3"]}),
        (
            [0, 100, 200],
            {
                "classes": ["value 0", "value 100", "value 200"],
                "values": {"0": 0, "100": 1, "200": 2},
            },
        ),
    ],
)
def test_classes_named_by_values(values: list[int], arguments: dict[str, Any]) -> None:
    assert named_by_value(values) == arguments


def test_colored_masks(tmp_path: Path) -> None:
    photographs(tmp_path / "images", "1", "2")
    (tmp_path / "masks").mkdir()
    pixels = np.zeros((40, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "masks/2.png")
    pixels[:20] = 128, 0, 64
    Image.fromarray(pixels).save(tmp_path / "masks/1.png")
    spec = mask_folders.recognize(tmp_path, "train")
    assert spec is not None
    assert spec["classes"] == ["background", "color 128,0,64"]
    assert spec["values"] == {"0,0,0": 0, "128,0,64": 1}
    assert MaskSource(**spec).mask(0).float().mean() == 0.5
    (tmp_path / "label_colors.txt").write_text("128 0 64 Can\n0 0 0 Void\n")
    spec = mask_folders.recognize(tmp_path, "train")
    assert spec is not None
    assert (spec["classes"], spec["ignore_index"]) == (str(tmp_path / "label_colors.txt"), 1)
    assert MaskSource(**spec).mask(0).unique().tolist() == [0, 255]


def test_ignored_values() -> None:
    assert ignored(["sky", "road", "Void"], [0, 1, 2]) == {"ignore_index": 2}
    assert ignored(["sky", "road"], [0, 1, 255]) == {"ignore_index": 255}
    assert ignored(["sky", "road"], [0, 1]) == {}
    assert ignored(["sky", "road"], [0, 1, 2, 255]) == {}  # nobody knows; training says so


def test_coco_files_name_images_as_other_systems_do(tmp_path: Path) -> None:
    photographs(tmp_path / "images", "a photo", "b")
    coco(tmp_path / "train.json", "gone.jpg", "images\\a%20photo.jpg", "images\\b.jpg")
    assert coco_files.recognize(tmp_path, "train") == {"annotations": str(tmp_path / "train.json")}
    assert not [*coco_files.refusals(tmp_path)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"images": [{"file_name": "a.jpg"', "is not valid JSON"),
        ('{"images": [{"file_name": "C:/b.jpg"}], "annotations": [{}]}', r"'C:/b\.jpg' is not in"),
        ('{"images": [{"file_name": "a.jpg"}], "annotations": []}', "no annotations; label its"),
    ],
)
def test_refused_coco_files_are_named(tmp_path: Path, content: str, words: str) -> None:
    photographs(tmp_path, "a")
    (tmp_path / "all.json").write_text(content)
    (tmp_path / "other.json").write_text('{"settings": 1}')
    assert coco_files.recognize(tmp_path, "train") is None
    with pytest.raises(DataError, match=rf"all\.json.*{words}"):
        find_parts(tmp_path)


def test_a_test_part_needs_no_annotations(tmp_path: Path) -> None:
    photographs(tmp_path / "test", "a")
    (tmp_path / "test/labels.json").write_text('{"images": [{"file_name": "a.jpg"}]}')
    assert not [*coco_files.refusals(tmp_path)]


def test_refused_coco_file_of_two_bytes_per_character(tmp_path: Path) -> None:
    (tmp_path / "all.json").write_text('{"images": [{}]}', encoding="utf-16")
    assert "all.json" in next(coco_files.refusals(tmp_path))


def test_black_and_white_masks_with_lossy_compression(tmp_path: Path) -> None:
    photographs(tmp_path / "images", "a", "b")
    (tmp_path / "masks").mkdir()
    pixels = np.zeros((40, 48), np.uint8)
    pixels[8:32, 8:32] = 255
    for stem in ("a", "b"):
        Image.fromarray(pixels).save(tmp_path / "masks" / f"{stem}.jpg")
    spec = mask_folders.recognize(tmp_path, "train")
    assert spec is not None
    assert spec["values"] == {"0": 0, "255": 1}
    assert np.array_equal(MaskSource(**spec).mask(0).numpy(), pixels > 0)
    for stem in ("a", "b"):  # values that compression does not keep
        Image.fromarray(pixels // 255).save(tmp_path / "masks" / f"{stem}.jpg")
    assert mask_folders.recognize(tmp_path, "train") is None


def test_masks_of_16_bits(tmp_path: Path) -> None:
    photographs(tmp_path / "images", "a")
    (tmp_path / "masks").mkdir()
    pixels = np.zeros((40, 48), np.uint16)
    pixels[8:32, 8:32] = 1000
    Image.fromarray(pixels).save(tmp_path / "masks/a.png")
    spec = mask_folders.recognize(tmp_path, "train")
    assert spec is not None
    assert spec["values"] == {"0": 0, "1000": 1}
    assert np.array_equal(MaskSource(**spec).mask(0).numpy(), pixels > 0)


@pytest.mark.parametrize(
    ("values", "arguments"),
    [
        ((0, 255), {"values": {"0": 0, "255": 1}}),
        ((0, 26), {"values": {"0": 0, "26": 1}}),
        ((1, 2), {"values": {"1": 0, "2": 1}}),
        ((0, 1), {}),
        ((0, 1, 255), {"ignore_index": 255}),
    ],
)
def test_named_classes_of_other_values(
    tmp_path: Path, values: tuple[int, ...], arguments: dict[str, Any]
) -> None:
    photographs(tmp_path / "images", "a")
    masks(tmp_path / "masks", "a", values=values)
    (tmp_path / "classes.txt").write_text("road\ncar\n")
    spec = mask_folders.recognize(tmp_path, "train")
    assert spec is not None
    assert {k: v for k, v in spec.items() if k in ("values", "ignore_index")} == arguments
