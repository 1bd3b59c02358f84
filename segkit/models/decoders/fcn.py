"""FCN: a fully convolutional head on the deepest map."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from segkit.models.layers import ConvNormAct, fcn_head


class FCN(nn.Module):
    """One convolution on the deepest map, of a dilated backbone at best.

    Long et al. 2015, https://arxiv.org/abs/1411.4038

    Args:
        channels: Encoder widths, shallow to deep.
        strides: Encoder strides.
        num_classes: Number of logit planes.
        width: Channels of the hidden convolution; a quarter of the map's where ``None``.
        dropout: Share of values dropped before the classifier.
        aux: Have a second head, on the second deepest map, while training.
        layout: ``mmsegmentation`` has a second convolution, and a third that joins its result with
            the map itself.

    Shape:
        features[i]: (B, channels[i], H / strides[i], W / strides[i])
        out: (B, num_classes, H / strides[-1], W / strides[-1])
        aux: (B, num_classes, H / strides[-2], W / strides[-2]), in training

    Departs from the paper: keeps resolution by dilation instead of adding up three levels' logits.
    """

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
        *_, shallower, deepest = channels
        self.reads = (-2, -1) if aux else (-1,)
        hidden = width or deepest // 4
        joined = layout == "mmsegmentation"
        self.convs = (
            nn.Sequential(ConvNormAct(deepest, hidden), ConvNormAct(hidden, hidden))
            if joined
            else None
        )
        inputs = deepest + hidden if joined else deepest
        self.classifier = fcn_head(inputs, hidden, num_classes, dropout=dropout)
        self.aux_classifier = (
            fcn_head(shallower, width or shallower // 4, num_classes, dropout=dropout)
            if aux
            else None
        )

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        x = features[-1]
        if self.convs is not None:
            x = torch.cat([x, self.convs(x)], 1)
        outputs = {"out": self.classifier(x)}
        if self.training and self.aux_classifier is not None:
            outputs["aux"] = self.aux_classifier(features[-2])
        return outputs
