"""Activations that a training step computes again in its backward pass, to save memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Make = Callable[[], Tensor]
"""Makes a tensor, a new one each time."""

_NEAR = 8
"""What was packed within as many others is asked for within as many, and worth holding for it."""


def forgetting() -> torch.autograd.graph.saved_tensors_hooks:
    """A context for a forward pass that keeps what norms and activations take, not what they give.

    Backward needs what they give for the next convolution or matrix product; it is computed again
    there from what they took, which their own backward needs in any case. What BatchNorm gives to a
    SiLU is itself computed again, and so nothing is kept of a block but what BatchNorm took. Nor is
    a product of maps kept, as in squeeze and excitation, and of a ResNet's residual sums every
    other one. Gradients are the same up to rounding.

    Chen et al. 2016, https://arxiv.org/abs/1604.06174; of BatchNorm and its activation, Bulò et al.
    2018, https://arxiv.org/abs/1712.02616, figure 2. Left alone are BatchNorm whose statistics or
    bias are frozen, and what lies within torch's ``checkpoint``.
    """
    hooks = Forgetting()
    return torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack)


class Packed(NamedTuple):
    """What stands for a tensor that was not kept.

    Args:
        make: Makes it again, but for shape and precision.
        shape: Of the tensor.
        dtype: Of the tensor.
        operation: The number of the operation it is the result of.
        number: Its place among all that were packed.
        near: Whether that result was packed a moment before, too.
    """

    make: Make
    shape: torch.Size
    dtype: torch.dtype
    operation: int
    number: int
    near: bool


class Forgetting:
    """What :func:`forgetting` does in one forward pass and its backward pass.

    Several operations need one result, most of them neighbors: once made, it is held for the next
    to ask. Backward asks in reverse order, so the next is the one before.
    """

    def __init__(self) -> None:
        self._count = 0
        self._latest: dict[int, int] = {}  # by operation, not by node: those keep this object alive
        self._held: dict[int, Tensor] = {}
        self._asking: Packed | None = None

    def pack(self, x: Tensor) -> Tensor | Packed:
        """``x`` itself, or how it is made again."""
        if x.grad_fn is None:
            return x
        node = _source(x.grad_fn)
        make = _make(node)
        if make is None:
            return x
        operation = node._sequence_nr()
        self._count += 1
        near = self._count - self._latest.get(operation, -_NEAR) < _NEAR
        self._latest[operation] = self._count
        return Packed(make, x.shape, x.dtype, operation, self._count, near)

    def unpack(self, packed: Tensor | Packed) -> Tensor:
        """The tensor that was packed."""
        if isinstance(packed, Tensor):
            return packed
        asking, self._asking = self._asking, packed
        result = self._held.pop(packed.operation, None)
        if result is None:
            result = packed.make()
        self._asking = asking
        # Asked for to make another, it will be asked for again by whoever packed it.
        if packed.near if asking is None else asking.number - packed.number < _NEAR:
            self._held[packed.operation] = result
        return result.to(packed.dtype).reshape(packed.shape)


def _source(node: Any) -> Any:
    """The operation that a tensor is the result of, but for shape and precision."""
    while node is not None and node.name() in SAME:
        node = node.next_functions[0][0]
    return node


def _make(node: Any) -> Make | None:
    """How an operation's result is made again, from its node in the graph."""
    if node is None or node.name() not in OPERATIONS or not _readable(node):
        return None
    _, make = OPERATIONS[node.name()]
    result: Make | None = make(node)
    return result


def _readable(node: Any) -> bool:
    """Whether others than the node may read what it keeps: of a checkpoint only once, and by it."""
    kept, _ = OPERATIONS[node.name()]
    raw = getattr(node, f"_raw_saved_{kept}")
    # torch 2.9 does not tell: what a checkpoint gives must then not end in an operation of ours.
    hook = getattr(raw[0] if isinstance(raw, tuple) else raw, "unpack_hook", None)
    return hook is None or getattr(hook, "__func__", None) is Forgetting.unpack


def _batch_norm(node: Any) -> Make | None:
    bias, _ = node.next_functions[2]
    if bias is None or not node._saved_training:
        return None
    return lambda: _normalized(
        node._saved_input,
        node._saved_weight,
        bias.variable,
        node._saved_result1,
        node._saved_result2,
    )


def _batch_norm_of_ranks(node: Any) -> Make | None:
    bias, _ = node.next_functions[2]
    if bias is None:
        return None

    def make() -> Tensor:
        x, weight, mean, rstd, *_ = node.saved_tensors
        return _normalized(x, weight, bias.variable, mean, rstd)

    return make


def _normalized(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    if x.dtype != weight.dtype:  # autocast
        return F.batch_norm(x, mean, rstd**-2, weight, bias, eps=0.0)
    factor = weight * rstd
    offset = bias - mean * factor
    shape = 1, -1, *[1] * (x.ndim - 2)
    return torch.addcmul(offset.view(shape), x, factor.view(shape))  # takes half of the time


def _layer_norm(node: Any) -> Make | None:
    if node._saved_weight is None or node._saved_bias is None:
        return None

    def make() -> Tensor:
        x = (node._saved_input - node._saved_result1).mul_(node._saved_result2)
        return torch.addcmul(node._saved_bias, x, node._saved_weight)

    return make


def _product(node: Any) -> Make | None:
    if any(factor is None for factor, _ in node.next_functions):
        return None  # of a factor without a gradient, the other one is not kept
    return lambda: node._saved_self * node._saved_other


def _relu(node: Any) -> Make | None:
    """It keeps what it gives, so what it took must be made again."""
    before = _source(node.next_functions[0][0])
    took = _sum(before) if before.name() == "AddBackward0" else _make(before)
    if took is None:
        return None

    def make() -> Tensor:
        x = took()
        # Sixteen bits that are negative as a float are so as an integer, and compared much faster.
        (x.view(torch.int16) if x.dtype.itemsize == 2 else x).clamp_(min=0)
        return x

    return make


def _sum(node: Any) -> Make | None:
    """Of what is made again, and what is made again too or is the result of a ReLU that keeps it.

    Not of another sum, or of a row of residual blocks the last would be made from the first: so it
    is every other one.
    """
    one, other = (term for term, _ in node.next_functions)  # as they are: shapes must fit
    if _is_relu(one):
        one, other = other, one
    if _is_relu(one) or (make := _make(one)) is None or node._saved_alpha != 1:
        return None
    if _keeps(other):
        return lambda: _add(make(), other._saved_result)
    again = None if _is_relu(other) else _make(other)
    return None if again is None else lambda: _add(make(), again())


def _add(own: Tensor, other: Tensor) -> Tensor:
    alike = own.shape == other.shape and own.dtype == other.dtype
    return own.add_(other) if alike else own + other


def _is_relu(node: Any) -> bool:
    return node is not None and node.name() == "ReluBackward0"


def _keeps(node: Any) -> bool:
    """Whether it is a ReLU whose result is there to be read."""
    if not _is_relu(node):
        return False
    if "kept" not in node.metadata:
        node.metadata["kept"] = _readable(node) and _make(node) is None
    return bool(node.metadata["kept"])


SAME = ("CloneBackward0", "ViewBackward0", "UnsafeViewBackward0", "ToCopyBackward0")
"""What changes at most shape and precision: an activation in place, a Linear, autocast."""

OPERATIONS: dict[str, tuple[str, Callable[[Any], Make | None]]] = {
    "NativeBatchNormBackward0": ("input", _batch_norm),
    "CudnnBatchNormBackward0": ("input", _batch_norm),
    "SyncBatchNormBackward": ("tensors", _batch_norm_of_ranks),  # PyTorch's, on CUDA
    "NormalizeOverRanksBackward": ("tensors", _batch_norm_of_ranks),  # segkit.distributed's
    "NativeLayerNormBackward0": ("input", _layer_norm),
    "MulBackward0": ("self", _product),
    "ReluBackward0": ("result", _relu),
    "SiluBackward0": ("self", lambda node: lambda: F.silu(node._saved_self)),
    "HardswishBackward0": ("self", lambda node: lambda: F.hardswish(node._saved_self)),
    "GeluBackward0": (
        "self",
        lambda node: lambda: F.gelu(node._saved_self, approximate=node._saved_approximate),
    ),
}
"""By the name of a node: something that it keeps, and how its result is made again."""
