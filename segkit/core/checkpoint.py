"""Saving what must not be lost: atomic, verified, loaded without running code."""

import hashlib
import os
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segkit.core.errors import CheckpointError, quoted, reason
from segkit.core.files import regular, replacing

FORMAT = 1

MODEL = ("config", "classes", "model")
"""Entries that rebuild a model."""

RESUME = (
    *(*MODEL, "ema", "optimizer", "scaler", "init", "step", "seconds"),
    *("top", "bad_in_row", "bad_steps"),
)
"""Entries that an interrupted training goes on from."""

DEPTH = 64
"""Deepest nesting of lists and dicts in a file that is read."""

VALUES = 10_000_000
"""Most values in the lists and dicts of a file that is read."""

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
                if isinstance(error.__context__, OSError):  # a full disk, which torch only hints at
                    # No variable may hold it: that makes a cycle with the frames it was raised in.
                    raise OSError(
                        error.__context__.errno, error.__context__.strerror, str(path)
                    ) from None
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


def load(
    path: Path, *, mmap: bool = False, verify: bool = True, needs: Sequence[str] = ()
) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Only tensors and plain values load; code never runs.

    Args:
        path: A file written by :func:`save`.
        mmap: Map tensors instead of reading them.
        verify: Compare the file with its digest first.
        needs: Entries that it must have, such as :data:`MODEL`.

    Raises:
        CheckpointError: Missing, damaged, not a checkpoint, without one of ``needs``, with an entry
            of another kind than segkit writes, or of a newer format.
    """
    if verify:
        digest(path)
    with _readable(path):
        regular(path)
        refuse_compressed(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # what a forged file makes of the unpickler is of any type
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint ({_first(error)})"
        ) from error
    refuse_forged(state, path)
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path}: is not a checkpoint of segkit")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: has format {state['format']}, this segkit reads {FORMAT}; update segkit"
        )
    for name in needs:
        if name not in state:
            raise CheckpointError(f"{path}: has no '{name}', so it cannot be used here")
    for name, (kind, fits) in _KINDS.items():
        if name in state and not fits(state[name]):
            raise CheckpointError(f"{path}: its '{name}' is not {kind}")
    if len(state.get("iou", ())) not in (0, len(state.get("classes", ()))):
        raise CheckpointError(f"{path}: its 'iou' is not one number per class")
    return state


def load_latest(path: Path, *, needs: Sequence[str] = ()) -> dict[str, Any] | None:
    """The newest whole state under ``path``: itself, or the one kept before it with a warning.

    Args:
        path: As in :func:`load`.
        needs: As in :func:`load`.

    Returns:
        ``None`` where neither was ever written.
    """
    candidates = [file for file in (path, previous(path)) if os.path.lexists(file)]
    failures: list[CheckpointError] = []
    for candidate in candidates:
        try:
            state = load(candidate, needs=needs)
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


def check_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights that a model should not load.

    Raises:
        CheckpointError: They are of another model, or hold NaN or infinity.
    """
    check_fit(model, tensors, path)
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise CheckpointError(
                f"{path}: {quoted(name)} holds NaN or infinity; use another checkpoint"
            )


def check_fit(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights of another model; this one may be on the device ``meta``.

    Raises:
        CheckpointError: Names, shapes or types differ.
    """
    own = model.state_dict()
    advice = "they are of another model, or of another number of classes"
    for name in (*own, *tensors):
        if name not in tensors or name not in own:
            lacks = "lack" if name in own else "have"
            raise CheckpointError(f"{path}: its weights {lacks} {quoted(name)}; {advice}")
        theirs, ours = tensors[name], own[name]
        if theirs.shape != ours.shape:
            raise CheckpointError(
                f"{path}: {quoted(name)} has shape {list(theirs.shape)}, the model expects "
                f"{list(ours.shape)}; {advice}"
            )
        if theirs.is_floating_point() != ours.is_floating_point():
            raise CheckpointError(
                f"{path}: {quoted(name)} has type {theirs.dtype}, the model expects {ours.dtype}"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    if not tensor.is_floating_point():
        return True
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # 8 bits are hardly supported
    return bool(wide.isfinite().all())


def is_archive(path: Path) -> bool:
    """Whether a file is a zip archive, if a damaged one."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def refuse_compressed(path: Path) -> None:
    """Refuse an archive with compressed entries, which PyTorch would map as if they were not.

    Raises:
        CheckpointError: It has some, or is damaged.
    """
    if not is_archive(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # a damaged directory makes zipfile raise errors of many types
        raise CheckpointError(f"{path}: is a damaged archive ({_first(error)})") from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{path}: its entry {quoted(entry.filename)} is compressed, which PyTorch never "
                "does; save it with torch.save"
            )


def refuse_forged(state: Any, path: Path) -> None:
    """Refuse what no honest file holds, so that whoever walks over ``state`` comes to an end.

    Raises:
        CheckpointError: Lists or dicts without end, or tensors that are not plain values.
    """
    level, count = [("", state)], 0
    for _ in range(DEPTH):
        level = list(islice(_inside(level), VALUES + 1 - count))
        count += len(level)
        if not level:
            return
        if count > VALUES:
            raise CheckpointError(f"{path}: holds more than {VALUES:,} values; it is no checkpoint")
        for name, value in level:
            if isinstance(value, Tensor) and (odd := _odd(value)):
                raise CheckpointError(f"{path}: {quoted(name)} {odd}; expected plain dense tensors")
    raise CheckpointError(f"{path}: is nested deeper than {DEPTH} levels; it is no checkpoint")


def _inside(values: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield what the containers among ``values`` hold, by its key or by the container's name."""
    for name, value in values:
        if isinstance(value, Mapping):
            yield from ((str(key), inner) for key, inner in value.items())
        elif isinstance(value, list | tuple | set | frozenset):
            yield from ((name, inner) for inner in value)


def _odd(tensor: Tensor) -> str:
    """What keeps a tensor from being plain values in memory; empty if nothing does."""
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
        return "has more values than the file has for it"
    return ""


Check = Callable[[Any], bool]


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def _is_average(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_state(value.get("model"))
        and _is_count(value.get("updates"))
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | int | float)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and _is_json(value)


def _is_ranked(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


_KINDS: dict[str, tuple[str, Check]] = {
    "model": ("a state dict, names to tensors", _is_state),
    "ema": ("a moving average of weights", _or_none(_is_average)),
    "config": ("a configuration", _is_object),
    "soup": ("a recipe", _is_object),
    "classes": ("a list of names", _list(_is_text)),
    "trained_on": ("a list of digests", _list(_is_text)),
    "init": ("a digest", _is_text),
    "score": ("a number", _or_none(_is_number)),
    "iou": ("a list of numbers", _list(_or_none(_is_number))),
    "top": ("a list of scores and epochs", _list(_is_ranked)),
    "seconds": ("a number", _is_number),
    "pseudo_round": ("a number", _or_none(_is_count)),
    **dict.fromkeys(("fold", "epoch", "step", "bad_in_row", "bad_steps"), ("a number", _is_count)),
}
"""What the entries that segkit writes are; others are not looked at."""


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
            if is_archive(path):
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
