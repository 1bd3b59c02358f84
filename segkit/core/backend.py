"""PyTorch's deterministic algorithms, cuDNN's autotuning, the CPU's memory, kinds of devices."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def set_deterministic(enabled: bool) -> None:
    """Turn PyTorch's deterministic algorithms on or off.

    Must be called before CUDA is used: cuBLAS reads its environment variable when it starts.
    """
    torch.use_deterministic_algorithms(enabled)
    if enabled:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


def keep_freed_memory() -> None:
    """Let this process keep up to 1 GiB of freed memory for its next tensors; glibc only.

    By default glibc returns most of it to the system in every step, and the next step waits for the
    same pages again. Blocks of more than 32 MiB are returned as before. A user's own setting of
    glibc, in an environment variable, stays.

    Gain: training steps on two CPU cores take 0.89 to 0.97 of the time, and 1.03 of the memory at
    most (``python -m benchmarks.allocator``).
    """
    set_by_user = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if set_by_user or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


@contextmanager
def cudnn_autotuning(enabled: bool) -> Iterator[None]:
    """Turn cuDNN's autotuning on or off within the block.

    Autotuning times every algorithm once per new shape, so it is faster where shapes repeat (crops)
    and slower for images of many sizes. It is always off with deterministic algorithms, since the
    fastest algorithm differs from run to run.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled and not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def on_cpu(x: Tensor) -> bool:
    """Return True if a tensor is in the memory of the CPU."""
    return x.device.type == "cpu"


def is_exporting() -> bool:
    """Return whether a model is being exported.

    ``torch.compiler.is_exporting`` alone is also true within ``torch.compile`` before torch 2.14.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
