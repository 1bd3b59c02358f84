"""What every source of images offers, and what it does about faulty ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from segkit.core.errors import DataError, quoted
from segkit.core.labels import IGNORE
from segkit.data.inputs import NO_TEXT
from segkit.data.memo import MEMO, on_threads

OnError = Literal["raise", "skip"]
"""On the first fault stop, or leave faulty images and annotations out and list them."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a data set: a whole sentence, and where it is for programs to read."""

    sentence: str
    file: str
    annotation: int | None = None


class Source(Protocol):
    """Images, with masks where they are labelled. Small, picklable, the same at every opening."""

    classes: tuple[str, ...]
    names: tuple[str, ...]
    labelled: bool
    faults: tuple[Fault, ...]

    def __len__(self) -> int: ...

    def path(self, i: int) -> Path:
        """The file of image ``i``."""

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of image ``i``, upright, without decoding it."""

    def image(self, i: int) -> Tensor:
        """Image ``i``: uint8 (3, H, W), RGB, upright."""

    def mask(self, i: int) -> Tensor:
        """Class indices of image ``i``: uint8 (H, W), :data:`IGNORE` where there is none."""

    def label_digest(self, i: int) -> str:
        """Of all that determines the mask of image ``i``; only asked where there are labels."""


def positions(source: Source, names: Sequence[str]) -> list[int]:
    """Where ``names`` stand in ``source``.

    Raises:
        DataError: One of them is not there.
    """
    place = {name: index for index, name in enumerate(source.names)}
    missing = [name for name in names if name not in place]
    if missing:
        raise DataError(
            f"the image {quoted(missing[0])} is not in the data any more ({len(missing)} in all "
            "are not); bring it back, or start a new run"
        )
    return [place[name] for name in names]


def background(source: Source) -> int | None:
    """The class that is no thing to label, if there is one: COCO's, or the first by its name."""
    return background_of(source.classes, getattr(source, "category_ids", None))


def background_of(classes: Sequence[str], category_ids: Mapping | None) -> int | None:
    """:func:`background` of a source that is not at hand.

    Args:
        classes: Class names.
        category_ids: Of a COCO file, whose categories are things; ``None`` for other sources.
    """
    return 0 if category_ids is not None or classes[0].casefold() == "background" else None


def check_classes(classes: Sequence[str], origin: str) -> tuple[str, ...]:
    """``classes``, when they can be the values of a mask.

    Raises:
        DataError: There are none or more than 255, or a name is empty, no text or there twice.
    """
    if not 1 <= len(classes) <= IGNORE:
        raise DataError(
            f"{origin} gives {len(classes)} classes; expected 1 to {IGNORE}, background included"
        )
    for name in classes:
        if not name.strip() or NO_TEXT.search(name) or classes.count(name) > 1:
            raise DataError(
                f"{origin}: the class name {name!a:.100} is empty, no text, or stands twice; "
                "rename it"
            )
    return tuple(classes)


def stop_or_go(faults: Sequence[Fault], on_error: OnError) -> None:
    """Raise the first fault, if there is one and ``on_error`` says so."""
    if faults and on_error == "raise":
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise DataError(faults[0].sentence + more)


def unreadable(source: Source) -> dict[int, Fault]:
    """Read every image and mask of ``source`` that is not known to be sound, on all cores.

    Returns:
        The fault of each image that has one, by its number.
    """

    def read(i: int) -> str | None:
        key = _content(source, i)
        if key is not None and MEMO.numbers(key) is not None:
            return None
        try:
            source.image(i)
            if source.labelled:
                source.mask(i)
        except DataError as error:
            return str(error)
        if key is not None:
            MEMO.keep(key, [])
        return None

    sentences = on_threads(read, range(len(source)), "reading images")
    return {
        i: Fault(sentence, file=source.names[i])
        for i, sentence in enumerate(sentences)
        if sentence is not None
    }


def _content(source: Source, i: int) -> str | None:
    """Digests of an image's file and label; ``None`` where one cannot be read."""
    try:
        labels = source.label_digest(i) if source.labelled else ""
        return f"{MEMO.digest(source.path(i))} {labels} sound"
    except (OSError, DataError):
        return None
