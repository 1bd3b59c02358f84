"""Cache of a source: decoded pixels and masks in memory-mapped files."""

import hashlib
import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

from segkit.core.files import atomic_write, require_regular_file
from segkit.data.loader import digests
from segkit.data.memo import on_threads
from segkit.data.source import Source

_FORMAT = 1  # of the files; to be raised too if read_image or a source decodes differently
_HEAD = 8  # bytes: height and width, four each
_STALE = 3600  # age in seconds at which an unfinished draft is deleted
_ENTRY = re.compile(r"[0-9a-f]{30}")  # an image's file, in a folder named by _FOLDER
_DRAFT = re.compile(r"\.[0-9a-f]{30}\.[0-9a-f]{32}writing")  # an entry before it is complete
_FOLDER = "[0-9a-f]" * 2


class CachedSource:
    """A source that reads another source's images and masks from a cache, without decoding.

    Each image is one file: its size, then its pixels (channels last), then its mask. The file's
    name is a digest of the image file and of all that determines its mask, so that a changed file
    or annotation gives a new entry, and several runs can share a folder. Files are written
    atomically: several processes may fill a folder at once, and a killed process leaves only
    complete entries.

    Args:
        source: Source of the images and masks. Images that do not fit are read from it each time.
        folder: Folder of the cache.
        limit: Maximum total bytes of the cache's files in the folder. The first images are cached;
            if others do not fit, there is a warning.
        keys: Result of :func:`cache_keys`, if it is known already.

    Raises:
        DataError: An image or a mask cannot be read.
        OSError: The disk is full, or the folder cannot be written.
    """

    def __init__(
        self, source: Source, folder: Path, *, limit: float, keys: Sequence[str] | None = None
    ) -> None:
        self.classes, self.names, self.labelled = source.classes, source.names, source.labelled
        self.faults = source.faults
        self.notes, self.origin = getattr(source, "notes", ()), getattr(source, "origin", None)
        self.category_ids = getattr(source, "category_ids", None)
        self.channels: int = getattr(source, "channels", 3)
        self._source, self._folder = source, folder
        folder.mkdir(parents=True, exist_ok=True)
        used = _remove_old_drafts(folder)
        if keys is None:
            keys = cache_keys(source, digests(source, range(len(source))))
        self._keys = keys
        missing = [i for i, key in enumerate(self._keys) if not (folder / key).exists()]
        # The first images that fit, so that every process and every start caches the same ones.
        room, chosen = limit - used, []
        for i in missing:
            height, width = source.size(i)
            room -= _HEAD + height * width * (self.channels + source.labelled)
            if room < 0:
                break
            chosen.append(i)
        on_threads(self._make, chosen, f"filling {folder}")
        left = len(missing) - len(chosen)
        if left:
            warnings.warn(
                f"{folder}: is full, so {left} of {len(source)} images are decoded each time; "
                f"raise data.cache_gb (now {limit / 1e9:g}), or delete the folder with its old "
                "entries",
                stacklevel=2,
            )
        self._kept = [self._read_size(i) for i in range(len(source))]

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        return self._source.path(i)

    def size(self, i: int) -> tuple[int, int]:
        return self._kept[i] or self._source.size(i)

    def image(self, i: int) -> Tensor:
        kept = self._kept[i]
        if kept is None:
            return self._source.image(i)
        height, width = kept
        pixels = self._map(i, _HEAD, height * width * self.channels)
        return pixels.view(height, width, self.channels).permute(2, 0, 1)

    def mask(self, i: int) -> Tensor:
        kept = self._kept[i]
        if kept is None or not self.labelled:
            return self._source.mask(i)
        height, width = kept
        return self._map(i, _HEAD + height * width * self.channels, height * width).view(
            height, width
        )

    def label_digest(self, i: int) -> str:
        return self._source.label_digest(i)

    def why_empty(self, c: int) -> str:
        """Return why the class ``c`` has no pixel, if the source knows."""
        why: Any = getattr(self._source, "why_empty", None)
        return why(c) if why else "label it, or remove the class"

    def _make(self, i: int) -> None:
        image = self._source.image(i)
        parts = [torch.tensor(image.shape[1:], dtype=torch.int32), image.permute(1, 2, 0)]
        parts += [self._source.mask(i)] if self.labelled else []
        path = self._folder / self._keys[i]
        with atomic_write(path, shared=True) as draft, draft.open("wb") as file:
            for part in parts:
                part.contiguous().numpy().tofile(file)

    def _read_size(self, i: int) -> tuple[int, int] | None:
        """Return height and width of an image in the cache, or ``None`` if it is not there."""
        try:
            with require_regular_file(self._folder / self._keys[i]).open("rb") as file:
                height, width = np.fromfile(file, np.int32, 2).tolist()
        except FileNotFoundError:
            return None
        return height, width

    def _map(self, i: int, start: int, length: int) -> Tensor:
        # Copy-on-write: writing to the tensor does not change the cache.
        file = require_regular_file(self._folder / self._keys[i])
        return torch.from_numpy(np.memmap(file, np.uint8, mode="c", offset=start, shape=length))


def cache_keys(source: Source, images: Sequence[str]) -> list[str]:
    """Return each image's file name in a cache, from the images' digests.

    The first two of its 32 hexadecimal digits are a subfolder.
    """

    reading = getattr(source, "reading", "")

    def key(i: int) -> str:
        labels = source.label_digest(i) if source.labelled else ""
        made_of = f"{_FORMAT} {PIL.__version__} {images[i]} {labels}{reading}"
        digest = hashlib.sha256(made_of.encode()).hexdigest()[:32]
        return f"{digest[:2]}/{digest[2:]}"

    return on_threads(key, range(len(source)), "reading labels")


def _remove_old_drafts(folder: Path) -> int:
    """Remove old drafts of killed processes; return the total bytes of entries and drafts.

    Files with other names do not belong to the cache: they are neither removed nor counted.
    """
    used = 0
    for file in folder.glob(f"{_FOLDER}/*"):
        is_draft = _DRAFT.fullmatch(file.name)
        if not is_draft and not _ENTRY.fullmatch(file.name):
            continue
        try:
            stat = file.stat()
            if is_draft and time.time() - stat.st_mtime > _STALE:
                file.unlink()
            else:
                used += stat.st_size
        except FileNotFoundError:  # another process finished or removed it meanwhile
            continue
    return used
