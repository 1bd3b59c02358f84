"""Noticing that another rank's process has ended, in whatever way."""

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
_PATIENCE = 60.0  # seconds for all ranks to connect; they have just met


def watch_ranks(
    store: dist.Store, rank: int, world_size: int, on_lost: Callable[[], None]
) -> Callable[[], None]:
    """Call ``on_lost`` once, from a thread, when the process of another rank ends unannounced.

    Every rank holds a TCP connection to rank 0; the kernel closes those of a process that ends, be
    it killed. NCCL does not notice such an end, nor does gloo always. When rank 0 has lost a rank,
    it ends too, and so all others notice.

    Args:
        store: Of the process group.
        rank: This process's number.
        world_size: How many there are.
        on_lost: Must end the process.

    Returns:
        A function that announces the end of this rank's part.
    """
    connections = _accept_all(store, world_size - 1) if rank == 0 else [_connect(store)]
    known = [connection for connection in connections if connection is not None]
    if len(known) < len(connections):
        warnings.warn(
            f"rank {rank} has no connection to watch other ranks by: should one of them end by an "
            "error, this is noticed after train.timeout only",
            stacklevel=2,
        )
    threading.Thread(target=_watch, args=(known, on_lost), daemon=True).start()

    def announce() -> None:
        for connection in known:
            with suppress(OSError):
                connection.sendall(b"\n")

    return announce


def _accept_all(store: dist.Store, count: int) -> list[socket.socket | None]:
    """Connections of ``count`` other ranks, None for each that did not come."""
    family = socket.getaddrinfo(os.environ["MASTER_ADDR"], None, type=socket.SOCK_STREAM)[0][0]
    token = uuid4().hex
    connections: list[socket.socket | None] = []
    with socket.create_server(("", 0), family=family, backlog=count) as server:
        server.settimeout(_PATIENCE)
        store.set("watch", f"{server.getsockname()[1]} {token}")
        while len(connections) < count:
            try:
                connection = server.accept()[0]
                connection.settimeout(_PATIENCE)
                if connection.recv(_TOKEN, socket.MSG_WAITALL).decode() == token:
                    connections.append(connection)
            except TimeoutError:
                break
    return connections + [None] * (count - len(connections))


def _connect(store: dist.Store) -> socket.socket | None:
    port, token = store.get("watch").decode().split()
    try:
        address = os.environ["MASTER_ADDR"], int(port)
        connection = socket.create_connection(address, timeout=_PATIENCE)
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
