"""Classifiers divided into stages, with dilation in place of the last strides."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import SqueezeExcitation

from segkit.core.errors import ConfigError
from segkit.models.backbones.inputs import set_in_channels
from segkit.models.kernels.depthwise import speed_up_depthwise

OutputStride = Literal[8, 16, 32]
"""Strides of the deepest map that a dilated backbone can have."""


class Stages(nn.Module):
    """The stages of a convolutional classifier, each of which returns one feature map.

    Modules of the classifier keep their names, so that its weights load key by key. Modules in no
    stage are left out, as distributed training fails on unused parameters.

    Args:
        network: The classifier.
        stages: For each feature map, shallow to deep, the names of the submodules between the
            previous one and it, in order.
        in_channels: Channels of the image. If the network has another number, its first convolution
            is newly initialized.
        output_stride: Stride of the deepest map, 8, 16 or 32. Below 32 the last stages have stride
            1 and dilated kernels instead (Chen et al. 2017, https://arxiv.org/abs/1706.05587):
            every value of the strided map is also in the new map, with others in between.
        contract_dilation: Give the strided convolutions of a stage the dilation of its input.
        checkpointing: Do not store activations inside blocks; recompute them in backward.

    Shape:
        image: (B, in_channels, H, W)
        features[i]: (B, channels[i], H / strides[i], W / strides[i])

    Raises:
        ConfigError: If ``output_stride`` is not 8, 16 or 32.
    """

    like = "torchvision"
    """The library whose details an EfficientNet follows."""

    def __init__(
        self,
        network: nn.Module,
        stages: Sequence[Sequence[str]],
        *,
        in_channels: int = 3,
        output_stride: int = 32,
        contract_dilation: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ConfigError(f"output_stride: expected 8, 16 or 32, got {output_stride}")
        set_in_channels(network, in_channels)
        self.stages = stages
        self.in_channels = in_channels
        self.output_stride = output_stride
        self.contract_dilation = contract_dilation
        self.checkpointing = checkpointing
        for name in dict.fromkeys(part.split(".")[0] for part in chain(*stages)):
            self.add_module(name, network.get_submodule(name))
        speed_up_depthwise(self)
        for module in self.modules():
            if isinstance(module, SqueezeExcitation):
                module.avgpool = GlobalAverage()
        shapes = self._shapes()
        strides = [_SIDE // shape[-1] for shape in shapes]
        self.channels = tuple(shape[1] for shape in shapes)
        self.strides = tuple(min(stride, output_stride) for stride in strides)
        rate = 1
        for parts, stride in zip(stages, strides, strict=True):
            if stride > output_stride:
                modules = map(self.get_submodule, parts)
                rate = dilate(modules, rate, contract=contract_dilation)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, features = image, []
        for parts in self.stages:
            for name in parts:
                x = run(self.get_submodule(name), x, recompute=self.checkpointing and self.training)
            features.append(x)
        return features

    @torch.no_grad()
    def _shapes(self) -> list[torch.Size]:
        """Return the shapes of the feature maps of the smallest image, 32 x 32."""
        image = next(self.parameters()).new_zeros(1, self.in_channels, _SIDE, _SIDE)
        self.eval()
        features = Stages.forward(self, image)
        self.train()
        return [feature.shape for feature in features]


def run(stage: nn.Module, x: Any, *, recompute: bool) -> Any:
    """Run a stage; if ``recompute`` is set, backward recomputes activations inside its blocks."""
    if not recompute or not isinstance(stage, nn.Sequential):
        return stage(x)
    for block in stage:
        x = checkpoint(block, x, use_reentrant=False)
    return x


class GlobalAverage(nn.Module):
    """Global average pooling whose gradient keeps the channels_last memory format.

    The gradient of PyTorch's pooling does not, which slows down squeeze and excitation: with this
    module it is 1.2 to 2.1 times as fast, forward and backward (``python -m benchmarks.layers``).

    Shape:
        x: (B, C, H, W) -> (B, C, 1, 1)
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).mean((1, 2))[:, :, None, None]


_SIDE = 32


def dilate(parts: Iterable[nn.Module], rate: int, *, contract: bool = True) -> int:
    """Replace the stride of a stage by dilation, in place.

    The strided convolutions have the dilation of the input, those after them twice as much.

    Args:
        parts: The stage's modules, in the order they run.
        rate: Dilation of the input.
        contract: If false, the strided convolutions have twice the dilation of the input too.

    Returns:
        Dilation of the output.
    """
    out = rate
    for conv in (module for part in parts for module in part.modules()):
        if not isinstance(conv, nn.Conv2d):
            continue
        strided = conv.stride[0] > 1
        if strided:
            conv.stride, out = (1, 1), 2 * rate
        if conv.kernel_size != (1, 1):
            spacing = rate if strided and contract else out
            conv.dilation = (spacing, spacing)
            conv.padding = tuple(spacing * (side // 2) for side in conv.kernel_size)
    return out


def refuse_dilation(family: str, output_stride: int) -> None:
    """Raise an error unless ``output_stride`` is 32, for families that cannot be dilated.

    Raises:
        ConfigError: If ``output_stride`` is not 32.
    """
    if output_stride != 32:
        raise ConfigError(
            f"output_stride: {family} cannot be dilated, so expected 32, got {output_stride}; "
            "ResNet, ResNeXt, Wide ResNet, SE-ResNet, RegNet, MobileNet and EfficientNet can"
        )
