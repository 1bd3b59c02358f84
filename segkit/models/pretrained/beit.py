"""BEiT by the names of Microsoft, timm and transformers, and its position biases."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from segkit.models.pretrained.names import Project, Substitutions
from segkit.models.pretrained.swin import side
from segkit.models.pretrained.vit import NAMES, key_without_bias

_NAMES: Substitutions = (
    *NAMES,
    (r"\.(?:attention\.attention\.)?relative_position_bias\.", ".attn."),
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
    """Return position biases for another window, denser near 0, as the authors do.

    The old offsets are put at growing distances, a geometric series, so that those of neighbors
    keep their meaning; between them the interpolation is bicubic, where the authors have splines.
    The last three entries, of the class token, are unchanged.

    Shape:
        table: ((2 window - 1) ** 2 + 3, heads) -> (entries, heads)
    """
    old, new = side(table.shape[0]), side(entries)
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        shorter = (1 - ratio ** (old // 2)) / (1 - ratio) <= new // 2
        low, high = (ratio, high) if shorter else (low, ratio)
    offsets = torch.arange(-(new // 2), new // 2 + 1).double()
    at = offsets.sign() * (offsets.abs() * (ratio - 1)).log1p() / math.log(ratio) / (old // 2)
    points = torch.stack(torch.meshgrid(at, at, indexing="xy"), 2)[None]
    image = table[:-3].T.unflatten(1, (old, old))[None].double()
    resized = F.grid_sample(image, points, "bicubic", "border", align_corners=True)
    return torch.cat([resized[0].flatten(1).T.to(table.dtype), table[-3:]])
