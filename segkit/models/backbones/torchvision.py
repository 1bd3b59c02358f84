"""The convolutional families of torchvision, with its names, so that its weights load."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.resnet import BasicBlock

from segkit.core.errors import ConfigError
from segkit.models.backbones.stages import Stages, refuse_dilation
from segkit.models.kernels.depthwise import DepthwiseConv2d

Builder = Callable[..., nn.Module]


def resnet(builder: Builder) -> Callable[..., Stages]:
    """ResNet (https://arxiv.org/abs/1512.03385), ResNeXt (https://arxiv.org/abs/1611.05431) and
    Wide ResNet (https://arxiv.org/abs/1605.07146).

    ``contract_dilation`` is that of :class:`Stages`: torchvision and mmsegmentation contract
    ResNet's, segmentation_models.pytorch contracts none, torchvision not MobileNet's.
    """
    stem = ("conv1", "bn1", "relu")
    stages = (stem, ("maxpool", "layer1"), ("layer2",), ("layer3",), ("layer4",))

    def build(*, output_stride: Literal[8, 16, 32] = 32, contract_dilation: bool = True) -> Stages:
        return Stages(
            network=builder(),
            stages=stages,
            output_stride=output_stride,
            contract_dilation=contract_dilation,
        )

    return build


def deep_stem(builder: Builder) -> Builder:
    """A ResNet with three 3x3 convolutions for its first one, mmsegmentation's "V1c".

    He et al. 2018, https://arxiv.org/abs/1812.01187, figure 2c.
    """

    def build() -> nn.Module:
        network = builder()
        convs: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 1)):
            conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            convs += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        network.conv1 = nn.Sequential(*convs[:-2])
        return network

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

    def build(*, output_stride: Literal[8, 16, 32] = 32, contract_dilation: bool = True) -> Stages:
        return _cut(
            builder(), taps, output_stride=output_stride, contract_dilation=contract_dilation
        )

    return build


def efficientnet(builder: Builder, *taps: int, side: int | None = None) -> Callable[..., Stages]:
    """EfficientNet (https://arxiv.org/abs/1905.11946) and V2 (https://arxiv.org/abs/2104.00298).

    ``like`` is whose weights are to be loaded. ``timm`` has another epsilon in BatchNorm than
    torchvision from B5 on. Those ported from TensorFlow expect its padding and
    epsilon: ``tensorflow`` pads for images whose sides are multiples of 32, as timm's ``tf_``
    models do then. ``smp``, segmentation_models.pytorch, pads all images as those of the size the
    network was made for, and takes B0's fourth map after the first block of its stage.

    Args:
        builder: torchvision's function.
        taps: The blocks whose outputs are the feature maps; the last 1x1 convolution is dropped.
        side: Of the images the network was made for, where it can be ``like`` another.
    """

    def build(
        *,
        drop_path: float = 0.2,
        like: Literal["torchvision", "timm", "tensorflow", "smp"] = "torchvision",
        output_stride: Literal[8, 16, 32] = 32,
        contract_dilation: bool = True,
    ) -> Stages:
        network = builder(stochastic_depth_prob=drop_path)
        if like != "torchvision" and side is None:
            raise ConfigError(f"like: EfficientNet V2 is like torchvision's only, not '{like}'")
        if like == "timm":
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eps = 1e-5
        elif side is not None and like != "torchvision":
            _as_tensorflow(network, side if like == "smp" else 32)
        stages = _cut(
            network,
            taps,
            early=like == "smp" and builder is models.efficientnet_b0,
            output_stride=output_stride,
            contract_dilation=contract_dilation,
        )
        stages.like = like
        return stages

    return build


class SameConv2d(DepthwiseConv2d):
    """A strided convolution padded as TensorFlow's SAME pads: what is odd at the right and bottom.

    Once dilation has taken the stride away, it pads as others do.

    Args:
        conv: The convolution it takes the place of.
        side: Of the maps it pads for, whatever comes in.
    """

    def __init__(self, conv: nn.Conv2d, side: int) -> None:
        (kernel, _), (stride, _) = conv.kernel_size, conv.stride
        super().__init__(
            conv.in_channels, conv.out_channels, kernel, stride, groups=conv.groups, bias=False
        )
        self.weight = conv.weight
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        self.around = (total // 2, total - total // 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == (1, 1):
            return super().forward(x)
        return super().forward(F.pad(x, 2 * self.around))


def _as_tensorflow(network: nn.Module, side: int) -> None:
    """Give a network the padding that TensorFlow has for images of this side, and its epsilon."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-3, 0.01
        if isinstance(module, nn.Conv2d) and module.stride != (1, 1):
            network.set_submodule(name, SameConv2d(module, side))
            side = -(-side // module.stride[0])


def convnext(builder: Builder, drop_path: float) -> Callable[..., Stages]:
    """ConvNeXt: https://arxiv.org/abs/2201.03545

    ``output_norms`` normalizes each feature map, as published segmentation models do and
    classifiers do not.

    Args:
        builder: torchvision's function.
        drop_path: torchvision's stochastic depth, where the configuration says nothing.
    """

    def build(
        *,
        drop_path: float = drop_path,
        output_norms: bool = False,
        checkpointing: bool = False,
        output_stride: int = 32,
    ) -> Stages:
        refuse_dilation("ConvNeXt", output_stride)
        network = builder(stochastic_depth_prob=drop_path)
        kind = NormalizedStages if output_norms else Stages
        return _cut(network, (1, 3, 5, 7), kind=kind, checkpointing=checkpointing)

    return build


class NormalizedStages(Stages):
    """Stages with a LayerNorm over the channels of each feature map.

    ConvNeXt's authors, mmsegmentation and transformers have it under segmentation heads.
    """

    fresh = ("norm0", "norm1", "norm2", "norm3")
    """Parts that a classifier's weights do not have."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, channels in zip(self.fresh, self.channels, strict=True):
            self.add_module(name, LayerNorm2d(channels, eps=1e-6))

    def forward(self, image: Tensor) -> list[Tensor]:
        features = super().forward(image)
        return [self.get_submodule(name)(x) for name, x in zip(self.fresh, features, strict=True)]

    def only_for(self, level: int) -> nn.Module:
        """What no other feature map depends on."""
        return self.get_submodule(self.fresh[level])


def _cut(
    network: nn.Module,
    taps: tuple[int, ...],
    *,
    early: bool = False,
    kind: type[Stages] = Stages,
    **options: Any,
) -> Stages:
    """Stages of a network that is one sequence, ``features``, each ending with the block tapped.

    ``early`` ends the one before the last at the first part of that block.
    """
    blocks = network.get_submodule("features")
    assert isinstance(blocks, nn.Sequential)
    del blocks[taps[-1] + 1 :]
    ends = (-1, *taps)
    stages = [
        [f"features.{block}" for block in range(before + 1, tap + 1)]
        for before, tap in zip(ends, taps, strict=False)
    ]
    if early:
        block = stages[-2].pop()
        stages[-2].append(f"{block}.0")
        parts = len(list(network.get_submodule(block).children()))
        stages[-1] = [*(f"{block}.{part}" for part in range(1, parts)), *stages[-1]]
    return kind(network=network, stages=stages, **options)


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet18_half": resnet(half_resnet18),
    "resnet18": resnet(models.resnet18),
    "resnet34": resnet(models.resnet34),
    "resnet50": resnet(models.resnet50),
    "resnet101": resnet(models.resnet101),
    "resnet152": resnet(models.resnet152),
    "resnet50_v1c": resnet(deep_stem(models.resnet50)),
    "resnet101_v1c": resnet(deep_stem(models.resnet101)),
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
    "efficientnet_b0": efficientnet(models.efficientnet_b0, 0, 2, 3, 5, 7, side=224),
    "efficientnet_b1": efficientnet(models.efficientnet_b1, 0, 2, 3, 5, 7, side=240),
    "efficientnet_b2": efficientnet(models.efficientnet_b2, 0, 2, 3, 5, 7, side=260),
    "efficientnet_b3": efficientnet(models.efficientnet_b3, 0, 2, 3, 5, 7, side=300),
    "efficientnet_b4": efficientnet(models.efficientnet_b4, 0, 2, 3, 5, 7, side=380),
    "efficientnet_b5": efficientnet(models.efficientnet_b5, 0, 2, 3, 5, 7, side=456),
    "efficientnet_b6": efficientnet(models.efficientnet_b6, 0, 2, 3, 5, 7, side=528),
    "efficientnet_b7": efficientnet(models.efficientnet_b7, 0, 2, 3, 5, 7, side=600),
    "efficientnet_v2_s": efficientnet(models.efficientnet_v2_s, 1, 2, 3, 5, 6),
    "efficientnet_v2_m": efficientnet(models.efficientnet_v2_m, 1, 2, 3, 5, 7),
    "efficientnet_v2_l": efficientnet(models.efficientnet_v2_l, 1, 2, 3, 5, 7),
    "convnext_tiny": convnext(models.convnext_tiny, 0.1),
    "convnext_small": convnext(models.convnext_small, 0.4),
    "convnext_base": convnext(models.convnext_base, 0.5),
    "convnext_large": convnext(models.convnext_large, 0.5),
}
