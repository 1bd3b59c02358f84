"""Convolution, bias, residual sum and ReLU as one operation of cuDNN, for prediction only.

Replaces a convolution followed by ReLU, and the last convolution of a ResNet block with its sum.
Chosen on CUDA under autocast, for models whose BatchNorm is fused.
Gain: a pass of DeepLabV3+ on SE-ResNet-152 takes 0.74 of the time at batch 1, one of UNet++ on
ResNet-34 0.88 at batch 16, on an H200 (``python -m benchmarks.gpu --part inference``).
"""

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from segkit.models.kernels.fuse import fuse_batch_norm, successive


def for_prediction(model: nn.Module, amp: torch.dtype | None = None) -> nn.Module:
    """Return a copy of a model in the form that predicts fastest on its device.

    Args:
        model: Maps images to any kind of output; its weights are not changed.
        amp: Precision of autocast; None if autocast is off.

    Returns:
        A copy as of :func:`fuse_batch_norm`. On CUDA under autocast, ReLU is fused too, and weights
        of convolutions and linear layers have the precision that autocast would convert them to.
    """
    model = fuse_batch_norm(model)
    if amp is not None and next(model.parameters()).is_cuda:
        fuse_relu(model)
        lower_weights(model, amp)
    return model


class ConvReLU(nn.Conv2d):
    """A convolution, the sum with ``skip`` if there is one, and ReLU."""

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if x.is_cuda:
            dtype = self.weight.dtype
            assert isinstance(self.padding, tuple)
            where = self.stride, self.padding, self.dilation, self.groups
            x = x.to(dtype)
            if skip is None:
                y = torch.cudnn_convolution_relu(x, self.weight, self.bias, *where)
            else:
                skip = skip.to(dtype)
                y = torch.cudnn_convolution_add_relu(x, self.weight, skip, 1.0, self.bias, *where)
        else:
            y = super().forward(x)
            y = torch.relu_(y if skip is None else y + skip)
        y.rectified = True  # type: ignore[attr-defined]
        return y


class ReLUAfterConv(nn.ReLU):
    """ReLU, except of a tensor that :class:`ConvReLU` has just returned."""

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(x, "rectified", False):
            return super().forward(x)
        del x.rectified  # type: ignore[attr-defined]  # it may change before another ReLU
        return x


class _FusedBasicBlock(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        return self.conv2(self.conv1(x), skip)


class _FusedBottleneck(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        return self.conv3(self.conv2(self.conv1(x)), skip)


_BLOCKS: dict[type, type] = {BasicBlock: _FusedBasicBlock, Bottleneck: _FusedBottleneck}


@torch.no_grad()
def fuse_relu(model: nn.Module) -> None:
    """Fuse ReLU into the convolutions of a model without BatchNorm, in place.

    See :func:`segkit.models.kernels.fuse.successive`.
    """
    for block in model.modules():
        convs = [child for name, child in block.named_children() if name.startswith("conv")]
        norms = [child for name, child in block.named_children() if name.startswith("bn")]
        fused = all(isinstance(norm, nn.Identity) for norm in norms)
        if type(block) in _BLOCKS and all(map(_fusable, convs)) and fused:
            block.__class__ = _BLOCKS[type(block)]
            for conv in convs:
                conv.__class__ = ConvReLU
    for conv, relu in successive(model, _fusable, lambda x: type(x) is nn.ReLU):
        conv.__class__, relu.__class__ = ConvReLU, ReLUAfterConv


def lower_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give convolutions and linear layers new weights of ``dtype``; subclasses keep theirs."""
    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, ConvReLU):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


def _fusable(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )
