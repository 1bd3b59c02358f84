"""Image files and mask files in folders, paired by name."""

import bisect
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path, PurePosixPath

from segkit.core.errors import DataError
from segkit.data.images import SUFFIXES

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jpg", ".jpeg", ".jpe", ".jfif")
"""Suffixes of masks; of several masks of an image, the first one's is used."""

_END = re.compile(r"[_\-. ]*[A-Za-z].*")
"""End of a name that tells images and masks apart: it does not begin with a number."""


def search(
    folder: Path, suffixes: Sequence[str] | None = None, ending: str = ""
) -> tuple[list[str], list[str]]:
    """Return the images below a folder, and the other files, as sorted relative paths.

    Paths have forward slashes. Hidden files, such as those that macOS and Windows add to folders,
    are in neither list. Names end with ``ending`` and one of ``suffixes``, in any letter case;
    default: those that Pillow decodes.
    """
    wanted = tuple(suffix.lower() for suffix in suffixes or SUFFIXES)
    images: list[str] = []
    others: list[str] = []
    for name in _files(folder):
        is_image = name.lower().endswith(wanted) and stem(name).endswith(ending)
        (images if is_image else others).append(name)
    return sorted(images), sorted(others)


def _files(folder: Path) -> Iterator[str]:
    """Yield all files below a folder that are not hidden.

    A link to another folder inside it is passed over: its files are found where they are.

    Raises:
        DataError: There is a link to a folder outside, where no file may be read.
    """
    root = folder.resolve()
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _hidden(name)]
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise DataError(
                    f"{path} is a link to a folder outside {folder}, which is not followed; put "
                    "the folder itself there, or remove the link"
                )
        for name in files:
            if not _hidden(name):
                yield Path(parent, name).relative_to(folder).as_posix()


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def stem(name: str) -> str:
    """Return a relative path without its suffix."""
    return str(PurePosixPath(name).with_suffix(""))


def key(name: str, ending: str) -> str:
    """Return a relative path without its suffix and an ending before it."""
    return stem(name).removesuffix(ending)


def pair(
    keys: Iterable[str], masks: Sequence[str], ending: str
) -> tuple[dict[str, str], list[str]]:
    """Return the mask of each image, and the masks without one.

    Args:
        keys: Keys of the images, see :func:`key`. A mask with the same key in the same letter case
            comes first.
        masks: Paths of the masks. Of several of an image, the first of MASK_SUFFIXES is used.
        ending: End of mask names before the suffix.
    """
    order = {suffix: number for number, suffix in enumerate(MASK_SUFFIXES)}
    ranked = sorted(masks, key=lambda name: -order[PurePosixPath(name).suffix.lower()])
    exact = {key(name, ending): name for name in ranked}
    folded = {at.casefold(): name for at, name in exact.items()}
    images = [*keys]
    pairs = {at: exact.get(at) or folded.get(at.casefold()) for at in images}
    known = {*images, *(at.casefold() for at in images)}
    unused = [name for at, name in exact.items() if not known & {at, at.casefold()}]
    return {at: name for at, name in pairs.items() if name}, sorted(unused)


def left_out(names: Sequence[str], folder: Path | str) -> str:
    """Return a sentence that names files that were passed over."""
    kinds = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in names)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5))
    many = f"{len(names):,} files" if len(names) > 1 else "1 file"
    return f"{many} left out in {folder}: {counts}, such as {names[0]}"


class Suggestions:
    """Masks that are in a folder, to name one for an image whose mask is missing."""

    def __init__(self, folder: Path) -> None:
        names, _ = search(folder, MASK_SUFFIXES)
        self._stems = sorted((stem(name), name) for name in names)
        self.named: set[str] = set()

    def near(self, image: str) -> str:
        """Return a clause that names the mask of an image by another rule, or nothing.

        It is the mask whose name begins as the image's does, apart from ends such as "_mask".
        """
        wanted = stem(image)
        at = bisect.bisect(self._stems, (wanted, ""))
        for mask, name in self._stems[max(0, at - 2) : at + 3]:
            pairs = zip(mask, wanted, strict=False)
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            while mask[common:] and wanted[common:] and mask[common - 1 : common] in tuple("_-. "):
                common -= 1
            ends = wanted[common:], mask[common:]
            if common and any(ends) and all(not end or _END.fullmatch(end) for end in ends):
                self.named.add(name)
                words = " and ".join(
                    f'{key} to "{end}"'
                    for key, end in zip(("image_suffix", "mask_suffix"), ends, strict=True)
                    if end
                )
                return f"{name} is there: if that is the mask, set {words}; else "
        return ""
