"""The original encoder of U-Net, UNet++ and UNet 3+."""

from collections.abc import Callable

from torch import nn
from torchvision.ops import Conv2dNormActivation

from segkit.core.config import check_bounds
from segkit.models.backbones.inputs import MOST_CHANNELS
from segkit.models.backbones.stages import Stages, refuse_dilation


def unet(
    *, width: int = 64, bias: bool = True, in_channels: int = 3, output_stride: int = 32
) -> Stages:
    """Build an encoder of five levels of two 3x3 convolutions, with max pooling in between.

    Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597

    Args:
        width: Channels of the first level; each level has twice as many as the one before.
        bias: Give convolutions a bias, as UNet 3+'s code does. BatchNorm cancels it.
        in_channels: Channels of the image.
        output_stride: Must be 32, although the deepest level's stride is 16.

    Departs from U-Net: pads convolutions, so that sizes stay the same, has BatchNorm, as its
    successors do, and rounds odd sizes up in pooling, so that no pixel is dropped.
    """
    refuse_dilation("UNet's encoder", output_stride)
    check_bounds(1, 4096, width=width)
    check_bounds(1, MOST_CHANNELS, in_channels=in_channels)
    network = nn.Sequential()
    network.add_module("pool", nn.MaxPool2d(2, ceil_mode=True))
    inputs = in_channels
    for level in range(5):
        outputs = width * 2**level
        convs = [
            Conv2dNormActivation(inputs, outputs, bias=bias),
            Conv2dNormActivation(outputs, outputs, bias=bias),
        ]
        network.add_module(f"level{level + 1}", nn.Sequential(*convs))
        inputs = outputs
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    deeper = (("pool", f"level{level}") for level in range(2, 6))
    return Stages(network, (("level1",), *deeper), in_channels=in_channels)


BACKBONES: dict[str, Callable[..., nn.Module]] = {"unet": unet}
