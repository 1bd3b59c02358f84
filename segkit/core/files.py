"""Files: atomic writing, reading of regular files only, locks, schemas of JSON values."""

import errno
import json
import os
import platform
import stat
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

from segkit.core.errors import quoted

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def require_regular_file(path: Path | str) -> Path:
    """Return ``path``; raise an OSError if it is not a regular file.

    segkit calls this before it opens any file that it did not just write: opening or reading a
    named pipe, a device or a socket can block forever.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kind != stat.S_IFREG:
        why = f"it is {_KINDS.get(kind, 'of an unknown kind')}; expected a regular file"
        raise OSError(errno.EINVAL, why, str(path))
    return Path(path)


@contextmanager
def atomic_write(path: Path, *, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to ``path`` if the block ends without an error.

    Args:
        path: Destination; its folder is created if necessary.
        durable: Flush the file and its folder: after a power cut, the old or the new file is there.
        shared: Other processes may write the same path at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex if shared else ''}writing")
    try:
        with set_error_filename(path):
            yield draft
            if durable:
                flush(draft)
            draft.replace(path)
            if durable:
                flush(path.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def set_error_filename(path: Path) -> Iterator[None]:
    """Set the file name of an OSError that has none, such as that of a full disk, to ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str, **options: bool) -> None:
    """Write a UTF-8 file atomically; ``options`` are those of :func:`atomic_write`."""
    with atomic_write(path, **options) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, **options: bool) -> None:
    """Write a JSON file atomically; ``options`` are those of :func:`atomic_write`."""
    write_text(path, json.dumps(value, indent=1) + "\n", **options)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


LOCK_TIMEOUT = 2.0
"""Seconds that :func:`lock` retries: a killed process may need a moment to end."""


def lock(path: Path, timeout: float | None = None) -> TextIO:
    """Lock a file, created if necessary, until it is closed or this process ends in any way.

    This is a POSIX record lock, which the system releases. Forked processes do not inherit it, so
    data-loader workers that outlive a killed process do not hold it. It works between machines over
    NFS. If the system or the file system has no locks, a warning is given.

    Args:
        timeout: Seconds to retry; default :data:`LOCK_TIMEOUT`.

    Raises:
        BlockingIOError: Another process holds the lock; ``strerror`` names it.
    """
    if os.path.lexists(path):
        require_regular_file(path)
    file = path.open("a+", encoding="utf-8", errors="replace")
    deadline = time.monotonic() + (LOCK_TIMEOUT if timeout is None else timeout)
    while not _try_lock(file, path):
        if time.monotonic() > deadline:
            file.seek(0)
            holder = file.read(200).strip()
            file.close()
            raise BlockingIOError(errno.EAGAIN, holder or "another process", str(path))
        time.sleep(0.05)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def _try_lock(file: TextIO, path: Path) -> bool:
    """Lock the file; return False if another process holds the lock."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has none")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        warnings.warn(
            f"{path}: file locks do not work here ({error.strerror}); make sure that no other "
            "process trains in this folder",
            stacklevel=3,
        )
    return True


def is_locked(path: Path) -> bool:
    """Return True if another process holds the :func:`lock`; the holder must not call this."""
    if fcntl is None or not os.path.lexists(path):
        return False
    with require_regular_file(path).open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, unless a key is duplicated; an ``object_pairs_hook`` of json.loads."""
    counts = Counter(key for key, _ in pairs)
    if len(counts) < len(pairs):
        repeated = min(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {quoted(repeated)} is duplicated in one object")
    return dict(pairs)


def matches_schema(value: Any, schema: Any) -> bool:
    """Return True if a JSON value matches a schema.

    Args:
        value: Value returned by :func:`json.loads`.
        schema: A type (an integer is also a ``float``, a bool is not an ``int``); ``None``;
            ``Any``; a tuple of alternatives; ``[schema]`` for a list of any length,
            ``[schema, schema, ...]`` for a list of that length; ``{str: schema}`` for an object
            with any names; ``{"key": schema}`` for an object that has at least these keys.
    """
    if schema is Any or schema is None:
        return schema is Any or value is None
    if isinstance(schema, tuple):
        return any(matches_schema(value, option) for option in schema)
    if isinstance(schema, list | dict) and not isinstance(value, type(schema)):
        return False
    if isinstance(schema, list):
        schemas = schema * len(value) if len(schema) == 1 else schema
        return len(value) == len(schemas) and all(map(matches_schema, value, schemas))
    if isinstance(schema, dict) and str in schema:
        return all(
            isinstance(key, str) and matches_schema(value[key], schema[str]) for key in value
        )
    if isinstance(schema, dict):
        return all(
            key in value and matches_schema(value[key], inner) for key, inner in schema.items()
        )
    if isinstance(value, bool):
        return schema is bool
    return isinstance(value, (int, float) if schema is float else schema)
