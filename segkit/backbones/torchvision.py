"""The convolutional families of torchvision, with its names, so that its weights load."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock

from segkit.backbones.stages import Stages, refuse_dilation

Builder = Callable[..., nn.Module]


def resnet(builder: Builder) -> Callable[..., Stages]:
    """ResNet (https://arxiv.org/abs/1512.03385), ResNeXt (https://arxiv.org/abs/1611.05431) and
    Wide ResNet (https://arxiv.org/abs/1605.07146)."""
    stem = ("conv1", "bn1", "relu")
    stages = (stem, ("maxpool", "layer1"), ("layer2",), ("layer3",), ("layer4",))

    def build(*, output_stride: Literal[8, 16, 32] = 32) -> Stages:
        return Stages(network=builder(), stages=stages, output_stride=output_stride)

    return build


class _HalfResNet(models.ResNet):
    """ResNet with stages of half the channels, for machines without a GPU."""

    def _make_layer(
        self, block: Any, planes: int, *arguments: Any, **options: Any
    ) -> nn.Sequential:
        return super()._make_layer(block, planes // 2, *arguments, **options)


def half_resnet18(**options: Any) -> models.ResNet:
    """ResNet-18 at half width; nobody has published weights of it."""
    return _HalfResNet(BasicBlock, [2, 2, 2, 2], **options)


def regnet(builder: Builder) -> Callable[..., Stages]:
    """RegNet X and Y: https://arxiv.org/abs/2003.13678"""
    stages = (("stem",), *((f"trunk_output.block{i}",) for i in range(1, 5)))

    def build(*, output_stride: Literal[8, 16, 32] = 32) -> Stages:
        with torch.device("cpu"):  # it computes its widths with tensors, which "meta" cannot
            network = builder()
        return Stages(network=network, stages=stages, output_stride=output_stride)

    return build


def mobilenet(builder: Builder, *taps: int) -> Callable[..., Stages]:
    """MobileNet V2 (https://arxiv.org/abs/1801.04381) and V3 (https://arxiv.org/abs/1905.02244).

    Args:
        builder: torchvision's function.
        taps: The blocks whose outputs are the feature maps; the last 1x1 convolution is dropped.
    """

    def build(*, output_stride: Literal[8, 16, 32] = 32) -> Stages:
        return _cut(builder(), taps, output_stride=output_stride)

    return build


def efficientnet(builder: Builder, *taps: int) -> Callable[..., Stages]:
    """EfficientNet (https://arxiv.org/abs/1905.11946) and V2 (https://arxiv.org/abs/2104.00298).

    Args:
        builder: torchvision's function.
        taps: The blocks whose outputs are the feature maps; the last 1x1 convolution is dropped.
    """

    def build(*, drop_path: float = 0.2, output_stride: Literal[8, 16, 32] = 32) -> Stages:
        network = builder(stochastic_depth_prob=drop_path)
        return _cut(network, taps, output_stride=output_stride)

    return build


def convnext(builder: Builder, drop_path: float) -> Callable[..., Stages]:
    """ConvNeXt: https://arxiv.org/abs/2201.03545

    Args:
        builder: torchvision's function.
        drop_path: torchvision's stochastic depth, where the configuration says nothing.
    """

    def build(
        *, drop_path: float = drop_path, checkpointing: bool = False, output_stride: int = 32
    ) -> Stages:
        refuse_dilation("ConvNeXt", output_stride)
        network = builder(stochastic_depth_prob=drop_path)
        return _cut(network, (1, 3, 5, 7), checkpointing=checkpointing)

    return build


def _cut(
    network: nn.Module, taps: tuple[int, ...], output_stride: int = 32, checkpointing: bool = False
) -> Stages:
    """Stages of a network that is one sequence, ``features``, each ending with the block tapped."""
    blocks = network.get_submodule("features")
    assert isinstance(blocks, nn.Sequential)
    del blocks[taps[-1] + 1 :]
    ends = (-1, *taps)
    stages = [
        [f"features.{block}" for block in range(before + 1, tap + 1)]
        for before, tap in zip(ends, taps, strict=False)
    ]
    return Stages(
        network=network, stages=stages, output_stride=output_stride, checkpointing=checkpointing
    )


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet18_half": resnet(half_resnet18),
    "resnet18": resnet(models.resnet18),
    "resnet34": resnet(models.resnet34),
    "resnet50": resnet(models.resnet50),
    "resnet101": resnet(models.resnet101),
    "resnet152": resnet(models.resnet152),
    "resnext50_32x4d": resnet(models.resnext50_32x4d),
    "resnext101_32x8d": resnet(models.resnext101_32x8d),
    "resnext101_64x4d": resnet(models.resnext101_64x4d),
    "wide_resnet50_2": resnet(models.wide_resnet50_2),
    "wide_resnet101_2": resnet(models.wide_resnet101_2),
    "regnet_x_400mf": regnet(models.regnet_x_400mf),
    "regnet_x_800mf": regnet(models.regnet_x_800mf),
    "regnet_x_1_6gf": regnet(models.regnet_x_1_6gf),
    "regnet_x_3_2gf": regnet(models.regnet_x_3_2gf),
    "regnet_x_8gf": regnet(models.regnet_x_8gf),
    "regnet_x_16gf": regnet(models.regnet_x_16gf),
    "regnet_x_32gf": regnet(models.regnet_x_32gf),
    "regnet_y_400mf": regnet(models.regnet_y_400mf),
    "regnet_y_800mf": regnet(models.regnet_y_800mf),
    "regnet_y_1_6gf": regnet(models.regnet_y_1_6gf),
    "regnet_y_3_2gf": regnet(models.regnet_y_3_2gf),
    "regnet_y_8gf": regnet(models.regnet_y_8gf),
    "regnet_y_16gf": regnet(models.regnet_y_16gf),
    "regnet_y_32gf": regnet(models.regnet_y_32gf),
    "regnet_y_128gf": regnet(models.regnet_y_128gf),
    "mobilenet_v2": mobilenet(models.mobilenet_v2, 1, 3, 6, 13, 17),
    "mobilenet_v3_small": mobilenet(models.mobilenet_v3_small, 0, 1, 3, 8, 11),
    "mobilenet_v3_large": mobilenet(models.mobilenet_v3_large, 1, 3, 6, 12, 15),
    "efficientnet_b0": efficientnet(models.efficientnet_b0, 0, 2, 3, 5, 7),
    "efficientnet_b1": efficientnet(models.efficientnet_b1, 0, 2, 3, 5, 7),
    "efficientnet_b2": efficientnet(models.efficientnet_b2, 0, 2, 3, 5, 7),
    "efficientnet_b3": efficientnet(models.efficientnet_b3, 0, 2, 3, 5, 7),
    "efficientnet_b4": efficientnet(models.efficientnet_b4, 0, 2, 3, 5, 7),
    "efficientnet_b5": efficientnet(models.efficientnet_b5, 0, 2, 3, 5, 7),
    "efficientnet_b6": efficientnet(models.efficientnet_b6, 0, 2, 3, 5, 7),
    "efficientnet_b7": efficientnet(models.efficientnet_b7, 0, 2, 3, 5, 7),
    "efficientnet_v2_s": efficientnet(models.efficientnet_v2_s, 1, 2, 3, 5, 6),
    "efficientnet_v2_m": efficientnet(models.efficientnet_v2_m, 1, 2, 3, 5, 7),
    "efficientnet_v2_l": efficientnet(models.efficientnet_v2_l, 1, 2, 3, 5, 7),
    "convnext_tiny": convnext(models.convnext_tiny, 0.1),
    "convnext_small": convnext(models.convnext_small, 0.4),
    "convnext_base": convnext(models.convnext_base, 0.5),
    "convnext_large": convnext(models.convnext_large, 0.5),
}
