"""Backbones, which map an image to feature maps, by name."""

from collections.abc import Callable

from torch import nn

from segkit.models.backbones import (
    beit,
    convnextv2,
    efficientnet_lite,
    hrnet,
    mit,
    seresnet,
    swin,
    torchvision,
    unet,
    vit,
)

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    **torchvision.BACKBONES,
    **efficientnet_lite.BACKBONES,
    **convnextv2.BACKBONES,
    **swin.BACKBONES,
    **mit.BACKBONES,
    **hrnet.BACKBONES,
    **seresnet.BACKBONES,
    **unet.BACKBONES,
    **vit.BACKBONES,
    **beit.BACKBONES,
}
