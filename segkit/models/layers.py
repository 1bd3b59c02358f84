"""Layers that decoders share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkit.core.backend import is_exporting
from segkit.core.config import check_bounds
from segkit.models.kernels.depthwise import DepthwiseConv2d
from segkit.models.kernels.doubled import conv_doubled, doubles
from segkit.models.kernels.resized import conv_resized, resizing_last_pays


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that also trains on one value per channel, such as a batch of 1 pooled to 1 x 1.

    Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167

    Departs from torch, which raises there, as a single value has no variance: such a batch is
    normalized by the running statistics, and does not change them.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.numel() > x.size(1):
            return super().forward(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class ConvNormAct(nn.Sequential):
    """A convolution of unchanged size, BatchNorm and an activation.

    Args:
        kernel: Side of the kernel, odd.
        dilation: Dilation of the kernel.
        bias: Give the convolution a bias. BatchNorm cancels it, but some published weights have
            one.
        separable: Use a depthwise convolution followed by a pointwise one.
        norm_between: Also put BatchNorm and ReLU between these two.
        activation: Makes the module that follows BatchNorm.
        conv: The class of the convolution, if not separable. One with several inputs, such as
            :class:`UpsampledConv2d`, gives this layer the same inputs.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        dilation: int = 1,
        bias: bool = False,
        separable: bool = False,
        norm_between: bool = False,
        activation: Callable[[], nn.Module] = lambda: nn.ReLU(inplace=True),
        conv: type[nn.Conv2d] = nn.Conv2d,
    ) -> None:
        padding = dilation * (kernel // 2)
        first: nn.Module
        if separable:
            depthwise = DepthwiseConv2d(
                inputs, inputs, kernel, padding=padding, dilation=dilation, groups=inputs, bias=bias
            )
            between = [BatchNorm2d(inputs), nn.ReLU(inplace=True)] if norm_between else []
            first = nn.Sequential(depthwise, *between, nn.Conv2d(inputs, outputs, 1, bias=bias))
        else:
            first = conv(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=bias)
        super().__init__(first, BatchNorm2d(outputs), activation())
        for module in first.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")

    def forward(self, *inputs: Any) -> Tensor:
        conv, norm, activation = self
        return activation(norm(conv(*inputs)))


class UpsampledConv2d(nn.Conv2d):
    """A 3 x 3 convolution of a deeper map, upsampled (nearest), concatenated with skips.

    Shape:
        deeper: (B, C, h, w)
        skips[i]: (B, C_i, H, W), zero or more
        size: H and W
        out: (B, N, H, W)
    """

    def forward(self, deeper: Tensor, skips: Sequence[Tensor], size: Sequence[int]) -> Tensor:  # type: ignore[override]
        if not doubles(deeper, size):
            x = torch.cat([resize(deeper, size, mode="nearest"), *skips], 1)
            return super().forward(x)
        inputs = deeper.shape[1]
        x = conv_doubled(deeper, self.weight[:, :inputs], self.bias)
        if skips:
            x += F.conv2d(torch.cat(list(skips), 1), self.weight[:, inputs:], padding=1)
        return x


class PyramidConv2d(nn.Conv2d):
    """A 3 x 3 or 1 x 1 convolution of the levels of a pyramid, each resized to the first.

    The levels are concatenated. A 1 x 1 convolution reads single pixels, so it comes before the
    resizing: with four levels that double in size, a third of the multiply-adds.

    Shape:
        levels[i]: (B, C, H_i, W_i), fine to coarse
        out: (B, N, H_0, W_0)
    """

    def forward(self, levels: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        finest, *coarser = levels
        size = finest.shape[-2:]
        finest_weight, *coarser_weights = self.weight.split(finest.shape[1], 1)
        x = F.conv2d(finest, finest_weight, self.bias, padding=self.padding)
        for level, weight in zip(coarser, coarser_weights, strict=True):
            if self.kernel_size == (1, 1):
                x = x + resize(F.conv2d(level, weight), size)
            elif resizing_last_pays(level, size):
                x = x + conv_resized(level, size, weight)
            else:
                x = x + F.conv2d(resize(level, size), weight, padding=self.padding)
        return x


class PyramidPooling(nn.Module):
    """Pyramid pooling module: a map concatenated with its averages over grids of several sizes.

    Zhao et al. 2017, https://arxiv.org/abs/1612.01105

    Args:
        width: Channels of each grid of averages.
        bins: Side of each grid.

    Shape:
        x: (B, inputs, h, w)
        out: (B, outputs, h, w)
    """

    def __init__(self, inputs: int, *, width: int, outputs: int, bins: Sequence[int]) -> None:
        super().__init__()
        check_bounds(1, 1024, bins=bins)
        self.bins = bins
        self.branches = nn.ModuleList(ConvNormAct(inputs, width, kernel=1) for _ in bins)
        self.fuse = ConvNormAct(inputs + width * len(bins), outputs)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        pyramid = [x]
        for bins, branch in zip(self.bins, self.branches, strict=True):
            pyramid.append(resize(branch(average_pool(x, bins)), size))
        return self.fuse(torch.cat(pyramid, 1))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: convolutions of one map with several dilations.

    Chen et al. 2017, https://arxiv.org/abs/1706.05587

    Args:
        width: Channels of each branch and of the output.
        rates: Dilation of each 3x3 branch; a 1x1 branch and the image's average are always added.
        separable: Use depthwise and pointwise convolutions in the 3x3 branches.
        norm_between: Also put BatchNorm and ReLU between these two.
        kernel: Side of the kernel that joins the branches.
        dropout: Dropout probability of the output.

    Shape:
        x: (B, inputs, h, w)
        out: (B, width, h, w)
    """

    def __init__(
        self,
        inputs: int,
        *,
        width: int,
        rates: Sequence[int],
        separable: bool = False,
        norm_between: bool = False,
        kernel: int = 1,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_bounds(1, 1024, rates=rates)
        self.branches = nn.ModuleList([ConvNormAct(inputs, width, kernel=1)])
        for rate in rates:
            self.branches.append(
                ConvNormAct(
                    inputs, width, dilation=rate, separable=separable, norm_between=norm_between
                )
            )
        self.average = ConvNormAct(inputs, width, kernel=1)
        self.project = ConvNormAct(width * (len(rates) + 2), width, kernel=kernel)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        average = self.average(average_pool(x, 1)).expand(-1, -1, *x.shape[-2:])
        maps = [*(branch(x) for branch in self.branches), average]
        return self.dropout(self.project(torch.cat(maps, 1)))


def fcn_head(inputs: int, width: int, num_classes: int, *, dropout: float = 0.1) -> nn.Sequential:
    """Return a 3x3 convolution and a classifier: the head of FCN and the usual auxiliary head."""
    block = ConvNormAct(inputs, width)
    return nn.Sequential(*block, nn.Dropout(dropout), Classifier(width, num_classes))


def with_aux(
    logits: Tensor, head: nn.Module | None, features: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return a decoder's outputs: its logits and, in training, those of an auxiliary head.

    The head scores the second deepest feature map.
    """
    outputs = {"out": logits}
    if head is not None and head.training:
        outputs["aux"] = head(features[-2])
    return outputs


class Classifier(nn.Conv2d):
    """The convolution that computes logits. Xavier initialization lets narrow decoders train."""

    def __init__(self, inputs: int, num_classes: int, *, kernel: int = 1) -> None:
        super().__init__(inputs, num_classes, kernel, padding=kernel // 2)
        nn.init.xavier_uniform_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)


def resize(
    x: Tensor, size: Sequence[int], *, mode: str = "bilinear", align_corners: bool = False
) -> Tensor:
    """Resize ``x`` to a height and width; return ``x`` itself if it has them.

    Args:
        x: (B, C, h, w)
        size: Height and width.
        mode: ``bilinear`` or ``nearest``.
        align_corners: Align the centers of the corner pixels instead of the image's edges; some
            published weights were trained so. Ignored for ``nearest``.
    """
    if not is_exporting() and x.shape[-2:] == tuple(size):
        return x  # during export, comparing sizes would fix the result of the comparison
    corners = align_corners if mode == "bilinear" else None
    return F.interpolate(x, size=tuple(size), mode=mode, align_corners=corners)


def sample_points(x: Tensor, points: Tensor) -> Tensor:
    """Return maps at points, by bilinear interpolation, and 0 outside.

    Uses indexing instead of ``F.grid_sample`` with deterministic algorithms, as the gradient of the
    latter on CUDA is not deterministic.

    Args:
        x: (N, C, h, w)
        points: (N, P, 2): the column and the row, from 0 to 1 between the outer edges.

    Returns:
        (N, C, P), computed in at least float32.
    """
    with full_precision(x, points) as (wide, at):
        at = at.to(wide)
        if torch.are_deterministic_algorithms_enabled():
            return _by_indexing(wide, at).to(x.dtype)
        sampled = F.grid_sample(wide, 2 * at[:, :, None] - 1, align_corners=False)
        return sampled.squeeze(3).to(x.dtype)


def _by_indexing(x: Tensor, points: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    at = points * points.new_tensor((width, height)) - 0.5
    first = at.floor()
    pixels, image = x.flatten(2).mT, torch.arange(len(x), device=x.device)[:, None]
    result = torch.zeros_like(pixels[:, :1])
    for corner in (0, 0), (0, 1), (1, 0), (1, 1):
        column, row = (first + first.new_tensor(corner)).unbind(2)
        share = (1 - (at - first - first.new_tensor(corner)).abs()).prod(2)
        share = share * ((column >= 0) & (column < width) & (row >= 0) & (row < height))
        index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
        result = result + pixels[image, index.long()] * share[..., None]
    return result.mT


def average_pool(x: Tensor, bins: int) -> Tensor:
    """Return the averages of a map over a grid of ``bins`` x ``bins`` parts: (B, C, bins, bins).

    Uses two matrix products where ``F.adaptive_avg_pool2d`` does not work: during export (it needs
    sizes divisible by ``bins``) and with deterministic algorithms (its gradient on CUDA is not
    deterministic).
    """
    if bins == 1 or not (is_exporting() or torch.are_deterministic_algorithms_enabled()):
        return F.adaptive_avg_pool2d(x, bins)
    with full_precision(x) as (wide,):
        rows, columns = (_averages(length, bins, wide) for length in x.shape[-2:])
        return (rows @ wide @ columns.T).to(x.dtype)


def _averages(length: int, bins: int, like: Tensor) -> Tensor:
    """Return a (bins, length) matrix whose rows average over ``bins`` parts of a row of pixels."""
    at = torch.arange(length, device=like.device)
    part = torch.arange(bins, device=like.device)[:, None]
    inside = (at >= part * length // bins) & (at < ((part + 1) * length + bins - 1) // bins)
    return inside.to(like.dtype) / inside.sum(1, keepdim=True).to(like.dtype)


@contextmanager
def full_precision(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Yield ``tensors`` in at least float32, with autocast off, where half precision is too low."""
    device = tensors[0].device.type
    # torch.compile on torch 2.11 cannot trace torch.amp.is_autocast_available.
    halved = device != "meta" and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if halved else nullcontext():
        yield [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def level_at(stride: int, strides: Sequence[int]) -> int:
    """Return the index of the first level with at least this stride, or of the last level."""
    return next((i for i, value in enumerate(strides) if value >= stride), len(strides) - 1)
