"""Renaming of a file's entries to segkit's names, and what is known of its project."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Substitutions = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""Patterns and replacements for ``re.sub``, applied to a name in this order."""

HUGGING_FACE_NORM = (
    r"^hidden_states_norms\.stage([1-4])\.",
    lambda match: f"norm{int(match[1]) - 1}.",
)
"""Substitution for the norms of feature maps in backbones of transformers."""

HUGGING_FACE_BLOCK: Substitutions = (
    (r"\.attention\.(?:\w+\.query|q_proj)\.(\w+)$", r".attn.qkv.\1/0"),
    (r"\.attention\.(?:\w+\.key|k_proj)\.(\w+)$", r".attn.qkv.\1/1"),
    (r"\.attention\.(?:\w+\.value|v_proj)\.(\w+)$", r".attn.qkv.\1/2"),
    (r"\.attention\.(?:output\.dense|o_proj|out_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
"""Names of a block of transformers on disk, and those of transformers 5 in memory."""


@dataclass(frozen=True)
class Entries:
    """Entries of a file by segkit's names.

    Args:
        tensors: Values by segkit's names.
        names: The file's name of each of them.
        ignored: Names in the file that are known to be of no backbone or decoder of segkit.
        unknown: Other names in the file.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Project:
    """The names that a project gives to a backbone or to a decoder, and how it computes.

    Args:
        title: Architecture and project, for reports.
        fits: Prefixes of the backbones' names that it may be; of a decoder, its name.
        marks: Patterns, each of the beginning of a name that the project's files have.
        names: From the project's names to segkit's, or a function that returns these for
            the entries of a file. Entries that become ``NAME/0``, ``NAME/1``, ... are concatenated
            to ``NAME``; one that becomes ``NAME|OTHER|...`` is divided into equal parts of these
            names, and parts of one name are concatenated.
        ours: Pattern of the names that may result.
        ignored: Pattern of other names in the project's files, such as a classifier's head.
        convert: Converts a tensor, given its new name.
        unbiased: Pattern of the new names of weights whose bias, 0, the files do not have.
        settings: Attributes of a model that computes as the project does, where the names tell.
        unrecorded: The same where no name tells, and what the project's files were made with.
        differences: Sentences on what the project computes differently, which no setting changes.
        caveats: Sentences on other files of backbones that have the same names.
        prefix: Of a decoder: prefix of the backbone's names beside it.
        reason: Of a decoder: why segkit has none, if ``fits`` is empty.
    """

    title: str
    fits: tuple[str, ...]
    marks: tuple[str, ...] = ()
    names: Substitutions | Callable[[State], Substitutions] = ()
    ours: str = r"decoder\."
    ignored: str = "(?!)"
    convert: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
    unbiased: str = "(?!)"
    settings: Mapping[str, Any] = field(default_factory=dict)
    unrecorded: Mapping[str, str] = field(default_factory=dict)
    differences: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()
    prefix: str = "backbone."
    reason: str = ""

    def rename(self, state: State, *, prefix: str = "") -> Entries:
        """Return the entries by segkit's names; ``prefix`` was removed from the file's names."""
        parts: dict[str, dict[str, str]] = {}
        rest = []
        rules = self.names(state) if callable(self.names) else self.names
        for theirs in state:
            new = theirs
            for pattern, replacement in rules:
                new = re.sub(pattern, replacement, new)
            ours, _, part = new.partition("/")
            if re.match(self.ours, ours) and part not in parts.get(ours, ()):
                parts.setdefault(ours, {})[part] = theirs
            else:
                rest.append(theirs)
        tensors, origins = {}, {}
        for ours, names in parts.items():
            joined = _join([state[names[part]] for part in sorted(names)])
            several = ours.split("|")
            pieces = joined.chunk(len(several)) if len(several) > 1 else [joined]
            for name in dict.fromkeys(several):
                own = [x for other, x in zip(several, pieces, strict=False) if other == name]
                tensors[name] = self.convert(name, _join(own))
                origins[name] = prefix + [*names.values()][-1]
        for weight in [name for name in tensors if re.fullmatch(self.unbiased, name)]:
            bias = weight.removesuffix("weight") + "bias"
            tensors[bias] = tensors[weight].new_zeros(tensors[weight].shape[:1])
            origins[bias] = origins[weight]
        ignored = [name for name in rest if re.match(self.ignored, name)]
        return Entries(
            tensors,
            origins,
            ignored=tuple(prefix + name for name in ignored),
            unknown=tuple(prefix + name for name in rest if name not in ignored),
        )


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def has(state: State, *patterns: str) -> bool:
    """Return True if each pattern matches the beginning of some name."""
    return all(any(re.match(pattern, name) for name in state) for pattern in patterns)


def first_project(projects: Iterable[Project], state: State) -> Project | None:
    """Return the first project all of whose marks are in the names."""
    return next((project for project in projects if has(state, *project.marks)), None)
