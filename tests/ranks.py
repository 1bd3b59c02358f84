"""Run a function on several gloo ranks of this machine."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from segkit import distributed


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """``function(*args)`` on each rank; what each returned, in order of rank.

    ``function`` must be importable, and return something picklable.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    processes = mp.start_processes(
        _one_rank, (function, world_size, port, args, results), nprocs=world_size,
        start_method="spawn", join=False,
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


def _one_rank(
    rank: int, function: Callable[..., Any], world_size: int, port: int, args: tuple, results: Any
) -> None:
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
