"""SE-ResNet: residual blocks with squeeze and excitation."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from segkit.models.backbones.stages import OutputStride, Stages


class SEBottleneck(nn.Module):
    """A bottleneck with squeeze and excitation; as in Caffe, its first convolution is strided.

    Hu et al. 2017, https://arxiv.org/abs/1709.01507

    ``width`` is that of the 3x3 convolution; there are four times as many output channels.
    """

    def __init__(self, inputs: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.se_module = SqueezeExcitation(outputs, outputs // 16)
        self.downsample = nn.Sequential()
        if inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.se_module(self.bn3(self.conv3(out)))
        return self.relu(out + self.downsample(x))


def seresnet(*depths: int, in_channels: int = 3, output_stride: OutputStride = 32) -> Stages:
    """Build SE-ResNet with the parameter names of its published weights."""
    stem = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
        bn1=nn.BatchNorm2d(64),
        relu1=nn.ReLU(inplace=True),
        pool=nn.MaxPool2d(3, stride=2, ceil_mode=True),
    )
    network = nn.Sequential(OrderedDict(layer0=nn.Sequential(stem)))
    inputs = 64
    for i, depth in enumerate(depths):
        width = 64 * 2**i
        blocks = [SEBottleneck(inputs, width, stride=1 if i == 0 else 2)]
        inputs = 4 * width
        blocks += [SEBottleneck(inputs, width) for _ in range(depth - 1)]
        network.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    first = ("layer0.conv1", "layer0.bn1", "layer0.relu1")
    return Stages(
        network,
        (first, ("layer0.pool", "layer1"), ("layer2",), ("layer3",), ("layer4",)),
        in_channels=in_channels,
        output_stride=output_stride,
        contract_dilation=False,  # no effect, as the strided convolutions are 1x1
    )


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "se_resnet50": partial(seresnet, 3, 4, 6, 3),
    "se_resnet101": partial(seresnet, 3, 4, 23, 3),
    "se_resnet152": partial(seresnet, 3, 8, 36, 3),
}
