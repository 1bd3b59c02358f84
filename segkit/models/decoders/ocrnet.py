"""OCRNet: each pixel asks the objects of the image what it is part of."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkit.models.layers import Classifier, ConvNormAct, exactly, resize


class OCRNet(nn.Module):
    """Object-contextual representations, as in the authors' code; made for HRNet.

    Yuan et al. 2020, https://arxiv.org/abs/1909.11065

    Args:
        channels: Encoder widths, shallow to deep; the last four levels are used, side by side.
        strides: Encoder strides.
        num_classes: Number of logit planes, and of object regions.
        width: Channels of pixels and objects.
        key_width: Channels in which they are compared.
        dropout: Share of channels dropped before the classifier.
        bias: Give the first two convolutions a bias, as the authors' code does and mmsegmentation
            does not, though BatchNorm takes it away.
        align_corners: Of every interpolation, the one to the image's size too. True in the
            authors' code, false in mmsegmentation.

    Shape:
        features[i]: (B, channels[i], H / strides[i], W / strides[i])
        out, and aux in training: (B, num_classes, H / strides[-4], W / strides[-4])
    """

    def __init__(
        self,
        *,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        num_classes: int,
        width: int = 512,
        key_width: int = 256,
        dropout: float = 0.05,
        bias: bool = True,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        inputs = sum(channels[-4:])
        self.regions = nn.Sequential(
            ConvNormAct(inputs, inputs, kernel=1, bias=bias), Classifier(inputs, num_classes)
        )
        self.pixels = ConvNormAct(inputs, width, bias=bias)
        self.query = _twice(width, key_width)
        self.key = _twice(width, key_width)
        self.value = ConvNormAct(width, key_width, kernel=1)
        self.context = ConvNormAct(key_width, width, kernel=1)
        self.fuse = ConvNormAct(2 * width, width, kernel=1)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = Classifier(width, num_classes)

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        size = features[-4].shape[-2:]
        x = torch.cat([resize(f, size, align_corners=self.align_corners) for f in features[-4:]], 1)
        regions = self.regions(x)
        pixels = self.pixels(x)
        objects = gather(pixels, regions)
        context = F.scaled_dot_product_attention(
            _tokens(self.query(pixels)), _tokens(self.key(objects)), _tokens(self.value(objects))
        )
        context = self.context(context.squeeze(1).transpose(1, 2).unflatten(2, size))
        logits = self.classifier(self.dropout(self.fuse(torch.cat([context, pixels], 1))))
        return {"out": logits, "aux": regions} if self.training else {"out": logits}


def gather(pixels: Tensor, regions: Tensor) -> Tensor:
    """The mean pixel of each soft region, every pixel weighing by its softmax over the image.

    Args:
        pixels: (B, C, h, w)
        regions: Logits of each object region, (B, N, h, w).

    Returns:
        (B, C, N, 1), computed in float32 at least: a share of a large image is next to nothing in
        half precision.
    """
    with exactly(pixels, regions) as (values, logits):
        means = values.flatten(2) @ logits.flatten(2).softmax(2).mT
    return means.unsqueeze(3).to(pixels.dtype)


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        ConvNormAct(inputs, outputs, kernel=1), ConvNormAct(outputs, outputs, kernel=1)
    )


def _tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) as one head's tokens, (B, 1, h w, C)."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)
