"""Decoding of image files to upright RGB pixels."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from segkit.core.errors import DataError
from segkit.core.files import require_regular_file

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""Formats to decode, by Pillow's names. None of them starts another program, as EPS does."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")

MAX_PIXELS = 20_000**2
"""Maximum number of pixels to decode, according to the header: 1.1 GiB of RGB."""

if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit: our error is to come first
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, 2 * MAX_PIXELS)

_ORIENTATION = 0x0112


def read_image(path: Path | str) -> Tensor:
    """Return the first frame of an image file.

    Gray, palette and CMYK are converted. 16-bit samples keep their high byte. Alpha is dropped: a
    transparent pixel gets the color stored for it, as in torchvision and OpenCV.

    Pillow decodes all formats: torchvision's decoders give the same bytes, but are deprecated.

    Shape:
        result: (3, H, W) uint8, RGB, rotated to the EXIF orientation; channels last in memory

    Raises:
        DataError: The file is missing, damaged, not an image, or larger than :data:`MAX_PIXELS`.
    """
    with open_image(path) as image:
        return to_tensor(image)


def to_tensor(image: Image.Image) -> Tensor:
    """Return a Pillow image as :func:`read_image` returns a file.

    Raises:
        ValueError: The image has 32-bit samples.
    """
    orientation = _orientation(image)
    return _upright(torch.from_numpy(_rgb(image)).permute(2, 0, 1), orientation)


def image_size(path: Path | str) -> tuple[int, int]:
    """Return height and width of the upright image, from the file's header.

    Raises:
        DataError: As in :func:`read_image`; damage after the header is not detected.
    """
    with open_image(path) as image:
        width, height, orientation = *image.size, _orientation(image)
        if image.format == "TIFF":  # Pillow before 11 rotates it only when it loads the pixels
            tags: Any = image.getexif()
            width, height, orientation = tags[256], tags[257], tags.get(_ORIENTATION, 1)
        return (width, height) if orientation >= 5 else (height, width)


@contextmanager
def open_image(path: Path | str) -> Iterator[Image.Image]:
    """Open a file with Pillow and check its header; errors in the block become a DataError."""
    try:
        with Image.open(require_regular_file(path), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"{path} has {width} × {height} pixels; "
                    f"expected at most {MAX_PIXELS:,}: scale it down or cut it into parts"
                )
            yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; add the image or remove its entry") from None
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise DataError(f"{path} is empty or not an image; expected one of {known}") from None
    except Exception as error:  # decoders raise errors of any type on damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = reason.splitlines()[0]
        raise DataError(f"{path} cannot be decoded ({reason}); replace the file") from error


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, if it is stored before the pixels, else 1."""
    if image.format == "TIFF" or "exif" not in image.info:
        return 1  # Pillow rotates TIFF files itself
    exif = Image.Exif()
    exif.load(image.info["exif"])
    orientation = exif.get(_ORIENTATION)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """Return ``pixels`` (3, H, W) in the upright position, given the EXIF orientation 1 to 8."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels.flip(1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels.flip(2)
    return pixels


def _rgb(image: Image.Image) -> np.ndarray:
    """Convert an image of any Pillow mode to (H, W, 3) uint8."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        gray = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError("32-bit samples have no common range: convert it to 8 bits")
    if "transparency" in image.info:
        image = image.convert("RGBA")  # converting directly to RGB gives a warning
    return np.array(image.convert("RGB"))
