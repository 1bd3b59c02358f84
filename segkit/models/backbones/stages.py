"""A classifier cut into stages, with dilation in place of its last strides."""

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import SqueezeExcitation

from segkit.core.errors import ConfigError
from segkit.models.kernels.depthwise import speed_up_depthwise


class Stages(nn.Module):
    """The stages of a convolutional classifier, each of them giving one feature map.

    The classifier's parts keep their names, so its weights load key by key. What no stage names
    is left out: an unused parameter would stop distributed training.

    Args:
        network: The classifier.
        stages: For each feature map, shallow to deep, the submodules that lead to it, in order.
        output_stride: Stride of the deepest map, 8, 16 or 32. Below 32 the last stages lose their
            stride and their kernels are dilated instead (Chen et al. 2017,
            https://arxiv.org/abs/1706.05587): every value of the strided map stays where it was,
            with new ones in between.
        contract_dilation: Leave the strided convolutions of a stage at the dilation that comes in.
        checkpointing: Drop the activations inside blocks and recompute them in backward.

    Shape:
        image: (B, 3, H, W)
        features[i]: (B, channels[i], H / strides[i], W / strides[i])

    Raises:
        ConfigError: If ``output_stride`` is none of those.
    """

    like = "torchvision"
    """Whose details an EfficientNet has."""

    def __init__(
        self,
        *,
        network: nn.Module,
        stages: Sequence[Sequence[str]],
        output_stride: int = 32,
        contract_dilation: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ConfigError(f"output_stride: expected 8, 16 or 32, got {output_stride}")
        self.stages = stages
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
                x = self._run(self.get_submodule(name), x)
            features.append(x)
        return features

    def _run(self, part: nn.Module, x: Tensor) -> Tensor:
        if not (self.checkpointing and self.training and isinstance(part, nn.Sequential)):
            return part(x)
        for block in part:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    @torch.no_grad()
    def _shapes(self) -> list[torch.Size]:
        """Shapes of the feature maps of the smallest image that has them all."""
        image = next(self.parameters()).new_zeros(1, 3, _SIDE, _SIDE)
        self.eval()
        features = Stages.forward(self, image)
        self.train()
        return [feature.shape for feature in features]


class GlobalAverage(nn.Module):
    """The average of a map, whose gradient has the map's layout in memory if that is channels_last.

    That of PyTorch's pooling has not: what is multiplied by a function of the average, as in
    squeeze and excitation, takes twice as long in training.

    Shape:
        x: (B, C, H, W) -> (B, C, 1, 1)
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).mean((1, 2))[:, :, None, None]


_SIDE = 32


def dilate(parts: Iterable[nn.Module], rate: int, *, contract: bool = True) -> int:
    """Give a stage its stride back as dilation, in place.

    The strided convolutions keep the dilation that came in, those after them have twice as much.

    Args:
        parts: The stage's modules, in the order they run.
        rate: Dilation of the maps that come in.
        contract: Without it the strided convolutions have twice as much too.

    Returns:
        Dilation of the maps that go out.
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
    """Say which families can be dilated where this one cannot.

    Raises:
        ConfigError: Unless ``output_stride`` is 32.
    """
    if output_stride != 32:
        raise ConfigError(
            f"output_stride: {family} cannot be dilated, so expected 32, got {output_stride}; "
            "ResNet, ResNeXt, Wide ResNet, SE-ResNet, RegNet, MobileNet and EfficientNet can"
        )
