"""HRNet V2: parallel branches of several resolutions that exchange features."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import Conv2dNormActivation

from segkit.core.config import check_bounds
from segkit.models.backbones.inputs import MOST_CHANNELS
from segkit.models.backbones.stages import refuse_dilation, run
from segkit.models.layers import resize

Upsampling = Literal["bilinear", "bilinear_by_factor", "nearest"]


class HRNet(nn.Module):
    """HRNet V2 with the parameter names of the published weights.

    Wang et al. 2019, https://arxiv.org/abs/1908.07919

    Args:
        width: Channels of the finest branch; each branch has twice as many as the one before.
        upsampling: Interpolation from a coarse to a finer branch: ``nearest`` in the ImageNet
            classifier, ``bilinear`` in the authors' segmentation code. ``bilinear_by_factor``, as
            in mmsegmentation, resizes by 2, 4 or 8, and then to the size of the finer branch, which
            differs if a side of the image is not a multiple of 32.
        align_corners: Used by both bilinear modes: true in the authors' OCRNet, false in
            mmsegmentation.
        checkpointing: Do not store activations inside modules; recompute them in backward.
        in_channels: Channels of the image.

    Shape:
        image: (B, in_channels, H, W)
        features[i]: (B, channels[i], H / strides[i], W / strides[i]), rounded up
    """

    strides = (4, 8, 16, 32)
    output_modules = tuple(f"stage4.2.fuse_layers.{branch}" for branch in range(4))
    stages = (
        ("conv1", "bn1", "conv2", "bn2"),
        ("layer1",),
        *((f"transition{i}", f"stage{i + 1}") for i in (1, 2, 3)),
    )

    def __init__(
        self,
        width: int,
        *,
        upsampling: Upsampling = "bilinear",
        align_corners: bool = True,
        checkpointing: bool = False,
        in_channels: int = 3,
        output_stride: int = 32,
    ) -> None:
        super().__init__()
        refuse_dilation("HRNet", output_stride)
        check_bounds(1, MOST_CHANNELS, in_channels=in_channels)
        self.in_channels = in_channels
        self.channels = tuple(width * 2**branch for branch in range(4))
        self.upsampling = upsampling
        self.align_corners = align_corners
        self.checkpointing = checkpointing
        self.conv1 = nn.Conv2d(in_channels, 64, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        shortcut = nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256))
        first = Bottleneck(64, 64, downsample=shortcut)
        self.layer1 = nn.Sequential(first, *(Bottleneck(256, 64) for _ in range(3)))

        def stage(modules: int, branches: int) -> nn.Sequential:
            channels = self.channels[:branches]
            return nn.Sequential(
                *(Exchange(channels, upsampling, align_corners) for _ in range(modules))
            )

        coarser = nn.Sequential(Conv2dNormActivation(256, 2 * width, stride=2))
        self.transition1 = nn.ModuleList([Conv2dNormActivation(256, width), coarser])
        self.stage2 = stage(1, 2)
        self.transition2 = self._new_branch(2)
        self.stage3 = stage(4, 3)
        self.transition3 = self._new_branch(3)
        self.stage4 = stage(3, 4)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _new_branch(self, branches: int) -> nn.ModuleList:
        """Return a transition that keeps the branches and adds one, made from the coarsest."""
        *_, coarsest, new = self.channels[: branches + 1]
        same = [nn.Identity() for _ in range(branches)]
        return nn.ModuleList([*same, nn.Sequential(Conv2dNormActivation(coarsest, new, stride=2))])

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.relu(self.bn1(self.conv1(image)))
        x = self.layer1(self.relu(self.bn2(self.conv2(x))))
        recompute = self.checkpointing and self.training
        branches = [transition(x) for transition in self.transition1]
        branches = run(self.stage2, branches, recompute=recompute)
        branches = [*branches, self.transition2[-1](branches[-1])]
        branches = run(self.stage3, branches, recompute=recompute)
        branches = [*branches, self.transition3[-1](branches[-1])]
        return run(self.stage4, branches, recompute=recompute)


class Exchange(nn.Module):
    """Four blocks on each branch; then each branch becomes the sum of all branches, resized to it.

    Branches are fine to coarse; ``upsampling`` and ``align_corners`` are those of :class:`HRNet`.
    """

    def __init__(
        self, channels: Sequence[int], upsampling: Upsampling, align_corners: bool
    ) -> None:
        super().__init__()
        self.by_factor = upsampling == "bilinear_by_factor"
        self.mode = "nearest" if upsampling == "nearest" else "bilinear"
        self.align_corners = align_corners
        self.branches = nn.ModuleList(
            nn.Sequential(*(BasicBlock(width, width) for _ in range(4))) for width in channels
        )
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_path(channels, source, target) for source in range(len(channels)))
            for target in range(len(channels))
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        outputs = [blocks(x) for blocks, x in zip(self.branches, branches, strict=True)]
        fused = []
        for target, paths in enumerate(self.fuse_layers):
            total = outputs[target]
            for source, path in enumerate(paths.children()):
                if source < target:
                    total = total + path(outputs[source])
                elif source > target:
                    x = path(outputs[source])
                    if self.by_factor:
                        factor = 2 ** (source - target)
                        x = self._resize(x, [factor * side for side in x.shape[-2:]])
                    total = total + self._resize(x, outputs[target].shape[-2:])
            fused.append(self.relu(total))
        return fused

    def _resize(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return resize(x, size, mode=self.mode, align_corners=self.align_corners)


def _path(channels: Sequence[int], source: int, target: int) -> nn.Module:
    """Map one branch to the width of another, and to its resolution if that is coarser."""
    inputs, outputs = channels[source], channels[target]
    if source == target:
        return nn.Identity()
    if source > target:
        return Conv2dNormActivation(inputs, outputs, 1, activation_layer=None)
    steps = [Conv2dNormActivation(inputs, inputs, stride=2) for _ in range(target - source - 1)]
    last = Conv2dNormActivation(inputs, outputs, stride=2, activation_layer=None)
    return nn.Sequential(*steps, last)


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "hrnet_w18": partial(HRNet, 18),
    "hrnet_w32": partial(HRNet, 32),
    "hrnet_w48": partial(HRNet, 48),
}
