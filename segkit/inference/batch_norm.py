"""BatchNorm statistics of a model whose weights were mixed."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segkit.core.distributed import all_reduce


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace BatchNorm's statistics by those of one pass over training images.

    A soup needs this: the mean of several models' statistics is not the statistics of the mean
    model. The new ones are the exact mean and variance of all values that reach the layer, over all
    ranks and batch sizes (Wu and Johnson 2021, https://arxiv.org/abs/2105.07576). Unlike them, the
    running mean of ``torch.optim.swa_utils.update_bn`` counts a short last batch like a full one
    and omits the variance between batches.

    Args:
        model: Layers that stay in evaluation mode (frozen) do not change. Dropout is off.
        batches: Normalized images, two or more at a time, on the model's device. Not read if no
            layer needs them; without any, a ValueError is raised.

    Returns:
        The number of layers that were changed.
    """
    training = model.training
    norms = [layer for layer in model.train().modules() if isinstance(layer, _BatchNorm)]
    layers = [x for x in norms if x.training and x.running_mean is not None]
    model.eval()
    sums = {}
    for layer in layers:
        assert layer.running_mean is not None
        sums[layer] = layer.running_mean.new_zeros(3, layer.num_features, dtype=torch.float64)

    def count(layer: _BatchNorm, inputs: tuple[Tensor]) -> None:
        x = inputs[0].float()
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        moments = torch.stack([torch.ones_like(mean), mean, variance + mean**2]).double()
        sums[layer] += moments * (x.numel() / x.shape[1])

    hooks = [layer.train().register_forward_pre_hook(count) for layer in layers]
    try:
        for batch in batches if layers else ():
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    changed = 0
    for layer in layers:
        total, values, squares = all_reduce(sums[layer])
        if not total.any():
            continue  # the layer is of an auxiliary head, which runs in training only
        mean = values / total
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_((squares / total - mean**2) * total / (total - 1))
        changed += 1
    if layers and not changed:
        raise ValueError("BatchNorm statistics need at least one batch of images")
    return changed
