"""Mask2Former: queries that attend to the pixels of the masks they predict."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from segkit.core.config import check_bounds
from segkit.core.errors import ConfigError
from segkit.models.decoders.pixel_decoders import LEVELS, DeformablePixelDecoder, FeaturePyramid
from segkit.models.layers import resize
from segkit.models.queries import QueryClassifier, mlp, semantic_logits
from segkit.models.transformer import attend, sine_positions


class Mask2Former(nn.Module):
    """A mask transformer with masked attention, trained by the loss ``mask_classification``.

    Cheng et al. 2022, https://arxiv.org/abs/2112.01527

    Args:
        channels: Encoder widths, shallow to deep; the last four levels are used.
        strides: Encoder strides.
        num_classes: Number of classes, the channels of the logits.
        width: Channels of queries, maps and masks; a multiple of 4 and of ``heads``.
        queries: Number of queries.
        layers: Layers of the transformer decoder.
        heads: Heads of every attention.
        feedforward: Hidden channels of the layers.
        pixel_decoder: ``deformable``, the paper's, or ``fpn``, a feature pyramid, which is lighter.
        pixel_layers: Layers of the deformable pixel decoder.
        pixel_feedforward: Their hidden channels.

    Shape:
        features[i]: (B, channels[i], H / strides[i], W / strides[i])
        out: (B, num_classes, h, w), with h = H / strides[-4] and w = W / strides[-4]
        query_classes: (layers + 1, B, queries, max(2, num_classes) + 1), in training
        query_masks: (layers + 1, B, queries, h, w), in training

    Departs from the authors' code: probabilities of classes are resized to the image's size, not
    those of masks.
    """

    takes = "pyramid"

    def __init__(
        self,
        *,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        num_classes: int,
        width: int = 256,
        queries: int = 100,
        layers: int = 9,
        heads: int = 8,
        feedforward: int = 2048,
        pixel_decoder: Literal["deformable", "fpn"] = "deformable",
        pixel_layers: int = 6,
        pixel_feedforward: int = 1024,
    ) -> None:
        super().__init__()
        check_bounds(1, 10_000, queries=queries, heads=heads)
        check_bounds(1, 100, layers=layers, pixel_layers=pixel_layers)
        if width % 4 or width % heads:
            raise ConfigError(f"width: expected a multiple of 4 and of heads={heads}, got {width}")
        self.num_classes, self.heads = num_classes, heads
        self.used_levels = (-4, -3, -2, -1)
        sizes = {"heads": heads, "layers": pixel_layers, "feedforward": pixel_feedforward}
        self.pixel_decoder = (
            FeaturePyramid(channels[-4:], width=width)
            if pixel_decoder == "fpn"
            else DeformablePixelDecoder(channels[-4:], width=width, **sizes)
        )
        self.query_features = nn.Embedding(queries, width)
        self.query_positions = nn.Embedding(queries, width)
        self.level_embed = nn.Embedding(LEVELS, width)
        self.layers = nn.ModuleList(
            MaskedAttentionLayer(width, heads=heads, feedforward=feedforward) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.class_head = QueryClassifier(width, num_classes)
        self.mask_head = mlp(width, width, width, width)

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        maps, embeddings = self.pixel_decoder(features[-4:])
        levels = self.level_embed.weight
        values = [x.flatten(2).mT + level for x, level in zip(maps, levels, strict=True)]
        keys = [x + sine_positions(y).to(x.dtype) for x, y in zip(values, maps, strict=True)]
        queries = self.query_features.weight.expand(embeddings.shape[0], -1, -1)
        outputs = [self.norm(queries)]
        masks = [self._masks(outputs[0], embeddings)]
        for i, layer in enumerate(self.layers):
            level = i % LEVELS
            attended = _attended(masks[-1].detach(), maps[level].shape[-2:])
            positions = self.query_positions.weight
            queries = layer(queries, positions, keys[level], values[level], attended)
            outputs.append(self.norm(queries))
            masks.append(self._masks(outputs[-1], embeddings))
        classes = self.class_head(torch.stack(outputs if self.training else outputs[-1:]))
        out = {"out": semantic_logits(classes[-1], masks[-1], num_classes=self.num_classes)}
        if not self.training:
            return out
        return {**out, "query_classes": classes, "query_masks": torch.stack(masks)}

    def _masks(self, queries: Tensor, embeddings: Tensor) -> Tensor:
        return torch.einsum("bqc,bchw->bqhw", self.mask_head(queries), embeddings)


class MaskedAttentionLayer(nn.Module):
    """Masked attention of the queries to a map, self-attention, and an MLP; each with a norm.

    Shape:
        queries: (B, Q, width); the output is the same
        positions: (Q, width)
        keys, values: (B, N, width)
        attended: (B, 1, Q, N), True for the pixels that a query attends to
    """

    def __init__(self, width: int, *, heads: int, feedforward: int) -> None:
        super().__init__()
        self.cross_attn = Attention(width, heads=heads)
        self.cross_attn_layer_norm = nn.LayerNorm(width)
        self.self_attn = Attention(width, heads=heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.mlp = mlp(width, feedforward, width)
        self.final_layer_norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, queries: Tensor, positions: Tensor, keys: Tensor, values: Tensor, attended: Tensor
    ) -> Tensor:
        crossed = self.cross_attn(queries + positions, keys, values, attended)
        x = self.cross_attn_layer_norm(queries + crossed)
        x = self.self_attn_layer_norm(x + self.self_attn(x + positions, x + positions, x))
        return self.final_layer_norm(x + self.mlp(x))


class Attention(nn.Module):
    """Multi-head attention with a projection each for queries, keys, values and the result."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, attended: Tensor | None = None
    ) -> Tensor:
        projected = self.q_proj(queries), self.k_proj(keys), self.v_proj(values)
        return self.out_proj(attend(*projected, self.heads, attended))


def _attended(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Return the pixels of a map inside the masks, (B, 1, Q, N); all pixels for an empty mask."""
    inside = resize(masks, size).flatten(2)[:, None] >= 0
    return inside | ~inside.any(3, keepdim=True)
