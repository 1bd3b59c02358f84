"""Depthwise convolutions whose training is fast on the CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DepthwiseConv2d(nn.Conv2d):
    """``Conv2d`` that finds the gradient of wide depthwise weights a square of them at a time.

    PyTorch's (oneDNN's) kernel for depthwise weights knows 3 × 3 in channels_last; for 5 × 5, 7 × 7
    and with dilation it takes each channel for a group of sixteen, which is slow, most of all in
    bf16 (``python -m benchmarks.layers``). The gradient of each 3 × 3 of them is that of a 3 × 3
    convolution of the image moved there; with dilation, that of each one.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._sees_one_value(input):
            weight = weight[:, :, 1:2, 1:2]
            return F.conv2d(input, weight, bias, groups=self.groups)
        wide = min(self.kernel_size) > 3 or (self.dilation != (1, 1) and self.kernel_size != (1, 1))
        if wide and depthwise(self) and self.training and input.device.type == "cpu":
            return _Convolve.apply(input, weight, bias, self.stride, self.padding, self.dilation)
        return super()._conv_forward(input, weight, bias)

    def _sees_one_value(self, x: Tensor) -> bool:
        """Whether 3 × 3 values lie so far apart that all but the middle one are always padding."""
        if torch.compiler.is_exporting() or self.kernel_size != (3, 3) or self.stride != (1, 1):
            return False
        apart = self.dilation == self.padding
        return apart and all(d >= side for d, side in zip(self.dilation, x.shape[2:], strict=True))


def depthwise(conv: nn.Conv2d) -> bool:
    """Whether each channel is convolved on its own."""
    return 1 < conv.groups == conv.in_channels == conv.out_channels


def speed_up_depthwise(network: nn.Module) -> None:
    """Make a network's depthwise convolutions, as they stand, :class:`DepthwiseConv2d`."""
    for module in network.modules():
        if type(module) is nn.Conv2d and depthwise(module) and isinstance(module.padding, tuple):
            module.__class__ = DepthwiseConv2d


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding, dilation
        return F.conv2d(x, weight, bias, stride, padding, dilation, len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        stride, padding, dilation = ctx.options
        x, weight = (saved.to(gradient.dtype) for saved in ctx.saved_tensors)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x, _, _ = torch.ops.aten.convolution_backward(
                *(gradient, x, weight, None, stride, padding, dilation),
                *(False, (0, 0), len(weight), (True, False, False)),
            )
        if ctx.needs_input_grad[1]:
            of_weight = _of_weight(x, weight, gradient, stride, padding, dilation)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_x, of_weight, of_bias, None, None, None


def _of_weight(
    x: Tensor,
    weight: Tensor,
    gradient: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """The weights' gradient, a square at a time; the last squares overlap those before."""
    fast = 3 if dilation == (1, 1) else 1
    result = torch.empty_like(weight)
    square = weight.new_empty(len(weight), 1, fast, fast)
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    x = x.contiguous(memory_format=torch.channels_last)
    height, width = (
        (count - 1) * step + fast for count, step in zip(gradient.shape[2:], stride, strict=True)
    )
    down, across = ([*range(0, side - fast, fast), side - fast] for side in weight.shape[2:])
    for row in down:
        for column in across:
            top, left = row * dilation[0], column * dilation[1]
            part = x[:, :, top : top + height, left : left + width]
            _, found, _ = torch.ops.aten.convolution_backward(
                *(gradient, part, square, None, stride, (0, 0), (1, 1)),
                *(False, (0, 0), len(weight), (False, True, False)),
            )
            result[:, :, row : row + fast, column : column + fast] = found
    return result
