"""Batches have the same images in the same order, with any number of workers and ranks."""

import gc
import multiprocessing
import os
import resource
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from segkit.augment import Pipeline
from segkit.core.errors import ConfigError, DataError, explain
from segkit.data import loader
from segkit.data.cache import CachedSource
from segkit.data.loader import EvalBatches, TrainImages, TrainOrder, train_batches
from segkit.data.source import Fault

CPU = torch.device("cpu")


class Noise:
    """A source of random images; every third image is larger."""

    classes = ("a", "b", "c")
    labelled = True
    faults: tuple[Fault, ...] = ()
    names = tuple(f"{i}.png" for i in range(11))

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        return Path(self.names[i])

    def size(self, i: int) -> tuple[int, int]:
        return (20, 24) if i % 3 == 0 else (16, 18)

    def image(self, i: int) -> Tensor:
        if i == self.broken:
            raise DataError(f"{self.names[i]} is broken")
        values = np.random.default_rng(i).integers(0, 256, (3, *self.size(i)), np.uint8)
        return torch.from_numpy(values)

    def mask(self, i: int) -> Tensor:
        return (self.image(i)[0] % 3).to(torch.uint8)

    def label_digest(self, i: int) -> str:
        return str(i)


def pipeline() -> Pipeline:
    operations = ["cutmix", "hflip", {"name": "crop", "size": [12, 12]}, "photometric", "noise"]
    return Pipeline(operations, size=None, mean=(0.5,) * 3, std=(0.2,) * 3)


def batches(
    workers: int = 0,
    start_step: int = 0,
    accumulate: int = 1,
    broken: int | None = None,
    render: bool = True,
    source: Any = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    indices = list(range(11))
    images = TrainImages(source or Noise(broken), indices, pipeline(), seed=3, render=render)
    order = TrainOrder(
        indices, epochs=3, batch_size=4, accumulate=accumulate, seed=3, start_step=start_step
    )
    pairs = train_batches(images, order, workers=workers, device=CPU)
    return [(image.numpy(), mask.numpy()) for image, mask in pairs]


def joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> bytes:
    return b"".join(image.tobytes() for image, _ in parts) + b"".join(
        mask.tobytes() for _, mask in parts
    )


def test_workers_accumulation_and_restarts_change_no_byte() -> None:
    whole = batches()
    assert len(whole) == 6
    assert joined(batches(workers=2)) == joined(whole)
    assert joined(batches(start_step=4)) == joined(whole[4:])
    assert joined(batches(accumulate=2)) == joined(whole)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_may_be_forked_or_spawned(start: str) -> None:
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {start}")
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(start, force=True)
    try:
        assert joined(batches(workers=2)) == joined(batches())
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_rendering_by_batch_where_the_model_is_equals_the_workers(workers: int) -> None:
    for rendered, planned in zip(batches(), batches(workers=workers, render=False), strict=True):
        np.testing.assert_allclose(rendered[0], planned[0], atol=1e-3, rtol=0)
        assert np.array_equal(rendered[1], planned[1])


def test_the_cache_changes_no_byte(tmp_path: Path) -> None:
    class Stored(Noise):
        def path(self, i: int) -> Path:
            return tmp_path / self.names[i]

    for i in range(11):
        (tmp_path / Stored.names[i]).write_bytes(bytes([i]))
    kept = CachedSource(Stored(), tmp_path / "cache", limit=1e6)
    assert len(list((tmp_path / "cache").glob("*/*"))) == 11
    assert joined(batches(source=kept)) == joined(batches())
    assert joined(batches(source=kept, workers=2)) == joined(batches())


def test_ranks_share_each_batch() -> None:
    whole = batches()
    first, second = run_ranks(batches, 2)
    for (images, masks), left, right in zip(whole, first, second, strict=True):
        assert np.array_equal(images, np.concatenate([left[0], right[0]]))
        assert np.array_equal(masks, np.concatenate([left[1], right[1]]))


def test_an_epoch_uses_an_image_at_most_once_and_epochs_differ() -> None:
    order = TrainOrder(list(range(10, 21)), epochs=2, batch_size=4, accumulate=1, seed=0)
    first, second = (
        [index for step in range(epoch * 2, epoch * 2 + 2) for _, index in order.batch(step)]
        for epoch in range(2)
    )
    assert len(set(first)) == len(set(second)) == 8
    assert set(first) <= set(range(10, 21))
    assert first != second


def test_batches_that_cannot_be_are_named() -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size: is 4, more than the 3"):
        TrainOrder([1, 2, 3], epochs=1, batch_size=4, accumulate=1, seed=0)
    with pytest.raises(ConfigError, match=r"train\.batch_size: 4 images cannot be divided"):
        TrainOrder(list(range(9)), epochs=1, batch_size=4, accumulate=3, seed=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_sentence(workers: int) -> None:
    with pytest.raises(DataError, match=r"^5\.png is broken$"):
        batches(workers=workers, broken=5)


class SmallSharedMemory(Noise):
    """In a worker, shared memory takes only tiny tensors."""

    def image(self, i: int) -> Tensor:
        if multiprocessing.parent_process() is not None:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        return super().image(i)


@pytest.mark.parametrize("render", [True, False])
def test_too_little_shared_memory_is_one_sentence(render: bool) -> None:
    with pytest.raises(DataError, match=r"shared memory .*; lower data\.workers"):
        batches(workers=1, source=SmallSharedMemory(), render=render)
    with pytest.raises(DataError, match=r"shared memory .*; lower data\.workers"):
        list(EvalBatches(SmallSharedMemory(), range(3), labels=True, workers=1))


def test_a_broken_image_is_in_no_cycle() -> None:
    """A reference cycle would keep loaders and workers alive."""

    class Held:
        pass

    def fail() -> weakref.ref:
        held = Held()
        with pytest.raises(DataError):
            list(EvalBatches(Noise(5), range(11), labels=True))
        return weakref.ref(held)

    gc.disable()
    try:
        assert fail()() is None
    finally:
        gc.enable()


def test_a_script_ends_by_an_error_while_it_holds_a_loader() -> None:
    """At exit, Python joins workers, which ignore SIGTERM."""
    code = (
        "import sys, torch; sys.path[:0] = sys.argv[1:]; from test_loader import Noise; "
        "from segkit.data.loader import EvalBatches; "
        "kept = iter(EvalBatches(Noise(), range(11), labels=True, workers=2)); "
        "next(kept); raise KeyError('mine')"
    )
    here = Path(__file__).parent
    shown = subprocess.run(
        [sys.executable, "-c", code, str(here), str(here.parent)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert shown.returncode == 1
    assert shown.stderr.splitlines()[-1] == "KeyError: 'mine'"


@pytest.mark.parametrize("render", [True, False])
def test_images_of_several_sizes_are_named(render: bool) -> None:
    plain = Pipeline([], size=None, mean=(0.5,) * 3, std=(0.2,) * 3)
    images = TrainImages(Noise(), range(11), plain, seed=0, render=render)
    order = TrainOrder(range(11), epochs=1, batch_size=8, accumulate=1, seed=0)
    with pytest.raises(DataError, match=r"augment\.size"):
        next(train_batches(images, order, workers=0, device=CPU))


def evaluated(batch_size: int = 1) -> list[int]:
    indices = []
    for batch in EvalBatches(Noise(), range(11), labels=True, batch_size=batch_size):
        assert batch.masks is not None
        assert len(batch.indices) == len(batch.images) == len(batch.masks) <= batch_size
        indices += batch.indices
    return indices


def test_every_image_is_evaluated_once() -> None:
    assert evaluated() == list(range(11))
    assert evaluated(batch_size=4) == list(range(11))
    shares = run_ranks(evaluated, 3)
    assert sorted(index for share in shares for index in share) == list(range(11))


def test_a_share_of_extra_images_is_drawn_anew_each_epoch() -> None:
    order = TrainOrder(
        range(6), epochs=4, batch_size=2, accumulate=1, seed=0, extra=range(6, 14), extra_share=0.5
    )
    assert order.steps_per_epoch == 5
    epochs = []
    for epoch in range(4):
        steps = range(epoch * 5, epoch * 5 + 5)
        drawn = sorted(index for step in steps for _, index in order.batch(step))
        assert drawn[:6] == [0, 1, 2, 3, 4, 5]
        assert len(set(drawn)) == 10
        epochs.append(tuple(drawn[6:]))
    assert len(set(epochs)) > 1
    plain = TrainOrder(range(6), epochs=1, batch_size=2, accumulate=1, seed=0)
    none = TrainOrder(
        range(6), epochs=1, batch_size=2, accumulate=1, seed=0, extra=range(6, 14), extra_share=0
    )
    assert [plain.batch(step) for step in range(3)] == [none.batch(step) for step in range(3)]


def test_rare_images_are_drawn_more_often() -> None:
    repeats = (1.0, 1.0, 1.5, 4.0)
    order = TrainOrder(
        range(10, 14), epochs=2000, batch_size=4, accumulate=1, seed=0, repeats=repeats
    )
    keys = [key for step in range(order.steps) for key in order.batch(step)]
    assert len(set(keys)) == len(keys)  # copies are augmented anew
    assert all(len({index for _, index in order.batch(step)}) <= 4 for step in range(5))
    drawn = np.bincount([index - 10 for _, index in keys], minlength=4) / order.steps
    # a pool has 7 or 8 images, each with probability 1/2, of which 4 are drawn
    expected = [(4 / 7 + 4 / 8) / 2] * 2 + [(4 / 7 + 2 * 4 / 8) / 2, (4 * 4 / 7 + 4 * 4 / 8) / 2]
    np.testing.assert_allclose(drawn, expected, atol=0.06)
    again = TrainOrder(
        range(10, 14), epochs=5, batch_size=4, accumulate=1, seed=0, repeats=repeats, start_step=3
    )
    assert again.batch(3) == order.batch(3)  # whatever the number of epochs, as a resumed run needs


def test_equal_repeats_are_each_image_once() -> None:
    order = TrainOrder(range(6), epochs=3, batch_size=6, accumulate=1, seed=1, repeats=(1.0,) * 6)
    for step in range(3):
        assert sorted(order.batch(step)) == [(step, index) for index in range(6)]


class CutOff:
    """A loader whose connection to a worker ends before torch reports the worker's end."""

    num_workers = 0
    error: Exception
    _workers: tuple[Any, ...] = ()

    def __init__(self, *_: Any, **options: Any) -> None:
        pass

    def __iter__(self) -> "CutOff":
        return self

    def __next__(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "reset")])
def test_a_connection_that_ends_with_its_worker_is_a_killed_worker(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    worker = multiprocessing.get_context("fork").Process(target=os._exit, args=(1,))
    worker.start()
    worker.join()
    monkeypatch.setattr(loader, "DataLoader", CutOff)
    monkeypatch.setattr(CutOff, "error", error, raising=False)
    with pytest.raises(type(error)):  # no worker ended: a bug
        list(EvalBatches(Noise(), [0], labels=False))
    monkeypatch.setattr(CutOff, "_workers", (worker,))
    with pytest.raises(RuntimeError, match=rf"DataLoader worker \(pid\(s\) {worker.pid}\)") as info:
        list(EvalBatches(Noise(), [0], labels=False))
    assert "lower data.workers" in (explain(info.value) or "")
