"""EfficientNet-Lite, of torchvision's blocks."""

from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision import models
from torchvision.models.efficientnet import MBConvConfig
from torchvision.ops import SqueezeExcitation

from segkit.models.backbones.torchvision import Builder, efficientnet

STAGES = (  # expansion, kernel, stride, inputs, outputs, blocks
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
"""The stages of EfficientNet-B0 (Tan and Le 2019, https://arxiv.org/abs/1905.11946, table 1)."""

TAPS = (0, 2, 3, 5, 7)
"""Blocks whose outputs are the feature maps."""


def lite(width: float, depth: float) -> Builder:
    """Return a builder of EfficientNet-Lite by the factors of its width and depth.

    It differs from EfficientNet: no squeeze-and-excitation, ReLU6 for SiLU, the first and the last
    stage are not deepened; the stem's 32 channels are the same in all that segkit has.
    https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
    """

    def build(*, stochastic_depth_prob: float) -> models.EfficientNet:
        settings = [
            MBConvConfig(*stage, width_mult=width, depth_mult=1.0 if stage[-1] == 1 else depth)
            for stage in STAGES
        ]
        network = models.EfficientNet(
            settings, dropout=0.2, stochastic_depth_prob=stochastic_depth_prob, last_channel=1280
        )
        for name, module in list(network.named_modules()):
            if isinstance(module, SqueezeExcitation):
                network.set_submodule(name, nn.Identity())
            elif name.endswith(".2") and isinstance(module, nn.SiLU):
                network.set_submodule(name, nn.ReLU6(inplace=True))
        return network

    return build


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "efficientnet_lite0": partial(efficientnet, lite(1.0, 1.0), TAPS, 224, like="smp"),
    "efficientnet_lite2": partial(efficientnet, lite(1.1, 1.2), TAPS, 260, like="smp"),
}
