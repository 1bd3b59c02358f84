"""Meaning of the values and colors of masks: which class each is, and how masks are decoded."""

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segkit.core.errors import ConfigError, DataError, closest, quoted
from segkit.core.labels import IGNORE
from segkit.data.images import open_image
from segkit.data.inputs import read_text
from segkit.data.source import check_classes

Color = tuple[int, int, int]

UNKNOWN = 256
"""Class of a value that is not declared; masks hold bytes, so no class has this number."""

LOSSY = ("JPEG", "WEBP", "AVIF", "JPEG2000")
"""Formats whose compression may change values."""

_NUMBERS = r"(?P<r>\d{1,3})[\s,;]+(?P<g>\d{1,3})[\s,;]+(?P<b>\d{1,3})"
_COLORED = (
    re.compile(rf"(?P<name>.+?):{_NUMBERS}(:.*)?"),  # labelmap.txt of CVAT
    re.compile(rf"{_NUMBERS}[\s,;]+(?P<name>.+)"),  # label_colors.txt of CamVid
    re.compile(rf"(?P<name>.+?)[\s,;]+{_NUMBERS}"),  # class_dict.csv
)
"""Lines of class files that have colors."""

_HEADER = re.compile(r"#.*|name\s*[,;]\s*r\s*[,;]\s*g\s*[,;]\s*b", re.IGNORECASE)
_VALUED = re.compile(r"pixel value\s*,\s*class", re.IGNORECASE)  # _classes.csv of Roboflow


@dataclass(frozen=True)
class Legend:
    """Classes, and the class of each value or color of a mask.

    Args:
        classes: Class names.
        numbers: (65536,) class of each stored value, :data:`IGNORE` or :data:`UNKNOWN`.
        colors: Class of each color, 65536 R + 256 G + B. With colors, masks with a palette are
            read as colors; without, as stored values.
        other: Class of every other value or color, or :data:`UNKNOWN`.
        given: Number of values given by the user.
    """

    classes: tuple[str, ...]
    numbers: np.ndarray = field(compare=False, repr=False)
    colors: Mapping[int, int] = field(default_factory=dict)
    other: int = UNKNOWN
    given: int = 0

    @functools.cached_property
    def meaning(self) -> bytes:
        """Text that differs if a mask may be decoded differently."""
        plain = np.where(self.numbers == UNKNOWN, np.arange(len(self.numbers)), self.numbers)
        text = f"{self.classes} {plain[:256].tolist()}"
        if self.given or self.colors:
            table = hashlib.sha256(self.numbers.tobytes()).hexdigest()
            text += f" {table} {sorted(self.colors.items())} {self.other}"
        return text.encode()

    def decode(self, path: Path) -> np.ndarray:
        """Return the classes in a mask file, (H, W) uint8.

        Raises:
            DataError: The file is no mask, or has a value or color that is not declared.
        """
        with open_image(path) as image:
            lossy = image.format in LOSSY
            values, is_color = _stored(image, path, colors=bool(self.colors))
        if lossy:
            values = self._nearest(values, path, is_color=is_color)
        if is_color:
            return self._decode_colors(values, path)
        mask = self.numbers[values]
        if (mask == UNKNOWN).any():
            raise DataError(self._undeclared(np.unique(values), path))
        return mask.astype(np.uint8)

    def why_empty(self, c: int) -> str:
        """Return why the class ``c`` has no pixel, and what to do."""
        own = np.flatnonzero(self.numbers == c).tolist()
        ignored = np.flatnonzero(self.numbers == IGNORE)
        values = f"the value {own[0]}" if own else "its value or color"
        if 0 < len(ignored) <= 256:
            return (
                f"no mask has {values}, and {ignored[0]} is ignored; if that is the class, remove "
                f'ignore_index, and map it: "values": {{"{ignored[0]}": {c}}}'
            )
        return f"no mask has {values}; label it, or remove the class"

    def _nearest(self, values: np.ndarray, path: Path, *, is_color: bool) -> np.ndarray:
        """Return the nearer of two declared values, which compression has changed."""
        declared = np.flatnonzero(self.numbers != UNKNOWN)
        if is_color or self.given != 2 or len(declared) != 2:
            raise DataError(
                f"{path} is a mask with lossy compression, which changes values; save masks as "
                'PNG, or give two values, such as "values": {"0": 0, "255": 1}'
            )
        low, high = declared.tolist()
        return np.where(values > (low + high) / 2, high, low)

    def _decode_colors(self, codes: np.ndarray, path: Path) -> np.ndarray:
        mask = _color_table(tuple(self.colors.items()), self.other)[codes]
        if (mask == UNKNOWN).any():
            code = int(codes[mask == UNKNOWN][0])
            count = int((mask == UNKNOWN).sum())
            color = f"{code >> 16},{code >> 8 & 255},{code & 255}"
            raise DataError(
                f"{path} has the color {color}, which no class has, at {count:,} pixels; add it to "
                f'the palette, or ignore it: "values": {{"{color}": null}}'
            )
        return mask.astype(np.uint8)

    def _undeclared(self, values: np.ndarray, path: Path) -> str:
        wrong = values[self.numbers[values] == UNKNOWN]
        shown = ", ".join(map(str, wrong[:20])) + (", ..." if len(wrong) > 20 else "")
        last = len(self.classes) - 1
        pairs = ", ".join(f'"{value}": {i}' for i, value in enumerate(values.tolist()))
        example = pairs if len(values) == len(self.classes) else '"VALUE": CLASS, "VALUE": null'
        return (
            f"{path} has the values {shown}; expected 0 to {last} for the classes, or one declared "
            f'as ignore_index; map other values to classes: "values": {{{example}}}'
        )


def read_legend(
    classes: str | Sequence[str],
    values: Mapping[str, Any] | None = None,
    palette: Sequence[Color] | None = None,
    ignore_index: int | None = None,
) -> Legend:
    """Return the legend of the arguments of :class:`segkit.data.MaskSource` of these names.

    Raises:
        ConfigError: An argument is invalid.
        DataError: The class names are invalid.
    """
    if ignore_index is not None and not 0 <= ignore_index <= 255:
        raise ConfigError(f"ignore_index: expected 0 to 255, got {ignore_index}")
    listed, colors, numbers = _read_classes(classes)
    if palette is not None:
        if len(palette) != len(listed):
            raise ConfigError(f"palette: has {len(palette)} colors for {len(listed)} classes")
        colors = [_code(color, "palette") for color in palette]
    names = listed[:-1] if ignore_index == len(listed) - 1 else listed
    table = np.full(65536, UNKNOWN, np.int16)
    table[numbers or range(len(listed))] = range(len(listed))
    codes = {code: index for index, code in enumerate(colors)}
    if len(codes) < len(colors):
        raise ConfigError("palette: two classes have the same color; give each its own")
    if ignore_index is not None:
        table[ignore_index] = IGNORE
        codes |= {code: IGNORE for code, index in codes.items() if index == ignore_index}
    if values is None:
        return Legend(names, table, codes)
    return _with_values(names, table, codes, values)


def _with_values(
    names: tuple[str, ...], table: np.ndarray, codes: dict[int, int], values: Mapping[str, Any]
) -> Legend:
    """Return the legend with the declared values, which replace the default ones."""
    parsed = {key: _index(key, value, names) for key, value in values.items()}
    other = parsed.pop("*", UNKNOWN)
    numbers: dict[int, int] = {}
    for key, index in parsed.items():
        if key.strip().isdecimal():
            numbers[int(key)] = index
        else:
            codes[_code(_color(key), "values")] = index
    if numbers and max(numbers) > 65535:
        raise ConfigError(f"values: expected values from 0 to 65535, got {max(numbers)}")
    if numbers or other != UNKNOWN:
        table[table != IGNORE] = other
    for value, index in numbers.items():
        table[value] = index
    return Legend(names, table, codes, other, len(numbers))


def _index(key: str, value: Any, names: Sequence[str]) -> int:
    """Return the class index that a value of a mask is mapped to."""
    if value is None:
        return IGNORE
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, str):
        raise ConfigError(f"values: {quoted(key)} is {quoted(value)}{closest(value, names)}")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(names):
        raise ConfigError(
            f"values: {quoted(key)} is {value!r:.60}; expected a class name, its index from 0 to "
            f"{len(names) - 1}, or null to ignore it"
        )
    return value


def _color(text: str) -> Color:
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text.strip()):
        number = int(text.strip()[1:], 16)
        return number >> 16, number >> 8 & 255, number & 255
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3 or not all(part.isdecimal() and len(part) < 4 for part in parts):
        raise ConfigError(
            f'values: expected a value ("7"), a color ("128,0,0" or "#800000") or "*", got '
            f"{quoted(text)}"
        )
    return int(parts[0]), int(parts[1]), int(parts[2])


def _code(color: Sequence[int], argument: str) -> int:
    if not all(0 <= part <= 255 for part in color):
        raise ConfigError(f"{argument}: expected colors of 0 to 255, got {list(color)}")
    red, green, blue = color
    return red << 16 | green << 8 | blue


def _read_classes(
    classes: str | Sequence[str],
) -> tuple[tuple[str, ...], list[int], list[int] | None]:
    """Return class names, their colors if the file has them, and their values if it has them."""
    if not isinstance(classes, str):
        return check_classes(classes, "classes"), [], None
    lines = [line.strip() for line in read_text(classes).rstrip().splitlines()]
    if lines and _VALUED.fullmatch(lines[0]):
        pairs = [line.partition(",") for line in lines[1:]]
        values = [int(value) for value, _, _ in pairs if value.strip().isdecimal()]
        if len(values) < len(pairs) or max(values, default=0) > 255:
            raise DataError(f"{classes}: expected a value from 0 to 255 and a class in each line")
        return check_classes([name.strip() for _, _, name in pairs], classes), [], values
    rows = [line for line in lines if line and not _HEADER.fullmatch(line)]
    for pattern in _COLORED:
        matches = [match for row in rows for match in [pattern.fullmatch(row)] if match]
        if rows and len(matches) == len(rows):
            names = check_classes([match["name"].strip() for match in matches], classes)
            colors = [(int(m["r"]), int(m["g"]), int(m["b"])) for m in matches]
            return names, [_code(color, classes) for color in colors], None
    # empty lines are not skipped: that would change the values of the classes below
    return check_classes(lines, classes), [], None


def _stored(image: Image.Image, path: Path, *, colors: bool) -> tuple[np.ndarray, bool]:
    """Return a mask's stored values, or codes of its colors, and whether they are colors.

    Alpha is dropped, and equal R, G and B are one value.
    """
    if colors and image.mode in ("P", "PA"):
        image = image.convert("RGB")
    if image.mode in ("RGB", "RGBA", "RGBX"):
        pixels = np.array(image).astype(np.int32)
        red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
        if colors:
            return red << 16 | green << 8 | blue, True
        if (red == green).all() and (red == blue).all():
            return red, False
        raise DataError(
            f"{path} is colored; expected class indices; give the colors of the classes: "
            '"palette": [[0, 0, 0], [128, 0, 0]], one per class, or "values": {"128,0,0": 1}'
        )
    if image.mode in ("LA", "PA"):
        return np.array(image)[..., 0], False
    if image.mode == "1":
        return np.array(image).astype(np.uint8), False
    if image.mode in ("L", "P") or image.mode.startswith("I;16"):
        values = np.array(image)
        depth = _depth(path) if image.format == "PNG" and image.mode == "L" else 8
        # Pillow scales gray values of fewer bits to 0..255
        return (values if depth >= 8 else values // (255 // (2**depth - 1))), False
    if image.mode == "I":
        values = np.array(image)
        if 0 <= values.min() <= values.max() < 65536:
            return values, False
    raise DataError(
        f"{path} is a {image.format} file of mode {image.mode}; expected class indices of 16 bits "
        "or fewer, or colors"
    )


def distinct(path: Path) -> tuple[list[int], list[Color]]:
    """Return the values of a mask, or its colors if it is colored.

    Those of a file with lossy compression are black and white: it blurs the others.
    """
    with open_image(path) as image:
        if image.format in LOSSY:
            return [0, 255], []
        values, is_color = _stored(image, path, colors=image.mode in ("RGB", "RGBA", "RGBX"))
    codes = np.unique(values).tolist()
    if not is_color:
        return codes, []
    colors = [(code >> 16, code >> 8 & 255, code & 255) for code in codes]
    gray = all(red == green == blue for red, green, blue in colors)
    return ([red for red, *_ in colors], []) if gray else ([], colors)


def _depth(path: Path) -> int:
    """Return the bits per sample from a PNG's header."""
    with path.open("rb") as file:
        return file.read(25)[-1]


@functools.lru_cache(maxsize=2)
def _color_table(colors: tuple[tuple[int, int], ...], other: int) -> np.ndarray:
    """Return the class of each of the 2**24 colors; 32 MB, once per process."""
    table = np.full(1 << 24, other, np.int16)
    for code, index in colors:
        table[code] = index
    return table
