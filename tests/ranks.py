"""Run a function on several gloo ranks of this machine."""

import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import nn

from segkit.core import distributed


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """``function(*args)`` on each rank; what each returned, in order of rank.

    ``function`` must be importable, and return something picklable.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Ranks are forked from a process of its own, which imports the packages once for all tests.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torchvision", "pytest", "segkit.train"])
    results = context.SimpleQueue()
    processes = mp.start_processes(
        _one_rank, (function, world_size, port, args, results, dict(os.environ)),
        nprocs=world_size, start_method="forkserver", join=False,
    )  # fmt: skip
    by_rank: dict[int, Any] = {}
    while len(by_rank) < world_size:
        if results.empty():
            processes.join(timeout=0.05)  # raises what a rank raised
        else:
            by_rank |= [results.get()]
    while not processes.join():
        pass
    return [by_rank[rank] for rank in range(world_size)]


def share_of_the_way(start: nn.Module, state: Mapping, other: Mapping) -> float:
    """Return the distance of two trainings from ``start``, relative to that of the first.

    Twenty steps of fp32 leave 5e-4 on any processor, in one process and in two. The mean of the
    ranks' own Dice losses, in place of the loss of the whole batch, leaves 3e-2.
    """
    begin = {name: parameter.detach() for name, parameter in start.named_parameters()}
    come = torch.cat([(state[name] - begin[name]).flatten() for name in begin])
    apart = torch.cat([(state[name] - other[name]).flatten() for name in begin])
    return float(apart.norm() / come.norm())


def _one_rank(
    rank: int,
    function: Callable[..., Any],
    world_size: int,
    port: int,
    args: tuple,
    results: Any,
    environment: Mapping[str, str],
) -> None:
    os.environ |= environment
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with distributed.session("cpu"):
        results.put((rank, function(*args)))
