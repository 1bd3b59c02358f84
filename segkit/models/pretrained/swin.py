"""Swin Transformers by the names of Microsoft, timm, mmsegmentation and transformers."""

import re
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from segkit.models.pretrained.names import (
    HUGGING_FACE_BLOCK,
    HUGGING_FACE_NORM,
    Project,
    Substitutions,
)

_SHIFTS = (
    "its project shifts windows along a side that a single window covers, this model does not: "
    "outputs differ for images with a side of at most 32 times the window"
)
# The names of all four projects, which no two use differently. In torchvision and here
# ``features.0`` embeds patches; then stages and mergings alternate.
_STAGES = r"^(?:swin\.)?(?:encoder\.)?(?:layers|stages)\.(\d)\."
_EMBEDDING = r"^(?:patch_embed\.|(?:swin\.)?embeddings\.(?:patch_embeddings\.)?)"
_NAMES: Substitutions = (
    (r".*\.attn_mask$", ""),
    (rf"{_STAGES}blocks\.", lambda m: f"features.{2 * int(m[1]) + 1}."),
    (rf"{_STAGES}downsample\.", lambda m: f"features.{2 * int(m[1]) + 2}."),
    (rf"{_EMBEDDING}proj(?:ection)?\.", "features.0.0."),
    (rf"{_EMBEDDING}norm\.", "features.0.2."),
    (r"\.attn\.w_msa\.", ".attn."),
    *HUGGING_FACE_BLOCK,
    (r"\.attention\.(?:self|relative_position_bias)\.", ".attn."),
    (r"\.(?:ffn\.layers\.0\.0|mlp\.fc1|intermediate\.dense)\.", ".mlp.0."),
    (r"\.(?:ffn\.layers\.1|mlp\.fc2|output\.dense)\.", ".mlp.3."),
    HUGGING_FACE_NORM,
)
_TIMM: Substitutions = (  # each merging before its stage
    (rf"{_STAGES}downsample\.", lambda m: f"features.{2 * int(m[1])}."),
    *_NAMES,
)
_swin = partial(
    Project,
    fits=("swin_",),
    names=_NAMES,
    ours=r"(features\.[0-7]|norm[0-3])\.",
    ignored=r".*\.attn_mask$|(swin\.)?(norm|layernorm|head|head\.fc|classifier)\.\w+$",
)


def from_unfold(name: str, tensor: Tensor) -> Tensor:
    """Return an entry of mmsegmentation's patch merging in the order of everybody else.

    mmsegmentation unfolds 2x2 patches: its 4C inputs are C groups of the places (row, column)
    00, 01, 10, 11. Here they are four groups of C channels, the places in the order 00, 10, 01, 11.

    Args:
        name: segkit's name of the entry; those that are not of a merging are returned unchanged.
        tensor: (2C, 4C) of the reduction, or (4C,) of the norm before it.
    """
    if not re.fullmatch(r"features\.[246]\.(norm|reduction)\.\w+", name):
        return tensor
    places = tensor.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]]
    return places.transpose(-1, -2).flatten(-2)


_BLOCK = r"layers\.0\.blocks\.0\.attn\.relative_position_bias"
PROJECTS = (
    _swin(
        "Swin by timm's names",
        marks=(_BLOCK, r"layers\.3\.downsample"),
        names=_TIMM,
        differences=(
            "timm fills maps up to whole windows after it shifted them, this model before: "
            "outputs differ where a map is not made of whole windows",
        ),
    ),
    _swin(
        "Swin by Microsoft's names",
        marks=(_BLOCK,),
        differences=(f"if it is of Microsoft's segmentation code, {_SHIFTS}",),
    ),
    _swin(
        "Swin by mmsegmentation's names",
        marks=(r"stages\.0\.blocks\.0\.attn\.w_msa\.",),
        convert=from_unfold,
        differences=(_SHIFTS,),
    ),
    _swin(
        "Swin by Hugging Face's names",
        marks=(r"(swin\.)?encoder\.layers\.0\.blocks\.0\.attention\..*\.relative_position_bias",),
        differences=(_SHIFTS,),
    ),
)


def resize_bias_table(table: Tensor, entries: int) -> Tensor:
    """Return relative position biases for another window, resized bicubically.

    Shape:
        table: ((2 window - 1) ** 2, heads) -> (entries, heads)
    """
    old, new = side(table.shape[0]), side(entries)
    image = table.T.reshape(1, -1, old, old).float()
    resized = F.interpolate(image, (new, new), mode="bicubic", align_corners=False)
    return resized.reshape(-1, entries).T.to(table.dtype)


def side(entries: int) -> int:
    """Return the side of a table of relative positions, 2 window - 1, of its number of entries."""
    return round(entries**0.5)
