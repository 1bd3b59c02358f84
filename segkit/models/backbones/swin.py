"""Swin Transformer and Swin Transformer V2, of any width and window."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import swin_transformer as reference

from segkit.core.backend import is_exporting
from segkit.core.config import check_bounds
from segkit.models.backbones.inputs import set_in_channels
from segkit.models.backbones.stages import refuse_dilation, run


class Swin(nn.Module):
    """A Swin Transformer with a LayerNorm on the feature map of each of its four stages.

    Liu et al. 2021, https://arxiv.org/abs/2103.14030 and 2022, https://arxiv.org/abs/2111.09883

    Args:
        width: Channels of the first stage; each stage has twice as many as the one before.
        depths: Blocks of each stage.
        heads: Attention heads of each stage.
        version: 1, or 2, which normalizes after attention and uses cosine similarity in it.
        window: Side of the attention windows, in patches of 4 pixels; 12 for weights of images of
            384 pixels.
        drop_path: Probability of stochastic depth of the last block; it grows linearly from 0 at
            the first block.
        checkpointing: Do not store activations inside blocks; recompute them in backward.
        in_channels: Channels of the image.

    Shape:
        image: (B, in_channels, H, W)
        features[i]: (B, channels[i], H / strides[i], W / strides[i]), rounded up

    Departs from torchvision: pads the image to whole patches, so that no pixel is dropped.
    """

    strides = (4, 8, 16, 32)
    output_modules = ("norm0", "norm1", "norm2", "norm3")
    """Names of the norms, which a pretrained classifier does not have."""
    stages = tuple((f"features.{2 * i}", f"features.{2 * i + 1}", f"norm{i}") for i in range(4))

    def __init__(
        self,
        width: int,
        depths: Sequence[int],
        heads: Sequence[int],
        version: Literal[1, 2] = 1,
        *,
        window: int = 7,
        drop_path: float = 0.3,
        checkpointing: bool = False,
        in_channels: int = 3,
        output_stride: int = 32,
    ) -> None:
        super().__init__()
        refuse_dilation("Swin", output_stride)
        check_bounds(1, 1024, window=window)
        check_bounds(0, 1, drop_path=drop_path)
        block, attention, merge = {
            1: (reference.SwinTransformerBlock, WindowAttention, Merging),
            2: (reference.SwinTransformerBlockV2, WindowAttentionV2, MergingV2),
        }[version]
        self.features = reference.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=width,
            depths=list(depths),
            num_heads=list(heads),
            window_size=[window, window],
            stochastic_depth_prob=drop_path,
            num_classes=1,
            block=partial(block, attn_layer=attention),
            downsample_layer=merge,
        ).features
        set_in_channels(self.features, in_channels)
        self.in_channels = in_channels
        self.channels = tuple(width * 2**stage for stage in range(4))
        self.checkpointing = checkpointing
        for stage in self.features[1::2]:
            for swin_block in stage:
                swin_block.attn.shift_mask = stage[0].attn.shift_mask
        for name, channels in zip(self.output_modules, self.channels, strict=True):
            self.add_module(name, nn.LayerNorm(channels))

    def forward(self, image: Tensor) -> list[Tensor]:
        (_, below), (_, right) = (_parts(side, 4) for side in image.shape[-2:])
        x = F.pad(image, (0, right, 0, below))
        # self.features: patch embedding, then stages and patch merging in turn
        features = []
        for i, name in enumerate(self.output_modules):
            x = self.features[2 * i](x)
            x = run(self.features[2 * i + 1], x, recompute=self.checkpointing and self.training)
            normalized = self.get_submodule(name)(x)
            features.append(normalized.permute(0, 3, 1, 2))
        return features


class WindowAttention(reference.ShiftedWindowAttention):
    """Self-attention within shifted windows, with torchvision's parameter names.

    Liu et al. 2021, https://arxiv.org/abs/2103.14030, section 3.2

    Shape:
        x: (B, h, w, C) -> (B, h, w, C); padded internally to whole windows

    Departs from the authors' code: attention between patches that are in one window only by the
    shift is exactly 0. There -100 is added to its logits, so that it is a subnormal number, with
    which Intel's processors are slow: a pass of UPerNet on Swin-B, not trained, took 2.4 times the
    time (``python -m benchmarks.inference``).
    """

    qkv: nn.Linear
    between_regions = -math.inf

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.shift_mask = ShiftMask(self.between_regions)

    def forward(self, x: Tensor) -> Tensor:
        if is_exporting():
            return attention_of_any_size(self, x)
        window = self.window_size[0]
        height, width = x.shape[1:3]
        (down, below), (across, right) = _parts(height, window), _parts(width, window)
        x = F.pad(x, (0, 0, 0, right, 0, below))
        # A side of a single window is not shifted.
        up, left = (
            min(shift, (windows - 1) * window)
            for shift, windows in zip(self.shift_size, (down, across), strict=True)
        )
        mask = self.get_relative_position_bias()
        if up or left:
            x = x.roll((-up, -left), (1, 2))
            mask = mask + self.shift_mask(down, across, window, (up, left), mask)
        windows = window_partition(x, window)
        attended = self.attend(self.qkv(windows), mask)
        x = window_reverse(self.proj(attended), window, down, across)
        if up or left:
            x = x.roll((up, left), (1, 2))
        return x[:, :height, :width]

    def attend(self, qkv: Tensor, mask: Tensor) -> Tensor:
        """Return the attention of each patch to the patches of its window.

        Shape:
            qkv: (B, windows, N, 3 C)
            mask: (1, heads, N, N), or (windows, heads, N, N)
            result: (B, windows, N, C)
        """
        # Windows that share a mask are a batch; windows with different masks are treated as heads.
        masks, heads, patches, _ = mask.shape
        qkv = qkv.unflatten(3, (3, heads, -1))
        batch, windows = qkv.shape[:2]
        qkv = qkv.reshape(-1, masks, *qkv.shape[2:]).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        query, key, value = qkv
        query, key, scale = self.scaled(query, key, masks)
        attended = _attention(query, key, value, mask.flatten(0, 1)[None], scale)
        attended = attended.unflatten(1, (masks, heads)).transpose(2, 3)
        return attended.reshape(batch, windows, patches, -1)

    def scaled(self, query: Tensor, key: Tensor, repeats: int) -> tuple[Tensor, Tensor, float]:
        """Return queries and keys as they are multiplied, and the scale of the product.

        Args:
            query: (..., repeats * heads, N, d)
            key: (..., repeats * heads, N, d)
            repeats: How many times the sequence of heads is repeated.
        """
        return query, key, query.shape[-1] ** -0.5


class KeysWithoutBias(nn.Linear):
    """A linear layer for queries, keys and values that ignores the bias of the keys."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.bias.chunk(3)
        return F.linear(x, self.weight, torch.cat([query, torch.zeros_like(key), value]))


class WindowAttentionV2(WindowAttention, reference.ShiftedWindowAttentionV2):
    """Attention of Swin V2: cosine similarity of queries and keys, keys without bias.

    Liu et al. 2022, https://arxiv.org/abs/2111.09883, section 3.3
    """

    between_regions = -100.0  # as published: similarities are multiplied by up to 100

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.qkv.__class__ = KeysWithoutBias

    def scaled(self, query: Tensor, key: Tensor, repeats: int) -> tuple[Tensor, Tensor, float]:
        factor = self.logit_scale.clamp(max=math.log(100.0)).exp().repeat(repeats, 1, 1)
        return F.normalize(query, dim=-1) * factor, F.normalize(key, dim=-1), 1.0


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return ``softmax(scale * query @ key.mT + mask) @ value``.

    On the CPU it uses matrix products if there is a gradient, which take 0.4 to 0.9 of the time of
    PyTorch's fused attention, and for small windows, where both are equally fast. Otherwise it uses
    fused attention: a pass of Mask2Former on Swin-L with windows of 12 x 12 is 1.06 times as fast,
    in bf16 1.13 times, and a training step of Swin-L on an H200 1.19 times.

    Shape:
        query, key, value: (B, heads, N, d)
        mask: (1, heads, N, N)
    """
    if query.device.type == "cpu" and (query.shape[-2] <= 64 or torch.is_grad_enabled()):
        scores = (query * scale) @ key.mT + mask
        return scores.softmax(-1) @ value
    mask = mask.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def window_partition(x: Tensor, window: int) -> Tensor:
    """Reshape (B, h, w, C) to (B, windows, window ** 2, C); h and w are multiples of ``window``."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def window_reverse(windows: Tensor, window: int, down: int, across: int) -> Tensor:
    """Reshape (B, down * across, window ** 2, C) to (B, down * window, across * window, C)."""
    x = windows.unflatten(2, (window, window)).unflatten(1, (down, across))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class ShiftMask:
    """A cache of :func:`shift_mask` for the latest size.

    All blocks of a stage share it, so the mask is made once per stage and size.
    """

    def __init__(self, between: float) -> None:
        self._between = between
        self._key: tuple[Any, ...] | None = None
        self._mask: Tensor | None = None

    def __call__(
        self, down: int, across: int, window: int, shift: tuple[int, int], like: Tensor
    ) -> Tensor:
        """Return the mask, (windows, 1, N, N), with the device and dtype of ``like``."""
        # A tensor that a CUDA graph's capture made may be overwritten by later graphs.
        capturing = like.is_cuda and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or capturing:
            return shift_mask(down, across, window, shift, self._between, like)
        key = down, across, window, shift, like.device, like.dtype
        if self._mask is None or self._key != key:
            with torch.inference_mode(False):  # else training could not use the cached tensor
                self._mask = shift_mask(down, across, window, shift, self._between, like)
            self._key = key
        return self._mask


def shift_mask(
    down: int, across: int, window: int, shift: tuple[int, int], between: float, like: Tensor
) -> Tensor:
    """Return a mask of attention between patches that are in one window only by the shift.

    Shape:
        result: (windows, 1, N, N), ``between`` for such patches, else 0
    """
    rows, columns = (
        _regions(torch.arange(windows * window, device=like.device), windows, window, by)
        for windows, by in zip((down, across), shift, strict=True)
    )
    regions = window_partition((3 * rows[:, None] + columns)[None, :, :, None], window)
    regions = regions.squeeze(-1).squeeze(0)  # (windows, N)
    differ = regions[:, None, :, None] != regions[:, None, None, :]
    return torch.where(differ, between, 0.0).to(like.dtype)


def attention_of_any_size(attention: WindowAttention, x: Tensor) -> Tensor:
    """Compute :meth:`WindowAttention.forward` during export, without branching on sizes.

    ``roll`` and ``view`` would limit the exported program to maps of a single window, or to maps of
    several. Instead, each patch is gathered by its index.

    Shape:
        x: (B, h, w, C) -> (B, h, w, C), with symbolic B, h and w
    """
    window = attention.window_size[0]
    batch, height, width, channels = x.shape
    (down, below), (across, right) = _parts(height, window), _parts(width, window)
    filled = F.pad(x, (0, 0, 0, right, 0, below)).flatten(0, 2)
    up, left = (
        torch.sym_min(shift, (number - 1) * window)
        for shift, number in zip(attention.shift_size, (down, across), strict=True)
    )
    # Index on the rolled map, and then on the map, of each patch of each window.
    patches = down * across * window**2  # per image
    image, place = _divide(torch.arange(batch * patches, device=x.device), patches)
    outer, inner = _divide(place, window**2)
    (row, column), (row_in, column_in) = _divide(outer, across), _divide(inner, window)
    row, column = row * window + row_in, column * window + column_in
    source = image * patches + _divide(row + up, down * window)[1] * (across * window)
    source += _divide(column + left, across * window)[1]
    windows = filled.index_select(0, source).reshape(-1, window**2, channels)
    qkv = attention.qkv(windows).unflatten(2, (3, attention.num_heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    query, key, scale = attention.scaled(query, key, 1)
    scores = (query * scale) @ key.mT + attention.get_relative_position_bias()
    if any(attention.shift_size):
        region = 3 * _regions(row, down, window, up) + _regions(column, across, window, left)
        region = region.reshape(-1, 1, window**2)
        differ = region[..., None] != region[..., None, :]
        scores = scores + torch.where(differ, attention.between_regions, 0.0).to(scores.dtype)
    windows = attention.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    # The inverse: index in the windows of each patch of the map.
    image, place = _divide(torch.arange(batch * height * width, device=x.device), height * width)
    row, column = _divide(place, width)
    (row, row_in), (column, column_in) = (
        _divide(_divide(at + (number * window - shift), number * window)[1], window)
        for at, shift, number in ((row, up, down), (column, left, across))
    )
    source = image * patches + (row * across + column) * window**2 + row_in * window + column_in
    x = windows.flatten(0, 1).index_select(0, source)
    return x.unflatten(0, (batch, height, width))


def _divide(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """Return quotient and remainder of numbers >= 0; ONNX lacks the remainder by symbolic sizes."""
    quotient = x // by
    return quotient, x - quotient * by


def _regions(at: Tensor, windows: int, window: int, shift: int) -> Tensor:
    """Return the region, 0, 1 or 2, of each index of a shifted row (figure 4 of the paper)."""
    return (at >= (windows - 1) * window).long() + (at >= windows * window - shift).long()


class Merging(reference.PatchMerging):
    """torchvision's patch merging, exportable with symbolic sizes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(_concatenate_patches(x)))


class MergingV2(reference.PatchMergingV2):
    """Patch merging of Swin V2, which normalizes last."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(_concatenate_patches(x)))


def _concatenate_patches(x: Tensor) -> Tensor:
    """Concatenate 2 x 2 patches, left column first: (B, h / 2, w / 2, 4 C), rounded up."""
    (down, below), (across, right) = (_parts(side, 2) for side in x.shape[1:3])
    x = F.pad(x, (0, 0, 0, right, 0, below))
    return x.unflatten(2, (across, 2)).unflatten(1, (down, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)


def _parts(side: int, part: int) -> tuple[int, int]:
    """Return the number of parts that cover a side, and the padding that they need."""
    number = (side + part - 1) // part
    return number, number * part - side


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "swin_t": partial(Swin, 96, (2, 2, 6, 2), (3, 6, 12, 24), 1),
    "swin_s": partial(Swin, 96, (2, 2, 18, 2), (3, 6, 12, 24), 1),
    "swin_b": partial(Swin, 128, (2, 2, 18, 2), (4, 8, 16, 32), 1),
    "swin_l": partial(Swin, 192, (2, 2, 18, 2), (6, 12, 24, 48), 1),
    "swin_v2_t": partial(Swin, 96, (2, 2, 6, 2), (3, 6, 12, 24), 2, window=8),
    "swin_v2_s": partial(Swin, 96, (2, 2, 18, 2), (3, 6, 12, 24), 2, window=8),
    "swin_v2_b": partial(Swin, 128, (2, 2, 18, 2), (4, 8, 16, 32), 2, window=8),
}
