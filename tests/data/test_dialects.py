"""Forms of COCO files that tools write are read, if the whole file has them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from segkit.core.errors import DataError
from segkit.data.coco import CocoSource

HEIGHT, WIDTH = 6, 8
SQUARE = [1, 1, 5, 1, 5, 3, 1, 3]

Edit = Callable[[dict[str, Any]], None]


def standard(images: int = 3) -> dict[str, Any]:
    numbers = range(1, images + 1)
    size = {"height": HEIGHT, "width": WIDTH}
    return {
        "images": [{"id": i, "file_name": f"{i}.png", **size} for i in numbers],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "segmentation": [[*SQUARE]], "area": 8}
            for i in numbers
        ],
        "categories": [{"id": 1, "name": "can", "supercategory": "litter"}],
    }


def opened(folder: Path, whole: dict[str, Any], **arguments: Any) -> CocoSource:
    for image in whole["images"]:
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / image["file_name"])
    (folder / "some.json").write_text(json.dumps(whole))
    return CocoSource(annotations=str(folder / "some.json"), **arguments)


def each(table: str, key: str, convert: Callable[[Any], Any]) -> Edit:
    def edit(whole: dict[str, Any]) -> None:
        for row in whole[table]:
            if key in row:
                row[key] = convert(row[key])

    return edit


def points(polygon: list[int]) -> list[list[int]]:
    return [polygon[i : i + 2] for i in range(0, len(polygon), 2)]


FORMS: dict[str, list[Edit]] = {
    "image ids as strings": [each("images", "id", str), each("annotations", "image_id", str)],
    "image ids as strings in the images only": [each("images", "id", str)],
    "category ids as strings": [
        each("categories", "id", str),
        each("annotations", "category_id", str),
    ],
    "all ids as decimals": [
        each("images", "id", float),
        each("annotations", "image_id", float),
        each("annotations", "id", float),
    ],
    "sizes as decimals": [each("images", "width", float), each("images", "height", float)],
    "sizes as strings": [each("images", "width", str), each("images", "height", str)],
    "sizes as strings of decimals": [each("images", "width", lambda x: f"{x}.0")],
    "area as a string": [each("annotations", "area", str)],
    "crowd flags as strings": [
        lambda whole: [row.update(iscrowd="0") for row in whole["annotations"]]  # type: ignore
    ],
    "a flat polygon": [each("annotations", "segmentation", lambda polygons: polygons[0])],
    "a polygon of points": [each("annotations", "segmentation", lambda p: points(p[0]))],
    "polygons of points": [each("annotations", "segmentation", lambda p: [points(p[0])])],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_the_whole_file_is_read(tmp_path: Path, form: str) -> None:
    whole = standard()
    for edit in FORMS[form]:
        edit(whole)
    source = opened(tmp_path, whole)
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    expected[1:3, 1:5] = 1
    assert source.image_ids == (1, 2, 3)
    assert source.category_ids == {1: 1}
    for i in range(3):
        assert torch.equal(source.mask(i), expected)
        assert source.image(i).shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "all ids as decimals"])
def test_a_form_of_a_part_of_the_file_is_a_fault(tmp_path: Path, form: str) -> None:
    whole, sound = standard(), standard()
    for edit in FORMS[form]:
        edit(whole)
    for table in ("images", "annotations", "categories"):
        whole[table][0] = sound[table][0]
    if form == "category ids as strings":
        whole["categories"].append({"id": "2", "name": "bag"})
    if form == "crowd flags as strings":
        whole["annotations"][0]["iscrowd"] = 0
    with pytest.raises(DataError, match=r"some\.json"):
        opened(tmp_path, whole)


@pytest.mark.parametrize("text", ["1.5", "", "one", "1e999", "nan", "0x1", "9" * 30])
def test_strings_that_are_no_whole_numbers_stay_faults(tmp_path: Path, text: str) -> None:
    whole = standard(1)
    each("images", "width", lambda _: text)(whole)
    with pytest.raises(DataError, match=r"some\.json"):
        opened(tmp_path, whole)


@pytest.mark.parametrize("name", ["litter", "can"])
@pytest.mark.parametrize("parent", ["none", "", None])
def test_a_root_without_annotations_is_left_out(
    tmp_path: Path, name: str, parent: str | None
) -> None:
    """Roboflow adds a root of the project's name, which may be that of a class."""
    whole = standard()
    root = {"id": 0, "name": name, "supercategory": parent}
    whole["categories"] = [root, {"id": 1, "name": "can", "supercategory": name}]
    source = opened(tmp_path, whole)
    assert source.classes == ("background", "can")
    (note,) = source.notes
    assert f"the category '{name}' is left out" in note


def test_other_unused_categories_stay(tmp_path: Path) -> None:
    """Train and validation have the same classes, though one of them has no object of a class."""
    whole = standard()
    whole["categories"] += [
        {"id": 2, "name": "bag", "supercategory": "litter"},
        {"id": 3, "name": "litter", "supercategory": "thing"},
    ]
    source = opened(tmp_path, whole)
    assert source.classes == ("background", "can", "bag", "litter")
    assert source.notes == ()


def test_a_root_with_annotations_is_a_class(tmp_path: Path) -> None:
    whole = standard()
    whole["categories"].insert(0, {"id": 0, "name": "litter", "supercategory": "none"})
    whole["annotations"][0]["category_id"] = 0
    assert opened(tmp_path, whole).classes == ("background", "litter", "can")


def test_categories_are_merged_ignored_and_renamed(tmp_path: Path) -> None:
    whole = standard(4)
    names = ("can", "tin", "dirt", "floor")
    whole["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    for i, row in enumerate(whole["annotations"], 1):
        row["category_id"] = i
    rename = {"can": "metal", "tin": "metal", "dirt": None, "floor": "background"}
    source = opened(tmp_path, whole, rename=rename)
    assert source.classes == ("background", "metal")
    assert [source.mask(i)[1, 1].item() for i in range(4)] == [1, 1, 255, 0]
    with pytest.raises(DataError, match=r"rename: 'tine' is no category .* did you mean 'tin'"):
        opened(tmp_path, whole, rename={"tine": None})
