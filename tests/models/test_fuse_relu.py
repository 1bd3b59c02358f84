"""Fusing ReLU changes no output on the CPU; tests/test_gpu.py compares cuDNN's operations."""

import copy
from typing import Any

import pytest
import torch
from test_fuse import PAIRS as FUSED_PAIRS
from test_fuse import shaken
from torch import Tensor, nn

from segkit.models.kernels.fuse import fuse_batch_norm
from segkit.models.kernels.fuse_relu import ConvReLU, for_prediction, fuse_relu, lower_weights
from segkit.models.segmenter import build_model

PAIRS = [
    *FUSED_PAIRS,
    ("swin_v2_t", "upernet"),
    ({"name": "unet", "width": 8}, {"name": "unet3plus", "width": 8}),  # bf16 may be emulated
    ("resnet50_v1c", "stlnet"),
]


def image(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("backbone", "decoder"), PAIRS, ids=str)
@torch.no_grad()
def test_a_fused_model_gives_the_same_logits(backbone: Any, decoder: Any) -> None:
    model = fuse_batch_norm(shaken(build_model(backbone, decoder, num_classes=3)))
    fused = copy.deepcopy(model)
    fuse_relu(fused)
    assert any(isinstance(module, ConvReLU) for module in fused.modules())
    for size in ((65, 97), (96, 64)):
        expected = model(image(*size))["out"]
        assert expected.std() > 0
        assert torch.equal(fused(image(*size))["out"], expected)
        assert torch.equal(fused(image(*size))["out"], expected)  # nothing is left of the first


@pytest.mark.parametrize(("backbone", "decoder"), PAIRS, ids=str)
@torch.no_grad()
def test_lower_weights_are_those_of_autocast(backbone: Any, decoder: Any) -> None:
    model = fuse_batch_norm(shaken(build_model(backbone, decoder, num_classes=3)))
    lowered = copy.deepcopy(model)
    lower_weights(lowered, torch.bfloat16)
    assert next(x for x in lowered.parameters() if x.dtype is torch.bfloat16).dim() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lowered(image(64, 64))["out"], model(image(64, 64))["out"])


class Sums(nn.Module):
    """ReLU of a convolution, of the same tensor changed in place, and of a changed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        x -= 1
        x = self.relu(x)
        y = self.second(x)
        y -= 1
        return self.relu(y) - x


@torch.no_grad()
def test_only_a_relu_right_after_a_convolution_is_fused() -> None:
    torch.manual_seed(0)
    model = Sums()
    fused = copy.deepcopy(model)
    fuse_relu(fused)
    assert isinstance(fused.first, ConvReLU)
    assert not isinstance(fused.second, ConvReLU)
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(fused(x), model(x))


@torch.no_grad()
def test_a_copy_leaves_the_model_alone() -> None:
    model = shaken(build_model("resnet18_half", "fcn", num_classes=3))
    before = copy.deepcopy(model.state_dict())
    fused = fuse_batch_norm(model)
    fuse_relu(fused)
    lower_weights(fused, torch.bfloat16)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(isinstance(module, ConvReLU) for module in model.modules())


@torch.no_grad()
def test_on_the_cpu_only_batch_norm_is_fused() -> None:
    model = shaken(build_model({"name": "resnet18_half", "in_channels": 4}, "fcn", num_classes=3))
    fused = for_prediction(model, torch.bfloat16)
    assert not any(isinstance(module, ConvReLU) for module in fused.modules())
    x = torch.randn(1, 4, 64, 64)
    torch.testing.assert_close(fused(x)["out"], model(x)["out"], rtol=1e-4, atol=1e-4)
