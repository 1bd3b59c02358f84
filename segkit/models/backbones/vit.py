"""Plain Vision Transformers, as DINOv2 and DINOv3 pretrain them."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.models.convnext import LayerNorm2d

from segkit.core.backend import is_exporting
from segkit.core.config import check_bounds
from segkit.core.errors import ConfigError
from segkit.models.backbones.inputs import set_in_channels
from segkit.models.backbones.stages import refuse_dilation
from segkit.models.layers import resize
from segkit.models.transformer import rotary_positions, vit_block


def vit(
    width: int,
    depth: int,
    heads: int,
    registers: int = 0,
    eps: float = 1e-6,
    gated: bool = False,
    *,
    patch: int,
    positions: int,
    output: Literal["pyramid", "map", "tokens"] = "pyramid",
    omitted_blocks: int = 0,
    drop_path: float = 0.0,
    checkpointing: bool = False,
    in_channels: int = 3,
    output_stride: int = 32,
) -> "PlainTransformer":
    """Build a Vision Transformer of DINOv2 or DINOv3.

    Oquab et al. 2023, https://arxiv.org/abs/2304.07193; Simeoni et al. 2025,
    https://arxiv.org/abs/2508.10104

    Departs from DINOv2: an image whose sides are not multiples of the patch is resized to the next
    ones, and learned positions are resized without the offset of 0.1 and without antialiasing.

    Args:
        width: Channels of the tokens.
        depth: Number of blocks.
        heads: Attention heads.
        registers: Number of register tokens.
        eps: Of the norms.
        gated: SwiGLU in place of the MLPs.
        patch: Side of a patch in pixels.
        positions: Side of the grid of learned positions, resized bicubically to the image's grid;
            0 for rotary positions.
        output: ``pyramid``: maps of the blocks at a quarter, half, three quarters and the end, with
            strides 4 to 32 by a neck; ``map``: the patches of the last block alone; each normalized
            by the last norm. ``tokens``: those of the last block without the norm, for ``eomt``.
        omitted_blocks: Number of last blocks that this network does not have, for ``eomt``.
        drop_path: Probability of stochastic depth of the last block; it grows linearly from 0.
        checkpointing: Do not store activations inside blocks; recompute them in backward.
        in_channels: Channels of the image.
    """
    refuse_dilation("ViT", output_stride)
    check_bounds(0, 1, drop_path=drop_path)
    check_bounds(1, 1024, patch=patch)
    check_bounds(0, 1024, positions=positions)
    if omitted_blocks:
        check_bounds(0, depth - 4, omitted_blocks=omitted_blocks)
        if output != "tokens":
            raise ConfigError(f'omitted_blocks: needs output "tokens", got "{output}"')
    block = partial(vit_block, width, heads, gated=gated, eps=eps)
    steepness = drop_path / max(1, depth - 1)
    depth -= omitted_blocks
    return PlainTransformer(
        width,
        (block(drop_path=steepness * i) for i in range(depth)),
        context=None if positions else partial(rotary_positions, width // heads),
        ends=[depth * quarter // 4 for quarter in (1, 2, 3, 4)],
        norm=nn.LayerNorm(width, eps=eps) if output != "tokens" else None,
        neck=PyramidNeck(width, partial(LayerNorm2d, eps=1e-6)) if output == "pyramid" else None,
        patch=patch,
        registers=registers,
        positions=positions,
        checkpointing=checkpointing,
        in_channels=in_channels,
    )


class PlainTransformer(nn.Module):
    """Tokens of one width, a class token, registers and the image's patches, through blocks.

    Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929; registers: Darcet et al. 2024,
    https://arxiv.org/abs/2309.16588

    Args:
        blocks: Called with the tokens, (B, N, width), and with what ``context`` returns.
        context: Called with the rows and columns of patches, and with the tokens.
        ends: Number of the last block of each stage, from 1. The outputs of these blocks make the
            pyramid, that of the last one a single map.
        norm: Normalizes these outputs.
        neck: Makes the pyramid. Without a neck and a norm, the other tokens are a second map.

    Further arguments are those of :func:`vit`.

    Shape:
        image: (B, in_channels, H, W)
        features[i]: (B, width, H / strides[i], W / strides[i]), rounded up; the other tokens:
            (B, width, 1 + registers, 1)
    """

    def __init__(
        self,
        width: int,
        blocks: Iterable[nn.Module],
        *,
        context: Callable[[int, int, Tensor], Any] | None,
        ends: Sequence[int],
        norm: nn.Module | None = None,
        neck: "PyramidNeck | None",
        patch: int,
        registers: int = 0,
        positions: int = 0,
        checkpointing: bool,
        in_channels: int,
    ) -> None:
        super().__init__()
        project = nn.Conv2d(3, width, patch, stride=patch)
        self.patch_embed = nn.Sequential(OrderedDict(proj=project))
        set_in_channels(self.patch_embed, in_channels)
        self.cls_token = _tokens(1, width)
        self.register_tokens = _tokens(registers, width) if registers else None
        self.pos_embed = _tokens(positions**2 + 1, width) if positions else None
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.neck, self.context = norm, neck, context
        self.patch, self.checkpointing, self.in_channels = patch, checkpointing, in_channels
        self.outputs = ends if neck else ends[-1:]
        self.strides = neck.strides if neck else (patch,) if norm else (patch, patch)
        self.channels = (width,) * len(self.strides)
        if neck:
            self.output_modules = [f"neck.levels.{i}" for i in range(4)]
        self.stages = [[f"blocks.{i}" for i in range(*bounds)] for bounds in pairwise((0, *ends))]
        first = ["patch_embed.proj", "cls_token", "register_tokens", "pos_embed"]
        self.stages[0] = first + self.stages[0]
        if norm:
            self.stages[-1].append("norm")

    def forward(self, image: Tensor) -> list[Tensor]:
        height, width = image.shape[-2:]
        rows, columns = ((side + self.patch - 1) // self.patch for side in (height, width))
        x = self.embed(resize(image, (rows * self.patch, columns * self.patch)), rows, columns)
        context = self.context(rows, columns, x) if self.context else None
        results = []
        for number, block in enumerate(self.blocks, 1):
            recompute = self.checkpointing and self.training
            step = partial(checkpoint, block, use_reentrant=False) if recompute else block
            x = step(x, context)
            if number in self.outputs:
                results.append(self.norm(x) if self.norm else x)
        maps = [x[:, -rows * columns :].mT.unflatten(2, (rows, columns)) for x in results]
        if self.neck:
            return self.neck(maps, height, width)
        return maps if self.norm else [*maps, x[:, : -rows * columns].mT[..., None]]

    def embed(self, image: Tensor, rows: int, columns: int) -> Tensor:
        """Return the tokens, with learned positions if there are any: class, registers, patches."""
        patches = self.patch_embed(image).flatten(2).transpose(1, 2)
        first: Tensor = self.cls_token
        if self.pos_embed is not None:
            first = first + self.pos_embed[:, :1]
            patches = patches + resized(self.pos_embed[:, 1:], rows, columns)
        tokens = [first] if self.register_tokens is None else [first, self.register_tokens]
        return torch.cat([*(x.expand(image.shape[0], -1, -1) for x in tokens), patches], 1)


def resized(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Return learned positions of a square grid for another grid, (1, rows * columns, width).

    As bicubic ``F.interpolate``, whose gradient is not deterministic on CUDA.
    """
    side = round(positions.shape[1] ** 0.5)
    if (rows, columns) == (side, side) and not is_exporting():
        return positions
    grid = positions.mT.unflatten(2, (side, side)).float()
    identity = torch.eye(side, device=grid.device)[None, None]
    # The coefficients of each axis, (rows, side) and (columns, side).
    down, across = (
        F.interpolate(identity, (n, side), mode="bicubic")[0, 0] for n in (rows, columns)
    )
    return (down @ grid @ across.mT).to(positions.dtype).flatten(2).mT


def _tokens(number: int, width: int) -> nn.Parameter:
    """Return learned tokens, (1, number, width)."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, number, width), std=0.02))


class PyramidNeck(nn.Module):
    """Maps of strides 4, 8, 16 and 32 from four maps of stride 16, or nearly.

    As BEiT (Bao et al. 2022, https://arxiv.org/abs/2106.08254) and ViTDet (Li et al. 2022,
    https://arxiv.org/abs/2203.16527): transposed convolutions for the finer maps, pooling for the
    coarsest.

    Args:
        width: Channels of the maps.
        norm: Makes the norm between the transposed convolutions of the finest map: LayerNorm in
            ViTDet, BatchNorm in BEiT.

    Shape:
        maps[i]: (B, width, h, w)
        pyramid[i]: (B, width, H / (4, 8, 16, 32)[i], W / (4, 8, 16, 32)[i]), rounded up

    Departs from the papers: a map of another size, as from patches of 14 pixels, is resized.
    """

    strides = (4, 8, 16, 32)

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        double = partial(nn.ConvTranspose2d, width, width, 2, stride=2)
        finest = nn.Sequential(double(), norm(width), nn.GELU(), double())
        coarser = double(), nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)
        self.levels = nn.ModuleList([finest, *coarser])

    def forward(self, maps: Sequence[Tensor], height: int, width: int) -> list[Tensor]:
        pyramid = []
        for level, x, stride in zip(self.levels, maps, self.strides, strict=True):
            size = (height + stride - 1) // stride, (width + stride - 1) // stride
            pyramid.append(resize(level(x), size))
        return pyramid


_dinov2 = partial(vit, patch=14, positions=37)
_dinov3 = partial(vit, patch=16, positions=0)

BACKBONES: dict[str, Callable[..., nn.Module]] = {  # width, depth, heads, registers, eps, gated
    "vit_s_dinov2": partial(_dinov2, 384, 12, 6, 0, 1e-6, False),
    "vit_b_dinov2": partial(_dinov2, 768, 12, 12, 0, 1e-6, False),
    "vit_l_dinov2": partial(_dinov2, 1024, 24, 16, 0, 1e-6, False),
    "vit_s_dinov2_reg": partial(_dinov2, 384, 12, 6, 4, 1e-6, False),
    "vit_b_dinov2_reg": partial(_dinov2, 768, 12, 12, 4, 1e-6, False),
    "vit_l_dinov2_reg": partial(_dinov2, 1024, 24, 16, 4, 1e-6, False),
    "vit_s_dinov3": partial(_dinov3, 384, 12, 6, 4, 1e-5, False),
    "vit_s_plus_dinov3": partial(_dinov3, 384, 12, 6, 4, 1e-5, True),
    "vit_b_dinov3": partial(_dinov3, 768, 12, 12, 4, 1e-5, False),
    "vit_l_dinov3": partial(_dinov3, 1024, 24, 16, 4, 1e-5, False),
}
