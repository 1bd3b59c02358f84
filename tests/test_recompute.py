"""What backward computes again is what forward computed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models import kept_for_backward
from segkit import engine, recompute
from segkit.losses import build_loss
from segkit.model import build_model
from segkit.optim import build_optimizer

Gradients = dict[str, Tensor]


def gradients(model: nn.Module, x: Tensor, *, forget: bool) -> Gradients:
    model.zero_grad()
    if forget:
        with recompute.forgetting():
            y = model(x)
    else:
        y = model(x)
    y.square().sum().backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def block(activation: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), activation(), nn.Conv2d(6, 4, 3)]
    nn.init.normal_(layers[1].weight)
    nn.init.normal_(layers[1].bias)
    return nn.Sequential(*layers, nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).double()


def images() -> Tensor:
    return torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that were computed again."""
    found: list[Tensor] = []
    unpack = recompute.unpack

    def watched(packed: object) -> Tensor:
        x = unpack(packed)
        if not isinstance(packed, Tensor):
            found.append(x)
        return x

    monkeypatch.setattr(recompute, "unpack", watched)
    return found


@pytest.mark.parametrize(
    ("activation", "times"),
    [
        (nn.Identity, 1),
        (nn.ReLU, 2),  # what it gave, for itself and for the convolution
        (lambda: nn.ReLU(inplace=True), 2),
        (nn.SiLU, 3),  # what it took for itself, and what it gave, from what it took
        (lambda: nn.SiLU(inplace=True), 3),
        (nn.Hardswish, 3),
        (nn.GELU, 3),
        (nn.Sigmoid, 0),  # not among the activations; it keeps what it gave
    ],
)
def test_gradients_are_the_same(
    again: list[Tensor], activation: Callable[[], nn.Module], times: int
) -> None:
    model = block(activation)
    kept = gradients(model, images(), forget=False)
    assert not again
    forgotten = gradients(model, images(), forget=True)
    assert len(again) == times + 1  # and what the second BatchNorm gave
    torch.testing.assert_close(forgotten, kept, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradients_of_a_transformer_are_the_same(again: list[Tensor], approximate: str) -> None:
    torch.manual_seed(0)
    layers = [nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(approximate=approximate), nn.Linear(8, 2)]
    nn.init.normal_(layers[0].weight)
    nn.init.normal_(layers[0].bias)
    model, x = nn.Sequential(*layers).double(), images()[..., :6].contiguous()
    kept = gradients(model, x, forget=False)
    forgotten = gradients(model, x, forget=True)
    assert len(again) == 2  # what the norm gave, and what the activation gave
    torch.testing.assert_close(forgotten, kept, rtol=1e-10, atol=1e-12)


def test_nothing_but_inputs_is_kept_under_autocast(again: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
    x = images()[..., :6].float()
    with torch.autocast("cpu", torch.bfloat16):
        kept = gradients(model, x, forget=False)
        forgotten = gradients(model, x, forget=True)
    assert [(one.dtype, one.shape) for one in again] == [
        (torch.bfloat16, (54, 8)),
        (torch.bfloat16, (54, 6)),
    ]
    torch.testing.assert_close(forgotten, kept, rtol=0.02, atol=0.02)


def test_frozen_norms_are_left_alone(again: list[Tensor]) -> None:
    model = block(nn.ReLU)
    model[1].eval()
    model[4].bias.requires_grad_(False)
    kept = gradients(model, images(), forget=False)
    forgotten = gradients(model, images(), forget=True)
    assert not again
    torch.testing.assert_close(forgotten, kept, rtol=0, atol=0)


@pytest.mark.parametrize(("backbone", "share"), [("resnet18_half", 0.75), ("efficientnet_b0", 0.5)])
def test_less_is_kept(backbone: str, share: float) -> None:
    model = build_model(backbone, "unet", num_classes=3).train()
    x = torch.randn(2, 3, 64, 64)
    everything = kept_for_backward(model, x, pack=lambda x: x)
    assert kept_for_backward(model, x) < share * everything


def test_a_training_step_forgets(again: list[Tensor]) -> None:
    model = build_model("resnet18_half", "unet", num_classes=3).train()
    engine.train_step(
        model,
        build_loss(["cross_entropy"], num_classes=3),
        build_optimizer(model, "sgd", lr=0.1),
        [(torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long))],
        amp=torch.bfloat16,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        clip_norm=None,
    )
    assert len(again) > 20
