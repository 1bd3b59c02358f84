"""CUDA graphs of a model's forward pass, one for each input shape that recurs.

Replaces the launch of every kernel by one launch of all of them.
Chosen for prediction on CUDA, for at most ``PIXELS`` pixels; larger inputs keep the device busy.
Gain: see ``python -m benchmarks.gpu --part inference``.
"""

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHAPES = 8
"""Graphs that a model has at the same time."""

EAGER_CALLS = 2
"""Calls of a shape before it is captured; they also warm up the CUDA libraries."""

IDLE_CALLS = 64
"""A graph that was not used in as many calls may be replaced."""

PIXELS = 2**22

Forward = Callable[[Tensor], Tensor]


class Graphs:
    """A function that runs a model's forward pass, by a CUDA graph if the shape recurs.

    A graph launches the kernels of an ordinary call, so the results are equal. Weights may change
    in place between calls, as a replay reads them anew; if a parameter or buffer moves to other
    memory, all graphs are dropped. Hooks and other Python code of the model do not run in a replay.

    Args:
        forward: Calls the model; must not depend on values of the input.
        model: The model, in evaluation mode.
    """

    def __init__(self, forward: Forward, model: nn.Module) -> None:
        self._forward = forward
        self._tensors = [part for m in model.modules() for part in (m._parameters, m._buffers)]
        self._addresses: list[int] = []
        self._graphs: OrderedDict[tuple, Graph] = OrderedDict()  # the least recently used first
        self._seen: Counter[tuple] = Counter()
        self._calls = 0
        self._pool: Any = None
        self._failed = False
        self._lock = threading.Lock()

    def __call__(self, image: Tensor) -> Tensor:
        if self._failed or not capturable(image):
            return self._forward(image)
        with self._lock:
            graph = self._graph(image)
            if graph is not None:
                graph.used = self._calls
                return graph.replay(image)
        return self._forward(image)

    def _graph(self, image: Tensor) -> "Graph | None":
        """Return the graph of an image's shape, captured if it is time, or None."""
        self._calls += 1
        addresses = [x.data_ptr() for part in self._tensors for x in part.values() if x is not None]
        if addresses != self._addresses:
            self._graphs.clear()
            self._addresses = addresses
        kind = image.device.type
        amp = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = image.shape, image.stride(), image.dtype, image.device, amp
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if len(self._seen) > 1000:
            self._seen.clear()
        self._seen[key] += 1
        if self._seen[key] <= EAGER_CALLS or not self._has_place():
            return None
        del self._seen[key]
        try:
            self._graphs[key] = Graph(self._forward, image, self._pool)
        except RuntimeError as error:
            self._failed = True
            self._graphs.clear()
            warnings.warn(f"no CUDA graph of this model: {error}", stacklevel=2)
            return None
        self._pool = self._graphs[key].pool
        return self._graphs[key]

    def _has_place(self) -> bool:
        """Return True if there may be another graph; an idle one is dropped for it."""
        if len(self._graphs) < SHAPES:
            return True
        oldest = next(iter(self._graphs))
        if self._calls - self._graphs[oldest].used <= IDLE_CALLS:
            return False
        del self._graphs[oldest]
        return True


def capturable(image: Tensor) -> bool:
    """Return True if a pass of this input may be captured or replayed."""
    return (
        image.is_cuda
        and image.numel() <= 3 * PIXELS
        # Static memory is safe only if all replays are in one stream.
        and torch.cuda.current_stream(image.device) == torch.cuda.default_stream(image.device)
        and not torch.cuda.is_current_stream_capturing()
    )


class Graph:
    """A captured forward pass; it may overwrite the memory ``pool`` of earlier graphs."""

    def __init__(self, forward: Forward, image: Tensor, pool: Any) -> None:
        self.used = 0
        self._image = image.clone()
        self._captured = torch.cuda.CUDAGraph()
        reads = _Reads()
        stream = torch.cuda.Stream(image.device)
        stream.wait_stream(torch.cuda.current_stream(image.device))
        # Not torch.cuda.graph, which empties the allocator's cache. Other threads, such as a
        # loader's, may call CUDA during a capture.
        with torch.cuda.stream(stream):
            self._captured.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                with reads:
                    self._output = forward(self._image)
            finally:
                self._captured.capture_end()
        torch.cuda.current_stream(image.device).wait_stream(stream)
        self.pool = self._captured.pool()
        self._reads = reads.external  # a graph reads them by address

    def replay(self, image: Tensor) -> Tensor:
        """Return the output for an image of the captured shape."""
        self._image.copy_(image)
        self._captured.replay()
        return self._output.clone()


class _Reads(TorchDispatchMode):
    """Keeps the tensors that operations read and none of them made, such as a cached mask."""

    def __init__(self) -> None:
        super().__init__()
        self.external: dict[int, Tensor] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in _tensors((args, kwargs)):
            address = x.untyped_storage().data_ptr()
            if address not in self._made:
                self.external[address] = x
        result = func(*args, **(kwargs or {}))
        self._made |= {x.untyped_storage().data_ptr() for x in _tensors(result)}
        self._made -= self.external.keys()
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
