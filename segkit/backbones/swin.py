"""Swin Transformers, first and second version, of any width and window."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.models import swin_transformer as reference

from segkit.backbones.stages import refuse_dilation


class Swin(nn.Module):
    """A Swin Transformer's four stages, each with a LayerNorm of its own.

    Liu et al. 2021, https://arxiv.org/abs/2103.14030 and 2022, https://arxiv.org/abs/2111.09883

    Args:
        width: Channels of the first stage; each stage has twice as many as the one before.
        depths: Blocks of each stage.
        heads: Attention heads of each stage.
        version: The paper: 2 normalizes after attention, which compares by cosine.
        window: Side of the attention windows, in patches of 4 pixels.
        drop_path: Stochastic depth of the last block; it grows linearly from 0 at the first.
        checkpointing: Drop the activations inside blocks and recompute them in backward.

    Shape:
        image: (B, 3, H, W)
        features[i]: (B, channels[i], H / strides[i], W / strides[i]), rounded up

    Departs from torchvision's: pads the image to whole patches where that drops pixels.
    """

    strides = (4, 8, 16, 32)
    fresh = ("norm0", "norm1", "norm2", "norm3")
    """Parts that a classifier's weights do not have."""

    def __init__(
        self,
        *,
        width: int,
        depths: Sequence[int],
        heads: Sequence[int],
        version: Literal[1, 2] = 1,
        window: int = 7,
        drop_path: float = 0.3,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        block, attention, merge = {
            1: (reference.SwinTransformerBlock, Attention, Merging),
            2: (reference.SwinTransformerBlockV2, AttentionV2, MergingV2),
        }[version]
        self.features = reference.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=width,
            depths=list(depths),
            num_heads=list(heads),
            window_size=[window, window],
            stochastic_depth_prob=drop_path,
            num_classes=1,
            block=partial(block, attn_layer=attention),
            downsample_layer=merge,
        ).features
        self.channels = tuple(width * 2**stage for stage in range(4))
        self.checkpointing = checkpointing
        for name, channels in zip(self.fresh, self.channels, strict=True):
            self.add_module(name, nn.LayerNorm(channels))

    def forward(self, image: Tensor) -> list[Tensor]:
        (_, below), (_, right) = (_whole(side, 4) for side in image.shape[-2:])
        x = F.pad(image, (0, right, 0, below))
        # features: the patches, then stages and mergings in turn
        features = []
        for i, name in enumerate(self.fresh):
            x = self._run(self.features[2 * i + 1], self.features[2 * i](x))
            normalized = self.get_submodule(name)(x)
            features.append(normalized.permute(0, 3, 1, 2))
        return features

    def only_for(self, level: int) -> nn.Module:
        """What no other feature map depends on."""
        return self.get_submodule(self.fresh[level])

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not (self.checkpointing and self.training):
            return stage(x)
        for block in stage.children():
            x = checkpoint(block, x, use_reentrant=False)
        return x


class Attention(reference.ShiftedWindowAttention):
    """torchvision's attention within windows, its sizes free while a model is exported."""

    def forward(self, x: Tensor) -> Tensor:
        def attend(query: Tensor, key: Tensor) -> Tensor:
            return (query * query.size(-1) ** -0.5) @ key.mT

        return _within_windows(self, x, attend, self.qkv.bias)


class AttentionV2(reference.ShiftedWindowAttentionV2):
    """The same for the second version: queries and keys compared by cosine, keys without bias."""

    def forward(self, x: Tensor) -> Tensor:
        def attend(query: Tensor, key: Tensor) -> Tensor:
            scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
            return F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT * scale

        query, key, value = self.qkv.bias.chunk(3)
        return _within_windows(self, x, attend, torch.cat([query, torch.zeros_like(key), value]))


def _within_windows(
    attention: Any, x: Tensor, attend: Callable[[Tensor, Tensor], Tensor], bias: Tensor
) -> Tensor:
    """Attention of each patch to those of its window.

    Args:
        attention: torchvision's module.
        x: (B, h, w, C), filled up with zeros to whole windows.
        attend: Queries and keys, (windows, heads, patches, channels), to scores.
        bias: Of queries, keys and values.
    """
    window, heads = attention.window_size[0], attention.num_heads
    batch, height, width, channels = x.shape
    (down, below), (across, right) = _whole(height, window), _whole(width, window)
    filled = F.pad(x, (0, 0, 0, right, 0, below)).flatten(0, 2)
    # A side of a single window is not shifted.
    up, left = (
        torch.sym_min(shift, (number - 1) * window)
        for shift, number in zip(attention.shift_size, (down, across), strict=True)
    )
    # Where each patch of each window is on the map rolled by the shift, and on the map. One index
    # in place of rolls and permutations: no size of one is ever told from others, which would
    # tie an exported model to images of one window, or of several.
    places = down * across * window**2
    image, place = _divide(torch.arange(batch * places, device=x.device), places)
    outer, inner = _divide(place, window**2)
    (row, column), (lower, further) = _divide(outer, across), _divide(inner, window)
    row, column = row * window + lower, column * window + further
    source = image * places + _divide(row + up, down * window)[1] * (across * window)
    source += _divide(column + left, across * window)[1]
    windows = filled.index_select(0, source).reshape(-1, window**2, channels)
    qkv = F.linear(windows, attention.qkv.weight, bias).unflatten(2, (3, heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    scores = attend(query, key) + attention.get_relative_position_bias()
    if any(attention.shift_size):
        part = 3 * _seams(row, down, window, up) + _seams(column, across, window, left)
        part = part.reshape(-1, 1, window**2)
        apart = part[..., None] != part[..., None, :]
        scores = scores - 100.0 * apart.to(scores.dtype)
    windows = attention.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    # And back: where each patch of the map is in its window.
    image, place = _divide(torch.arange(batch * height * width, device=x.device), height * width)
    row, column = _divide(place, width)
    (row, lower), (column, further) = (
        _divide(_divide(at + (number * window - shift), number * window)[1], window)
        for at, shift, number in ((row, up, down), (column, left, across))
    )
    source = image * places + (row * across + column) * window**2 + lower * window + further
    x = windows.flatten(0, 1).index_select(0, source)
    return x.unflatten(0, (batch, height, width))


def _divide(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """Quotient and rest, of numbers of at least 0; ONNX has no remainder by a free size."""
    quotient = x // by
    return quotient, x - quotient * by


def _seams(at: Tensor, number: int, window: int, shift: int) -> Tensor:
    """Which places of a shifted line were together before: 0, 1 or 2."""
    return (at >= (number - 1) * window).long() + (at >= number * window - shift).long()


class Merging(reference.PatchMerging):
    """torchvision's merging of four patches into one, its sizes free while a model is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(_fours(x)))


class MergingV2(reference.PatchMergingV2):
    """The same for the second version, which normalizes last."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(_fours(x)))


def _fours(x: Tensor) -> Tensor:
    """Four patches side by side, the left ones first: (B, h / 2, w / 2, 4 C), rounded up."""
    (down, below), (across, right) = (_whole(side, 2) for side in x.shape[1:3])
    x = F.pad(x, (0, 0, 0, right, 0, below))
    return x.unflatten(2, (across, 2)).unflatten(1, (down, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)


def _whole(side: int, part: int) -> tuple[int, int]:
    """How many parts cover a side, and how far they stand out."""
    number = (side + part - 1) // part
    return number, number * part - side


def swin(
    width: int,
    depths: Sequence[int],
    heads: Sequence[int],
    *,
    window: int = 7,
    version: Literal[1, 2] = 1,
) -> Callable[..., Swin]:
    """A published size of Swin, its window still open: 12 is that of the 384-pixel weights."""

    def build(
        *,
        window: int = window,
        drop_path: float = 0.3,
        checkpointing: bool = False,
        output_stride: int = 32,
    ) -> Swin:
        refuse_dilation("Swin", output_stride)
        return Swin(
            width=width,
            depths=depths,
            heads=heads,
            version=version,
            window=window,
            drop_path=drop_path,
            checkpointing=checkpointing,
        )

    return build


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "swin_t": swin(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_s": swin(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_b": swin(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_l": swin(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    "swin_v2_t": swin(96, (2, 2, 6, 2), (3, 6, 12, 24), window=8, version=2),
    "swin_v2_s": swin(96, (2, 2, 18, 2), (3, 6, 12, 24), window=8, version=2),
    "swin_v2_b": swin(128, (2, 2, 18, 2), (4, 8, 16, 32), window=8, version=2),
}
