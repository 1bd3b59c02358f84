"""Errors caused by input, environment or data, and the one sentence that describes each."""

import difflib
import errno
import os
import re
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist

LONGEST = 300
"""Maximum number of characters of a word, such as a path, in an error sentence."""

MOST_NAMES = 200
"""Maximum number of valid names that an error sentence lists."""

LOST_RANK = (
    "another rank ended, or did not answer within train.timeout; "
    "the message of the rank that failed says why"
)
"""Message of a rank that ends because of another one."""

_GLOO = r"gloo/transport|timeout caused pair closure|Connection (closed|reset) by peer"
"""Messages of gloo when a rank is lost; its errors have no type of their own."""

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_LONG_WORD = re.compile(rf"\S{{{LONGEST + 1},}}")


class SegkitError(Exception):
    """Base class of errors with a clear message: commands print it and exit with code 1."""

    def __str__(self) -> str:
        # A quoted key or name may contain line breaks or terminal control codes.
        sentence = super().__str__()
        sentence = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence)
        return _LONG_WORD.sub(lambda word: shorten(word[0], LONGEST), sentence)


class ConfigError(SegkitError):
    """Invalid configuration."""


class DataError(SegkitError):
    """Unusable images or labels."""


class CheckpointError(SegkitError):
    """Checkpoint that cannot be read or does not match the model."""


class ArgumentError(SegkitError):
    """An error that another value of an argument avoids.

    Args:
        problem: What is wrong.
        *advice: What to do, apart from arguments.
        **arguments: For each argument, the values that avoid the error.
    """

    def __init__(self, problem: str, *advice: str, **arguments: Sequence[object]) -> None:
        self.problem, self.advice, self.arguments = problem, advice, arguments
        super().__init__(self.sentence(lambda name, value: f"{name}={value!r}"))

    def sentence(self, write: Callable[[str, object], str]) -> str:
        """Return the error as a sentence; ``write`` says how a caller gives an argument."""
        passed = [
            f"pass {write(name, value)}"
            for name, values in self.arguments.items()
            for value in values
        ]
        return f"{self.problem}; {' or '.join([*self.advice, *passed])}"


def shorten(text: str, most: int = 100) -> str:
    """Return ``text``, its middle replaced by "…" if it has more than ``most`` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def quoted(text: object) -> str:
    """Return ``text`` shortened and in quotation marks, for error sentences."""
    return f"'{shorten(str(text))}'"


def reason(error: OSError) -> str:
    """Return why a file could not be read or written; some libraries give no ``strerror``."""
    return error.strerror or " ".join(map(str, error.args)) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; empty if it has none."""
    return str(error).strip().partition("\n")[0]


def summary(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    first = first_line(error)[:LONGEST]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def explain(error: BaseException) -> str | None:
    """Return one sentence for an error that a user can fix, or ``None`` for a bug."""
    if isinstance(error, SegkitError):
        return str(error)
    if isinstance(error, OSError):
        if error.filename is not None:
            return f"{shorten(str(error.filename), LONGEST)}: {reason(error)}"
        return os.strerror(error.errno) if error.errno in _DISK_ERRORS else None
    if is_out_of_memory(error):
        return f"{memory_summary(error)}: use smaller batches, or fewer processes (data.workers)"
    if isinstance(error, RuntimeError):
        if died := re.match(r"DataLoader worker \(pid.*", str(error)):
            return (
                f"{died[0].rstrip('. ')}: most often memory ran out; lower data.workers or "
                "train.batch_size, or give a container more shared memory (/dev/shm)"
            )
        if isinstance(error, dist.DistError) or re.search(_GLOO, str(error)):
            return f"{LOST_RANK} ({summary(error)})"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if memory ran out, on the machine or on a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = r"out of memory|can't allocate memory|not enough memory|STATUS_ALLOC_FAILED"
    return isinstance(error, RuntimeError) and re.search(words, str(error)) is not None


def memory_summary(error: BaseException) -> str:
    """Return which memory ran out, and how much more was needed if the error says so."""
    text = str(error)
    where = next((kind for kind in ("CUDA", "MPS", "XPU") if kind in text), "the machine")
    needed = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    return f"{where} is out of memory" + (f" ({needed[1]} more were needed)" if needed else "")


def closest(word: str, options: Iterable[str]) -> str:
    """Return the end of an error sentence: the most similar option, or all of them if none is."""
    names = sorted(options)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {quoted(near[0])}?"
    if len(names) > MOST_NAMES:
        names = [*names[:MOST_NAMES], f"and {len(names) - MOST_NAMES} more"]
    return f"; expected one of: {', '.join(names)}" if names else "; nothing is allowed here"
