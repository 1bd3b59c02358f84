"""Convolutional backbones of torchvision, with its parameter names, so that its weights load."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, LayerNorm2d
from torchvision.models.resnet import BasicBlock

from segkit.core.errors import ConfigError
from segkit.models.backbones.stages import OutputStride, Stages, refuse_dilation
from segkit.models.kernels.depthwise import DepthwiseConv2d

Builder = Callable[..., nn.Module]
Like = Literal["torchvision", "timm", "tensorflow", "smp"]


def resnet(
    builder: Builder,
    *,
    in_channels: int = 3,
    output_stride: OutputStride = 32,
    contract_dilation: bool = True,
) -> Stages:
    """Build ResNet, ResNeXt or Wide ResNet.

    https://arxiv.org/abs/1512.03385, https://arxiv.org/abs/1611.05431 and
    https://arxiv.org/abs/1605.07146

    ``contract_dilation`` is true in torchvision and mmsegmentation for ResNet; false in
    segmentation_models.pytorch, and in torchvision for MobileNet.
    """
    stem = ("conv1", "bn1", "relu")
    return Stages(
        builder(),
        (stem, ("maxpool", "layer1"), ("layer2",), ("layer3",), ("layer4",)),
        in_channels=in_channels,
        output_stride=output_stride,
        contract_dilation=contract_dilation,
    )


def deep_stem(builder: Builder) -> nn.Module:
    """Return a ResNet whose first convolution is replaced by three of 3x3.

    mmsegmentation calls it "V1c".

    He et al. 2018, https://arxiv.org/abs/1812.01187, figure 2c.
    """
    network = builder()
    convs: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 1)):
        conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        convs += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    network.conv1 = nn.Sequential(*convs[:-2])
    return network


class _HalfResNet(models.ResNet):
    """ResNet with stages of half the channels, for machines without a GPU."""

    def _make_layer(
        self, block: Any, planes: int, *arguments: Any, **options: Any
    ) -> nn.Sequential:
        return super()._make_layer(block, planes // 2, *arguments, **options)


def half_resnet18(**options: Any) -> models.ResNet:
    """Return ResNet-18 with half the channels; there are no published weights for it."""
    return _HalfResNet(BasicBlock, [2, 2, 2, 2], **options)


def regnet(builder: Builder, *, in_channels: int = 3, output_stride: OutputStride = 32) -> Stages:
    """Build RegNet X or Y.

    https://arxiv.org/abs/2003.13678
    """
    with torch.device("cpu"):  # it computes widths with tensors, which fails on "meta"
        network = builder()
    stages = (("stem",), *((f"trunk_output.block{i}",) for i in range(1, 5)))
    return Stages(network, stages, in_channels=in_channels, output_stride=output_stride)


def mobilenet(
    builder: Builder,
    taps: tuple[int, ...],
    *,
    in_channels: int = 3,
    output_stride: OutputStride = 32,
    contract_dilation: bool = True,
) -> Stages:
    """Build MobileNet V2 or V3.

    https://arxiv.org/abs/1801.04381 and https://arxiv.org/abs/1905.02244

    Args:
        builder: torchvision's function.
        taps: Indices of the blocks whose outputs are the feature maps.
    """
    return Stages(
        *_divide(builder(), taps),
        in_channels=in_channels,
        output_stride=output_stride,
        contract_dilation=contract_dilation,
    )


def efficientnet(
    builder: Builder,
    taps: tuple[int, ...],
    side: int | None,
    *,
    drop_path: float = 0.2,
    like: Like = "torchvision",
    in_channels: int = 3,
    output_stride: OutputStride = 32,
    contract_dilation: bool = True,
) -> Stages:
    """Build EfficientNet, EfficientNet-Lite or EfficientNet V2.

    https://arxiv.org/abs/1905.11946 and https://arxiv.org/abs/2104.00298

    ``timm`` has a different epsilon in BatchNorm than torchvision from B5 on. Weights ported from
    TensorFlow need its padding and epsilon: ``tensorflow`` pads for images whose sides are
    multiples of 32, as timm's ``tf_`` models do for such images. ``smp``
    (segmentation_models.pytorch) pads every image as one of the network's own size, and takes B0's
    fourth feature map after the first block of its stage.

    Args:
        builder: torchvision's function.
        taps: Indices of the blocks whose outputs are the feature maps.
        side: Side of the images the network was designed for; ``None`` for EfficientNet V2, which
            is only like torchvision's.
        drop_path: Largest probability of stochastic depth.
        like: Library whose weights are loaded; padding and epsilon of BatchNorm follow it.
    """
    network = builder(stochastic_depth_prob=drop_path)
    if like != "torchvision" and side is None:
        raise ConfigError(f"like: EfficientNet V2 has only 'torchvision', got '{like}'")
    if like == "timm":
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-5
    elif side is not None and like != "torchvision":
        _as_tensorflow(network, side if like == "smp" else 32)
    backbone = Stages(
        *_divide(network, taps, early=like == "smp" and builder is models.efficientnet_b0),
        in_channels=in_channels,
        output_stride=output_stride,
        contract_dilation=contract_dilation,
    )
    backbone.like = like
    return backbone


class SameConv2d(DepthwiseConv2d):
    """A strided convolution with TensorFlow's SAME padding: an odd pixel at the right and bottom.

    If dilation has replaced its stride, it pads symmetrically. It replaces ``conv``; padding is
    that of maps of this ``side``, whatever the actual input.
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
    """Give a network TensorFlow's padding for images of this side, and its epsilon, in place."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-3, 0.01
        if isinstance(module, nn.Conv2d) and module.stride != (1, 1):
            network.set_submodule(name, SameConv2d(module, side))
            side = -(-side // module.stride[0])


def convnext_of(width: int, *depths: int, block: Builder | None = None) -> Builder:
    """Return a builder of a ConvNeXt with other blocks than torchvision's, or of other sizes.

    Args:
        width: Channels of the first stage; each stage has twice as many as the one before.
        depths: Blocks of each stage.
        block: Makes a block; ``None`` for torchvision's.
    """
    widths = [width * 2**stage for stage in range(len(depths))]
    ends = (*widths[1:], None)
    settings = [CNBlockConfig(*sizes) for sizes in zip(widths, ends, depths, strict=True)]
    return partial(models.ConvNeXt, settings, block=block)


def convnext(
    builder: Builder,
    *,
    drop_path: float,
    output_norms: bool = False,
    checkpointing: bool = False,
    in_channels: int = 3,
    output_stride: int = 32,
) -> Stages:
    """Build ConvNeXt or ConvNeXt V2.

    https://arxiv.org/abs/2201.03545 and https://arxiv.org/abs/2301.00808

    Args:
        builder: torchvision's function, or that of :func:`convnext_of`.
        drop_path: Largest probability of stochastic depth.
        output_norms: Normalize each feature map, as published segmentation models do and
            classifiers do not.
    """
    refuse_dilation("ConvNeXt", output_stride)
    network, stages = _divide(builder(stochastic_depth_prob=drop_path), (1, 3, 5, 7))
    kind = NormalizedStages if output_norms else Stages
    return kind(network, stages, in_channels=in_channels, checkpointing=checkpointing)


class NormalizedStages(Stages):
    """Stages with a LayerNorm over the channels of each feature map.

    ConvNeXt's authors, mmsegmentation and transformers use it for segmentation.
    """

    output_modules = ("norm0", "norm1", "norm2", "norm3")
    """Names of the norms, which a pretrained classifier does not have."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for name, channels in zip(self.output_modules, self.channels, strict=True):
            self.add_module(name, LayerNorm2d(channels, eps=1e-6))

    def forward(self, image: Tensor) -> list[Tensor]:
        features = super().forward(image)
        return [
            self.get_submodule(name)(x)
            for name, x in zip(self.output_modules, features, strict=True)
        ]


def _divide(
    network: nn.Module, taps: tuple[int, ...], *, early: bool = False
) -> tuple[nn.Module, list[list[str]]]:
    """Divide a network's sequence ``features`` into stages that end with the blocks in ``taps``.

    Later blocks, such as the last 1x1 convolution, are removed. With ``early`` the last stage but
    one ends with the first part of its last block.

    Returns:
        The network, and the names of the modules of each of its stages.
    """
    blocks = network.get_submodule("features")
    assert isinstance(blocks, nn.Sequential)
    del blocks[taps[-1] + 1 :]
    stages = [
        [f"features.{block}" for block in range(before + 1, tap + 1)]
        for before, tap in pairwise((-1, *taps))
    ]
    if early:
        block = stages[-2].pop()
        stages[-2].append(f"{block}.0")
        parts = len(list(network.get_submodule(block).children()))
        stages[-1] = [*(f"{block}.{part}" for part in range(1, parts)), *stages[-1]]
    return network, stages


def _each(make: Callable[..., Stages], *names: str) -> dict[str, Callable[..., Stages]]:
    return {name: partial(make, models.get_model_builder(name)) for name in names}


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet18_half": partial(resnet, half_resnet18),
    **_each(resnet, "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    "resnet50_v1c": partial(resnet, partial(deep_stem, models.resnet50)),
    "resnet101_v1c": partial(resnet, partial(deep_stem, models.resnet101)),
    **_each(resnet, "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    **_each(resnet, "wide_resnet50_2", "wide_resnet101_2"),
    **_each(regnet, "regnet_x_400mf", "regnet_x_800mf", "regnet_x_1_6gf", "regnet_x_3_2gf"),
    **_each(regnet, "regnet_x_8gf", "regnet_x_16gf", "regnet_x_32gf"),
    **_each(regnet, "regnet_y_400mf", "regnet_y_800mf", "regnet_y_1_6gf", "regnet_y_3_2gf"),
    **_each(regnet, "regnet_y_8gf", "regnet_y_16gf", "regnet_y_32gf", "regnet_y_128gf"),
    "mobilenet_v2": partial(mobilenet, models.mobilenet_v2, (1, 3, 6, 13, 17)),
    "mobilenet_v3_small": partial(mobilenet, models.mobilenet_v3_small, (0, 1, 3, 8, 11)),
    "mobilenet_v3_large": partial(mobilenet, models.mobilenet_v3_large, (1, 3, 6, 12, 15)),
    "efficientnet_b0": partial(efficientnet, models.efficientnet_b0, (0, 2, 3, 5, 7), 224),
    "efficientnet_b1": partial(efficientnet, models.efficientnet_b1, (0, 2, 3, 5, 7), 240),
    "efficientnet_b2": partial(efficientnet, models.efficientnet_b2, (0, 2, 3, 5, 7), 260),
    "efficientnet_b3": partial(efficientnet, models.efficientnet_b3, (0, 2, 3, 5, 7), 300),
    "efficientnet_b4": partial(efficientnet, models.efficientnet_b4, (0, 2, 3, 5, 7), 380),
    "efficientnet_b5": partial(efficientnet, models.efficientnet_b5, (0, 2, 3, 5, 7), 456),
    "efficientnet_b6": partial(efficientnet, models.efficientnet_b6, (0, 2, 3, 5, 7), 528),
    "efficientnet_b7": partial(efficientnet, models.efficientnet_b7, (0, 2, 3, 5, 7), 600),
    "efficientnet_v2_s": partial(efficientnet, models.efficientnet_v2_s, (1, 2, 3, 5, 6), None),
    "efficientnet_v2_m": partial(efficientnet, models.efficientnet_v2_m, (1, 2, 3, 5, 7), None),
    "efficientnet_v2_l": partial(efficientnet, models.efficientnet_v2_l, (1, 2, 3, 5, 7), None),
    "convnext_tiny": partial(convnext, models.convnext_tiny, drop_path=0.1),
    "convnext_small": partial(convnext, models.convnext_small, drop_path=0.4),
    "convnext_base": partial(convnext, models.convnext_base, drop_path=0.5),
    "convnext_large": partial(convnext, models.convnext_large, drop_path=0.5),
    "convnext_xlarge": partial(convnext, convnext_of(256, 3, 3, 27, 3), drop_path=0.5),
}
