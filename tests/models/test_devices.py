"""Models and losses keep their tensors on the device of their inputs; checked without a GPU.

Fake tensors compute shapes and devices alone, for a CUDA device that need not exist, and an
operation on tensors of two devices raises as it would there.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from segkit.models.decoders import DECODERS
from segkit.models.segmenter import build_model
from segkit.training.losses import LOSSES, build_loss

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.__version__ < (2, 14), reason="fake CUDA tensors end the process in torch 2.9"
    ),
]
CLASSES = 5
OTHERS = {"lovasz", "mask_classification", "presence"}
"""Losses that read values of tensors, for which a GPU waits, or score another output."""
TOKENS = {"output": "tokens", "omitted_blocks": 4}
MODELS: list[tuple[Any, Any]] = [
    *(("resnet18_half", decoder) for decoder in DECODERS if decoder != "eomt"),
    ({"name": "vit_s_dinov2", **TOKENS}, {"name": "eomt", "annealing": 10}),
    ({"name": "vit_s_dinov3", **TOKENS}, {"name": "eomt", "annealing": 10, "rotary": True}),
    *(
        (backbone, "upernet")
        for backbone in (
            "efficientnet_b0", "efficientnet_lite0", "se_resnet50", "hrnet_w18", "swin_t",
            "swin_v2_t", "mit_b0", "vit_s_dinov2_reg", "vit_s_dinov3", "beit_b", "convnext_tiny",
            "convnext_v2_atto", "regnet_y_400mf", "mobilenet_v2",
        )
    ),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def on_fake_cuda(model: nn.Module) -> nn.Module:
    def moved(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    return model._apply(moved)


@pytest.mark.parametrize(("backbone", "decoder"), MODELS)
def test_models_mix_no_devices(backbone: Any, decoder: Any) -> None:
    for training in (False, True):
        model = build_model(backbone, decoder, num_classes=CLASSES)
        model.train(training)  # before: a decoder may read its buffers then
        with FakeTensorMode(), torch.set_grad_enabled(training):
            outputs = on_fake_cuda(model)(torch.randn(2, 3, 97, 65, device="cuda"))
            assert {x.device.type for x in outputs.values()} == {"cuda"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(set(LOSSES) - OTHERS))
def test_losses_mix_no_devices_and_wait_for_none(name: str, dtype: torch.dtype) -> None:
    criterion = build_loss([name], num_classes=CLASSES)
    with FakeTensorMode():
        logits = torch.randn(2, CLASSES, 97, 65, dtype=dtype, device="cuda", requires_grad=True)
        target = torch.zeros(2, 97, 65, dtype=torch.uint8, device="cuda")
        loss = on_fake_cuda(criterion)({"out": logits}, target)
        assert loss.device.type == "cuda"


def test_two_devices_are_noticed() -> None:
    """The tests above rest on this."""
    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device="cuda") + torch.ones(3)
