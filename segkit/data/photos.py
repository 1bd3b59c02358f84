"""Plain photographs without labels: files and folders, as a source."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from segkit.data.images import SUFFIXES, image_size, read_image
from segkit.data.source import Fault
from segkit.errors import DataError


class PhotoSource:
    """Images named on a command line or in a configuration.

    Args:
        paths: Image files, and folders of which every image below is taken.

    Raises:
        DataError: A path does not exist, or there is no image in a folder.
    """

    classes: tuple[str, ...] = ()
    labelled = False
    faults: tuple[Fault, ...] = ()

    def __init__(self, *, paths: tuple[str, ...]) -> None:
        files: dict[str, Path] = {}
        for path in map(Path, paths):
            for name, file in _files(path):
                if name in files and files[name] != file:
                    raise DataError(f"{file} and {files[name]} have one name; predict them apart")
                files[name] = file
        self.names = tuple(files)
        self._paths = tuple(files.values())

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        return self._paths[i]

    def size(self, i: int) -> tuple[int, int]:
        return image_size(self._paths[i])

    def image(self, i: int) -> Tensor:
        return read_image(self._paths[i])

    def mask(self, i: int) -> Tensor:
        raise DataError(f"{self._paths[i]} has no label")

    def label_digest(self, i: int) -> str:
        return ""


def _files(path: Path) -> Sequence[tuple[str, Path]]:
    """(name, file) of an image, or of every image in a folder, by the path below it."""
    if path.is_file():
        return [(path.name, path)]
    if not path.is_dir():
        raise DataError(f"{path} does not exist; expected an image or a folder of images")
    found = sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES)
    if not found:
        raise DataError(f"{path} holds no image; expected {', '.join(sorted(SUFFIXES))}")
    return [(one.relative_to(path).as_posix(), one) for one in found]
