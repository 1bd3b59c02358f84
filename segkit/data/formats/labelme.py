"""Files of labelme: one JSON file per image.

https://github.com/wkentaro/labelme
"""

import math
from pathlib import Path
from typing import Any

from segkit.core.errors import DataError
from segkit.data.formats.shapes import Shapes, part_folder, shape_source
from segkit.data.inputs import inside, read_json
from segkit.data.pairing import search

CIRCLE_POINTS = 64
"""Corners of the polygon of a circle."""


def read(labels: Path, shapes: Shapes) -> None:
    """Add the images and shapes of the JSON files below a folder."""
    files, _ = search(labels, (".json",))
    if not files:
        raise DataError(f"{labels} has no JSON file; expected files of labelme")
    for name in files:
        with shapes.reading(name):
            _read_file(labels, name, shapes)


def _read_file(labels: Path, name: str, shapes: Shapes) -> None:
    content = read_json(inside(labels, name))
    listed = content.get("shapes")
    if not isinstance(listed, list) or "imagePath" not in content:
        raise DataError("has no 'shapes' and 'imagePath'; expected a file of labelme")
    sides = content.get("imageHeight"), content.get("imageWidth")
    path = shapes.image(content["imagePath"], None if None in sides else sides)
    for shape in listed:
        if not isinstance(shape, dict):
            raise DataError(f"a shape is {shape!r:.60}; expected an object")
        _add(path, shape, shapes)


def _add(path: str, shape: dict[str, Any], shapes: Shapes) -> None:
    points, kind, label = (
        shape.get("points"),
        shape.get("shape_type", "polygon"),
        shape.get("label"),
    )
    if not isinstance(points, list) or not all(isinstance(p, list) and len(p) == 2 for p in points):
        raise DataError(f"the shape {label!r:.60} has points {points!r:.60}; expected pairs x, y")
    if kind == "polygon":
        shapes.polygon(path, label, points)
    elif kind == "rectangle" and len(points) == 2:
        (left, right), (top, bottom) = (sorted(values) for values in zip(*points, strict=True))
        shapes.box(path, label, left, top, right, bottom)
    elif kind == "circle" and len(points) == 2:
        (x, y), (edge_x, edge_y) = points
        shapes.polygon(path, label, circle(x, y, math.hypot(edge_x - x, edge_y - y)))
    else:
        shapes.passed_over[str(kind)[:40]] += 1


def circle(x: float, y: float, rx: float, ry: float | None = None) -> list[tuple[float, float]]:
    """Return the polygon of a circle or, with two radii, of an ellipse."""
    angles = (2 * math.pi * n / CIRCLE_POINTS for n in range(CIRCLE_POINTS))
    ry = rx if ry is None else ry
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


def recognize(folder: Path, part: str) -> dict[str, Any] | None:
    """Return the arguments that read a part of a folder, or ``None``."""
    root = part_folder(folder, part)
    files = search(root, (".json",))[0][:3] if root else []
    for name in files:
        try:
            content = read_json(inside(Path(root or ""), name))
        except DataError:
            continue
        if "shapes" in content and "imagePath" in content:
            return {"labels": str(root)}
    return None


open_labelme = shape_source(read, "labelme files", "Images with the JSON files of labelme.")
