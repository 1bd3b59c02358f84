"""FCN: a fully convolutional head on the deepest feature map."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from segkit.models.layers import ConvNormAct, fcn_head, with_aux


class FCN(nn.Module):
    """FCN: convolutions on the deepest map, preferably that of a dilated backbone.

    Long et al. 2015, https://arxiv.org/abs/1411.4038

    Args:
        width: Channels of the hidden convolution; ``None`` for a quarter of the map's.
        dropout: Dropout probability before the classifier.
        aux: Add an auxiliary head on the second deepest map, if there is one, in training only.
        layout: ``torchvision`` has one convolution. ``mmsegmentation`` has a second one, and a
            third that joins its output with the map itself.

    Shape:
        features[i]: (B, channels[i], H / strides[i], W / strides[i])
        out: (B, num_classes, H / strides[-1], W / strides[-1])
        aux: (B, num_classes, H / strides[-2], W / strides[-2]), in training

    Departs from the paper: keeps resolution by dilation instead of adding logits of three levels.
    """

    takes = "map"

    def __init__(
        self,
        *,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        num_classes: int,
        width: int | None = None,
        dropout: float = 0.1,
        aux: bool = True,
        layout: Literal["torchvision", "mmsegmentation"] = "torchvision",
    ) -> None:
        super().__init__()
        deepest, aux = channels[-1], aux and len(channels) > 1
        self.used_levels = (-2, -1) if aux else (-1,)
        hidden = width or deepest // 4
        head = partial(fcn_head, num_classes=num_classes, dropout=dropout)
        self.convs = None
        if layout == "mmsegmentation":
            self.convs = nn.Sequential(ConvNormAct(deepest, hidden), ConvNormAct(hidden, hidden))
        inputs = deepest if self.convs is None else deepest + hidden
        self.classifier = head(inputs, hidden)
        self.aux_classifier = head(channels[-2], width or channels[-2] // 4) if aux else None

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        x = features[-1]
        if self.convs is not None:
            x = torch.cat([x, self.convs(x)], 1)
        return with_aux(self.classifier(x), self.aux_classifier, features)
