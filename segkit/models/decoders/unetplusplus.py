"""UNet++: a U-Net with nested skip connections."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segkit.core.errors import ConfigError
from segkit.models.layers import Classifier, ConvNormAct, UpsampledConv2d, resize


class UNetPlusPlus(nn.Module):
    """UNet++ for any encoder, with the layout of segmentation_models.pytorch.

    Zhou et al. 2018, https://arxiv.org/abs/1807.10165 and 2020, https://arxiv.org/abs/1912.05074

    Inputs of node ``x_d_l`` in column l are the node to its left, which is one level deeper and is
    resized, and every node below it in its column, down to the encoder's map. Row d = 0 is the
    decoder of the U-Net; its last node, ``x_0_n``, has no skips.

    Args:
        widths: Channels of the decoder's row, deep to shallow; one per level is used.
        deep_supervision: Add a 1x1 head to each node of the finest level in training, from ``aux1``
            for the shallowest U-Net to ``auxN`` for the deepest.
        average: Deep supervision, with the mean of all heads as ``out``: the paper's accurate mode.
            Without it ``out`` comes from the last head: the paper's fast mode at full depth.
        pruned: Number of the head, 1 for ``aux1``, that gives ``out`` in evaluation; nodes that
            only deeper heads need are skipped. This is the paper's fast mode, for a model with deep
            supervision.

    Shape:
        features[i]: (B, channels[i], H / strides[i], W / strides[i])
        out: (B, num_classes, 2 H / strides[0], 2 W / strides[0]), at most the image's size
        aux*: (B, num_classes, H / strides[0], W / strides[0]), in training

    Raises:
        ConfigError: If there are fewer ``widths`` than encoder levels, or ``pruned`` names no head.

    Departs from the paper: resizes to the exact skip size, so that odd inputs work; the heads are
    at the size of the encoder's finest map, as encoders have none at the image's size.
    """

    takes = "pyramid"

    def __init__(
        self,
        *,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        num_classes: int,
        widths: tuple[int, ...] = (256, 128, 64, 32, 16),
        deep_supervision: bool = False,
        average: bool = False,
        pruned: int | None = None,
    ) -> None:
        super().__init__()
        if len(widths) < len(channels):
            raise ConfigError(
                f"widths: expected {len(channels)}, one for each encoder level, got {len(widths)}"
            )
        maps = channels[::-1]
        self.depth = len(channels) - 1
        self.blocks = nn.ModuleDict()
        row: dict[int, int] = {}  # channels of the newest node of each row
        for column in range(self.depth):
            skips = skip = maps[column + 1]
            for d in reversed(range(column + 1)):
                deeper = maps[column] if d == column else row[d]
                row[d] = skip if d > 0 else widths[column]
                self.blocks[f"x_{d}_{column}"] = Block(deeper + skips, row[d])
                skips += row[d]
        self.blocks[f"x_0_{self.depth}"] = Block(row[0], widths[self.depth])
        self.scale = min(2, strides[0])
        self.classifier = Classifier(widths[self.depth], num_classes, kernel=3)
        self.average = average
        finest = [row[d] for d in reversed(range(self.depth))]
        supervised = finest if deep_supervision or average else []
        self.heads = nn.ModuleList(Classifier(inputs, num_classes) for inputs in supervised)
        if pruned is not None and not (1 <= pruned <= len(self.heads) and not average):
            raise ConfigError(
                f"pruned: expected a head of deep supervision without average, 1 to {self.depth}, "
                f"got {pruned}"
            )
        self.pruned = pruned

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        maps = features[::-1]
        row: dict[int, Tensor] = {}
        last = self.depth - self.pruned if self.pruned and not self.training else 0
        for column in range(last, self.depth):
            skips = [maps[column + 1]]
            for d in reversed(range(last, column + 1)):
                deeper = maps[column] if d == column else row[d]
                row[d] = self.blocks[f"x_{d}_{column}"](deeper, skips, skips[0].shape[-2:])
                skips.insert(0, row[d])
        if self.pruned and not self.training:
            return {"out": self.heads[self.pruned - 1](row[last])}
        height, width = row[0].shape[-2:]
        size = height * self.scale, width * self.scale
        outputs = {"out": self.classifier(self.blocks[f"x_0_{self.depth}"](row[0], [], size))}
        if self.heads and (self.training or self.average):
            finest = [row[d] for d in reversed(range(self.depth))]
            logits = [head(node) for head, node in zip(self.heads, finest, strict=True)]
            if self.average:
                size = outputs["out"].shape[-2:]
                resized = [outputs["out"], *(resize(x, size) for x in logits)]
                outputs["out"] = torch.stack(resized).mean(0)
            if self.training:
                outputs |= {f"aux{i}": x for i, x in enumerate(logits, 1)}
        return outputs


class Block(nn.Module):
    """Two convolutions of a deeper map, resized, concatenated with its skips."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(inputs, outputs, conv=UpsampledConv2d)
        self.conv2 = ConvNormAct(outputs, outputs)

    def forward(self, deeper: Tensor, skips: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        return self.conv2(self.conv1(deeper, skips, size))
