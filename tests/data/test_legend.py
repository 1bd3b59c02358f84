"""Values and colors of masks become the declared classes, or are refused with what to declare."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segkit.core.errors import ConfigError, DataError
from segkit.data.masks import MaskSource

CLASSES = ("background", "can", "bag")
INDICES = np.array([[0, 0, 1, 1], [0, 2, 2, 1], [0, 2, 2, 0]], np.uint8)
COLORS = np.array([[0, 0, 0], [128, 0, 0], [0, 64, 200]], np.uint8)


def opened(folder: Path, mask: Image.Image, suffix: str = ".png", **arguments: Any) -> MaskSource:
    for part in ("images", "masks"):
        (folder / part).mkdir(exist_ok=True)
    Image.new("RGB", mask.size).save(folder / "images/a.jpg")
    mask.save(folder / f"masks/a{suffix}")
    paths = {part: str(folder / part) for part in ("images", "masks")}
    return MaskSource(**{**paths, "classes": CLASSES, **arguments})


def pixels(source: MaskSource) -> np.ndarray:
    return source.mask(0).numpy()


def painted(colors: np.ndarray = COLORS) -> Image.Image:
    return Image.fromarray(colors[INDICES])


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".PNG", ".TIFF", ".gif"])
@pytest.mark.parametrize("kind", ["gray", "three channels", "alpha", "colors and alpha", "16 bits"])
def test_containers_of_an_index_need_no_option(tmp_path: Path, suffix: str, kind: str) -> None:
    if (kind == "alpha" and suffix == ".bmp") or (suffix == ".gif" and kind != "gray"):
        pytest.skip("Pillow cannot write it")
    if kind == "16 bits" and suffix in (".bmp", ".gif"):
        pytest.skip("the format has no 16 bits")
    three, opaque = np.dstack([INDICES] * 3), np.full_like(INDICES, 255)
    arrays = {
        "gray": INDICES,
        "three channels": three,
        "alpha": np.dstack([INDICES, opaque]),
        "colors and alpha": np.dstack([three, opaque // 2]),
        "16 bits": INDICES.astype(np.uint16),
    }
    source = opened(tmp_path, Image.fromarray(arrays[kind]), suffix)
    assert np.array_equal(pixels(source), INDICES)


def test_values_of_a_binary_mask(tmp_path: Path) -> None:
    mask = Image.fromarray(np.where(INDICES > 0, 255, 0).astype(np.uint8))
    source = opened(tmp_path, mask, classes=CLASSES[:2])
    with pytest.raises(DataError, match=r'has the values 255; .*"values": {"0": 0, "255": 1}'):
        source.mask(0)
    for of_255 in (1, "can"):
        source = opened(tmp_path, mask, classes=CLASSES[:2], values={"0": 0, "255": of_255})
        assert np.array_equal(pixels(source), INDICES > 0)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])
def test_two_values_are_read_from_a_lossy_mask(tmp_path: Path, suffix: str) -> None:
    shape = np.zeros((48, 64), np.uint8)
    shape[12:36, 16:40] = 1
    values = {"0": 0, "255": 1}
    mask = Image.fromarray(shape * 255)
    source = opened(tmp_path, mask, suffix, classes=CLASSES[:2], values=values)
    if suffix == ".webp":  # Pillow reads its gray as colors, which compression made unequal
        with Image.open(tmp_path / "masks/a.webp") as image:
            assert image.mode == "RGB"
    assert np.array_equal(pixels(source), shape)
    for wrong in (None, {**values, "9": 0}, {"*": 0}):
        with pytest.raises(DataError, match=r"lossy compression, which changes values"):
            opened(tmp_path, mask, suffix, classes=CLASSES[:2], values=wrong).mask(0)


def test_values_are_merged_ignored_and_named(tmp_path: Path) -> None:
    values = {"26": "can", "27": 1, "1000": "bag", "7": "background", "255": None}
    stored = np.array([[7, 26, 27], [1000, 255, 7]], np.uint16)
    source = opened(tmp_path, Image.fromarray(stored), values=values)
    assert pixels(source).tolist() == [[0, 1, 1], [2, 255, 0]]
    stored[0, 0] = 9
    with pytest.raises(DataError, match=r"has the values 9; .*map other values to classes"):
        opened(tmp_path, Image.fromarray(stored), values=values).mask(0)
    others = opened(tmp_path, Image.fromarray(stored), values={**values, "*": None})
    assert pixels(others)[0, 0] == 255


def test_values_that_begin_at_one(tmp_path: Path) -> None:
    mask = Image.fromarray(INDICES + 1)
    with pytest.raises(DataError, match=r'"values": {"1": 0, "2": 1, "3": 2}'):
        opened(tmp_path, mask).mask(0)
    source = opened(tmp_path, mask, values={"1": 0, "2": 1, "3": 2})
    assert np.array_equal(pixels(source), INDICES)


def test_ignore_index_is_kept_beside_values(tmp_path: Path) -> None:
    stored = np.array([[5, 6, 255]], np.uint8)
    source = opened(tmp_path, Image.fromarray(stored), values={"5": 0, "6": 1}, ignore_index=255)
    assert pixels(source).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"x": 0}, "expected a value .*, a color .* or \"\\*\", got 'x'"),
        ({"1,2": 0}, "got '1,2'"),
        ({"300,0,0": 0}, "colors of 0 to 255"),
        ({"#12345": 0}, "got '#12345'"),
        ({"-1": 0}, "got '-1'"),
        ({"70000": 0}, "from 0 to 65535, got 70000"),
        ({"1": 3}, "'1' is 3; expected a class name, its index from 0 to 2"),
        ({"1": True}, "'1' is True"),
        ({"1": 1.0}, r"'1' is 1\.0"),
        ({"1": "cam"}, "'1' is 'cam'; did you mean 'can'"),
    ],
)
def test_invalid_values_are_refused(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        opened(tmp_path, Image.fromarray(INDICES), values=values)


PALETTE = tuple(map(tuple, COLORS.tolist()))
BY_COLOR = {"0,0,0": "background", "#800000": "can", "0, 64, 200": 2}


@pytest.mark.parametrize("how", [{"palette": PALETTE}, {"values": BY_COLOR}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colors_become_classes(tmp_path: Path, how: dict[str, Any], mode: str) -> None:
    mask = painted().convert("P", palette=Image.Palette.ADAPTIVE, colors=3)
    mask = mask if mode == "P" else painted().convert(mode)
    assert np.array_equal(pixels(opened(tmp_path, mask, **how)), INDICES)


def test_a_color_that_no_class_has_is_named(tmp_path: Path) -> None:
    other = COLORS.copy()
    other[2] = (1, 2, 3)
    source = opened(tmp_path, painted(other), palette=PALETTE)
    with pytest.raises(DataError, match=r'a\.png has the color 1,2,3, .* at 4 pixels; .*"1,2,3"'):
        source.mask(0)
    source = opened(tmp_path, painted(other), palette=PALETTE, values={"1,2,3": None})
    assert np.array_equal(pixels(source), np.where(INDICES == 2, 255, INDICES))
    source = opened(tmp_path, painted(other), palette=PALETTE, values={"*": "can"})
    assert np.array_equal(pixels(source), np.where(INDICES == 2, 1, INDICES))


def test_gray_masks_beside_a_palette_hold_indices(tmp_path: Path) -> None:
    assert np.array_equal(
        pixels(opened(tmp_path, Image.fromarray(INDICES), palette=PALETTE)), INDICES
    )


@pytest.mark.parametrize(
    ("palette", "words"),
    [
        (PALETTE[:2], "has 2 colors for 3 classes"),
        ((PALETTE[0], PALETTE[0], PALETTE[1]), "two classes have the same color"),
        ((*PALETTE[:2], (0, 0, 256)), "colors of 0 to 255"),
    ],
)
def test_invalid_palettes_are_refused(tmp_path: Path, palette: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        opened(tmp_path, painted(), palette=palette)


FILES = {
    "labelmap of CVAT": "# label:color\nbackground:0,0,0::\ncan:128,0,0::\nbag:0,64,200::",
    "colors of CamVid": "0 0 0\t\tbackground\n128 0 0\tcan\n0 64 200\tbag\n",
    "table": "\ufeffname,r,g,b\r\nbackground,0,0,0\r\ncan,128,0,0\r\nbag,0,64,200\r\n",
    "names and colors": "background 0 0 0\ncan 128 0 0\nbag 0 64 200",
    "colors and names": "0,0,0,background\n128,0,0,can\n0,64,200,bag",
}


@pytest.mark.parametrize("kind", FILES)
def test_class_files_with_colors(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "classes.txt"
    file.write_text(FILES[kind], encoding="utf-8", newline="")
    source = opened(tmp_path, painted(), classes=str(file))
    assert source.classes == CLASSES
    assert np.array_equal(pixels(source), INDICES)


def test_the_ignored_color_is_that_of_its_index(tmp_path: Path) -> None:
    file = tmp_path / "classes.csv"
    file.write_text(FILES["table"].replace("bag", "Void"), encoding="utf-8")
    source = opened(tmp_path, painted(), classes=str(file), ignore_index=2)
    assert source.classes == CLASSES[:2]
    assert np.array_equal(pixels(source), np.where(INDICES == 2, 255, INDICES))


def test_class_file_with_values(tmp_path: Path) -> None:
    """Roboflow writes such a file beside masks."""
    file = tmp_path / "_classes.csv"
    file.write_text("Pixel Value, Class\n0, background\n3, can\n9, bag\n")
    stored = np.array([0, 3, 9], np.uint8)[INDICES]
    assert np.array_equal(
        pixels(opened(tmp_path, Image.fromarray(stored), classes=str(file))), INDICES
    )
    file.write_text("Pixel Value, Class\nzero, background\n")
    with pytest.raises(DataError, match=r"_classes\.csv: expected a value from 0 to 255"):
        opened(tmp_path, Image.fromarray(stored), classes=str(file))


def test_the_digest_tells_legends_apart(tmp_path: Path) -> None:
    ways: list[dict[str, Any]] = [
        {},
        {"ignore_index": 1},
        {"values": {"0": 0, "1": 1, "2": 1}},
        {"values": {"0": 0, "1": 1, "2": None}},
        {"values": {"0": 0, "1": 1, "300": 1}},
        {"palette": PALETTE},
        {"palette": PALETTE[::-1]},
        {"palette": PALETTE, "values": {"*": None}},
    ]
    digests = {opened(tmp_path, Image.fromarray(INDICES), **way).label_digest(0) for way in ways}
    assert len(digests) == len(ways)
