"""Mask2Former by the names of transformers and of Meta."""

from segkit.models.pretrained.names import Project, State, Substitutions, has

_PIXELS = r"^(?:model\.)?pixel_level_module\.decoder\."
_LAYERS = r"^(?:model\.)?transformer_module\.decoder\."
_DEFORMABLE: Substitutions = (
    (r"\.attention\.sampling_offsets\.", ".attention.offsets."),
    (r"\.attention\.attention_weights\.", ".attention.shares."),
    (r"\.attention\.value_proj\.", ".attention.value."),
    (r"\.attention\.output_proj\.", ".attention.project."),
)
_HUGGING_FACE: Substitutions = (
    (rf"{_PIXELS}input_projections\.", "decoder.pixel_decoder.projections."),
    (rf"{_PIXELS}adapter_1\.", "decoder.pixel_decoder.lateral."),
    (rf"{_PIXELS}layer_1\.", "decoder.pixel_decoder.smooth."),
    (rf"{_PIXELS}mask_projection\.", "decoder.pixel_decoder.embed."),
    (rf"{_PIXELS}encoder\.(layers\.\d+)\.self_attn\.", r"decoder.pixel_decoder.\1.attention."),
    (
        rf"{_PIXELS}encoder\.(layers\.\d+)\.self_attn_layer_norm\.",
        r"decoder.pixel_decoder.\1.norm1.",
    ),
    (rf"{_PIXELS}encoder\.(layers\.\d+)\.final_layer_norm\.", r"decoder.pixel_decoder.\1.norm2."),
    (rf"{_PIXELS}(?:encoder\.)?", "decoder.pixel_decoder."),
    *_DEFORMABLE,
    (
        rf"{_LAYERS}mask_predictor\.mask_embedder\.(\d)\.0\.",
        lambda m: f"decoder.mask_head.{2 * int(m[1])}.",
    ),
    (rf"{_LAYERS}layernorm\.", "decoder.norm."),
    (rf"{_LAYERS}", "decoder."),
    (
        r"(layers\.\d+)\.cross_attn\.in_proj_(\w+)$",
        r"\1.cross.query.\2|decoder.\1.cross.key.\2|decoder.\1.cross.value.\2",
    ),
    (r"\.cross_attn\.out_proj\.", ".cross.project."),
    (r"\.self_attn\.q_proj\.", ".itself.query."),
    (r"\.self_attn\.k_proj\.", ".itself.key."),
    (r"\.self_attn\.v_proj\.", ".itself.value."),
    (r"\.self_attn\.out_proj\.", ".itself.project."),
    (r"\.cross_attn_layer_norm\.", ".norm1."),
    (r"\.self_attn_layer_norm\.", ".norm2."),
    (r"\.final_layer_norm\.", ".norm3."),
    (r"\.fc1\.", ".mlp.0."),
    (r"\.fc2\.", ".mlp.2."),
    (r"^(?:model\.)?transformer_module\.queries_features\.", "decoder.query_features."),
    (r"^(?:model\.)?transformer_module\.queries_embedder\.", "decoder.query_positions."),
    (r"^(?:model\.)?transformer_module\.level_embed\.", "decoder.level_embed."),
    (r"^class_predictor\.", "decoder.class_head."),
)
_META_PIXELS = r"^sem_seg_head\.pixel_decoder\."
_META_LAYERS = r"^sem_seg_head\.predictor\."
_META: Substitutions = (
    (rf"{_META_PIXELS}input_proj\.", "decoder.pixel_decoder.projections."),
    (rf"{_META_PIXELS}(?:transformer\.)?(?:encoder\.)?", "decoder.pixel_decoder."),
    (r"^(decoder\.pixel_decoder\.layers\.\d+)\.self_attn\.", r"\1.attention."),
    *_DEFORMABLE,
    (r"\.adapter_1\.norm\.", ".lateral.1."),
    (r"\.adapter_1\.", ".lateral.0."),
    (r"\.layer_1\.norm\.", ".smooth.1."),
    (r"\.layer_1\.", ".smooth.0."),
    (r"\.mask_features\.", ".embed."),
    (rf"{_META_LAYERS}transformer_cross_attention_layers\.(\d+)\.norm", r"decoder.layers.\1.norm1"),
    (rf"{_META_LAYERS}transformer_self_attention_layers\.(\d+)\.norm", r"decoder.layers.\1.norm2"),
    (rf"{_META_LAYERS}transformer_ffn_layers\.(\d+)\.norm", r"decoder.layers.\1.norm3"),
    (rf"{_META_LAYERS}transformer_\w+_layers\.", "decoder.layers."),
    (r"\.multihead_attn\.", ".cross."),
    (r"\.self_attn\.", ".itself."),
    (r"^(.+)\.in_proj_(\w+)$", r"\1.query.\2|\1.key.\2|\1.value.\2"),
    (r"\.out_proj\.", ".project."),
    (r"\.linear1\.", ".mlp.0."),
    (r"\.linear2\.", ".mlp.2."),
    (rf"{_META_LAYERS}mask_embed\.layers\.(\d)\.", lambda m: f"decoder.mask_head.{2 * int(m[1])}."),
    (rf"{_META_LAYERS}decoder_norm\.", "decoder.norm."),
    (rf"{_META_LAYERS}(?:query_feat|static_query)\.", "decoder.query_features."),
    (rf"{_META_LAYERS}query_embed\.", "decoder.query_positions."),
    (rf"{_META_LAYERS}level_embed\.", "decoder.level_embed."),
    (rf"{_META_LAYERS}class_embed\.", "decoder.class_head."),
)


def find_mask2former(state: State) -> Project | None:
    """Return the decoder of a Mask2Former of transformers or Meta."""
    if has(state, rf"{_META_PIXELS}mask_features\.", rf"{_META_LAYERS}transformer_cross_att"):
        return _mask2former("Meta", _META)
    if not has(state, rf"{_PIXELS}mask_projection\.", rf"{_LAYERS}layers\.0\.cross_attn\."):
        return None
    wrapper = "model." if has(state, r"model\.") else ""  # removed from the names of a file
    prefix = f"{wrapper}pixel_level_module.encoder."
    return _mask2former("Hugging Face", _HUGGING_FACE, prefix)


def _mask2former(project: str, substitutions: Substitutions, prefix: str = "backbone.") -> Project:
    return Project(
        f"Mask2Former of {project}",
        ("mask2former",),
        substitutions,
        ignored=r"criterion\.",
        differences=(
            "its project resizes the masks of the queries to the image's size and then adds them "
            "up, this model adds them up first",
        ),
        prefix=prefix,
    )
