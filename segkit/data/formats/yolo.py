"""Text files of YOLO segmentation: one file per image, one polygon in shares of it per line.

https://docs.ultralytics.com/datasets/segment/
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segkit.core.errors import DataError
from segkit.data.formats.shapes import Shapes, shape_source
from segkit.data.inputs import inside, read_text
from segkit.data.pairing import search, stem
from segkit.data.parts import WORDS

CLASS_FILES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names")
"""Names of files of class names, beside the folders of labels or above."""

_KEYED = re.compile(r"\s*['\"]?(\d+)['\"]?\s*:\s*(.+?)\s*")
_FLOW = re.compile(r"^names:\s*[\[{](.*?)[\]}]", re.M | re.S)
_BLOCK = re.compile(r"^names:.*\n((?:[ \t#-].*\n|\n)*)", re.M)
_COMMENT = re.compile(r"(^|\s)#.*")


def read(labels: Path, shapes: Shapes) -> None:
    """Add the images and polygons of the text files below a folder."""
    if shapes.classes is None:
        file = class_file(labels)
        if file is None:
            raise DataError(
                f"{labels} has no {', '.join(CLASS_FILES)} beside it or above; name the classes: "
                '"classes": ["can", "bag"]'
            )
        shapes.classes = class_names(file)
    files = _text_files(labels)
    if not files:
        raise DataError(f"{labels} has no text file; expected files of YOLO")
    for name in files:
        with shapes.reading(name):
            _read_file(labels, name, shapes)


def _read_file(labels: Path, name: str, shapes: Shapes) -> None:
    path = shapes.image(f"{stem(name)}.jpg")
    height, width = shapes.sizes[path]
    names = {str(number): label for number, label in enumerate(shapes.classes or ())}
    for number, line in enumerate(read_text(inside(labels, name)).splitlines(), 1):
        if not (words := line.split()):
            continue
        try:
            label, values = names[words[0]], [float(word) for word in words[1:]]
        except (KeyError, ValueError):
            values = []
        if len(values) < 4 or len(values) % 2 or not all(map(math.isfinite, values)):
            raise DataError(
                f"line {number} is {line!r:.60}; expected a class from 0 to {len(names) - 1}, and "
                "pairs x, y as shares of the image"
            )
        if len(values) == 4:  # a box: its center, width and height
            x, y, w, h = values
            left, top = (x - w / 2) * width, (y - h / 2) * height
            shapes.box(path, label, left, top, left + w * width, top + h * height)
        else:
            points = list(zip(values[::2], values[1::2], strict=True))
            shapes.polygon(path, label, points, unit=(width, height))


def _text_files(labels: Path) -> list[str]:
    return [name for name in search(labels, (".txt",))[0] if Path(name).name not in CLASS_FILES]


def class_file(labels: Path) -> Path | None:
    """Return the file of class names in a folder of labels or up to three folders above it."""
    folders = [labels, *labels.absolute().parents[:3]]
    files = (folder / name for folder in folders for name in CLASS_FILES)
    return next((path for path in files if path.is_file()), None)


def class_names(path: Path) -> tuple[str, ...]:
    """Return the class names of a text file, or those under ``names`` in a YAML file.

    Of YAML, the forms that tools write are read: a list or an object, in one line or in several.
    """
    text = read_text(path)
    if path.suffix not in (".yaml", ".yml"):
        return tuple(line.strip() for line in text.splitlines() if line.strip())
    block = _BLOCK.search(f"{text}\n")
    if block is None:
        raise DataError(f"{path} has no 'names'; list the classes there")
    flow = _FLOW.search(text)
    items = flow[1].split(",") if flow else block[1].splitlines()
    plain = [_COMMENT.sub("", item).strip().removeprefix("- ") for item in items]
    return _ordered([item for item in plain if item], path)


def _ordered(items: Sequence[str], path: Path) -> tuple[str, ...]:
    """Return names without quotation marks, in the order of their keys if they have keys."""
    matches = [_KEYED.fullmatch(item) for item in items]
    if items and all(matches):
        keyed = {int(match[1]): match[2] for match in matches if match}
        if sorted(keyed) != list(range(len(items))):
            raise DataError(f"{path}: expected the names of the classes 0 to {len(items) - 1}")
        items = [keyed[n] for n in range(len(items))]
    if not items:
        raise DataError(f"{path} has no class under 'names'; list the classes there")
    return tuple(item.strip().strip("'\"") for item in items)


def recognize(folder: Path, part: str) -> dict[str, Any] | None:
    """Return the arguments that read a part of a folder, or ``None``."""
    words = WORDS[part]
    layouts = [(f"labels/{word}", f"images/{word}") for word in words]
    layouts += [(f"{word}/labels", f"{word}/images") for word in words]
    if part == "train" and not any((folder / "labels" / word).is_dir() for word in words):
        layouts += [("labels", "images"), ("", "")]
    for labels, images in layouts:
        root = folder / labels
        if not root.is_dir() or not (folder / images).is_dir():
            continue
        files = _text_files(root)
        if files and class_file(root) and _is_label(root / files[0]):
            return {"labels": str(root), "images": str(folder / images)}
    return None


def _is_label(path: Path) -> bool:
    with path.open("rb") as file:
        words = file.readline(1 << 16).split()
    return not words or (
        words[0].isdigit() and all(re.fullmatch(rb"[-\d.e]+", w) for w in words[1:])
    )


open_yolo = shape_source(read, "YOLO polygons", "Images with text files of YOLO segmentation.")
