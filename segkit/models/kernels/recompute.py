"""Recomputation of the outputs of norms and activations in backward, to save memory in training.

Replaces autograd's default, which keeps every tensor that backward needs.
Chosen by ``train.recompute``, for every size: ``auto`` is on for the CPU and off elsewhere, as it
costs 2 to 27 % of a step on an H200.
Gain: more than half of the activations of UNet++ on EfficientNet-B5 are not kept; a step without
recomputation takes 0.93 to 0.99 of the time (``python -m benchmarks.step --versus keeping``).

How it works: autograd has one node per operation of the forward pass, and each node saves the
tensors that its gradient needs. In ``conv(relu(batch_norm(x)))`` the node of BatchNorm saves ``x``,
and that of the convolution saves ``relu(batch_norm(x))``, which can be computed from what the first
has saved. ``torch.autograd.graph.saved_tensors_hooks`` lets two functions change what is saved:

- ``pack(tensor)`` is called when a node saves a tensor, and returns what is saved in its place. If
  the tensor is the output of an operation listed in ``OPERATIONS`` (known from its ``grad_fn``), it
  returns a :class:`Recomputed`: a function that computes the tensor from what the node of that
  operation has saved. For any other tensor it returns a :class:`Kept`, the tensor itself.
- ``unpack(packed)`` is called when backward needs the tensor, and returns it. It is recursive: to
  compute a tensor it reads what other nodes saved (such as ``node._saved_input``), which may have
  to be recomputed as well.

With hooks, autograd no longer checks that saved tensors are unchanged. :class:`Kept` checks it
instead, also for the bias of BatchNorm, which no node saves: a change in place raises an error.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Compute = Callable[[], Tensor]
"""A function that computes a new tensor."""

_NEAR = 8
"""A recomputed tensor is cached for its next use only if that was saved within 8 saves."""


def recompute_activations() -> torch.autograd.graph.saved_tensors_hooks:
    """Return a context for the forward pass; its backward recomputes norms and activations.

    For BatchNorm followed by SiLU only the input of BatchNorm is kept. Products of maps, as in
    squeeze and excitation, and every second residual sum of a ResNet are recomputed too. Gradients
    are the same up to rounding. BatchNorm with frozen statistics or bias, and anything inside
    ``torch.utils.checkpoint``, is not recomputed.

    Chen et al. 2016, https://arxiv.org/abs/1604.06174; BatchNorm with its activation: Bulò et al.
    2018, https://arxiv.org/abs/1712.02616, figure 2.

    Raises:
        RuntimeError: In backward, if a tensor it needs was changed in place after it was saved.
    """
    hooks = Hooks()
    return torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack)


class Kept:
    """A saved tensor with its version, which every change in place increases."""

    def __init__(self, x: Tensor) -> None:
        self.tensor = x.detach()  # not x: a node that saves its own output would reference itself
        self.version = x._version

    def read(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: If it was changed in place since it was saved.
        """
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor {tuple(self.tensor.shape)} that backward needs was changed in place "
                f"after the forward pass (version {self.tensor._version}, expected {self.version});"
                " call backward before weights or activations change"
            )
        return self.tensor


class Recomputed(NamedTuple):
    """A saved tensor that is recomputed when backward needs it.

    Args:
        compute: Computes its values; shape and dtype may differ.
        operation: Sequence number of the node whose output it is.
        number: Position among all tensors that were saved as ``Recomputed``.
        previous: Position of the previous save of the same output.
    """

    compute: Compute
    shape: torch.Size
    dtype: torch.dtype
    operation: int
    number: int
    previous: int


class Hooks:
    """The pack and unpack functions of one forward pass and its backward pass.

    Several nodes save the same output, usually neighbors (an activation and the convolution after
    it). Backward unpacks in reverse order: the first unpack computes the output, and the result is
    cached until the next unpack reads it.
    """

    def __init__(self) -> None:
        self._count = 0
        # All are indexed by sequence number; references to nodes would make a cycle.
        self._latest: dict[int, int] = {}
        self._cache: dict[int, Tensor] = {}
        self._computing: Recomputed | None = None  # the tensor that unpack is computing
        self._saving_nodes: set[int] = set()
        self._kept: set[int] = set()  # nodes whose output is Kept

    def pack(self, x: Tensor) -> Kept | Recomputed:
        """Return what is saved in place of ``x``."""
        self._saving_nodes.add(_saving_node(x))
        node = _source(x.grad_fn)
        compute = self.recipe(node)
        if compute is None:
            if node is not None:
                self._kept.add(node._sequence_nr())
            return Kept(x)
        operation = node._sequence_nr()
        previous = self._latest.get(operation, -_NEAR)
        self._count += 1
        self._latest[operation] = self._count
        return Recomputed(compute, x.shape, x.dtype, operation, self._count, previous)

    def unpack(self, packed: Kept | Recomputed) -> Tensor:
        """Return the tensor that was packed."""
        if isinstance(packed, Kept):
            return packed.read()
        outer, self._computing = self._computing, packed
        result = self._cache.pop(packed.operation, None)
        if result is None:
            result = packed.compute()
        self._computing = outer
        # Backward needs it next where it was saved before, or, if it is needed only to compute
        # another tensor now, where it was saved.
        now, later = packed.number, packed.previous
        if outer is not None:
            now, later = outer.number, packed.number
        if now - later < _NEAR:
            self._cache[packed.operation] = result
        return result.to(packed.dtype).reshape(packed.shape)

    def recipe(self, node: Any) -> Compute | None:
        """Return a function that computes a node's output from what it saved, or None."""
        if node is None or node.name() not in OPERATIONS or not self._saved_here(node):
            return None
        return OPERATIONS[node.name()](self, node)

    def keeps_output(self, node: Any) -> bool:
        """True if ``node`` is a ReLU whose saved output is :class:`Kept`."""
        return _is_relu(node) and self._saved_here(node) and node._sequence_nr() in self._kept

    def _saved_here(self, node: Any) -> bool:
        """True if these hooks packed what ``node`` saved.

        False inside a checkpoint: its own hooks let each tensor be read only once, by its node.
        """
        return node._sequence_nr() in self._saving_nodes


def _saving_node(x: Tensor) -> int:
    """Return the sequence number of the node that is saving ``x``: the latest node.

    An in-place operation saves a clone of its input, made after its own node.
    """
    latest = torch.autograd._get_sequence_nr() - 1
    node: Any = x.grad_fn
    cloned = node is not None and node.name() == "CloneBackward0" and node._sequence_nr() == latest
    return latest - 1 if cloned else latest


def _source(node: Any) -> Any:
    """Return the node that computed a tensor's values, skipping changes of shape and dtype."""
    while node is not None and node.name() in SAME:
        node = node.next_functions[0][0]
    return node


def _batch_norm(hooks: Hooks, node: Any) -> Compute | None:
    leaf = node.next_functions[2][0]
    if not hasattr(leaf, "variable") or not getattr(node, "_saved_training", True):
        return None  # the bias is computed or frozen, or the statistics are
    bias = Kept(leaf.variable)

    def compute() -> Tensor:
        if node.name() in OVER_RANKS:
            x, weight, mean, rstd, *_ = node.saved_tensors
        else:
            x, weight = node._saved_input, node._saved_weight
            mean, rstd = node._saved_result1, node._saved_result2
        if x.dtype != weight.dtype:  # autocast
            # rstd already includes eps, but torch 2.11 rejects 0; the smallest number adds nothing.
            eps = torch.finfo(weight.dtype).tiny
            return F.batch_norm(x, mean, rstd**-2, weight, bias.read(), eps=eps)
        factor = weight * rstd
        offset = bias.read() - mean * factor
        shape = 1, -1, *[1] * (x.ndim - 2)
        # half the time of batch_norm
        return torch.addcmul(offset.view(shape), x, factor.view(shape))

    return compute


def _layer_norm(hooks: Hooks, node: Any) -> Compute | None:
    if node._saved_weight is None or node._saved_bias is None:
        return None

    def compute() -> Tensor:
        x = (node._saved_input - node._saved_result1).mul_(node._saved_result2)
        return torch.addcmul(node._saved_bias, x, node._saved_weight)

    return compute


def _product(hooks: Hooks, node: Any) -> Compute | None:
    if any(factor is None for factor, _ in node.next_functions):
        return None  # if one factor needs no gradient, the other is not saved
    return lambda: node._saved_self * node._saved_other


def _relu(hooks: Hooks, node: Any) -> Compute | None:
    """Return how to recompute a ReLU from its recomputed input (it saves only its output)."""
    source = _source(node.next_functions[0][0])
    is_sum = source.name() == "AddBackward0"
    compute_input = _sum(hooks, source) if is_sum else hooks.recipe(source)
    if compute_input is None:
        return None

    def compute() -> Tensor:
        x = compute_input()
        # 16-bit floats and integers have the same sign bit; integers are compared much faster.
        (x.view(torch.int16) if x.dtype.itemsize == 2 else x).clamp_(min=0)
        return x

    return compute


def _sum(hooks: Hooks, node: Any) -> Compute | None:
    """Return how to recompute a sum of two recomputed terms, or of one and a kept ReLU output.

    A sum is never recomputed from another recomputed sum: the last of a sequence of residual blocks
    would need all blocks before it. So every second sum is kept.
    """
    first, second = (term for term, _ in node.next_functions)  # not _source: shapes must fit
    if _is_relu(first):
        first, second = second, first
    if _is_relu(first) or (compute := hooks.recipe(first)) is None or node._saved_alpha != 1:
        return None
    if hooks.keeps_output(second):
        return lambda: _add(compute(), second._saved_result)
    other = None if _is_relu(second) else hooks.recipe(second)
    return None if other is None else lambda: _add(compute(), other())


def _add(x: Tensor, other: Tensor) -> Tensor:
    in_place = x.shape == other.shape and x.dtype == other.dtype
    return x.add_(other) if in_place else x + other


def _is_relu(node: Any) -> bool:
    return node is not None and node.name() == "ReluBackward0"


SAME = ("CloneBackward0", "ViewBackward0", "UnsafeViewBackward0", "ToCopyBackward0")
"""Nodes that change at most shape and dtype: from in-place activations, Linear and autocast."""

OVER_RANKS = ("SyncBatchNormBackward", "NormalizeOverRanksBackward")
"""BatchNorm over ranks, of ``torch.nn.SyncBatchNorm`` and of ``kernels.sync_batch_norm``."""

OPERATIONS: dict[str, Callable[[Hooks, Any], Compute | None]] = {
    "NativeBatchNormBackward0": _batch_norm,
    "CudnnBatchNormBackward0": _batch_norm,
    **dict.fromkeys(OVER_RANKS, _batch_norm),
    "NativeLayerNormBackward0": _layer_norm,
    "MulBackward0": _product,
    "ReluBackward0": _relu,
    "SiluBackward0": lambda hooks, node: lambda: F.silu(node._saved_self),
    "HardswishBackward0": lambda hooks, node: lambda: F.hardswish(node._saved_self),
    "GeluBackward0": lambda hooks, node: (
        lambda: F.gelu(node._saved_self, approximate=node._saved_approximate)
    ),
}
"""Maps the name of a node to a function that returns how its output is recomputed."""
