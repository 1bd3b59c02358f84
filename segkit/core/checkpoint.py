"""Checkpoint files: written atomically, verified by a digest, loaded without running code."""

import hashlib
import os
import shutil
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from segkit.core import untrusted
from segkit.core.errors import CheckpointError, first_line, quoted, reason
from segkit.core.files import atomic_write, matches_schema, require_regular_file

FORMAT = 1

MODEL = ("config", "classes", "model")
"""Entries needed to rebuild a model."""

RESUME = (
    *(*MODEL, "ema", "optimizer", "scaler", "init", "step", "seconds"),
    *("top", "bad_in_row", "bad_steps"),
)
"""Entries needed to resume training."""

_DOWN = ".lora.down"
_COMMENT = b"sha256:"
_TAIL = 2 + len(_COMMENT) + 64
_LARGE = 1 << 20  # bytes of a block that is worth another thread
_FLUSHED = 1 << 28  # bytes after which a file is flushed while it is written


def save(state: Mapping[str, Any], path: Path, *, keep_previous: bool = False) -> None:
    """Write a checkpoint atomically: a kill at any moment leaves a complete file at ``path``.

    The file is written under a temporary name; its SHA-256, computed meanwhile, is added as the zip
    archive's comment; it is flushed to disk and renamed; then the folder is flushed.

    Args:
        state: Tensors and Python scalars, strings, lists and dicts; nothing else can be loaded.
        keep_previous: Keep an existing file as ``*.previous.pt``, for :func:`load_latest`.
    """
    with atomic_write(path, durable=True) as draft:
        with draft.open("wb") as file, _HashedFile(file) as hashed:
            try:
                torch.save({"format": FORMAT, **state}, hashed)  # type: ignore[arg-type]
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # such as a full disk
                    # Not bound to a variable: that would create a reference cycle with the frames.
                    raise OSError(
                        error.__context__.errno, error.__context__.strerror, str(path)
                    ) from None
                raise
            comment = _COMMENT + hashed.sha256.hexdigest().encode()
            file.seek(-2, os.SEEK_END)  # the comment's length
            file.write(struct.pack("<H", len(comment)) + comment)
        if keep_previous and path.exists():
            link(path, previous(path))


class _HashedFile:
    """Writes to a file and computes the SHA-256 of all bytes except for the last two.

    Large blocks are hashed by another thread while they are written, and a third one flushes what
    is written to the disk.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.sha256 = hashlib.sha256()
        self._file, self._last, self._unflushed = file, b"", 0
        self._pool, self._flusher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write bytes, of which the last two are hashed by the next call."""
        kept = (self._last + bytes(data[-2:]))[-2:]
        if len(data) < _LARGE:
            self.sha256.update((self._last + bytes(data))[:-2])
            self._file.write(data)
        else:
            self.sha256.update(self._last)
            hashing = self._pool.submit(self.sha256.update, data[:-2])
            try:
                self._file.write(data)
            finally:
                wait([hashing])  # the memory is valid only during this call
        self._last = kept
        self._unflushed += len(data)
        if self._unflushed > _FLUSHED:
            self._unflushed = 0
            self._finish_flushing()
            self._flushing = self._flusher.submit(os.fsync, self._file.fileno())
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def __enter__(self) -> "_HashedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._flusher.shutdown()
        self._finish_flushing()

    def _finish_flushing(self) -> None:
        """Raise the error of the last flush, which a later one would not report again."""
        if self._flushing is not None:
            self._flushing.result()


def load(
    path: Path, *, mmap: bool = False, verify: bool = True, needs: Sequence[str] = ()
) -> dict[str, Any]:
    """Load a checkpoint onto the CPU. Only tensors and plain values are loaded; no code runs.

    Args:
        path: A file written by :func:`save`.
        mmap: Map tensors instead of reading them.
        verify: Compare the file with its digest first.
        needs: Required entries, such as :data:`MODEL`.

    Raises:
        CheckpointError: The file is missing, damaged, not a checkpoint or of a newer format, lacks
            one of ``needs``, or has an entry of the wrong type.
    """
    if verify:
        digest(path)
    with _readable(path):
        require_regular_file(path)
        untrusted.refuse_compressed(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a forged file can make the unpickler raise any type
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint ({first_line(error):.200})"
        ) from error
    untrusted.refuse_forged(state, path)
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path}: is not a checkpoint of segkit")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: has format {state['format']}, this segkit reads {FORMAT}; update segkit"
        )
    for name in needs:
        if name not in state:
            raise CheckpointError(f"{path}: has no '{name}', so it cannot be used here")
    _check_entries(state, path)
    return state


def entries(path: Path, needs: Sequence[str] = MODEL) -> dict[str, Any]:
    """Return a checkpoint's entries, its tensors left in the file until they are used.

    The file is not verified, so that this is fast: :func:`digest` does that, once.
    """
    return load(path, mmap=True, verify=False, needs=needs)


def load_latest(path: Path, *, needs: Sequence[str] = ()) -> dict[str, Any] | None:
    """Load ``path``; if it is damaged, warn and load the file that ``keep_previous`` kept.

    Return ``None`` if neither file exists.
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
    """Give a checkpoint a second name: a hard link, or a copy where links are not supported."""
    with atomic_write(name, durable=True) as draft:
        draft.unlink(missing_ok=True)
        try:
            os.link(path, draft)
        except OSError:  # no hard links on this file system
            shutil.copyfile(path, draft)


def digest_tensors(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names and values of a state dict, in hexadecimal."""
    sha256 = hashlib.sha256()
    for name, tensor in state.items():
        sha256.update(name.encode())
        values = tensor.detach().cpu().contiguous().view(-1)
        sha256.update(values.view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def previous(path: Path) -> Path:
    """Return the path where :func:`save` keeps the checkpoint before the newest."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def weights(state: Mapping[str, Any], name: str = "ema") -> dict[str, Tensor]:
    """Return the weights to predict with: the average ``name`` if the checkpoint has it.

    Low-rank updates are merged into the weights.
    """
    average = state.get(name)
    return merged(state["model"] if average is None else average["model"])


def merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the updates of :mod:`segkit.models.lora` added to the weights.

    Entries that are no update of a weight of their shape are left as they are.
    """
    result = dict(tensors)
    for layer in [name.removesuffix(_DOWN) for name in tensors if name.endswith(_DOWN)]:
        keys = [f"{layer}.lora.{part}" for part in ("up", "down", "scale")]
        if not {f"{layer}.weight", *keys} <= set(tensors):
            continue
        weight, up, down, scale = (tensors[key] for key in (f"{layer}.weight", *keys))
        fits = up.ndim == down.ndim == 2 and scale.ndim == 0 and len(down) == up.shape[1]
        if fits and weight.shape == (len(up), down.shape[1]):
            product = scale.double() * (up.double() @ down.double())
            result[f"{layer}.weight"] = (weight.double() + product).to(weight.dtype)
            for key in keys:
                del result[key]
    return result if len(result) < len(tensors) else tensors


def check_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check that weights match a model and are finite.

    Raises:
        CheckpointError: They are of another model, or contain NaN or infinity.
    """
    check_fit(model, tensors, path)
    for name, tensor in tensors.items():
        if not untrusted.is_finite(tensor):
            raise CheckpointError(
                f"{path}: {quoted(name)} holds NaN or infinity; use another checkpoint"
            )


def check_fit(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check that weights match a model, which may be on the device ``meta``.

    Raises:
        CheckpointError: Names, shapes or types differ.
    """
    own = model.state_dict()
    advice = "they are of another model, or of another number of classes"
    for name in (*own, *tensors):
        if name not in tensors or name not in own:
            lacks = "lack" if name in own else "have"
            raise CheckpointError(f"{path}: its weights {lacks} {quoted(name)}; {advice}")
        tensor, expected = tensors[name], own[name]
        if tensor.shape != expected.shape:
            raise CheckpointError(
                f"{path}: {quoted(name)} has shape {list(tensor.shape)}, the model expects "
                f"{list(expected.shape)}; {advice}"
            )
        if tensor.is_floating_point() != expected.is_floating_point():
            raise CheckpointError(
                f"{path}: {quoted(name)} has type {tensor.dtype}, the model expects "
                f"{expected.dtype}"
            )


_COUNTS = ("fold", "epoch", "step", "bad_in_row", "bad_steps")
_SCHEMAS: dict[str, tuple[str, Any]] = {
    "model": ("a state dict, names to tensors", {str: Tensor}),
    "ema": ("a moving average of weights", ({"model": {str: Tensor}, "updates": int}, None)),
    "window": ("a mean of weights", ({"model": {str: Tensor}, "updates": int, "end": int}, None)),
    "average": ("the name of an average", str),
    "config": ("a configuration", {str: Any}),
    "soup": ("a recipe", {str: Any}),
    "classes": ("a list of names", [str]),
    "trained_on": ("a list of digests", [str]),
    "teacher": ("a list of digests", [str]),
    "init": ("a digest", str),
    "score": ("a number", (float, None)),
    "iou": ("a list of numbers", [(float, None)]),
    "mean": ("a list of numbers", [float]),
    "std": ("a list of numbers", [float]),
    "top": ("a list of scores and epochs", [[float, float]]),
    "seconds": ("a number", float),
    "pseudo_round": ("a number", (int, None)),
    **dict.fromkeys(_COUNTS, ("a number", int)),
}
"""Description and schema of each entry that segkit writes; other entries are ignored."""


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | int | float)


def _check_entries(state: Mapping[str, Any], path: Path) -> None:
    """Raise a CheckpointError for an entry of the wrong type."""
    for name, (kind, schema) in _SCHEMAS.items():
        value = state.get(name)
        fitting = name not in state or matches_schema(value, schema)
        if name in ("config", "soup"):
            fitting = fitting and _is_json(value)
        if not fitting or (isinstance(value, int) and value < 0):
            raise CheckpointError(f"{path}: its '{name}' is not {kind}")
    if len(state.get("iou", ())) not in (0, len(state.get("classes", ()))):
        raise CheckpointError(f"{path}: its 'iou' is not one number per class")


def stored_digest(path: Path) -> str | None:
    """Return the SHA-256 that :func:`save` stored at the end of a file, or ``None``."""
    with require_regular_file(path).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        end = file.read()
    if len(end) < _TAIL or not end[2:].startswith(_COMMENT):
        return None
    return end[2 + len(_COMMENT) :].decode("ascii", errors="replace")


def digest(path: Path) -> str:
    """Verify a checkpoint against its stored SHA-256 and return the digest, in hexadecimal.

    Raises:
        CheckpointError: The file is missing or damaged, or has no digest.
    """
    with _readable(path):
        expected = stored_digest(path)
        if expected is None:
            if untrusted.is_archive(path):
                raise CheckpointError(f"{path}: has no digest; segkit did not write it")
            raise CheckpointError(f"{path}: is damaged or not a checkpoint")
        sha256 = hashlib.sha256()
        left = path.stat().st_size - _TAIL
        with path.open("rb") as file:
            while block := file.read(min(left, 1 << 22)):
                sha256.update(block)
                left -= len(block)
    if sha256.hexdigest() != expected:
        raise CheckpointError(f"{path}: is damaged (its bytes do not match its digest)")
    return expected


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Convert an OSError into a CheckpointError."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)})") from error
