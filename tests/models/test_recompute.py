"""Gradients with recomputed activations equal those without, or an error is raised."""

import functools
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.models import kept_for_backward
from segkit.models.backbones.hrnet import HRNet
from segkit.models.kernels import recompute
from segkit.models.segmenter import build_model
from segkit.training import step
from segkit.training.losses import build_loss
from segkit.training.optim import build_optimizer

Gradients = dict[str, Tensor]


def gradients(model: nn.Module, x: Tensor, *, recomputed: bool) -> Gradients:
    model.zero_grad()
    with recompute.recompute_activations() if recomputed else nullcontext():
        y = model(x)
    y.square().sum().backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


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
    recomputed: list[Tensor] = []
    unpack = recompute.Hooks.unpack

    def watched(self: recompute.Hooks, packed: recompute.Kept | recompute.Recomputed) -> Tensor:
        x = unpack(self, packed)
        if isinstance(packed, recompute.Recomputed):
            recomputed.append(x)
        return x

    monkeypatch.setattr(recompute.Hooks, "unpack", watched)
    return recomputed


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
    kept = gradients(model, images(), recomputed=False)
    assert not again
    recomputed = gradients(model, images(), recomputed=True)
    assert len(again) == times + 1  # and what the second BatchNorm gave
    torch.testing.assert_close(recomputed, kept, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradients_of_a_transformer_are_the_same(again: list[Tensor], approximate: str) -> None:
    torch.manual_seed(0)
    layers = [nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(approximate=approximate), nn.Linear(8, 2)]
    nn.init.normal_(layers[0].weight)
    nn.init.normal_(layers[0].bias)
    model, x = nn.Sequential(*layers).double(), images()[..., :6].contiguous()
    kept = gradients(model, x, recomputed=False)
    recomputed = gradients(model, x, recomputed=True)
    assert len(again) == 2  # what the norm gave, and what the activation gave
    torch.testing.assert_close(recomputed, kept, rtol=1e-10, atol=1e-12)


def test_nothing_but_inputs_is_kept_under_autocast(again: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
    x = images()[..., :6].float()
    with torch.autocast("cpu", torch.bfloat16):
        kept = gradients(model, x, recomputed=False)
        recomputed = gradients(model, x, recomputed=True)
    assert [(tensor.dtype, tensor.shape) for tensor in again] == [
        (torch.bfloat16, (54, 8)),
        (torch.bfloat16, (54, 6)),
    ]
    torch.testing.assert_close(recomputed, kept, rtol=0.02, atol=0.02)


def test_frozen_norms_are_left_alone(again: list[Tensor]) -> None:
    model = block(nn.ReLU)
    model[1].eval()
    model[4].bias.requires_grad_(False)
    kept = gradients(model, images(), recomputed=False)
    recomputed = gradients(model, images(), recomputed=True)
    assert not again
    torch.testing.assert_close(recomputed, kept, rtol=0, atol=0)


class Residual(nn.Module):
    """A block of a ResNet, with a gate as squeeze and excitation has."""

    def __init__(self, gate: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.gate = nn.Conv2d(6, 6, 1) if gate else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.gate is not None:
            y = y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()
        return self.relu(y + x)


def residual_blocks(gate: bool, count: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    blocks = [Residual(gate) for _ in range(count)]
    return nn.Sequential(*stem, *blocks, nn.Conv2d(6, 1, 1)).double()


@pytest.mark.parametrize("gate", [False, True])
def test_every_other_sum_of_a_row_of_residual_blocks_is_made_again(
    again: list[Tensor], gate: bool
) -> None:
    model = residual_blocks(gate)
    kept = gradients(model, images(), recomputed=False)
    recomputed = gradients(model, images(), recomputed=True)
    torch.testing.assert_close(recomputed, kept, rtol=1e-10, atol=1e-12)
    # What the stem gave and the second and fourth sum, each for itself and for a convolution; of
    # each gated block what BatchNorm gave, for the product, and in two of them for the sum as well.
    assert len(again) == 3 * 2 + (7 if gate else 0)


def test_a_sum_with_a_factor_is_not_taken_for_a_plain_one(again: list[Tensor]) -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)]).double()
    with recompute.recompute_activations():
        norms[0](x).add(norms[1](x), alpha=2).relu().sum().backward()
    assert not again
    with recompute.recompute_activations():
        norms[0](x).add(norms[1](x)).relu().sum().backward()
    assert len(again) == 1


def test_a_term_that_changed_its_shape_is_left_alone(again: list[Tensor]) -> None:
    x, norm = torch.randn(2, 3, 4, 4), nn.BatchNorm2d(3)
    with recompute.recompute_activations():
        (norm(x).view(2, 48) + norm(x).view(2, 48)).relu().sum().backward()
        (norm(x).view(6, 16).relu()).sum().backward()
    assert [tensor.shape for tensor in again] == [(6, 16)]


@pytest.mark.parametrize("side", [4, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_other_shapes_and_precisions(
    again: list[Tensor], side: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    relu, norm = nn.ReLU(), nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4).to(dtype).requires_grad_()
    y = torch.randn(2, 3, side, side)
    results = []
    for context in (nullcontext(), recompute.recompute_activations()):
        with context:
            (found_now,) = torch.autograd.grad(relu(relu(x) + norm(y)).square().sum(), x)
        results.append(found_now)
    assert len(again) == 2  # for the ReLU and for the square
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_neighbors_share_what_is_made(
    monkeypatch: pytest.MonkeyPatch, activation: Callable[[], nn.Module]
) -> None:
    made = 0
    addcmul = torch.addcmul

    def counted(*operands: Tensor) -> Tensor:
        nonlocal made
        made += 1
        return addcmul(*operands)

    monkeypatch.setattr(torch, "addcmul", counted)
    gradients(block(activation), images(), recomputed=True)
    assert made == 2  # each norm once


def test_little_is_held_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = recompute.Hooks.unpack
    held: list[int] = []

    def watched(self: recompute.Hooks, packed: recompute.Kept | recompute.Recomputed) -> Tensor:
        x = unpack(self, packed)
        held.append(len(self._cache))
        return x

    monkeypatch.setattr(recompute.Hooks, "unpack", watched)
    model = residual_blocks(gate=False, count=8)
    with recompute.recompute_activations():
        stem = model[:3](images())
        loss = (model[3:](stem) + model[-1](stem)).square().sum()
    loss.backward()
    # What the stem gave is asked for by the last convolution first; not held for the first block.
    assert max(held) == 1
    assert held[-1] == 0


def test_nothing_stays_alive() -> None:
    model = residual_blocks(gate=True)
    hooks = recompute.Hooks()
    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
        y = model(images())
    alive = weakref.ref(hooks)
    del hooks
    y.sum().backward()
    del y
    assert alive() is None


def test_what_lies_in_a_checkpoint_is_left_to_it(again: list[Tensor]) -> None:
    model = residual_blocks(gate=False)
    kept = gradients(model, images(), recomputed=False)
    forward = Residual.forward
    for module in model[3:8]:
        module.forward = functools.partial(checkpoint, forward, module, use_reentrant=False)
    recomputed = gradients(model, images(), recomputed=True)
    torch.testing.assert_close(recomputed, kept, rtol=1e-10, atol=1e-12)
    assert len(again) == 2  # what the stem gave


class SyncBatchNorm(torch.autograd.Function):
    """Saves what ``torch.nn.modules._functions.SyncBatchNorm`` does, which needs CUDA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        ctx.save_for_backward(x, weight, mean, variance.rsqrt(), torch.ones(1))
        return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, 1e-30, False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, gradient.sum((0, 2, 3)), gradient.sum((0, 2, 3))


def test_batch_norm_over_ranks_by_pytorch(again: list[Tensor]) -> None:
    x, weight, bias = images(), torch.rand(3).double(), torch.rand(3).double()
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    with recompute.recompute_activations():
        y = SyncBatchNorm.apply(x, *parameters)
        torch.autograd.grad(y.relu().sum(), parameters)
    (made,) = again
    torch.testing.assert_close(made, y.detach().relu())


def test_a_checkpointed_backbone_trains() -> None:
    torch.manual_seed(0)
    backbone = HRNet(width=4, checkpointing=True)
    with recompute.recompute_activations():
        loss = sum(features.square().mean() for features in backbone(torch.randn(2, 3, 64, 64)))
    loss.backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize(("backbone", "share"), [("resnet18_half", 0.75), ("efficientnet_b0", 0.5)])
def test_less_is_kept(backbone: str, share: float) -> None:
    model = build_model(backbone, "unet", num_classes=3).train()
    x = torch.randn(2, 3, 64, 64)
    everything = kept_for_backward(model, x, recomputed=False)
    assert kept_for_backward(model, x) < share * everything


@pytest.mark.parametrize("changed", ["weight", "bias", "input", "kernel", "statistics"])
@pytest.mark.parametrize("sync", [False, True])
def test_a_change_before_backward_is_an_error(changed: str, sync: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.rand(3).double().requires_grad_() for _ in range(2))
    kernel = torch.randn(2, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    mean, variance = torch.zeros(3).double(), torch.ones(3).double()
    given = x * 1
    with recompute.recompute_activations():
        if sync:
            y = SyncBatchNorm.apply(given, weight, bias)
        else:
            y = nn.functional.batch_norm(given, mean, variance, weight, bias, training=True)
        loss = nn.functional.conv2d(y.relu(), kernel).sum()
    tensors = {"weight": weight, "bias": bias, "input": given, "kernel": kernel, "statistics": mean}
    with torch.no_grad():
        tensors[changed].mul_(2)
    if sync and changed == "statistics":
        loss.backward()  # it does not read the running statistics
        return
    with pytest.raises(RuntimeError, match="changed in place after the forward pass"):
        loss.backward()


@pytest.mark.parametrize("layer", [nn.LayerNorm(4), nn.Linear(4, 4), nn.SiLU(), nn.GELU()])
def test_a_change_of_an_activation_before_backward_is_an_error(layer: nn.Module) -> None:
    x = torch.randn(2, 4, requires_grad=True) * 1
    with recompute.recompute_activations():
        loss = (layer(x) * torch.ones(4, requires_grad=True)).sum()
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place after the forward pass"):
        loss.backward()


def test_batch_norm_with_a_computed_bias_is_left_alone(again: list[Tensor]) -> None:
    weight, bias = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    with recompute.recompute_activations():
        y = nn.functional.batch_norm(
            torch.randn(2, 3, 4, 4), None, None, weight, bias * 2, training=True
        )
        y.relu().sum().backward()
    assert bias.grad is not None
    assert not again


def test_the_setting() -> None:
    settings = [("auto", "cpu"), ("auto", "cuda"), ("on", "cuda"), ("off", "cpu")]
    chosen = [step.should_recompute(setting, torch.device(device)) for setting, device in settings]
    assert chosen == [True, False, True, False]


def test_a_training_step_recomputes_where_it_is_asked_to(again: list[Tensor]) -> None:
    for recomputed in (False, True):
        assert not again
        take_a_step(recomputed)
    assert len(again) > 20


def take_a_step(recomputed: bool) -> None:
    model = build_model("resnet18_half", "unet", num_classes=3).train()
    step.train_step(
        model,
        build_loss(["cross_entropy"], num_classes=3),
        build_optimizer(model, "sgd", lr=0.1),
        [(torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long))],
        amp=torch.bfloat16,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        clip_norm=None,
        recompute=recomputed,
    )
