"""Fusing of BatchNorm into the convolution before it, for prediction only.

Replaces a convolution followed by BatchNorm in evaluation mode with one convolution.
Chosen by ``infer.py`` on every device and for every size.
Gain: not measured separately; it is part of the inference ratios of ``python -m
benchmarks.inference``.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval

SIDE = 64
"""Side of the image whose forward pass shows which modules follow each other."""


@torch.no_grad()
def fuse_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy of a model with each BatchNorm fused into the convolution it follows.

    Args:
        model: Maps images to any kind of output.

    Returns:
        A copy in evaluation mode, for prediction only. It shares the parameters that are not fused
        with ``model``, and its outputs are equal up to rounding.
    """
    shared: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared).eval()
    pairs = successive(
        model, lambda x: isinstance(x, nn.Conv2d), lambda x: isinstance(x, _BatchNorm)
    )
    names = {module: name for name, module in model.named_modules()}
    for norm, conv in {norm: conv for conv, norm in pairs}.items():
        fused = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
        model.set_submodule(names[norm], nn.Identity())
    return model


def successive(
    model: nn.Module, first: Callable[[nn.Module], bool], second: Callable[[nn.Module], bool]
) -> list[tuple[Any, Any]]:
    """Return pairs of a ``first`` and a ``second`` module that follow each other.

    In a forward pass of a small image, the input of the second is the very tensor that the first
    returned, unchanged.
    """
    outputs: dict[int, tuple[nn.Module, Tensor, int]] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def record_output(module: nn.Module, _: object, output: Tensor) -> None:
        outputs[id(output)] = module, output, output._version  # kept: its id is not reused

    def match_input(module: nn.Module, inputs: tuple[Tensor]) -> None:
        before, _, version = outputs.get(id(inputs[0]), (None, None, None))
        if before is not None and version == inputs[0]._version:
            pairs.append((before, module))

    modules = list(model.modules())
    hooks = [m.register_forward_hook(record_output) for m in modules if first(m)]
    hooks += [m.register_forward_pre_hook(match_input) for m in modules if second(m)]
    conv = next(module for module in modules if isinstance(module, nn.Conv2d))
    try:
        with torch.inference_mode(False), torch.no_grad():  # tensors with a version
            model(conv.weight.new_zeros(1, conv.in_channels, SIDE, SIDE))
    finally:
        for hook in hooks:
            hook.remove()
    return pairs
