"""Mistakes of the user's or the data's making, each told in one sentence."""

import difflib
from collections.abc import Iterable


class SegkitError(Exception):
    """A clear error: the commands print its one sentence and exit with 1."""

    def __str__(self) -> str:
        # A key or a name it quotes may hold line breaks, or codes that terminals act on.
        sentence = super().__str__()
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence)


class ConfigError(SegkitError):
    """A configuration that cannot be meant."""


class DataError(SegkitError):
    """Images or labels that cannot be used."""


class CheckpointError(SegkitError):
    """A checkpoint that cannot be read, or does not fit."""


def closest(word: str, options: Iterable[str]) -> str:
    """The end of an error sentence: the nearest right word, or all of them where none is near."""
    names = sorted(options)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; expected one of: {', '.join(names)}" if names else "; nothing is allowed here"
