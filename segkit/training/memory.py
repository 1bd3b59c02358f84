"""Memory of a training step, computed from shapes on the device ``meta``."""

from typing import Any

import torch
from torch import Tensor, nn

from segkit.core.config import ModelConfig
from segkit.core.labels import Size
from segkit.models.kernels import recompute
from segkit.models.segmenter import build_model

BATCH = 2
"""Images of the step that is computed; the result is per image."""


def kept_for_backward(model: nn.Module, image: Tensor, *, recomputed: bool = True) -> int:
    """Return the bytes that a forward pass saves for backward, in addition to the model's own.

    ``recomputed``: with ``recompute_activations``, as in a training step on the CPU.
    """
    hooks = recompute.Hooks()
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def count(x: Tensor) -> Any:
        packed = hooks.pack(x) if recomputed else recompute.Kept(x)
        storage = x.untyped_storage()
        if isinstance(packed, recompute.Kept) and storage._cdata not in own:
            kept[storage._cdata] = storage
        return packed

    with torch.autograd.graph.saved_tensors_hooks(count, hooks.unpack):
        outputs = model(image)
    del outputs
    return sum(storage.nbytes() for storage in kept.values())


def training_memory(
    model: ModelConfig, size: Size, num_classes: int, *, recomputed: bool
) -> tuple[int, int]:
    """Return the bytes of the training's state, and of the activations per image, in fp32.

    The state is weights, gradients and AdamW's two moments. The activations include the logits at
    the image's size and their gradient.
    """
    with torch.device("meta"):
        net = build_model(model.backbone, model.decoder, num_classes=num_classes)
        image = torch.empty(BATCH, model.backbone.get("in_channels", 3), *size)
    state = 16 * sum(parameter.numel() for parameter in net.parameters())
    kept = kept_for_backward(net.train(), image, recomputed=recomputed) // BATCH
    return state, kept + 8 * num_classes * size[0] * size[1]
