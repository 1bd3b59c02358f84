"""Mix Transformer (MiT), the encoder of SegFormer."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkit.core.backend import is_exporting
from segkit.core.config import check_bounds
from segkit.models.backbones.inputs import set_in_channels
from segkit.models.backbones.stages import refuse_dilation, run
from segkit.models.kernels.depthwise import DepthwiseConv2d
from segkit.models.transformer import MLP, TransformerBlock, attend

HEADS, REDUCTIONS = (1, 2, 5, 8), (8, 4, 2, 1)


class MiT(nn.Module):
    """A Mix Transformer: four stages of attention whose keys and values come from a smaller map.

    Xie et al. 2021, https://arxiv.org/abs/2105.15203

    Args:
        widths: Channels of each stage.
        depths: Blocks of each stage.
        drop_path: Probability of stochastic depth of the last block; it grows linearly from 0.
        checkpointing: Do not store activations inside blocks; recompute them in backward.
        in_channels: Channels of the image.

    Shape:
        image: (B, in_channels, H, W)
        features[i]: (B, widths[i], H / strides[i], W / strides[i]), rounded up
    """

    strides = (4, 8, 16, 32)

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        *,
        drop_path: float = 0.1,
        checkpointing: bool = False,
        in_channels: int = 3,
        output_stride: int = 32,
    ) -> None:
        super().__init__()
        refuse_dilation("MiT", output_stride)
        check_bounds(0, 1, drop_path=drop_path)
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.levels = nn.ModuleList()
        for number, (inputs, width) in enumerate(zip((3, *widths), widths, strict=False)):
            drop_paths = [next(rates) for _ in range(depths[number])]
            self.levels.append(MixStage(inputs, width, number, drop_paths))
        self.apply(_initialize)
        set_in_channels(self.levels, in_channels)
        self.channels = tuple(widths)
        self.checkpointing, self.in_channels = checkpointing, in_channels
        parts = ("embed", "embed_norm", "blocks", "norm")
        self.stages = tuple(tuple(f"levels.{i}.{part}" for part in parts) for i in range(4))

    def forward(self, image: Tensor) -> list[Tensor]:
        x, features = image, []
        for level in self.levels:
            x = level(x, recompute=self.checkpointing and self.training)
            features.append(x)
        return features


class MixStage(nn.Module):
    """Overlapping patch embedding, blocks, and a LayerNorm.

    Shape:
        x: (B, inputs, H, W) -> (B, width, H / stride, W / stride), rounded up
    """

    def __init__(self, inputs: int, width: int, number: int, drop_paths: Sequence[float]) -> None:
        super().__init__()
        patch, stride = (3, 2) if number else (7, 4)
        self.embed = nn.Conv2d(inputs, width, patch, stride=stride, padding=patch // 2)
        self.embed_norm = nn.LayerNorm(width)
        self.blocks = nn.Sequential()
        for drop_path in drop_paths:
            attention = ReducedAttention(width, HEADS[number], REDUCTIONS[number])
            parts = width, attention, MixFFN(width, 4 * width)
            self.blocks.append(TransformerBlock(*parts, layer_scale=None, drop_path=drop_path))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, *, recompute: bool = False) -> Tensor:
        x = self.embed_norm(self.embed(x).permute(0, 2, 3, 1))
        x = run(self.blocks, x, recompute=recompute)
        return self.norm(x).permute(0, 3, 1, 2)


class ReducedAttention(nn.Module):
    """Self-attention in which keys and values come from a map reduced by a strided convolution.

    Section 3.1 of the paper. As in the authors' code, rows and columns beyond a multiple of
    ``reduction`` are in no key. A map smaller than one multiple is padded with zeros.

    Shape, as of the MLP:
        x: (B, h, w, width) -> (B, h, w, width)
    """

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        if reduction > 1:
            self.reduce = nn.Conv2d(width, width, reduction, stride=reduction)
            self.reduce_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        reduced = x
        if self.reduction > 1:
            whole = x.permute(0, 3, 1, 2)
            if not is_exporting():
                below, right = (max(0, self.reduction - side) for side in x.shape[1:3])
                whole = F.pad(whole, (0, right, 0, below))
            reduced = self.reduce_norm(self.reduce(whole).permute(0, 2, 3, 1))
        key, value = self.kv(reduced).flatten(1, 2).chunk(2, 2)
        attended = attend(self.q(x).flatten(1, 2), key, value, self.heads)
        return self.proj(attended.unflatten(1, x.shape[1:3]))


class MixFFN(MLP):
    """A perceptron with a 3x3 depthwise convolution before its GELU, which tells positions."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.dwconv = DepthwiseConv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(x))


def _initialize(module: nn.Module) -> None:
    """Initialize a convolution as the authors do."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
        nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        assert module.bias is not None
        nn.init.zeros_(module.bias)


_NARROW, _WIDE = (32, 64, 160, 256), (64, 128, 320, 512)
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "mit_b0": partial(MiT, _NARROW, (2, 2, 2, 2)),
    "mit_b1": partial(MiT, _WIDE, (2, 2, 2, 2)),
    "mit_b2": partial(MiT, _WIDE, (3, 4, 6, 3)),
    "mit_b3": partial(MiT, _WIDE, (3, 4, 18, 3)),
    "mit_b4": partial(MiT, _WIDE, (3, 8, 27, 3)),
    "mit_b5": partial(MiT, _WIDE, (3, 6, 40, 3)),
}
