"""Doubts about labels: classes without pixels, images without labels, parts without a class."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from segkit.core.errors import quoted
from segkit.data.folds import Split
from segkit.data.loader import digests
from segkit.data.source import Source, background, positions


def describe(source: Source) -> str:
    """Return what is read from a source, and what is passed over, in one line."""
    origin = getattr(source, "origin", None)
    line = f"{counted(len(source), 'image')}, {counted(len(source.classes), 'class', 'classes')}"
    if origin:
        line += f" from {origin}"
    return "; ".join([line, *getattr(source, "notes", ())])


def label_doubts(source: Source, pixels: np.ndarray) -> list[str]:
    """Return a sentence for each thing about the labels that is probably not meant.

    ``pixels`` is the result of :func:`segkit.data.folds.class_pixels`.
    """
    totals, ground = pixels.sum(0), background(source)
    sentences = []
    for c in np.flatnonzero(totals == 0).tolist():
        if c == ground and getattr(source, "category_ids", None) is not None:
            continue  # objects may cover whole images
        why: Any = getattr(source, "why_empty", None)
        cause = why(c) if why else "label it, or remove the class"
        sentences.append(f"no pixel of the class {quoted(source.classes[c])} is labelled: {cause}")
    shown = np.flatnonzero(totals)
    if len(shown) == 1 and len(source):
        sentences.append(
            f"every labelled pixel is {quoted(source.classes[shown[0]])}, so a model can learn to "
            "predict that everywhere, and nothing else"
        )
    of_objects = np.delete(pixels, ground, axis=1) if ground is not None else pixels
    empty = np.flatnonzero(of_objects.sum(1) == 0)
    if len(empty):
        sentences.append(
            f"{len(empty):,} of {counted(len(source), 'image')} have no labelled "
            f"{'pixel' if ground is None else 'object'}, such as {source.names[empty[0]]}: right "
            "if there is none; else label or remove them"
        )
    return sentences


def split_doubts(
    split: Split, names: Sequence[str], pixels: np.ndarray, classes: Sequence[str]
) -> list[str]:
    """Return a sentence for each class that a part of the split lacks, though the data have it.

    ``pixels`` is the result of :func:`segkit.data.folds.class_pixels`, in the order of ``names``.
    """
    index = {name: i for i, name in enumerate(names)}

    def has(members: Sequence[str], c: int) -> bool:
        return bool(pixels[[index[name] for name in members], c].any())

    sentences = []
    for c in np.flatnonzero(pixels.any(0)).tolist():
        lacking = [
            *_numbered("validation", [has(fold, c) for fold in split.folds]),
            *_numbered("training", [has(split.training(k), c) for k in range(len(split.folds))]),
        ]
        if split.selection and not has(split.selection, c):
            lacking.append("the selection set")
        if lacking:
            images = int((pixels[:, c] > 0).sum())
            sentences.append(
                f"the class {quoted(classes[c])} is in {counted(images, 'image')} only, and not in "
                f"{', '.join(lacking)}: scores there leave it out; label more images, or lower "
                "data.folds"
            )
    return sentences


def file_doubts(parts: Mapping[str, tuple[Source, Sequence[str]]]) -> list[str]:
    """Return a sentence if image files of different parts are equal.

    ``parts`` has the source and the image names of each part.
    """
    known: dict[str, tuple[str, str]] = {}
    repeated = []
    for part, (source, names) in parts.items():
        for name, digest in zip(names, digests(source, positions(source, names)), strict=True):
            first, like = known.setdefault(digest, (part, name))
            if first != part:
                repeated.append(f"{name} of {part} and {like} of {first}")
    if not repeated:
        return []
    return [
        f"{counted(len(repeated), 'image')} of one part are equal files in another, such as "
        f"{repeated[0]}: scores are too high; remove them, or keep them together by data.groups"
    ]


def _numbered(part: str, present: Sequence[bool]) -> Iterator[str]:
    """Yield the folds whose part lacks a class, as one phrase."""
    missing = [str(number) for number, is_present in enumerate(present) if not is_present]
    if missing:
        yield f"the {part} part of fold{'s' if missing[1:] else ''} {', '.join(missing)}"


def seen(source: Source, pixels: np.ndarray) -> str:
    """Return what training would see, in one line."""
    labelled = max(1, int(pixels.sum()))
    every = sum(height * width for height, width in map(source.size, range(len(source))))
    order = np.argsort(-pixels.sum(0), kind="stable").tolist()
    most = [f"{source.classes[c]} {100 * pixels[:, c].sum() / labelled:.3g} %" for c in order[:8]]
    more = f", and {len(order) - 8} more" if order[8:] else ""
    return (
        f"{counted(len(source), 'image')} with {', '.join(most)}{more} of the labelled pixels; "
        f"{100 * (1 - pixels.sum() / max(1, every)):.3g} % of all pixels are ignored"
    )


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number and its noun."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
