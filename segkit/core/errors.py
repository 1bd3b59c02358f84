"""Mistakes of the user's or the data's making, each told in one sentence."""

import difflib
import re
from collections.abc import Iterable

LONGEST = 300
"""Characters of a word, such as a path, that an error sentence shows."""

MOST_NAMES = 200
"""Right words that an error sentence lists."""

_LONG_WORD = re.compile(rf"\S{{{LONGEST + 1},}}")


class SegkitError(Exception):
    """A clear error: the commands print its one sentence and exit with 1."""

    def __str__(self) -> str:
        # A key or a name it quotes may hold line breaks, or codes that terminals act on.
        sentence = super().__str__()
        sentence = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence)
        return _LONG_WORD.sub(lambda word: shorten(word[0], LONGEST), sentence)


class ConfigError(SegkitError):
    """A configuration that cannot be meant."""


class DataError(SegkitError):
    """Images or labels that cannot be used."""


class CheckpointError(SegkitError):
    """A checkpoint that cannot be read, or does not fit."""


def shorten(text: str, most: int = 100) -> str:
    """Return a user's text without its middle if it has more than ``most`` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def quoted(text: object) -> str:
    """Return a user's text as error sentences quote it: in quotation marks, shortened."""
    return f"'{shorten(str(text))}'"


def reason(error: OSError) -> str:
    """Return why a file could not be read or written; some libraries give no ``strerror``."""
    return error.strerror or " ".join(map(str, error.args)) or type(error).__name__


def describe(error: BaseException) -> str:
    """Return any error as a line of text."""
    if isinstance(error, OSError):
        return ": ".join(filter(None, [str(error.filename or ""), reason(error)]))
    first = str(error).strip().split("\n")[0]
    if isinstance(error, SegkitError):
        return first
    return shorten(f"{type(error).__name__}: {first}", LONGEST)


def closest(word: str, options: Iterable[str]) -> str:
    """The end of an error sentence: the nearest right word, or all of them where none is near."""
    names = sorted(options)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {quoted(near[0])}?"
    if len(names) > MOST_NAMES:
        names = [*names[:MOST_NAMES], f"and {len(names) - MOST_NAMES} more"]
    return f"; expected one of: {', '.join(names)}" if names else "; nothing is allowed here"
