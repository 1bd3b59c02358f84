"""A training step changes weights and buffers; a non-finite step changes nothing."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import segkit
import segkit.training.pixels
from segkit import train
from segkit.core.errors import DataError, SegkitError
from segkit.core.run import Run
from segkit.models.segmenter import build_model, load_model
from segkit.training.losses import build_loss
from segkit.training.optim import build_optimizer
from segkit.training.step import autocast_dtype, train_step

SCALER = torch.amp.GradScaler("cpu", enabled=False)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, *batches: Any, **options: Any) -> Any:
    criterion = build_loss(["cross_entropy"], num_classes=3)
    options = {"amp": None, "scaler": SCALER, "clip_norm": None, **options}
    return train_step(model, criterion, optimizer, batches, **options)


def make(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build_model(
        "resnet18_half", {"name": "fcn", "width": 8, "dropout": 0.0, "aux": False}, num_classes=3
    )
    return model, build_optimizer(model, "adamw", lr=0.01, **options)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 64, 64, generator=rng)
    return images, torch.randint(0, 3, (2, 64, 64), generator=rng)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(value: float) -> None:
    model, optimizer = make()
    step(model, optimizer, batch())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    images, masks = batch(1)
    images[0, 0, 0, 0] = value
    result = step(model, optimizer, (images, masks), clip_norm=1.0)
    assert not result.finite
    torch.testing.assert_close(model.state_dict(), before[0], rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], before[1], rtol=0, atol=0)
    assert step(model, optimizer, batch(1)).finite  # and the next one goes on


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_first_step_that_is_not_finite_leaves_no_state(name: str) -> None:
    results = []
    for bad_first in (False, True):
        torch.manual_seed(0)
        model, _ = make()
        optimizer = build_optimizer(model, name, lr=0.01)
        if bad_first:
            images, masks = batch(1)
            assert not step(model, optimizer, (images * torch.nan, masks)).finite
        steps = [step(model, optimizer, batch(seed)) for seed in range(3)]
        assert all(result.finite for result in steps)
        results.append(model.state_dict())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers_that_are_not_fused_skip_such_a_step_too(kind: Any) -> None:
    model, _ = make()
    optimizer = kind(model.parameters(), lr=0.01)
    step(model, optimizer, batch())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    images, masks = batch(1)
    assert not step(model, optimizer, (images * torch.inf, masks)).finite
    torch.testing.assert_close(model.state_dict(), before[0], rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], before[1], rtol=0, atol=0)


def test_a_step_needs_only_a_model_a_loss_an_optimizer_and_a_batch() -> None:
    models = [make()[0] for _ in range(2)]
    criterion = build_loss(["cross_entropy", "dice"], num_classes=3)
    images, masks = batch()
    for model, data in zip(models, [(images, masks), [(images, masks)]], strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        assert train_step(model, criterion, optimizer, data).finite
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)


def test_a_binary_model_learns() -> None:
    torch.manual_seed(0)
    model = segkit.create_model("fcn", "resnet18_half", num_classes=1)
    criterion = segkit.build_loss(["cross_entropy", "dice"], num_classes=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    masks = torch.zeros(2, 64, 64, dtype=torch.int64)
    masks[:, :, 32:] = 1
    images = batch()[0] + 4 * masks[:, None]
    steps = [train_step(model, criterion, optimizer, (images, masks)) for _ in range(12)]
    assert steps[-1].loss < 0.5 * steps[0].loss
    matrix = segkit.confusion_matrix(model(images)["out"], masks, num_classes=1)
    assert matrix.shape == (2, 2)
    assert matrix.sum() == masks.numel()


def test_an_invalid_label_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make()
    step(model, optimizer, batch())
    images, masks = batch()
    masks[1, 2, 3] = 17
    with pytest.raises(DataError, match="target holds 17; expected a class, 0 to 2, or 255"):
        step(model, optimizer, (images, masks))
    before = copy.deepcopy(model.state_dict())
    # A GPU does not wait for a check: the loss is infinite, and the step finds out why.
    monkeypatch.setattr(segkit.training.pixels, "on_cpu", lambda x: False)
    with pytest.raises(DataError, match="target holds 17; expected a class, 0 to 2, or 255"):
        step(model, optimizer, (images, masks))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_clipping_bounds_the_gradient_and_tells_its_norm_before() -> None:
    model, optimizer = make()
    result = step(model, optimizer, batch(), clip_norm=1e-3)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert float(result.gradient_norm) > 1e-2
    assert float(torch.nn.utils.get_total_norm(gradients)) == pytest.approx(1e-3, rel=1e-3)


def test_parts_average_to_the_whole_batch() -> None:
    whole, parts = make()[0].eval(), make()[0].eval()  # BatchNorm sees each part alone
    images, masks = batch()
    steps = [
        step(model, torch.optim.SGD(model.parameters(), lr=0.1), *batches)
        for model, batches in (
            (whole, [(images, masks)]),
            (parts, [(images[:1], masks[:1]), (images[1:], masks[1:])]),
        )
    ]
    torch.testing.assert_close(steps[0].loss, steps[1].loss)
    torch.testing.assert_close(whole.state_dict(), parts.state_dict(), rtol=0, atol=1e-6)


def test_bf16_trains_in_full_precision_weights() -> None:
    model, optimizer = make()
    easy = batch()[0], torch.ones(2, 64, 64, dtype=torch.long)
    losses = [float(step(model, optimizer, easy, amp=torch.bfloat16).loss) for _ in range(10)]
    assert losses[-1] < losses[0] / 2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_precision() -> None:
    cpu = torch.device("cpu")
    names = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert {name: autocast_dtype(name, cpu) for name in names} == names
    assert autocast_dtype("auto", cpu) in (None, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_steps_on_cuda_follow_those_on_the_cpu(amp: torch.dtype | None) -> None:
    results = []
    for device in ("cpu", "cuda"):
        model = make()[0].to(device, memory_format=torch.channels_last)
        optimizer = build_optimizer(model, "adamw", lr=0.01)
        scaler = torch.amp.GradScaler(device, enabled=amp is torch.float16 and device == "cuda")
        images, masks = (tensor.to(device) for tensor in batch())
        options = {"amp": amp if device == "cuda" else None, "scaler": scaler}
        results.append([
            float(step(model, optimizer, (images, masks), **options).loss) for _ in range(8)
        ])  # fmt: skip
    assert results[1] == pytest.approx(results[0], rel=0.1)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a training on a demo set, in the current folder."""
    monkeypatch.chdir(tmp_path)
    demo = {"name": "demo", "root": "demo", "train": 12, "test": 1, "size": 32}
    config = {
        "data": {"train": demo, "folds": 2, "workers": 0},
        "model": {
            "weights": None,
            "backbone": "resnet18_half",
            "decoder": {"name": "fcn", "width": 8, "aux": False},
        },
        "train": {"epochs": 2, "batch_size": 2, "log_every": 1},
    }
    Path("tiny.json").write_text(json.dumps(config))
    return ["--cfg", "tiny.json", "--folds", "0", "--run-dir", "run"]


def test_bad_steps_are_logged_with_their_images_and_end_the_run(tiny: list[str]) -> None:
    settings = ["--set", "optim.lr=1e30", "--set", "train.max_bad_steps=2"]
    with pytest.raises(SegkitError, match=r"2 steps in a row.*batch_01.*optim\.lr"):
        train.main([*tiny, *settings])
    bad = [event for event in Run(Path("run")).events() if event["event"] == "non-finite"]
    assert len(bad) == 2
    assert all(name.startswith("batch_01/") for event in bad for name in event["images"])


def test_deterministic_runs_are_equal_to_the_bit(tiny: list[str]) -> None:
    states = []
    try:
        for run in ("run", "again"):
            train.main([*tiny[:-1], run, "--set", "train.deterministic=true"])
            assert torch.are_deterministic_algorithms_enabled()
            states.append(Run(Path(run)).load_last_state(0))
    finally:
        torch.use_deterministic_algorithms(False)
    assert states[0] is not None
    torch.testing.assert_close(states[0]["model"], states[1]["model"], rtol=0, atol=0)


def test_a_run_says_which_losses_are_computed_on_each_part(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds: list[list[int]] = []

    def spy(*args: Any, **options: Any) -> Any:
        assert options["exact"]
        seeds.append(options["seeds"])
        return train_step(*args, **options)

    monkeypatch.setattr(train, "train_step", spy)
    settings = ["accumulate=2", "accumulate_exact=true", "epochs=1", "batch_size=4"]
    words = [word for setting in settings for word in ("--set", f"train.{setting}")]
    train.main([*tiny, *words, "--set", 'loss.terms=["dice","lovasz"]'])
    assert "train.accumulate=2: lovasz: the mean over the micro-batches" in capsys.readouterr().out
    assert len({seed for step in seeds for seed in step}) == 2 * len(seeds) > 0


def test_a_model_comes_back_from_its_checkpoint_alone(tiny: list[str]) -> None:
    train.main(tiny)
    model, config, rest = load_model(Path("run/fold0/best.pt"))
    assert not model.training
    assert config.train.epochs == 2
    assert rest["score"] == Run(Path("run")).read("summary.json")["fold0"]["miou"]
