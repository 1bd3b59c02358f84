"""UNet 3+: every node sees every scale."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkit.models.layers import Classifier, ConvNormAct, resize


class UNet3Plus(nn.Module):
    """UNet 3+ on any encoder.

    Huang et al. 2020, https://arxiv.org/abs/2004.08790

    Args:
        channels: Encoder widths, shallow to deep.
        strides: Encoder strides.
        num_classes: Number of logit planes.
        width: Channels each scale contributes to a node.
        bias: Give convolutions a bias, as the authors' code does, though BatchNorm takes it away.
        deep_supervision: Logits of every deeper node and of the deepest map too, while training.
        presence: Judge from the deepest map which classes the image shows at all, and let every
            pixel's logits know.
        background: The class that is in every image; ``None`` where there is none.

    Shape:
        features[i]: (B, channels[i], H / strides[i], W / strides[i])
        out: (B, num_classes, H / strides[0], W / strides[0])
        aux{i}: (B, num_classes, H / strides[i], W / strides[i]), i > 0, in training
        aux_presence: (B, num_classes), in training

    Departs from the paper: resizes to the exact size of each node, so odd inputs work. Its
    classification-guided module multiplies logits by a hard 0 or 1, which says nothing under
    softmax, where 0 is as good a logit as any; here the logarithm of each class's probability to
    be present is added instead, so that the presence itself multiplies the class's odds.
    """

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
        self.presence = (
            nn.Sequential(nn.Dropout(0.5), Classifier(channels[-1], num_classes))
            if presence
            else None
        )
        self.background = background

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
            odds = self._odds(present)
            outputs = {name: logits + odds for name, logits in outputs.items()}
            if self.training:
                outputs["aux_presence"] = present
        return outputs

    def _odds(self, present: Tensor) -> Tensor:
        """What to add to each class's logits, (B, num_classes, 1, 1)."""
        odds = F.logsigmoid(present)
        if self.background is not None:
            keep = torch.ones_like(odds)
            keep[:, self.background] = 0
            odds = odds * keep
        return odds[:, :, None, None]


class Node(nn.Module):
    """The maps of all scales at one of them: finer ones pooled, coarser ones interpolated.

    Args:
        inputs: Channels of each level's map.
        factors: How much finer each of the finer levels is.
        width: Channels each level contributes.
        bias: Of the convolutions.
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
        seen = []
        for i, (branch, x) in enumerate(zip(self.branches, maps, strict=True)):
            if i < level and self.factors[i] > 1:
                x = F.max_pool2d(x, self.factors[i], ceil_mode=True)
            seen.append(branch(resize(x, size)))
        return self.fuse(torch.cat(seen, 1))
