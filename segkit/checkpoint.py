"""Saving what must not be lost: atomic, verified, loaded without running code."""

import hashlib
import os
import shutil
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segkit.errors import CheckpointError, reason
from segkit.files import regular, replacing

FORMAT = 1
_COMMENT = b"sha256:"
_TAIL = 2 + len(_COMMENT) + 64


def save(state: Mapping[str, Any], path: Path, *, keep_previous: bool = False) -> None:
    """Write a checkpoint so that a kill at any moment leaves a whole file under ``path``.

    It is written to a temporary name, given its own SHA-256 as the zip archive's comment, flushed
    to the disk and renamed; then the folder is flushed.

    Args:
        state: Tensors and Python scalars, strings, lists and dicts; nothing else loads back.
        path: Where it goes.
        keep_previous: The file already there stays, as ``*.previous.pt``, for :func:`load_latest`.
    """
    with replacing(path, durable=True) as draft:
        with draft.open("wb") as file:
            try:
                torch.save({"format": FORMAT, **state}, file)
            except RuntimeError as error:
                cause = error.__context__
                if isinstance(cause, OSError):  # a full disk, which torch only hints at
                    raise OSError(cause.errno, cause.strerror, str(path)) from None
                raise
        found = hashlib.sha256()
        with draft.open("r+b") as file:
            length = file.seek(0, os.SEEK_END) - 2  # the last two bytes are the comment's length
            file.seek(0)
            _feed(found, file, length)
            comment = _COMMENT + found.hexdigest().encode()
            file.seek(length)
            file.write(struct.pack("<H", len(comment)) + comment)
        if keep_previous and path.exists():
            link(path, previous(path))


def load(path: Path, *, mmap: bool = False, verify: bool = True) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Only tensors and plain values load; code never runs.

    Args:
        path: A file written by :func:`save`.
        mmap: Map tensors instead of reading them.
        verify: Compare the file with its digest first.

    Raises:
        CheckpointError: Missing, damaged, not a checkpoint, or of a newer format.
    """
    if verify:
        digest(path)
    with _readable(path):
        regular(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # what a forged file makes of the unpickler is of any type
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint ({_first(error)})"
        ) from error
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path}: is not a checkpoint of segkit")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: has format {state['format']}, this segkit reads {FORMAT}; update segkit"
        )
    return state


def load_latest(path: Path) -> dict[str, Any] | None:
    """The newest whole state under ``path``: itself, or the one kept before it with a warning.

    Returns:
        ``None`` where neither was ever written.
    """
    candidates = [file for file in (path, previous(path)) if os.path.lexists(file)]
    failures: list[CheckpointError] = []
    for candidate in candidates:
        try:
            state = load(candidate)
        except CheckpointError as error:
            failures.append(error)
            continue
        for failure in failures:
            warnings.warn(f"{failure}; going on from {candidate.name}", stacklevel=2)
        return state
    if failures:
        raise CheckpointError("; ".join(map(str, failures)))
    return None


def link(path: Path, name: Path) -> None:
    """Give a checkpoint a second name; a copy of it where the disk has no links."""
    with replacing(name, durable=True) as draft:
        draft.unlink(missing_ok=True)
        try:
            os.link(path, draft)
        except OSError:  # this file system has no hard links
            shutil.copyfile(path, draft)


def digest_tensors(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values of a state dict, in hexadecimal."""
    found = hashlib.sha256()
    for name, tensor in state.items():
        found.update(name.encode())
        values = tensor.detach().cpu().contiguous().view(-1)
        found.update(values.view(torch.uint8).numpy().data)
    return found.hexdigest()


def previous(path: Path) -> Path:
    """Where :func:`save` keeps the state before the newest."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What predicts in a checkpoint: the moving average of the weights where it holds one."""
    average = state.get("ema")
    return state["model"] if average is None else average["model"]


def stored_digest(path: Path) -> str | None:
    """The SHA-256 that a file ends with where :func:`save` wrote it; ``None`` in other files."""
    with regular(path).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        end = file.read()
    if len(end) < _TAIL or not end[2:].startswith(_COMMENT):
        return None
    return end[2 + len(_COMMENT) :].decode("ascii", errors="replace")


def digest(path: Path) -> str:
    """The SHA-256 that a checkpoint carries, in hexadecimal, once its bytes were found to match.

    Raises:
        CheckpointError: The file is missing or damaged, or carries none.
    """
    with _readable(path):
        expected = stored_digest(path)
        if expected is None:
            if zipfile.is_zipfile(path):
                raise CheckpointError(f"{path}: carries no digest; segkit did not write it")
            raise CheckpointError(f"{path}: is damaged or not a checkpoint")
        found = hashlib.sha256()
        with path.open("rb") as file:
            _feed(found, file, path.stat().st_size - _TAIL)
    if found.hexdigest() != expected:
        raise CheckpointError(f"{path}: is damaged (its bytes do not match its digest)")
    return expected


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn an OSError of the file system into a CheckpointError."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)})") from error


def _feed(digest: Any, file: Any, length: int) -> None:
    while length > 0:
        block = file.read(min(length, 1 << 22))
        if not block:
            return
        digest.update(block)
        length -= len(block)


def _first(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
