"""What backward computes again is what forward computed."""

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
from segkit import engine, recompute
from segkit.backbones.hrnet import HRNet
from segkit.losses import build_loss
from segkit.model import build_model
from segkit.optim import build_optimizer

Gradients = dict[str, Tensor]


def gradients(model: nn.Module, x: Tensor, *, forget: bool) -> Gradients:
    model.zero_grad()
    with recompute.forgetting() if forget else nullcontext():
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
    unpack = recompute.Forgetting.unpack

    def watched(self: recompute.Forgetting, packed: Tensor | recompute.Packed) -> Tensor:
        x = unpack(self, packed)
        if not isinstance(packed, Tensor):
            found.append(x)
        return x

    monkeypatch.setattr(recompute.Forgetting, "unpack", watched)
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
    kept = gradients(model, images(), forget=False)
    forgotten = gradients(model, images(), forget=True)
    torch.testing.assert_close(forgotten, kept, rtol=1e-10, atol=1e-12)
    # What the stem gave and the second and fourth sum, each for itself and for a convolution; of
    # each gated block what BatchNorm gave, for the product, and in two of them for the sum as well.
    assert len(again) == 3 * 2 + (7 if gate else 0)


def test_a_sum_with_a_factor_is_not_taken_for_a_plain_one(again: list[Tensor]) -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)]).double()
    with recompute.forgetting():
        norms[0](x).add(norms[1](x), alpha=2).relu().sum().backward()
    assert not again
    with recompute.forgetting():
        norms[0](x).add(norms[1](x)).relu().sum().backward()
    assert len(again) == 1


def test_a_term_that_changed_its_shape_is_left_alone(again: list[Tensor]) -> None:
    x, norm = torch.randn(2, 3, 4, 4), nn.BatchNorm2d(3)
    with recompute.forgetting():
        (norm(x).view(2, 48) + norm(x).view(2, 48)).relu().sum().backward()
        (norm(x).view(6, 16).relu()).sum().backward()
    assert [one.shape for one in again] == [(6, 16)]


@pytest.mark.parametrize("side", [4, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_other_shapes_and_precisions(
    again: list[Tensor], side: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    relu, norm = nn.ReLU(), nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4).to(dtype).requires_grad_()
    y = torch.randn(2, 3, side, side)
    found = []
    for context in (nullcontext(), recompute.forgetting()):
        with context:
            (found_now,) = torch.autograd.grad(relu(relu(x) + norm(y)).square().sum(), x)
        found.append(found_now)
    assert len(again) == 2  # for the ReLU and for the square
    torch.testing.assert_close(found[0], found[1])


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
    gradients(block(activation), images(), forget=True)
    assert made == 2  # each norm once


def test_little_is_held_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = recompute.Forgetting.unpack
    held: list[int] = []

    def watched(self: recompute.Forgetting, packed: Tensor | recompute.Packed) -> Tensor:
        x = unpack(self, packed)
        held.append(len(self._held))
        return x

    monkeypatch.setattr(recompute.Forgetting, "unpack", watched)
    model = residual_blocks(gate=False, count=8)
    with recompute.forgetting():
        stem = model[:3](images())
        loss = (model[3:](stem) + model[-1](stem)).square().sum()
    loss.backward()
    # What the stem gave is asked for by the last convolution first; not held for the first block.
    assert max(held) == 1
    assert held[-1] == 0


def test_nothing_stays_alive() -> None:
    model = residual_blocks(gate=True)
    hooks = recompute.Forgetting()
    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
        y = model(images())
    alive = weakref.ref(hooks)
    del hooks
    y.sum().backward()
    del y
    assert alive() is None


@pytest.mark.skipif(
    not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"), reason="needs a newer torch"
)
def test_what_lies_in_a_checkpoint_is_left_to_it(again: list[Tensor]) -> None:
    model = residual_blocks(gate=False)
    kept = gradients(model, images(), forget=False)
    forward = Residual.forward
    for module in model[3:8]:
        module.forward = functools.partial(checkpoint, forward, module, use_reentrant=False)
    forgotten = gradients(model, images(), forget=True)
    torch.testing.assert_close(forgotten, kept, rtol=1e-10, atol=1e-12)
    assert len(again) == 2  # what the stem gave


class SyncBatchNorm(torch.autograd.Function):
    """Saves what ``torch.nn.modules._functions.SyncBatchNorm`` does, which needs CUDA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        ctx.save_for_backward(x, weight, mean, variance.rsqrt(), torch.ones(1))
        return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, 0.0, False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, gradient.sum((0, 2, 3)), gradient.sum((0, 2, 3))


def test_batch_norm_over_ranks_by_pytorch(again: list[Tensor]) -> None:
    x, weight, bias = images(), torch.rand(3).double(), torch.rand(3).double()
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    with recompute.forgetting():
        y = SyncBatchNorm.apply(x, *parameters)
        torch.autograd.grad(y.relu().sum(), parameters)
    (made,) = again
    torch.testing.assert_close(made, y.detach().relu())


def test_a_checkpointed_backbone_trains() -> None:
    torch.manual_seed(0)
    backbone = HRNet(width=4, checkpointing=True)
    with recompute.forgetting():
        loss = sum(one.square().mean() for one in backbone(torch.randn(2, 3, 64, 64)))
    loss.backward()
    assert all(one.grad is not None for one in backbone.parameters())


@pytest.mark.parametrize(("backbone", "share"), [("resnet18_half", 0.75), ("efficientnet_b0", 0.5)])
def test_less_is_kept(backbone: str, share: float) -> None:
    model = build_model(backbone, "unet", num_classes=3).train()
    x = torch.randn(2, 3, 64, 64)
    everything = kept_for_backward(model, x, forget=False)
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
