"""Plain Vision Transformers by the names of Meta, timm and transformers."""

from functools import partial

import torch
from torch import Tensor

from segkit.models.pretrained.names import HUGGING_FACE_BLOCK, Project, State, Substitutions, has

# Names of all projects for ViT and BEiT, which no two use differently.
NAMES: Substitutions = (
    (r"^(?:dinov2|dinov2_with_registers|dinov3_vit|beit)\.", ""),
    (r"^embeddings\.(cls_token|register_tokens|mask_token)$", r"\1"),
    (r"^(?:storage_tokens|reg_token)$", "register_tokens"),
    (r"^embeddings\.position_embeddings(?:\.weight)?$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed.proj."),
    (r"^(?:encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"^layernorm\.", "norm."),
    *HUGGING_FACE_BLOCK,
    (r"\.attn\.q_bias$", ".attn.qkv.bias/0"),
    (r"\.attn\.v_bias$", ".attn.qkv.bias/2"),
    (r"\.(?:gamma_|lambda_|layer_scale)([12])(?:\.lambda1)?$", r".ls\1.gamma"),
    (r"\.mlp\.(?:fc1_g|gate_proj)\.", ".mlp.w1."),
    (r"\.mlp\.fc1_x\.", ".mlp.w2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


def _dinov3_names(state: State) -> Substitutions:
    """Return the names for DINOv3, of whose MLPs two kinds share names in timm and transformers."""
    gated = has(state, r".*\.mlp\.(fc1_g|gate_proj)\.")
    up, down = ("w2", "w3") if gated else ("fc1", "fc2")
    last = r"\.mlp\.(?:down_proj|fc2)\."
    return (*NAMES, (r"\.mlp\.up_proj\.", f".mlp.{up}."), (last, f".mlp.{down}."))


def _with_class_position(name: str, tensor: Tensor) -> Tensor:
    """Return positions with one for the class token, 0, if there is none (timm, EoMT)."""
    if name != "pos_embed" or tensor.ndim not in (2, 3):
        return tensor
    positions = tensor.reshape(1, *tensor.shape[-2:])
    if round(positions.shape[1] ** 0.5) ** 2 != positions.shape[1]:
        return tensor
    return torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)


def key_without_bias(name: str, tensor: Tensor, *, parts: int = 2) -> Tensor:
    """Return the bias of query, key and value with 0 for the key.

    Args:
        name: segkit's name of the entry; others than of these biases are returned unchanged.
        tensor: The biases in the file.
        parts: 2 if they are of query and value alone, 3 if the code masks that of the key.
    """
    if not name.endswith("attn.qkv.bias"):
        return tensor
    biases = tensor.chunk(parts)
    return torch.cat([biases[0], torch.zeros_like(biases[0]), biases[-1]])


_OURS = r"(patch_embed\.proj|blocks\.\d+|norm|neck)\.|(cls_token|register_tokens|pos_embed)$"
_IGNORED = (
    r".*(mask_token|bias_mask|rope_embed\.periods|attn_mask_probs)$|"
    r"(head|classifier|local_cls_norm|criterion)\."
)
_dinov2 = partial(
    Project,
    fits=("vit_s_dinov2", "vit_b_dinov2", "vit_l_dinov2"),
    names=NAMES,
    ours=_OURS,
    ignored=_IGNORED,
    convert=_with_class_position,
    differences=(
        "its project resizes positions with an offset of 0.1 or with antialiasing, this model "
        "with neither: outputs differ a little for images that are not 518 x 518",
    ),
)
_dinov3 = partial(
    Project,
    fits=("vit_s_dinov3", "vit_s_plus_dinov3", "vit_b_dinov3", "vit_l_dinov3"),
    names=_dinov3_names,
    ours=_OURS,
    ignored=_IGNORED,
    convert=key_without_bias,
)
_IN_TIMM = r"blocks\.0\.gamma_1", r"reg_token"
_IN_META = r"blocks\.0\.ls1\.gamma", r"cls_token"
_IN_HUGGING_FACE = r"(\w+\.)?(encoder\.|model\.)?layers?\.0\.layer_scale1\.lambda1"
_POSITIONS = r"(\w+\.)?embeddings\.position_embeddings"
_ROTARY = r"rope_embed\.|storage_tokens"
_masked_key = partial(key_without_bias, parts=3)

PROJECTS = (
    _dinov3("DINOv3 by timm's names", marks=(*_IN_TIMM, r".*\.q_bias")),
    _dinov3("DINOv3 by timm's names", marks=_IN_TIMM, unbiased=r".*\.attn\.qkv\.weight"),
    _dinov3("DINOv3 by Meta's names", marks=(*_IN_META, _ROTARY), convert=_masked_key),
    _dinov2("DINOv2 by Meta's or timm's names", marks=_IN_META),
    _dinov2("DINOv2 by Hugging Face's names", marks=(_IN_HUGGING_FACE, _POSITIONS)),
    _dinov3("DINOv3 by Hugging Face's names", marks=(_IN_HUGGING_FACE,)),
)

EOMT = Project(
    "EoMT of Hugging Face",
    ("eomt",),
    marks=(r"upscale_block\.block\.0\.conv1\.", r"class_predictor\."),
    names=(
        (r"^query\.weight$", "decoder.query.weight"),
        (r"^class_predictor\.", "decoder.class_head."),
        (r"^mask_head\.fc([123])\.", lambda m: f"decoder.mask_head.{2 * int(m[1]) - 2}."),
        (r"^upscale_block\.block\.(\d+)\.conv1\.", r"decoder.upscale.\1.0."),
        (r"^upscale_block\.block\.(\d+)\.conv2\.", r"decoder.upscale.\1.2."),
        (r"^upscale_block\.block\.(\d+)\.layernorm2d\.", r"decoder.upscale.\1.3."),
    ),
    prefix="",
)
