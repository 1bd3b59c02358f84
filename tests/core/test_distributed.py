"""Ranks that train together compute what one process computes."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.models import kept_for_backward
from segkit.core import distributed
from segkit.core.errors import SegkitError
from segkit.models.kernels.recompute import recompute_activations
from segkit.models.kernels.sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
    ).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 9, 7, generator=generator, dtype=torch.float64) * 3 + 5
    weights = torch.rand(6, 2, 7, 5, generator=generator, dtype=torch.float64)
    return images, weights


def global_loss(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Not a mean of the ranks' losses: a ratio of sums."""
    top, bottom = (outputs.square() * weights).sum(), weights.sum()
    return distributed.sum_over_ranks(top) / distributed.sum_over_ranks(bottom)


def train_rank(shares: list[slice], recomputed: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
    model = network()
    convert_sync_batch_norm(model, torch.device("cpu"))
    net = DistributedDataParallel(model) if distributed.world_size() > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, weights = batch()
    mine = shares[distributed.rank()]
    for _ in range(5):
        optimizer.zero_grad()
        with recompute_activations() if recomputed else nullcontext():
            outputs = net(images[mine])
        global_loss(outputs, weights[mine]).backward()
        optimizer.step()
    buffers = [buffer.numpy() for buffer in model.buffers()]
    return [weight.detach().numpy() for weight in model.parameters()], buffers


@pytest.mark.parametrize("recomputed", [False, True])
def test_uneven_ranks_with_sync_batch_norm_equal_one_process(recomputed: bool) -> None:
    all_weights, all_buffers = train_rank([slice(0, 6)], False)
    for weights, buffers in run_ranks(train_rank, 2, [slice(0, 4), slice(4, 6)], recomputed):
        for mine, theirs in zip(weights, all_weights, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-10)
        for mine, theirs in zip(buffers, all_buffers, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-10)


def kept_by_rank() -> list[int]:
    model = network()
    convert_sync_batch_norm(model, torch.device("cpu"))
    image, _ = batch()
    return [kept_for_backward(model, image, recomputed=recomputed) for recomputed in (False, True)]


def test_the_output_of_sync_batch_norm_is_recomputed() -> None:
    for everything, inputs in run_ranks(kept_by_rank, 2):
        given = 6 * 4 * 7 * 5 * 8  # by the ReLU: images, channels, height, width, bytes
        assert everything - inputs == given


def converted_keys() -> tuple[list[str], list[str], bool, bool]:
    model = network()
    model[1].weight.requires_grad_(False)
    model[4].eval()
    keys = list(model.state_dict())
    new = copy.deepcopy(model)
    convert_sync_batch_norm(new, torch.device("cpu"))
    assert isinstance(new[1], SyncBatchNorm)
    return keys, list(new.state_dict()), new[1].weight.requires_grad, new[4].training


def test_conversion_keeps_keys_frozen_weights_and_modes() -> None:
    for keys, new_keys, requires_grad, training in run_ranks(converted_keys, 2):
        assert keys == new_keys
        assert not requires_grad
        assert not training


def test_one_process_needs_no_conversion() -> None:
    model = network()
    convert_sync_batch_norm(model, torch.device("cpu"))
    assert isinstance(model[1], nn.BatchNorm2d)
    x = torch.ones(3, requires_grad=True)
    assert distributed.sum_over_ranks(x) is x


def reductions() -> tuple[float, float, str]:
    mine = torch.tensor([float(distributed.rank() + 1)])
    total = distributed.all_reduce(mine.clone())
    largest = distributed.all_reduce(mine.clone(), maximum=True)
    word = distributed.broadcast(f"from {distributed.rank()}")
    return float(total), float(largest), word


def test_reductions() -> None:
    assert run_ranks(reductions, 3) == [(6.0, 3.0, "from 0")] * 3


def test_the_wait_for_a_rank_that_ended_at_its_start_is_limited() -> None:
    store = dist.HashStore()
    store.set("segkit/rank 1", "a token of a process that ended")
    with pytest.raises(SegkitError, match="not all 2 ranks connected"):
        distributed._unused_namespace(store, rank=0, world_size=2, timeout=0.001)
