"""Pixel decoders of Mask2Former: from four feature maps to three maps and pixel embeddings."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segkit.models.layers import resize, sample_points
from segkit.models.queries import mlp
from segkit.models.transformer import pixel_centers, sine_positions

LEVELS = 3
"""Maps that the queries attend to; the fourth, of the least stride, is for masks only."""


def conv_norm(inputs: int, outputs: int, kernel: int = 1, *, bias: bool = False) -> nn.Sequential:
    """Return a convolution of unchanged size and GroupNorm, of 32 groups in wide layers."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(math.gcd(32, outputs // 2), outputs))


class FeaturePyramid(nn.Module):
    """A feature pyramid network with GroupNorm, the pixel decoder of MaskFormer.

    Cheng et al. 2021, https://arxiv.org/abs/2107.06278

    Shape, shallow to deep:
        features[i]: (B, channels[i], h_i, w_i)
        maps: three of (B, width, h_i, w_i), deep to shallow
        embeddings: (B, width, h_0, w_0)
    """

    def __init__(self, channels: Sequence[int], *, width: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(conv_norm(inputs, width) for inputs in channels[::-1])
        self.smooth = nn.ModuleList(conv_norm(width, width, 3).append(nn.ReLU()) for _ in channels)
        self.embed = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        maps: list[Tensor] = []
        for x, lateral, smooth in zip(features[::-1], self.laterals, self.smooth, strict=True):
            y = lateral(x)
            if maps:
                y = y + resize(maps[-1], y.shape[-2:], mode="nearest")
            maps.append(smooth(y))
        return maps[:LEVELS], self.embed(maps[-1])


class DeformablePixelDecoder(nn.Module):
    """A transformer encoder with deformable attention over three maps, and one pyramid level.

    Cheng et al. 2022, https://arxiv.org/abs/2112.01527; inputs and outputs are those of
    :class:`FeaturePyramid`.
    """

    def __init__(
        self, channels: Sequence[int], *, width: int, heads: int, layers: int, feedforward: int
    ) -> None:
        super().__init__()
        self.projections = nn.ModuleList(conv_norm(c, width, bias=True) for c in channels[:0:-1])
        self.level_embed = nn.Parameter(torch.empty(LEVELS, width))
        nn.init.normal_(self.level_embed)
        self.layers = nn.ModuleList(
            DeformableLayer(width, heads=heads, feedforward=feedforward) for _ in range(layers)
        )
        self.lateral = conv_norm(channels[0], width)
        self.smooth = conv_norm(width, width, 3).append(nn.ReLU())
        self.embed = nn.Conv2d(width, width, 1)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        shallow, *deeper = features
        maps = [project(x) for project, x in zip(self.projections, deeper[::-1], strict=True)]
        x = torch.cat([y.flatten(2).mT for y in maps], 1)
        positions = [sine_positions(y) + e for y, e in zip(maps, self.level_embed, strict=True)]
        sizes = [(y.shape[2], y.shape[3]) for y in maps]
        places, centers = torch.cat(positions), torch.cat([pixel_centers(*s, x) for s in sizes])
        for layer in self.layers:
            x = layer(x, places.to(x.dtype), centers, sizes)
        parts = x.split([height * width for height, width in sizes], 1)
        maps = [part.mT.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
        y = self.lateral(shallow)
        return maps, self.embed(self.smooth(y + resize(maps[-1], y.shape[-2:])))


class DeformableLayer(nn.Module):
    """An encoder layer: deformable attention and an MLP, each followed by a norm."""

    def __init__(self, width: int, *, heads: int, feedforward: int) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(width, heads=heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.mlp = mlp(width, feedforward, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, places: Tensor, centers: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        x = self.self_attn_layer_norm(x + self.self_attn(x, x + places, centers, sizes))
        return self.final_layer_norm(x + self.mlp(x))


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention: a head reads each map at ``points`` predicted points.

    Zhu et al. 2021 (Deformable DETR), https://arxiv.org/abs/2010.04159

    Shape:
        x: (B, N, width), the pixels of all maps; the output is the same
        queries: (B, N, width), the same with positions
        centers: (N, 2), rows and columns from 0 to 1
    """

    def __init__(self, width: int, *, heads: int, points: int = 4) -> None:
        super().__init__()
        self.shape = heads, LEVELS, points
        self.sampling_offsets = nn.Linear(width, 2 * math.prod(self.shape))
        self.attention_weights = nn.Linear(width, math.prod(self.shape))
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        for name, parameter in self.named_parameters():
            if name in ("value_proj.weight", "output_proj.weight"):
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
        # Each head begins with points at distances 1, 2, ... in a direction of its own.
        angle = torch.arange(heads) * (2 * math.pi / heads)
        direction = torch.stack([angle.cos(), angle.sin()], 1)
        direction = direction / direction.abs().amax(1, keepdim=True)
        steps = torch.arange(1.0, points + 1)[:, None] * direction[:, None, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(steps.expand(*self.shape, 2).flatten())

    def forward(
        self, x: Tensor, queries: Tensor, centers: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        heads, _, points = self.shape
        # (B, heads, N, ...) in all of the following
        offsets = self.sampling_offsets(queries).unflatten(2, (*self.shape, 2)).transpose(1, 2)
        shares = self.attention_weights(queries).unflatten(2, (heads, -1))
        shares = shares.softmax(3).transpose(1, 2)
        values = self.value_proj(x).unflatten(2, (heads, -1)).permute(0, 2, 3, 1).flatten(0, 1)
        parts = values.split([height * width for height, width in sizes], 2)
        result = torch.zeros_like(values)
        for level, (part, (height, width)) in enumerate(zip(parts, sizes, strict=True)):
            column, row = (offsets[..., level, :, i].flatten(0, 1) for i in (0, 1))
            places = centers[:, 1:] + column / width, centers[:, :1] + row / height
            at = torch.stack(places, 3)  # (B * heads, N, points, 2)
            sampled = sample_points(part.unflatten(2, (height, width)), at.flatten(1, 2))
            share = shares[..., level * points : (level + 1) * points].flatten(0, 1)
            result = result + (sampled.unflatten(2, (-1, points)) * share[:, None]).sum(3)
        return self.output_proj(result.unflatten(0, (-1, heads)).flatten(1, 2).mT)
