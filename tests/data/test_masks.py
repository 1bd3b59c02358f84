"""PNG masks have declared values, or are refused with the file and the values."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from segkit.core.errors import ConfigError, DataError
from segkit.data.masks import MaskSource

HEIGHT, WIDTH = 65, 97
CLASSES = ("sky", "road", "tree")


def indices(values: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, values, (HEIGHT, WIDTH)).astype(np.uint8)


def save_image(path: Path, *, width: int = WIDTH, height: int = HEIGHT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (9, 8, 7)).save(path)


def save_mask(path: Path, values: np.ndarray, *, mode: str = "L", **how: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette([60, 70, 80, 200, 0, 0, 0, 0, 255])
        assert image.mode == "P"
    image.save(path, **how)


def folders(root: Path, *names: str, values: int = 3) -> dict[str, str]:
    for i, name in enumerate(names):
        save_image(root / "images" / name)
        save_mask((root / "masks" / name).with_suffix(".png"), indices(values, seed=i))
    return {"images": str(root / "images"), "masks": str(root / "masks")}


def test_masks_are_read_as_stored(tmp_path: Path) -> None:
    opened = MaskSource(**folders(tmp_path, "b.jpg", "a.png", "deep/er/c.JPEG"), classes=CLASSES)
    assert opened.names == ("a.png", "b.jpg", "deep/er/c.JPEG")
    assert opened.classes == CLASSES
    assert opened.labelled
    assert len(opened) == 3
    assert opened.size(2) == (HEIGHT, WIDTH)
    assert opened.path(2) == tmp_path / "images/deep/er/c.JPEG"
    assert opened.image(2).shape == (3, HEIGHT, WIDTH)
    assert opened.mask(0).dtype == torch.uint8
    for i, seed in ((0, 1), (1, 0), (2, 2)):
        assert np.array_equal(opened.mask(i).numpy(), indices(seed=seed))
    again = pickle.loads(pickle.dumps(opened))
    assert torch.equal(again.mask(1), opened.mask(1))


@pytest.mark.parametrize(("mode", "bits"), [("P", None), ("P", 1), ("P", 2), ("P", 4), ("L", None)])
def test_palette_and_gray_of_any_depth(tmp_path: Path, mode: str, bits: int | None) -> None:
    values = indices(2)
    paths = folders(tmp_path, "a.jpg")
    how = {} if bits is None else {"bits": bits}
    save_mask(tmp_path / "masks/a.png", values, mode=mode, **how)
    assert np.array_equal(MaskSource(**paths, classes=CLASSES).mask(0).numpy(), values)


def test_bilevel_gray_holds_0_and_1(tmp_path: Path) -> None:
    """Pillow converts its 1 to 255."""
    values = indices(2)
    paths = folders(tmp_path, "a.jpg")
    Image.fromarray(values.astype(bool)).save(tmp_path / "masks/a.png")
    assert np.array_equal(MaskSource(**paths, classes=CLASSES).mask(0).numpy(), values)


@pytest.mark.parametrize("declared", [3, 255, 0])
def test_declared_ignore_index_becomes_255(tmp_path: Path, declared: int) -> None:
    values = indices()
    values[:9] = declared
    paths = folders(tmp_path, "a.jpg")
    save_mask(tmp_path / "masks/a.png", values)
    opened = MaskSource(**paths, classes=CLASSES, ignore_index=declared)
    assert np.array_equal(opened.mask(0).numpy(), np.where(values == declared, 255, values))


def test_name_of_the_ignored_value_at_the_end_is_no_class(tmp_path: Path) -> None:
    opened = MaskSource(**folders(tmp_path, "a.jpg"), classes=CLASSES, ignore_index=2)
    assert opened.classes == ("sky", "road")
    assert opened.mask(0).unique().tolist() == [0, 1, 255]


@pytest.mark.parametrize("ignore_index", [None, 254])
def test_undeclared_values_are_refused(tmp_path: Path, ignore_index: int | None) -> None:
    values = indices()
    values[4, 5], values[6, 7:9] = 255, 3
    paths = folders(tmp_path, "a.jpg")
    save_mask(tmp_path / "masks/a.png", values)
    opened = MaskSource(**paths, classes=CLASSES, ignore_index=ignore_index)
    with pytest.raises(DataError, match=r"masks/a\.png has the values 3, 255; expected 0 to 2"):
        opened.mask(0)


@pytest.mark.parametrize("ignore_index", [-1, 256])
def test_ignore_index_out_of_range(tmp_path: Path, ignore_index: int) -> None:
    with pytest.raises(ConfigError, match="ignore_index: expected 0 to 255"):
        MaskSource(**folders(tmp_path, "a.jpg"), classes=CLASSES, ignore_index=ignore_index)


def test_255_classes_leave_255_to_ignore(tmp_path: Path) -> None:
    names = tuple(f"class {i}" for i in range(255))
    paths = folders(tmp_path, "a.jpg", values=255)
    assert int(MaskSource(**paths, classes=names).mask(0).max()) == 254
    with pytest.raises(DataError, match="gives 256 classes"):
        MaskSource(**paths, classes=(*names, "one more"))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("rgb", r'is colored; .* "palette": .* or "values": {"128,0,0": 1}'),
        ("16-bit", "has the values 255, 256, 257; expected 0 to 2"),
        ("float", "TIFF file of mode F; expected class indices of 16 bits"),
        ("jpeg", "lossy compression, which changes values; save masks as PNG"),
        ("empty", "is empty or not an image"),
        ("truncated", "cannot be decoded"),
        ("turned", "is 65 wide and 97 high, but its image 97 and 65"),
        ("folder", "cannot be decoded"),
    ],
)
def test_masks_of_another_kind_are_refused(tmp_path: Path, kind: str, words: str) -> None:
    paths = folders(tmp_path, "a.jpg")
    path = tmp_path / "masks/a.png"
    values = indices()
    if kind == "rgb":
        Image.fromarray(values[..., None] * np.array([1, 1, 2], np.uint8)).save(path)
    elif kind == "16-bit":
        Image.fromarray(values.astype(np.uint16) + 255).save(path)
    elif kind == "float":
        Image.fromarray(values.astype(np.float32)).save(path, format="TIFF")
    elif kind == "jpeg":
        Image.fromarray(values).save(path, format="JPEG")
    elif kind == "turned":
        save_mask(path, values.T.copy())
    elif kind == "folder":
        source = MaskSource(**paths, classes=CLASSES)
        path.unlink()
        path.mkdir()
        with pytest.raises(DataError, match=r"a\.png cannot be decoded"):
            source.mask(0)
        return
    else:
        path.write_bytes(b"" if kind == "empty" else path.read_bytes()[:200])
    with pytest.raises(DataError, match=words) as caught:
        MaskSource(**paths, classes=CLASSES).mask(0)
    assert str(path) in str(caught.value)


def test_mask_is_compared_with_the_upright_image(tmp_path: Path) -> None:
    paths = folders(tmp_path, "a.jpg")
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "images/a.jpg", exif=exif)
    opened = MaskSource(**paths, classes=CLASSES)
    assert opened.mask(0).shape == opened.image(0).shape[1:] == opened.size(0) == (HEIGHT, WIDTH)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images/a.jpg", exif=exif)
    with pytest.raises(DataError, match="turn one of them; the EXIF data"):
        MaskSource(**paths, classes=CLASSES).mask(0)


def test_without_masks_the_source_is_unlabelled(tmp_path: Path) -> None:
    paths = folders(tmp_path, "a.jpg")
    opened = MaskSource(images=paths["images"], classes=CLASSES)
    assert not opened.labelled
    assert opened.image(0).shape == (3, HEIGHT, WIDTH)
    with pytest.raises(DataError, match="has no masks"):
        opened.mask(0)


def test_split_list_chooses_and_orders(tmp_path: Path) -> None:
    """Split lists have stems or file names, Windows line ends, and empty lines."""
    paths = folders(tmp_path, "a.jpg", "b.jpg", "c/d.jpg", "e.f.jpg")
    (tmp_path / "train.txt").write_bytes(b"c/d\r\n\r\na.jpg\r\n e.f \r\n")
    opened = MaskSource(**paths, classes=CLASSES, split=str(tmp_path / "train.txt"))
    assert opened.names == ("c/d.jpg", "a.jpg", "e.f.jpg")
    assert np.array_equal(opened.mask(2).numpy(), indices(seed=3))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("gone", r"train\.txt, line 2: 'gone' has no image"),
        ("../a", r"train\.txt, line 2: '\.\./a' has no image"),
        ("/etc/passwd", "line 2: '/etc/passwd' has no image"),
        ("a", r"line 2: 'a\.jpg' is in the list already"),
    ],
)
def test_faulty_lines_of_a_split_list(tmp_path: Path, line: str, words: str) -> None:
    paths = folders(tmp_path, "a.jpg")
    (tmp_path / "train.txt").write_text(f"a.jpg\n{line}\n")
    arguments: dict[str, Any] = {**paths, "classes": CLASSES, "split": str(tmp_path / "train.txt")}
    with pytest.raises(DataError, match=words):
        MaskSource(**arguments)
    skipping = MaskSource(**arguments, on_error="skip")
    assert skipping.names == ("a.jpg",)
    assert len(skipping.faults) == 1


def test_images_that_share_a_mask_are_refused(tmp_path: Path) -> None:
    paths = folders(tmp_path, "a.jpg", "a.png")
    with pytest.raises(DataError, match=r"'a\.jpg' and 'a\.png' differ in their suffix only"):
        MaskSource(**paths, classes=CLASSES)


def test_image_without_a_mask_is_refused(tmp_path: Path) -> None:
    paths = folders(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "masks/b.png").unlink()
    with pytest.raises(DataError, match=r"masks/b\.png does not exist"):
        MaskSource(**paths, classes=CLASSES)
    assert MaskSource(**paths, classes=CLASSES, on_error="skip").names == ("a.jpg",)


def test_links_out_of_either_folder_are_refused(tmp_path: Path) -> None:
    paths = folders(tmp_path, "a.jpg", "b.jpg")
    for name in ("images/a.jpg", "masks/b.png"):
        (tmp_path / name).rename(tmp_path / Path(name).name)
        (tmp_path / name).symlink_to(tmp_path / Path(name).name)
    opened = MaskSource(**paths, classes=CLASSES)
    for read in (lambda: opened.image(0), lambda: opened.mask(1)):
        with pytest.raises(DataError, match="symbolic link out of the data folder"):
            read()


def test_classes_from_a_file(tmp_path: Path) -> None:
    paths = folders(tmp_path, "a.jpg")
    file = tmp_path / "classes.txt"
    file.write_text("sky\n road \ntree\n\n")
    assert MaskSource(**paths, classes=str(file)).classes == CLASSES
    # skipping the empty line would move trees from 3 to 2
    for text, words in (("sky\n\ntree\n", "'' is empty"), ("", "'' is empty|0 classes")):
        file.write_text(text)
        with pytest.raises(DataError, match=words):
            MaskSource(**paths, classes=str(file))
    with pytest.raises(DataError, match=r"gone\.txt does not exist"):
        MaskSource(**paths, classes=str(tmp_path / "gone.txt"))
    with pytest.raises(DataError, match="'sky' is that of 2 classes; rename it"):
        MaskSource(**paths, classes=("sky", "sky"))


def test_folders_that_are_missing_or_empty(tmp_path: Path) -> None:
    paths = folders(tmp_path, "a.jpg")
    for key in ("images", "masks"):
        with pytest.raises(DataError, match="gone is not a folder"):
            MaskSource(**{**paths, key: str(tmp_path / "gone")}, classes=CLASSES)
    with pytest.raises(DataError, match=r"holds no usable image \(\.bmp\)"):
        MaskSource(**paths, classes=CLASSES, image_suffixes=(".bmp",))


def test_skip_keeps_what_is_sound_and_lists_the_rest(tmp_path: Path) -> None:
    paths = folders(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    (tmp_path / "images/a.jpg").write_bytes(b"")
    (tmp_path / "masks/b.png").unlink()
    save_mask(tmp_path / "masks/c.png", indices(9))
    opened = MaskSource(**paths, classes=CLASSES, on_error="skip")
    assert opened.names == ("d.jpg",)
    assert np.array_equal(opened.mask(0).numpy(), indices(seed=3))
    assert {fault.file for fault in opened.faults} == {"a.jpg", "b.jpg", "c.jpg"}
