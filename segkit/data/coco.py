"""Source of COCO instance annotations, painted as class-index masks."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from segkit.core.errors import ConfigError, DataError, closest, quoted
from segkit.core.labels import IGNORE
from segkit.data.dialects import Table, standardize
from segkit.data.images import MAX_PIXELS, read_image
from segkit.data.inputs import check_name, existing_name, inside, read_json
from segkit.data.objects import contradiction, drop_pieces, ignored_box, is_number
from segkit.data.samples import SampleRange, check_reading
from segkit.data.source import Fault, OnError, check_classes, size_advice, usable

MAX_OUTLINE = 1 << 22
"""Maximum outline length of an object in pixels; pycocotools needs about 100 bytes per pixel."""

Crowd = Literal["ignore", "paint", "skip"]

_TABLES = ("images", "annotations", "categories")

Shape = list[np.ndarray] | dict[str, Any]
"""A list of polygons, each (2 × points,) float64 of x, y in pixels, or a compressed RLE."""


class ImageRecord(NamedTuple):
    """An entry of the file's ``images``."""

    id: int
    name: str
    size: tuple[int, int]


class Region(NamedTuple):
    """An entry of the file's ``annotations``: an object or a crowd."""

    id: int
    class_index: int
    crowd: bool
    area: float
    shape: Shape


class CocoSource:
    """Images and instance labels of a COCO file, as one mask per image.

    Lin et al. 2014, https://arxiv.org/abs/1405.0312; the format: https://cocodataset.org/#format-data

    Category ids become classes 1, 2, ... in ascending order; 0 is the background. A category with
    the background's name (case-insensitive) is the background. Objects are painted by descending
    ``area``, then ascending id; later objects cover earlier ones. Images without annotations are
    all background; the pixels of objects with ``ignore`` 1 are ignored. A file whose
    ``annotations`` are absent or empty is unlabelled, and needs no ``categories``.

    Args:
        annotations: The JSON file.
        images: Folder that the file names are relative to; default: the JSON file's folder.
        crowd: Paint crowd regions as :data:`IGNORE`, as their class, or not at all.
        background: Name of class 0.
        rename: New name of a category by its name: two of the same name are one class, the
            background's name is the background, and ``null`` ignores the category's pixels.
        range: Samples that become 0 and 255, for images of more than 8 bits; ``"measured"``: the
            least and the largest of each image; default: 0 and 65535.
        channels: 3 for RGB, 1 for gray; another number: the files' own bands.
        on_error: ``"skip"`` reads every image once, and leaves out faulty images; a faulty
            annotation of a valid image is ignored in its box, or in the whole image if it has
            none; ``faults`` lists them.

    Attributes:
        category_ids: Class index by category id, :data:`IGNORE` for an ignored one.
        notes: Sentences about what is read in another way than it is written.
        image_ids: The file's image ids, in the order of ``names``.
        info: The file's ``info`` object.

    Raises:
        DataError: The file is not a COCO file; or it has a fault and ``on_error`` is ``"raise"``.
    """

    def __init__(
        self,
        *,
        annotations: str,
        images: str | None = None,
        crowd: Crowd = "ignore",
        background: str = "background",
        rename: Mapping[str, Any] | None = None,
        range: SampleRange | None = None,
        channels: int = 3,
        on_error: OnError = "raise",
    ) -> None:
        root = Path(annotations).parent if images is None else Path(images)
        self._open(
            read_json(annotations), annotations, root, crowd=crowd, background=background,
            rename=rename, range=range, channels=channels, on_error=on_error,
        )  # fmt: skip

    @classmethod
    def from_content(
        cls,
        content: dict[str, Any],
        *,
        file: str,
        root: Path,
        notes: Sequence[str] = (),
        faults: Sequence[Fault] = (),
        **arguments: Any,
    ) -> "CocoSource":
        """Return a source of the content of a COCO file, for example converted from another format.

        ``file`` names the content's origin in messages; ``notes`` and ``faults`` are put before
        those of the source. The other arguments are as for a file.
        """
        source = cls.__new__(cls)
        source._open(content, file, root, faults=faults, **arguments)
        source.notes = (*notes, *source.notes)
        return source

    def _open(
        self,
        content: dict[str, Any],
        file: str,
        root: Path,
        *,
        crowd: Crowd = "ignore",
        background: str,
        rename: Mapping[str, Any] | None,
        range: SampleRange | None,
        channels: int,
        on_error: OnError,
        faults: Sequence[Fault] = (),
    ) -> None:
        self._file, self._root, self._crowd = file, root, crowd
        self.reading = check_reading(range, channels)
        self.channels, self._range = channels, range
        self.origin = Path(file).name
        self.info = content["info"] if isinstance(content.get("info"), dict) else {}
        if "images" not in content:
            raise DataError(f"{file} has no 'images'; expected a COCO instance file")
        faults = [*faults]
        tables = {key: _entries(content, key, file) for key in _TABLES}
        self.labelled = bool(tables["annotations"])
        notes = standardize(tables)
        self.classes, self.category_ids = self._read_categories(
            tables["categories"], background, rename or {}
        )
        records = self._read_images(tables["images"], faults)
        self._dropped = 0
        regions = self._read_regions(tables, records, on_error == "skip", faults)
        if self._dropped:
            notes.append(
                f"{self._dropped} pieces of objects with fewer than 3 points are left out; the "
                "other pieces of these objects are read"
            )
        self.notes = tuple(notes)
        self._keep(records, regions)
        kept, self.faults = usable(self, faults, on_error, f"{file} lists no usable image")
        self._keep([records[i] for i in kept], regions)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        return inside(self._root, self.names[i])

    def size(self, i: int) -> tuple[int, int]:
        return self._sizes[i]

    def image(self, i: int) -> Tensor:
        path = self.path(i)
        pixels = read_image(path, range=self._range, channels=self.channels)
        height, width = self.size(i)
        size = (pixels.shape[1], pixels.shape[2])
        if size != (height, width):
            raise DataError(
                f"{path} is {size[1]} wide and {size[0]} high, but {self._file} says {width} and "
                f"{height}; {size_advice(size, (height, width))}"
            )
        return pixels

    def mask(self, i: int) -> Tensor:
        if not self.labelled:
            raise DataError(f"{self._file} has no annotations; expected a labelled COCO file")
        height, width = self.size(i)
        mask = np.zeros((width, height), np.uint8)  # transposed, as pycocotools decodes columns
        for region in self._regions[i]:
            if region.crowd and self._crowd == "skip":
                continue
            ignored = region.crowd and self._crowd == "ignore"
            inside = coco_mask.decode(encode(region.shape, height, width)).T
            np.putmask(mask, inside, IGNORE if ignored else region.class_index)
        return torch.from_numpy(np.ascontiguousarray(mask.T))

    def label_digest(self, i: int) -> str:
        digest = hashlib.sha256(f"{self._crowd} {self.size(i)}".encode())
        for region in self._regions[i]:
            digest.update(f"{region.class_index} {region.crowd} {_numbers(region.shape)}".encode())
        return digest.hexdigest()

    def why_empty(self, c: int) -> str:
        """Return why the class ``c`` has no pixel, and what to do."""
        of_class = [r for regions in self._regions for r in regions if r.class_index == c]
        crowds = sum(region.crowd for region in of_class)
        if not of_class and self.faults:
            return "no annotation without a fault uses it; correct the faults, or label it"
        if not of_class:
            return "no annotation uses it; label it, or remove the category"
        if crowds and self._crowd != "paint":
            return (
                f"{crowds} of {len(of_class)} annotations are crowds (iscrowd 1), which are left "
                'out; if they are ordinary objects, set "crowd": "paint"'
            )
        return f"its {len(of_class)} annotations are covered by others or smaller than a pixel"

    def regions(self, i: int) -> Sequence[Region]:
        """Return the annotations of image ``i`` in painting order."""
        return self._regions[i]

    def _keep(self, images: Sequence[ImageRecord], regions: dict[int, list[Region]]) -> None:
        self.names = tuple(image.name for image in images)
        self.image_ids = tuple(image.id for image in images)
        self._sizes = tuple(image.size for image in images)
        self._regions = [regions[image.id] for image in images]

    def _read_categories(
        self, table: Table, background: str, rename: Mapping[str, Any]
    ) -> tuple[tuple[str, ...], dict[int, int]]:
        """Return the classes, and the class index of each category id."""
        names: dict[int, str] = {}
        for record in table:
            key, name = _id(record, "id"), record.get("name")
            if key is None or not isinstance(name, str):
                raise DataError(
                    f"{self._file}: the category {_short(record)} needs an integer id and a name"
                )
            if key in names:
                raise DataError(f"{self._file}: two categories have id {key}; give each its own")
            names[key] = name
        if not names and self.labelled:
            raise DataError(f"{self._file} has annotations but no categories; list them")
        renamed = _rename(names, rename, self._file)
        objects = [renamed[key] for key in sorted(names)]
        named = [name for name in objects if name and name.casefold() != background.casefold()]
        if rename:
            named = list(dict.fromkeys(named))
        classes = check_classes([background, *named], self._file)
        index = {name: position for position, name in enumerate(classes)}
        return classes, {
            key: IGNORE if renamed[key] is None else index.get(renamed[key] or "", 0)
            for key in names
        }

    def _read_images(self, table: Table, faults: list[Fault]) -> list[ImageRecord]:
        images: list[ImageRecord] = []
        ids: set[int] = set()
        names: set[str] = set()
        for record in table:
            try:
                image = _image_record(record, self._root)
                if image.id in ids:
                    raise DataError(f"two images have id {image.id}; give each its own")
                if image.name in names:
                    raise DataError(f"two images are named {quoted(image.name)}; remove one")
            except DataError as error:
                name = record.get("file_name")
                file = name if isinstance(name, str) else self._file
                faults.append(Fault(f"{self._file}: {error}", file))
            else:
                images.append(image)
                ids.add(image.id)
                names.add(image.name)
        return images

    def _read_regions(
        self,
        tables: Mapping[str, Table],
        images: Sequence[ImageRecord],
        skip: bool,
        faults: list[Fault],
    ) -> dict[int, list[Region]]:
        """Return the regions of each image in painting order, by image id."""
        valid = {image.id: image for image in images}
        listed = {_id(record, "id") for record in tables["images"]}
        regions: dict[int, list[Region]] = {key: [] for key in valid}
        seen: set[int] = set()
        for record in tables["annotations"]:
            key, image_id = _id(record, "id"), _id(record, "image_id")
            image = None if image_id is None else valid.get(image_id)
            if image is None and image_id is not None and image_id in listed:
                continue  # its image is faulty, and reported already
            try:
                if key is None or key in seen:
                    raise DataError("expected a unique integer id; renumber the annotations")
                seen.add(key)
                if image is None:
                    given = _short(record.get("image_id"))
                    raise DataError(f"image {given} is not in the file; correct or remove it")
                self._dropped += drop_pieces(record)
                regions[image.id].append(_region(key, record, image.size, self.category_ids))
            except DataError as error:
                if image is not None and skip:
                    regions[image.id].append(_ignored_region(record, image.size))
                of = f" of {image.name}" if image else ""
                sentence = f"{self._file}: annotation {_short(record.get('id'))}{of}: {error}"
                faults.append(Fault(sentence, image.name if image else self._file, key))
        for regions_of_image in regions.values():
            regions_of_image.sort(key=lambda region: (-region.area, region.id))
        return regions


def _rename(names: Mapping[int, str], rename: Mapping[str, Any], file: str) -> dict[int, Any]:
    """Return the new name of each category, ``None`` for an ignored one."""
    for old, new in rename.items():
        if old not in names.values():
            raise DataError(
                f"rename: {quoted(old)} is no category of {file}{closest(old, names.values())}"
            )
        if new is not None and not isinstance(new, str):
            raise ConfigError(
                f"rename: {quoted(old)} becomes {_short(new)}; expected a name or null"
            )
    return {key: rename.get(name, name) for key, name in names.items()}


def _ignored_region(record: dict[str, Any], size: tuple[int, int]) -> Region:
    """Return an ignored region in place of an annotation that cannot be painted."""
    left, top, right, bottom = ignored_box(record, size)
    corners = [left, top, right, top, right, bottom, left, bottom]
    area = (right - left) * (bottom - top)
    return Region(-1, IGNORE, False, area, [np.array(corners, np.float64)])


def _numbers(shape: Shape) -> str:
    """Return a shape's complete content as text."""
    if isinstance(shape, dict):
        return str(sorted(shape.items()))
    return str([polygon.tolist() for polygon in shape])


def _entries(content: dict[str, Any], key: str, file: str) -> list[dict[str, Any]]:
    """Return the list of objects under ``key``, or an empty list if it is absent."""
    entries = content.get(key, [])
    if not isinstance(entries, list):
        raise DataError(f"{file}: '{key}' is {_short(entries)}; expected a list")
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{file}: {key}[{position}] is {_short(entry)}; expected an object")
    return entries


def _image_record(record: dict[str, Any], root: Path) -> ImageRecord:
    key, name = _id(record, "id"), record.get("file_name")
    if key is None or not isinstance(name, str):
        raise DataError(f"the image {_short(record)} needs an integer id and a file_name")
    name = existing_name(root, name)
    check_name(name)
    height, width = record.get("height"), record.get("width")
    if not (_is_integer(height) and _is_integer(width) and height > 0 and width > 0):
        raise DataError(
            f"image {quoted(name)} has height {_short(height)} and width {_short(width)}; "
            "expected numbers of pixels"
        )
    if height * width > MAX_PIXELS:
        raise DataError(
            f"image {quoted(name)} has {_short(width)} × {_short(height)} pixels; "
            f"expected at most {MAX_PIXELS:,}: scale it down or cut it into parts"
        )
    return ImageRecord(key, name, (height, width))


def _region(
    key: int, record: dict[str, Any], size: tuple[int, int], category_ids: dict[int, int]
) -> Region:
    """Return an annotation as a region; the id is put before the message of a DataError."""
    category = _id(record, "category_id")
    if category is None or category not in category_ids:
        given = _short(record.get("category_id"))
        raise DataError(f"category {given} is not in the file; add or correct it")
    crowd = record.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise DataError(f"iscrowd is {_short(crowd)}; expected 0 or 1")
    segmentation = record.get("segmentation")
    if isinstance(segmentation, dict):
        shape: Shape = _rle(segmentation, size)
    elif isinstance(segmentation, list) and segmentation:
        shape = _polygons(segmentation, size)
    else:
        raise DataError(f"segmentation is {_short(segmentation)}; expected polygons or an RLE")
    if "area" in record:
        area = record["area"]
        if not is_number(area) or not 0 < area < float("inf"):
            raise DataError(f"area is {_short(area)}; expected more than 0, or leave it out")
    else:
        area = coco_mask.area(encode(shape, *size))
    if (words := contradiction(record, shape, size)) is not None:
        raise DataError(words)
    index = IGNORE if record.get("ignore") else category_ids[category]
    return Region(key, index, bool(crowd), float(area), shape)


def _polygons(segmentation: list[Any], size: tuple[int, int]) -> list[np.ndarray]:
    """Return an annotation's polygons after validation."""
    height, width = size
    polygons = [_polygon(points, n) for n, points in enumerate(segmentation)]
    flat = outside = True
    outline = 0.0
    for n, corners in enumerate(polygons):
        (left, top), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
        # neither comparison holds for NaN
        if not (-width <= left <= right <= 2 * width and -height <= top <= bottom <= 2 * height):
            raise DataError(
                f"polygon {n} reaches from {left:g}, {top:g} to {right:g}, {bottom:g}; expected "
                f"finite numbers in or near the image, which is {width} × {height}"
            )
        outside = outside and (left >= width or right <= 0 or top >= height or bottom <= 0)
        flat = flat and _is_line(corners)
        outline += float(np.abs(np.diff(corners, axis=0, append=corners[:1])).max(1).sum())
    if flat:
        raise DataError("its polygons have no area; remove it")
    if outside:
        raise DataError(f"it lies outside the image, which is {width} × {height}; correct it")
    if outline > MAX_OUTLINE:
        raise DataError(
            f"its outline is {outline:,.0f} pixels long; expected at most {MAX_OUTLINE:,}"
        )
    return [corners.ravel() for corners in polygons]


def _polygon(points: Any, n: int) -> np.ndarray:
    """Return (points, 2) of x, y; integers too large for a float become infinite."""
    if not isinstance(points, list) or not set(map(type, points)) <= {int, float}:
        raise DataError(f"polygon {n} is {_short(points)}; expected a list of numbers")
    if len(points) % 2:
        raise DataError(f"polygon {n} has {len(points)} coordinates; expected pairs x, y")
    if len(points) < 6:
        raise DataError(f"polygon {n} has {len(points) // 2} points; expected at least 3")
    try:
        return np.array(points, np.float64).reshape(-1, 2)
    except OverflowError:
        return np.full((len(points) // 2, 2), np.inf)


def _is_line(corners: np.ndarray) -> bool:
    """Return whether ``corners`` (points, 2) lie on one straight line."""
    x, y = (corners - corners[0]).T
    if abs(x[:-1] @ y[1:] - y[:-1] @ x[1:]) > 1e-6:
        return False  # the left side is twice the area, which is 0 for a figure eight too
    far = np.argmax(x * x + y * y)
    return bool((np.abs(x * y[far] - y * x[far]) <= 1e-9 * (x[far] ** 2 + y[far] ** 2)).all())


def _rle(record: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return a compressed RLE, checked to fill the image exactly: pycocotools checks nothing."""
    height, width = size
    if record.get("size") != [height, width]:
        raise DataError(
            f"its RLE has size {_short(record.get('size'))}; expected [{height}, {width}]"
        )
    counts = record.get("counts")
    if isinstance(counts, str):
        runs = _decompress(counts)
    elif isinstance(counts, list) and all(map(_is_integer, counts)):
        if counts and not 0 <= min(counts) <= max(counts) <= MAX_PIXELS:
            raise DataError("its RLE has a negative or huge run; expected lengths of runs")
        runs = np.array(counts, np.int64)
    else:
        raise DataError(f"its RLE has counts {_short(counts)}; expected integers or a string")
    if (runs < 0).any() or runs.sum() != height * width:
        raise DataError(
            f"the runs of its RLE add up to {runs.sum()}; "
            f"expected {height * width} = {height} × {width}, none of them negative"
        )
    if not runs[1::2].any():
        raise DataError("its RLE has no area; remove it")
    if isinstance(counts, str):
        return {"size": [height, width], "counts": counts.encode("ascii")}
    return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def _decompress(counts: str) -> np.ndarray:
    """Return the runs of a compressed RLE.

    5 bits per character, low bits first; from the fourth run on, differences to the run two before.
    """
    malformed = f"its RLE has malformed counts {_short(counts)}; export it again"
    if not counts.isascii():
        raise DataError(malformed)
    codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    last = (codes & 0x20) == 0
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not last[-1]:
        raise DataError(malformed)
    ends = np.flatnonzero(last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    if (ends - starts).max() > 5:  # 6 characters hold any run of at most MAX_PIXELS
        raise DataError(malformed)
    bits = 5 * (np.arange(len(codes)) - np.repeat(starts, ends - starts + 1))
    values = np.add.reduceat((codes & 0x1F) << bits, starts)
    negative = (codes[ends] & 0x10) != 0
    values -= negative.astype(np.int64) << (bits[ends] + 5)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def encode(shape: Shape, height: int, width: int) -> dict[str, Any]:
    """Return ``shape`` as a compressed RLE of an image of this size, clipped to the image."""
    if isinstance(shape, dict):
        return shape
    return coco_mask.merge(coco_mask.frPyObjects(shape, height, width))


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _id(record: dict[str, Any], key: str) -> int | None:
    value = record.get(key)
    return value if _is_integer(value) else None


def _short(value: Any) -> str:
    """Return ``value`` for a message, at most 60 characters."""
    return f"{value!r:.60}"
