"""The same two objects give equal masks in every label format, and each format is recognized."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segkit.core.config import Config, DataConfig, build
from segkit.core.errors import ConfigError, DataError
from segkit.data import SOURCES, open_source, part_spec
from segkit.data.formats import FORMATS, cvat, label_studio, recognize, yolo
from segkit.data.formats.cityscapes import LABEL_IDS

HEIGHT, WIDTH = 40, 60
CAN = [(6, 4), (24, 4), (24, 20), (6, 20)]
BAG = [(30, 10), (54, 10), (54, 30), (30, 30)]
CLASSES = ("background", "bag", "can")


def expected() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:30, 30:54] = 1
    mask[4:20, 6:24] = 2
    return mask


def photograph(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(path)


def image_of(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def labelme(folder: Path, **changes: Any) -> dict[str, Any]:
    photograph(folder / "a b.jpg")
    shapes = [
        {"label": "can", "points": CAN, "shape_type": "polygon"},
        {"label": "bag", "points": BAG},
        {"label": "can", "points": [[1, 1], [2, 2]], "shape_type": "line"},
    ]
    content = {"version": "5.4.1", "imagePath": "..\\photos\\a b.jpg", "imageData": None}
    content |= {"imageHeight": HEIGHT, "imageWidth": WIDTH, "shapes": shapes, **changes}
    dump(folder / "a b.json", content)
    return {"labels": str(folder)}


def cvat_xml(folder: Path, head: str = "", inner: str | None = None) -> dict[str, Any]:
    photograph(folder / "images/a.jpg")
    runs = ",".join(["0", str(16 * 18)])
    points = ";".join(f"{x},{y}" for x, y in BAG)
    inner = inner or (
        f'<polygon label="bag" points="{points}" z_order="0" occluded="0"></polygon>'
        f'<mask label="can" rle="{runs}" left="6" top="4" width="18" height="16"></mask>'
    )
    names = "".join(f"<label><name>{name}</name></label>" for name in CLASSES[1:])
    (folder / "annotations.xml").write_text(
        f'<?xml version="1.0" encoding="utf-8"?>{head}<annotations><version>1.1</version>'
        f"<meta><task><labels>{names}</labels></task></meta>"
        f'<image id="0" name="a.jpg" width="{WIDTH}" height="{HEIGHT}">{inner}</image>'
        "</annotations>"
    )
    return {"labels": str(folder / "annotations.xml"), "images": str(folder)}


def small_mask(runs: str, *, left: int) -> str:
    return f'<mask label="can" rle="{runs}" left="{left}" top="0" width="2" height="2"/>'


def pack_brush(values: np.ndarray) -> list[int]:
    """Return bytes (N,) as Label Studio packs them: equal runs, and different bytes, in turns."""
    bits = f"{len(values):032b}" + f"{7:05b}" + "".join(f"{n - 1:04b}" for n in (3, 4, 8, 16))
    at = 0
    while at < len(values):
        run = 1
        while at + run < len(values) and values[at + run] == values[at] and run < 65536:
            run += 1
        if run > 1:
            bits += f"1{3:02b}{run - 1:016b}{values[at]:08b}"
        else:
            bits += f"0{0:02b}{0:03b}{values[at]:08b}"
        at += run
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def studio(folder: Path, **changes: Any) -> dict[str, Any]:
    photograph(folder / "my photo.jpg")
    size = {"original_width": WIDTH, "original_height": HEIGHT}
    percent = [[x * 100 / WIDTH, y * 100 / HEIGHT] for x, y in CAN]
    opacity = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    opacity[10:30, 30:54] = (1, 2, 3, 255)
    polygon = {"points": percent, "polygonlabels": ["can"]}
    brush = {"format": "rle", "rle": pack_brush(opacity.ravel()), "brushlabels": ["bag"]}
    results = [
        {"type": "polygonlabels", "value": polygon, **size},
        {"type": "brushlabels", "value": brush, **size},
        {"type": "choices", "value": {"choices": ["sharp"]}},
    ]
    task = {"id": 7, "data": {"image": "/data/upload/1/ab12cd34-my%20photo.jpg"}}
    task |= {"annotations": [{"result": results}], **changes}
    dump(folder / "project-1.json", [task])
    return {"labels": str(folder / "project-1.json")}


def via(folder: Path, **changes: Any) -> dict[str, Any]:
    photograph(folder / "a.jpg")

    def region(points: list[tuple[int, int]], label: Any) -> dict[str, Any]:
        x, y = ([point[axis] for point in points] for axis in (0, 1))
        shape = {"name": "polygon", "all_points_x": x, "all_points_y": y}
        return {"shape_attributes": shape, "region_attributes": {"kind": label}}

    regions: Any = [region(CAN, "can"), region(BAG, {"bag": True, "can": False})]
    entry = {"filename": "a.jpg", "size": 1234, "regions": regions, **changes}
    dump(folder / "via.json", {"_via_img_metadata": {"a.jpg1234": entry}})
    return {"labels": str(folder / "via.json")}


YAML = {
    "list": "train: x\nnames: ['bag', \"can\"]\nnc: 2\n",
    "long list": "names: [bag,\n  can]\n",
    "items": "nc: 2\nnames:\n- bag\n- can\npath: .\n",
    "object": "names:\n  0: bag\n  1: can\n",
    "inline object": "names: {0: bag, 1: can}\n",
}


def yolo_text(folder: Path, yaml: str = YAML["object"]) -> dict[str, Any]:
    photograph(folder / "images/train/a.jpg")
    lines = [
        " ".join(["1", *(f"{x / WIDTH:.6f} {y / HEIGHT:.6f}" for x, y in CAN)]),
        " ".join(["0", *(f"{x / WIDTH:.6f} {y / HEIGHT:.6f}" for x, y in BAG)]),
    ]
    (folder / "labels/train").mkdir(parents=True)
    (folder / "labels/train/a.txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text(yaml)
    return {"labels": str(folder / "labels/train"), "images": str(folder / "images/train")}


def voc(folder: Path) -> dict[str, Any]:
    photograph(folder / "JPEGImages/a.jpg")
    photograph(folder / "JPEGImages/no_mask.jpg")
    colors = np.array([[0, 0, 0], [1, 2, 3], [128, 0, 0]], np.uint8)
    image_of(folder / "SegmentationClass/a.png", colors[expected()])
    lines = [
        "# label:color_rgb:parts:actions",
        "background:0,0,0::",
        "bag:1,2,3::",
        "can:128,0,0::",
    ]
    (folder / "labelmap.txt").write_text("\n".join(lines))
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    (folder / "ImageSets/Segmentation/train.txt").write_text("a\n")
    return {"root": str(folder), "part": "train"}


def roboflow(folder: Path) -> dict[str, Any]:
    photograph(folder / "train/a_jpg.rf.0123.jpg")
    image_of(folder / "train/a_jpg.rf.0123_mask.png", expected())
    (folder / "train/_classes.csv").write_text("Pixel Value, Class\n0, background\n1, bag\n2, can")
    return {"root": str(folder), "part": "train"}


MAKE: dict[str, Callable[[Path], dict[str, Any]]] = {
    "labelme": labelme,
    "cvat": cvat_xml,
    "label_studio": studio,
    "via": via,
    "yolo": yolo_text,
    "voc": voc,
    "roboflow": roboflow,
}


def opened(name: str, arguments: dict[str, Any], **more: Any) -> Any:
    return build(SOURCES, {"name": name, **arguments, **more}, "data.train")


@pytest.mark.parametrize("name", MAKE)
def test_every_format_gives_the_same_mask(tmp_path: Path, name: str) -> None:
    source = opened(name, MAKE[name](tmp_path / "photos"))
    assert len(source) == 1
    assert source.classes == CLASSES
    assert np.array_equal(source.mask(0).numpy(), expected())
    assert source.image(0).shape == (3, HEIGHT, WIDTH)
    assert source.faults == ()


@pytest.mark.parametrize("name", MAKE)
def test_every_format_is_recognized_and_no_other(tmp_path: Path, name: str) -> None:
    MAKE[name](tmp_path)
    spec = recognize(tmp_path)
    assert spec is not None
    assert spec["name"] == name
    assert np.array_equal(build(SOURCES, spec, "x").mask(0).numpy(), expected())
    recognized = [key for key in MAKE if FORMATS[key].recognize(tmp_path, "train") is not None]
    assert recognized == [name]
    assert all(FORMATS[key].recognize(tmp_path, "val") is None for key in MAKE)


def test_parts_in_folders_are_recognized(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        labelme(tmp_path / part)
    assert recognize(tmp_path) == {"name": "labelme", "labels": str(tmp_path / "train")}
    assert recognize(tmp_path, "val") == {"name": "labelme", "labels": str(tmp_path / "valid")}
    assert recognize(tmp_path, "test") is None


def test_a_folder_of_another_kind_is_not_recognized(tmp_path: Path) -> None:
    photograph(tmp_path / "a.jpg")
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("[1, 2]")
    (tmp_path / "c.xml").write_text("<html><image/></html>")
    (tmp_path / "d.txt").write_text("words of a reader")
    assert not any(FORMATS[key].recognize(tmp_path, "train") for key in MAKE)


def test_cityscapes_and_ade20k_have_their_own_values(tmp_path: Path) -> None:
    city = tmp_path / "city"
    photograph(city / "leftImg8bit/train/ulm/ulm_0_leftImg8bit.png")
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[0, : len(LABEL_IDS)] = LABEL_IDS
    image_of(city / "gtFine/train/ulm/ulm_0_gtFine_labelIds.png", values)
    image_of(city / "gtFine/train/ulm/ulm_0_gtFine_instanceIds.png", values)
    spec = recognize(city)
    assert spec == {"name": "cityscapes", "root": str(city), "part": "train"}
    source = build(SOURCES, spec, "x")
    assert source.mask(0)[0, : len(LABEL_IDS) + 1].tolist() == [*range(19), 255]
    assert source.classes[13] == "car"

    ade = tmp_path / "ade"
    photograph(ade / "images/training/a.jpg")
    image_of(ade / "annotations/training/a.png", expected())
    (ade / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.2\twall, side\n2\t0.1\tsky\n")
    spec = recognize(ade)
    assert spec == {"name": "ade20k", "root": str(ade), "part": "train"}
    source = build(SOURCES, spec, "x")
    assert source.classes == ("wall", "sky")
    assert source.mask(0)[[0, 10, 4], [0, 30, 6]].tolist() == [255, 0, 1]


def test_what_is_passed_over_is_named(tmp_path: Path) -> None:
    arguments = labelme(tmp_path)
    photograph(tmp_path / "other.jpg")
    source = opened("labelme", arguments)
    assert source.notes == (
        "1 images without labels left out, such as other.jpg",
        "1 shapes of kind 'line' left out",
    )
    assert source.origin == "labelme files"


@pytest.mark.parametrize("boxes", ["ignore", "paint"])
def test_boxes_are_ignored_or_painted(tmp_path: Path, boxes: str) -> None:
    """A rectangle of a detector's labels is no mask, and not background either."""
    shapes = [{"label": "can", "points": [CAN[0], CAN[2]], "shape_type": "rectangle"}]
    shapes += [{"label": "bag", "points": BAG, "shape_type": "polygon"}]
    source = opened("labelme", labelme(tmp_path, shapes=shapes), boxes=boxes)
    want = expected()
    if boxes == "ignore":
        want[want == 2] = 255
        assert "the pixels of 1 boxes are ignored" in source.notes[0]
    assert np.array_equal(source.mask(0).numpy(), want)


def test_yolo_boxes_are_ignored(tmp_path: Path) -> None:
    arguments = yolo_text(tmp_path)
    (tmp_path / "labels/train/a.txt").write_text("1 0.5 0.5 0.5 0.5\n\n")
    mask = opened("yolo", arguments).mask(0).numpy()
    assert (mask[10:30, 15:45] == 255).all()
    assert (mask == 255).sum() == 20 * 30


@pytest.mark.parametrize("kind", YAML)
def test_class_names_of_yaml(tmp_path: Path, kind: str) -> None:
    (tmp_path / "data.yaml").write_text(YAML[kind])
    assert yolo.class_names(tmp_path / "data.yaml") == ("bag", "can")


def test_classes_and_names_can_be_given(tmp_path: Path) -> None:
    arguments = via(tmp_path)
    source = opened("via", arguments, classes=["can", "bag"], rename={"bag": None})
    assert source.classes == ("background", "can")
    assert np.array_equal(source.mask(0).numpy(), np.array([0, 255, 1], np.uint8)[expected()])
    with pytest.raises(DataError, match=r"has the label 'bag'; did you mean 'bags'"):
        opened("via", arguments, classes=["can", "bags"])


FAULTS: dict[str, tuple[Callable[[Path], dict[str, Any]], str, str]] = {
    "image elsewhere": (lambda f: labelme(f, imagePath="/x/gone.jpg"), "labelme", "gone.jpg' is"),
    "name of the wrong type": (lambda f: labelme(f, imagePath=3), "labelme", "the image name is 3"),
    "size of the wrong type": (lambda f: labelme(f, imageWidth="x"), "labelme", "expected numbers"),
    "huge size": (lambda f: labelme(f, imageWidth=10**9), "labelme", "too large"),
    "no shapes": (lambda f: labelme(f, shapes=None), "labelme", "no 'shapes'"),
    "label of the wrong type": (
        lambda f: labelme(f, shapes=[{"label": 3, "points": CAN}]), "labelme", "the label 3"
    ),
    "points of the wrong type": (
        lambda f: labelme(f, shapes=[{"label": "a", "points": [[1]]}]), "labelme", "pairs x, y"
    ),
    "numbers of the wrong type": (
        lambda f: labelme(f, shapes=[{"label": "a", "points": [["1", 2]] * 3}]),
        "labelme", "numbers",
    ),
    "entities": (
        lambda f: cvat_xml(f, '<!DOCTYPE x [<!ENTITY a "aaaa">]>'), "cvat", "declares XML entities"
    ),
    "cut XML": (lambda f: cvat_xml(f, "<a>"), "cvat", "is not valid XML"),
    "mask outside": (
        lambda f: cvat_xml(f, inner=small_mask("0,4", left=59)),
        "cvat", "do not fill its box",
    ),
    "mask of other runs": (
        lambda f: cvat_xml(f, inner=small_mask("0,9", left=0)),
        "cvat", "do not fill its box",
    ),
    "polygon without numbers": (
        lambda f: cvat_xml(f, inner='<polygon label="can" points="1,2;x,3"/>'), "cvat", "x,y;x,y"
    ),
    "other label": (
        lambda f: cvat_xml(f, inner='<polygon label="cam" points="1,2;9,3;9,9"/>'), "cvat",
        "did you mean 'can'",
    ),
    "tasks of JSON-MIN": (
        lambda f: (studio(f), dump(f / "project-1.json", [{"image": "a"}]))[0], "label_studio",
        "not as JSON-MIN",
    ),
    "several attributes": (
        lambda f: via(f, regions=[{"region_attributes": {"a": "x", "b": "y"}}]),
        "via", "attributes a, b; expected one",
    ),
    "class out of range": (
        lambda f: (yolo_text(f), (f / "labels/train/a.txt").write_text("2 0 0 1 0 1 1"))[0], "yolo",
        "line 1 is '2 0 0 1 0 1 1'; expected a class from 0 to 1",
    ),
    "odd coordinates": (
        lambda f: (yolo_text(f), (f / "labels/train/a.txt").write_text("1 0 0 1 0 1"))[0], "yolo",
        "pairs x, y",
    ),
    "no names": (lambda f: yolo_text(f, "nc: 2\n"), "yolo", "has no 'names'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_faulty_files_are_named(tmp_path: Path, kind: str) -> None:
    make, name, words = FAULTS[kind]
    arguments = make(tmp_path)
    with pytest.raises(DataError) as caught:
        opened(name, arguments)
    sentence = str(caught.value)
    assert words in sentence
    assert "\n" not in sentence
    assert any(
        word in sentence
        for word in ("a b", "annotations.xml", "project-1", "via.json", "a.", "data.yaml")
    )


def test_skip_leaves_out_a_faulty_file(tmp_path: Path) -> None:
    arguments = labelme(tmp_path)
    photograph(tmp_path / "c.jpg")
    dump(tmp_path / "c.json", {"imagePath": "c.jpg", "shapes": 3})
    with pytest.raises(DataError, match=r"c\.json: has no 'shapes'"):
        opened("labelme", arguments)
    source = opened("labelme", arguments, on_error="skip")
    assert source.names == ("a b.jpg",)
    assert [fault.file for fault in source.faults] == ["c.json"]


@pytest.mark.parametrize("cut", [1, 9, 40, -3])
def test_cut_brushes_are_refused(cut: int) -> None:
    packed = pack_brush(np.random.default_rng(0).integers(0, 256, 4 * 4 * 5).astype(np.uint8))
    assert label_studio.decode_brush(packed, 4, 5).shape == (4, 5)
    with pytest.raises(DataError, match="'rle' of a brush"):
        label_studio.decode_brush(packed[:cut], 4, 5)
    with pytest.raises(DataError, match="expected 4 × 9 × 9"):
        label_studio.decode_brush(packed, 9, 9)


def test_a_long_xml_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = cvat_xml(tmp_path)
    monkeypatch.setattr(cvat, "MAX_CHARACTERS", 100)
    with pytest.raises(DataError, match="export it in several files"):
        opened("cvat", arguments)


def test_images_of_one_name_in_two_folders(tmp_path: Path) -> None:
    arguments = via(tmp_path, filename="a.jpg")
    (tmp_path / "x").mkdir()
    (tmp_path / "a.jpg").rename(tmp_path / "x/a.jpg")
    assert opened("via", arguments).names == ("x/a.jpg",)
    photograph(tmp_path / "y/a.jpg")
    with pytest.raises(DataError, match=r"'a\.jpg' is there 2 times"):
        opened("via", arguments)


def test_parts_have_the_bands_of_the_training_images() -> None:
    source = {"name": "masks", "images": "a", "masks": "b", "classes": ["x", "y"]}
    deep = {**source, "channels": 4, "range": [0, 4095]}
    data = DataConfig(
        train=deep, val=source, test={**source, "channels": 1}, pseudo={"name": "demo"}
    )
    assert part_spec(data, "val") == deep
    assert part_spec(data, "pseudo") == {"name": "demo"}  # has no such arguments
    with pytest.raises(ConfigError, match=r"data\.test\.channels: is 1, but data\.train has 4"):
        open_source(Config(data=data), "test")
