"""A pyramid of feature maps from maps of one stride, for plain Vision Transformers."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from segkit.models.layers import resize

_layer_norm = partial(LayerNorm2d, eps=1e-6)


class PyramidNeck(nn.Module):
    """Maps of strides 4, 8, 16 and 32 from four maps of stride 16, or nearly.

    As BEiT (Bao et al. 2022, https://arxiv.org/abs/2106.08254) and ViTDet (Li et al. 2022,
    https://arxiv.org/abs/2203.16527): transposed convolutions for the finer maps, pooling for the
    coarsest.

    Args:
        width: Channels of the maps.
        norm: Makes the norm between the transposed convolutions of the finest map: LayerNorm in
            ViTDet, BatchNorm in BEiT.

    Shape:
        maps[i]: (B, width, h, w)
        pyramid[i]: (B, width, H / (4, 8, 16, 32)[i], W / (4, 8, 16, 32)[i]), rounded up

    Departs from the papers: a map of another size, as from patches of 14 pixels, is resized.
    """

    strides = (4, 8, 16, 32)

    def __init__(self, width: int, norm: Callable[[int], nn.Module] = _layer_norm) -> None:
        super().__init__()
        double = partial(nn.ConvTranspose2d, width, width, 2, stride=2)
        self.levels = nn.ModuleList(
            [
                nn.Sequential(double(), norm(width), nn.GELU(), double()),
                double(),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )

    def forward(self, maps: Sequence[Tensor], height: int, width: int) -> list[Tensor]:
        pyramid = []
        for level, x, stride in zip(self.levels, maps, self.strides, strict=True):
            size = (height + stride - 1) // stride, (width + stride - 1) // stride
            pyramid.append(resize(level(x), size))
        return pyramid
