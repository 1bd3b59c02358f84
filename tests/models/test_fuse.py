"""Fusing BatchNorm changes no output, and leaves the model that was given alone."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segkit.models.kernels.fuse import fuse_batch_norm
from segkit.models.segmenter import build_model

PAIRS = [
    ("resnet18_half", "upernet"),
    ("resnet50", "deeplabv3plus"),
    ("efficientnet_b0", "unetplusplus"),
    ("mobilenet_v3_small", "unet"),
    ("se_resnet50", "fcn"),
    ("hrnet_w18", "ocrnet"),
    ("regnet_y_400mf", "pspnet"),
    ("convnext_tiny", "unet3plus"),
    ("resnet18_half", "stlnet"),
]
"""Backbones and decoders that have every kind of convolution with BatchNorm."""


def shaken(model: nn.Module) -> nn.Module:
    """Statistics and weights of BatchNorm other than those of a newly initialized layer."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for value in (module.weight.data, module.running_var):
                value.uniform_(0.5, 1.5, generator=generator)
            for value in (module.bias.data, module.running_mean):
                value.normal_(0, 0.2, generator=generator)
    return model.eval()


def norms(model: nn.Module) -> int:
    """Count the BatchNorms that predicting calls; those of auxiliary heads are not called."""
    called = set()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_hook(lambda norm, *_: called.add(norm))
    model(torch.zeros(1, 3, 64, 64))
    return len(called)


@pytest.mark.parametrize(("backbone", "decoder"), PAIRS)
@torch.no_grad()
def test_a_fused_model_gives_the_same_logits(backbone: str, decoder: str) -> None:
    model = shaken(build_model(backbone, decoder, num_classes=3))
    before = copy.deepcopy(model.state_dict())
    fused = fuse_batch_norm(model)
    for size in ((65, 97), (256, 192)):
        image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
        expected = model(image)["out"]
        assert expected.std() > 0
        error = (fused(image)["out"] - expected).abs().max()
        assert error < 1e-4 * expected.abs().max()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert norms(fused) == 0


class Between(nn.Module):
    """BatchNorm after something that stands after the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).relu())


def test_what_is_not_fused_is_there_once() -> None:
    model = build_model("swin_t", {"name": "upernet", "width": 8}, num_classes=3)
    fused = fuse_batch_norm(model)
    assert model.training
    ours, theirs = (dict(module.named_parameters()) for module in (fused, model))
    assert all(ours[name] is theirs[name] for name in ours if name.startswith("backbone"))
    assert ours["decoder.fuse.0.weight"] is not theirs["decoder.fuse.0.weight"]


def test_only_what_follows_a_convolution_at_once_is_fused() -> None:
    assert norms(fuse_batch_norm(shaken(Between()))) == 1
