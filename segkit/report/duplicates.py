"""Near-duplicate images, also mirrored and rotated, by a perceptual hash."""

from typing import NamedTuple

import numpy as np

SIDE = 8  # low frequencies per direction
BLOCK = 1024  # images compared with all others at a time

FLIPS = {"": (1, 1), "mirrored": (1, -1), "upside down": (-1, 1), "turned by 180°": (-1, -1)}
"""Steps through rows and columns that undo a flip; also the signs of odd frequencies."""


class Pair(NamedTuple):
    """Two near-duplicates: their indices, the flip of the second, the miniatures' correlation."""

    first: int
    second: int
    flip: str
    correlation: float


def near_duplicates(
    gray: np.ndarray, *, distance: int = 12, correlation: float = 0.95
) -> list[Pair]:
    """Return pairs of images of the same content, whatever their size, compression and exposure.

    The hash of an image is the signs of the 63 lowest frequencies of its cosine transform, without
    the mean (pHash, Zauner 2010, https://www.phash.org/docs/pubs/thesis_zauner.pdf, with zero in
    place of the median). Mirroring negates odd frequencies, so flips need no further transform.
    The miniatures of images with similar hashes are then compared.

    Args:
        gray: Miniatures of the images.
        distance: Largest number of bits in which the hashes may differ.
        correlation: Smallest correlation of the miniatures. A uniform image has no duplicates.

    Shape:
        gray: (N, side, side), side >= 8
    """
    side = gray.shape[1]
    angles = (2 * np.arange(side) + 1) * np.pi / (2 * side)
    basis = np.cos(np.arange(SIDE)[:, None] * angles)
    signs = np.where(basis @ gray @ basis.T > 0, 1, -1).astype(np.float32)
    hashes = signs.reshape(len(gray), -1)[:, 1:]
    centered = (gray - gray.mean((1, 2), keepdims=True)).astype(np.float32)
    norm = np.linalg.norm(centered, axis=(1, 2), keepdims=True)
    unit = centered / np.where(norm > 1e-3 * side, norm, np.inf)
    pairs: dict[tuple[int, int], Pair] = {}
    odd = np.arange(SIDE) % 2 == 1
    for flip, (down, across) in FLIPS.items():
        flip_signs = np.outer(np.where(odd, down, 1), np.where(odd, across, 1)).ravel()[1:]
        flipped = hashes * flip_signs.astype(np.float32)
        for start in range(0, len(gray), BLOCK):
            differing = (hashes.shape[1] - hashes[start : start + BLOCK] @ flipped.T) / 2
            for row, second in np.argwhere(differing <= distance).tolist():
                first = start + row
                if first >= second:
                    continue
                value = float((unit[first] * unit[second][::down, ::across]).sum())
                pair = Pair(first, second, flip, round(value, 4))
                known = pairs.get((first, second))
                if value >= correlation and (known is None or value > known.correlation):
                    pairs[first, second] = pair
    return sorted(pairs.values(), key=lambda pair: (-pair.correlation, pair.first, pair.second))
