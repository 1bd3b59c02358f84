"""How a project names the entries of its files, as rules that turn them into this project's."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Rule = tuple[str, str | Callable[[re.Match[str]], str]]


HUGGING_FACE_NORMS: Rule = (
    r"hidden_states_norms\.stage([1-4])\.(\w+)",
    lambda match: f"norm{int(match[1]) - 1}.{match[2]}",
)
"""The norms of a backbone's feature maps by the names of transformers."""


@dataclass(frozen=True)
class Naming:
    """The names that a project gives to a backbone, or to a whole model around one.

    Args:
        title: What such a file is, for people.
        builds: Beginnings of the names, in ``BACKBONES`` or ``DECODERS``, of what this can be.
        signature: Patterns that each match an entry of every such file.
        rules: Patterns of whole names, and what they become; the first that fits counts. Several
            entries that become ``NAME/0``, ``NAME/1``, ... are parts of NAME, one below the other.
        beyond: A pattern of the names that no rule needs to fit, such as a classifier's head.
        before: Prepares names that depend on each other.
        after: Turns tensors, under their new names, into what is kept under these names here.
        settings: The model's attributes with which it computes what the file's own project
            computes, from the entries.
        untold: The model's attributes that change what it computes and that no entry tells, and
            what the project's files were made with.
        differs: Sentences on what the project computes otherwise, which no setting changes.
        doubts: Sentences on other files with the same names, where the file is a backbone alone.
    """

    title: str
    builds: tuple[str, ...]
    signature: tuple[str, ...]
    rules: tuple[Rule, ...] = ((r".*", r"\g<0>"),)
    beyond: str = r"(?!)"
    before: Callable[[State], State] = lambda state: state
    after: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
    settings: Callable[[State], dict[str, Any]] = lambda state: {}
    untold: Mapping[str, str] = field(default_factory=dict)
    differs: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    def describes(self, state: State) -> bool:
        """Whether every pattern of the signature matches the beginning of an entry's name."""
        return all(any(re.match(one, name) for name in state) for one in self.signature)

    def rename(self, state: State, *, prefix: str = "") -> "Renamed":
        """Apply the rules.

        Args:
            state: Names, without their prefix, to tensors.
            prefix: For what is told of the file's names.
        """
        names: dict[str, str] = {}
        parts: dict[str, dict[int, Tensor]] = {}
        left = []
        prepared = self.before(state)
        for theirs, (name, tensor) in zip(state, prepared.items(), strict=True):
            ours, _, part = (self._ours(name) or "").partition("/")
            place = int(part or 0)
            if not ours or place in parts.get(ours, {}):  # no rule, or the second for one place
                left.append(theirs)
                continue
            names[ours] = prefix + theirs
            parts.setdefault(ours, {})[place] = tensor
        tensors = {}
        for ours, found in parts.items():
            first, *more = (found[place] for place in sorted(found))
            tensors[ours] = self.after(ours, torch.cat([first, *more]) if more else first)
        known = [name for name in left if re.match(self.beyond, name)]
        return Renamed(
            tensors,
            names,
            beyond=tuple(prefix + name for name in known),
            unknown=tuple(prefix + name for name in left if name not in known),
        )

    def _ours(self, name: str) -> str | None:
        for pattern, becomes in self.rules:
            if match := re.fullmatch(pattern, name):
                return match.expand(becomes) if isinstance(becomes, str) else becomes(match)
        return None


@dataclass(frozen=True)
class Renamed:
    """What the rules made of a file.

    Args:
        tensors: By the names they have here.
        names: From these to the file's.
        beyond: Entries that have no place in a backbone or decoder of segkit, as is known.
        unknown: Entries that no rule expected.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    beyond: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
