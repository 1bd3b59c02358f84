"""Swin Transformers by the names of Microsoft, timm, mmsegmentation and Hugging Face."""

import re
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F

from segkit.models.pretrained.naming import HUGGING_FACE_NORMS, Naming, Rule

# Here, as in torchvision, features.0 is the patches, then stages and mergings alternate.


def _stage(becomes: str) -> Callable[[re.Match[str]], str]:
    """A block's entry: stage and block are the pattern's first two groups."""
    return lambda match: f"features.{2 * int(match[1]) + 1}.{match[2]}.{match.expand(becomes)}"


def _merging(first: int) -> Callable[[re.Match[str]], str]:
    """A merging's entry; ``first`` is the number of the one after the first stage."""
    return lambda match: f"features.{2 * (int(match[1]) - first + 1)}.{match[2]}"


def _rules(
    block: str, parts: Sequence[tuple[str, str]], *, patches: str, merging: str, first: int = 0
) -> tuple[Rule, ...]:
    """Rules of a naming whose blocks, patches and mergings begin with these patterns."""
    return (
        *((rf"{block}\.{pattern}", _stage(becomes)) for pattern, becomes in parts),
        (rf"{patches}proj(?:ection)?\.(\w+)", r"features.0.0.\1"),
        (rf"{patches}norm\.(\w+)", r"features.0.2.\1"),
        (rf"{merging}\.(norm\.\w+|reduction\.\w+)", _merging(first)),
        (r"norm([0-3])\.(\w+)", r"norm\1.\2"),
    )


_ATTENTION = (
    (r"(norm[12]\.\w+)", r"\3"),
    (r"attn\.((?:qkv|proj)\.\w+|relative_position_bias_table)", r"attn.\3"),
    (r"mlp\.fc1\.(\w+)", r"mlp.0.\3"),
    (r"mlp\.fc2\.(\w+)", r"mlp.3.\3"),
)
_OPENMMLAB = (
    (r"(norm[12]\.\w+)", r"\3"),
    (r"attn\.w_msa\.((?:qkv|proj)\.\w+|relative_position_bias_table)", r"attn.\3"),
    (r"ffn\.layers\.0\.0\.(\w+)", r"mlp.0.\3"),
    (r"ffn\.layers\.1\.(\w+)", r"mlp.3.\3"),
)
# Hugging Face's names on disk, and those of transformers 5 in memory.
_HUGGING_FACE = (
    (r"layernorm_before\.(\w+)", r"norm1.\3"),
    (r"layernorm_after\.(\w+)", r"norm2.\3"),
    (r"attention\.(?:self\.query|q_proj)\.(\w+)", r"attn.qkv.\3/0"),
    (r"attention\.(?:self\.key|k_proj)\.(\w+)", r"attn.qkv.\3/1"),
    (r"attention\.(?:self\.value|v_proj)\.(\w+)", r"attn.qkv.\3/2"),
    (r"attention\.(?:output\.dense|o_proj)\.(\w+)", r"attn.proj.\3"),
    (
        r"attention\.(?:self|relative_position_bias)\.(relative_position_bias_table)",
        r"attn.\3",
    ),
    (r"(?:intermediate\.dense|mlp\.fc1)\.(\w+)", r"mlp.0.\3"),
    (r"(?:output\.dense|mlp\.fc2)\.(\w+)", r"mlp.3.\3"),
)
_BEYOND = (
    r".*\.(relative_position_index|attn_mask)$"
    r"|(swin\.)?(norm|layernorm|head|head\.fc|classifier)\.\w+$"
)


def from_unfold(name: str, tensor: Tensor) -> Tensor:
    """A patch merging's entry of mmsegmentation, in Microsoft's and torchvision's order.

    mmsegmentation unfolds 2x2 patches: its 4C inputs are C groups of the places (row, column)
    00, 01, 10, 11. Here they are four groups of C channels, the places in the order 00, 10, 01, 11.

    Shape:
        tensor: (2C, 4C) of the reduction, or (4C,) of the norm before it
    """
    if not re.fullmatch(r"features\.[246]\.(norm|reduction)\.\w+", name):
        return tensor
    places = tensor.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]]
    return places.transpose(-1, -2).flatten(-2)


def resize_bias_table(table: Tensor, entries: int) -> Tensor:
    """Relative position biases for another window: an image of offsets, resized bicubically.

    Args:
        table: ((2 window - 1)², heads).
        entries: The other window's first axis.
    """
    old, new = side(table.shape[0]), side(entries)
    image = table.T.reshape(1, -1, old, old).float()
    resized = F.interpolate(image, (new, new), mode="bicubic", align_corners=False)
    return resized.reshape(-1, entries).T.to(table.dtype)


def side(entries: int) -> int:
    """Side of the square that a table of relative positions is: twice its window less one."""
    return round(entries**0.5)


_LAYERS = r"layers\.(\d)\.blocks\.(\d+)"
_STAGES = r"stages\.(\d)\.blocks\.(\d+)"
_ENCODER = r"(?:swin\.)?encoder\.layers\.(\d)\.blocks\.(\d+)"

_SHIFTS = (
    "its project shifts windows along a side that a single window covers, this model does not: "
    "outputs differ for images with a side of at most 32 times the window"
)

NAMINGS = (
    Naming(
        title="Swin by timm's names",
        builds=("swin_",),
        signature=(r"layers\.0\.blocks\.0\.attn\.relative_position_bias", r"layers\.3\.downsample"),
        rules=_rules(
            _LAYERS,
            _ATTENTION,
            patches=r"patch_embed\.",
            merging=r"layers\.(\d)\.downsample",
            first=1,
        ),
        beyond=_BEYOND,
        differs=(
            "timm fills maps up to whole windows after it shifted them, this model before: outputs "
            "differ where a map is not made of whole windows",
        ),
    ),
    Naming(
        title="Swin by Microsoft's names",
        builds=("swin_",),
        signature=(r"layers\.0\.blocks\.0\.attn\.relative_position_bias",),
        rules=_rules(
            _LAYERS, _ATTENTION, patches=r"patch_embed\.", merging=r"layers\.(\d)\.downsample"
        ),
        beyond=_BEYOND,
        differs=(f"if it is of Microsoft's segmentation code, {_SHIFTS}",),
    ),
    Naming(
        title="Swin by mmsegmentation's names",
        builds=("swin_",),
        signature=(r"stages\.0\.blocks\.0\.attn\.w_msa\.",),
        rules=_rules(
            _STAGES, _OPENMMLAB, patches=r"patch_embed\.", merging=r"stages\.(\d)\.downsample"
        ),
        beyond=_BEYOND,
        after=from_unfold,
        differs=(_SHIFTS,),
    ),
    Naming(
        title="Swin by Hugging Face's names",
        builds=("swin_",),
        signature=(
            rf"{_ENCODER}\.attention\.(self|relative_position_bias)\.relative_position_bias",
        ),
        rules=(
            *_rules(
                _ENCODER,
                _HUGGING_FACE,
                patches=r"(?:swin\.)?embeddings\.(?:patch_embeddings\.)?",
                merging=r"(?:swin\.)?encoder\.layers\.(\d)\.downsample",
            ),
            HUGGING_FACE_NORMS,
        ),
        beyond=_BEYOND,
        differs=(_SHIFTS,),
    ),
)
"""In the order they are tried."""
