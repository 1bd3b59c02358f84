"""Mix Transformers and SegFormer's head by the names of NVIDIA, transformers, mmsegmentation."""

from functools import partial

from torch import Tensor

from segkit.models.pretrained.names import Project, Substitutions

_MIX_FFN = {"0": "fc1", "1": "dwconv", "4": "fc2"}
# Names of NVIDIA, mmsegmentation, transformers on disk, and of transformers 5 in memory.
_NAMES: Substitutions = (
    (r"^segformer\.", ""),
    (r"^stages\.", "levels."),
    (r"^(patch_embed|block|norm)([1-4])\.", lambda m: f"levels.{int(m[2]) - 1}.{m[1]}."),
    (r"^encoder\.(patch_embeddings|block|layer_norm)\.([0-3])\.", r"levels.\2.\1."),
    (r"^layers\.([0-3])\.0\.(projection|norm)\.", r"levels.\1.patch_embed.\2."),
    (r"^layers\.([0-3])\.1\.", r"levels.\1.blocks."),
    (r"^layers\.([0-3])\.2\.", r"levels.\1.norm."),
    (r"\.(?:patch_embed|patch_embeddings)\.proj(?:ection)?\.", ".embed."),
    (r"\.(?:patch_embed|patch_embeddings)\.(?:norm|layer_norm)\.", ".embed_norm."),
    (r"^(levels\.[0-3])\.layer_norm\.", r"\1.norm."),
    (r"\.block\.(?=\d)", ".blocks."),
    (r"\.attention\.(?:self\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:self\.key|k_proj)\.(\w+)$", r".attn.kv.\1/0"),
    (r"\.attention\.(?:self\.value|v_proj)\.(\w+)$", r".attn.kv.\1/1"),
    (r"^(.*\.attn)\.attn\.in_proj_(\w+)$", r"\1.q.\2|\1.kv.\2|\1.kv.\2"),
    (r"\.(?:attention\.(?:output\.dense|o_proj)|attn\.attn\.out_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:self\.sr|sequence_reduction\.sequence_reduction)\.", ".attn.sr."),
    (r"\.attention\.(?:self|sequence_reduction)\.layer_norm\.", ".attn.norm."),
    (r"\.attn\.sr\.", ".attn.reduce."),
    (r"\.attn\.norm\.", ".attn.reduce_norm."),
    (r"\.(?:layer_norm_1|layernorm_before)\.", ".norm1."),
    (r"\.(?:layer_norm_2|layernorm_after)\.", ".norm2."),
    (r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    (r"\.ffn\.layers\.([014])\.", lambda m: f".mlp.{_MIX_FFN[m[1]]}."),
)
_HEAD: Substitutions = (
    (r"^decode_head\.linear_c([1-4])\.proj\.", lambda m: f"decoder.projections.{int(m[1]) - 1}."),
    (r"^decode_head\.(?:linear_c|linear_projections)\.([0-3])\.proj\.", r"decoder.projections.\1."),
    (r"^decode_head\.linear_fuse\.(?:conv\.)?weight$", "decoder.fuse.0.weight"),
    (r"^decode_head\.(?:linear_fuse\.bn|batch_norm)\.", "decoder.fuse.1."),
    (r"^decode_head\.(?:linear_pred|classifier)\.", "decoder.classifier."),
)


def _linear(name: str, tensor: Tensor) -> Tensor:
    """Return the weight of a linear layer that mmsegmentation has as a 1x1 convolution."""
    return tensor.flatten(1) if name.endswith(("fc1.weight", "fc2.weight")) else tensor


def shallow_first(name: str, tensor: Tensor) -> Tensor:
    """Return an entry of a head whose levels are concatenated shallow to deep.

    Args:
        name: segkit's name of the entry; those not of linear layers are returned unchanged.
        tensor: (width, 4 width, 1, 1) of the layer that joins the levels, which are deep to shallow
            in the files; (width, C) of the linear layer of a level.
    """
    if name.startswith("decoder.projections.") and tensor.ndim == 2:
        return tensor[:, :, None, None]
    if name != "decoder.fuse.0.weight":
        return tensor
    return tensor.unflatten(1, (4, -1)).flip(1).flatten(1, 2)


_mit = partial(
    Project,
    fits=("mit_",),
    names=_NAMES,
    ours=r"levels\.[0-3]\.(embed|embed_norm|blocks|norm)\.",
    ignored=r"(head|classifier)\.",
)
PROJECTS = (
    _mit(
        "MiT by mmsegmentation's names",
        marks=(r"layers\.0\.1\.0\.attn\.attn\.in_proj_weight",),
        convert=_linear,
        differences=(
            "mmsegmentation's norms of embeddings and of reduced maps have an epsilon of 1e-6, "
            "this model's, as NVIDIA's, of 1e-5",
        ),
    ),
    _mit("MiT by NVIDIA's names", marks=(r"block1\.0\.attn\.q\.", r"block1\.0\.mlp\.dwconv")),
    _mit(
        "MiT by Hugging Face's names",
        marks=(r"(segformer\.)?(encoder\.block\.0\.0|stages\.0\.blocks\.0)\.attention\.",),
    ),
)

_segformer = partial(
    Project,
    fits=("segformer",),
    names=_HEAD,
    ignored=r"decode_head\.conv_seg\.",  # which NVIDIA's files have, but its model does not use
    convert=shallow_first,
)
_FUSE = r"decode_head\.linear_fuse\."
SEGFORMERS = (
    _segformer("SegFormer of NVIDIA", marks=(_FUSE, r"decode_head\.linear_c4\.")),
    _segformer("SegFormer of Hugging Face", marks=(_FUSE,), prefix="segformer."),
)
