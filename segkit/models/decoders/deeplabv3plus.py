"""DeepLabV3+: atrous spatial pyramid pooling joined with one shallow feature map."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from segkit.models.layers import ASPP, Classifier, ConvNormAct, fcn_head, level_at, resize, with_aux


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ with the defaults of segmentation_models.pytorch, for output stride 16 or 8.

    Chen et al. 2018, https://arxiv.org/abs/1802.02611

    Args:
        width: Channels of the decoder; 512 in mmsegmentation.
        low_width: Channels that the shallow map, of stride 4, is reduced to.
        rates: Dilations of the pyramid's branches; in the paper 6, 12, 18 at output stride 16 and
            12, 24, 36 at 8.
        separable: Use depthwise and pointwise convolutions in place of plain ones.
        dropout: Dropout probability of the pyramid's output.
        align_corners: Used by every interpolation, including that to the image's size; false in
            mmsegmentation.
        aux: Add an auxiliary head on the second deepest map, in training only.
        layout: ``smp`` has one convolution before the maps are joined and one after, without
            BatchNorm inside separable ones. ``mmsegmentation``, like the paper, has none before,
            two after, and BatchNorm inside; unlike the paper, it joins the pyramid's branches by a
            3x3 convolution in place of 1x1.

    Shape:
        features[i]: (B, channels[i], H / strides[i], W / strides[i])
        out: (B, num_classes, H / 4, W / 4)
        aux: (B, num_classes, H / strides[-2], W / strides[-2]), in training
    """

    takes = "pyramid"

    def __init__(
        self,
        *,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        num_classes: int,
        width: int = 256,
        low_width: int = 48,
        rates: tuple[int, ...] = (12, 24, 36),
        separable: bool = True,
        dropout: float = 0.5,
        align_corners: bool = True,
        aux: bool = False,
        layout: Literal["smp", "mmsegmentation"] = "smp",
    ) -> None:
        super().__init__()
        smp = layout == "smp"
        self.low_level = level_at(4, strides)
        self.align_corners = align_corners
        self.used_levels = (self.low_level, *((-2, -1) if aux else (-1,)))
        self.rates = rates
        self.aspp = ASPP(
            channels[-1],
            width=width,
            rates=rates,
            separable=separable,
            norm_between=not smp,
            kernel=1 if smp else 3,
            dropout=dropout,
        )
        conv = partial(ConvNormAct, separable=separable, norm_between=not smp)
        self.smooth = conv(width, width) if smp else nn.Identity()
        self.low = ConvNormAct(channels[self.low_level], low_width, kernel=1)
        fuse = conv(width + low_width, width)
        self.fuse = fuse if smp else nn.Sequential(fuse, conv(width, width))
        self.classifier = Classifier(width, num_classes)
        self.aux = fcn_head(channels[-2], channels[-2] // 4, num_classes) if aux else None

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        low = self.low(features[self.low_level])
        high = self.smooth(self.aspp(features[-1]))
        high = resize(high, low.shape[-2:], align_corners=self.align_corners)
        return with_aux(self.classifier(self.fuse(torch.cat([high, low], 1))), self.aux, features)
