"""Objects that cannot be painted are ignored; area and box that contradict a shape are faults."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from segkit.core.errors import DataError
from segkit.data.coco import CocoSource

HEIGHT, WIDTH = 48, 64
POLYGON = [16.0, 12.0, 40.0, 12.0, 40.0, 36.0, 16.0, 36.0]
SOUND = {"segmentation": [POLYGON], "area": 576.0, "bbox": [16, 12, 24, 24]}


def opened(
    folder: Path, *records: dict[str, Any], width: int = WIDTH, height: int = HEIGHT, **how: Any
) -> CocoSource:
    Image.new("RGB", (width, height)).save(folder / "a.png")
    image = {"id": 1, "file_name": "a.png", "width": width, "height": height}
    ids = {"image_id": 1, "category_id": 1}
    annotations = [{"id": i, **ids, **record} for i, record in enumerate(records)]
    categories = [{"id": 1, "name": "can"}]
    whole = {"images": [image], "annotations": annotations, "categories": categories}
    (folder / "some.json").write_text(json.dumps(whole))
    return CocoSource(annotations=str(folder / "some.json"), **how)


@pytest.mark.parametrize("piece", [[1.0, 1.0, 2.0, 2.0], [3.0, 3.0], []])
def test_a_piece_without_area_is_dropped(tmp_path: Path, piece: list[float]) -> None:
    source = opened(tmp_path, {**SOUND, "segmentation": [POLYGON, piece]})
    assert (source.mask(0) == 1).sum() == 576
    assert source.faults == ()
    (note,) = source.notes
    assert note.startswith("1 pieces of objects with fewer than 3 points")


def boxes(source: CocoSource) -> list[int]:
    """Return left, top, right and bottom of the ignored pixels."""
    rows, columns = np.nonzero(source.mask(0).numpy() == 255)
    assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # a full rectangle
    return [*map(int, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"segmentation": [], "bbox": [10, 5, 20, 8]}, [10, 5, 30, 13]),
        ({"segmentation": None, "bbox": [10.5, 5.5, 20, 8]}, [10, 5, 31, 14]),
        ({"bbox": [50, 40, 99, 99]}, [50, 40, 64, 48]),
        ({"segmentation": [[5, 6, 9, 11]]}, [5, 6, 9, 11]),
        ({"segmentation": [[5, 6, 9, 11]], "bbox": [200, 5, 20, 8]}, [5, 6, 9, 11]),
        ({"segmentation": [], "bbox": [1, 2, 0, 5]}, [0, 0, 64, 48]),
        ({"segmentation": [], "bbox": "all"}, [0, 0, 64, 48]),
        ({**SOUND, "category_id": 9}, [16, 12, 40, 36]),
    ],
)
def test_an_object_that_cannot_be_painted_is_ignored(
    tmp_path: Path, record: dict[str, Any], expected: list[int]
) -> None:
    with pytest.raises(DataError, match=r"annotation 0 of a\.png"):
        opened(tmp_path, record)
    source = opened(tmp_path, record, on_error="skip")
    assert len(source.faults) == 1
    assert boxes(source) == expected


def test_sound_objects_are_visible_on_an_ignored_box(tmp_path: Path) -> None:
    box = {"segmentation": [], "bbox": [0, 0, 64, 48]}
    mask = opened(tmp_path, box, SOUND, on_error="skip").mask(0)
    assert (mask == 1).sum() == 576
    assert (mask == 255).sum() == WIDTH * HEIGHT - 576


SHARES = [value / (HEIGHT if i % 2 else WIDTH) for i, value in enumerate(POLYGON)]
PERCENT = [25.0, 25.0, 62.5, 25.0, 62.5, 75.0, 25.0, 75.0]


@pytest.mark.parametrize("area", [{}, {"area": 576.0}, {"area": 576.0, "bbox": SOUND["bbox"]}])
def test_polygons_in_shares_are_a_fault(tmp_path: Path, area: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"annotation 0 of a\.png.* shares of the image"):
        opened(tmp_path, {"segmentation": [SHARES], **area})


@pytest.mark.parametrize("known", [("area",), ("bbox",), ("area", "bbox")])
def test_polygons_in_percent_are_a_fault(tmp_path: Path, known: tuple[str, ...]) -> None:
    numbers = {"area": 57600.0, "bbox": [160, 120, 240, 240]}
    record = {"segmentation": [PERCENT], **{key: numbers[key] for key in known}}
    with pytest.raises(DataError, match=r"covers 1,875 pixels .* percent of the image"):
        opened(tmp_path, record, width=640, height=480)


def test_a_shape_of_another_image_size_is_a_fault(tmp_path: Path) -> None:
    half = [value / 2 for value in POLYGON]
    record = {"segmentation": [half], "area": 576.0, "bbox": [32, 24, 24, 24]}
    with pytest.raises(DataError, match="on an image of another size"):
        opened(tmp_path, record)


def test_a_run_length_shape_is_compared_too(tmp_path: Path) -> None:
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    drawn[12:36, 16:40] = 1
    rle = coco_mask.encode(drawn)
    shape = {"size": rle["size"], "counts": rle["counts"].decode()}
    assert (opened(tmp_path, {**SOUND, "segmentation": shape}).mask(0) == 1).sum() == 576
    with pytest.raises(DataError, match="area is 9000"):
        opened(tmp_path, {**SOUND, "segmentation": shape, "area": 9000})


@pytest.mark.parametrize(
    "numbers",
    [
        {"area": 288, "bbox": [16, 12, 24, 24]},
        {"area": 576, "bbox": [16, 12, 24, 24]},  # the area of the box
        {"area": 288, "bbox": [16, 12, 40, 36]},  # two corners
        {"area": 288, "bbox": [15.2, 11.8, 25.1, 24.9]},
        {"area": 288, "bbox": [0, 0, 0, 0]},  # left empty by a tool
        {"bbox": None},
        {},
    ],
)
def test_numbers_that_agree_roughly_are_accepted(tmp_path: Path, numbers: dict[str, Any]) -> None:
    triangle = [16.0, 12.0, 40.0, 12.0, 40.0, 36.0]
    assert opened(tmp_path, {"segmentation": [triangle], **numbers}).faults == ()
