"""BEiT by the names of Microsoft, timm and transformers, and its position biases."""

from functools import partial

import torch
from torch import Tensor

from segkit.models.pretrained.names import Project, Substitutions
from segkit.models.pretrained.swin import side
from segkit.models.pretrained.vit import NAMES, key_without_bias

_NAMES: Substitutions = (
    *NAMES,
    (r"\.(?:attention\.attention\.)?relative_position_bias\.", ".position_bias."),
    (r"\.attn\.relative_position_", ".position_bias.relative_position_"),
    (r"^fpn\.fpn1\.conv_transpose([12])\.", lambda m: f"fpn1.{'03'[int(m[1]) - 1]}."),
    (r"^fpn\.fpn1\.normalization\.", "fpn1.1."),
    (r"^fpn1\.", "neck.levels.0."),
    (r"^(?:fpn\.fpn2|fpn2\.0)\.", "neck.levels.1."),
)
_beit = partial(
    Project,
    fits=("beit_",),
    names=_NAMES,
    ours=r"(patch_embed\.proj|blocks\.\d+|neck)\.|cls_token$",
    ignored=r".*mask_token$|(norm|fc_norm|head|lm_head|layernorm|pooler|classifier)\.",
    convert=key_without_bias,
)
_IN_HUGGING_FACE = r"(beit\.)?(encoder\.layer|layers)\.0\.lambda_1"
_BLOCKS = (
    "transformers' configuration of BEiT for segmentation makes the pyramid from blocks 2, 4, 6 "
    "and 10 of 12, this model, as Microsoft's, from 4, 6, 8 and 12"
)
PROJECTS = (
    _beit("BEiT by Hugging Face's names", marks=(_IN_HUGGING_FACE, "fpn"), differences=(_BLOCKS,)),
    _beit("BEiT by Hugging Face's names", marks=(_IN_HUGGING_FACE,)),
    _beit("BEiT by Microsoft's names", marks=(r"blocks\.0\.gamma_1", r"blocks\.0\.attn\.q_bias")),
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
