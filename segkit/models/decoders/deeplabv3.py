"""DeepLabV3: atrous spatial pyramid pooling on the deepest feature map."""

from collections.abc import Sequence

from torch import Tensor, nn

from segkit.models.layers import ASPP, fcn_head, with_aux


class DeepLabV3(nn.Module):
    """DeepLabV3 as in torchvision, with rates for a backbone of output stride 8.

    Chen et al. 2017, https://arxiv.org/abs/1706.05587

    Args:
        width: Channels of the decoder.
        rates: Dilations of the pyramid's branches.
        dropout: Dropout probability of the pyramid's output.
        aux: Add an auxiliary head on the second deepest map, if there is one, in training only.

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
        width: int = 256,
        rates: tuple[int, ...] = (12, 24, 36),
        dropout: float = 0.5,
        aux: bool = True,
    ) -> None:
        super().__init__()
        aux = aux and len(channels) > 1
        self.used_levels = (-2, -1) if aux else (-1,)
        self.rates = rates
        self.aspp = ASPP(channels[-1], width=width, rates=rates, dropout=dropout)
        self.classifier = fcn_head(width, width, num_classes, dropout=0.0)
        self.aux = fcn_head(channels[-2], channels[-2] // 4, num_classes) if aux else None

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        return with_aux(self.classifier(self.aspp(features[-1])), self.aux, features)
