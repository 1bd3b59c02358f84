"""Source of a folder of images and a folder of masks with a class at every pixel."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segkit.core.errors import DataError, quoted, reason
from segkit.data import pairing
from segkit.data.images import image_size, read_image
from segkit.data.inputs import check_name, inside, read_text
from segkit.data.legend import Color, read_legend
from segkit.data.memo import MEMO
from segkit.data.samples import SampleRange, check_reading
from segkit.data.source import Fault, OnError, size_advice, usable


class MaskSource:
    """Images, each with a mask whose values or colors are classes (CamVid, Pascal, ADE).

    The mask of ``images/a/b.jpg`` is ``masks/a/b.png``, in any letter case: a PNG, TIFF, BMP or GIF
    of gray values, palette or colors. JPEG masks need two values. Images are in the order of the
    split list, or sorted by name. Hidden files are not used.

    Args:
        images: Folder of images, searched recursively.
        masks: Folder of masks; without it, the source is unlabelled.
        split: Text file with one file name per line, with or without the suffix.
        classes: Class names in the order of their values, or a text file with one per line. A file
            with colors ("Tree,128,128,0", "128 128 0 Tree" or "Tree:128,128,0") is also the
            palette.
        ignore_index: Mask value that means "no class"; it becomes :data:`IGNORE`. If it is the
            index of the last name ("void"), that name is removed from the classes.
        values: Class of each mask value, if they are not 0, 1, 2, ...: an index, a name, or
            ``null`` to ignore it, such as ``{"0": 0, "255": "can"}``. Several values may have one
            class. A color ("128,0,0" or "#800000") is a value too; ``"*"`` is all others.
        palette: Color of each class, for masks that are colored.
        image_suffix: End of image names before the file's suffix, which masks do not have.
        mask_suffix: End of mask names before the file's suffix, which images do not have.
        image_prefix: Beginning of the names of image files, which masks do not have.
        mask_prefix: Beginning of the names of mask files, which images do not have.
        image_suffixes: Suffixes of image files; default: those that Pillow decodes.
        range: Samples that become 0 and 255, for images of more than 8 bits; ``"measured"``: the
            least and the largest of each image; default: 0 and 65535.
        channels: 3 for RGB, 1 for gray; another number: the files' own bands.
        on_error: ``"skip"`` reads every image once, and leaves out faulty images; ``faults`` lists
            them.

    Attributes:
        notes: Sentences about files that are passed over.

    Raises:
        ConfigError: An argument is invalid.
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
        values: Mapping[str, Any] | None = None,
        palette: tuple[Color, ...] | None = None,
        image_suffix: str = "",
        mask_suffix: str = "",
        image_prefix: str = "",
        mask_prefix: str = "",
        image_suffixes: tuple[str, ...] | None = None,
        range: SampleRange | None = None,
        channels: int = 3,
        on_error: OnError = "raise",
    ) -> None:
        self.reading = check_reading(range, channels)
        self._images = Path(images)
        self._masks = None if masks is None else Path(masks)
        self.labelled = masks is not None
        self.channels, self._range = channels, range
        self._image_affixes = pairing.Affixes(image_prefix, image_suffix)
        self._mask_affixes = pairing.Affixes(mask_prefix, mask_suffix)
        self._legend = read_legend(classes, values, palette, ignore_index)
        self.classes, self.origin = self._legend.classes, f"masks in {masks}" if masks else images
        for folder in (self._images, self._masks):
            if folder is not None and not folder.is_dir():
                raise DataError(f"{folder} is not a folder; expected the folder of images or masks")
        faults: list[Fault] = []
        names, others = pairing.search(self._images, image_suffixes, self._image_affixes)
        together = self._masks is not None and self._masks.samefile(self._images)
        if together and any(self._mask_affixes):
            names = [name for name in names if not self._mask_affixes.fit(pairing.stem(name))]
            others = [name for name in others if not self._mask_affixes.fit(pairing.stem(name))]
        self.notes = (pairing.left_out(others, images),) if others and not together else ()
        unused = self._find_masks(names, together)
        if split is not None:
            names, unused = _choose(names, split, self._image_affixes, faults), []
        self.names = tuple(self._valid(names, unused if names else [], others, faults))
        wanted = f" ({', '.join(image_suffixes)})" if image_suffixes else ""
        kept, self.faults = usable(
            self, faults, on_error, f"{images} holds no usable image{wanted}"
        )
        self.names = tuple(self.names[i] for i in kept)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        return inside(self._images, self.names[i])

    def size(self, i: int) -> tuple[int, int]:
        return image_size(self.path(i))

    def image(self, i: int) -> Tensor:
        return read_image(self.path(i), range=self._range, channels=self.channels)

    def mask(self, i: int) -> Tensor:
        path = self._mask_path(i)
        mask = self._legend.decode(path)
        height, width = self.size(i)
        if mask.shape != (height, width):
            advice = size_advice((mask.shape[0], mask.shape[1]), (height, width))
            raise DataError(
                f"{path} is {mask.shape[1]} wide and {mask.shape[0]} high, but its image "
                f"{width} and {height}; {advice}"
            )
        return torch.from_numpy(mask)

    def label_digest(self, i: int) -> str:
        if self._masks is None:
            return hashlib.sha256(self._legend.meaning).hexdigest()
        path = self._mask_path(i)
        try:
            return MEMO.digest(path, before=self._legend.meaning)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({reason(error)})") from error

    def why_empty(self, c: int) -> str:
        """Return why the class ``c`` has no pixel, and what to do."""
        return self._legend.why_empty(c)

    def _mask_path(self, i: int) -> Path:
        if self._masks is None:
            raise DataError(f"{self._images} has no masks; expected a folder of them in 'masks'")
        return inside(self._masks, self._mask_names[self._key(self.names[i])])

    def _key(self, name: str) -> str:
        return self._image_affixes.key(pairing.stem(name))

    def _find_masks(self, images: list[str], together: bool) -> list[str]:
        """Set the masks by the keys of their images; return those without an image.

        ``together``: images and masks are in one folder.
        """
        self._mask_names: dict[str, str] = {}
        if self._masks is None:
            return []
        files, _ = pairing.search(self._masks, pairing.MASK_SUFFIXES, self._mask_affixes)
        files = sorted({*files}.difference(images)) if together else files
        keys = map(self._key, images)
        self._mask_names, unused = pairing.pair(keys, files, self._mask_affixes)
        return [] if together else unused

    def _valid(
        self,
        names: Sequence[str],
        unused: Iterable[str],
        others: Iterable[str],
        faults: list[Fault],
    ) -> Iterator[str]:
        """Yield the names that are valid and have their own mask; add the others to ``faults``.

        Masks of ``unused``, which have no image, are added after them; ``others`` are files that
        are not read as images.
        """
        owners: dict[str, str] = {}
        suggestions: pairing.Suggestions | None = None
        for name in names:
            key = self._key(name)
            try:
                check_name(name)
                if key in owners:
                    raise DataError(
                        f"{self._images}: {quoted(owners[key])} and {quoted(name)} differ in their "
                        "suffix only, so they share one mask; rename or remove one, or set "
                        "image_suffixes to that of the images"
                    )
                owners[key] = name
                if self._masks is not None and key not in self._mask_names:
                    suggestions = suggestions or pairing.Suggestions(self._masks)
                    advice = (
                        f"add the mask of {quoted(name)}, or leave the image out by a split list"
                    )
                    if self._masks.samefile(self._images):
                        advice = "set image_suffixes or mask_suffix to tell images and masks apart"
                    raise DataError(
                        f"{self._masks / self._mask_affixes.around(key)}.png does not exist; "
                        f"{suggestions.near(name)}{advice}"
                    )
            except DataError as error:
                faults.append(Fault(str(error), file=name))
            else:
                yield name
        unread = {self._key(name): name for name in others}
        for mask in unused:
            if suggestions is None or mask not in suggestions.named:
                other = unread.get(self._mask_affixes.key(pairing.stem(mask)))
                hint = (
                    f"; {other} is there, but is not read: save it as JPEG or PNG" if other else ""
                )
                sentence = f"{Path(self._masks or '', mask)} has no image in {self._images}{hint}"
                faults.append(Fault(f"{sentence}; add the image, or remove the mask", file=mask))


def _choose(
    names: Iterable[str], split: str, affixes: pairing.Affixes, faults: list[Fault]
) -> list[str]:
    """Return the images listed in a split file, in its order."""
    known: dict[str, str] = {}
    for name in names:
        known.setdefault(affixes.key(pairing.stem(name)), name)
        known.setdefault(pairing.stem(name), name)
        known[name] = name
    chosen: dict[str, None] = {}
    for number, line in enumerate(read_text(split).splitlines(), start=1):
        if not line.strip():
            continue
        named = known.get(line.strip()) or known.get(line.strip().replace("\\", "/"))
        if named is None:
            sentence = f"{quoted(line.strip())} has no image; add the image or remove the line"
        elif named in chosen:
            sentence = f"{quoted(named)} is in the list already; remove the line"
        else:
            chosen[named] = None
            continue
        faults.append(Fault(f"{split}, line {number}: {sentence}", file=named or line.strip()))
    return list(chosen)
