"""What benchmarks count, where it can be worked out by hand."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import take_turns, version_of
from benchmarks.models import NAMES, cost, kept_for_backward
from segkit.core import config


class Features(nn.Module):
    """Two 1x1 convolutions; the outputs as a model gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.layers(image)}


def test_each_activation_is_counted_once() -> None:
    with torch.device("meta"):
        model, image = Features(), torch.empty(2, 3, 8, 8)
    # the image and what ReLU made of it, which ReLU and the next convolution both keep
    assert kept_for_backward(model, image) == 4 * 2 * 8 * 8 * (3 + 4)


def test_costs_worked_by_hand() -> None:
    with torch.device("meta"):
        found = cost(Features(), "two", 8)
    assert found.parameters == 3 * 4 + 4 + 4 * 2 + 2
    assert found.multiply_adds * 1e9 == 8 * 8 * (3 * 4 + 4 * 2)
    assert found.state * 2**30 == 16 * found.parameters
    assert found.activations * 2**30 == 4 * 8 * 8 * (3 + 4)


def test_the_table_is_of_shipped_configurations() -> None:
    for name in NAMES:
        assert config.find(name).parent.name == "configs"


def test_turns_are_compared_round_by_round() -> None:
    now = 0.0

    def taking(seconds: list[float]):
        left = iter(seconds)

        def side() -> None:
            nonlocal now
            now += next(left)

        return side

    ours, theirs = taking([9.0, 1.0, 2.0, 4.0]), taking([9.0, 2.0, 8.0, 12.0])
    turns = take_turns(ours, theirs, rounds=3, warm_up=1, clock=lambda: now)
    assert turns.ratio == 3  # of 2, 4 and 3
    assert turns.spread == (2, 4)
    assert (turns.ours, turns.theirs) == (2, 8)


def test_a_peer_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert version_of("torch") is not None
    assert version_of("no-such-package") is None
    assert "missing: no-such-package" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_its_benchmark_says_so() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "benchmarks.gpu needs a CUDA device, and PyTorch finds none here.\n"
