"""Low-rank updates (LoRA) of a backbone's linear layers, whose own weights stay frozen."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkit.core.errors import ConfigError
from segkit.models.backbones.depth import stages
from segkit.models.segmenter import Segmenter


class LowRank(nn.Module):
    """The product of two small matrices, which is 0 at first: ``scale * up @ down``.

    Hu et al. 2021, https://arxiv.org/abs/2106.09685

    Shape:
        x: (..., layer.in_features) -> (..., layer.out_features)
    """

    scale: Tensor

    def __init__(self, layer: nn.Linear, *, rank: int, scale: float) -> None:
        super().__init__()
        self.down = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.up = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        self.register_buffer("scale", layer.weight.new_tensor(scale))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up) * self.scale


def add_lora(model: Segmenter, *, rank: int, alpha: float | None = None, seed: int = 0) -> None:
    """Freeze the stages of the backbone, and give their linear layers low-rank updates, in place.

    These are the projections of attention and MLPs. The layers keep their class, parameters and
    names; the update is the submodule ``lora``, which a forward hook adds to the output.
    :func:`segkit.core.checkpoint.merged` returns the plain weights.

    Args:
        model: With its pretrained weights. Layers that are frozen already have no update.
        rank: Rank of the updates.
        alpha: The updates are scaled by ``alpha / rank``; default: by 1.
        seed: Seed of the initial factors.

    Raises:
        ConfigError: There is no linear layer to update.
    """
    layers = [
        module
        for name, module in model.backbone.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
        if "cpb_mlp" not in name  # Swin V2's network of position biases
    ]
    if not layers:
        raise ConfigError(
            "model.lora: the backbone has no linear layers that are not frozen, as Swin, ViT and "
            "ConvNeXt have; set it to 0, or choose another backbone"
        )
    model.freeze(len(stages(model.backbone)))
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        for layer in layers:
            layer.lora = LowRank(layer, rank=rank, scale=1.0 if alpha is None else alpha / rank)
            layer.register_forward_hook(_add)


def _add(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Add a layer's low-rank update to its output; not a closure, so that models can be copied."""
    return output + layer.lora(inputs[0])
