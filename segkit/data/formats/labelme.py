"""Files of labelme: one JSON file per image.

https://github.com/wkentaro/labelme
"""

import math
from pathlib import Path
from typing import Any

from segkit.core.errors import DataError
from segkit.core.files import matches_schema
from segkit.data.formats.shapes import Shapes, pairs, part_folder, shape_source
from segkit.data.inputs import inside, read_json
from segkit.data.pairing import search


def read(labels: Path, shapes: Shapes) -> None:
    """Add the images and shapes of the JSON files below a folder."""
    files, _ = search(labels, (".json",))
    if not files:
        raise DataError(f"{labels} has no JSON file; expected files of labelme")
    for name in files:
        with shapes.reading(name):
            _read_file(read_json(inside(labels, name)), shapes)


def _read_file(content: dict[str, Any], shapes: Shapes) -> None:
    if not matches_schema(content, {"shapes": [dict], "imagePath": Any}):
        raise DataError("has no 'shapes' and 'imagePath'; expected a file of labelme")
    sides = content.get("imageHeight"), content.get("imageWidth")
    path = shapes.image(content["imagePath"], None if None in sides else sides)
    for shape in content["shapes"]:
        points, label = pairs(shape.get("points")), shape.get("label")
        kind = shape.get("shape_type", "polygon")
        if kind == "polygon":
            shapes.polygon(path, label, points)
        elif kind == "rectangle" and len(points) == 2:
            (left, right), (top, bottom) = map(sorted, zip(*points, strict=True))
            shapes.box(path, label, left, top, right, bottom)
        elif kind == "circle" and len(points) == 2:
            center, edge = points
            radius = math.dist(center, edge)
            shapes.ellipse(path, label, center[0], center[1], radius, radius)
        else:
            shapes.passed_over[str(kind)[:40]] += 1


def recognize(folder: Path, part: str) -> dict[str, Any] | None:
    """Return the arguments that read a part of a folder, or ``None``."""
    root = part_folder(folder, part)
    for name in search(root, (".json",))[0][:3] if root else ():
        try:
            content = read_json(inside(root or "", name))
        except DataError:
            continue
        if "shapes" in content and "imagePath" in content:
            return {"labels": str(root)}
    return None


open_labelme = shape_source(read, "labelme files", "Images with the JSON files of labelme.")
