"""Safety of files of unknown origin: bounded sizes, plain tensors, nothing compressed."""

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segkit.core.errors import CheckpointError, first_line, quoted

DEPTH = 64
"""Maximum nesting depth of lists and dicts in a file that is read."""

VALUES = 10_000_000
"""Maximum number of values in the lists and dicts of a file that is read."""


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor contains neither NaN nor infinity."""
    if not tensor.is_floating_point():
        return True
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # for 8-bit floats
    return bool(wide.isfinite().all())


def is_archive(path: Path) -> bool:
    """Return whether a file is a zip archive, intact or damaged."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def refuse_compressed(path: Path) -> None:
    """Check that no entry of an archive is compressed: PyTorch would map its bytes unread.

    Raises:
        CheckpointError: An entry is compressed, or the archive is damaged.
    """
    if not is_archive(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # a damaged directory makes zipfile raise errors of many types
        raise CheckpointError(f"{path}: is a damaged archive ({first_line(error):.200})") from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{path}: its entry {quoted(entry.filename)} is compressed, which PyTorch never "
                "does; save it with torch.save"
            )


def refuse_forged(state: Any, path: Path) -> None:
    """Check that ``state`` has a bounded size and plain tensors, so that it is safe to iterate.

    Raises:
        CheckpointError: ``state`` is nested too deeply (or in itself), has too many values, or has
            tensors that are not plain dense values.
    """
    level, count = [("", state)], 0
    for _ in range(DEPTH):
        level = list(islice(_inside(level), VALUES + 1 - count))
        count += len(level)
        if not level:
            return
        if count > VALUES:
            raise CheckpointError(
                f"{path}: has more than {VALUES:,} values; it is not a checkpoint"
            )
        for name, value in level:
            if isinstance(value, Tensor) and (odd := _odd(value)):
                raise CheckpointError(f"{path}: {quoted(name)} {odd}; expected plain dense tensors")
    raise CheckpointError(f"{path}: is nested deeper than {DEPTH} levels; it is not a checkpoint")


def _inside(values: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield the items of the containers in ``values``, named by key or by the container's name."""
    for name, value in values:
        if isinstance(value, Mapping):
            yield from ((str(key), inner) for key, inner in value.items())
        elif isinstance(value, list | tuple | set | frozenset):
            yield from ((name, inner) for inner in value)


def _odd(tensor: Tensor) -> str:
    """Return why a tensor is not a plain dense tensor; an empty string if it is one."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is a {type(tensor).__name__}"
    if tensor.is_nested:
        return "is a nested tensor"
    if tensor.layout is not torch.strided:
        return "is a sparse tensor"
    if tensor.is_quantized:
        return "is a quantized tensor"
    if tensor.is_meta:
        return "has no values (device meta)"
    if tensor.is_complex():
        return "is a complex tensor"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "is larger than its data in the file"
    return ""
