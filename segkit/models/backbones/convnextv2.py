"""ConvNeXt V2: ConvNeXt with a response norm in its blocks in place of the layer scale."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock

from segkit.models.backbones.torchvision import convnext, convnext_of


class GlobalResponseNorm(nn.Module):
    """Scale channels by their norm over the map, relative to the mean norm of all channels.

    Woo et al. 2023, https://arxiv.org/abs/2301.00808, section 3.2

    Shape:
        x: (B, h, w, width) -> (B, h, w, width)
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        relative = response / (response.mean(-1, keepdim=True) + 1e-6)
        return x + self.weight * (x * relative) + self.bias


class ResponseNormBlock(CNBlock):
    """torchvision's ConvNeXt block with a response norm after GELU and no layer scale.

    Shape:
        x: (B, width, h, w) -> (B, width, h, w)
    """

    def __init__(self, width: int, *arguments: Any) -> None:
        super().__init__(width, *arguments)
        del self.layer_scale
        self.block[4] = nn.Sequential(self.block[4], GlobalResponseNorm(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.stochastic_depth(self.block(x))


_sized = partial(convnext_of, block=ResponseNormBlock)

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "convnext_v2_atto": partial(convnext, _sized(40, 2, 2, 6, 2), drop_path=0.1),
    "convnext_v2_femto": partial(convnext, _sized(48, 2, 2, 6, 2), drop_path=0.1),
    "convnext_v2_pico": partial(convnext, _sized(64, 2, 2, 6, 2), drop_path=0.1),
    "convnext_v2_nano": partial(convnext, _sized(80, 2, 2, 8, 2), drop_path=0.1),
    "convnext_v2_tiny": partial(convnext, _sized(96, 3, 3, 9, 3), drop_path=0.2),
    "convnext_v2_base": partial(convnext, _sized(128, 3, 3, 27, 3), drop_path=0.3),
    "convnext_v2_large": partial(convnext, _sized(192, 3, 3, 27, 3), drop_path=0.3),
    "convnext_v2_huge": partial(convnext, _sized(352, 3, 3, 27, 3), drop_path=0.3),
}
