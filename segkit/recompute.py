"""Activations that a training step computes again in its backward pass, to save memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def forgetting() -> torch.autograd.graph.saved_tensors_hooks:
    """A context for a forward pass that keeps what norms and activations take, not what they give.

    Backward needs what they give for the next convolution or matrix product; it is computed again
    there from what they took, which their own backward needs in any case. What BatchNorm gives to a
    SiLU is itself computed again, and so nothing is kept of a block but what BatchNorm took.
    Gradients are the same up to rounding.

    Chen et al. 2016, https://arxiv.org/abs/1604.06174; of BatchNorm and its activation, Bulò et al.
    2018, https://arxiv.org/abs/1712.02616, figure 2. BatchNorm over several ranks is another
    operation, and is left as it is; so is BatchNorm whose statistics or bias are frozen.
    """
    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def pack(x: Tensor) -> Any:
    """``x`` itself, or how it is made again."""
    again = _again(x.grad_fn)
    return x if again is None else (again, x.dtype, x.shape)


def unpack(packed: Any) -> Tensor:
    """The tensor that was packed."""
    if isinstance(packed, Tensor):
        return packed
    again, dtype, shape = packed
    return again().to(dtype).reshape(shape)


def _again(node: Any) -> Callable[[], Tensor] | None:
    """How an operation's result is made again, from its node in the graph."""
    while node is not None and node.name() in SAME:
        node = node.next_functions[0][0]
    make = None if node is None else OPERATIONS.get(node.name())
    return None if make is None else make(node)


def _batch_norm(node: Any) -> Callable[[], Tensor] | None:
    bias, _ = node.next_functions[2]
    if bias is None or not node._saved_training:
        return None

    def again() -> Tensor:
        eps = getattr(node, "_saved_eps" if hasattr(node, "_saved_eps") else "_saved_epsilon")
        mean, rstd = node._saved_result1, node._saved_result2
        x, weight = node._saved_input, node._saved_weight
        return F.batch_norm(x, mean, rstd**-2 - eps, weight, bias.variable, False, eps=eps)

    return again


def _layer_norm(node: Any) -> Callable[[], Tensor] | None:
    if node._saved_weight is None or node._saved_bias is None:
        return None

    def again() -> Tensor:
        x = (node._saved_input - node._saved_result1).mul_(node._saved_result2)
        return torch.addcmul(node._saved_bias, x, node._saved_weight)

    return again


def _relu(node: Any) -> Callable[[], Tensor] | None:
    """It keeps what it gives, so what it took must be made again."""
    before = _again(node.next_functions[0][0])
    return None if before is None else lambda: before().relu_()


SAME = ("CloneBackward0", "ViewBackward0", "UnsafeViewBackward0", "ToCopyBackward0")
"""What changes at most shape and precision: an activation in place, a Linear, autocast."""

OPERATIONS: dict[str, Callable[[Any], Callable[[], Tensor] | None]] = {
    "NativeBatchNormBackward0": _batch_norm,
    "CudnnBatchNormBackward0": _batch_norm,
    "NativeLayerNormBackward0": _layer_norm,
    "ReluBackward0": _relu,
    "SiluBackward0": lambda node: lambda: F.silu(node._saved_self),
    "HardswishBackward0": lambda node: lambda: F.hardswish(node._saved_self),
    "GeluBackward0": lambda node: (
        lambda: F.gelu(node._saved_self, approximate=node._saved_approximate)
    ),
}
"""By the name of the node: how its result is made again, if it can be."""
