"""UNet 3+: a decoder whose nodes take feature maps of all scales."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkit.models.layers import Classifier, ConvNormAct, resize


class UNet3Plus(nn.Module):
    """UNet 3+ for any encoder.

    Huang et al. 2020, https://arxiv.org/abs/2004.08790

    Args:
        width: Channels that each scale contributes to a node.
        bias: Give convolutions a bias, as the authors' code does. BatchNorm cancels it.
        deep_supervision: In training, also compute logits of every deeper node and the deepest map.
        presence: Predict from the deepest map which classes are in the image, and adjust the logits
            of every pixel.
        background: The class that is in every image; ``None`` if there is none.

    Shape:
        features[i]: (B, channels[i], H / strides[i], W / strides[i])
        out: (B, num_classes, H / strides[0], W / strides[0])
        aux{i}: (B, num_classes, H / strides[i], W / strides[i]), i > 0, in training
        aux_presence: (B, num_classes), in training

    Departs from the paper: resizes to the exact size of each node, so that odd inputs work. The
    paper's classification-guided module multiplies logits by 0 or 1, which does not exclude a class
    under softmax, as a logit of 0 may be the largest. Here the logarithm of the probability that
    the class is present is added to its logits, which multiplies its odds by this probability.
    """

    takes = "pyramid"

    def __init__(
        self,
        *,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        num_classes: int,
        width: int = 64,
        bias: bool = False,
        deep_supervision: bool = False,
        presence: bool = False,
        background: int | None = 0,
    ) -> None:
        super().__init__()
        deepest = len(channels) - 1
        wide = width * len(channels)
        self.nodes = nn.ModuleList()
        for level in range(deepest):
            inputs = [*channels[: level + 1], *[wide] * (deepest - level - 1), channels[-1]]
            factors = [strides[level] // stride for stride in strides[:level]]
            self.nodes.append(Node(inputs, factors, width=width, bias=bias))
        levels = [*[wide] * deepest, channels[-1]] if deep_supervision else [wide]
        self.heads = nn.ModuleList(Classifier(inputs, num_classes, kernel=3) for inputs in levels)
        self.presence = None
        if presence:
            self.presence = nn.Sequential(nn.Dropout(0.5), Classifier(channels[-1], num_classes))
        self.background = background if num_classes > 1 else None  # one plane has none

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        maps = list(features)
        for level in reversed(range(len(self.nodes))):
            maps[level] = self.nodes[level](maps, level)
        heads = self.heads if self.training else self.heads[:1]
        outputs = {
            f"aux{level}" if level else "out": head(x)
            for level, (head, x) in enumerate(zip(heads, maps, strict=False))
        }
        if self.presence is not None:
            present = self.presence(maps[-1]).amax((2, 3))
            odds = F.logsigmoid(present)
            if self.background is not None:
                keep = torch.ones_like(odds)
                keep[:, self.background] = 0
                odds = odds * keep
            outputs = {name: logits + odds[:, :, None, None] for name, logits in outputs.items()}
            if self.training:
                outputs["aux_presence"] = present
        return outputs


class Node(nn.Module):
    """A node that joins the maps of all scales at one: finer maps pooled, coarser interpolated.

    It is made from the channels of each level's map and the pooling factor of each finer level.
    """

    def __init__(
        self, inputs: Sequence[int], factors: Sequence[int], *, width: int, bias: bool
    ) -> None:
        super().__init__()
        self.factors = factors
        self.branches = nn.ModuleList(ConvNormAct(wide, width, bias=bias) for wide in inputs)
        total = width * len(inputs)
        self.fuse = ConvNormAct(total, total, bias=bias)

    def forward(self, maps: Sequence[Tensor], level: int) -> Tensor:
        size = maps[level].shape[-2:]
        outputs = []
        for i, (branch, x) in enumerate(zip(self.branches, maps, strict=True)):
            if i < level and self.factors[i] > 1:
                x = F.max_pool2d(x, self.factors[i], ceil_mode=True)
            outputs.append(branch(resize(x, size)))
        return self.fuse(torch.cat(outputs, 1))
