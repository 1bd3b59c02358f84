"""Statistics of a data set, its near-duplicates and its suspicious labels; images are read once."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional

from segkit.core.config import Config
from segkit.data.areas import Box, Instance, connected_areas
from segkit.data.coco import CocoSource, Region, encode
from segkit.data.folds import make_folds, read_groups
from segkit.data.memo import on_threads
from segkit.data.source import IGNORE, Source, background
from segkit.report.duplicates import FLIPS, Pair, near_duplicates

MOST_READ = 1000  # images of a part that are compared, or read for a plan
SIDE = 32  # rows and columns of the miniatures of images and masks
TINY_PIXELS, TINY_SHARE = 16, 2e-5  # an object of a smaller area is suspicious
OFF_FRAME = 0.02  # share of the image's longer side that a polygon may reach out of the image
SAME_PLACE = 0.7  # intersection over union above which two objects may be the same
DIFFERENT = 0.5  # share of labels in which near-duplicates may differ

KINDS = {
    "differs": "Labelled differently from a near-duplicate",
    "overlap": "In the place of an object of another class",
    "repeated": "Labelled twice",
    "off-frame": "Reaches out of the image",
    "tiny": "Tiny",
    "unlabelled": "Nothing is labelled",
}
"""Kinds of suspicious labels."""


class Suspect(NamedTuple):
    """A label that may be wrong."""

    kind: str
    reason: str
    box: Box
    annotation: int | None = None


class Photo(NamedTuple):
    """Statistics of an image; ``pixels`` and ``grid`` are empty if it has no labels.

    Shape:
        histogram: (C, 256), pixels of each value of each band, such as R, G, B
        gray: (SIDE, SIDE), 0 to 255
        pixels: (num_classes,), pixels of each class
        grid: (SIDE, SIDE), mask values
    """

    name: str
    size: tuple[int, int]
    histogram: np.ndarray
    gray: np.ndarray
    pixels: np.ndarray = np.zeros(0, np.int64)
    grid: np.ndarray = np.zeros((0, 0), np.uint8)
    instances: Sequence[Instance] = ()
    suspects: Sequence[Suspect] = ()


class Part:
    """A part of the data, ``train``, ``val`` or ``test``, whose images are read on all cores.

    Shape:
        pixels: (N, num_classes), pixels of each class in each image
        histogram: (C, 256), pixels of each value of each band
    """

    def __init__(self, title: str, source: Source) -> None:
        self.title, self.source = title, source
        read, indices = partial(read_photo, source), range(len(source))
        self.photos: list[Photo] = on_threads(read, indices, f"reading {title}")
        self.pixels = np.array([photo.pixels for photo in self.photos])
        self.histogram = np.sum([photo.histogram for photo in self.photos], 0)

    def objects(self, c: int) -> list[tuple[int, Instance]]:
        """Return the objects of class ``c``, each with the index of its image."""
        objects = ((i, x) for i, photo in enumerate(self.photos) for x in photo.instances)
        return [(i, instance) for i, instance in objects if instance.class_index == c]


def color_statistics(histogram: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each band in 0..1, from the pixels of each value."""
    levels = np.arange(256) / 255
    shares = histogram / histogram.sum(1, keepdims=True)
    mean = shares @ levels
    std = np.sqrt(shares @ levels**2 - mean**2)
    return mean.round(4).tolist(), std.round(4).tolist()


def read_photo(source: Source, i: int) -> Photo:
    """Return the statistics of image ``i``."""
    image = source.image(i)
    histogram = np.stack([np.bincount(c, minlength=256) for c in image.flatten(1).numpy()])
    size = image.shape[1], image.shape[2]
    photo = Photo(source.names[i], size, histogram, miniature(image))
    if not source.labelled:
        return photo
    mask, ground = source.mask(i), background(source)
    pixels = np.bincount(mask.numpy().ravel(), minlength=256)[: len(source.classes)]
    grid = functional.interpolate(mask[None, None], (SIDE, SIDE), mode="nearest-exact")[0, 0]
    instances, suspects = read_instances(source, i, mask)
    if pixels.sum() - (0 if ground is None else pixels[ground]) == 0:
        box = (0, 0, mask.shape[1], mask.shape[0])
        suspects.append(Suspect("unlabelled", "nothing is labelled", box))
    return photo._replace(pixels=pixels, grid=grid.numpy(), instances=instances, suspects=suspects)


def miniature(image: Tensor) -> np.ndarray:
    """Return the mean of an image's bands, (SIDE, SIDE)."""
    return functional.adaptive_avg_pool2d(image.float().mean(0, keepdim=True), SIDE)[0].numpy()


def evenly_spaced(source: Source) -> range:
    """Return the indices of :data:`MOST_READ` images or fewer."""
    return range(0, len(source), max(1, -(-len(source) // MOST_READ)))


def shared_images(parts: Mapping[str, Source], miniatures: Sequence[np.ndarray] = ()) -> list[str]:
    """Return a sentence for each two parts of the data that have near-duplicates of each other.

    Args:
        parts: The sources by the name of their part; their :func:`evenly_spaced` images are read.
        miniatures: Those of the first part's images, if they are known.
    """
    chosen = [(part, i) for part, source in parts.items() for i in evenly_spaced(source)]

    def read(place: int) -> np.ndarray:
        part, i = chosen[place]
        return miniature(parts[part].image(i))

    rest = on_threads(read, range(len(miniatures), len(chosen)), "comparing parts")
    between: dict[tuple[str, str], dict[str, str]] = {}
    for pair in near_duplicates(np.stack([*miniatures, *rest])):
        (first, i), (second, j) = chosen[pair.first], chosen[pair.second]
        if first != second:
            known = between.setdefault((first, second), {})
            known.setdefault(parts[second].names[j], parts[first].names[i])
    return [
        f"{len(images):,} images of {second} are near-duplicates of images of {first}, such as "
        f"{name} of {like}: scores on them are too high; move them into one part"
        for (first, second), images in between.items()
        for name, like in list(images.items())[:1]
    ]


def read_instances(source: Source, i: int, mask: Tensor) -> tuple[list[Instance], list[Suspect]]:
    """Return the objects of image ``i``, without the background, and those that are suspicious."""
    (height, width), ground = mask.shape, background(source)
    suspects: list[Suspect] = []
    if isinstance(source, CocoSource):
        others = (ground, IGNORE)
        regions = [r for r in source.regions(i) if not r.crowd and r.class_index not in others]
        encoded = [encode(region.shape, height, width) for region in regions]
        instances = []
        for region, rle in zip(regions, encoded, strict=True):
            x, y, w, h = coco_mask.toBbox(rle).astype(int).tolist()
            area, box = int(coco_mask.area(rle)), (x, y, x + w, y + h)
            instances.append(Instance(region.class_index, area, box, region.id))
        suspects += _off_frame(regions, instances, (height, width))
        suspects += _duplicated(instances, encoded, source.classes)
    else:
        instances = [x for x in connected_areas(mask.numpy()) if x.class_index != ground]
    smallest = max(TINY_PIXELS, TINY_SHARE * height * width)
    for _, area, box, annotation in instances:
        if area < smallest:
            suspects.append(Suspect("tiny", f"covers {area} pixels", box, annotation))
    return instances, suspects


def _off_frame(
    regions: Sequence[Region], instances: Sequence[Instance], size: tuple[int, int]
) -> Iterator[Suspect]:
    """Yield polygons that reach far out of the image: drawn for another size, or shifted."""
    for region, instance in zip(regions, instances, strict=True):
        if isinstance(region.shape, dict):
            continue  # an RLE cannot leave its image
        corners = np.concatenate([polygon.reshape(-1, 2) for polygon in region.shape])
        beyond = max(float((corners - size[::-1]).max()), float(-corners.min()))
        if beyond > OFF_FRAME * max(size):
            reason = f"reaches {beyond:.0f} pixels out of the image"
            yield Suspect("off-frame", reason, instance.box, instance.annotation)


def _duplicated(
    instances: Sequence[Instance], encoded: list[dict[str, Any]], classes: Sequence[str]
) -> Iterator[Suspect]:
    """Yield objects in the place of another object, of the same class or of another."""
    if len(instances) < 2:
        return
    overlap = coco_mask.iou(encoded, encoded, [0] * len(encoded))
    for a, b in np.argwhere(np.triu(overlap > SAME_PLACE, 1)).tolist():
        first, second = instances[a], instances[b]
        kind = "repeated" if first.class_index == second.class_index else "overlap"
        other = f"annotation {second.annotation}, {classes[second.class_index]}"
        reason = f"lies where {other}, does (IoU {overlap[a, b]:.2f})"
        yield Suspect(kind, reason, first.box, first.annotation)


class Findings(NamedTuple):
    """Near-duplicates and suspicious labels, with indices of images in ``names``."""

    names: list[str]  # of the images of all parts
    places: list[str]  # of the images in the split: fold 0, selection, test, ...
    pairs: list[Pair]
    suspects: list[tuple[int, Suspect]]

    def separated(self, pair: Pair) -> bool:
        """Return whether the split separates a pair, which makes scores too high."""
        return self.places[pair.first] != self.places[pair.second]

    def to_json(self) -> Iterator[dict[str, Any]]:
        """Yield each finding as JSON values."""
        for pair in self.pairs:
            images, places = ([of[i] for i in pair[:2]] for of in (self.names, self.places))
            finding = {"kind": "near-duplicate", "images": images, "places": places}
            yield {**finding, "flip": pair.flip, "likeness": pair.correlation}
        for i, suspect in self.suspects:
            yield {**suspect._asdict(), "image": self.names[i]}


def find_problems(cfg: Config, parts: Sequence[Part]) -> Findings:
    """Find near-duplicates in all parts, and suspicious labels in the first, which is trained on.

    The configuration's ``data`` and seed determine the folds.
    """
    train = parts[0]
    photos = [photo for part in parts for photo in part.photos]
    pairs = near_duplicates(np.stack([photo.gray for photo in photos]))
    suspects = [(i, suspect) for i, photo in enumerate(train.photos) for suspect in photo.suspects]
    for pair in pairs:
        first, second = photos[pair.first], photos[pair.second]
        if pair.second < len(train.photos):
            share = _difference(first.grid, second.grid, pair.flip, background(train.source))
            if share > DIFFERENT:
                reason = f"{100 * share:.0f} % of the labels differ from {second.name}"
                suspects.append((pair.first, Suspect("differs", reason, (0, 0, *first.size[::-1]))))
    suspects.sort(key=lambda entry: list(KINDS).index(entry[1].kind))
    return Findings([photo.name for photo in photos], _places(cfg, parts), pairs, suspects)


def _difference(a: np.ndarray, b: np.ndarray, flip: str, ground: int | None) -> float:
    """Return the share of the points labelled in either of two miniatures at which they differ."""
    down, across = FLIPS[flip]
    b = b[::down, ::across]
    labelled = (a != IGNORE) & (b != IGNORE) & ((a != ground) | (b != ground))
    return float((a != b)[labelled].mean()) if labelled.sum() > 4 else 0.0


def _places(cfg: Config, parts: Sequence[Part]) -> list[str]:
    """Return the place of each image of all parts in the split."""
    data, names = cfg.data, parts[0].source.names
    places = dict.fromkeys(names, parts[0].title)
    if data.val is None:
        split = make_folds(
            names, parts[0].pixels, folds=data.folds, selection=data.selection, seed=cfg.train.seed,
            groups=read_groups(data.groups, data.group_pattern, names), stratify=data.stratify,
        )  # fmt: skip
        places |= dict.fromkeys(split.selection, "selection")
        for number, fold in enumerate(split.folds):
            places |= dict.fromkeys(fold, f"fold {number}")
    return [*places.values(), *(part.title for part in parts[1:] for _ in part.photos)]
