"""Bands and sample range of image files, as arguments of the source that reads them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageSequence

from segkit.data.images import open_image
from segkit.data.samples import MOST_CHANNELS, stored_samples

MOST_READ = 64
"""Images that are looked at, evenly spaced."""


class Look(NamedTuple):
    """Bands of an image; type, minimum and maximum of its samples."""

    channels: int
    kind: np.dtype
    low: float
    high: float


def find_reading(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the arguments ``channels`` and ``range`` that a source of these images needs.

    Those are left out that the images do not need. Images of RGB and of gray are read as RGB.
    """
    step = -(-len(paths) // MOST_READ)
    looks = [_look(path) for path in paths[:: max(1, step)]]
    needs: dict[str, Any] = {}
    channels = {look.channels for look in looks}
    if len(channels) == 1 and channels != {3}:
        needs["channels"] = channels.pop()
    deep = [look for look in looks if look.kind != np.uint8]
    if not deep:
        return needs
    low, high = min(look.low for look in deep), max(look.high for look in deep)
    if any(look.kind != np.uint16 for look in deep):
        needs["range"] = [low, high]
    elif min(look.high for look in deep) < 2**15:  # where read_image takes 0 to 65535 for wrong
        needs["range"] = [0, 2 ** max(8, int(high).bit_length()) - 1]
    return needs


def _look(path: Path) -> Look:
    with open_image(path) as image:
        channels = _channels(image)
        samples = stored_samples(image, colors=channels in (1, 3))
        finite = samples[np.isfinite(samples)]
        low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
        return Look(channels, samples.dtype, float(low), float(high))


def _channels(image: Image.Image) -> int:
    """Return the channels to read an image with: 1 for gray, 3 for colors, else its own bands.

    A fourth band is alpha, which is dropped, if most of it is opaque or transparent.
    """
    bands = len(image.getbands())
    if bands == 1 and image.format == "TIFF" and 1 < getattr(image, "n_frames", 1) <= MOST_CHANNELS:
        sizes = [frame.size for frame in ImageSequence.Iterator(image)]
        image.seek(0)
        return len(sizes) if len({*sizes}) == 1 else 1
    if bands <= 2:
        return 3 if image.mode in ("P", "PA") else 1
    if image.mode in ("RGBA", "RGBX"):
        last = np.asarray(image)[..., 3]
        return 4 if np.isin(last, (0, 255)).mean() < 0.5 else 3
    return 3
