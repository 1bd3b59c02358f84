"""Doubts about labels name the class, the number of images and the likely cause."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segkit.data.cache import CachedSource
from segkit.data.doubts import describe, label_doubts, seen, split_doubts
from segkit.data.folds import Split, class_pixels
from segkit.data.masks import MaskSource


def opened(folder: Path, *masks: list[list[int]], classes: tuple[str, ...], **how: Any) -> Any:
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for i, mask in enumerate(masks):
        values = np.array(mask, np.uint8)
        Image.new("RGB", values.shape[::-1]).save(folder / f"images/{i}.jpg")
        Image.fromarray(values).save(folder / f"masks/{i}.png")
    paths = {part: str(folder / part) for part in ("images", "masks")}
    return MaskSource(**paths, classes=classes, **how)


def doubts(source: Any) -> list[str]:
    return label_doubts(source, class_pixels(source))


def test_sound_labels_give_no_doubt(tmp_path: Path) -> None:
    assert doubts(opened(tmp_path, [[0, 1]], [[1, 1]], classes=("background", "can"))) == []


def test_an_ignored_foreground_is_named(tmp_path: Path) -> None:
    masks = [[0, 255]], [[255, 255]]
    source = opened(tmp_path, *masks, classes=("background", "can"), ignore_index=255)
    missing, single, empty = doubts(source)
    assert "pixel of the class 'can'" in missing
    assert '"values": {"255": 1}' in missing
    assert "every labelled pixel is 'background'" in single
    assert empty.startswith("2 of 2 images have no labelled object, such as 0.jpg")
    cached = CachedSource(source, tmp_path / "cache", limit=1e9)
    assert doubts(cached) == [missing, single, empty]


def test_images_without_any_labelled_pixel(tmp_path: Path) -> None:
    source = opened(tmp_path, [[7, 7]], [[0, 1]], classes=("sky", "road"), ignore_index=7)
    (empty,) = doubts(source)
    assert empty.startswith("1 of 2 images have no labelled pixel, such as 0.jpg")


def test_a_class_that_a_part_lacks(tmp_path: Path) -> None:
    pixels = np.array([[9, 1], [9, 0], [9, 1], [9, 0]])
    names, classes = ["a", "b", "c", "d"], ("ground", "can")
    split = Split(folds=(("a",), ("b",), ("c",)), selection=("d",))
    (sentence,) = split_doubts(split, names, pixels, classes)
    assert (
        "'can' is in 2 images only, and not in the validation part of fold 1, the sel" in sentence
    )
    split = Split(folds=(("a", "c"), ("b", "d")))
    (sentence,) = split_doubts(split, names, pixels, classes)
    assert "the validation part of fold 1, the training part of fold 0:" in sentence
    assert split_doubts(Split(folds=(("a", "b"), ("c", "d"))), names, pixels, classes) == []


def test_lines_about_a_source(tmp_path: Path) -> None:
    source = opened(tmp_path, [[0, 1, 255, 255]], classes=("background", "can"), ignore_index=255)
    (tmp_path / "images/x.heic").write_bytes(b"")
    again = MaskSource(
        images=str(tmp_path / "images"), masks=str(tmp_path / "masks"),
        classes=source.classes, ignore_index=255,
    )  # fmt: skip
    assert describe(again) == (
        f"1 image, 2 classes from masks in {tmp_path / 'masks'}; 1 file left out in "
        f"{tmp_path / 'images'}: 1 .heic, such as x.heic"
    )
    assert seen(source, class_pixels(source)) == (
        "1 image with background 50 %, can 50 % of the labelled pixels; 50 % of all pixels are "
        "ignored"
    )
