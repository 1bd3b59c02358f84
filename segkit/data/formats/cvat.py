"""XML files of CVAT ("CVAT for images").

https://docs.cvat.ai/docs/manual/advanced/formats/format-cvat/
"""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from segkit.core.errors import DataError
from segkit.data.formats.shapes import Shapes, recognizer, shape_source
from segkit.data.inputs import read_text

MAX_CHARACTERS = 1 << 28
"""Longest XML file: its tree takes several times as much memory."""

Element = ElementTree.Element


def read(labels: Path, shapes: Shapes) -> None:
    """Add the images and shapes of an XML file."""
    root = parse(labels)
    images = root.findall("image")
    if root.tag != "annotations" or not images:
        raise DataError(
            f"{labels} has no images; expected an export of CVAT in the format 'CVAT for images'"
        )
    names = [label.findtext("name") or "" for label in root.iter("label")]
    if names and shapes.classes is None:
        shapes.classes = tuple(dict.fromkeys(names))
    for image in images:
        with shapes.reading(str(labels)):
            _read_image(image, shapes)


def parse(path: Path) -> Element:
    """Return the root of an XML file without entities, which could expand without end."""
    text = read_text(path)
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"{path} has {len(text):,} characters; export it in several files")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError(f"{path} declares XML entities, which labels do not need; remove them")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise DataError(f"{path} is not valid XML ({error}); export it again") from error


def _read_image(image: Element, shapes: Shapes) -> None:
    height, width = _number(image, "height"), _number(image, "width")
    path = shapes.image(image.get("name"), (height, width))
    for element in image:
        label = element.get("label")
        if element.tag == "polygon":
            shapes.polygon(path, label, _points(element))
        elif element.tag == "mask":
            shapes.mask(path, label, _mask(element, int(height), int(width)))
        elif element.tag == "box":
            sides = [_number(element, key) for key in ("xtl", "ytl", "xbr", "ybr")]
            shapes.box(path, label, *sides)
        elif element.tag == "ellipse":
            values = [_number(element, key) for key in ("cx", "cy", "rx", "ry")]
            shapes.ellipse(path, label, *values)
        elif element.tag != "tag":
            shapes.passed_over[str(element.tag)[:40]] += 1


def _points(element: Element) -> list[tuple[float, float]]:
    text = element.get("points", "")
    try:
        return [(float(x), float(y)) for x, y in (pair.split(",") for pair in text.split(";"))]
    except ValueError:
        raise DataError(f"a polygon has points {text!r:.60}; expected x,y;x,y") from None


def _number(element: Element, key: str) -> float:
    try:
        number = float(element.get(key, ""))
    except ValueError:
        number = np.nan
    if not np.isfinite(number):
        raise DataError(f"{element.tag} has {key}={element.get(key)!r:.60}; expected a number")
    return number


def _mask(element: Element, height: int, width: int) -> np.ndarray:
    """Return the pixels of a mask: runs by rows, of background first, in its box."""
    left, top, w, h = (int(_number(element, key)) for key in ("left", "top", "width", "height"))
    try:
        runs = np.array([int(run) for run in element.get("rle", "").split(",")], np.int64)
    except (ValueError, OverflowError):
        runs = np.array([-1])
    inside = 0 <= left <= left + w <= width and 0 <= top <= top + h <= height
    if not inside or min(w, h) < 1 or runs.min() < 0 or runs.max() > w * h or runs.sum() != w * h:
        raise DataError(f"a mask has runs that do not fill its box of {w} × {h}; export it again")
    pixels = np.zeros((height, width), np.uint8)
    values = np.arange(len(runs)) % 2
    pixels[top : top + h, left : left + w] = np.repeat(values, runs).reshape(h, w)
    return pixels


def _is_cvat(head: bytes) -> bool:
    head = head[:4096]
    return b"<annotations" in head and (b"<version>" in head or b"<image " in head)


recognize = recognizer(".xml", _is_cvat)
open_cvat = shape_source(read, "CVAT XML", "Images with an XML file of CVAT for images.")
