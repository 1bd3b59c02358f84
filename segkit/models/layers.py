"""The layers decoders are made of."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkit.core.config import check_bounds
from segkit.models.kernels.depthwise import DepthwiseConv2d


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
    ) -> None:
        padding = dilation * (kernel // 2)
        conv: nn.Module
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
            conv = nn.Sequential(depthwise, *between, nn.Conv2d(inputs, outputs, 1, bias=bias))
        else:
            conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=bias)
        super().__init__(conv, BatchNorm2d(outputs), activation())
        for module in conv.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")


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


def conv_doubled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` doubled (nearest) and convolved by 3x3, in under half of the time.

    Of each 3x3 values of a doubled map only 2x2 differ. Weights that meet the same value are added
    up first, and the rest is a transposed convolution with 4 products a value in place of 9.

    Shape:
        x: (B, C, h, w)
        weight: (N, C, 3, 3)
        out: (B, N, 2h, 2w)
    """
    for axis in (2, 3):
        before, here, after = weight.unbind(axis)
        weight = torch.stack([after, here + after, before + here, before], axis)
    return F.conv_transpose2d(x, weight.transpose(0, 1).to(x.dtype), bias, stride=2, padding=1)


def doubles(x: Tensor, size: Sequence[int]) -> bool:
    """Whether :func:`conv_doubled` to ``size`` is possible, and no dearer than to resize first.

    Never while a model is exported, which has all sizes.
    """
    if torch.compiler.is_exporting():
        return False
    height, width = x.shape[-2:]
    return tuple(size) == (2 * height, 2 * width) and height * width >= 256


def conv_resized(x: Tensor, size: Sequence[int], weight: Tensor) -> Tensor:
    """``x`` resized (bilinear) and convolved by 3x3, at little more than the smaller map's cost.

    Mixing channels and interpolating may change places: the nine products are made on the map as it
    is, and two matrix products interpolate, shift and add them up. The resized map is never there.

    Shape:
        x: (B, C, h, w)
        weight: (N, C, 3, 3)
        out: (B, N, *size)
    """
    (height, width), pixels = x.shape[-2:], size[0] * size[1]
    if torch.compiler.is_exporting() or 2 * height * width > pixels:
        return F.conv2d(resize(x, size), weight, padding=1)
    products = F.linear(x.permute(0, 2, 3, 1), weight.permute(2, 3, 0, 1).flatten(0, 2))
    products = products.unflatten(3, (3, 3, len(weight))).permute(0, 3, 1, 4, 2, 5)
    down, across = (
        _shifted(length, to, products) for length, to in zip((height, width), size, strict=True)
    )
    rows = down @ products.reshape(len(x), 3 * height, -1)
    rows = rows.view(len(x), size[0], 3 * width, len(weight))
    return (across @ rows).permute(0, 3, 1, 2)


def _shifted(length: int, to: int, like: Tensor) -> Tensor:
    """What interpolates a line and shifts it by 1, 0 and -1: a matrix (to, 3 length)."""
    exact = torch.promote_types(like.dtype, torch.float32)
    line = torch.eye(length, dtype=exact, device=like.device)[None]
    resized = F.pad(F.interpolate(line, to, mode="linear")[0], (1, 1))
    return torch.cat([resized[:, at : at + to] for at in range(3)]).T.to(like.dtype)


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
