"""Forms of COCO files that other tools write, converted to the standard form."""

import math
from collections.abc import Callable
from typing import Any

from segkit.core.errors import quoted
from segkit.data.objects import is_number

Table = list[dict[str, Any]]

_COLUMNS: tuple[tuple[tuple[tuple[str, str], ...], type], ...] = (
    ((("images", "id"), ("annotations", "image_id")), int),
    ((("categories", "id"), ("annotations", "category_id")), int),
    ((("annotations", "id"),), int),
    ((("images", "width"), ("images", "height")), int),
    ((("annotations", "iscrowd"),), int),
    ((("annotations", "area"),), float),
)
"""Columns that are converted together, and the type of their values."""

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
    for columns, kind in _COLUMNS:
        for table, key in columns:
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


def _is_flat(polygons: list[Any]) -> bool:
    """Return True for one polygon as numbers x, y, x, y."""
    return all(map(is_number, polygons))


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def _is_points(polygons: list[Any]) -> bool:
    """Return True for one polygon as points [x, y]."""
    return len(polygons) > 2 and all(map(_is_point, polygons))


def _are_points(polygons: list[Any]) -> bool:
    """Return True for several polygons as points [x, y]."""
    return all(isinstance(polygon, list) and all(map(_is_point, polygon)) for polygon in polygons)


def _joined(points: list[Any]) -> list[Any]:
    return [number for point in points for number in point]


_FORMS: tuple[tuple[Callable[[list[Any]], bool], Callable[[list[Any]], list[Any]]], ...] = (
    (_is_flat, lambda polygon: [polygon]),
    (_is_points, lambda polygon: [_joined(polygon)]),
    (_are_points, lambda polygons: [_joined(polygon) for polygon in polygons]),
)
"""Forms of an object's polygons, and their conversion to lists of numbers."""


def _convert_polygons(annotations: Table) -> None:
    rows = [row for row in annotations if isinstance(row.get("segmentation"), list)]
    rows = [row for row in rows if row["segmentation"]]
    for is_form, convert in _FORMS:
        if all(is_form(row["segmentation"]) for row in rows):
            for row in rows:
                row["segmentation"] = convert(row["segmentation"])
            return


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
