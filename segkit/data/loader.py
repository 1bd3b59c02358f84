"""Batches for training and evaluation; their images and order are a function of seed and step."""

import atexit
import functools
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from multiprocessing import connection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from segkit.augment import Pipeline, Plan, generator
from segkit.core.distributed import rank, world_size
from segkit.core.errors import ConfigError, DataError, reason
from segkit.core.labels import IGNORE
from segkit.data.memo import MEMO, on_threads

CPU = torch.device("cpu")

GPU_BATCH, GPU_PIXELS = 8, 2**21
"""Largest number of images, and of pixels, that a GPU predicts together by default."""

COPY = 2**24
"""Added to the epoch in the keys of further copies of an image, so that they are augmented anew."""

_ORDER = 2**32 - 1  # in place of a sample's index: a random stream that no image uses


@dataclass(frozen=True)
class TrainOrder(Sampler):
    """Sampler of training images, independent of the number of ranks, workers and restarts.

    Each epoch has a different permutation; images beyond the last full batch are not used in that
    epoch. A step's batch is divided into ``accumulate`` micro-batches, and each of
    these among the ranks.

    Args:
        indices: Images that are in every epoch.
        epochs: Number of epochs.
        batch_size: Images per step, over all ranks.
        accumulate: Number of micro-batches of a batch (gradient accumulation).
        seed: Seed of the permutations.
        start_step: The first step.
        extra: Images of which each epoch draws a different subset.
        extra_share: Size of that subset as a share of ``extra``.
        repeats: How often each of ``indices`` stands in a pool that an epoch draws as many images
            from as there are, without putting back; default: each once. See
            :func:`segkit.data.folds.repeat_factors`.

    Yields:
        For each micro-batch of each step, this rank's list of (epoch, image index).
    """

    indices: Sequence[int]
    epochs: int
    batch_size: int
    accumulate: int
    seed: int
    start_step: int = 0
    extra: Sequence[int] = ()
    extra_share: float = 1.0
    repeats: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        parts = self.accumulate * world_size()
        if self.batch_size % parts:
            raise ConfigError(
                f"train.batch_size: {self.batch_size} images cannot be divided over "
                f"{world_size()} ranks times train.accumulate={self.accumulate}; "
                f"choose a multiple of {parts}"
            )
        if self._images < self.batch_size:
            raise ConfigError(
                f"train.batch_size: is {self.batch_size}, more than the {self._images} "
                "training images; choose a smaller one"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches per epoch."""
        return self._images // self.batch_size

    @property
    def _images(self) -> int:
        return len(self.indices) + round(len(self.extra) * self.extra_share)

    @property
    def steps(self) -> int:
        """Number of optimizer steps in all epochs."""
        return self.steps_per_epoch * self.epochs

    def __len__(self) -> int:
        return (self.steps - self.start_step) * self.accumulate

    def batch(self, step: int) -> list[tuple[int, int]]:
        """Return (epoch, image index) of all images of a step, over all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _permutation(self.seed, epoch, self._images)
        chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
        drawn = _permutation(self.seed, epoch, len(self.extra)) if self.extra else []
        own = len(self.indices)
        pool = _repeated(self.seed, epoch, self.repeats) if self.repeats else None
        batch = []
        for i in chosen:
            if i >= own:
                batch.append((epoch, self.extra[drawn[i - own]]))
            else:
                place, copy = pool[i] if pool else (i, 0)
                batch.append((epoch + copy * COPY, self.indices[place]))
        return batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // (self.accumulate * world_size())
        for step in range(self.start_step, self.steps):
            batch = self.batch(step)
            for part in range(self.accumulate):
                start = (part * world_size() + rank()) * share
                yield batch[start : start + share]


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> list[int]:
    return np.random.default_rng((seed, epoch, _ORDER)).permutation(count).tolist()


@functools.lru_cache(maxsize=4)
def _repeated(seed: int, epoch: int, repeats: tuple[float, ...]) -> list[tuple[int, int]]:
    """Return (place in ``repeats``, number of the copy) of an epoch's images, as many as places.

    A place stands ``repeats`` times in the pool on average: the fraction is rounded at random.
    """
    rng = np.random.default_rng((seed, epoch, _ORDER - 1))
    counts = np.floor(np.array(repeats) + rng.random(len(repeats))).astype(int)
    pool = [(place, copy) for place, count in enumerate(counts) for copy in range(count)]
    return [pool[i] for i in rng.permutation(len(pool))[: len(repeats)]]


Sample = tuple[Tensor, Tensor, Plan]
"""Image, mask, and their plan, rendered or not."""


class TrainImages(Dataset):
    """Augmented images and masks by (epoch, image index).

    Args:
        indices: The fold's training images, from which mixing operations draw.
        pipeline: Augmentation; all its results must have the same size.
        render: If false, image and mask are not rendered; their plan is to be rendered on the
            model's device.
    """

    def __init__(
        self,
        source: Any,
        indices: Sequence[int],
        pipeline: Pipeline,
        *,
        seed: int,
        render: bool = True,
    ) -> None:
        self.source, self.indices, self.pipeline = source, indices, pipeline
        self.seed, self.render = seed, render

    def __getitem__(self, key: tuple[int, int]) -> Sample | DataError:
        epoch, index = key
        rng = generator(self.seed, epoch, index)
        try:
            image, mask = self.source.image(index), self.source.mask(index)
            size = image.shape[1], image.shape[2]
            plan = self.pipeline.plan(size, rng, mask, others=self._draw)
        except DataError as error:
            return DataError(*error.args)  # raised later, without references to frames
        if self.render:
            image, mask = self.pipeline.render_one(image, mask, plan)
        return image, mask, plan

    def _draw(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        index = self.indices[int(rng.integers(len(self.indices)))]
        return self.source.image(index), self.source.mask(index)


@dataclass
class EvalBatch:
    """Unprocessed images of equal size, or padded to it at the bottom and the right.

    Args:
        indices: Indices of the images.
        images: Pixels of the images; padding repeats the last row and column.
        masks: Masks of the images, if requested; padding is 255.
        sizes: Height and width of each image without padding.
        left_out: Error message of each image that cannot be read, by its index.

    Shape:
        images: (B, 3, H, W) uint8; masks: (B, H, W) uint8, or ``None`` without labels.
    """

    indices: list[int]
    images: Tensor
    masks: Tensor | None
    sizes: list[tuple[int, int]]
    left_out: dict[int, str] = field(default_factory=dict)

    def pin_memory(self) -> "EvalBatch":
        """Pin the tensors; called by DataLoader."""
        self.images = self.images.pin_memory()
        self.masks = None if self.masks is None else self.masks.pin_memory()
        return self


class EvalImages(Dataset):
    """Images and masks by index, as (index, image, mask); without ``labels`` the mask is None.

    For an image that cannot be read, (index, error message) if ``skip``, else a DataError.
    """

    def __init__(self, source: Any, *, labels: bool, skip: bool = False) -> None:
        self.source, self.labels, self.skip = source, labels, skip

    def __getitem__(
        self, index: int
    ) -> tuple[int, Tensor, Tensor | None] | tuple[int, str] | DataError:
        try:
            mask = self.source.mask(index) if self.labels else None
            return index, self.source.image(index), mask
        except DataError as error:
            return (index, str(error)) if self.skip else DataError(*error.args)


def train_batches(
    images: TrainImages, order: TrainOrder, *, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images (B, 3, H, W), masks (B, H, W)) on ``device`` until the end of training."""
    loader = DataLoader(
        images,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=functools.partial(
            _sendable, functools.partial(_stack_train, render=images.render)
        ),
        worker_init_fn=_start_worker,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )

    def load(batch: Any) -> tuple[Tensor, Tensor]:
        if images.render:
            return batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)
        pixels, masks = (
            [tensor.to(device, non_blocking=True) for tensor in part] for part in batch[:2]
        )
        return images.pipeline.render(pixels, masks, batch[2])

    return _prefetch(_valid(_start(loader)), load, device)


class EvalBatches:
    """Batches of this rank's share of some images, on the CPU; can be iterated several times.

    Over all ranks, each image is in one batch. Worker processes are kept between iterations.

    Args:
        indices: Images over all ranks.
        batch_size: Number of images in a batch, which are of equal size; default: on a GPU up to
            :data:`GPU_BATCH` of at most :data:`GPU_PIXELS` in all, else 1.
        pad: Images are padded so that their sides are multiples of this, and are sorted by size, so
            that more of them share a batch.
        device: Device of the model; for CUDA the batches are in pinned memory.
        left_out: Filled with an error message for each image that cannot be read, by index; without
            it, the first such image raises a DataError.
    """

    def __init__(
        self,
        source: Any,
        indices: Sequence[int],
        *,
        labels: bool,
        batch_size: int | None = None,
        workers: int = 0,
        pad: int | None = None,
        device: torch.device = CPU,
        left_out: dict[int, str] | None = None,
    ) -> None:
        self.source, self.indices, self._left_out = source, indices, left_out
        size = functools.partial(_padded, source, pad or 1)
        if batch_size is None and device.type == "cpu":
            batch_size = 1
        sort = pad is not None and batch_size != 1
        self.share = (sorted(indices, key=size) if sort else indices)[rank() :: world_size()]
        self._loader = DataLoader(
            EvalImages(source, labels=labels, skip=left_out is not None),
            batch_sampler=_same_size(self.share, size, batch_size),
            num_workers=workers,
            collate_fn=functools.partial(_sendable, functools.partial(_stack_eval, pad=pad or 1)),
            worker_init_fn=_start_worker,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
        )
        self._started: Iterator[Any] | None = None

    def start_workers(self) -> None:
        """Start the worker processes, which read the first batches; the first iteration waits less.

        Starting eight of them, which import torch, took 5 s.
        """
        if self._loader.num_workers:
            self._started = _start(self._loader)

    def __iter__(self) -> Iterator[EvalBatch]:
        started, self._started = self._started or _start(self._loader), None
        for batch in _valid(started):
            if self._left_out is not None:
                self._left_out.update(batch.left_out)
            if batch.indices:
                yield batch


def digests(source: Any, indices: Sequence[int]) -> list[str]:
    """Return a short digest of each image file; checkpoints store those of their training images.

    Raises:
        DataError: A file cannot be read.
    """

    def digest(index: int) -> str:
        path = source.path(index)
        try:
            return MEMO.digest(path)[:16]
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({reason(error)}); add the image or remove its entry"
            ) from error

    return on_threads(digest, indices, "reading images")


def _padded(source: Any, pad: int, index: int) -> tuple[int, int]:
    """Return height and width of an image, rounded up to multiples of ``pad``."""
    height, width = source.size(index)
    return -(-height // pad) * pad, -(-width // pad) * pad


def _same_size(
    indices: Sequence[int], size: Callable[[int], tuple[int, int]], batch_size: int | None
) -> list[list[int]]:
    """Divide images into batches of successive ones of equal size."""
    if batch_size == 1:  # sizes may have to be read from files
        return [[index] for index in indices]
    batches = []
    for (height, width), group in groupby(indices, size):
        count = batch_size or max(1, min(GPU_BATCH, GPU_PIXELS // (height * width)))
        images = list(group)
        batches += [images[start : start + count] for start in range(0, len(images), count)]
    return batches


def _start_worker(worker: int) -> None:
    """Make a worker ignore SIGINT and SIGTERM, and end when its parent process ends.

    Such signals go to the whole process group, but a training run that receives SIGTERM still needs
    its workers for the current step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # The thread that sends tensors prints with this hook when its connection is closed, for example
    # because another worker was killed; the main process reports that itself.
    sys.excepthook = lambda *_: None
    threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


_workers: weakref.WeakSet[Any] = weakref.WeakSet()
"""Worker processes of this process."""


@atexit.register
def _kill_workers() -> None:
    """Kill remaining workers: at exit, Python sends them SIGTERM, which they ignore, and waits."""
    if _workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the kills
    for worker in _workers:
        worker.kill()


def _sendable(collate: Callable[[list], Any], samples: list) -> Any:
    """Return a batch, or the first error in it; in a worker, move tensors to shared memory.

    PyTorch would do so in the thread that sends the batch, where an error, such as a full /dev/shm,
    loses the batch: the main process would wait for it forever.
    """
    error = next((sample for sample in samples if isinstance(sample, DataError)), None)
    batch = error or collate(samples)
    if get_worker_info() is None or isinstance(batch, DataError):
        return batch
    groups = (batch.images, batch.masks) if isinstance(batch, EvalBatch) else batch
    try:
        for group in groups:
            for tensor in group if isinstance(group, tuple) else (group,):
                if isinstance(tensor, Tensor):
                    tensor.share_memory_()
    except RuntimeError as error:
        return DataError(
            f"a batch does not fit in shared memory ({error}); lower data.workers or "
            "train.batch_size, or give the process more shared memory (/dev/shm)"
        )
    return batch


def _stack_train(samples: list[Sample], *, render: bool) -> tuple | DataError:
    """Return stacked images and masks, or without ``render`` lists of these and of the plans.

    Results of different sizes are an error.
    """
    images, masks, plans = zip(*samples, strict=True)
    if len({plan.size for plan in plans}) > 1:
        return DataError(
            "training images end the augmentation with different sizes; "
            "set augment.size, or end augment.train with a crop"
        )
    return (torch.stack(images), torch.stack(masks)) if render else (images, masks, plans)


def _stack_eval(samples: list, *, pad: int) -> EvalBatch:
    left_out = dict(sample for sample in samples if len(sample) == 2)
    valid = [sample for sample in samples if len(sample) == 3]
    if not valid:
        return EvalBatch([], torch.empty(0), None, [], left_out)
    indices, photographs, masks = zip(*valid, strict=True)
    sizes = [(image.shape[1], image.shape[2]) for image in photographs]
    images = torch.stack([_pad(image, pad) for image in photographs])
    if masks[0] is None:
        return EvalBatch(list(indices), images, None, sizes, left_out)
    height, width = images.shape[-2:]
    padded = [
        functional.pad(mask, (0, width - mask.shape[1], 0, height - mask.shape[0]), value=IGNORE)
        for mask in masks
    ]
    return EvalBatch(list(indices), images, torch.stack(padded), sizes, left_out)


def _pad(image: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until the sides are multiples of ``multiple``."""
    height, width = image.shape[-2:]
    if height % multiple == 0 and width % multiple == 0:
        return image
    rows, columns = (
        torch.arange(-(-side // multiple) * multiple).clamp(max=side - 1)
        for side in (height, width)
    )
    return image[:, rows[:, None], columns]


def _start(loader: DataLoader) -> Iterator[Any]:
    """Start iterating a loader; its workers are killed at exit."""
    batches = iter(loader)
    _workers.update(getattr(batches, "_workers", ()))
    return batches


def _valid(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches; raise a DataError that is returned in place of a batch.

    A worker's end is always torch's RuntimeError: the connection to it may notice before torch.
    """
    try:
        for batch in batches:
            if isinstance(batch, DataError):
                # A new exception: raising one that a local variable refers to creates a reference
                # cycle, which would keep the loaders of all enclosing frames, and their workers,
                # alive.
                raise DataError(*batch.args)
            yield batch
    except (EOFError, ConnectionError):
        workers = {worker.sentinel: worker.pid for worker in getattr(batches, "_workers", ())}
        ended = connection.wait(list(workers), timeout=1)
        if not ended:
            raise
        pids = ", ".join(str(workers[sentinel]) for sentinel in ended)
        raise RuntimeError(f"DataLoader worker (pid(s) {pids}) exited unexpectedly") from None


def _prefetch(
    batches: Iterator[Any], load: Callable[[Any], tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches that ``load`` moves to a device; on CUDA, one batch ahead on a side stream."""
    if device.type != "cuda":
        yield from map(load, batches)
        return
    side = torch.cuda.Stream(device)
    loaded = None
    for batch in batches:
        with torch.cuda.stream(side):
            loading = load(batch)
        if loaded is not None:
            yield loaded
        torch.cuda.current_stream(device).wait_stream(side)
        for tensor in loading:
            tensor.record_stream(torch.cuda.current_stream(device))
        loaded = loading
    if loaded is not None:
        yield loaded
