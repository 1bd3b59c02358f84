"""Blocks, attention and positions of transformers; see ``segkit/models/backbones/vit.py``."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of the angles of rotary positions, each (patches, width of a head)."""


class TransformerBlock(nn.Module):
    """Attention and an MLP, each normalized before, scaled after, and added to its input.

    ``layer_scale`` is the initial factor, ``None`` for no scaling. Further arguments of forward
    are those of the attention.

    Shape, as of its parts:
        x: (..., width) -> (..., width)
    """

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        mlp: nn.Module,
        *,
        layer_scale: float | None = 1.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = attention
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = mlp
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.drop_path = StochasticDepth(drop_path, "row")
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), *arguments)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def vit_block(
    width: int, heads: int, *, gated: bool = False, drop_path: float, eps: float
) -> TransformerBlock:
    """Return a block of a plain Vision Transformer; its MLP is a SwiGLU if ``gated``."""
    mlp = SwiGLU(width, 4 * width) if gated else MLP(width, 4 * width)
    return TransformerBlock(width, SelfAttention(width, heads), mlp, drop_path=drop_path, eps=eps)


class SelfAttention(nn.Module):
    """Multi-head self-attention; rotary positions apply to the last tokens, the patches.

    Shape:
        x: (B, tokens, width) -> (B, tokens, width)
        mask: (B, 1, tokens, tokens), True where a token may attend, or added to the logits
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary | None, mask: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(attended.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021, https://arxiv.org/abs/2103.17239)."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class MLP(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """An MLP with a gate, the SiLU of other channels (Shazeer, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


def attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None
) -> Tensor:
    """Return multi-head attention of projected tokens, (B, N, width) to (B, M, width)."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def pixel_centers(height: int, width: int, like: Tensor) -> Tensor:
    """Return the row and the column of each pixel's center, from 0 to 1: (height * width, 2)."""
    sides = ((torch.arange(side, device=like.device) + 0.5) / side for side in (height, width))
    return torch.stack(torch.meshgrid(*sides, indexing="ij"), 2).flatten(0, 1)


def sine_positions(x: Tensor) -> Tensor:
    """Return sines and cosines of the pixels' rows and columns, (h * w, C), for (B, C, h, w).

    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; of images: Carion et al. 2020 (DETR),
    https://arxiv.org/abs/2005.12872
    """
    _, channels, height, width = x.shape
    rate = 10000 ** (torch.arange(channels // 4, device=x.device) * (4 / channels))
    rows, columns = (
        2 * math.pi * (torch.arange(1, side + 1, device=x.device) / side)[:, None] / rate
        for side in (height, width)
    )
    rows, columns = (torch.stack([y.sin(), y.cos()], 2).flatten(1) for y in (rows, columns))
    grid = rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)
    return torch.cat(grid, 2).flatten(0, 1)


def rotary_positions(head: int, height: int, width: int, like: Tensor) -> Rotary:
    """Return the rotary positions of DINOv3 for a grid of patches, in float32.

    The centers of the patches have coordinates of -1 to 1 on each axis. Half of the angles are of
    the row, half of the column, with periods from 1 to nearly 100. ``head`` is the channels of a
    head, a multiple of 4.
    """
    periods = 100.0 ** (torch.arange(head // 4, device=like.device) / (head // 4))
    centers = 2 * pixel_centers(height, width, like) - 1
    angles = (2 * math.pi * centers[:, :, None] / periods).flatten(1).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate pairs of channels of the last tokens of (B, heads, tokens, head) by their angles.

    Su et al. 2021, https://arxiv.org/abs/2104.09864
    """
    cosine, sine = (angles.to(x.dtype) for angles in rotary)
    others = x.shape[2] - cosine.shape[0]
    patches = x[:, :, others:]
    first, second = patches.chunk(2, 3)
    rotated = patches * cosine + torch.cat([-second, first], 3) * sine
    return torch.cat([x[:, :, :others], rotated], 2)
