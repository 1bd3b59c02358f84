"""Objects of a COCO file that cannot be painted, or whose area or box contradicts their shape."""

import math
from typing import Any, TypeGuard

import numpy as np
from pycocotools import mask as coco_mask

from segkit.core.labels import Size

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""

AREA_FACTOR, AREA_SLACK = 4, 100
"""An area that differs from the painted one by this factor and number of pixels contradicts it."""

LEAST_OVERLAP = 0.25
"""Least intersection over union of an object's box and the extent of its shape."""


def drop_pieces(record: dict[str, Any]) -> int:
    """Remove polygons of fewer than 3 points if the object has others; return their number."""
    pieces = record.get("segmentation")
    if not isinstance(pieces, list):
        return 0
    small = [isinstance(piece, list) and len(piece) in (0, 2, 4) for piece in pieces]
    if all(small):
        return 0
    record["segmentation"] = [p for p, is_small in zip(pieces, small, strict=True) if not is_small]
    return sum(small)


def ignored_box(record: dict[str, Any], size: Size) -> Box:
    """Return the pixels to ignore for an object that cannot be painted.

    They are the object's ``bbox``; without a valid one, the extent of its polygons; without any,
    the whole image, because the object may be anywhere.
    """
    height, width = size
    pieces = record.get("segmentation")
    lists = [p for p in pieces if isinstance(p, list)] if isinstance(pieces, list) else []
    numbers = [p for p in lists if len(p) >= 2 and all(map(is_number, p))]
    x, y = ([value for p in numbers for value in p[axis::2]] for axis in (0, 1))
    extent = [min(x), min(y), max(x) - min(x), max(y) - min(y)] if x and y else None
    for left, top, right, bottom in filter(None, map(_box, (record.get("bbox"), extent))):
        if left < width and right > 0 and top < height and bottom > 0:
            low = max(0, math.floor(left)), max(0, math.floor(top))
            return *low, min(width, math.ceil(right)), min(height, math.ceil(bottom))
    return 0, 0, width, height


def contradiction(
    record: dict[str, Any], shape: list[np.ndarray] | dict[str, Any], size: Size
) -> str | None:
    """Return how an annotation's ``area`` or ``bbox`` contradicts its shape, or ``None``.

    A box that holds two corners in place of a corner and a size is accepted, and so is the area of
    the box in place of that of the object.
    """
    extent, painted = _extent(shape)
    height, width = size
    if isinstance(shape, list) and min(extent) >= 0 and max(extent) <= 1 < min(size):
        return (
            "its polygon lies within the first pixel; its points are probably shares of the image: "
            "multiply x by the width and y by the height"
        )
    box, area = _box(record.get("bbox")), record.get("area")
    wrong = []
    if box is not None:
        corners = tuple(record["bbox"])
        if max(_overlap(box, extent), _overlap(corners, extent)) < LEAST_OVERLAP:
            wrong.append("bbox reaches from {:g}, {:g} to {:g}, {:g}".format(*box))
    if is_number(area):
        largest = max(AREA_FACTOR * painted, 1.5 * _area(extent)) + AREA_SLACK
        if not painted / AREA_FACTOR - AREA_SLACK <= area <= largest:
            wrong.append(f"area is {area:g}")
    if not wrong:
        return None
    scaled = tuple(v * side / 100 for v, side in zip(extent, (width, height) * 2, strict=True))
    agrees = box is None or _overlap(box, scaled) > 2 * LEAST_OVERLAP
    if (
        is_number(area)
        and not 0.7 * area < _area(scaled) * painted / max(1e-9, _area(extent)) < 1.4 * area
    ):
        agrees = False
    cause = (
        "its points are probably percent of the image"
        if agrees and max(extent) <= 100
        else "the polygon was probably drawn on an image of another size, or on another image"
    )
    return (
        f"{' and '.join(wrong)}, but its shape covers {painted:,.0f} pixels from {extent[0]:g}, "
        f"{extent[1]:g} to {extent[2]:g}, {extent[3]:g}; {cause}: correct the one that is wrong, "
        "or remove area and bbox if the shape is right"
    )


def _extent(shape: list[np.ndarray] | dict[str, Any]) -> tuple[Box, float]:
    """Return the box around a shape, and its area in pixels."""
    if isinstance(shape, dict):
        left, top, width, height = map(float, coco_mask.toBbox(shape))
        return (left, top, left + width, top + height), float(coco_mask.area(shape))
    area = 0.0
    for polygon in shape:
        x, y = polygon[0::2], polygon[1::2]
        area += abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
    corners = np.concatenate(shape).reshape(-1, 2)
    (left, top), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
    return (left, top, right, bottom), area


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Return the intersection over union of two boxes, each enlarged by a pixel on all sides."""
    a, b = ((x[0] - 1, x[1] - 1, x[2] + 1, x[3] + 1) for x in (a, b))
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    return both / max(1e-9, _area(a) + _area(b) - both)


def _area(box: tuple[float, ...]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _box(values: Any) -> Box | None:
    """Return the box of a ``bbox`` (left, top, width, height) that has an area, else ``None``."""
    if not isinstance(values, list) or len(values) != 4 or not all(map(is_number, values)):
        return None
    if not all(abs(value) < 1e9 for value in values) or min(values[2:]) <= 0:
        return None
    left, top, width, height = map(float, values)
    return left, top, left + width, top + height


def is_number(value: Any) -> TypeGuard[float]:
    """Return True for an integer or a float, but not for a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)
