"""JSON exports of Label Studio: polygons in percent, and brushes.

https://labelstud.io/guide/export
"""

from pathlib import Path
from typing import Any

import numpy as np

from segkit.core.errors import DataError
from segkit.data.formats.shapes import Shapes, numbers, objects, recognizer, shape_source
from segkit.data.images import SUFFIXES
from segkit.data.inputs import read_json_list


def read(labels: Path, shapes: Shapes) -> None:
    """Add the images and shapes of the tasks of an export."""
    tasks = read_json_list(labels)
    if not all(isinstance(task, dict) and isinstance(task.get("data"), dict) for task in tasks):
        raise DataError(
            f"{labels} is no list of tasks with 'data'; export it from Label Studio as JSON, not "
            "as JSON-MIN"
        )
    for number, task in enumerate(tasks):
        with shapes.reading(f"{labels}, task {task.get('id', number)!r:.40}"):
            _read_task(task, shapes)


def _read_task(task: dict[str, Any], shapes: Shapes) -> None:
    annotations = objects(task.get("annotations", task.get("completions")))
    kept = [each for each in annotations if not each.get("was_cancelled")]
    if not kept:
        return  # not annotated: its image is among those without labels
    texts = [value for value in task["data"].values() if isinstance(value, str)]
    named = [text for text in texts if text.split("?")[0].lower().endswith(SUFFIXES)]
    named = named or [text for text in texts if "?d=" in text]
    name = named[0] if named else task.get("file_upload")
    results = objects(kept[-1].get("result"))
    sizes = [(each.get("original_height"), each.get("original_width")) for each in results]
    known = [size for size in sizes if None not in size]
    path = shapes.image(name, known[0] if known else None)
    for each in results:
        _add(path, each, shapes)


def _add(path: str, result: dict[str, Any], shapes: Shapes) -> None:
    kind, value = str(result.get("type"))[:40], result.get("value")
    value = value if isinstance(value, dict) else {}
    label = value.get(kind)
    label = label[0] if isinstance(label, list) and label else label
    height, width = shapes.sizes[path]
    if value and kind == "polygonlabels":
        shapes.polygon(path, label, value.get("points"), unit=(width / 100, height / 100))
    elif value and kind == "rectanglelabels":
        x, y, w, h = numbers(value, ("x", "y", "width", "height"))
        shapes.box(path, label, x * width / 100, y * height / 100,
                   (x + w) * width / 100, (y + h) * height / 100)  # fmt: skip
    elif value and kind == "brushlabels":
        shapes.mask(path, label, decode_brush(value.get("rle"), height, width))
    elif kind not in ("choices", "textarea", "rating", "relation"):
        shapes.passed_over[kind] += 1


def decode_brush(rle: Any, height: int, width: int) -> np.ndarray:
    """Return the opacity (H, W) uint8 that a brush's run lengths hold.

    A stream of bits: the number of bytes (32 bits), the size of a byte less 1 (5), four sizes of
    counts less 1 (4 each), then runs: 1 for equal bytes or 0 for different ones, which size the
    count has (2), the count less 1, and the byte or the bytes. The bytes are pixels of RGBA.

    Raises:
        DataError: It is malformed, or of another image size.
    """
    is_bytes = isinstance(rle, list) and all(type(x) is int and 0 <= x <= 255 for x in rle)
    if not is_bytes or not rle:
        raise DataError("a brush has no 'rle' of bytes; export it from Label Studio as JSON")
    bits = np.unpackbits(np.array(rle, np.uint8)).tobytes().translate(_DIGITS).decode()
    at = 0

    def take(count: int) -> int:
        nonlocal at
        at += count
        if at > len(bits):
            raise DataError("the 'rle' of a brush ends too early; export it again")
        return int(bits[at - count : at], 2)

    total, word = take(32), take(5) + 1
    sizes = [take(4) + 1 for _ in range(4)]
    if total != height * width * 4 or word != 8:
        raise DataError(
            f"the 'rle' of a brush has {total:,} bytes; expected 4 × {height} × {width}"
        )
    values, position = np.zeros(total, np.uint8), 0
    while position < total:
        equal = take(1)
        end = min(total, position + 1 + take(sizes[take(2)]))
        if equal:
            values[position:end] = take(word)
        else:
            values[position:end] = [take(word) for _ in range(position, end)]
        position = end
    return values.reshape(height, width, 4)[..., 3]


_DIGITS = bytes.maketrans(b"\0\1", b"01")


def _is_list_of_tasks(head: bytes) -> bool:
    is_list = head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"[")
    return is_list and b'"original_width"' in head


recognize = recognizer(".json", _is_list_of_tasks)
open_label_studio = shape_source(
    read, "Label Studio tasks", "Images with a JSON export of Label Studio."
)
