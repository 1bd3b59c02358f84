"""Work that goes on beside the training: a thread, and copies of the state for it to write."""

import copy
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

PATIENCE = 5.0
"""Seconds that a job has to finish after an error elsewhere."""

_ALIGNMENT = 64


class Background:
    """A thread that runs one job at a time; a job's error is raised by the caller's next call.

    As a context, it waits for the last job: without limit at the regular end and at SystemExit, for
    :data:`PATIENCE` seconds after an error.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._job: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Run a job, after the job before it has finished."""
        self.wait()
        self._job = self._pool.submit(job)

    def check(self) -> None:
        """Raise the error of the last job if it has failed; does not wait."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the last job, and raise its error if it has failed."""
        job, self._job = self._job, None
        try:
            if job is not None:
                job.result()
        finally:
            del job  # the error refers to this frame: a cycle would keep all enclosing frames

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        regular = kind is None or issubclass(kind, SystemExit)
        if self._job is not None and not regular:
            wait([self._job], PATIENCE)
            self._job = None
        self._pool.shutdown(wait=False)
        self.wait()


class HostCopy:
    """Copies nested state to host memory.

    Tensors on a CUDA device are copied to pinned memory, in order with the device's other work and
    without waiting for it. The memory is kept for the next copy, which overwrites it.
    """

    def __init__(self) -> None:
        self._pinned = torch.empty(0, dtype=torch.uint8)

    def take(self, state: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
        """Begin to copy a state; return a function that waits for the copy and returns it.

        Tensors in nested dicts and lists are copied; all other values are used as they are.
        """
        self.reserve(state)
        on_cuda = [tensor for tensor in _tensors(state) if tensor.is_cuda]
        start = 0

        def copied(tensor: Tensor) -> Tensor:
            nonlocal start
            tensor = tensor.detach()
            if not tensor.is_cuda:
                return tensor.to("cpu", copy=True)
            place = self._place(tensor, start)
            start += _space(tensor)
            return place.copy_(tensor, non_blocking=True)

        copy = _replaced(state, copied)
        if not on_cuda:
            return lambda: copy
        done = torch.cuda.Event(blocking=True)
        done.record(torch.cuda.current_stream(on_cuda[0].device))

        def result() -> dict[str, Any]:
            done.synchronize()
            return copy

        return result

    def reserve(self, state: Mapping[str, Any]) -> None:
        """Allocate the memory for a state; pinning a gigabyte takes some tenths of a second."""
        size = sum(_space(tensor) for tensor in _tensors(state) if tensor.is_cuda)
        if self._pinned.numel() < size:
            del self._pinned
            self._pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def _place(self, tensor: Tensor, start: int) -> Tensor:
        """Return pinned memory of a tensor's layout, as a storage of its own."""
        layout = torch.empty_like(tensor, device="meta")
        if not tensor.numel():
            return torch.empty_like(tensor, device="cpu")
        flat = torch.frombuffer(
            self._pinned.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=start
        )
        return flat.as_strided(layout.shape, layout.stride())


def _space(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


def _replaced(value: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """Return nested values with every tensor replaced; the containers are copied."""
    if isinstance(value, Tensor):
        return replace(value)
    if isinstance(value, dict):
        new = copy.copy(value)  # with the attributes of a state dict
        new.update((key, _replaced(inner, replace)) for key, inner in value.items())
        return new
    if isinstance(value, list | tuple):
        return type(value)(_replaced(inner, replace) for inner in value)
    return value
