"""Save memory in training: drop the outputs of norms and activations, recompute them in backward.

Autograd builds a graph of nodes, one for each operation of the forward pass. A node saves the
tensors that its gradient needs. A convolution saves its input, which is often the output of
``relu(batch_norm(x))``; the BatchNorm saves ``x``. Both are kept, though the first follows from the
second. ``torch.autograd.graph.saved_tensors_hooks`` lets us change what is saved:

- ``pack(tensor)`` is called when a node saves a tensor. If the operation that made the tensor (its
  ``grad_fn``) is listed in ``OPERATIONS``, a :class:`Recomputed` is saved: a function that computes
  the tensor from what that operation's own node has saved. Every other tensor is :class:`Kept`.
- ``unpack`` is called when backward needs the tensor. It may call itself: the function reads saved
  tensors of other nodes (``node._saved_input``), which may be recomputed too.

With hooks, autograd no longer checks that saved tensors are unchanged. :class:`Kept` does that for
every tensor, and for the bias of BatchNorm, which no node saves: a change raises an error.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Compute = Callable[[], Tensor]
"""Returns a new tensor."""

_NEAR = 8
"""A recomputed tensor is cached for its next use if that was saved within so many saves."""


def recompute_activations() -> torch.autograd.graph.saved_tensors_hooks:
    """A context for a forward pass whose backward pass recomputes outputs of norms and activations.

    Of a block of BatchNorm and SiLU nothing is kept but the input of BatchNorm. Not kept either are
    products of maps, as in squeeze and excitation, and every other residual sum of a ResNet.
    Gradients are the same up to rounding.

    Chen et al. 2016, https://arxiv.org/abs/1604.06174; of BatchNorm and its activation, Bulò et al.
    2018, https://arxiv.org/abs/1712.02616, figure 2. Not recomputed are BatchNorm with frozen
    statistics or bias, and whatever runs within torch's ``checkpoint``.

    Raises:
        RuntimeError: In backward, if a tensor it needs was changed in place after it was saved.
    """
    hooks = Hooks()
    return torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack)


class Kept:
    """A tensor as it is, with its version, which every change in place counts up."""

    def __init__(self, x: Tensor) -> None:
        self.tensor = x.detach()  # not x: the node that saves its own output would be a cycle
        self.version = x._version

    def read(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: If it was changed in place since.
        """
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor {tuple(self.tensor.shape)} that backward needs was changed in place "
                f"after the forward pass (version {self.tensor._version}, expected {self.version});"
                " call backward before weights or activations change"
            )
        return self.tensor


class Recomputed(NamedTuple):
    """A tensor that is not kept.

    Args:
        compute: Computes it, but for shape and precision.
        shape: Of the tensor.
        dtype: Of the tensor.
        operation: Sequence number of the node whose output it is.
        number: Position among all tensors that were saved as ``Recomputed``.
        near: True if the same output was saved within the ``_NEAR`` tensors before.
    """

    compute: Compute
    shape: torch.Size
    dtype: torch.dtype
    operation: int
    number: int
    near: bool


class Hooks:
    """Pack and unpack for one forward pass and its backward pass.

    Several nodes save the same output, most of them neighbors (an activation and the convolution
    after it). Backward asks in reverse order: the first that asks computes, and the result is
    cached until the next one asks.
    """

    def __init__(self) -> None:
        self._count = 0
        self._latest: dict[int, int] = {}  # by sequence number: a node would keep this object alive
        self._cache: dict[int, Tensor] = {}
        self._asking: Recomputed | None = None
        self._ours: set[int] = set()
        self._kept: set[int] = set()

    def pack(self, x: Tensor) -> Kept | Recomputed:
        """Return what is saved in place of ``x``."""
        self._ours.add(_saving_node(x))
        node = _source(x.grad_fn)
        compute = self.recipe(node)
        if compute is None:
            if node is not None:
                self._kept.add(node._sequence_nr())
            return Kept(x)
        operation = node._sequence_nr()
        self._count += 1
        near = self._count - self._latest.get(operation, -_NEAR) < _NEAR
        self._latest[operation] = self._count
        return Recomputed(compute, x.shape, x.dtype, operation, self._count, near)

    def unpack(self, packed: Kept | Recomputed) -> Tensor:
        """Return the tensor that was packed."""
        if isinstance(packed, Kept):
            return packed.read()
        asking, self._asking = self._asking, packed
        result = self._cache.pop(packed.operation, None)
        if result is None:
            result = packed.compute()
        self._asking = asking
        # Asked for to compute another tensor, it will be asked for again by the node that saved it.
        if packed.near if asking is None else asking.number - packed.number < _NEAR:
            self._cache[packed.operation] = result
        return result.to(packed.dtype).reshape(packed.shape)

    def recipe(self, node: Any) -> Compute | None:
        """Return how a node's output is computed from what it saved, None if it cannot be."""
        if node is None or node.name() not in OPERATIONS or not self._saved_here(node):
            return None
        return OPERATIONS[node.name()](self, node)

    def keeps_output(self, node: Any) -> bool:
        """True if ``node`` is a ReLU that saved its output as it is."""
        return _is_relu(node) and self._saved_here(node) and node._sequence_nr() in self._kept

    def _saved_here(self, node: Any) -> bool:
        """False within a checkpoint, whose own hooks let each tensor be read once, by its node."""
        return node._sequence_nr() in self._ours


def _saving_node(x: Tensor) -> int:
    """Return the sequence number of the node that saves ``x`` right now: the latest node."""
    latest = torch.autograd._get_sequence_nr() - 1
    # An operation in place saves a clone of its input, which it makes after its own node.
    node: Any = x.grad_fn
    cloned = node is not None and node.name() == "CloneBackward0" and node._sequence_nr() == latest
    return latest - 1 if cloned else latest


def _source(node: Any) -> Any:
    """Return the node whose output a tensor is, but for shape and precision."""
    while node is not None and node.name() in SAME:
        node = node.next_functions[0][0]
    return node


def _batch_norm(hooks: Hooks, node: Any) -> Compute | None:
    bias = _leaf(node.next_functions[2][0])
    if bias is None or not node._saved_training:
        return None
    return lambda: _normalized(
        node._saved_input,
        node._saved_weight,
        bias.read(),
        node._saved_result1,
        node._saved_result2,
    )


def _sync_batch_norm(hooks: Hooks, node: Any) -> Compute | None:
    bias = _leaf(node.next_functions[2][0])
    if bias is None:
        return None

    def compute() -> Tensor:
        x, weight, mean, rstd, *_ = node.saved_tensors
        return _normalized(x, weight, bias.read(), mean, rstd)

    return compute


def _leaf(node: Any) -> Kept | None:
    """Return the parameter whose gradient a node adds up."""
    return Kept(node.variable) if hasattr(node, "variable") else None


def _normalized(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    if x.dtype != weight.dtype:  # autocast
        # rstd includes eps already, but torch 2.11 refuses 0: the least number adds nothing.
        eps = torch.finfo(weight.dtype).tiny
        return F.batch_norm(x, mean, rstd**-2, weight, bias, eps=eps)
    factor = weight * rstd
    offset = bias - mean * factor
    shape = 1, -1, *[1] * (x.ndim - 2)
    return torch.addcmul(offset.view(shape), x, factor.view(shape))  # half the time of batch_norm


def _layer_norm(hooks: Hooks, node: Any) -> Compute | None:
    if node._saved_weight is None or node._saved_bias is None:
        return None

    def compute() -> Tensor:
        x = (node._saved_input - node._saved_result1).mul_(node._saved_result2)
        return torch.addcmul(node._saved_bias, x, node._saved_weight)

    return compute


def _product(hooks: Hooks, node: Any) -> Compute | None:
    if any(factor is None for factor, _ in node.next_functions):
        return None  # of a factor without a gradient, the other one is not saved
    return lambda: node._saved_self * node._saved_other


def _relu(hooks: Hooks, node: Any) -> Compute | None:
    """A ReLU saves its output, so its input must be recomputed."""
    before = _source(node.next_functions[0][0])
    is_sum = before.name() == "AddBackward0"
    compute_input = _sum(hooks, before) if is_sum else hooks.recipe(before)
    if compute_input is None:
        return None

    def compute() -> Tensor:
        x = compute_input()
        # Sixteen bits that are negative as a float are so as an integer, and compared much faster.
        (x.view(torch.int16) if x.dtype.itemsize == 2 else x).clamp_(min=0)
        return x

    return compute


def _sum(hooks: Hooks, node: Any) -> Compute | None:
    """Return how to recompute a sum: of two recomputed terms, or of one and a ReLU that is kept.

    A sum is never computed from another: the last residual block of a row would need all blocks
    before it. So every other sum of a row is kept.
    """
    first, second = (term for term, _ in node.next_functions)  # as they are: shapes must fit
    if _is_relu(first):
        first, second = second, first
    if _is_relu(first) or (compute := hooks.recipe(first)) is None or node._saved_alpha != 1:
        return None
    if hooks.keeps_output(second):
        return lambda: _add(compute(), second._saved_result)
    other = None if _is_relu(second) else hooks.recipe(second)
    return None if other is None else lambda: _add(compute(), other())


def _add(own: Tensor, other: Tensor) -> Tensor:
    equal = own.shape == other.shape and own.dtype == other.dtype
    return own.add_(other) if equal else own + other


def _is_relu(node: Any) -> bool:
    return node is not None and node.name() == "ReluBackward0"


SAME = ("CloneBackward0", "ViewBackward0", "UnsafeViewBackward0", "ToCopyBackward0")
"""Nodes that change at most shape and precision: in-place activations, Linear, autocast."""

OPERATIONS: dict[str, Callable[[Hooks, Any], Compute | None]] = {
    "NativeBatchNormBackward0": _batch_norm,
    "CudnnBatchNormBackward0": _batch_norm,
    "SyncBatchNormBackward": _sync_batch_norm,  # torch.nn.SyncBatchNorm
    "NormalizeOverRanksBackward": _sync_batch_norm,  # segkit.models.kernels.sync_batch_norm
    "NativeLayerNormBackward0": _layer_norm,
    "MulBackward0": _product,
    "ReluBackward0": _relu,
    "SiluBackward0": lambda hooks, node: lambda: F.silu(node._saved_self),
    "HardswishBackward0": lambda hooks, node: lambda: F.hardswish(node._saved_self),
    "GeluBackward0": lambda hooks, node: (
        lambda: F.gelu(node._saved_self, approximate=node._saved_approximate)
    ),
}
"""By the name of a node: how its output is recomputed."""
