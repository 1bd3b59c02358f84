"""Images and labelled shapes of any format, collected into the content of a COCO file."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np
from pycocotools import mask as coco_mask

from segkit.core.errors import ConfigError, DataError, closest, quoted
from segkit.core.labels import Size
from segkit.data.coco import CocoSource
from segkit.data.images import MAX_PIXELS, image_size
from segkit.data.inputs import inside
from segkit.data.objects import is_number
from segkit.data.pairing import search, stem
from segkit.data.parts import WORDS
from segkit.data.samples import SampleRange
from segkit.data.source import Fault, OnError

CIRCLE_POINTS = 64
"""Corners of the polygon of a circle."""

HEAD = 1 << 16
"""Bytes of a file that are looked at to recognize its format."""


def part_folder(folder: Path, part: str) -> Path | None:
    """Return the folder of a part: a subfolder of its name, or all of an undivided folder."""
    for name in WORDS[part]:
        if (folder / name).is_dir():
            return folder / name
    divided = any((folder / name).is_dir() for name in WORDS["train"])
    return folder if part == "train" and not divided else None


def recognizer(
    suffix: str, fits: Callable[[bytes], bool]
) -> Callable[[Path, str], dict[str, Any] | None]:
    """Return the ``recognize`` of a format that has one file for many images.

    ``fits`` returns True if the first :data:`HEAD` bytes of a file are of the format. The first
    three files of a part are looked at.
    """

    def recognize(folder: Path, part: str) -> dict[str, Any] | None:
        root = part_folder(folder, part)
        for name in search(root, (suffix,))[0][:3] if root else []:
            path = Path(root or "", name)
            with path.open("rb") as file:
                if fits(file.read(HEAD)):
                    return {"labels": str(path), "images": str(root)}
        return None

    return recognize


def numbers(table: Mapping[str, Any], keys: Sequence[str]) -> list[float]:
    """Return the numbers of a shape under ``keys``.

    Raises:
        DataError: One of them is missing, or no number.
    """
    values = [value for key in keys if is_number(value := table.get(key))]
    if len(values) < len(keys):
        raise DataError(f"a shape has {dict(table)!r:.80}; expected numbers {', '.join(keys)}")
    return values


def objects(values: Any) -> list[dict[str, Any]]:
    """Return the objects of a list, if it is one."""
    return [each for each in values if isinstance(each, dict)] if isinstance(values, list) else []


def pairs(points: Any) -> Sequence[Sequence[float]]:
    """Return points if they are a list of pairs of numbers.

    Raises:
        DataError: They are not.
    """
    known = [p for p in points if _is_pair(p)] if isinstance(points, list) else []
    if not known or len(known) < len(points):
        raise DataError(f"a shape has points {points!r:.60}; expected pairs x, y of numbers")
    return known


def _is_pair(point: Any) -> bool:
    is_list = isinstance(point, list | tuple) and len(point) == 2
    return is_list and all(is_number(value) and abs(value) < 1e9 for value in point)


class Shapes:
    """Images with shapes, which become the ``images`` and ``annotations`` of a COCO file.

    Args:
        root: Folder of the images.
        classes: Class names in their order; without, they are those of the shapes, sorted.
        boxes: Paint rectangles as their class, or ignore their pixels.

    Attributes:
        sizes: Height and width of each image that was added, by its path.
        passed_over: Number of shapes that are not read, by their kind.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None, *, boxes: str) -> None:
        self.root, self.classes, self.faults = root, classes, list[Fault]()
        self._paint = boxes == "paint"
        self._names, _ = search(root)
        self._index: dict[str, list[str]] = {}
        for name in self._names:
            short = PurePosixPath(name).name
            for key in dict.fromkeys((name, stem(name), short, stem(short))):
                self._index.setdefault(key.casefold(), []).append(name)
        self.sizes: dict[str, Size] = {}
        self._shapes: list[tuple[str, str, dict[str, Any]]] = []
        self._boxes, self.passed_over = 0, Counter[str]()

    def image(self, name: Any, size: tuple[Any, Any] | None = None) -> str:
        """Add an image; return its path relative to the folder.

        Args:
            name: Its path, address or name as a tool writes it: the file is found by its path, or
                by its name if that is unique.
            size: Height and width according to the tool; default: those of the file.

        Raises:
            DataError: The image is not in the folder, or there are several of its name.
        """
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"the image name is {name!r:.60}; expected text")
        path = self._find(name)
        if size is None:
            self.sizes.setdefault(path, image_size(inside(self.root, path)))
            return path
        if not all(is_number(side) and 0 < side == int(side) for side in size):
            raise DataError(f"{quoted(path)} has the size {size!r:.60}; expected numbers of pixels")
        height, width = int(size[0]), int(size[1])
        if height * width > MAX_PIXELS:
            raise DataError(f"{quoted(path)} has {width} × {height} pixels; that is too large")
        self.sizes[path] = height, width
        return path

    def _find(self, name: str) -> str:
        plain = unquote(name).replace("\\", "/").partition("?d=")[2] or unquote(name)
        plain = plain.replace("\\", "/").split("?")[0]
        parts = [part for part in plain.split("/") if part not in ("", ".", "..")]
        if not parts:
            raise DataError(f"the image name is {quoted(name)}; expected a file")
        last = parts[-1]
        without_upload = re.sub(r"^[0-9a-f]{8}-", "", last)  # Label Studio adds a number
        keys = ["/".join(parts[start:]) for start in range(max(0, len(parts) - 8), len(parts))]
        for key in (*keys, stem(last), without_upload, stem(without_upload)):
            matches = self._index.get(key.casefold(), [])
            exact = [match for match in matches if match == key]
            if len(matches) == 1 or len(exact) == 1:
                return (exact or matches)[0]
            if matches:
                raise DataError(
                    f"the image {quoted(name)} is there {len(matches)} times, such as "
                    f"{matches[0]} and {matches[1]}; give each its own name"
                )
        raise DataError(f"the image {quoted(name)} is not in {self.root}; add it, or set 'images'")

    def polygon(
        self, path: str, label: Any, points: Any, unit: tuple[float, float] = (1, 1)
    ) -> None:
        """Add a polygon: pairs x, y in units of that many pixels."""
        flat = [value * unit[axis] for pair in pairs(points) for axis, value in enumerate(pair)]
        self._add(path, label, {"segmentation": [flat]})

    def ellipse(self, path: str, label: Any, x: float, y: float, rx: float, ry: float) -> None:
        """Add an ellipse by its center and radii."""
        angles = [2 * math.pi * n / CIRCLE_POINTS for n in range(CIRCLE_POINTS)]
        points = [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]
        self.polygon(path, label, points)

    def mask(self, path: str, label: Any, pixels: np.ndarray) -> None:
        """Add an object as the pixels (H, W) that are not 0."""
        rle = coco_mask.encode(np.asfortranarray((pixels != 0).astype(np.uint8)))
        shape = {"size": [*pixels.shape], "counts": rle["counts"].decode("ascii")}
        self._add(path, label, {"segmentation": shape})

    def box(
        self, path: str, label: Any, left: float, top: float, right: float, bottom: float
    ) -> None:
        """Add a rectangle, which is ignored unless boxes are painted."""
        corners = [left, top, right, top, right, bottom, left, bottom]
        self._boxes += 1
        self._add(path, label, {"segmentation": [corners], "ignore": 0 if self._paint else 1})

    def _add(self, path: str, label: Any, record: dict[str, Any]) -> None:
        if not isinstance(label, str) or not label.strip():
            raise DataError(f"a shape of {quoted(path)} has the label {label!r:.60}; expected text")
        if self.classes is not None and label not in self.classes:
            raise DataError(
                f"a shape of {quoted(path)} has the label {quoted(label)}"
                f"{closest(label, self.classes)}"
            )
        self._shapes.append((path, label, record))

    @contextmanager
    def reading(self, file: str) -> Iterator[None]:
        """Make a DataError in the block a fault of ``file``, whose shapes are left out."""
        before = len(self._shapes)
        try:
            yield
        except DataError as error:
            del self._shapes[before:]
            self.faults.append(Fault(f"{file}: {error}", file=file))

    def content(self) -> dict[str, Any]:
        """Return the content of a COCO file."""
        classes = self.classes or sorted({label for _, label, _ in self._shapes})
        ids = {path: number for number, path in enumerate(self.sizes, 1)}
        images = [
            {"id": ids[path], "file_name": path, "height": height, "width": width}
            for path, (height, width) in self.sizes.items()
        ]
        categories = {name: number for number, name in enumerate(classes, 1)}
        annotations = [
            {"id": n, "image_id": ids[path], "category_id": categories[label], **record}
            for n, (path, label, record) in enumerate(self._shapes, 1)
        ]
        return {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for name, number in categories.items()],
        }

    def notes(self) -> list[str]:
        """Return sentences about what is passed over."""
        notes = []
        unused = [name for name in self._names if name not in self.sizes]
        if unused:
            notes.append(f"{len(unused):,} images without labels left out, such as {unused[0]}")
        if self._boxes and not self._paint:
            notes.append(
                f'the pixels of {self._boxes:,} boxes are ignored; set "boxes": "paint" if '
                "they are the shapes of the objects"
            )
        for kind, count in self.passed_over.items():
            notes.append(f"{count:,} shapes of kind {quoted(kind)} left out")
        return notes


Reader = Callable[[Path, Shapes], None]


def shape_source(read: Reader, kind: str, description: str) -> Callable[..., CocoSource]:
    """Return the source of a format whose ``read(labels, shapes)`` adds images and shapes.

    ``kind`` names the format in messages; ``description`` is the first line of the documentation.
    """

    def open_shapes(
        *,
        labels: str,
        images: str | None = None,
        classes: tuple[str, ...] | None = None,
        boxes: Literal["ignore", "paint"] = "ignore",
        background: str = "background",
        rename: Mapping[str, Any] | None = None,
        range: SampleRange | None = None,
        channels: int = 3,
        on_error: OnError = "raise",
    ) -> CocoSource:
        where = Path(labels)
        if not where.exists():
            raise DataError(f"{labels} does not exist; expected {kind}")
        if classes is not None and not classes:
            raise ConfigError("classes: is empty; expected class names, or null")
        root = Path(images) if images else where if where.is_dir() else where.parent
        shapes = Shapes(root, classes, boxes=boxes)
        read(where, shapes)
        source = CocoSource.from_content(
            shapes.content(), file=labels, root=root, notes=shapes.notes(), faults=shapes.faults,
            background=background, rename=rename, range=range, channels=channels, on_error=on_error,
        )  # fmt: skip
        source.origin = kind
        return source

    open_shapes.__doc__ = description + _ARGUMENTS
    return open_shapes


# the other arguments are described by CocoSource
_ARGUMENTS = """

    Polygons become masks as those of a COCO file. Images are found by their path, or by their name
    if it is unique.

    Args:
        labels: The file or the folder of labels.
        images: Folder of the images; default: that of the labels.
        classes: Class names in their order; default: all labels, sorted by name.
        boxes: Ignore the pixels of rectangles, or paint them as their class.
    """
