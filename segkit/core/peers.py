"""Detect that the process of another rank ended, for any reason."""

import os
import selectors
import socket
import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from uuid import uuid4

import torch.distributed as dist

_TOKEN = 32
_TIMEOUT = 60.0  # seconds for all ranks to connect


def watch_ranks(
    store: dist.Store, rank: int, world_size: int, on_lost: Callable[[], None]
) -> Callable[[], None]:
    """Call ``on_lost`` once, from a thread, when the process of another rank ends unannounced.

    Every rank has a TCP connection to rank 0, which the kernel closes when a process ends, also
    when it is killed. NCCL does not detect such an end, and gloo not always. When rank 0 loses a
    rank, it ends too, so that all other ranks detect it: ``on_lost`` must end the process.

    Returns:
        A function that announces the regular end of this rank.
    """
    connections = _accept_all(store, world_size - 1) if rank == 0 else [_connect(store)]
    known = [connection for connection in connections if connection is not None]
    if len(known) < len(connections):
        warnings.warn(
            f"rank {rank} could not connect to watch other ranks: if one of them ends with an "
            "error, this is detected only after train.timeout",
            stacklevel=2,
        )
    threading.Thread(target=_watch, args=(known, on_lost), daemon=True).start()

    def announce() -> None:
        for connection in known:
            with suppress(OSError):
                connection.sendall(b"\n")

    return announce


def _accept_all(store: dist.Store, count: int) -> list[socket.socket | None]:
    """Return connections of ``count`` other ranks, None for each that did not connect."""
    family = socket.getaddrinfo(os.environ["MASTER_ADDR"], None, type=socket.SOCK_STREAM)[0][0]
    token = uuid4().hex
    connections: list[socket.socket | None] = []
    with socket.create_server(("", 0), family=family, backlog=count) as server:
        server.settimeout(_TIMEOUT)
        store.set("watch", f"{server.getsockname()[1]} {token}")
        while len(connections) < count:
            try:
                connection = server.accept()[0]
                connection.settimeout(_TIMEOUT)
                if connection.recv(_TOKEN, socket.MSG_WAITALL).decode() == token:
                    connections.append(connection)
            except TimeoutError:
                break
    return connections + [None] * (count - len(connections))


def _connect(store: dist.Store) -> socket.socket | None:
    port, token = store.get("watch").decode().split()
    try:
        address = os.environ["MASTER_ADDR"], int(port)
        connection = socket.create_connection(address, timeout=_TIMEOUT)
        connection.sendall(token.encode())
    except OSError:
        return None
    return connection


def _watch(connections: Iterable[socket.socket], on_lost: Callable[[], None]) -> None:
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, data=connection)
        while selector.get_map():
            for key, _ in selector.select():
                try:
                    announced = key.data.recv(1) != b""
                except OSError:
                    announced = False
                if not announced:
                    on_lost()
                    return
                selector.unregister(key.data)
