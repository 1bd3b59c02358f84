"""What a run's checkpoint was trained with, of what its weights do not tell."""

from pathlib import Path
from typing import Any

import torch

from segkit.core import checkpoint
from segkit.core.config import build, parse
from segkit.core.errors import SegkitError
from segkit.models.backbones import BACKBONES
from segkit.models.decoders import DECODERS

SETTINGS = {
    "backbone": (
        "output_stride",
        "contract_dilation",
        "like",
        "upsampling",
        "align_corners",
    ),
    "decoder": ("align_corners", "rates", "bins", "average", "pruned"),
}
"""Attributes of backbones and decoders that change what they compute, with the same weights."""


def trained_with(path: Path) -> dict[str, Any] | None:
    """The :data:`SETTINGS` of the model in a checkpoint of segkit.

    Returns:
        ``None`` where the file has no configuration, or one that this segkit does not have.
    """
    if checkpoint.stored_digest(path) is None:
        return None
    state = checkpoint.load(path, mmap=True, verify=False)
    try:
        config = parse(state["config"], str(path)).model
        with torch.random.fork_rng(devices=()), torch.device("meta"):
            backbone = build(BACKBONES, config.backbone, "model.backbone")
            decoder = build(
                DECODERS,
                config.decoder,
                "model.decoder",
                channels=backbone.channels,
                strides=backbone.strides,
                num_classes=2,
            )
    except (KeyError, TypeError, AttributeError, SegkitError):
        return None
    parts = {"backbone": backbone, "decoder": decoder}
    return {
        f"{part}.{name}": getattr(parts[part], name)
        for part, names in SETTINGS.items()
        for name in names
        if getattr(parts[part], name, None) is not None
    }
