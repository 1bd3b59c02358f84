"""What a survey of a data set finds: near-duplicates over its parts, labels that may be wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from segkit.core.config import Config
from segkit.data.folds import make_folds, read_groups
from segkit.data.source import IGNORE, Source, background
from segkit.report.duplicates import FLIPS, Pair, near_duplicates
from segkit.report.survey import Item, Photo, Suspect

DIFFER = 0.5
"""Near-duplicates are labelled differently if more than this share of their labels differs."""

KINDS = {
    "differs": "Labelled differently from a near-duplicate",
    "overlap": "Lies where an object of another class does",
    "repeated": "Labelled twice",
    "off-frame": "Reaches out of the image",
    "tiny": "Tiny",
    "unlabelled": "Nothing is labelled",
}


class Part:
    """A part of a configuration's data, read once.

    Args:
        title: ``train``, ``val`` or ``test``.
        source: Its images.
        photos: What :func:`segkit.report.survey.survey` found in them.
    """

    def __init__(self, title: str, source: Source, photos: Sequence[Photo]) -> None:
        self.title, self.source, self.photos = title, source, photos

    @cached_property
    def pixels(self) -> np.ndarray:
        """Pixels of each class in each image, (N, num_classes)."""
        return np.stack([photo.pixels for photo in self.photos])

    def objects(self, c: int) -> Iterator[tuple[int, Item]]:
        """Objects of class ``c`` and the image that each is in."""
        for i, photo in enumerate(self.photos):
            yield from ((i, item) for item in photo.items if item.class_index == c)


@dataclass(frozen=True)
class Findings:
    """Near-duplicates and doubtful labels.

    Args:
        names: Of the images of all parts, one after the other.
        places: Where the split puts each: ``fold 0``, ``selection``, ``test``, ...
        pairs: Near-duplicates, by the places of their images in ``names``.
        suspects: Doubtful labels by their kind, each with its image.
    """

    names: list[str]
    places: list[str]
    pairs: list[Pair]
    suspects: dict[str, list[tuple[int, Suspect]]]

    def divided(self, pair: Pair) -> bool:
        """Whether the split puts a pair into different parts, where it flatters scores."""
        return self.places[pair.first] != self.places[pair.second]

    def lines(self) -> Iterator[dict[str, Any]]:
        """All findings as plain values."""
        for pair in self.pairs:
            two = (pair.first, pair.second)
            yield {
                "kind": "near-duplicate",
                "images": [self.names[i] for i in two],
                "places": [self.places[i] for i in two],
                "flip": pair.flip,
                "likeness": pair.likeness,
            }
        for found in self.suspects.values():
            for i, suspect in found:
                yield {**suspect._asdict(), "image": self.names[i]}


def findings(cfg: Config, parts: Sequence[Part]) -> Findings:
    """Look for near-duplicates in all parts, and for doubtful labels in the first.

    Args:
        cfg: Its ``data`` and seed decide the folds.
        parts: The first one is the one to train on.
    """
    pairs = near_duplicates(np.stack([photo.gray for part in parts for photo in part.photos]))
    return Findings(
        names=[photo.name for part in parts for photo in part.photos],
        places=_places(cfg, parts),
        pairs=pairs,
        suspects=_suspects(parts[0], pairs),
    )


def _places(cfg: Config, parts: Sequence[Part]) -> list[str]:
    """Where the split puts each image of all parts, one after the other."""
    train = parts[0]
    names = train.source.names
    places = dict.fromkeys(names, train.title)
    if cfg.data.val is None:
        split = make_folds(
            names,
            train.pixels,
            folds=cfg.data.folds,
            selection=cfg.data.selection,
            seed=cfg.train.seed,
            groups=read_groups(cfg.data.groups, cfg.data.group_pattern, names),
        )
        places |= dict.fromkeys(split.selection, "selection")
        for number, fold in enumerate(split.folds):
            places |= dict.fromkeys(fold, f"fold {number}")
    rest = [part.title for part in parts[1:] for _ in part.photos]
    return [*(places[name] for name in names), *rest]


def _suspects(part: Part, pairs: Sequence[Pair]) -> dict[str, list[tuple[int, Suspect]]]:
    """Doubtful labels by their kind, each with its image."""
    found: dict[str, list[tuple[int, Suspect]]] = {kind: [] for kind in KINDS}
    for pair in pairs:
        if max(pair.first, pair.second) < len(part.photos):
            one, other = part.photos[pair.first], part.photos[pair.second]
            differing = _difference(one.grid, other.grid, pair.flip, background(part.source))
            if differing > DIFFER:
                height, width = one.size
                reason = f"{100 * differing:.0f} % of the labels differ from {other.name}"
                suspect = Suspect("differs", reason, (0, 0, width, height))
                found["differs"].append((pair.first, suspect))
    for i, photo in enumerate(part.photos):
        for suspect in photo.suspects:
            found[suspect.kind].append((i, suspect))
    return found


def _difference(one: np.ndarray, other: np.ndarray, flip: str, ground: int | None) -> float:
    """Share of places labelled in either of two masks at which they differ."""
    down, across = FLIPS[flip]
    other = other[::down, ::across]
    known = (one != IGNORE) & (other != IGNORE)
    labelled = known & ((one != ground) | (other != ground))
    return float((one != other)[labelled].mean()) if labelled.sum() > 4 else 0.0
