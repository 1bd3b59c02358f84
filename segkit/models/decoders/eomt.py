"""EoMT: a plain Vision Transformer whose last blocks also see queries, and no other decoder."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from segkit.core.config import check_bounds
from segkit.core.errors import ConfigError
from segkit.models.layers import resize
from segkit.models.queries import QueryClassifier, mlp, semantic_logits
from segkit.models.transformer import rotary_positions, vit_block


class EoMT(nn.Module):
    """The encoder-only mask transformer, trained by the loss ``mask_classification``.

    Kerssies et al. 2025, https://arxiv.org/abs/2503.19108

    The last blocks of the backbone are here, with queries among their tokens; the backbone is a ViT
    without them: ``{"name": "vit_b_dinov2", "output": "tokens", "omitted_blocks": 3}``. Pretrained
    weights of the whole ViT load into both.

    Masked attention (a query sees the patches of its mask) helps training and costs time in
    prediction. The paper anneals it: in each block in turn, from the first on, a growing share of
    the queries sees all patches, until no mask is needed. In evaluation a block uses masks while
    its share is below one half.

    Args:
        channels: Widths of the ViT's patches and other tokens.
        strides: Their strides: the side of a patch.
        num_classes: Number of classes, the channels of the logits.
        blocks: Number of blocks here, ``omitted_blocks`` of the backbone.
        queries: Number of queries.
        heads: Attention heads; default: a head per 64 channels.
        rotary: Rotary positions, as DINOv3 has them.
        annealing: Forward passes in training over which masked attention ends; 0: never used.
        upscalings: Doublings of the map that masks are predicted on.
        drop_path: Probability of stochastic depth.

    Shape:
        features[0]: (B, C, h, w), patches; features[1]: (B, C, n, 1), the other tokens
        out: (B, num_classes, 2**upscalings * h, 2**upscalings * w)
        query_classes: (blocks + 1, B, queries, max(2, num_classes) + 1), in training
        query_masks: (blocks + 1, B, queries, 2**upscalings * h, 2**upscalings * w), in training

    Departs from the authors' code: the image is seen whole, not in windows of a fixed size.
    """

    forward_passes: Tensor

    def __init__(
        self,
        *,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        num_classes: int,
        blocks: int = 4,
        queries: int = 100,
        heads: int | None = None,
        rotary: bool = False,
        annealing: int = 0,
        upscalings: int = 2,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if len(channels) != 2 or channels[0] != channels[1] or strides[0] != strides[1]:
            raise ConfigError(
                'eomt needs a Vision Transformer with output "tokens" as its backbone, such as '
                '{"name": "vit_b_dinov2", "output": "tokens", "omitted_blocks": 3}'
            )
        check_bounds(1, 10_000, queries=queries, blocks=blocks)
        check_bounds(0, 4, upscalings=upscalings)
        width = channels[0]
        self.heads = heads or max(1, width // 64)
        if width % self.heads:
            raise ConfigError(f"heads: expected a divisor of {width} channels, got {heads}")
        self.num_classes, self.rotary, self.annealing = num_classes, rotary, annealing
        eps = 1e-5 if rotary else 1e-6
        self.query = nn.Embedding(queries, width)
        self.blocks = nn.ModuleList(
            vit_block(width, self.heads, drop_path=drop_path, eps=eps) for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width, eps=eps)
        self.class_head = QueryClassifier(width, num_classes)
        self.mask_head = mlp(width, width, width, width, activation=nn.GELU)
        self.upscale = nn.Sequential(*(upscaling(width) for _ in range(upscalings)))
        self.register_buffer("forward_passes", torch.tensor(0))
        self._masked = [annealing > 0] * blocks  # in evaluation
        self.register_load_state_dict_post_hook(_read_masked)

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        patches, others = features
        batch, _, *grid = patches.shape
        queries = self.query.weight.expand(batch, -1, -1)
        x = torch.cat([queries, others.flatten(2).mT, patches.flatten(2).mT], 1)
        head = x.shape[2] // self.heads
        positions = rotary_positions(head, grid[0], grid[1], x) if self.rotary else None
        predictions = []
        for number, block in enumerate(self.blocks):
            masked = self.annealing > 0 if self.training else self._masked[number]
            if self.training or masked:
                predictions.append(self._predict(x, grid))
            mask = self._mask(predictions[-1][1].detach(), x, grid, number) if masked else None
            x = block(x, positions, mask)
        predictions.append(self._predict(x, grid))
        out = {"out": semantic_logits(*predictions[-1], num_classes=self.num_classes)}
        if not self.training:
            return out
        self.forward_passes += 1
        classes, masks = (torch.stack(part) for part in zip(*predictions, strict=True))
        return {**out, "query_classes": classes, "query_masks": masks}

    def _predict(self, x: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the class logits and the mask logits of the queries."""
        x = self.norm(x)
        queries, patches = x[:, : self.query.num_embeddings], x[:, -grid[0] * grid[1] :]
        pixels = self.upscale(patches.mT.unflatten(2, tuple(grid)))
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_head(queries), pixels)
        return self.class_head(queries), masks

    def _mask(self, masks: Tensor, x: Tensor, grid: Sequence[int], number: int) -> Tensor:
        """Return which tokens each token sees, (B, 1, tokens, tokens)."""
        batch, queries = masks.shape[:2]
        seen = (resize(masks, grid) > 0).flatten(2)
        if self.training:
            free = torch.rand(batch, queries, device=x.device) > self.masked_share(number)
            seen = seen | free[:, :, None]
        mask = torch.ones(batch, x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        mask[:, :queries, -grid[0] * grid[1] :] = seen
        return mask[:, None]

    def train(self, mode: bool = True) -> "EoMT":
        super().train(mode)
        if not mode:
            _read_masked(self)
        return self

    def masked_share(self, number: int) -> Tensor:
        """Return the probability that a query's attention is masked in a block.

        It falls from 1 to 0 by a polynomial of power 0.9 within the block's part of the training:
        there are two parts more than blocks, the first before and the last after all of theirs.
        """
        done = self.forward_passes / max(1, self.annealing) * (len(self.blocks) + 2)
        return (1 - (done - number - 1).clamp(0, 1)) ** 0.9


def _read_masked(decoder: EoMT, *_: object) -> None:
    """Set which blocks use masks in evaluation; forward would wait for the device to read it."""
    if not decoder.forward_passes.is_meta:
        shares = [float(decoder.masked_share(i)) for i in range(len(decoder.blocks))]
        decoder._masked = [decoder.annealing > 0 and share > 0.5 for share in shares]


def upscaling(width: int) -> nn.Sequential:
    """Return layers that double the sides of a map."""
    return nn.Sequential(
        nn.ConvTranspose2d(width, width, 2, stride=2),
        nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
        LayerNorm2d(width, eps=1e-6),
    )
