"""Source of a folder of images and a folder of PNG masks with class indices."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from segkit.core.errors import ConfigError, DataError, quoted, reason
from segkit.core.labels import IGNORE
from segkit.data.images import SUFFIXES, image_size, open_image, read_image
from segkit.data.inputs import check_name, inside, read_text
from segkit.data.memo import MEMO
from segkit.data.source import Fault, OnError, check_classes, usable


class MaskSource:
    """Images, each with a PNG mask whose pixel values are class indices (CamVid, Pascal, ADE).

    The mask of ``images/a/b.jpg`` is ``masks/a/b.png``, 8 bits or fewer, gray or palette. Images
    are in the order of the split list, or sorted by name.

    Args:
        images: Folder of images, searched recursively.
        masks: Folder of masks; without it, the source is unlabelled.
        split: Text file with one file name per line, with or without the suffix.
        classes: Class names in the order of their values, or a text file with one per line.
        ignore_index: Mask value that means "no class"; it becomes :data:`IGNORE`. If it is the
            index of the last name ("void"), that name is removed from the classes.
        image_suffixes: Suffixes of image files.
        on_error: ``"skip"`` reads every image once, and leaves out faulty images; ``faults`` lists
            them.

    Raises:
        DataError: There are no images, class names are invalid, or there is a fault and
            ``on_error`` is ``"raise"``. ``mask`` raises it for a value that is not a class.
    """

    def __init__(
        self,
        *,
        images: str,
        masks: str | None = None,
        split: str | None = None,
        classes: str | tuple[str, ...],
        ignore_index: int | None = None,
        image_suffixes: tuple[str, ...] = SUFFIXES,
        on_error: OnError = "raise",
    ) -> None:
        self._images = Path(images)
        self._masks = None if masks is None else Path(masks)
        self.labelled = masks is not None
        listed = _read_classes(classes)
        if ignore_index is not None and not 0 <= ignore_index <= 255:
            raise ConfigError(f"ignore_index: expected 0 to 255, got {ignore_index}")
        self.classes = listed[:-1] if ignore_index == len(listed) - 1 else listed
        self._declared = np.arange(256) < len(self.classes)
        self._table = np.arange(256).astype(np.uint8)
        if ignore_index is not None:
            self._declared[ignore_index] = True
            self._table[ignore_index] = IGNORE
        for folder in (self._images, self._masks):
            if folder is not None and not folder.is_dir():
                raise DataError(f"{folder} is not a folder; expected the folder of images or masks")
        faults: list[Fault] = []
        names = _search(self._images, image_suffixes)
        if split is not None:
            names = _choose(names, split, faults)
        self.names = tuple(self._valid(names, faults))
        nothing = f"{images} holds no usable image ({', '.join(image_suffixes)})"
        kept, self.faults = usable(self, faults, on_error, nothing)
        self.names = tuple(self.names[i] for i in kept)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        return inside(self._images, self.names[i])

    def size(self, i: int) -> tuple[int, int]:
        return image_size(self.path(i))

    def image(self, i: int) -> Tensor:
        return read_image(self.path(i))

    def mask(self, i: int) -> Tensor:
        if self._masks is None:
            raise DataError(f"{self._images} has no masks; expected a folder of them in 'masks'")
        path = inside(self._masks, _mask_name(self.names[i]))
        values = _read_indices(path)
        wrong = np.flatnonzero(np.bincount(values.ravel(), minlength=256) * ~self._declared)
        if len(wrong):
            raise DataError(
                f"{path} has the values {', '.join(map(str, wrong))}; expected 0 to "
                f"{len(self.classes) - 1} for the classes, or one declared as ignore_index"
            )
        mask = self._table[values]
        height, width = self.size(i)
        if mask.shape != (height, width):
            raise DataError(
                f"{path} is {mask.shape[1]} wide and {mask.shape[0]} high, but its image "
                f"{width} and {height}; correct the one that is wrong"
            )
        return torch.from_numpy(mask)

    def label_digest(self, i: int) -> str:
        meaning = f"{self.classes} {self._table.tolist()}".encode()
        if self._masks is None:
            return hashlib.sha256(meaning).hexdigest()
        path = inside(self._masks, _mask_name(self.names[i]))
        try:
            return MEMO.digest(path, before=meaning)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({reason(error)})") from error

    def _valid(self, names: Iterable[str], faults: list[Fault]) -> Iterator[str]:
        """Yield the names that are valid and have their own mask; add the others to ``faults``."""
        owners: dict[str, str] = {}
        for name in names:
            try:
                check_name(name)
                stem = str(PurePosixPath(name).with_suffix(""))
                if stem in owners:
                    raise DataError(
                        f"{self._images}: {quoted(owners[stem])} and {quoted(name)} differ in "
                        "their suffix only, so they share one mask; rename or remove one"
                    )
                owners[stem] = name
                mask = None if self._masks is None else self._masks / _mask_name(name)
                if mask is not None and not mask.is_file():
                    raise DataError(
                        f"{mask} does not exist; add the mask of {quoted(name)}, or leave the "
                        "image out by a split list"
                    )
            except DataError as error:
                faults.append(Fault(str(error), file=name))
            else:
                yield name


def _read_classes(classes: str | tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(classes, str):
        return check_classes(classes, "classes")
    # empty lines are not skipped: that would change the values of the classes below
    lines = [line.strip() for line in read_text(classes).rstrip().splitlines()]
    return check_classes(lines, classes)


def _search(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Return the images below ``folder``, sorted, as relative paths with forward slashes."""
    wanted = tuple(suffix.lower() for suffix in suffixes)
    return sorted(
        Path(parent, file).relative_to(folder).as_posix()
        for parent, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(wanted)
    )


def _choose(names: Iterable[str], split: str, faults: list[Fault]) -> list[str]:
    """Return the images listed in a split file, in its order."""
    known: dict[str, str] = {}
    for name in names:
        known.setdefault(str(PurePosixPath(name).with_suffix("")), name)
        known[name] = name
    chosen: dict[str, None] = {}
    for number, line in enumerate(read_text(split).splitlines(), start=1):
        if not line.strip():
            continue
        named = known.get(line.strip())
        if named is None:
            sentence = f"{quoted(line.strip())} has no image; add the image or remove the line"
        elif named in chosen:
            sentence = f"{quoted(named)} is in the list already; remove the line"
        else:
            chosen[named] = None
            continue
        faults.append(Fault(f"{split}, line {number}: {sentence}", file=named or line.strip()))
    return list(chosen)


def _mask_name(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(".png"))


def _read_indices(path: Path) -> np.ndarray:
    """Return the stored pixel values of a PNG, (H, W) uint8; no palette is applied."""
    with open_image(path) as image:
        if image.format != "PNG" or image.mode not in ("1", "L", "P"):
            raise DataError(
                f"{path} is a {image.format} file of mode {image.mode}; expected a PNG of class "
                "indices, palette or gray, with 8 bits or fewer"
            )
        depth = 8 if image.mode == "P" else _depth(path)
        values = np.array(image.convert("L") if image.mode == "1" else image)
    # Pillow scales gray values of fewer bits to 0..255
    return values if depth == 8 else values // (255 // (2**depth - 1))


def _depth(path: Path) -> int:
    """Return the bits per sample from a PNG's header."""
    with path.open("rb") as file:
        return file.read(25)[-1]
