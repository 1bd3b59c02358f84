"""U-Net: a decoder with one skip connection per level."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segkit.core.errors import ConfigError
from segkit.models.layers import Classifier, ConvNormAct, resize


class UNet(nn.Module):
    """U-Net's decoder for any encoder.

    Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597

    Args:
        widths: Channels of the decoder, deep to shallow; one per skip is used.

    Shape:
        features[i]: (B, channels[i], H / strides[i], W / strides[i])
        out: (B, num_classes, H / strides[0], W / strides[0])

    Raises:
        ConfigError: If there are fewer ``widths`` than skips.

    Departs from the paper: resizes (nearest) to the exact skip size, so that odd inputs work, and
    pads convolutions, so that sizes stay the same.
    """

    takes = "pyramid"

    def __init__(
        self,
        *,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        num_classes: int,
        widths: tuple[int, ...] = (256, 128, 64, 32),
    ) -> None:
        super().__init__()
        deepest, *skips = channels[::-1]
        if len(widths) < len(skips):
            raise ConfigError(
                f"widths: expected {len(skips)}, one for each skip, got {len(widths)}"
            )
        self.blocks = nn.ModuleList()
        inputs = deepest
        for skip, width in zip(skips, widths, strict=False):
            convs = ConvNormAct(inputs + skip, width), ConvNormAct(width, width)
            self.blocks.append(nn.Sequential(*convs))
            inputs = width
        self.classifier = Classifier(inputs, num_classes)

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        x, *skips = features[::-1]
        for block, skip in zip(self.blocks, skips, strict=True):
            x = resize(x, skip.shape[-2:], mode="nearest")
            x = block(torch.cat([x, skip], 1))
        return {"out": self.classifier(x)}
