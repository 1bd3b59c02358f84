"""BEiT by the names of Microsoft, timm and transformers, and its position biases."""

import torch
from torch import Tensor

from segkit.models.pretrained.names import Project, State, Substitutions, has
from segkit.models.pretrained.swin import side
from segkit.models.pretrained.vit import SEPARATE_BIASES, with_key_bias

_MICROSOFT: Substitutions = (
    *SEPARATE_BIASES,
    (r"\.attn\.relative_position_", ".position_bias.relative_position_"),
)
# Names on disk, and those of transformers 5 in memory.
_HUGGING_FACE: Substitutions = (
    (r"^beit\.", ""),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"\.(?:attention\.attention\.)?relative_position_bias\.", ".position_bias."),
    (r"\.attention\.(?:attention\.query|q_proj)\.(\w+)$", r".attn.qkv.\1/0"),
    (r"\.attention\.(?:attention\.key|k_proj)\.weight$", ".attn.qkv.weight/1"),
    (r"\.attention\.(?:attention\.value|v_proj)\.(\w+)$", r".attn.qkv.\1/2"),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_([12])$", r".ls\1.gamma"),
)
_NECK: Substitutions = (
    (r"^fpn\.fpn1\.conv_transpose([12])\.", lambda m: f"fpn1.{'03'[int(m[1]) - 1]}."),
    (r"^fpn\.fpn1\.normalization\.", "fpn1.1."),
    (r"^fpn1\.", "neck.levels.0."),
    (r"^(?:fpn\.fpn2|fpn2\.0)\.", "neck.levels.1."),
)


def find_beit(state: State) -> Project | None:
    """Return the project whose names of a BEiT these are, if any."""
    hugging_face = has(state, r"(beit\.)?(encoder\.layer|layers)\.0\.lambda_1")
    if not hugging_face and not has(state, r"blocks\.0\.gamma_1", r"blocks\.0\.attn\.q_bias"):
        return None
    return Project(
        f"BEiT by {'Hugging Face' if hugging_face else 'Microsoft'}'s names",
        ("beit_",),
        (*(_HUGGING_FACE if hugging_face else _MICROSOFT), *_NECK),
        ours=r"(patch_embed\.proj|blocks\.\d+|neck)\.|cls_token$",
        ignored=r".*mask_token$|(norm|fc_norm|head|lm_head|layernorm|pooler|classifier)\.",
        convert=with_key_bias,
        differences=(
            "transformers' configuration of BEiT for segmentation makes the pyramid from blocks 2, "
            "4, 6 and 10 of 12, this model, as Microsoft's, from 4, 6, 8 and 12",
        )
        if has(state, r"fpn") and hugging_face
        else (),
    )


def resize_table(table: Tensor, entries: int) -> Tensor:
    """Return position biases for another window, as the authors do: by a spline, denser near 0.

    The old offsets are put at growing distances, a geometric series, so that those of neighbors
    keep their meaning; cubic splines through them give the biases at the new offsets. The last
    three entries, of the class token, are unchanged.

    Shape:
        table: ((2 window - 1) ** 2 + 3, heads) -> (entries, heads)
    """
    old, new = side(table.shape[0]), side(entries)
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (old // 2)) / (1 - ratio) > new // 2:
            high = ratio
        else:
            low = ratio
    steps = torch.logspace(0, old // 2 - 1, old // 2, base=ratio, dtype=torch.float64).cumsum(0)
    at = torch.cat([-steps.flip(0), steps.new_zeros(1), steps])
    spline = spline_matrix(at, torch.arange(-(new // 2), new // 2 + 1, dtype=torch.float64))
    image = table[:-3].T.unflatten(1, (old, old)).double()
    resized = (spline @ image @ spline.T).flatten(1).T.to(table.dtype)
    return torch.cat([resized, table[-3:]])


def spline_matrix(at: Tensor, where: Tensor) -> Tensor:
    """Return the matrix from values at ``at`` to those of their cubic spline at ``where``.

    The spline has no knots at the second and the last but one value ("not a knot").

    Shape:
        at: (N,), ascending, N > 3
        where: (M,)
        result: (M, N)
    """
    scale = at[-1]

    def basis(x: Tensor) -> Tensor:
        x = x[:, None] / scale
        powers = x ** torch.arange(4)
        return torch.cat([powers, (x - at[2:-2] / scale).clamp(min=0) ** 3], 1)

    return torch.linalg.solve(basis(at).T, basis(where).T).T
