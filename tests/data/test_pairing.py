"""Masks are found by any usual naming; a missing one is named with the file that is there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segkit.core.errors import DataError
from segkit.data.masks import MaskSource
from segkit.data.pairing import search

CLASSES = ("background", "can")


def write(folder: Path, *names: str, value: int = 0) -> None:
    """Write an image or a mask at each path below a folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.full((5, 6), value, np.uint8))
        image.save(path, format="JPEG" if path.suffix.lower() in (".jpg", ".jfif") else None)


def opened(folder: Path, **arguments: Any) -> MaskSource:
    paths = {part: str(folder / part) for part in ("images", "masks")}
    return MaskSource(**{**paths, "classes": CLASSES, **arguments})


@pytest.mark.parametrize(
    ("image", "mask", "arguments"),
    [
        ("a.jpg", "a.PNG", {}),
        ("a.JPG", "a.png", {}),
        ("A1.jpg", "a1.png", {}),
        ("a.jpg", "a.tif", {}),
        ("a.jfif", "a.bmp", {}),
        ("a.jpg", "a_mask.png", {"mask_suffix": "_mask"}),
        ("a.jpg", "a_MASK.PNG", {"mask_suffix": "_MASK"}),
        ("a.jpg", "a.jpg.png", {"mask_suffix": ".jpg"}),
        (
            "ulm/ulm_000_leftImg8bit.png",
            "ulm/ulm_000_gtFine_labelIds.png",
            {"image_suffix": "_leftImg8bit", "mask_suffix": "_gtFine_labelIds"},
        ),
        ("img_7.jpg", "mask_7.png", {"image_prefix": "img_", "mask_prefix": "mask_"}),
        ("x/7.jpg", "x/gt_7_color.png", {"mask_prefix": "gt_", "mask_suffix": "_color"}),
        ("50%_a b.jpg", "50%_a b.png", {}),
        ("%s {0}.jpg", "%s {0}.png", {}),
        ("münchen.jpg", "münchen.png", {}),
    ],
)
def test_pairs(tmp_path: Path, image: str, mask: str, arguments: dict[str, Any]) -> None:
    write(tmp_path / "images", image)
    write(tmp_path / "masks", mask, value=1)
    source = opened(tmp_path, **arguments)
    assert source.names == (image,)
    assert (source.mask(0) == 1).all()


def test_the_exact_name_comes_before_another_letter_case(tmp_path: Path) -> None:
    write(tmp_path / "images", "a.jpg", "A.jpg")
    write(tmp_path / "masks", "a.png", value=1)
    write(tmp_path / "masks", "A.png", "a.tif")
    source = opened(tmp_path)
    assert {name: int(source.mask(i)[0, 0]) for i, name in enumerate(source.names)} == {
        "A.jpg": 0,
        "a.jpg": 1,
    }


@pytest.mark.parametrize(
    ("image", "mask", "words"),
    [
        ("a.jpg", "a_mask.png", 'a_mask.png is there: .* set mask_suffix to "_mask"'),
        (
            "ulm_0_leftImg8bit.png",
            "ulm_0_gtFine_color.png",
            'image_suffix to "_leftImg8bit" and mask_suffix to "_gtFine_color"',
        ),
        ("7.jpg", "mask_7.png", 'mask_7.png is there: .* set mask_prefix to "mask_"; else add'),
        (
            "day/img_7.jpg",
            "day/GroundTruth7.png",
            'image_prefix to "img_" and mask_prefix to "GroundTruth"',
        ),
        ("a1.jpg", "a2.png", r"a1\.png does not exist; add the mask of 'a1\.jpg'"),
    ],
)
def test_a_missing_mask_is_named_with_the_file_that_is_there(
    tmp_path: Path, image: str, mask: str, words: str
) -> None:
    write(tmp_path / "images", image)
    write(tmp_path / "masks", mask)
    with pytest.raises(DataError, match=words):
        opened(tmp_path)


def split(folder: Path, *lines: str) -> str:
    (folder / "split.txt").write_text("\n".join(lines))
    return str(folder / "split.txt")


def test_the_suggested_suffixes_work(tmp_path: Path) -> None:
    write(tmp_path / "images", "ulm_0_leftImg8bit.png")
    write(tmp_path / "masks", "ulm_0_gtFine_color.png")
    assert opened(tmp_path, image_suffix="_leftImg8bit", mask_suffix="_gtFine_color").labelled


def test_masks_beside_their_images(tmp_path: Path) -> None:
    write(tmp_path / "all", "a.jpg", "b.png")
    write(tmp_path / "all", "a_mask.png", "b_mask.png", value=1)
    folder = str(tmp_path / "all")
    source = MaskSource(images=folder, masks=folder, classes=CLASSES, mask_suffix="_mask")
    assert source.names == ("a.jpg", "b.png")
    assert [int(source.mask(i)[0, 0]) for i in range(2)] == [1, 1]
    with pytest.raises(DataError, match=r'a_mask\.png is there: .* set mask_suffix to "_mask"'):
        MaskSource(images=folder, masks=folder, classes=CLASSES)


def test_masks_with_a_prefix_beside_their_images(tmp_path: Path) -> None:
    write(tmp_path / "all", "img_1.jpg", "img_2.png")
    write(tmp_path / "all", "mask_1.png", "mask_2.png", value=1)
    folder = str(tmp_path / "all")
    source = MaskSource(
        images=folder, masks=folder, classes=CLASSES, image_prefix="img_", mask_prefix="mask_"
    )
    assert source.names == ("img_1.jpg", "img_2.png")
    assert [int(source.mask(i)[0, 0]) for i in range(2)] == [1, 1]


def test_masks_of_the_same_names_beside_their_images(tmp_path: Path) -> None:
    write(tmp_path / "all", "a.jpg")
    write(tmp_path / "all", "a.png", value=1)
    folder = str(tmp_path / "all")
    with pytest.raises(DataError, match=r"a\.png does not exist; .*set image_suffixes"):
        MaskSource(images=folder, masks=folder, classes=CLASSES)
    source = MaskSource(images=folder, masks=folder, classes=CLASSES, image_suffixes=(".jpg",))
    assert (source.mask(0) == 1).all()


def test_a_mask_without_an_image_is_a_fault(tmp_path: Path) -> None:
    write(tmp_path / "images", "a.jpg")
    write(tmp_path / "masks", "a.png", "b.png")
    (tmp_path / "images/b.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(
        DataError,
        match=r"masks/b\.png has no image in .*images; b\.heic is there, but is not read: save it",
    ):
        opened(tmp_path)
    source = opened(tmp_path, on_error="skip")
    assert source.names == ("a.jpg",)
    assert source.notes == (f"1 file left out in {tmp_path / 'images'}: 1 .heic, such as b.heic",)
    assert opened(tmp_path, split=split(tmp_path, "a")).faults == ()  # the list left it out


def test_hidden_files_are_not_used(tmp_path: Path) -> None:
    write(tmp_path / "images", "a.jpg")
    write(tmp_path / "masks", "a.png")
    for name in ("images/._a.jpg", "masks/._a.png", "masks/.hidden.png"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    write(tmp_path / "images", ".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/a.jpg")
    source = opened(tmp_path)
    assert source.names == ("a.jpg",)
    assert source.notes == ()


def test_split_lists_of_other_tools(tmp_path: Path) -> None:
    """Windows paths, a byte-order mark, and names with the image's own suffix or without."""
    write(tmp_path / "images", "x/a_rgb.jpg", "x/b_rgb.jpg", "x/c_rgb.jpg")
    write(tmp_path / "masks", "x/a.png", "x/b.png", "x/c.png")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfx\\b_rgb.jpg\r\nx/a\r\nx/c_rgb\r\n")
    source = opened(tmp_path, image_suffix="_rgb", split=str(tmp_path / "list.txt"))
    assert source.names == ("x/b_rgb.jpg", "x/a_rgb.jpg", "x/c_rgb.jpg")


def test_deep_images_need_a_range(tmp_path: Path) -> None:
    write(tmp_path / "masks", "a.png")
    (tmp_path / "images").mkdir()
    Image.fromarray(np.full((5, 6), 2048, np.uint16)).save(tmp_path / "images/a.png")
    with pytest.raises(DataError, match=r'"range": \[0, 4095\]'):
        opened(tmp_path).image(0)
    assert opened(tmp_path, range=(0, 4095)).image(0)[0, 0, 0] == 128


def test_a_link_to_a_folder_outside_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "photos/day").mkdir(parents=True)
    (tmp_path / "photos/day/a.png").touch()
    (tmp_path / "photos/again").symlink_to("day")
    (tmp_path / "photos/loop").symlink_to(".")
    assert search(tmp_path / "photos") == (["day/a.png"], [])
    (tmp_path / "other").mkdir()
    (tmp_path / "photos/more").symlink_to(tmp_path / "other")
    with pytest.raises(DataError, match="photos/more is a link to a folder outside"):
        search(tmp_path / "photos")
