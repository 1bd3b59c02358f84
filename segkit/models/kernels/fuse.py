"""BatchNorm fused into the convolutions before it, for models that only predict."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval

SIDE = 64
"""Of the image that shows which convolution a BatchNorm follows."""


@torch.no_grad()
def fuse_batch_norm(model: nn.Module) -> nn.Module:
    """A copy whose convolutions do the work of the BatchNorm that follows them in evaluation.

    It follows one if in a pass of a small image it is given the very tensor that the convolution
    returned.

    Args:
        model: Maps images to anything.

    Returns:
        The copy, in evaluation mode and for prediction only; what is not fused it shares with the
        model. Its outputs are the model's up to rounding.
    """
    shared: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared).eval()
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    before: dict[_BatchNorm, nn.Conv2d] = {}

    def convolved(conv: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        made[id(output)] = conv, output  # kept, so that no other tensor gets its identity

    def normalizes(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(norm, _BatchNorm)
        conv, _ = made.get(id(inputs[0]), (None, None))
        if conv is not None:
            before[norm] = conv

    hooks = [
        module.register_forward_hook(convolved)
        if isinstance(module, nn.Conv2d)
        else module.register_forward_pre_hook(normalizes)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | _BatchNorm)
    ]
    first = next(model.parameters())
    try:
        model(first.new_zeros(1, 3, SIDE, SIDE))
    finally:
        for hook in hooks:
            hook.remove()
    names = {module: name for name, module in model.named_modules()}
    for norm, conv in before.items():
        fused = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
        model.set_submodule(names[norm], nn.Identity())
    return model
