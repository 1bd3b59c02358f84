"""Fusing of BatchNorm into the convolution before it, for prediction only.

Replaces a convolution followed by BatchNorm in evaluation mode with one convolution.
Chosen by ``infer.py`` on every device and for every size.
Gain: not measured separately; it is part of the inference ratios of ``python -m
benchmarks.inference``.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval

SIDE = 64
"""Side of the image whose forward pass shows which convolution a BatchNorm follows."""


@torch.no_grad()
def fuse_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy of a model with each BatchNorm fused into the convolution it follows.

    A BatchNorm follows a convolution if, in a forward pass of a small image, its input is the very
    tensor that the convolution returned.

    Args:
        model: Maps images to any kind of output.

    Returns:
        A copy in evaluation mode, for prediction only. It shares the parameters that are not fused
        with ``model``, and its outputs are equal up to rounding.
    """
    shared: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared).eval()
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    conv_before: dict[_BatchNorm, nn.Conv2d] = {}

    def record_output(conv: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        outputs[id(output)] = conv, output  # kept alive, so that its id is not reused

    def match_input(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(norm, _BatchNorm)
        conv, _ = outputs.get(id(inputs[0]), (None, None))
        if conv is not None:
            conv_before[norm] = conv

    hooks = [
        module.register_forward_hook(record_output)
        if isinstance(module, nn.Conv2d)
        else module.register_forward_pre_hook(match_input)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | _BatchNorm)
    ]
    try:
        model(small_image(model))
    finally:
        for hook in hooks:
            hook.remove()
    names = {module: name for name, module in model.named_modules()}
    for norm, conv in conv_before.items():
        fused = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
        model.set_submodule(names[norm], nn.Identity())
    return model


def small_image(model: nn.Module) -> Tensor:
    """Return an image of zeros with as many channels as the model's first convolution."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return first.weight.new_zeros(1, first.in_channels, SIDE, SIDE)
