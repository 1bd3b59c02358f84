"""OCRNet: object-contextual representations."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkit.models.layers import Classifier, ConvNormAct, full_precision, resize


class OCRNet(nn.Module):
    """A decoder that adds to each pixel the features of the object regions it attends to.

    As in the authors' code, on the last four maps, concatenated; designed for HRNet. There are as
    many object regions as classes.

    Yuan et al. 2020, https://arxiv.org/abs/1909.11065

    Args:
        width: Channels of pixel and object features.
        key_width: Channels of queries, keys and values.
        dropout: Dropout probability of channels before the classifier.
        bias: Give the first two convolutions a bias, as the authors' code does and mmsegmentation
            does not. BatchNorm cancels it.
        align_corners: Used by every interpolation, including that to the image's size. True in the
            authors' code, false in mmsegmentation.

    Shape:
        features[i]: (B, channels[i], H / strides[i], W / strides[i])
        out, and aux in training: (B, num_classes, H / strides[-4], W / strides[-4])
    """

    takes = "pyramid"

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
    """Return the mean feature of each soft region: a sum with softmax coefficients over pixels.

    Args:
        pixels: (B, C, h, w)
        regions: Logits of each object region, (B, N, h, w).

    Returns:
        (B, C, N, 1), computed in at least float32: in large images the coefficients are too small
        for half precision.
    """
    with full_precision(pixels, regions) as (values, logits):
        means = values.flatten(2) @ logits.flatten(2).softmax(2).mT
    return means.unsqueeze(3).to(pixels.dtype)


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        ConvNormAct(inputs, outputs, kernel=1), ConvNormAct(outputs, outputs, kernel=1)
    )


def _tokens(x: Tensor) -> Tensor:
    """Reshape (B, C, h, w) to the tokens of one attention head, (B, 1, h * w, C)."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)
