"""BEiT: a Vision Transformer whose blocks have relative position biases."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkit.core.backend import is_exporting
from segkit.core.config import check_bounds
from segkit.models.backbones.stages import refuse_dilation
from segkit.models.backbones.vit import PlainTransformer, PyramidNeck
from segkit.models.layers import BatchNorm2d
from segkit.models.transformer import MLP, SelfAttention, TransformerBlock

Grid = tuple[Tensor, int, int]
"""Indices of the offsets of patches, and the rows and columns of patches."""


def beit(
    width: int,
    depth: int,
    heads: int,
    scale: float = 0.1,
    *,
    window: int = 14,
    drop_path: float = 0.1,
    checkpointing: bool = False,
    in_channels: int = 3,
    output_stride: int = 32,
) -> PlainTransformer:
    """Build BEiT with the pyramid of transposed convolutions of its authors' segmentation models.

    Bao et al. 2022, https://arxiv.org/abs/2106.08254

    Departs from the authors: an image whose sides are not multiples of 16 is resized to the next
    ones, and an odd row or column of patches is pooled too; position biases are resized bilinearly
    if the image has another grid than the window's; keys have a bias, which changes no output.

    Args:
        width: Channels of the tokens.
        depth: Number of blocks, a multiple of 12.
        heads: Attention heads.
        scale: Initial value of LayerScale.
        window: Side of the grid of patches that the position biases are for: a sixteenth of the
            side of the images that the weights were trained with.
        drop_path: Probability of stochastic depth of the last block; it grows linearly from 0.
        checkpointing: Do not store activations inside blocks; recompute them in backward.
        in_channels: Channels of the image.
    """
    refuse_dilation("BEiT", output_stride)
    check_bounds(2, 1024, window=window)
    check_bounds(0, 1, drop_path=drop_path)

    def block(number: int) -> TransformerBlock:
        parts = width, RelativeAttention(width, heads, window), MLP(width, 4 * width)
        rate = drop_path * number / (depth - 1)
        return TransformerBlock(*parts, layer_scale=scale, drop_path=rate)

    return PlainTransformer(
        width,
        map(block, range(depth)),
        context=relative_offsets,
        ends=[depth * twelfths // 12 for twelfths in (4, 6, 8, 12)],
        neck=PyramidNeck(width, BatchNorm2d),
        patch=16,
        checkpointing=checkpointing,
        in_channels=in_channels,
    )


class RelativeAttention(SelfAttention):
    """Self-attention with a bias per offset of two patches, and for pairs with the class token.

    Shape:
        x: (B, 1 + rows * columns, width) -> the same; the first token is the class token
        grid: what :func:`relative_offsets` returns
    """

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__(width, heads)
        self.window = window
        # The last three are of the class token to patches, of patches to it, and to itself.
        entries = (2 * window - 1) ** 2 + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(entries, heads))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        return super().forward(x, None, self.bias(*grid).to(x.dtype))

    def bias(self, offsets: Tensor, rows: int, columns: int) -> Tensor:
        """Return the bias of queries and keys, (1, heads, tokens, tokens)."""
        table = self.relative_position_bias_table.T
        grid = table[:, :-3]
        if is_exporting() or (rows, columns) != (self.window, self.window):
            grid = grid.unflatten(1, (2 * self.window - 1, 2 * self.window - 1))[None]
            size = 2 * rows - 1, 2 * columns - 1
            grid = F.interpolate(grid, size, mode="bilinear").flatten(2)[0]
        bias = grid[:, offsets]
        from_class, to_class, itself = table[:, -3:, None].unbind(1)
        patches = offsets.shape[0]
        bias = torch.cat([to_class[:, None].expand(-1, patches, 1), bias], 2)
        first = torch.cat([itself, from_class.expand(-1, patches)], 1)
        return torch.cat([first[:, None], bias], 1)[None]


def relative_offsets(rows: int, columns: int, like: Tensor) -> Grid:
    """Return the index of each pair of patches' offset, and the rows and columns of patches.

    The indices, (patches, patches), are among those of (2 rows - 1) * (2 columns - 1) offsets.
    """
    row = torch.arange(rows, device=like.device).repeat_interleave(columns)
    column = torch.arange(columns, device=like.device).repeat(rows)
    down, across = row[:, None] - row + rows - 1, column[:, None] - column + columns - 1
    return down * (2 * columns - 1) + across, rows, columns


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "beit_b": partial(beit, 768, 12, 12, 0.1),
    "beit_l": partial(beit, 1024, 24, 16, 1e-5),
}
