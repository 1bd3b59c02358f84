"""The safetensors format: header length, JSON header of types, shapes and offsets, then data."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segkit.core.errors import CheckpointError, quoted, shorten
from segkit.core.files import require_regular_file, unique_keys

_LONGEST_HEADER = 1 << 23
"""In bytes, for about 50,000 tensors. The format allows 100 MB, which need gigabytes of memory."""

_MOST_AXES = 64
"""Maximum number of axes of a tensor in PyTorch."""

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the names and tensors of a file; tensors are mapped into memory.

    https://huggingface.co/docs/safetensors. Nothing in the file is trusted: every tensor must lie
    inside it, be as long as its shape says, and begin where the previous one ends.

    Raises:
        CheckpointError: If the header is invalid.
        OSError: If the file cannot be opened.
    """
    size = require_regular_file(path).stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise _damaged(path, f"its header would be {length} bytes long in a file of {size}")
        if length > _LONGEST_HEADER:
            raise CheckpointError(
                f"{path}: has a header of {length:,} bytes; expected at most {_LONGEST_HEADER:,}"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    start = end = 8 + length
    for name, (_, _, first, last) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if start + first != end:
            raise _damaged(path, f"{quoted(name)} does not begin where the tensor before it ends")
        end = start + last
    if end != size:
        raise _damaged(path, f"its tensors end at byte {end} of {size}")
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return {
        name: _view(data[start + first : start + last], dtype).reshape(shape)
        for name, (dtype, shape, first, last) in entries.items()
    }


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    """Return type, shape, first byte and end of a tensor, checked."""
    if not isinstance(entry, dict) or {"dtype", "shape", "data_offsets"} - entry.keys():
        raise _damaged(path, f"{quoted(name)} lacks its dtype, shape or data_offsets")
    known = entry["dtype"] if isinstance(entry["dtype"], str) else ""
    if (dtype := _TYPES.get(known)) is None:
        raise CheckpointError(
            f"{path}: {quoted(name)} has dtype {quoted(known)}; expected one of: "
            f"{', '.join(_TYPES)}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"the shape or data_offsets of {quoted(name)} are not whole numbers")
    if len(shape) > _MOST_AXES:
        raise CheckpointError(f"{path}: {quoted(name)} has {len(shape)} axes")
    first, last = offsets
    if last - first != math.prod(shape) * dtype.itemsize:
        have = shorten(str(last - first))
        raise _damaged(path, f"{quoted(name)} has {have} bytes for the shape {shorten(str(shape))}")
    # A side of 0 makes the product 0, whatever the others are.
    if math.prod(max(side, 1) for side in shape) >= 2**62:
        raise CheckpointError(f"{path}: {quoted(name)} has the shape {shorten(str(shape))}")
    return dtype, shape, first, last


def _is_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(x) is int and x >= 0 for x in values)


def _view(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Return bytes as numbers; bytes that are not aligned are copied first."""
    return (data.clone() if data.storage_offset() % dtype.itemsize else data).view(dtype)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: is not a whole safetensors file ({why}); download it again")
