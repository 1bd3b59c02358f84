"""SegFormer's head: linear layers on each level, joined by another."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from segkit.models.layers import Classifier, ConvNormAct, PyramidConv2d


class SegFormer(nn.Module):
    """SegFormer's all-MLP head; each of its linear layers is a 1x1 convolution.

    Xie et al. 2021, https://arxiv.org/abs/2105.15203

    Args:
        channels: Encoder widths, shallow to deep; the last four levels are used.
        strides: Encoder strides.
        num_classes: Number of classes, the channels of the logits.
        width: Channels of each level and of the joined map; the paper has 256 on MiT-B0 and B1,
            768 on B2 to B5.
        dropout: Dropout probability of channels before the classifier.
        level_norms: BatchNorm and ReLU after each level's layer, as mmsegmentation has.

    Shape:
        features[i]: (B, channels[i], H / strides[i], W / strides[i])
        out: (B, num_classes, H / strides[-4], W / strides[-4])
    """

    takes = "map"

    def __init__(
        self,
        *,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        num_classes: int,
        width: int = 256,
        dropout: float = 0.1,
        level_norms: bool = False,
    ) -> None:
        super().__init__()
        used = channels[-4:]
        self.level_norms = level_norms
        layer = partial(ConvNormAct, kernel=1) if level_norms else partial(nn.Conv2d, kernel_size=1)
        self.projections = nn.ModuleList(layer(inputs, width) for inputs in used)
        self.fuse = ConvNormAct(len(used) * width, width, kernel=1, conv=PyramidConv2d)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = Classifier(width, num_classes)

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        used = features[-len(self.projections) :]
        levels = [project(x) for project, x in zip(self.projections, used, strict=True)]
        return {"out": self.classifier(self.dropout(self.fuse(levels)))}
