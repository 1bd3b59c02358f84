"""What benchmarks count, where it can be worked out by hand."""

import torch
from torch import nn

from benchmarks.models import NAMES, cost, kept_for_backward
from segkit import config


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
