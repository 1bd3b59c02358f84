"""STLNet: statistical texture learning on quantized feature maps."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkit.core.config import check_bounds
from segkit.models.layers import (
    ASPP,
    ConvNormAct,
    fcn_head,
    full_precision,
    level_at,
    resize,
    with_aux,
)


class STLNet(nn.Module):
    """A decoder that joins statistical texture of strides 4 and 8 with ASPP of the deepest map.

    Zhu et al. 2021, https://arxiv.org/abs/2103.04133

    Args:
        width: Channels of each part: pyramid texture, enhanced texture, shallow map, context.
        levels: Quantization levels of the whole image.
        region_levels: Quantization levels of each region.
        scales: Regions per side, at each scale of the texture pyramid.
        rates: Dilations of the atrous branches.
        aux_width: Channels of the auxiliary head; ``None`` for no auxiliary head.

    Shape:
        features[i]: (B, channels[i], H / strides[i], W / strides[i])
        out: (B, num_classes, H / 8, W / 8)
        aux: (B, num_classes, H / strides[-2], W / strides[-2]), in training

    Departs from the authors' code: assigns pixels to regions by their position, so that any size
    works without pooling; always quantizes in float32, as half precision is too coarse for the
    levels; a map without contrast has an empty histogram instead of NaN. The authors' code of the
    full network is not published; here the parts are concatenated and a 3x3 convolution follows.
    """

    takes = "pyramid"

    def __init__(
        self,
        *,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        num_classes: int,
        width: int = 256,
        levels: int = 128,
        region_levels: int = 8,
        scales: tuple[int, ...] = (1, 2, 3, 6),
        rates: tuple[int, ...] = (12, 24, 36),
        aux_width: int | None = 256,
    ) -> None:
        super().__init__()
        check_bounds(1, 1024, levels=levels, region_levels=region_levels, scales=scales)
        self.low_level = level_at(4, strides)
        self.used_levels = (self.low_level, self.low_level + 1, *((-2, -1) if aux_width else (-1,)))
        low = channels[self.low_level] + channels[self.low_level + 1]
        self.texture = Texture(
            low, width=width, levels=levels, region_levels=region_levels, scales=scales
        )
        self.aspp = ASPP(channels[-1], width=width, rates=rates)
        self.classifier = fcn_head(4 * width, width, num_classes)
        self.aux = fcn_head(channels[-2], aux_width, num_classes) if aux_width else None

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        fine, coarse = features[self.low_level], features[self.low_level + 1]
        size = coarse.shape[-2:]
        texture = self.texture(torch.cat([resize(fine, size), coarse], 1))
        context = resize(self.aspp(features[-1]), size)
        return with_aux(self.classifier(torch.cat([*texture, context], 1)), self.aux, features)


class Texture(nn.Module):
    """The statistical texture head, with the arguments of :class:`STLNet`.

    Shape:
        x: (B, inputs, h, w)
        out: pyramid texture, enhanced texture and their input, each (B, width, h, w)
    """

    def __init__(
        self, inputs: int, *, width: int, levels: int, region_levels: int, scales: Sequence[int]
    ) -> None:
        super().__init__()
        self.start = ConvNormAct(inputs, width, kernel=1)
        self.enhance = Enhancement(width, levels=levels)
        self.reduce = _bare(2 * width, width)
        self.pyramid = nn.ModuleList(
            RegionTexture(width, side=side, levels=region_levels) for side in scales
        )
        self.fuse = ConvNormAct(len(scales) * (width // 2), width, kernel=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        start = self.start(x)
        enhanced = self.enhance(start)
        reduced = self.reduce(torch.cat([enhanced, start], 1))
        size = x.shape[-2:]
        pyramid = [resize(texture(reduced), size, align_corners=True) for texture in self.pyramid]
        return self.fuse(torch.cat(pyramid, 1)), enhanced, start


class Enhancement(nn.Module):
    """Texture enhancement: a learned equalization of the image's histogram.

    The similarity of each pixel to the average pixel is quantized. Each level is described by its
    value and its count and attends to all others; the result is mapped back to the level's pixels.

    Shape:
        x: (B, width, h, w) -> (B, width, h, w)
    """

    def __init__(self, width: int, *, levels: int) -> None:
        super().__init__()
        half = width // 2
        self.levels = levels
        self.reduce = nn.Sequential(
            ConvNormAct(width, width, activation=_leaky), _bare(width, half)
        )
        self.describe = _descriptor(2, half)
        self.join = ConvNormAct(2 * half, half, kernel=1)
        self.query = _bare(half, half)
        self.key = _bare(half, half)
        self.value = _bare(half, half)
        self.expand = ConvNormAct(half, width, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.reduce(x)
        with full_precision(reduced) as (wide,):
            average = wide.mean((2, 3), keepdim=True)
            likeness = F.cosine_similarity(wide, average).unsqueeze(1)
            steps, encoding = quantize(likeness, self.levels, side=1)
            count = encoding.sum((2, 3), keepdim=True)
            count = count / (count.sum(1, keepdim=True) + 1e-6)
        # the histogram as a map with one row per level: (B, 2, levels, 1)
        histogram = torch.cat([steps, count], 2).transpose(1, 2).to(x.dtype)
        average = average.to(x.dtype)
        described = self.describe(histogram)
        described = self.join(torch.cat([described, average.expand_as(described)], 1))
        query, key, value = (  # (B, 1, levels, width / 2)
            project(described).permute(0, 3, 2, 1) for project in (self.query, self.key, self.value)
        )
        equalized = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        equalized = self.expand(equalized.permute(0, 3, 2, 1))
        pixels = equalized.flatten(2) @ encoding.flatten(2).to(equalized.dtype)
        return pixels.unflatten(2, x.shape[-2:])


class RegionTexture(nn.Module):
    """Texture of each region, from the co-occurrence of quantized values of diagonal neighbors.

    Shape:
        x: (B, width, h, w)
        out: (B, width / 2, side, side); fewer regions per side if the map is smaller
    """

    def __init__(self, width: int, *, side: int, levels: int) -> None:
        super().__init__()
        half = width // 2
        self.side = side
        self.levels = levels
        self.describe = _descriptor(3, half)
        self.join = nn.Sequential(
            ConvNormAct(half + width, half, kernel=1),
            ConvNormAct(half, half, kernel=1, activation=nn.Identity),
        )

    def forward(self, x: Tensor) -> Tensor:
        side = min(self.side, *x.shape[-2:])
        with full_precision(x) as (wide,):
            average = sums(wide, side) / sums(torch.ones_like(wide[:1, :1]), side)
            likeness = F.cosine_similarity(wide, spread(average, x)).unsqueeze(1)
            steps, encoding = quantize(likeness, self.levels, side)
            shares = co_occurrence(encoding, side)
        pixel = steps.unsqueeze(2).expand_as(shares)
        neighbor = steps.unsqueeze(1).expand_as(shares)
        # pairs of levels as a map with one row per pair: (B, 3, levels^2, side^2)
        pairs = torch.stack([neighbor, pixel, shares], 1).flatten(2, 3).flatten(3).to(x.dtype)
        described = self.describe(pairs)
        average = average.to(x.dtype).flatten(2).unsqueeze(2)
        average = average.expand(-1, -1, described.size(2), -1)
        described = self.join(torch.cat([described, average], 1))
        return described.mean(2).unflatten(2, (side, side))


def quantize(x: Tensor, levels: int, side: int) -> tuple[Tensor, Tensor]:
    """Return equally spaced levels of each region, and a soft encoding of each pixel by them.

    Args:
        x: Values, (B, 1, h, w).
        levels: Number of levels between the minimum and maximum of a region.
        side: Regions per side of the map.

    Returns:
        Values of the levels, (B, levels, side, side), and the encoding, (B, levels, h, w): one
        minus the distance to the level if that is less than the spacing of levels, else 0.
    """
    low, high = -maxima(-x, side), maxima(x, side)
    spacing = (high - low) / levels
    middle = torch.arange(levels, device=x.device, dtype=x.dtype) + 0.5
    steps = low + middle[:, None, None] * spacing
    distance = (spread(steps, x) - x).abs()
    return steps, (1 - distance) * (distance < spread(spacing, x))


def co_occurrence(encoding: Tensor, side: int) -> Tensor:
    """Return the co-occurrence of levels of pixels and of their lower right neighbors.

    Args:
        encoding: (B, levels, h, w)
        side: Regions per side; neighbors in different regions are not counted.

    Returns:
        Share of each pair (level of the pixel, level of its neighbor) in each region, (B, levels,
        levels, side, side). Shares of a region sum to 1 if it has any pair, up to an epsilon.
    """
    height, width = encoding.shape[-2:]
    rows, columns = (regions(length, side, encoding.device) for length in (height, width))
    inside = (rows[1:] == rows[:-1])[:, None] & (columns[1:] == columns[:-1])
    pixel, neighbor = encoding[:, :, None, :-1, :-1], encoding[:, None, :, 1:, 1:]
    pairs = F.pad(pixel * neighbor * inside, (0, 1, 0, 1))
    total = sums(pairs, side)
    return total / (total.sum((1, 2), keepdim=True) + 1e-6)


def sums(x: Tensor, side: int) -> Tensor:
    """Return the sum over each of ``side`` x ``side`` regions of a map: (..., side, side)."""
    index = torch.arange(side, device=x.device)[:, None]
    rows, columns = (
        (regions(length, side, x.device) == index).to(x.dtype) for length in x.shape[-2:]
    )
    return rows @ (x @ columns.T)


def maxima(x: Tensor, side: int) -> Tensor:
    """Return the maximum of each of ``side`` x ``side`` regions of a map: (..., side, side)."""
    for dim in (-2, -1):
        length = x.size(dim)
        edges = (torch.arange(side + 1, device=x.device) * length + side - 1) // side
        # equally many indices per region; smaller regions repeat their last one
        index = edges[:-1, None] + torch.arange((length + side - 1) // side, device=x.device)
        index = index.minimum(edges[1:, None] - 1)
        x = x.index_select(dim, index.flatten()).unflatten(dim, index.shape).amax(dim)
    return x


def spread(x: Tensor, like: Tensor) -> Tensor:
    """Return a map of the size of ``like`` in which each pixel has the value of its region."""
    side = x.size(-1)
    rows, columns = (regions(length, side, x.device) for length in like.shape[-2:])
    return x.index_select(-2, rows).index_select(-1, columns)


def regions(length: int, side: int, device: torch.device) -> Tensor:
    """Return the region, 0 to ``side - 1``, of each of ``length`` pixels in a row."""
    return torch.arange(length, device=device) * side // length


def _descriptor(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        _bare(inputs, outputs // 2), _leaky(), _bare(outputs // 2, outputs), nn.ReLU(inplace=True)
    )


def _bare(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def _leaky() -> nn.Module:
    return nn.LeakyReLU(0.01, inplace=True)
