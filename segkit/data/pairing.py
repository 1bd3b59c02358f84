"""Image files and mask files in folders, paired by name."""

import bisect
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from segkit.core.errors import DataError
from segkit.data.images import SUFFIXES

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jpg", ".jpeg", ".jpe", ".jfif")
"""Suffixes of masks; of several masks of an image, the first one's is used."""

_END = re.compile(r"[_\-. ]*[A-Za-z].*")
"""End of a name that tells images and masks apart: it does not begin with a number."""

_LABEL = r"(?:ground[_\-. ]?truth|mask|label|gt|seg|annot|target)"
_BEGINNING = re.compile(rf"({_LABEL}[a-z]*[_\-. ]*)(.+)", re.IGNORECASE)
_ENDING = re.compile(rf"(.+?)([_\-. ]*{_LABEL}\w*)", re.IGNORECASE)
"""Names of masks that begin or end with a word which tells them from images, and the rest."""


class Affixes(NamedTuple):
    """Beginning and end of the names of images, or of masks.

    Between them is what an image and its mask have in common. All paths are relative, and without
    the files' suffixes: see :func:`stem`.
    """

    prefix: str = ""
    suffix: str = ""

    def fit(self, path: str) -> bool:
        """Return True if the file of a path is named so."""
        file = path.rpartition("/")[2]
        return file.startswith(self.prefix) and file.endswith(self.suffix)

    def key(self, path: str) -> str:
        """Return a path without the affixes."""
        parent, slash, file = path.rpartition("/")
        return parent + slash + file.removeprefix(self.prefix).removesuffix(self.suffix)

    def around(self, key: str) -> str:
        """Return the path of which this is the key."""
        parent, slash, file = key.rpartition("/")
        return f"{parent}{slash}{self.prefix}{file}{self.suffix}"


NO_AFFIXES = Affixes()
Rule = tuple[Affixes, Affixes]
"""The affixes of images and those of their masks."""


def rules(mask: str, images: Iterable[str]) -> Iterator[Rule]:
    """Yield the affixes by which a mask may be that of one of the images; names without suffixes.

    The mask's name begins with the image's; or it has a word such as "mask" at its beginning or
    end, where the image has letters or nothing.
    """
    beginning, ending = _BEGINNING.fullmatch(mask), _ENDING.fullmatch(mask)
    for image in images:
        if mask.startswith(image):
            yield Affixes(), Affixes(suffix=mask[len(image) :])
        elif beginning and image.endswith(beginning[2]):
            prefix = image.removesuffix(beginning[2])
            if not any(map(str.isdigit, prefix)):
                yield Affixes(prefix), Affixes(beginning[1])
        elif ending and image.startswith(ending[1]):
            end = image.removeprefix(ending[1])
            if _END.fullmatch(end):
                yield Affixes(suffix=end), Affixes(suffix=ending[2])


def search(
    folder: Path, suffixes: Sequence[str] | None = None, affixes: Affixes = NO_AFFIXES
) -> tuple[list[str], list[str]]:
    """Return the images below a folder, and the other files, as sorted relative paths.

    Paths have forward slashes. Hidden files, such as those that macOS and Windows add to folders,
    are in neither list. Names have ``affixes`` and one of ``suffixes``, in any letter case;
    default: those that Pillow decodes.
    """
    wanted = tuple(suffix.lower() for suffix in suffixes or SUFFIXES)
    images: list[str] = []
    others: list[str] = []
    for name in _files(folder):
        is_image = name.lower().endswith(wanted) and affixes.fit(stem(name))
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


def pair(
    keys: Iterable[str], masks: Sequence[str], affixes: Affixes
) -> tuple[dict[str, str], list[str]]:
    """Return the mask of each image, and the masks without one.

    Args:
        keys: Keys of the images, see :class:`Affixes`. A mask with the same key in the same letter
            case comes first.
        masks: Paths of the masks. Of several of an image, the first of MASK_SUFFIXES is used.
        affixes: Those of the masks.
    """
    order = {suffix: number for number, suffix in enumerate(MASK_SUFFIXES)}
    ranked = sorted(masks, key=lambda name: -order[PurePosixPath(name).suffix.lower()])
    exact = {affixes.key(stem(name)): name for name in ranked}
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
        self._names = dict(self._stems)
        self._beginnings = {
            match[1] for name in names if (match := _BEGINNING.fullmatch(PurePosixPath(name).stem))
        }
        self.named: set[str] = set()

    def near(self, image: str) -> str:
        """Return a clause that names the mask of an image by another rule, or nothing.

        It is the mask whose name ends as the image's does, apart from a beginning such as "mask_",
        or begins as it does, apart from ends such as "_mask".
        """
        wanted = stem(image)
        letters = re.match(r"[A-Za-z]*[_\-. ]*", PurePosixPath(wanted).name)
        for prefix in ("", letters[0] if letters else ""):
            core = Affixes(prefix).key(wanted)
            for beginning in sorted(self._beginnings):
                name = self._names.get(Affixes(beginning).around(core))
                if name is not None:
                    return self._clause(name, image_prefix=prefix, mask_prefix=beginning)
        at = bisect.bisect(self._stems, (wanted, ""))
        for mask, name in self._stems[max(0, at - 2) : at + 3]:
            pairs = zip(mask, wanted, strict=False)
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            while mask[common:] and wanted[common:] and mask[common - 1 : common] in tuple("_-. "):
                common -= 1
            ends = wanted[common:], mask[common:]
            if common and any(ends) and all(not end or _END.fullmatch(end) for end in ends):
                return self._clause(name, image_suffix=ends[0], mask_suffix=ends[1])
        return ""

    def _clause(self, mask: str, **settings: str) -> str:
        self.named.add(mask)
        words = " and ".join(f'{key} to "{value}"' for key, value in settings.items() if value)
        return f"{mask} is there: if that is the mask, set {words}; else "
