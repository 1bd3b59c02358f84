"""One pass over labelled photographs: what each image holds, in a few kilobytes."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask
from torch.nn import functional

from segkit.core import distributed
from segkit.data.coco import CocoSource, Region, encode
from segkit.data.source import IGNORE, Source, background

SIDE = 32
"""Rows and columns of the miniature kept of every image and every mask."""

TINY_PIXELS, TINY_SHARE = 16, 2e-5
"""An object smaller than either is suspicious."""

OFF_FRAME = 0.02
"""An outline may leave the image by this share of its longer side."""

SAME_PLACE = 0.7
"""Two objects whose intersection over union is above this are one, labelled twice."""


class Item(NamedTuple):
    """An object; where labels are masks, a connected area of one class.

    ``box`` is left, top, right, bottom in pixels, the last two exclusive.
    """

    class_index: int
    area: int
    box: tuple[int, int, int, int]
    annotation: int | None = None


class Suspect(NamedTuple):
    """A label that may be wrong: the kind of fault, a sentence's end, and where it is."""

    kind: str
    reason: str
    box: tuple[int, int, int, int]
    annotation: int | None = None


class Photo(NamedTuple):
    """What is kept of an image; of an unlabelled one ``pixels`` and ``grid`` are empty.

    Shape:
        histogram: (3, 256) pixels of each value of R, G, B
        gray: (SIDE, SIDE) of 0..255
        pixels: (num_classes,)
        grid: (SIDE, SIDE) mask values
    """

    name: str
    size: tuple[int, int]
    histogram: np.ndarray
    gray: np.ndarray
    pixels: np.ndarray
    grid: np.ndarray
    items: tuple[Item, ...]
    suspects: tuple[Suspect, ...]


def survey(source: Source, description: str) -> list[Photo]:
    """Read every image and mask of ``source`` once, on all cores."""

    def read(i: int) -> Photo:
        return look(source, i)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        photos = pool.map(read, range(len(source)))
        return list(distributed.Progress(photos, description, total=len(source), unit="image"))


def look(source: Source, i: int) -> Photo:
    """Image ``i`` and its labels."""
    image = source.image(i)
    height, width = image.shape[1:]
    histogram = np.stack([np.bincount(c, minlength=256) for c in image.flatten(1).numpy()])
    gray = functional.adaptive_avg_pool2d(image.float().mean(0, keepdim=True), SIDE)[0].numpy()
    pixels, grid = np.zeros(0, np.int64), np.zeros((0, 0), np.uint8)
    items: tuple[Item, ...] = ()
    suspects: list[Suspect] = []
    if source.labelled:
        mask, ground = source.mask(i).numpy(), background(source)
        counts = np.bincount(mask.ravel(), minlength=256)
        pixels = counts[: len(source.classes)]
        middle = (np.arange(SIDE) + 0.5) / SIDE
        grid = mask[np.ix_((middle * height).astype(int), (middle * width).astype(int))]
        if isinstance(source, CocoSource):
            regions = [r for r in source.regions(i) if not r.crowd and r.class_index != ground]
            encoded = [encode(region.shape, height, width) for region in regions]
            items = tuple(_item(region, rle) for region, rle in zip(regions, encoded, strict=True))
            suspects += off_frame(regions, items, (height, width))
            suspects += labelled_twice(items, encoded, source.classes)
        else:
            items = tuple(item for item in areas(mask) if item.class_index != ground)
        suspects += tiny(items, height * width)
        if pixels.sum() - (0 if ground is None else pixels[ground]) == 0:
            suspects.append(Suspect("unlabelled", "nothing is labelled", (0, 0, width, height)))
    return Photo(
        source.names[i], (height, width), histogram, gray, pixels, grid, items, tuple(suspects)
    )


def _item(region: Region, rle: dict) -> Item:
    left, top, width, height = coco_mask.toBbox(rle).astype(int).tolist()
    box = (left, top, left + width, top + height)
    return Item(region.class_index, int(coco_mask.area(rle)), box, region.id)


def tiny(items: Iterable[Item], image_area: int) -> Iterator[Suspect]:
    """Objects of a few pixels: a slip of the mouse, or too small to learn from."""
    for item in items:
        if item.area < max(TINY_PIXELS, TINY_SHARE * image_area):
            yield Suspect("tiny", f"covers {item.area} pixels", item.box, item.annotation)


def off_frame(
    regions: Iterable[Region], items: Iterable[Item], size: tuple[int, int]
) -> Iterator[Suspect]:
    """Polygons that reach far out of the image: labelled on another size, or shifted."""
    height, width = size
    for region, item in zip(regions, items, strict=True):
        if isinstance(region.shape, dict):
            continue  # an RLE cannot leave its image
        corners = np.concatenate([polygon.reshape(-1, 2) for polygon in region.shape])
        beyond = max(float((corners - (width, height)).max()), float(-corners.min()))
        if beyond > OFF_FRAME * max(size):
            reason = f"reaches {beyond:.0f} pixels out of the image"
            yield Suspect("off-frame", reason, item.box, item.annotation)


def labelled_twice(
    items: tuple[Item, ...], encoded: list[dict], classes: tuple[str, ...]
) -> Iterator[Suspect]:
    """Objects in the same place as another one, of another class or of the same."""
    if len(items) < 2:
        return
    overlap = coco_mask.iou(encoded, encoded, [0] * len(encoded))
    for a, b in np.argwhere(np.triu(overlap > SAME_PLACE, 1)).tolist():
        one, other = items[a], items[b]
        kind = "repeated" if one.class_index == other.class_index else "overlap"
        reason = (
            f"lies where annotation {other.annotation}, {classes[other.class_index]}, does "
            f"(IoU {overlap[a, b]:.2f})"
        )
        yield Suspect(kind, reason, one.box, one.annotation)


def areas(mask: np.ndarray) -> list[Item]:
    """The connected areas of each class, ignored pixels left out; diagonals do not connect."""
    width = mask.shape[1]
    starts = np.ones(mask.shape, bool)  # of runs: equal values side by side
    starts[:, 1:] = mask[:, 1:] != mask[:, :-1]
    run = starts.cumsum().reshape(mask.shape) - 1
    first = np.flatnonzero(starts)
    length = np.diff(first, append=mask.size)
    below = mask[1:] == mask[:-1]
    pairs = np.unique(run[:-1][below] * len(first) + run[1:][below])
    upper, lower = np.divmod(pairs, len(first))
    label = np.arange(len(first))
    while (label[upper] != label[lower]).any():
        a, b = label[upper], label[lower]
        np.minimum.at(label, a, b)
        np.minimum.at(label, b, a)
        while (label != label[label]).any():
            label = label[label]
    roots, owner = np.unique(label, return_inverse=True)
    area = np.bincount(owner, length).astype(int)
    row, column = np.divmod(first, width)
    edges = []
    for ends in (column, row):
        edges.append(np.full(len(roots), mask.size))
        np.minimum.at(edges[-1], owner, ends)
    for ends in (column + length, row + 1):
        edges.append(np.zeros(len(roots), int))
        np.maximum.at(edges[-1], owner, ends)
    values = mask.ravel()[first[roots]]
    boxes = np.stack(edges, 1).tolist()
    return [
        Item(int(values[k]), int(area[k]), tuple(boxes[k]))
        for k in np.flatnonzero(values != IGNORE)
    ]
