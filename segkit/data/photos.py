"""Source of unlabelled image files and folders."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from torch import Tensor

from segkit.core.errors import DataError
from segkit.data.images import SUFFIXES, image_size, read_image
from segkit.data.pairing import left_out, search
from segkit.data.samples import SampleRange, check_reading
from segkit.data.source import Fault


class PhotoSource:
    """Unlabelled images given as paths of files and folders.

    Args:
        paths: Image files and folders, which are searched recursively. Duplicate files are used
            once.
        range: Samples that become 0 and 255, for images of more than 8 bits, as in MaskSource.
        channels: 3 for RGB, 1 for gray; another number: the files' own bands.

    Attributes:
        names: The path relative to the given folder, or the file name; if names are equal, parent
            folders are added to them until they are unique.
        notes: Sentences that name files that are passed over.
        faults: Files that cannot be opened as images; they are left out. Damage after a file's
            header is not detected.

    Raises:
        DataError: A path does not exist, a folder has no image, or no image can be opened.
    """

    classes: tuple[str, ...] = ()
    labelled = False

    def __init__(
        self, *, paths: tuple[str, ...], range: SampleRange | None = None, channels: int = 3
    ) -> None:
        self.reading = check_reading(range, channels)
        self.channels, self._range = channels, range
        files: dict[Path, int] = {}  # file: number of its last path components in its name
        notes: list[str] = []
        for path in map(Path, paths):
            for name, file in _files(path, notes):
                files.setdefault(file, len(PurePosixPath(name).parts))
        self.notes = tuple(notes)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            sizes = list(pool.map(_size, files))
        opened = list(zip(files, _names(files), sizes, strict=True))
        valid = [(file, name, size) for file, name, size in opened if not isinstance(size, str)]
        self.faults = tuple(Fault(size, name) for _, name, size in opened if isinstance(size, str))
        if not valid:
            more = f" (and {len(self.faults) - 1} more)" if self.faults[1:] else ""
            raise DataError(f"{self.faults[0].sentence}{more}; no image is left to predict")
        self._paths, self.names, self._sizes = zip(*valid, strict=True)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        return self._paths[i]

    def size(self, i: int) -> tuple[int, int]:
        return self._sizes[i]

    def image(self, i: int) -> Tensor:
        return read_image(self._paths[i], range=self._range, channels=self.channels)

    def mask(self, i: int) -> Tensor:
        raise DataError(f"{self._paths[i]} has no label")

    def label_digest(self, i: int) -> str:
        return ""


def _files(path: Path, notes: list[str]) -> Sequence[tuple[str, Path]]:
    """Return (name, file) of an image, or of every image in a folder, and note its other files."""
    if path.is_file():
        return [(path.name, path.parent.resolve() / path.name)]
    if not path.is_dir():
        raise DataError(f"{path} does not exist; expected an image or a folder of images")
    names, others = search(path)
    if not names:
        more = f"; {left_out(others, path)}" if others else ""
        raise DataError(f"{path} holds no image; expected {', '.join(sorted(SUFFIXES))}{more}")
    if others:
        notes.append(left_out(others, path))
    return [(name, path.resolve() / name) for name in names]


def _size(file: Path) -> tuple[int, int] | str:
    """Return the height and width of an image, or an error message for its file."""
    try:
        return image_size(file)
    except DataError as error:
        return str(error)


def _names(files: Mapping[Path, int]) -> tuple[str, ...]:
    """Return unique names of files: at least the given number of last components of each path."""
    parts = [[*filter(None, [file.drive.strip(":")]), *file.parts[1:]] for file in files]
    counts = list(files.values())
    while True:
        names = ["/".join(part[-count:]) for part, count in zip(parts, counts, strict=True)]
        occurrences = Counter(names)
        equal = [i for i, name in enumerate(names) if occurrences[name] > 1]
        if not equal:
            return tuple(names)
        for i in equal:
            counts[i] += 1
