"""PSPNet: pyramid pooling on the deepest feature map."""

from collections.abc import Sequence

from torch import Tensor, nn

from segkit.models.layers import Classifier, PyramidPooling, fcn_head, with_aux


class PSPNet(nn.Module):
    """PSPNet, preferably on a backbone of output stride 8.

    Zhao et al. 2017, https://arxiv.org/abs/1612.01105

    Args:
        width: Channels of the decoder.
        bins: Sides of the pooling grids.
        dropout: Dropout probability of channels before the classifier.
        aux_width: Channels of the auxiliary head; ``None`` for none. It needs a second map.

    Shape:
        features[i]: (B, channels[i], H / strides[i], W / strides[i])
        out: (B, num_classes, H / strides[-1], W / strides[-1])
        aux: (B, num_classes, H / strides[-2], W / strides[-2]), in training
    """

    takes = "map"

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
        deepest, aux_width = channels[-1], aux_width if len(channels) > 1 else None
        self.used_levels = (-2, -1) if aux_width else (-1,)
        bin_width = deepest // len(bins)
        self.bins = bins
        self.pool = PyramidPooling(deepest, width=bin_width, outputs=width, bins=bins)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = Classifier(width, num_classes)
        self.aux = fcn_head(channels[-2], aux_width, num_classes) if aux_width else None

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        return with_aux(self.classifier(self.dropout(self.pool(features[-1]))), self.aux, features)
