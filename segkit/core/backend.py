"""PyTorch's deterministic algorithms, cuDNN's autotuning, detection of an export or a CPU."""

import os
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
