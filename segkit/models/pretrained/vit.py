"""Plain Vision Transformers by the names of Meta, timm and transformers."""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from segkit.models.pretrained.names import Project, State, Substitutions, has

_OURS = r"(patch_embed\.proj|blocks\.\d+|norm|neck)\.|(cls_token|register_tokens|pos_embed)$"
_IGNORED = (
    r".*(mask_token|bias_mask|rope_embed\.periods|attn_mask_probs)$|"
    r"(head|classifier|local_cls_norm|criterion)\."
)
_HUGGING_FACE: Substitutions = (
    (r"^(?:dinov2|dinov2_with_registers|dinov3_vit)\.", ""),
    (r"^embeddings\.(cls_token|register_tokens|mask_token)$", r"\1"),
    (r"^embeddings\.position_embeddings(?:\.weight)?$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed.proj."),
    (r"^(?:encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"^layernorm\.", "norm."),
    # Names on disk, and those of transformers 5 in memory.
    (r"\.attention\.(?:attention\.query|q_proj)\.(\w+)$", r".attn.qkv.\1/0"),
    (r"\.attention\.(?:attention\.key|k_proj)\.(\w+)$", r".attn.qkv.\1/1"),
    (r"\.attention\.(?:attention\.value|v_proj)\.(\w+)$", r".attn.qkv.\1/2"),
    (r"\.attention\.(?:output\.dense|o_proj|out_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
)
SEPARATE_BIASES: Substitutions = (
    (r"\.attn\.q_bias$", ".attn.qkv.bias/0"),
    (r"\.attn\.v_bias$", ".attn.qkv.bias/1"),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
)
"""Names of Microsoft's BEiT, which timm has for DINOv3 too."""
_TIMM: Substitutions = (
    (r"^reg_token$", "register_tokens"),
    *SEPARATE_BIASES,
    (r"\.mlp\.fc1_g\.", ".mlp.w1."),
    (r"\.mlp\.fc1_x\.", ".mlp.w2."),
)
_PLAIN: Substitutions = ((r"\.mlp\.up_proj\.", ".mlp.fc1."), (r"\.mlp\.down_proj\.", ".mlp.fc2."))
_GATED: Substitutions = ((r"\.mlp\.up_proj\.", ".mlp.w2."), (r"\.mlp\.down_proj\.", ".mlp.w3."))


def find_vit(state: State) -> Project | None:
    """Return the project whose names of a DINOv2 or DINOv3 these are, if any."""
    if has(state, r"blocks\.0\.gamma_1", r"reg_token"):
        gated = ((r"\.mlp\.fc2\.", ".mlp.w3."),) if has(state, r".*\.fc1_g\.") else ()
        unbiased = "(?!)" if has(state, r".*\.q_bias") else r".*\.attn\.qkv\.weight"
        return _dinov3("timm", (*_TIMM, *gated), with_key_bias, unbiased)
    if has(state, r"blocks\.0\.ls1\.gamma", r"cls_token"):
        names: Substitutions = ((r"^(?:storage_tokens|reg_token)$", "register_tokens"),)
        if has(state, r"rope_embed\.|storage_tokens"):
            return _dinov3("Meta", names, _without_key_bias)
        return _dinov2("Meta's or timm's", names)
    if has(state, r"(\w+\.)?(encoder\.|model\.)?layers?\.0\.layer_scale1\.lambda1"):
        if has(state, r"(\w+\.)?embeddings\.position_embeddings"):
            return _dinov2("Hugging Face's", _HUGGING_FACE)
        mlp = _GATED if has(state, r".*\.mlp\.gate_proj\.") else _PLAIN
        return _dinov3("Hugging Face", (*_HUGGING_FACE, *mlp), with_key_bias)
    return None


def _dinov2(whose: str, substitutions: Substitutions) -> Project:
    return Project(
        f"DINOv2 by {whose} names",
        ("vit_s_dinov2", "vit_b_dinov2", "vit_l_dinov2"),
        substitutions,
        ours=_OURS,
        ignored=_IGNORED,
        convert=_with_class_position,
        differences=(
            "its project resizes positions with an offset of 0.1 or with antialiasing, this model "
            "with neither: outputs differ a little for images that are not 518 x 518",
        ),
    )


def _dinov3(
    project: str,
    substitutions: Substitutions,
    convert: Callable[[str, Tensor], Tensor],
    unbiased: str = "(?!)",
) -> Project:
    return Project(
        f"DINOv3 by {project}'s names",
        ("vit_s_dinov3", "vit_s_plus_dinov3", "vit_b_dinov3", "vit_l_dinov3"),
        substitutions,
        ours=_OURS,
        ignored=_IGNORED,
        convert=convert,
        unbiased=unbiased,
    )


def find_eomt(state: State) -> Project | None:
    """Return the decoder of EoMT of transformers, if its names are these."""
    if not has(state, r"upscale_block\.block\.0\.conv1\.", r"class_predictor\."):
        return None
    return Project(
        "EoMT of Hugging Face",
        ("eomt",),
        (
            (r"^query\.weight$", "decoder.query.weight"),
            (r"^class_predictor\.", "decoder.class_head."),
            (r"^mask_head\.fc([123])\.", lambda m: f"decoder.mask_head.{2 * int(m[1]) - 2}."),
            (r"^upscale_block\.block\.(\d+)\.conv1\.", r"decoder.upscale.\1.0."),
            (r"^upscale_block\.block\.(\d+)\.conv2\.", r"decoder.upscale.\1.2."),
            (r"^upscale_block\.block\.(\d+)\.layernorm2d\.", r"decoder.upscale.\1.3."),
        ),
        prefix="",
    )


def _with_class_position(name: str, tensor: Tensor) -> Tensor:
    """Return positions with one for the class token, 0, if there is none (timm, EoMT)."""
    if name != "pos_embed" or tensor.ndim not in (2, 3):
        return tensor
    positions = tensor.reshape(1, *tensor.shape[-2:])
    if round(positions.shape[1] ** 0.5) ** 2 != positions.shape[1]:
        return tensor
    return torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)


def divide_blocks(
    backbone: Mapping[str, Tensor], depth: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the entries of a whole ViT that a ViT of ``depth`` blocks and ``eomt`` have.

    Returns:
        The ViT's entries, and the names in the decoder of the others: last blocks and norm.
    """
    moved = {}
    for name in backbone:
        block = re.match(r"blocks\.(\d+)\.", name)
        if block and int(block[1]) >= depth:
            moved[name] = f"decoder.blocks.{int(block[1]) - depth}.{name[block.end() :]}"
        elif name.startswith("norm."):
            moved[name] = f"decoder.{name}"
    return {name: tensor for name, tensor in backbone.items() if name not in moved}, moved


def with_key_bias(name: str, tensor: Tensor) -> Tensor:
    """Return the bias of query, key and value from that of query and value; DINOv3 has no other."""
    if not name.endswith("attn.qkv.bias"):
        return tensor
    query, value = tensor.chunk(2)
    return torch.cat([query, torch.zeros_like(query), value])


def _without_key_bias(name: str, tensor: Tensor) -> Tensor:
    """Return the bias of query, key and value with 0 for the key, which Meta's code masks."""
    if not name.endswith("attn.qkv.bias"):
        return tensor
    query, key, value = tensor.chunk(3)
    return torch.cat([query, torch.zeros_like(key), value])
