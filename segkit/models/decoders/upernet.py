"""UPerNet: a feature pyramid network on top of pyramid pooling."""

from collections.abc import Sequence

from torch import Tensor, nn

from segkit.models.layers import (
    Classifier,
    ConvNormAct,
    PyramidConv2d,
    PyramidPooling,
    fcn_head,
    resize,
    with_aux,
)


class UPerNet(nn.Module):
    """UPerNet's semantic branch on the last four maps, with an auxiliary FCN head.

    Xiao et al. 2018, https://arxiv.org/abs/1807.10221

    Args:
        width: Channels of every level of the pyramid.
        bins: Sides of the pooling grids on the deepest map.
        dropout: Dropout probability of channels before the classifier.
        aux_width: Channels of the auxiliary head; ``None`` for no auxiliary head.

    Shape:
        features[i]: (B, channels[i], H / strides[i], W / strides[i])
        out: (B, num_classes, H / strides[-4], W / strides[-4])
        aux: (B, num_classes, H / strides[-2], W / strides[-2]), in training
    """

    takes = "pyramid"

    def __init__(
        self,
        *,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        num_classes: int,
        width: int = 512,
        bins: tuple[int, ...] = (1, 2, 3, 6),
        dropout: float = 0.1,
        aux_width: int | None = 256,
    ) -> None:
        super().__init__()
        *lower, deepest = channels[-4:]
        self.bins = bins
        self.pool = PyramidPooling(deepest, width=width, outputs=width, bins=bins)
        self.laterals = nn.ModuleList(ConvNormAct(inputs, width, kernel=1) for inputs in lower)
        self.smooth = nn.ModuleList(ConvNormAct(width, width) for _ in lower)
        self.fuse = ConvNormAct(width * (len(lower) + 1), width, conv=PyramidConv2d)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = Classifier(width, num_classes)
        self.aux = fcn_head(channels[-2], aux_width, num_classes) if aux_width else None

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        *lower, deepest = features[-4:]
        pyramid = [lateral(x) for lateral, x in zip(self.laterals, lower, strict=True)]
        pyramid.append(self.pool(deepest))
        for i in reversed(range(len(lower))):
            pyramid[i] = pyramid[i] + resize(pyramid[i + 1], pyramid[i].shape[-2:])
        for i, smooth in enumerate(self.smooth):
            pyramid[i] = smooth(pyramid[i])
        return with_aux(self.classifier(self.dropout(self.fuse(pyramid))), self.aux, features)
