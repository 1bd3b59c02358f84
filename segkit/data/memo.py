"""What is known of files and labels that were read once, kept from one start to the next."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from segkit.core.distributed import Progress, broadcast, is_main
from segkit.core.errors import reason
from segkit.core.files import regular, replacing

MAX_ENTRIES = 1_000_000
"""Most files, and most labels, that are remembered; the oldest are forgotten first."""

MAX_BYTES = 1 << 30
"""Largest memo file that is read."""

T = TypeVar("T")

_FORMAT = 1
_BLOCK = 1 << 20


class Memo:
    """Digests of files, and numbers that follow from digests.

    A file is known by its path, size and time of change, so that a second start reads none of
    20,000 images. What is written on the disk may be lost or damaged: it is computed again.
    """

    def __init__(self) -> None:
        self._files: dict[str, tuple[int, int, str]] = {}
        self._numbers: dict[str, list[int]] = {}
        self._changed = self._told = False

    def digest(self, path: Path, before: bytes = b"") -> str:
        """SHA-256 of ``before`` and a file's bytes, in hexadecimal.

        Raises:
            OSError: The file cannot be read.
        """
        key, about = _key(path, before), os.stat(path)
        known = self._files.get(key)
        if known is not None and known[:2] == (about.st_size, about.st_mtime_ns):
            return known[2]
        digest = read_digest(path, before)
        self._files[key] = about.st_size, about.st_mtime_ns, digest
        self._changed = True
        return digest

    def numbers(self, key: str) -> list[int] | None:
        """What was kept under a key; keys are made of digests, so they never mean another thing."""
        return self._numbers.get(key)

    def keep(self, key: str, numbers: Sequence[int]) -> None:
        """Keep integers under a key."""
        self._numbers[key] = list(numbers)
        self._changed = True

    def share(self, paths: Iterable[Path]) -> None:
        """Give all ranks what rank 0 knows of these files; every rank calls it."""
        keys = map(_key, paths) if is_main() else ()
        self._files |= broadcast({key: self._files[key] for key in keys if key in self._files})

    @contextmanager
    def kept_in(self, folder: Path) -> Iterator[None]:
        """Remember what earlier starts kept in a folder, and keep there what the block adds.

        Rank 0 alone reads and writes. A folder that cannot be written is one warning.
        """
        if not is_main():
            yield
            return
        path = folder / "memo.json"
        self._load(path)
        try:
            yield
        finally:
            if self._changed:
                self._load(path)  # what another process has added meanwhile
                self._save(path)
                self._changed = False

    def _load(self, path: Path) -> None:
        """Add what a file has; what is not as :meth:`_save` writes it is left out."""
        try:
            if regular(path).stat().st_size > MAX_BYTES:
                return
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            return
        for key, value in _items(content.get("files")):
            if [type(part) for part in value] == [int, int, str]:
                size, changed, digest = value
                self._files.setdefault(key, (size, changed, digest))
        for key, value in _items(content.get("numbers")):
            if all(type(part) is int and 0 <= part < 2**63 for part in value):
                self._numbers.setdefault(key, value)

    def _save(self, path: Path) -> None:
        tables = {"files": _newest(self._files), "numbers": _newest(self._numbers)}
        try:
            with replacing(path, shared=True) as draft:
                draft.write_text(json.dumps({"format": _FORMAT, **tables}), encoding="utf-8")
        except OSError as error:
            if self._told:
                return
            self._told = True
            warnings.warn(
                f"{path}: cannot be written ({reason(error)}), so the next start reads every image "
                "again; set data.cache to a folder that can",
                stacklevel=2,
            )


MEMO = Memo()
"""This process's."""


def read_digest(path: Path, before: bytes = b"") -> str:
    """SHA-256 of ``before`` and a file's bytes, read now."""
    digest = hashlib.sha256(before)
    with regular(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def on_threads(
    function: Callable[[int], T], items: Sequence[int], description: str, threads: int | None = None
) -> list[T]:
    """Return ``[function(item) for item in items]``, computed on threads.

    A thread takes several items at once: to hand over one costs more than to look it up.

    Args:
        function: Reads something, or looks it up.
        items: Of the data set.
        description: Of the progress.
        threads: How many; default all cores.
    """
    threads = threads or os.cpu_count() or 1
    size = max(1, min(32, len(items) // (4 * threads)))
    pieces = [items[start : start + size] for start in range(0, len(items), size)]
    results: list[T] = []
    progress = Progress(None, description, total=len(items), unit="image")
    with ThreadPoolExecutor(threads) as pool:
        for piece in pool.map(lambda piece: [function(item) for item in piece], pieces):
            results += piece
            progress.update(len(piece))
    progress.close()
    return results


def _key(path: Path, before: bytes = b"") -> str:
    mark = hashlib.sha256(before).hexdigest()[:16] + " " if before else ""
    return mark + os.path.abspath(path)


def _items(table: Any) -> Iterator[tuple[str, list[Any]]]:
    for key, value in table.items() if isinstance(table, dict) else ():
        if isinstance(value, list):
            yield key, value


def _newest(table: dict[str, Any]) -> dict[str, Any]:
    return dict(islice(table.items(), max(0, len(table) - MAX_ENTRIES), None))
