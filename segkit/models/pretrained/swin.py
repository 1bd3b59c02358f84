"""Swin Transformers by the names of Microsoft, timm, mmsegmentation and transformers."""

import re

from torch import Tensor
from torch.nn import functional as F

from segkit.models.pretrained.names import HUGGING_FACE_NORM, Project, State, Substitutions, has

_SHIFTS = (
    "its project shifts windows along a side that a single window covers, this model does not: "
    "outputs differ for images with a side of at most 32 times the window"
)
_HUGGING_FACE = (
    r"(?:swin\.)?encoder\.layers\.0\.blocks\.0\.attention\."
    r"(self|relative_position_bias)\.relative_position_bias"
)


def find_swin(state: State) -> Project | None:
    """Return the project whose names of a Swin Transformer these are, if any."""
    if has(state, r"layers\.0\.blocks\.0\.attn\.relative_position_bias"):
        if has(state, r"layers\.3\.downsample"):  # each merging before its stage
            return _swin(
                "timm",
                "timm fills maps up to whole windows after it shifted them, this model before: "
                "outputs differ where a map is not made of whole windows",
                first_merging=1,
            )
        return _swin("Microsoft", f"if it is of Microsoft's segmentation code, {_SHIFTS}")
    if has(state, r"stages\.0\.blocks\.0\.attn\.w_msa\."):
        return _swin("mmsegmentation", _SHIFTS)
    return _swin("Hugging Face", _SHIFTS) if has(state, _HUGGING_FACE) else None


def _swin(project: str, difference: str, *, first_merging: int = 0) -> Project:
    return Project(
        f"Swin by {project}'s names",
        ("swin_",),
        _substitutions(first_merging),
        ours=r"(features\.[0-7]|norm[0-3])\.",
        ignored=r".*\.attn_mask$|(swin\.)?(norm|layernorm|head|head\.fc|classifier)\.\w+$",
        convert=from_unfold if project == "mmsegmentation" else lambda name, tensor: tensor,
        differences=(difference,),
    )


def _substitutions(first_merging: int) -> Substitutions:
    """Return substitutions for the names of all four projects, which no two use differently.

    In torchvision and here ``features.0`` embeds patches; then stages and mergings alternate.
    """
    stages = r"^(?:swin\.)?(?:encoder\.)?(?:layers|stages)\.(\d)\."
    embedding = r"^(?:patch_embed\.|(?:swin\.)?embeddings\.(?:patch_embeddings\.)?)"
    return (
        (r".*\.attn_mask$", ""),
        (rf"{stages}blocks\.", lambda m: f"features.{2 * int(m[1]) + 1}."),
        (rf"{stages}downsample\.", lambda m: f"features.{2 * (int(m[1]) - first_merging + 1)}."),
        (rf"{embedding}proj(?:ection)?\.", "features.0.0."),
        (rf"{embedding}norm\.", "features.0.2."),
        (r"\.attn\.w_msa\.", ".attn."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        # Names on disk, and those of transformers 5 in memory.
        (r"\.attention\.(?:self\.query|q_proj)\.(\w+)$", r".attn.qkv.\1/0"),
        (r"\.attention\.(?:self\.key|k_proj)\.(\w+)$", r".attn.qkv.\1/1"),
        (r"\.attention\.(?:self\.value|v_proj)\.(\w+)$", r".attn.qkv.\1/2"),
        (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.attention\.(?:self|relative_position_bias)\.", ".attn."),
        (r"\.(?:ffn\.layers\.0\.0|mlp\.fc1|intermediate\.dense)\.", ".mlp.0."),
        (r"\.(?:ffn\.layers\.1|mlp\.fc2|output\.dense)\.", ".mlp.3."),
        HUGGING_FACE_NORM,
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
