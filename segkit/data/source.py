"""Interface of all image sources, and their handling of faulty images."""

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
"""``"raise"`` stops at the first fault; ``"skip"`` leaves out faulty images and annotations."""


@dataclass(frozen=True)
class Fault:
    """A fault of a data set: a sentence for people, and its file and annotation for programs."""

    sentence: str
    file: str
    annotation: int | None = None


class Source(Protocol):
    """Images, with masks if they are labelled. Small, picklable, equal each time it is opened."""

    classes: tuple[str, ...]
    names: tuple[str, ...]
    labelled: bool
    faults: tuple[Fault, ...]

    def __len__(self) -> int: ...

    def path(self, i: int) -> Path:
        """Return the file of image ``i``."""

    def size(self, i: int) -> tuple[int, int]:
        """Return height and width of the upright image ``i``, without decoding it."""

    def image(self, i: int) -> Tensor:
        """Return image ``i``: uint8 (3, H, W), RGB, upright."""

    def mask(self, i: int) -> Tensor:
        """Return class indices of image ``i``: uint8 (H, W), :data:`IGNORE` where there is none."""

    def label_digest(self, i: int) -> str:
        """Return a digest of all that determines the mask of image ``i``. Labelled sources only."""


def positions(source: Source, names: Sequence[str]) -> list[int]:
    """Return the indices of ``names`` in ``source``.

    Raises:
        DataError: The source has no image of that name.
    """
    indices = {name: index for index, name in enumerate(source.names)}
    missing = [name for name in names if name not in indices]
    if missing:
        raise DataError(
            f"the image {quoted(missing[0])} is not in the data any more ({len(missing)} in all "
            "are not); bring it back, or start a new run"
        )
    return [indices[name] for name in names]


def background(source: Source) -> int | None:
    """Return the index of the background class, or ``None`` if there is none.

    It is 0 for COCO files, and for other sources if class 0 is named "background".
    """
    return background_of(source.classes, getattr(source, "category_ids", None))


def background_of(classes: Sequence[str], category_ids: Mapping | None) -> int | None:
    """Return :func:`background` of a source that is not open."""
    return 0 if category_ids is not None or classes[0].casefold() == "background" else None


def check_classes(classes: Sequence[str], origin: str) -> tuple[str, ...]:
    """Return ``classes`` as a tuple if they are valid class names.

    Raises:
        DataError: There are none or more than 255, or a name is empty, has control characters, or
            is duplicated.
    """
    if not 1 <= len(classes) <= IGNORE:
        raise DataError(
            f"{origin} gives {len(classes)} classes; expected 1 to {IGNORE}, background included"
        )
    for name in classes:
        if not name.strip():
            problem = "is empty"
        elif NO_TEXT.search(name):
            problem = "has control characters"
        elif classes.count(name) > 1:
            problem = f"is that of {classes.count(name)} classes"
        else:
            continue
        raise DataError(f"{origin}: the class name {name!a:.100} {problem}; rename it")
    return tuple(classes)


def usable(
    source: Source, faults: Sequence[Fault], on_error: OnError, nothing: str
) -> tuple[list[int], tuple[Fault, ...]]:
    """Return the indices of a source's usable images, and all faults.

    Args:
        source: The images without known faults. With ``"skip"``, all of them are read once.
        nothing: Beginning of the error message if no image is usable.

    Raises:
        DataError: There is a fault and ``on_error`` is ``"raise"``, or no image is usable.
    """
    if faults and on_error == "raise":
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise DataError(faults[0].sentence + more)
    broken = unreadable(source) if on_error == "skip" else {}
    together = (*faults, *broken.values())
    if len(broken) == len(source):
        first = f"; {together[0].sentence}" if together else ""
        raise DataError(f"{nothing}; expected at least one{first}")
    return [i for i in range(len(source)) if i not in broken], together


def unreadable(source: Source) -> dict[int, Fault]:
    """Read all images and masks of ``source``, except those known to be valid, on all cores.

    Returns:
        The fault of each faulty image by its index.
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
    """Return digests of an image's file and label, or ``None`` if one cannot be read."""
    try:
        labels = source.label_digest(i) if source.labelled else ""
        return f"{MEMO.digest(source.path(i))} {labels} sound{getattr(source, 'reading', '')}"
    except (OSError, DataError):
        return None


def size_advice(size: tuple[int, int], expected: tuple[int, int]) -> str:
    """Return what to do about a size (height, width) that is not the expected one."""
    if size == expected[::-1]:
        return "turn one of them; the EXIF data of a photograph may turn it"
    return "correct the one that is wrong"
