"""Near-duplicate images, also mirrored and rotated, by a perceptual hash."""

from typing import NamedTuple

import numpy as np

SIDE = 8  # low frequencies per direction
BLOCK = 1024  # images compared with all others at a time
MAX_DISTANCE = 12  # bits in which the hashes of near-duplicates may differ, of 63
MIN_CORRELATION = 0.95  # of the miniatures of near-duplicates

FLIPS = {"": (1, 1), "mirrored": (1, -1), "upside down": (-1, 1), "turned by 180°": (-1, -1)}
"""Steps through rows and columns that undo a flip; also the signs of odd frequencies."""


class Pair(NamedTuple):
    """Two near-duplicates: their indices, the flip of the second, the miniatures' correlation."""

    first: int
    second: int
    flip: str
    correlation: float


def near_duplicates(gray: np.ndarray) -> list[Pair]:
    """Return pairs of images of the same content, whatever their size, compression and exposure.

    The hash of an image is the signs of the 63 lowest frequencies of its cosine transform, without
    the mean (pHash, Zauner 2010, https://www.phash.org/docs/pubs/thesis_zauner.pdf, with zero in
    place of the median). Mirroring negates odd frequencies, so flips need no further transform.
    Images with similar hashes are compared by their miniatures; uniform images have no duplicates.

    Shape:
        gray: (N, side, side), miniatures of the images; side >= 8
    """
    side = gray.shape[1]
    angles = (2 * np.arange(side) + 1) * np.pi / (2 * side)
    basis = np.cos(np.arange(SIDE)[:, None] * angles)
    signs = np.where(basis @ gray @ basis.T > 0, 1, -1).astype(np.float32)
    hashes = signs.reshape(len(gray), -1)[:, 1:]
    centered = (gray - gray.mean((1, 2), keepdims=True)).astype(np.float32)
    norm = np.linalg.norm(centered, axis=(1, 2), keepdims=True)
    unit = centered / np.where(norm > 1e-3 * side, norm, np.inf)
    odd = np.arange(SIDE) % 2 == 1
    pairs: dict[tuple[int, int], Pair] = {}
    for flip, (down, across) in FLIPS.items():
        flip_signs = np.outer(np.where(odd, down, 1), np.where(odd, across, 1)).ravel()[1:]
        flipped = hashes * flip_signs.astype(np.float32)
        for start in range(0, len(gray), BLOCK):
            distances = (hashes.shape[1] - hashes[start : start + BLOCK] @ flipped.T) / 2
            for row, second in np.argwhere(distances <= MAX_DISTANCE).tolist():
                if (first := start + row) < second:
                    value = float((unit[first] * unit[second][::down, ::across]).sum())
                    known = pairs.get((first, second))
                    if value >= max(MIN_CORRELATION, known.correlation if known else 0):
                        pairs[first, second] = Pair(first, second, flip, round(value, 4))
    return sorted(pairs.values(), key=lambda pair: (-pair.correlation, pair.first, pair.second))
