"""Mask2Former by the names of transformers and of Meta."""

from functools import partial

from segkit.models.pretrained.names import Project, Substitutions

_NAMES: Substitutions = (
    (r"^(?:pixel_level_module\.decoder|sem_seg_head\.pixel_decoder)\.", "decoder.pixel_decoder."),
    (r"^(?:transformer_module\.decoder|transformer_module|sem_seg_head\.predictor)\.", "decoder."),
    (r"^class_predictor\.", "decoder.class_head."),
    # The pixel decoder; transformers has items 0 and 1 where Meta has a convolution and its norm.
    (r"^(decoder\.pixel_decoder)\.(?:transformer\.)?(?:encoder\.)?", r"\1."),
    (r"\.(?:input_projections|input_proj)\.", ".projections."),
    (r"\.(adapter_1|layer_1)\.norm\.", r".\1.1."),
    (r"\.(adapter_1|layer_1)\.(?=\w+$)", r".\1.0."),
    (r"\.adapter_1\.", ".lateral."),
    (r"\.layer_1\.", ".smooth."),
    (r"\.(?:mask_projection|mask_features)\.", ".embed."),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"\.norm2\.", ".final_layer_norm."),
    # The layers of queries; Meta has three lists of their parts.
    (r"\.transformer_cross_attention_layers\.(\d+)\.norm\.", r".layers.\1.cross_attn_layer_norm."),
    (r"\.transformer_self_attention_layers\.(\d+)\.norm\.", r".layers.\1.self_attn_layer_norm."),
    (r"\.transformer_ffn_layers\.(\d+)\.norm\.", r".layers.\1.final_layer_norm."),
    (r"^decoder\.transformer_\w+_layers\.", "decoder.layers."),
    (r"\.multihead_attn\.", ".cross_attn."),
    (r"^(.+)\.in_proj_(\w+)$", r"\1.q_proj.\2|\1.k_proj.\2|\1.v_proj.\2"),
    (r"\.(?:fc1|linear1)\.", ".mlp.0."),
    (r"\.(?:fc2|linear2)\.", ".mlp.2."),
    # Queries and predictions.
    (r"\.mask_predictor\.mask_embedder\.(\d)\.0\.", r".mask_embed.layers.\1."),
    (r"\.mask_embed\.layers\.(\d)\.", lambda m: f".mask_head.{2 * int(m[1])}."),
    (r"^decoder\.(?:layernorm|decoder_norm)\.", "decoder.norm."),
    (r"\.(?:queries_features|query_feat|static_query)\.", ".query_features."),
    (r"\.(?:queries_embedder|query_embed)\.", ".query_positions."),
    (r"\.class_embed\.", ".class_head."),
)
_mask2former = partial(
    Project,
    fits=("mask2former",),
    names=_NAMES,
    ignored=r"criterion\.",
    differences=(
        "its project resizes the masks of the queries to the image's size and then adds them up, "
        "this model adds them up first",
    ),
)
PROJECTS = (
    _mask2former("Mask2Former of Meta", marks=(r"sem_seg_head\.predictor\.transformer_cross_att",)),
    _mask2former(
        "Mask2Former of Hugging Face",
        marks=(r"transformer_module\.decoder\.layers\.0\.cross_attn\.",),
        prefix="pixel_level_module.encoder.",
    ),
)
