"""Images with another number of channels than 3: the first convolution and its RGB weights."""

import torch
from torch import Tensor, nn

from segkit.core.config import check_bounds

MOST_CHANNELS = 1024
"""Maximum number of channels of an image."""


def first_convolution(network: nn.Module) -> str:
    """Return the name of the first convolution, which is that of the image; "" without any."""
    convs = (name for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    return next(convs, "")


def set_in_channels(network: nn.Module, in_channels: int) -> None:
    """Give the first convolution this number of input channels, in place.

    Unless it has them already, its weights are newly initialized.

    Raises:
        ConfigError: If ``in_channels`` is not within 1 to :data:`MOST_CHANNELS`.
    """
    check_bounds(1, MOST_CHANNELS, in_channels=in_channels)
    conv = network.get_submodule(first_convolution(network))
    assert isinstance(conv, nn.Conv2d)
    if conv.in_channels != in_channels:
        outputs, _, *kernel = conv.weight.shape
        conv.in_channels = in_channels
        conv.weight = nn.Parameter(conv.weight.new_empty(outputs, in_channels, *kernel))
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def adapt_rgb(weight: Tensor, in_channels: int) -> Tensor:
    """Return the weight of a convolution of RGB images for another number of channels.

    For one channel it is the sum of the filters of R, G and B; otherwise these are repeated in turn
    and scaled by 3 / in_channels. timm does the same for its ``in_chans``,
    https://timm.fast.ai/models.

    Shape:
        weight: (N, 3, h, w) -> (N, in_channels, h, w)
    """
    if in_channels == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    repeated = weight[:, torch.arange(in_channels, device=weight.device) % 3]
    return repeated * (3 / in_channels)
