"""Evaluation: each pixel counts once, whatever the batches, their padding and the ranks."""

from collections.abc import Callable, Sequence
from multiprocessing import active_children

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from segkit.data.loader import EvalBatches
from segkit.inference.predictor import Predictor
from segkit.training import evaluate as module
from segkit.training.evaluate import Evaluation, evaluate
from segkit.training.metrics import matrices_of, pixel_counts

SIZES = [(40, 50), (64, 33), (40, 50), (37, 50), (64, 64), (40, 49), (64, 64), (40, 50), (33, 64)]
CPU = torch.device("cpu")


class Mixed:
    """Images of several sizes, with some ignored pixels."""

    classes = ("ground", "can", "bag")
    names = tuple(f"{number}.png" for number in range(len(SIZES)))
    labelled = True
    faults = ()

    def __len__(self) -> int:
        return len(SIZES)

    def size(self, i: int) -> tuple[int, int]:
        return SIZES[i]

    def image(self, i: int) -> Tensor:
        rng = torch.Generator().manual_seed(i)
        return torch.randint(256, (3, *SIZES[i]), generator=rng, dtype=torch.uint8)

    def mask(self, i: int) -> Tensor:
        mask = self.image(i)[0] % 3
        mask[:3] = 255
        return mask


def predictor(pad: int | None) -> Predictor:
    """A predictor whose masks depend on what lies around each pixel."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 7, padding=3), nn.ReLU(), nn.Conv2d(8, 3, 7, padding=3)]
    return Predictor(nn.Sequential(*layers), pad=pad)


def evaluated(
    batch_size: int, pad: int | None, callbacks: Sequence[Callable] = (), workers: int = 0
) -> Evaluation:
    batches = EvalBatches(
        Mixed(), range(9), labels=True, batch_size=batch_size, pad=pad or 1, workers=workers
    )
    return evaluate(predictor(pad).mask, batches, device=CPU, callbacks=callbacks)


def expected(pad: int | None) -> Tensor:
    """Confusion matrices of the images predicted one at a time."""
    source, predict = Mixed(), predictor(pad)
    images = ((predict.mask(source.image(i)), source.mask(i)) for i in range(9))
    return torch.cat(
        [matrices_of(pixel_counts(mask[None], true[None], 3)) for mask, true in images]
    )


@pytest.mark.parametrize("pad", [None, 20, 32, 64])
@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_batches_and_padding_count_as_single_images(batch_size: int, pad: int | None) -> None:
    result, matrices = evaluated(batch_size, pad), expected(pad)
    assert torch.equal(result.matrix, matrices.sum(0))
    assert torch.equal(result.counts[:, :, 1], matrices.sum(2))
    assert torch.equal(result.counts[:, :, 0], matrices.diagonal(dim1=1, dim2=2))
    assert result.names == list(Mixed.names)


def test_padding_lets_images_of_different_sizes_share_batches() -> None:
    def shapes(pad: int | None) -> list[tuple[int, ...]]:
        batches = EvalBatches(Mixed(), range(9), labels=True, batch_size=9, pad=pad)
        return [tuple(batch.images.shape) for batch in batches]

    assert len(shapes(None)) == 9
    assert len(shapes(1)) == 6
    assert shapes(64) == [(9, 3, 64, 64)]


def test_a_gpu_predicts_up_to_eight_images_or_two_million_pixels_by_default() -> None:
    def sizes(side: int, device: str) -> list[int]:
        source = Mixed()
        source.size = lambda i: (side, 512)  # type: ignore[method-assign]
        batches = EvalBatches(source, range(9), labels=True, device=torch.device(device))
        return [len(batch) for batch in batches._loader.batch_sampler]  # type: ignore[union-attr]

    assert sizes(512, "cuda") == [8, 1]
    assert sizes(1024, "cuda") == [4, 4, 1]
    assert sizes(10_000, "cuda") == sizes(512, "cpu") == [1] * 9


@pytest.mark.parametrize("pending", [0, 10_000, 2**24])
def test_the_callback_sees_each_image_without_its_padding(
    monkeypatch: pytest.MonkeyPatch, pending: int
) -> None:
    monkeypatch.setattr(module, "PENDING", pending)
    source, seen = Mixed(), {}
    result = evaluated(4, 32, [lambda index, *values: seen.update({index: values})])
    assert sorted(seen) == list(range(9))
    for index, (mask, true, counts) in seen.items():
        assert torch.equal(mask, predictor(32).mask(source.image(index)))
        assert torch.equal(true, source.mask(index))
        assert torch.equal(counts, result.counts[index])


def counts() -> list:
    result = evaluated(4, 32)
    return [result.counts.tolist(), result.matrix.tolist()]


def test_two_ranks_count_what_one_does() -> None:
    assert run_ranks(counts, 2) == [counts()] * 2


def test_batches_can_be_read_again_by_the_same_workers() -> None:
    batches = EvalBatches(Mixed(), range(9), labels=True, batch_size=4, pad=32, workers=2)
    before = len(active_children())
    batches.start_workers()
    assert len(active_children()) == before + 2
    first, second = ([batch.indices for batch in batches] for _ in range(2))
    assert first == second
    assert sorted(index for indices in first for index in indices) == list(range(9))
    workers = batches._loader._iterator._workers  # type: ignore[union-attr]
    assert len(workers) == 2
