"""Activations that a training step computes again in its backward pass, to save memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "ReluBackward0": torch.relu,
    "SiluBackward0": F.silu,
    "HardswishBackward0": F.hardswish,
}
EPSILON = {"NativeBatchNormBackward0": "_saved_eps", "CudnnBatchNormBackward0": "_saved_epsilon"}
"""PyTorch's BatchNorms by the name of their backward, and what it calls its epsilon."""


def forgetting() -> torch.autograd.graph.saved_tensors_hooks:
    """A context for a forward pass that keeps BatchNorm's inputs, and nothing that follows them.

    What comes out of BatchNorm, and of a ReLU or SiLU after it, is needed again in backward, by the
    activation and the next convolution. There it is computed again from BatchNorm's input, which
    BatchNorm's own backward needs in any case. Gradients are the same up to rounding.

    Chen et al. 2016, https://arxiv.org/abs/1604.06174; of BatchNorm and its activation, Bulò et al.
    2018, https://arxiv.org/abs/1712.02616, figure 2. BatchNorm over several ranks is another
    operation, and is left as it is; so is BatchNorm whose statistics or bias are frozen.
    """
    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def pack(x: Tensor) -> Any:
    """``x`` itself, or BatchNorm's node in the graph, its bias, and the activation after it."""
    node: Any = x.grad_fn
    activation = ACTIVATIONS.get(node.name()) if node is not None else None
    if activation is not None:
        node = node.next_functions[0][0]
    if node is not None and node.name() == "CloneBackward0":  # what an activation in place took
        node = node.next_functions[0][0]
    if node is None or node.name() not in EPSILON or not node._saved_training:
        return x
    bias, _ = node.next_functions[2]
    return x if bias is None else (node, bias.variable, activation)


def unpack(packed: Any) -> Tensor:
    """The tensor that was packed."""
    if isinstance(packed, Tensor):
        return packed
    node, bias, activation = packed
    eps = getattr(node, EPSILON[node.name()])
    mean, rstd = node._saved_result1, node._saved_result2
    x = F.batch_norm(
        node._saved_input, mean, rstd**-2 - eps, node._saved_weight, bias, training=False, eps=eps
    )
    return x if activation is None else activation(x)
