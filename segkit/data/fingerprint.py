"""The fingerprint of a data set, from which a training is planned."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from segkit.core.labels import Size


class Fingerprint(NamedTuple):
    """Properties of the training images.

    Attributes:
        images: Number of images.
        sizes: Height and width of each image that was read.
        classes: Class names.
        pixels: Pixels of each class in the images that were read.
        shown: Number of these images with each class.
        sides: Square roots of the objects' areas, in pixels.
        gray: True if the images have no color.
        mean: Of each band, such as R, G, B, in 0..1.
        std: Standard deviation of each band in 0..1.
        groups: Names of near-duplicates, at least two per group.
    """

    images: int
    sizes: Sequence[Size]
    classes: Sequence[str]
    pixels: Sequence[int]
    shown: Sequence[int]
    sides: Sequence[float]
    gray: bool
    mean: Sequence[float]
    std: Sequence[float]
    groups: Sequence[Sequence[str]] = ()

    @property
    def size(self) -> Size:
        """Median height and width."""
        height, width = np.median(np.array(self.sizes), 0).astype(int).tolist()
        return height, width

    @property
    def units(self) -> int:
        """Number of groups that folds must not divide; an image without duplicates is a group."""
        return self.images - sum(len(group) - 1 for group in self.groups)


def join(names: Sequence[str], pairs: Sequence[tuple[int, int]]) -> list[list[str]]:
    """Return groups of names that are connected by pairs of indices, without groups of one name."""
    numbers = np.arange(len(names))  # the number of each name's group
    for first, second in pairs:
        numbers[numbers == numbers[second]] = numbers[first]
    groups: dict[int, list[str]] = {}
    for number, name in zip(numbers.tolist(), names, strict=True):
        groups.setdefault(number, []).append(name)
    return [group for group in groups.values() if len(group) > 1]
