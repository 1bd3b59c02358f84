"""Near-duplicate images by a perceptual hash, mirrored and turned ones too."""

from typing import NamedTuple

import numpy as np

SIDE = 8  # of the block of low frequencies
BLOCK = 1024  # images compared with all others at a time

FLIPS = {"": (1, 1), "mirrored": (1, -1), "upside down": (-1, 1), "turned by 180°": (-1, -1)}
"""How the second image lies, and the sign of odd frequencies down and across."""


class Pair(NamedTuple):
    """Two images that show the same; ``likeness`` is the correlation of their miniatures."""

    first: int
    second: int
    flip: str
    distance: int
    likeness: float


def near_duplicates(gray: np.ndarray, *, distance: int = 12, likeness: float = 0.95) -> list[Pair]:
    """Pairs of images that show the same, whatever their size, compression and exposure.

    The hash of an image is the signs of the 63 lowest frequencies of its cosine transform, without
    the mean (as pHash does, Zauner 2010, https://www.phash.org/docs/pubs/thesis_zauner.pdf, with
    zero for the median). Mirroring negates the odd frequencies, so it costs no further transform.
    Pairs of like hashes are then compared by their miniatures.

    Args:
        gray: Miniatures of the images.
        distance: Most bits of 63 that the hashes differ in.
        likeness: Least correlation of the miniatures. A blank image is like no other.

    Shape:
        gray: (N, side, side), side of 8 at least
    """
    side = gray.shape[1]
    across = (2 * np.arange(side) + 1) * np.pi / (2 * side)
    basis = np.cos(np.arange(SIDE)[:, None] * across)
    signs = np.where(basis @ gray @ basis.T > 0, 1, -1).astype(np.float32)
    centered = gray.reshape(len(gray), -1).astype(np.float32)
    centered = centered - centered.mean(1, keepdims=True)
    norm = np.linalg.norm(centered, axis=1, keepdims=True)
    unit = (centered / np.where(norm > 1e-3 * side, norm, np.inf)).reshape(gray.shape)
    found: dict[tuple[int, int], Pair] = {}
    odd = np.arange(SIDE) % 2 == 1
    for flip, (down, over) in FLIPS.items():
        turn = np.outer(np.where(odd, down, 1), np.where(odd, over, 1)).astype(np.float32)
        bits = _bits(signs)
        turned = _bits(signs * turn)
        for start in range(0, len(gray), BLOCK):
            differ = (bits.shape[1] - bits[start : start + BLOCK] @ turned.T) / 2
            for a, b in np.argwhere(differ <= distance).tolist():
                first, second = start + a, b
                if first >= second:
                    continue
                like = float((unit[first] * unit[second][::down, ::over]).sum())
                pair = Pair(first, second, flip, int(differ[a, b]), round(like, 4))
                known = found.get((first, second))
                if like >= likeness and (known is None or like > known.likeness):
                    found[first, second] = pair
    return sorted(found.values(), key=lambda pair: (-pair.likeness, pair.first, pair.second))


def _bits(signs: np.ndarray) -> np.ndarray:
    return signs.reshape(len(signs), -1)[:, 1:]
