"""Distributed training: the process group, collectives, progress on rank 0."""

import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from segkit.core.errors import SegkitError, shorten
from segkit.core.peers import watch_ranks


def rank() -> int:
    """Return this process's rank, 0 to ``world_size() - 1``."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Return True if this is rank 0, which writes files and prints."""
    return rank() == 0


@contextmanager
def session(
    device: str | None = None, timeout: float = 30.0, *, on_lost: Callable[[], None] | None = None
) -> Iterator[torch.device]:
    """Open torchrun's process group (NCCL on CUDA, else gloo) and yield this rank's device.

    Args:
        device: A name of torch's, such as ``"cpu"``, ``"cuda:1"`` or ``"mps"``; default CUDA if
            available. Without an index, each rank of a machine gets its own device; with an index,
            all ranks share the device (through gloo; NCCL does not support that).
        timeout: Minutes that a rank waits for the others in a collective before it raises an error.
        on_lost: Called from a thread when the process of another rank ends before its session
            does; see :func:`segkit.core.peers.watch_ranks`.

    Raises:
        SegkitError: The device does not exist, or not all ranks connected in time.
    """
    here = _choose_device(device)
    if here.type != "cpu":
        torch.accelerator.set_device_index(here.index)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield here
        return
    shared = device is not None and ":" in device and int(os.environ["LOCAL_WORLD_SIZE"]) > 1
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = _unused_namespace(store, rank, world_size, timeout)
    dist.init_process_group(
        "gloo" if shared else dist.get_default_backend_for_device(here),
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=timeout),
    )
    announce_end = watch_ranks(store, rank, world_size, on_lost) if on_lost else None
    failed = False
    try:
        yield here
    except BaseException as error:
        failed = not isinstance(error, SystemExit)  # which all ranks agree on
        raise
    finally:
        if announce_end and not failed:
            announce_end()
        if not failed:  # after an error, it would wait for the other ranks
            dist.destroy_process_group()


def _choose_device(name: str | None) -> torch.device:
    """Return this rank's device."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if accelerator is None else accelerator.type
    count = torch.accelerator.device_count()
    known = "cpu" if accelerator is None else f"cpu, {kind}, {kind}:0 to {kind}:{count - 1}"
    try:
        device = torch.device(name)
    except RuntimeError:  # not a device name of torch
        device = torch.device("meta")
    if device.type not in ("cpu", kind):
        raise SegkitError(
            f"device {shorten(name)}: does not exist here, with torch {torch.__version__}; "
            f"expected one of: {known}"
        )
    if device.type == "cpu":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
    if index >= count:
        raise SegkitError(
            f"device {kind}:{index}: does not exist here; expected one of: {known}, and with "
            f"torchrun at most {count} ranks on this machine"
        )
    return torch.device(kind, index)


def _unused_namespace(store: dist.Store, rank: int, world_size: int, timeout: float) -> dist.Store:
    """Return a namespace of torchrun's store that no earlier start of these ranks has used.

    torchrun keeps its store when it restarts ranks, so they would find the addresses of dead
    processes there. Therefore each process stores a unique token, rank 0 publishes the list of
    tokens, and the ranks count the confirmations of each list until all have confirmed the same.
    """
    store = dist.PrefixStore("segkit", store)
    store.set_timeout(timedelta(minutes=timeout))
    token, confirmed = uuid4().hex, set[str]()
    store.set(f"rank {rank}", token)
    deadline = time.monotonic() + 60 * timeout
    while time.monotonic() < deadline:
        if rank == 0:
            tokens = [store.get(f"rank {number}").decode() for number in range(world_size)]
            store.set("tokens", " ".join(tokens))
        tokens = store.get("tokens").decode().split()
        namespace = hashlib.sha256(" ".join(tokens).encode()).hexdigest()
        if len(tokens) == world_size and tokens[rank] == token and namespace not in confirmed:
            confirmed.add(namespace)
            store.add(namespace, 1)
        if namespace in confirmed and store.add(namespace, 0) == world_size:
            return dist.PrefixStore(namespace, store)
        time.sleep(0.01)
    raise SegkitError(
        f"not all {world_size} ranks connected within {timeout:g} minutes (train.timeout)"
    )


def barrier() -> None:
    """Wait until every rank has called this function."""
    if world_size() > 1:
        dist.barrier()


def all_reduce(x: Tensor, *, maximum: bool = False) -> Tensor:
    """Return ``x`` after it became the sum, or maximum, over the ranks; without gradient."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
    return x


def broadcast(value: Any) -> Any:
    """Return rank 0's ``value`` (a trusted, picklable object) on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Return every rank's ``value`` (a trusted, picklable object) on rank 0, ``[]`` elsewhere."""
    if world_size() == 1:
        return [value]
    boxes = [None] * world_size() if is_main() else None
    dist.gather_object(value, boxes, dst=0)
    return boxes or []


def share_buffers(model: nn.Module) -> None:
    """Broadcast rank 0's buffers; unsynchronized BatchNorm has different statistics per rank."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


class _SumForGlobalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * world_size()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of ``x`` over the ranks, for losses of sums over the global batch.

    Every rank gets the same loss value. Backward multiplies the gradient by the world size, so that
    DistributedDataParallel's mean over ranks is exactly the gradient of the global batch's loss.
    """
    return _SumForGlobalLoss.apply(x) if world_size() > 1 else x


class Progress:
    """Progress of a loop on rank 0: a bar on a terminal, otherwise lines; nothing if quiet.

    Args:
        iterable: Items to iterate over; ``None`` if the loop calls :meth:`update` itself.
        description: Name of the loop.
        total: Number of items; default the length of ``iterable``, if it has one.
        initial: Items already done, such as before a run was resumed.
        unit: Name of an item, in the singular.
        parts: Number of equal parts; a line is printed after each, and every minute.
        delay: Seconds at the beginning without lines, so that short loops print none.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        iterable: Iterable | None,
        description: str,
        *,
        total: int | None = None,
        initial: int = 0,
        unit: str = "item",
        parts: int = 10,
        delay: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._iterable, self._description, self._unit = iterable, description, unit
        self._total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self._initial, self._done, self._parts = initial, initial, parts
        self._delay, self._clock = delay, clock
        self._start = self._printed = clock()
        self._bar: tqdm | None = None
        self._hidden = logging.getLogger("segkit").level > logging.INFO or not is_main()
        if not self._hidden and sys.stderr.isatty():
            self._bar = tqdm(
                desc=description, total=self._total, initial=initial, unit=unit, delay=2,
                dynamic_ncols=True, leave=False,
            )  # fmt: skip

    def __iter__(self) -> Iterator[Any]:
        assert self._iterable is not None
        try:
            for item in self._iterable:
                yield item
                self.update()
        finally:
            self.close()

    def update(self, count: int = 1, note: Callable[[], str] | None = None) -> None:
        """Count items as done; ``note`` returns the text at the end of a bar or line."""
        before, self._done = self._done, self._done + count
        if self._hidden:
            return
        if self._bar is not None:
            if self._bar.update(count) and note:
                self._bar.set_postfix_str(note(), refresh=False)
            return
        now = self._clock()
        parts = [self._parts * done // (self._total or 1) for done in (before, self._done)]
        ends_part = self._total and parts[0] < parts[1]
        if now - self._start >= self._delay and (ends_part or now - self._printed >= 60):
            self._printed = now
            print(self._line(now - self._start, note), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, seconds: float, note: Callable[[], str] | None) -> str:
        rate = (self._done - self._initial) / max(seconds, 1e-9)
        of = f" of {self._total:,}" if self._total else ""
        units = self._unit + ("es" if self._unit.endswith("ch") else "s")
        fields = [f"{self._description}: {self._done:,}{of} {units}"]
        fields.append(f"{rate:{'.1f' if rate >= 10 else '.2g'}} {units}/s")
        if self._total:
            left = timedelta(seconds=round((self._total - self._done) / rate))
            ended = f"done in {timedelta(seconds=round(seconds))}"
            fields.append(ended if self._done == self._total else f"{left} left")
        return ", ".join([*fields, note()] if note else fields)
