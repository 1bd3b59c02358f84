"""Mix Transformers and SegFormer's head by the names of NVIDIA and transformers."""

from torch import Tensor

from segkit.models.pretrained.names import Project, State, Substitutions, has

_HUGGING_FACE = (
    r"(?:segformer\.)?(?:encoder\.block\.0\.0\.attention\.self|stages\.0\.blocks\.0\.attention)\."
)

# NVIDIA's names, those of transformers on disk, and those of transformers 5 in memory.
_BACKBONE: Substitutions = (
    (r"^segformer\.", ""),
    (r"^stages\.", "levels."),
    (r"^(patch_embed|block|norm)([1-4])\.", lambda m: f"levels.{int(m[2]) - 1}.{m[1]}."),
    (r"^encoder\.(patch_embeddings|block|layer_norm)\.([0-3])\.", r"levels.\2.\1."),
    (r"\.(?:patch_embed|patch_embeddings)\.proj\.", ".embed."),
    (r"\.(?:patch_embed|patch_embeddings)\.(?:norm|layer_norm)\.", ".embed_norm."),
    (r"^(levels\.[0-3])\.layer_norm\.", r"\1.norm."),
    (r"\.block\.(?=\d)", ".blocks."),
    (r"\.attention\.(?:self\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:self\.key|k_proj)\.(\w+)$", r".attn.kv.\1/0"),
    (r"\.attention\.(?:self\.value|v_proj)\.(\w+)$", r".attn.kv.\1/1"),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:self\.sr|sequence_reduction\.sequence_reduction)\.", ".attn.sr."),
    (r"\.attention\.(?:self|sequence_reduction)\.layer_norm\.", ".attn.norm."),
    (r"\.attn\.sr\.", ".attn.reduce."),
    (r"\.attn\.norm\.", ".attn.reduce_norm."),
    (r"\.(?:layer_norm_1|layernorm_before)\.", ".norm1."),
    (r"\.(?:layer_norm_2|layernorm_after)\.", ".norm2."),
    (r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
)
_HEAD: Substitutions = (
    (r"^decode_head\.linear_c([1-4])\.proj\.", lambda m: f"decoder.projections.{int(m[1]) - 1}."),
    (r"^decode_head\.(?:linear_c|linear_projections)\.([0-3])\.proj\.", r"decoder.projections.\1."),
    (r"^decode_head\.linear_fuse\.(?:conv\.)?weight$", "decoder.fuse.0.weight"),
    (r"^decode_head\.(?:linear_fuse\.bn|batch_norm)\.", "decoder.fuse.1."),
    (r"^decode_head\.(?:linear_pred|classifier)\.", "decoder.classifier."),
)


def find_mit(state: State) -> Project | None:
    """Return the project whose names of a Mix Transformer these are, if any."""
    nvidia = has(state, r"patch_embed1\.proj\.", r"block1\.0\.attn\.q\.", r"block1\.0\.mlp\.dwconv")
    if not nvidia and not has(state, _HUGGING_FACE):
        return None
    return Project(
        f"MiT by {'NVIDIA' if nvidia else 'Hugging Face'}'s names",
        ("mit_",),
        _BACKBONE,
        ours=r"levels\.[0-3]\.(embed|embed_norm|blocks|norm)\.",
        ignored=r"(head|classifier)\.",
    )


def find_segformer(state: State) -> Project | None:
    """Return the decoder of a SegFormer of NVIDIA or transformers."""
    if not has(state, r"decode_head\.linear_fuse\."):
        return None
    nvidia = has(state, r"decode_head\.linear_c4\.")
    return Project(
        f"SegFormer of {'NVIDIA' if nvidia else 'Hugging Face'}",
        ("segformer",),
        _HEAD,
        ignored=r"decode_head\.conv_seg\.",  # which NVIDIA's files have, but its model does not use
        convert=shallow_first,
        prefix="backbone." if nvidia else "segformer.",
    )


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
