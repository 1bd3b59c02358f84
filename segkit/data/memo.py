"""Persistent cache of file digests and of numbers computed from files and labels."""

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
from segkit.core.files import atomic_write, matches_schema, require_regular_file

MAX_ENTRIES = 1_000_000
"""Maximum number of files, and of keys with numbers, to save; the oldest are dropped first."""

MAX_BYTES = 1 << 30
"""Maximum size of the memo file; a larger one is ignored."""

T = TypeVar("T")

_FORMAT = 1
_SCHEMA = {"format": int, "files": {str: [int, int, str]}, "numbers": {str: [int]}}
_BLOCK = 1 << 20


class Memo:
    """Digests of files, and integers stored under keys that are made of digests.

    A file is identified by its path, size and modification time, so that a second start need not
    read 20,000 images again. A lost or damaged memo file is harmless: values are computed again.
    """

    def __init__(self) -> None:
        self._files: dict[str, tuple[int, int, str]] = {}
        self._numbers: dict[str, list[int]] = {}
        self._changed = self._warned = False

    def digest(self, path: Path, before: bytes = b"") -> str:
        """Return the SHA-256 of ``before`` and a file's bytes, in hexadecimal.

        Raises:
            OSError: The file cannot be read.
        """
        key, stat = _key(path, before), os.stat(path)
        known = self._files.get(key)
        if known is not None and known[:2] == (stat.st_size, stat.st_mtime_ns):
            return known[2]
        digest = read_digest(path, before)
        self._files[key] = stat.st_size, stat.st_mtime_ns, digest
        self._changed = True
        return digest

    def numbers(self, key: str) -> list[int] | None:
        """Return the integers stored under a key, or ``None``; keys contain digests."""
        return self._numbers.get(key)

    def keep(self, key: str, numbers: Sequence[int]) -> None:
        """Store integers under a key."""
        self._numbers[key] = list(numbers)
        self._changed = True

    def share(self, paths: Iterable[Path]) -> None:
        """Broadcast the digests of these files from rank 0; must be called on every rank."""
        keys = map(_key, paths) if is_main() else ()
        self._files |= broadcast({key: self._files[key] for key in keys if key in self._files})

    @contextmanager
    def kept_in(self, folder: Path) -> Iterator[None]:
        """Load the memo file of a folder, and save it after the block if it changed.

        Only rank 0 reads and writes. If the folder cannot be written, there is one warning.
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
                self._load(path)  # merge what another process has saved meanwhile
                self._save(path)
                self._changed = False

    def _load(self, path: Path) -> None:
        """Merge the entries of a memo file; a file of any other form is ignored."""
        try:
            if require_regular_file(path).stat().st_size > MAX_BYTES:
                return
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return
        if matches_schema(content, _SCHEMA) and content["format"] == _FORMAT:
            for key, (size, changed, digest) in content["files"].items():
                self._files.setdefault(key, (size, changed, digest))
            for key, numbers in content["numbers"].items():
                if all(0 <= number < 2**63 for number in numbers):
                    self._numbers.setdefault(key, numbers)

    def _save(self, path: Path) -> None:
        tables = {"files": _newest(self._files), "numbers": _newest(self._numbers)}
        try:
            with atomic_write(path, shared=True) as draft:
                draft.write_text(json.dumps({"format": _FORMAT, **tables}), encoding="utf-8")
        except OSError as error:
            if self._warned:
                return
            self._warned = True
            warnings.warn(
                f"{path}: cannot be written ({reason(error)}), so the next start reads every image "
                "again; set data.cache to a writable folder",
                stacklevel=2,
            )


MEMO = Memo()
"""The memo of this process."""


def read_digest(path: Path, before: bytes = b"") -> str:
    """Return the SHA-256 of ``before`` and a file's bytes, without a memo."""
    digest = hashlib.sha256(before)
    with require_regular_file(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def on_threads(
    function: Callable[[int], T], items: Sequence[int], description: str, threads: int | None = None
) -> list[T]:
    """Return ``[function(item) for item in items]``, computed by threads.

    Each task has several items, because submitting a task costs more than a lookup in the memo. By
    default, there is one thread per core.
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


def _newest(table: dict[str, Any]) -> dict[str, Any]:
    return dict(islice(table.items(), max(0, len(table) - MAX_ENTRIES), None))
