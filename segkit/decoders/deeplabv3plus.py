"""DeepLabV3+: atrous pyramid pooling, sharpened by one shallow map."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segkit.decoders.layers import ASPP, Classifier, ConvNormAct, level_at, resize


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+, with segmentation_models.pytorch's defaults.

    Chen et al. 2018, https://arxiv.org/abs/1802.02611

    Args:
        channels: Encoder widths, shallow to deep.
        strides: Encoder strides; 16 or 8 for the deepest map, through a dilated backbone.
        num_classes: Number of logit planes.
        width: Channels of the decoder.
        low_width: Channels the shallow map, of stride 4, is reduced to.
        rates: Dilation of the pyramid's branches. The paper has 6, 12, 18 at output stride 16 and
            12, 24, 36 at 8.
        separable: Depthwise and pointwise convolutions in place of plain ones.
        dropout: Share of the pyramid's values dropped.
        align_corners: Of every interpolation, the one to the image's size too.

    Shape:
        features[i]: (B, channels[i], H / strides[i], W / strides[i])
        out: (B, num_classes, H / 4, W / 4)

    Departs from the paper: no BatchNorm between depthwise and pointwise convolutions, one
    convolution after the maps are joined, not two.
    """

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
    ) -> None:
        super().__init__()
        self.low_level = level_at(4, strides)
        self.align_corners = align_corners
        self.reads = (self.low_level, -1)
        self.aspp = ASPP(
            channels[-1], width=width, rates=rates, separable=separable, dropout=dropout
        )
        self.smooth = ConvNormAct(width, width, separable=separable)
        self.low = ConvNormAct(channels[self.low_level], low_width, kernel=1)
        self.fuse = ConvNormAct(width + low_width, width, separable=separable)
        self.classifier = Classifier(width, num_classes)

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        low = self.low(features[self.low_level])
        high = self.smooth(self.aspp(features[-1]))
        high = resize(high, low.shape[-2:], align_corners=self.align_corners)
        return {"out": self.classifier(self.fuse(torch.cat([high, low], 1)))}
