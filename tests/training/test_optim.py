"""Parameter groups, schedules at their first and last steps, the moving average of weights."""

import copy
import itertools
import math

import pytest
import torch
import torchvision
from torch import nn

from segkit.core.errors import ConfigError
from segkit.training.optim import (
    EMA,
    OPTIMIZERS,
    SCHEDULES,
    WindowMean,
    build_optimizer,
    build_schedule,
    cosine,
    poly,
    set_lr,
)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        self.backbone.relative_position_bias_table = nn.Parameter(torch.ones(9, 2))
        self.decoder = nn.Conv2d(4, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = self.backbone(image)
        return self.decoder(features + self.backbone.relative_position_bias_table.mean())


def small() -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small()


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    image = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(image).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_hold_every_parameter_once_with_its_rate_and_decay(name: str) -> None:
    model = small()
    spec = {"name": name, "weight_decay": 0.25}
    optimizer = build_optimizer(model, spec, lr=0.1, backbone_lr_factor=0.5, decoder_lr_factor=2.0)
    groups = {
        id(p): (group["lr"], group["base_lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    expected = {
        "backbone.0.weight": (0.05, 0.05, 0.25),
        "backbone.1.weight": (0.05, 0.05, 0.0),
        "backbone.1.bias": (0.05, 0.05, 0.0),
        "backbone.relative_position_bias_table": (0.05, 0.05, 0.0),
        "decoder.weight": (0.2, 0.2, 0.25),
        "decoder.bias": (0.2, 0.2, 0.0),
    }
    assert {name: groups[id(p)] for name, p in model.named_parameters()} == expected
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(expected)


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t", "convnext_tiny"])
def test_only_matrices_and_kernels_of_real_backbones_decay(name: str) -> None:
    """Swin V2's authors exempt the network that computes position biases, cpb_mlp, too."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    optimizer = build_optimizer(model, lr=0.1)
    decaying = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    for key, parameter in model.named_parameters():
        kernel = key.endswith("weight") and parameter.dim() > 1 and "cpb_mlp" not in key
        assert (id(parameter) in decaying) == kernel, key


def test_frozen_parameters_are_left_out() -> None:
    model = small()
    model.backbone[1].requires_grad_(False)
    optimizer = build_optimizer(model, lr=0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_weight_decay_moves_only_what_decays() -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, {"name": "adamw", "weight_decay": 0.5}, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in ("backbone.0.weight", "decoder.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_plain_optimizers(name: str) -> None:
    ours, theirs = small(), small()
    plain = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    extra = {"momentum": 0.9} if name == "sgd" else {}
    reference = plain(theirs.parameters(), lr=0.1, weight_decay=0.0, foreach=False, **extra)
    optimizer = build_optimizer(ours, {"name": name, "weight_decay": 0.0}, lr=0.1)
    for seed in range(3):
        learn(ours, optimizer, seed)
        learn(theirs, reference, seed)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_continues_bit_for_bit(name: str) -> None:
    model = small()
    optimizer = build_optimizer(model, name, lr=0.1, backbone_lr_factor=0.1)
    learn(model, optimizer)
    other = copy.deepcopy(model)
    restored = build_optimizer(other, name, lr=0.7)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for trained, its in ((model, optimizer), (other, restored)):
        set_lr(its, 0.5)
        learn(trained, its, seed=1)
    assert [g["lr"] for g in restored.param_groups] == pytest.approx([0.005, 0.005, 0.05, 0.05])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bad_optimizers_fail_with_their_path() -> None:
    with pytest.raises(ConfigError, match=r"optim\.optimizer\.name.*did you mean 'adamw'"):
        build_optimizer(small(), "adam", lr=0.1)
    with pytest.raises(ConfigError, match=r"optim\.optimizer\.momentum"):
        build_optimizer(small(), {"name": "adamw", "momentum": 0.9}, lr=0.1)
    with pytest.raises(ConfigError, match=r"optim\.optimizer\.lr"):
        build_optimizer(small(), {"name": "sgd", "lr": 0.9}, lr=0.1)


# Schedules


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_climbs_to_one_and_nothing_climbs_after_it(name: str) -> None:
    spec = {"name": name, "peaks": [1.0, 0.5]} if name == "cosine_restarts" else name
    factor = build_schedule(spec, total=100, warmup=10)
    assert factor(0) == pytest.approx(0.1)
    assert factor(5) == pytest.approx(0.55)
    assert factor(9) == pytest.approx(0.91)
    assert factor(10) == 1.0
    values = [factor(step) for step in range(10, 130)]
    climbs = [step for step, (a, b) in enumerate(itertools.pairwise(values), 10) if b > a]
    # the second period starts after 3/8 of the 90 steps
    assert climbs == ([43] if name == "cosine_restarts" else [])
    assert len(set(values[90:])) == 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warm_up_the_first_step_is_at_the_peak(name: str) -> None:
    assert build_schedule(name, total=7)(0) == 1.0


def test_cosine_worked_by_hand() -> None:
    assert cosine(0.25) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    factor = build_schedule({"name": "cosine", "min_factor": 0.2}, total=100, warmup=10)
    assert factor(55) == pytest.approx(0.6)
    assert factor(100) == pytest.approx(0.2)
    factor = build_schedule("cosine", total=100)
    assert factor(50) == pytest.approx(0.5)
    assert factor(99) > 0  # the last step of the run still learns
    assert factor(201) == pytest.approx(0, abs=1e-12)


def test_poly_worked_by_hand() -> None:
    assert poly(0.75, power=1.0) == pytest.approx(0.25)
    assert poly(0.75, power=0.5) == pytest.approx(0.5)
    assert poly(0.99) == pytest.approx(0.01**0.9)
    assert poly(1.0, min_factor=0.01) == pytest.approx(0.01)


def test_restarts_as_the_field_report_has_them() -> None:
    spec = {"name": "cosine_restarts", "periods": [30_000, 50_000], "peaks": [1.0, 0.3]}
    factor = build_schedule(spec, total=80_000)
    values = {step: factor(step) for step in (0, 15_000, 29_999, 30_000, 55_000, 80_000)}
    expected = {0: 1.0, 15_000: 0.5, 29_999: 0.0, 30_000: 0.3, 55_000: 0.15, 80_000: 0.0}
    assert values == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        ("cosin", "did you mean 'cosine'"),
        ({"name": "cosine", "total": 5}, r"optim\.schedule\.total"),
        ({"name": "cosine", "min_factor": -0.5}, r"optim\.schedule: factor .* is -.* at step"),
        ({"name": "poly", "power": -1.0}, r"optim\.schedule: factor .* is .* at step 1"),
        ({"name": "cosine_restarts", "peaks": [1.0]}, r"optim\.schedule\.periods, peaks"),
        ({"name": "cosine_restarts", "periods": [0.0, 1.0]}, "every period above 0"),
    ],
)
def test_bad_schedules_fail_before_the_first_step(schedule, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build_schedule(schedule, total=100)


# EMA


def test_ema_worked_by_hand() -> None:
    model = small()
    with torch.no_grad():
        model.decoder.bias.fill_(0.0)
        ema = EMA(model, decay=0.15)
        model.decoder.bias.fill_(1.0)
    expected = 0.0
    for decay in (1 / 10, 0.15, 0.15):  # the warm-up would be 1/10, 2/11, 3/12
        ema.update(model)
        expected = decay * expected + (1 - decay)
        assert ema.model.decoder.bias.tolist() == pytest.approx([expected, expected])


def test_ema_copies_buffers_integers_included_and_shares_no_memory() -> None:
    model = small()
    ema = EMA(model)
    optimizer = build_optimizer(model, lr=0.1)
    for seed in range(3):
        learn(model, optimizer, seed)
        ema.update(model)
    for (name, ours), theirs in zip(ema.model.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.data_ptr() != theirs.data_ptr()
    assert ema.model.backbone[1].num_batches_tracked == 3
    for ours, theirs in zip(ema.model.parameters(), model.parameters(), strict=True):
        assert not torch.equal(ours, theirs)
    assert not ema.model.training
    assert model.training
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_ema_of_a_model_that_stands_still_is_that_model() -> None:
    model = small()
    ema = EMA(model)
    for _ in range(5):
        ema.update(model)
    for ours, theirs in zip(ema.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_restored_ema_continues_bit_for_bit() -> None:
    model = small()
    optimizer = build_optimizer(model, lr=0.1)
    ema = EMA(model)
    learn(model, optimizer)
    ema.update(model)
    restored = EMA(small())
    restored.load_state_dict(copy.deepcopy(ema.state_dict()))
    learn(model, optimizer, seed=1)
    for average in (ema, restored):
        average.update(model)
    assert restored.updates == 2
    for name, value in ema.model.state_dict().items():
        assert torch.equal(value, restored.model.state_dict()[name]), name


# ---- the mean of the last steps


def scalar(value: float) -> nn.Module:
    model = nn.BatchNorm1d(1).double()
    nn.init.constant_(model.weight, value)
    model.running_mean.fill_(10 * value)  # type: ignore[union-attr, operator]
    return model


def means(window: WindowMean, steps: range) -> dict[int, float]:
    """The mean at the end of each window; the weight after step s is s * s."""
    ends = {}
    for step in steps:
        window.update(scalar(step * step), step)
        if window.ends_at(step):
            ends[step] = float(window.model.weight)  # type: ignore[arg-type]
    return ends


def test_the_mean_is_that_of_the_last_steps_before_each_evaluation() -> None:
    window = WindowMean(scalar(0.0), window=3, every=5, total=12)
    ends = means(window, range(1, 13))
    by_hand = {5: (9 + 16 + 25) / 3, 10: (64 + 81 + 100) / 3, 12: (121 + 144) / 2}
    assert ends == pytest.approx(by_hand, rel=1e-12)
    assert float(window.model.running_mean) == 1440  # type: ignore[arg-type]


def test_a_window_is_no_longer_than_the_time_between_evaluations() -> None:
    window = WindowMean(scalar(0.0), window=100, every=2, total=4)
    assert means(window, range(1, 5)) == pytest.approx({2: 2.5, 4: 12.5}, rel=1e-12)


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_mean_goes_on_exactly(stop: int) -> None:
    steady = WindowMean(scalar(0.0), window=3, every=5, total=12)
    expected = means(steady, range(1, 13))
    first = WindowMean(scalar(0.0), window=3, every=5, total=12)
    before = means(first, range(1, stop + 1))
    second = WindowMean(scalar(7.0), window=3, every=5, total=12)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert {**before, **means(second, range(stop + 1, 13))} == expected


def test_a_window_whose_steps_all_failed_has_no_mean() -> None:
    window = WindowMean(scalar(0.0), window=1, every=2, total=4)
    means(window, range(1, 3))
    assert not window.ends_at(4)
