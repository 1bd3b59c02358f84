"""Decoding of image files to upright pixels."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError, features
from torch import Tensor

from segkit.core.errors import DataError, first_line
from segkit.core.files import require_regular_file
from segkit.data.samples import SampleRange, load_deep, to_bytes

_OPTIONAL = {"AVIF": ("avif", ".avif"), "JPEG2000": ("jpg_2000", ".jp2")}
"""Formats that not every Pillow decodes, with the name of the feature and the suffix."""

_PRESENT = {
    name: end for name, (feature, end) in _OPTIONAL.items() if feature in features.get_supported()
}

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", *_PRESENT)
"""Formats to decode, by Pillow's names. None of them starts another program, as EPS does."""

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", *_PRESENT.values()),
)

MAX_PIXELS = 20_000**2
"""Maximum number of pixels to decode, according to the header: 1.1 GiB of RGB."""

if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit: our error is to come first
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, 2 * MAX_PIXELS)

MAX_NEIGHBORS = 100_000
"""Most names of a folder to compare with that of a missing image."""

_ORIENTATION = 0x0112
_PNG = b"\x89PNG\r\n\x1a\n"


def read_image(path: Path | str, *, range: SampleRange | None = None, channels: int = 3) -> Tensor:
    """Return the first frame of an image file.

    Gray, palette and CMYK are converted. Alpha is dropped: a transparent pixel gets the color
    stored for it, as in torchvision and OpenCV. Damaged metadata gives a warning; the pixels are
    read.

    Pillow decodes all formats: torchvision's decoders give the same bytes, but are deprecated.

    Args:
        path: The file.
        range: The samples that become 0 and 255, for files of more than 8 bits per sample;
            ``"measured"``: the least and the largest of each image; default: 0 and 65535.
        channels: 3 for RGB, 1 for gray; another number: the file's own bands, alpha included.

    Shape:
        result: (channels, H, W) uint8, rotated to the EXIF orientation; channels last in memory

    Raises:
        DataError: The file is missing, damaged, not an image, larger than :data:`MAX_PIXELS`, has
            another number of bands, or samples that need a ``range``.
    """
    with open_image(path) as image:
        orientation = _orientation(image)
        try:
            pixels = to_bytes(image, range, channels)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error
    return _upright(torch.from_numpy(pixels).permute(2, 0, 1), orientation)


def to_tensor(image: Image.Image, *, range: SampleRange | None = None, channels: int = 3) -> Tensor:
    """Return a Pillow image as :func:`read_image` returns a file.

    Raises:
        ValueError: The image has samples that need a ``range``, or another number of bands.
    """
    pixels = torch.from_numpy(to_bytes(image, range, channels)).permute(2, 0, 1)
    return _upright(pixels, _orientation(image))


def as_rgb(image: Tensor) -> Tensor:
    """Return what people see of an image (C, H, W): its first three bands, or the first as gray."""
    return image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)


def image_size(path: Path | str) -> tuple[int, int]:
    """Return height and width of the upright image, from the file's header.

    Raises:
        DataError: As in :func:`read_image`; damage after the header is not detected.
    """
    with open_image(path, load=False) as image:
        width, height, orientation = *image.size, _orientation(image)
        if image.format == "TIFF":  # Pillow before 11 rotates it only when it loads the pixels
            tags: Any = image.getexif()
            width, height, orientation = tags[256], tags[257], tags.get(_ORIENTATION, 1)
        return (width, height) if orientation >= 5 else (height, width)


@contextmanager
def open_image(path: Path | str, *, load: bool = True) -> Iterator[Image.Image]:
    """Open a file with Pillow; errors in the block become a DataError.

    Without ``load``, only the header is read.
    """
    try:
        with _open(require_regular_file(path), load) as image:
            yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; {_neighbor(Path(path))}add the image or remove its entry"
        ) from None
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise DataError(
            f"{path} is empty or not an image; expected one of {known}: convert or replace the file"
        ) from None
    except Exception as error:  # decoders raise errors of any type on damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = reason.splitlines()[0]
        raise DataError(f"{path} cannot be decoded ({reason}); replace the file") from error


def _neighbor(path: Path) -> str:
    """Return a clause that names a file like a missing one but for letter case and suffix."""
    wanted = path.stem.casefold()
    try:
        names = islice(os.listdir(path.parent), MAX_NEIGHBORS)
    except OSError:
        return ""
    near = sorted(name for name in names if Path(name).stem.casefold() == wanted)
    return f"{near[0]} is there: correct the name; else " if near else ""


def _open(path: Path, load: bool) -> Image.Image:
    """Open a file; if that fails for a PNG, open it without its metadata."""
    try:
        return _begin(path, path, load)
    except DataError:
        raise
    except Exception:
        pixels_only = _without_metadata(path)
        if pixels_only is None:
            raise
    image = _begin(pixels_only, path, load)
    warnings.warn(
        f"{path}: its metadata is damaged or too large, so only its pixels are read; save the "
        "image again to remove it",
        stacklevel=5,
    )
    return image


def _begin(file: Path | BytesIO, path: Path, load: bool) -> Image.Image:
    image = Image.open(file, formats=FORMATS)
    try:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(
                f"{path} has {width} × {height} pixels; "
                f"expected at most {MAX_PIXELS:,}: scale it down or cut it into parts"
            )
        if load:
            load_deep(image, file)
    except BaseException:
        image.close()
        raise
    return image


def _without_metadata(path: Path) -> BytesIO | None:
    """Return a PNG's chunks that matter for its pixels, or ``None`` for other files.

    Pillow refuses a file for a text chunk that is long or has a wrong checksum.
    """
    content = path.read_bytes()
    if not content.startswith(_PNG):
        return None
    parts, at = [_PNG], len(_PNG)
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            parts.append(content[at : at + 12 + length])
        at += 12 + length
    return BytesIO(b"".join(parts))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, if it is stored before the pixels, else 1."""
    if image.format == "TIFF" or "exif" not in image.info:
        return 1  # Pillow rotates TIFF files itself
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
        orientation = exif.get(_ORIENTATION)
    except Exception as error:  # of any type, as for pixels
        name = getattr(image, "filename", "") or "the image"
        warnings.warn(
            f"{name}: its EXIF data is damaged ({first_line(error)}), so it is not rotated; look "
            "at the image, and save it again",
            stacklevel=4,
        )
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """Return ``pixels`` (C, H, W) in the upright position, given the EXIF orientation 1 to 8."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels.flip(1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels.flip(2)
    return pixels
