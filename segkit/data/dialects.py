"""Forms of COCO files that other tools write, converted to the standard form."""

import math
from itertools import chain
from typing import Any

from segkit.core.errors import quoted
from segkit.data.objects import is_number

Table = list[dict[str, Any]]

_COLUMNS: dict[str, dict[str, type]] = {
    "images": dict.fromkeys(("id", "width", "height"), int),
    "categories": {"id": int},
    "annotations": {
        **dict.fromkeys(("id", "image_id", "category_id", "iscrowd"), int),
        "area": float,
    },
}
"""Columns of each list that may hold strings, and the type of their values."""

_NO_PARENT = ("", "none", "null")
"""Supercategories, as text, of a category that has none."""


def standardize(tables: dict[str, Table]) -> list[str]:
    """Convert the lists ``images``, ``annotations`` and ``categories`` of a COCO file, in place.

    A form is converted only if the whole file has it: ids as strings ("7") or decimals (7.0), sizes
    likewise, each object's polygon as a list of numbers or of points in place of a list of
    polygons. A value of another form is left, and is a fault as in any file.

    Returns:
        A note for each category that is left out: the root that a tool adds above the classes.
    """
    for table, columns in _COLUMNS.items():
        for key, kind in columns.items():
            _convert_column(tables[table], key, kind)
    _convert_polygons(tables["annotations"])
    return _leave_out_roots(tables)


def _convert_column(table: Table, key: str, kind: type) -> None:
    """Convert a column of strings, or of decimals in place of integers, if all its values are."""
    rows = [row for row in table if key in row]
    values = [_number(row[key], kind) for row in rows]
    forms = {type(row[key]) for row in rows}
    is_form = forms <= {str} or (kind is int and forms <= {float})
    if is_form and all(value is not None for value in values):
        for row, value in zip(rows, values, strict=True):
            row[key] = value


def _number(value: Any, kind: type) -> int | float | None:
    """Return a string or a float as a number of a type, or ``None`` if it is not exactly one."""
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal() and len(value) <= 18:
        return kind(value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if kind is float:
        return number if math.isfinite(number) else None
    return int(number) if abs(number) < 2**53 and number == int(number) else None


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def _are_points(polygon: Any) -> bool:
    return isinstance(polygon, list) and all(map(_is_point, polygon))


def _convert_polygons(annotations: Table) -> None:
    """Convert polygons that are points [x, y], or an object's only polygon without a list."""
    rows = [row for row in annotations if isinstance(row.get("segmentation"), list)]
    rows = [row for row in rows if row["segmentation"]]
    shapes = [row["segmentation"] for row in rows]
    is_single = all(all(map(is_number, shape)) for shape in shapes) or all(
        len(shape) > 2 and _are_points(shape) for shape in shapes
    )
    if is_single:
        shapes = [[polygon] for polygon in shapes]
    if all(_are_points(polygon) for shape in shapes for polygon in shape):
        shapes = [[[*chain.from_iterable(polygon)] for polygon in shape] for shape in shapes]
    for row, shape in zip(rows, shapes, strict=True):
        row["segmentation"] = shape


def _leave_out_roots(tables: dict[str, Table]) -> list[str]:
    """Remove categories without annotations and parent that others have as parent (Roboflow)."""
    used = {repr(row.get("category_id")) for row in tables["annotations"]}
    categories, notes = tables["categories"], []
    for row in list(categories) if used else ():
        name = row.get("name")
        is_root = str(row.get("supercategory")).casefold() in _NO_PARENT
        children = [other for other in categories if other.get("supercategory") == name]
        if is_root and isinstance(name, str) and children and repr(row.get("id")) not in used:
            categories.remove(row)
            notes.append(
                f"the category {quoted(name)} is left out: no annotation uses it, and other "
                "categories name it as their supercategory"
            )
    return notes
