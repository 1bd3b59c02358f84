"""Samples of image files of any depth and number of bands, as bytes."""

import re
import sys
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image, ImageSequence

from segkit.core.config import check_bounds
from segkit.core.errors import ConfigError

SampleRange: TypeAlias = tuple[float, float] | Literal["measured"]
"""The samples that become 0 and 255; ``"measured"``: the least and the largest of the image."""

MOST_CHANNELS = 64
"""Most bands of an image."""

_DEEP = re.compile(r";16([BLN]?)$")
_OTHER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L", "": "B"}
_GRAY_ALPHA = "LA;16B"
_LOW_BYTES = "low bytes"


def check_reading(range: SampleRange | None, channels: int) -> str:
    """Return a text that differs if files are read differently; empty for the default.

    Raises:
        ConfigError: The range is empty or reversed, or ``channels`` is not 1 to 64.
    """
    if isinstance(range, tuple) and not range[0] < range[1]:
        raise ConfigError(f"range: expected the smaller number first, got {list(range)}")
    check_bounds(1, MOST_CHANNELS, channels=channels)
    return "" if range is None and channels == 3 else f" {range} {channels}"


def load_deep(image: Image.Image, file: Path | BytesIO) -> None:
    """Decode the pixels of an opened image, and the low bytes of colors of 16 bits.

    Pillow has no mode for colors of 16 bits: it decodes their high bytes, or in the raw mode of the
    other byte order their low bytes.
    """
    modes = {_raw_mode(tile[3]) for tile in getattr(image, "tile", ())}
    image.load()
    if image.mode not in ("RGB", "RGBA") or not any(map(_DEEP.search, modes)):
        return
    if isinstance(file, BytesIO):
        file.seek(0)
    with Image.open(file) as again:
        tiles: Any = again
        tiles.tile = [_low_bytes(tile) for tile in tiles.tile]
        low = np.array(again)
    image.info[_LOW_BYTES] = low[..., [1, 1, 1, 3]] if _GRAY_ALPHA in modes else low


def _raw_mode(arguments: Any) -> str:
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _low_bytes(tile: Any) -> Any:
    """Return a tile of a Pillow image with the raw mode that keeps the low bytes."""
    mode, arguments = _raw_mode(tile[3]), tile[3]
    low = _DEEP.sub(lambda match: f";16{_OTHER[match[1]]}", mode)
    if mode == _GRAY_ALPHA:  # has no other order: its four bytes are decoded as four bands
        low = "RGBA"
    arguments = (low, *arguments[1:]) if isinstance(arguments, tuple) else low
    return type(tile)(*tile[:3], arguments) if hasattr(tile, "_fields") else (*tile[:3], arguments)


def to_bytes(image: Image.Image, range: SampleRange | None, channels: int) -> np.ndarray:
    """Return the pixels of a decoded image.

    Args:
        image: A Pillow image of any mode.
        range: See :data:`SampleRange`; default: 0 and 65535 for 16 bits, if the samples fill them.
        channels: 3 for RGB, 1 for gray; another number: the file's own bands, alpha included. The
            frames of a file with several are its bands.

    Shape:
        result: (H, W, channels) uint8

    Raises:
        ValueError: The image has samples that need a ``range``, or another number of bands.
    """
    if channels in (1, 3):
        return _of_channels(_in_range(image, range, colors=True), channels)
    frames = [_in_range(frame, range, colors=False) for frame in _frames(image, channels)]
    bands = np.concatenate(frames, axis=2)
    if bands.shape[2] != channels:
        raise ValueError(
            f"it has {bands.shape[2]} bands, but the source has channels={channels}; set channels "
            "to the number of bands, or 3 for RGB"
        )
    return bands


def _frames(image: Image.Image, channels: int) -> list[Image.Image]:
    count = getattr(image, "n_frames", 1)
    if count == 1 or len(image.getbands()) == channels:
        return [image]
    if count > channels:
        raise ValueError(f"it has {count} frames, but the source has channels={channels}")
    return [frame.copy() for frame in ImageSequence.Iterator(image)]


def _of_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Return pixels (H, W, any) as gray or RGB; alpha, which is the last band, is dropped."""
    colors = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1]
    if channels == colors.shape[2]:
        return colors
    if channels == 3:
        return np.repeat(colors, 3, axis=2)
    return np.array(Image.fromarray(np.ascontiguousarray(colors)).convert("L"))[..., None]


def _in_range(image: Image.Image, range: SampleRange | None, *, colors: bool) -> np.ndarray:
    """Return (H, W, bands) uint8."""
    samples = stored_samples(image, colors=colors)
    if samples.dtype == np.uint8:
        return samples
    if range is None:
        largest = int(samples.max()) if samples.dtype == np.uint16 else None
        if largest is None:
            raise ValueError(
                'samples of 32 bits have no common range; give the source "range": [low, high], '
                'the samples that become black and white, or "range": "measured"'
            )
        if largest < 2**15:
            declared = 2 ** max(8, largest.bit_length()) - 1
            raise ValueError(
                f"its samples of 16 bits reach {largest} only, and would be nearly black; give the "
                f'source "range": [0, {declared}], or [0, 65535] if they fill 16 bits in others'
            )
        return (samples >> 8).astype(np.uint8)
    if range == "measured":
        low, high = float(samples.min()), float(samples.max())
    else:
        low, high = range
    scale = 255 / (high - low) if high > low else 0.0
    scaled = (samples.astype(np.float32) - np.float32(low)) * np.float32(scale)
    return np.nan_to_num(scaled).round().clip(0, 255).astype(np.uint8)


def stored_samples(image: Image.Image, *, colors: bool) -> np.ndarray:
    """Return (H, W, bands) uint8, uint16, int32 or float32; palettes and the like as colors.

    ``colors``: convert what is neither gray nor RGB, with or without alpha, to RGB.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return np.asarray(image).astype(np.uint16)[..., None]
    if image.mode in ("I", "F"):
        return np.asarray(image)[..., None]
    low = image.info.get(_LOW_BYTES)
    if low is not None:
        high = np.asarray(image)
        return high.astype(np.uint16) << 8 | low.reshape(high.shape)
    if "transparency" in image.info:
        image = image.convert("RGBA")  # converting directly to RGB gives a warning
    kept = ("L", "LA", "RGB", "RGBA") if colors else ("L", "LA", "RGB", "RGBA", "RGBX", "CMYK")
    pixels = np.array(image if image.mode in kept else image.convert("RGB"))
    return pixels if pixels.ndim == 3 else pixels[..., None]
