"""Settings of PyTorch's CUDA libraries: deterministic algorithms and cuDNN's autotuning."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def set_deterministic(enabled: bool) -> None:
    """Make PyTorch refuse operations whose result differs from run to run, or allow them.

    Call it before CUDA is used: cuBLAS reads its variable when it starts.
    """
    torch.use_deterministic_algorithms(enabled)
    if enabled:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


@contextmanager
def cudnn_autotuning(enabled: bool) -> Iterator[None]:
    """A context in which cuDNN times its algorithms for each new shape, or does not.

    That pays where shapes repeat, as those of crops do. For images of any size it is slower: each
    new shape is timed again. Deterministic algorithms turn it off, since the fastest differs from
    run to run.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled and not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
