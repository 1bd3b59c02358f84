"""Projects and annotations of the VGG Image Annotator (VIA), versions 1 and 2, as JSON.

https://www.robots.ox.ac.uk/~vgg/software/via/
"""

from pathlib import Path
from typing import Any

from segkit.core.errors import DataError
from segkit.core.files import matches_schema
from segkit.data.formats.shapes import Shapes, numbers, objects, recognizer, shape_source
from segkit.data.inputs import read_json

PREFERRED = ("class", "label", "name", "category", "type", "object")
"""Attributes that hold the class, if there are several."""


def read(labels: Path, shapes: Shapes) -> None:
    """Add the images and regions of a file."""
    content = read_json(labels)
    files = content.get("_via_img_metadata", content)
    entries = list(files.values()) if isinstance(files, dict) else []
    if not entries or not matches_schema(entries, [{"filename": Any}]):
        raise DataError(f"{labels} has no files with 'filename'; expected JSON of VIA 1 or 2")
    regions = [_regions(entry) for entry in entries]
    attribute = _attribute(str(labels), [region for of_file in regions for region in of_file])
    for entry, of_file in zip(entries, regions, strict=True):
        with shapes.reading(str(labels)):
            _read_file(entry, of_file, attribute, shapes)


def _regions(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the regions of a file: a list, or in version 1 an object."""
    regions = entry.get("regions", [])
    return objects(list(regions.values()) if isinstance(regions, dict) else regions)


def _attribute(file: str, regions: list[dict[str, Any]]) -> str:
    """Return the attribute that holds the class."""
    tables = [region.get("region_attributes") for region in regions]
    names = dict.fromkeys(key for table in tables if isinstance(table, dict) for key in table)
    preferred = [name for name in names if name.casefold() in PREFERRED]
    if len(names) != 1 and len(preferred) != 1:
        raise DataError(
            f"{file}: regions have the attributes {', '.join(names) or 'none'}; expected one that "
            f"holds the class, or one named {', '.join(PREFERRED)}"
        )
    return (preferred or [*names])[0]


def _read_file(
    entry: dict[str, Any], regions: list[dict[str, Any]], attribute: str, shapes: Shapes
) -> None:
    path = shapes.image(entry["filename"])
    for region in regions:
        if not matches_schema(region, {"region_attributes": dict, "shape_attributes": dict}):
            raise DataError(f"a region of {path} has no attributes; export it again")
        label = region["region_attributes"].get(attribute)
        if isinstance(label, dict):  # a check box: {"can": true}
            label = next((key for key, chosen in label.items() if chosen), None)
        _add(path, label, region["shape_attributes"], shapes)


def _add(path: str, label: Any, shape: dict[str, Any], shapes: Shapes) -> None:
    kind = str(shape.get("name"))[:40]
    if kind == "polygon":
        x, y = shape.get("all_points_x"), shape.get("all_points_y")
        if not isinstance(x, list) or not isinstance(y, list) or len(x) != len(y):
            raise DataError(f"a polygon of {path} has points {x!r:.40}, {y!r:.40}; expected lists")
        shapes.polygon(path, label, list(zip(x, y, strict=True)))
    elif kind == "rect":
        left, top, width, height = numbers(shape, ("x", "y", "width", "height"))
        shapes.box(path, label, left, top, left + width, top + height)
    elif kind in ("circle", "ellipse"):
        radii = ("r", "r") if kind == "circle" else ("rx", "ry")
        x, y = numbers(shape, ("cx", "cy"))
        shapes.ellipse(path, label, x, y, *(numbers(shape, (key,))[0] for key in radii))
    else:
        shapes.passed_over[kind] += 1


def _has_regions(head: bytes) -> bool:
    return b'"_via_img_metadata"' in head or (b'"filename"' in head and b'"regions"' in head)


recognize = recognizer(".json", _has_regions)
open_via = shape_source(read, "VIA regions", "Images with JSON of the VGG Image Annotator.")
