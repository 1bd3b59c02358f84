"""The layers decoders are made of."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkit.core.config import check_bounds
from segkit.models.kernels.depthwise import DepthwiseConv2d
from segkit.models.kernels.doubled import conv_doubled, doubles
from segkit.models.kernels.resized import conv_resized, resizing_last_pays


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that also trains where a channel has one value: a batch of 1, pooled to a point.

    Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167

    Departs from torch, which raises there (a single value has no variance): that one batch is
    normalized by the running statistics, which it leaves as they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.numel() > x.size(1):
            return super().forward(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class ConvNormAct(nn.Sequential):
    """A convolution that keeps the size, BatchNorm and an activation.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        kernel: Side of the kernel, odd.
        dilation: Spacing of the kernel's values.
        bias: Give the convolution a bias, though BatchNorm takes it away again: some published
            weights have one.
        separable: A depthwise convolution followed by a pointwise one.
        norm_between: BatchNorm and ReLU between the two as well.
        activation: What follows BatchNorm.
        conv: The class of a convolution that is not separable; one of several inputs, such as
            :class:`UpsampledConv2d`, makes this a layer of several inputs.
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
                inputs,
                inputs,
                kernel,
                padding=padding,
                dilation=dilation,
                groups=inputs,
                bias=bias,
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
    """A 3 x 3 convolution of a deeper map, enlarged (nearest) to a size, beside maps of that size.

    Shape:
        deeper: (B, C, h, w)
        skips[i]: (B, C_i, H, W), none or more
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
    """A 3 x 3 convolution of a pyramid's levels side by side, each resized to the first.

    Shape:
        levels[i]: (B, C, H_i, W_i), fine to coarse
        out: (B, N, H_0, W_0)
    """

    def forward(self, levels: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        finest, *coarser = levels
        size = finest.shape[-2:]
        own, *others = self.weight.split(finest.shape[1], 1)
        x = F.conv2d(finest, own, self.bias, padding=1)
        for level, weight in zip(coarser, others, strict=True):
            if resizing_last_pays(level, size):
                x = x + conv_resized(level, size, weight)
            else:
                x = x + F.conv2d(resize(level, size), weight, padding=1)
        return x


class PyramidPooling(nn.Module):
    """A map, and beside it what it looks like averaged over 1, 4, 9 and 36 parts of the image.

    Zhao et al. 2017, https://arxiv.org/abs/1612.01105

    Args:
        inputs: Channels in.
        width: Channels of each grid of averages.
        outputs: Channels out.
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
    """Atrous spatial pyramid pooling: the same map seen through differently dilated kernels.

    Chen et al. 2017, https://arxiv.org/abs/1706.05587

    Args:
        inputs: Channels in.
        width: Channels of each branch, and out.
        rates: Dilation of each 3x3 branch; a 1x1 branch and the image's average are always there.
        separable: Make the 3x3 branches depthwise and pointwise.
        norm_between: BatchNorm and ReLU between the two as well.
        kernel: Side of the kernel that joins the branches.
        dropout: Share of values dropped from the output.

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
        views = [*(branch(x) for branch in self.branches), average]
        return self.dropout(self.project(torch.cat(views, 1)))


def fcn_head(inputs: int, width: int, num_classes: int, *, dropout: float = 0.1) -> nn.Sequential:
    """One 3x3 convolution and a classifier: FCN's own head and the usual auxiliary one."""
    block = ConvNormAct(inputs, width)
    return nn.Sequential(*block, nn.Dropout(dropout), Classifier(width, num_classes))


class Classifier(nn.Conv2d):
    """The convolution that ends in logits, scaled to its width: narrow decoders learn at once."""

    def __init__(self, inputs: int, num_classes: int, *, kernel: int = 1) -> None:
        super().__init__(inputs, num_classes, kernel, padding=kernel // 2)
        nn.init.xavier_uniform_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)


def resize(
    x: Tensor, size: Sequence[int], *, mode: str = "bilinear", align_corners: bool = False
) -> Tensor:
    """``x`` at a height and width, itself where it has them already.

    Args:
        x: (B, C, h, w)
        size: Height and width.
        mode: ``bilinear`` or ``nearest``.
        align_corners: Place the grid on the corner pixels' centers instead of the image's edges;
            some published weights were trained so. Of no effect on ``nearest``.
    """
    if not torch.compiler.is_exporting() and x.shape[-2:] == tuple(size):
        return x  # a comparison of sizes would tie an exported model to how this one came out
    corners = align_corners if mode == "bilinear" else None
    return F.interpolate(x, size=tuple(size), mode=mode, align_corners=corners)


def average_pool(x: Tensor, bins: int) -> Tensor:
    """Averages over a grid of ``bins`` x ``bins`` parts of a map: (B, C, bins, bins).

    The same averages are two products with matrices where torch's own operation falls short: while
    a model is exported (it takes only sizes that ``bins`` divides) and with deterministic
    algorithms (it has no deterministic gradient on CUDA).
    """
    if bins == 1 or not (
        torch.compiler.is_exporting() or torch.are_deterministic_algorithms_enabled()
    ):
        return F.adaptive_avg_pool2d(x, bins)
    with exactly(x) as (exact,):
        rows, columns = (_averages(length, bins, exact) for length in x.shape[-2:])
        return (rows @ exact @ columns.T).to(x.dtype)


def _averages(length: int, bins: int, like: Tensor) -> Tensor:
    """A matrix whose rows average over ``bins`` parts of a line, (bins, length)."""
    at = torch.arange(length, device=like.device)
    part = torch.arange(bins, device=like.device)[:, None]
    inside = (at >= part * length // bins) & (at < ((part + 1) * length + bins - 1) // bins)
    return inside.to(like.dtype) / inside.sum(1, keepdim=True).to(like.dtype)


@contextmanager
def exactly(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """``tensors`` in float32 at least, and autocast off, for what half precision cannot tell."""
    device = tensors[0].device.type
    halved = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if halved else nullcontext():
        yield [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def level_at(stride: int, strides: Sequence[int]) -> int:
    """Index of the first level at least as coarse as ``stride``; the last one if none is."""
    return next((i for i, own in enumerate(strides) if own >= stride), len(strides) - 1)
