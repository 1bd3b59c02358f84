"""Recognition of a file of weights by the names in it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from segkit.core import checkpoint
from segkit.core.config import build, parse
from segkit.core.errors import CheckpointError, SegkitError
from segkit.models.backbones import BACKBONES
from segkit.models.decoders import DECODERS
from segkit.models.pretrained import beit, convnets, mit, swin, vit
from segkit.models.pretrained.decoders import ALONE, OWN, PREFIXED, WHOLE_MODELS
from segkit.models.pretrained.names import Entries, Project, State, first_project

_CLASSIFIER = re.compile(
    r"(?:decoder\.|decode_head\.)?"
    r"(?:head|head\.fc|fc|_fc|last_linear|conv_seg|classifier(?:\.\d)?)\.weight"
)

_FAMILIES = swin, mit, vit, beit, convnets

SETTINGS = {
    "backbone": ("output_stride", "contract_dilation", "like", "upsampling", "align_corners"),
    "decoder": ("align_corners", "rates", "bins", "average", "pruned", "heads", "level_norms"),
}
"""Attributes of backbones and decoders that change what they compute with the same weights."""


@dataclass(frozen=True)
class Weights:
    """The weights in a file by segkit's names, and what is known of the model they are from.

    Args:
        title: Architecture and project, for reports.
        backbones: Prefixes of the names in ``BACKBONES`` that it may be.
        decoder: The name in ``DECODERS``; empty for any of segkit's own, ``None`` for no decoder,
            or one of another structure than segkit's.
        reason: Why there is no decoder.
        backbone: Entries of the backbone, their names without a prefix.
        head: Entries of the decoder, their names with the prefix ``decoder.``.
        settings: Attributes of a model that computes what the file's project computes.
        unrecorded: Attributes that the file does not tell, and what its project's files have.
        differences: What the project computes differently, or may.
        classes: Number of classes of its classifier, if it has one.
    """

    title: str
    backbones: tuple[str, ...]
    decoder: str | None
    reason: str
    backbone: Entries
    head: Entries
    settings: Mapping[str, Any]
    unrecorded: Mapping[str, str]
    differences: tuple[str, ...]
    classes: int | None


def recognize(state: State, *, source: str) -> Weights:
    """Return the weights of a file by segkit's names.

    Raises:
        CheckpointError: If no architecture of segkit has these names.
    """
    decoder = first_project((*WHOLE_MODELS, PREFIXED), state) or ALONE
    inside = {name for name in state if decoder.prefix and name.startswith(decoder.prefix)}
    head = decoder.rename({name: state[name] for name in state if name not in inside})
    if not decoder.prefix:  # all that is not of the decoder
        inside = set(head.unknown)
        head = replace(head, unknown=())
    trunk = {name.removeprefix(decoder.prefix): state[name] for name in state if name in inside}
    project = Project("", ("",), ours="") if decoder is OWN else _backbone(trunk)
    if project is None:
        raise CheckpointError(
            f"{source}: its names ('{next(iter(state))}', ...) are of no backbone that segkit "
            "knows; docs/weights.md lists those"
        )
    try:
        backbone = project.rename(trunk, prefix=decoder.prefix)
    except (RuntimeError, IndexError) as error:  # in the conversion of a tensor of another shape
        raise CheckpointError(f"{source}: has shapes that are of no {project.title}") from error
    settings = {**decoder.settings, **project.settings}
    unrecorded = {**project.unrecorded, **decoder.unrecorded}
    caveats = () if decoder.title else project.caveats
    return Weights(
        title=", ".join(title for title in (decoder.title, project.title) if title),
        backbones=project.fits,
        decoder=decoder.fits[0] if decoder.fits else None,
        reason=decoder.reason,
        backbone=backbone,
        head=head,
        settings=settings,
        unrecorded={path: why for path, why in unrecorded.items() if path not in settings},
        differences=(*decoder.differences, *project.differences, *caveats),
        classes=_classes(head.tensors or state),
    )


def _backbone(state: State) -> Project | None:
    return first_project((project for family in _FAMILIES for project in family.PROJECTS), state)


def _classes(state: State) -> int | None:
    if (head := state.get("decoder.class_head.weight")) is not None:
        return head.shape[0] - 1  # without "no object"
    heads = [x for name, x in state.items() if _CLASSIFIER.fullmatch(name) and x.ndim > 1]
    return heads[-1].shape[0] if heads else None


def recorded_settings(path: Path) -> dict[str, Any] | None:
    """Return the :data:`SETTINGS` of the model of a checkpoint of segkit.

    Returns:
        ``None`` if the file has no configuration, or an invalid one.
    """
    if checkpoint.stored_digest(path) is None:
        return None
    state = checkpoint.load(path, mmap=True, verify=False)
    parts = {}
    try:
        config = parse(state["config"], str(path)).model
        with torch.random.fork_rng(devices=()), torch.device("meta"):
            backbone = parts["backbone"] = build(BACKBONES, config.backbone, "backbone")
            shape = {"channels": backbone.channels, "strides": backbone.strides, "num_classes": 2}
            parts["decoder"] = build(DECODERS, config.decoder, "decoder", **shape)
    except (KeyError, TypeError, AttributeError, SegkitError):
        return None
    values = {
        f"{part}.{name}": getattr(parts[part], name, None)
        for part, names in SETTINGS.items()
        for name in names
    }
    return {path: value for path, value in values.items() if value is not None}
