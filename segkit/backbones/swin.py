"""Swin Transformers, first and second version, of any width and window."""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.models import swin_transformer as reference

from segkit.backbones.stages import refuse_dilation


class Swin(nn.Module):
    """A Swin Transformer's four stages, each with a LayerNorm of its own.

    Liu et al. 2021, https://arxiv.org/abs/2103.14030 and 2022, https://arxiv.org/abs/2111.09883

    Args:
        width: Channels of the first stage; each stage has twice as many as the one before.
        depths: Blocks of each stage.
        heads: Attention heads of each stage.
        version: The paper: 2 normalizes after attention, which compares by cosine.
        window: Side of the attention windows, in patches of 4 pixels.
        drop_path: Stochastic depth of the last block; it grows linearly from 0 at the first.
        checkpointing: Forget the activations inside blocks and compute them again backwards.

    Shape:
        image: (B, 3, H, W)
        features[i]: (B, channels[i], H / strides[i], W / strides[i]), rounded up

    Departs from torchvision's: pads the image to whole patches where that drops pixels.
    """

    strides = (4, 8, 16, 32)
    fresh = ("norm0", "norm1", "norm2", "norm3")
    """Parts that a classifier's weights do not have."""

    def __init__(
        self,
        *,
        width: int,
        depths: Sequence[int],
        heads: Sequence[int],
        version: Literal[1, 2] = 1,
        window: int = 7,
        drop_path: float = 0.3,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        block, merge = {
            1: (reference.SwinTransformerBlock, reference.PatchMerging),
            2: (reference.SwinTransformerBlockV2, reference.PatchMergingV2),
        }[version]
        self.features = reference.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=width,
            depths=list(depths),
            num_heads=list(heads),
            window_size=[window, window],
            stochastic_depth_prob=drop_path,
            num_classes=1,
            block=block,
            downsample_layer=merge,
        ).features
        self.channels = tuple(width * 2**stage for stage in range(4))
        self.checkpointing = checkpointing
        for name, channels in zip(self.fresh, self.channels, strict=True):
            self.add_module(name, nn.LayerNorm(channels))

    def forward(self, image: Tensor) -> list[Tensor]:
        height, width = image.shape[-2:]
        x = F.pad(image, (0, -width % 4, 0, -height % 4))
        # features: the patches, then stages and mergings in turn
        features = []
        for i, name in enumerate(self.fresh):
            x = self._run(self.features[2 * i + 1], self.features[2 * i](x))
            normalized = self.get_submodule(name)(x)
            features.append(normalized.permute(0, 3, 1, 2))
        return features

    def only_for(self, level: int) -> nn.Module:
        """What no other feature map depends on."""
        return self.get_submodule(self.fresh[level])

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not (self.checkpointing and self.training):
            return stage(x)
        for block in stage.children():
            x = checkpoint(block, x, use_reentrant=False)
        return x


def swin(
    width: int,
    depths: Sequence[int],
    heads: Sequence[int],
    *,
    window: int = 7,
    version: Literal[1, 2] = 1,
) -> Callable[..., Swin]:
    """A published size of Swin, its window still open: 12 is that of the 384-pixel weights."""

    def build(
        *,
        window: int = window,
        drop_path: float = 0.3,
        checkpointing: bool = False,
        output_stride: int = 32,
    ) -> Swin:
        refuse_dilation("Swin", output_stride)
        return Swin(
            width=width,
            depths=depths,
            heads=heads,
            version=version,
            window=window,
            drop_path=drop_path,
            checkpointing=checkpointing,
        )

    return build


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "swin_t": swin(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_s": swin(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_b": swin(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_l": swin(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    "swin_v2_t": swin(96, (2, 2, 6, 2), (3, 6, 12, 24), window=8, version=2),
    "swin_v2_s": swin(96, (2, 2, 18, 2), (3, 6, 12, 24), window=8, version=2),
    "swin_v2_b": swin(128, (2, 2, 18, 2), (4, 8, 16, 32), window=8, version=2),
}
