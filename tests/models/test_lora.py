"""Low-rank updates: what learns, what is saved, and that a training with them is as any other."""

import copy
import json
import re
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segkit import build_loss, train, train_step
from segkit.core import checkpoint
from segkit.core.errors import ConfigError
from segkit.inference.model_file import load, save
from segkit.models.backbones import BACKBONES
from segkit.models.backbones.beit import beit
from segkit.models.backbones.mit import MiT
from segkit.models.backbones.swin import Swin
from segkit.models.backbones.vit import vit
from segkit.models.lora import LowRank, add_lora
from segkit.models.segmenter import Segmenter, build_model, load_model
from segkit.training.optim import EMA, build_optimizer

DECODER = {"name": "upernet", "width": 8, "aux_width": None}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register small transformers."""
    monkeypatch.setitem(BACKBONES, "swin_tiny", partial(Swin, 8, (2, 2, 1, 1), (1, 1, 2, 2), 1))
    monkeypatch.setitem(BACKBONES, "vit_tiny", partial(vit, 16, 4, 2, patch=8, positions=4))
    monkeypatch.setitem(BACKBONES, "beit_tiny", partial(beit, 16, 12, 2, 0.1))
    monkeypatch.setitem(BACKBONES, "mit_tiny", partial(MiT, (8, 16, 40, 64), (1, 1, 1, 1)))


def build(name: str = "swin_tiny", **options: Any) -> Segmenter:
    BACKBONES.setdefault(
        "swin_tiny", partial(Swin, 8, (2, 2, 1, 1), (1, 1, 2, 2), 1)
    )  # on other ranks
    backbone = {"name": name, "drop_path": 0.0}
    return build_model(backbone, DECODER, num_classes=3, **options)


def batch(images: int = 4) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, 32, 32, generator=rng, dtype=torch.float64)
    return pixels, torch.randint(0, 3, (images, 32, 32), generator=rng)


def updated(name: str = "swin_tiny") -> Segmenter:
    """A model whose updates are not 0, in float64."""
    model = build(name).double()
    add_lora(model, rank=2, alpha=6)
    rng = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.up, std=0.1, generator=rng)
    return model


def test_an_update_by_hand() -> None:
    layer = nn.Linear(2, 2, bias=False).double()
    update = LowRank(layer, rank=1, scale=3.0)
    state = {"weight": torch.eye(2), "up": torch.tensor([[1.0], [2.0]])}
    update.load_state_dict(
        {"up": state["up"], "down": torch.tensor([[5.0, 7.0]]), "scale": torch.tensor(3.0)}
    )
    # 5 * 1 + 7 * 10 = 75, times 3, times 1 and 2
    assert update(torch.tensor([1.0, 10.0]).double()).tolist() == [225.0, 450.0]
    tensors = {f"a.lora.{name}": value for name, value in update.state_dict().items()}
    plain = checkpoint.merged({"a.weight": state["weight"], **tensors})
    assert {name: value.tolist() for name, value in plain.items()} == {
        "a.weight": [[16.0, 21.0], [30.0, 43.0]]
    }


@pytest.mark.parametrize("entry", ["a.lora.up", "a.lora.scale", "a.weight"])
def test_an_update_that_fits_no_weight_is_left_for_the_check_of_names(entry: str) -> None:
    whole = {
        "a.weight": torch.zeros(2, 3),
        "a.lora.up": torch.zeros(2, 1),
        "a.lora.down": torch.zeros(1, 3),
        "a.lora.scale": torch.tensor(1.0),
    }
    assert set(checkpoint.merged(whole)) == {"a.weight"}
    damaged = {**whole, entry: torch.zeros(5, 5, 5)}
    assert checkpoint.merged(damaged) is damaged
    del damaged[entry]
    assert checkpoint.merged(damaged) is damaged


@pytest.mark.parametrize("name", ["swin_tiny", "vit_tiny", "beit_tiny", "mit_tiny"])
def test_it_starts_as_the_plain_model_and_merges_into_it(name: str) -> None:
    plain, model = build(name).double().eval(), build(name).double().eval()
    images, _ = batch()
    add_lora(model, rank=2)
    first = model(images)["out"]
    # Not to the bit: without a gradient for position biases, PyTorch has another attention kernel.
    torch.testing.assert_close(first, plain(images)["out"], rtol=1e-12, atol=1e-14)
    merged = checkpoint.merged(model.state_dict())
    assert checkpoint.digest_tensors(merged) == checkpoint.digest_tensors(plain.state_dict())
    model = updated(name).eval()
    plain.load_state_dict(checkpoint.merged(model.state_dict()))
    expected = model(images)["out"]
    torch.testing.assert_close(plain(images)["out"], expected, rtol=1e-9, atol=1e-12)
    assert (first - expected).abs().max() > 1e-3
    linear = {n for n, module in plain.backbone.named_modules() if isinstance(module, nn.Linear)}
    updates = {n for n, module in model.backbone.named_modules() if hasattr(module, "lora")}
    assert updates == linear


def test_only_updates_norms_of_maps_and_the_decoder_learn() -> None:
    model = build().double()
    add_lora(model, rank=2)
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, lr=0.1, layer_decay=0.9)
    for _ in range(2):  # after the first step `up` is not 0, so `down` has a gradient
        train_step(model, build_loss("cross_entropy"), optimizer, batch())
    for name, value in model.state_dict().items():
        learns = ".lora." in name or not name.startswith("backbone.features.")
        learns &= not name.endswith((".scale", "num_batches_tracked"))
        assert torch.equal(value, before[name]) != learns or "tracked" in name, name
    layers = {re.sub(r"backbone\.features\.[\d.]+", "", name) for name in before}
    updates = {name.removesuffix(".lora.up") for name in layers if name.endswith(".lora.up")}
    assert updates == {"attn.qkv", "attn.proj", "mlp.0", "mlp.3", "reduction"}


def test_frozen_stages_have_no_update_and_swin_v2_s_biases_neither() -> None:
    model = build(freeze=2)
    add_lora(model, rank=2)
    stages = {name.split(".")[2] for name in model.state_dict() if ".lora." in name}
    assert stages == {"4", "5", "6", "7"}
    two = Swin(width=8, depths=(1, 1, 1, 1), heads=(1, 1, 1, 1), version=2)
    model = Segmenter(two, nn.Identity())
    add_lora(model, rank=2)
    assert not [name for name in model.state_dict() if "cpb_mlp" in name and ".lora." in name]


def test_a_backbone_without_linear_layers_is_refused() -> None:
    model = build_model("resnet18_half", DECODER, num_classes=3)
    with pytest.raises(ConfigError, match=r"model\.lora: the backbone has no linear layers"):
        add_lora(model, rank=2)


# ---- in training


def gradients(**options: Any) -> dict[str, Tensor]:
    """The gradient of one step, in one part unless ``parts`` says more."""
    parts, wrap = options.pop("parts", 1), options.pop("wrap", lambda model: model)
    images, masks = options.pop("batch", batch())
    model = updated()
    optimizer = build_optimizer(model, "sgd", lr=0.0)
    pieces = list(zip(images.chunk(parts), masks.chunk(parts), strict=True))
    train_step(wrap(model), build_loss("cross_entropy"), optimizer, pieces, **options)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert len([name for name in ours if name.endswith("lora.down")]) > 8
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-7, atol=1e-12, msg=name)


def frozen_norms(model: Segmenter) -> nn.Module:
    """The decoder's BatchNorm would make parts and ranks differ."""
    model.eval()
    return model


def test_recomputation_and_parts_change_no_gradient() -> None:
    plain = gradients(wrap=frozen_norms)
    assert_close(gradients(wrap=frozen_norms, recompute=True), plain)
    assert_close(gradients(wrap=frozen_norms, parts=2), plain)


def of_rank(rank_batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    def wrap(model: Segmenter) -> nn.Module:
        return DistributedDataParallel(frozen_norms(model))

    own = rank_batches[torch.distributed.get_rank()]
    return {name: grad.numpy() for name, grad in gradients(wrap=wrap, batch=own).items()}


def test_two_ranks_have_the_gradient_of_one_process() -> None:
    images, masks = batch()
    halves = list(zip(images.chunk(2), masks.chunk(2), strict=True))
    plain = gradients(wrap=frozen_norms)
    for arrays in run_ranks(of_rank, 2, halves):
        assert_close({name: torch.from_numpy(x) for name, x in arrays.items()}, plain)


def test_half_precision_is_finite_and_an_average_has_updates_of_its_own() -> None:
    model = build()
    add_lora(model, rank=2)
    ema = EMA(model, decay=0.5)
    images, masks = batch()
    optimizer = build_optimizer(model, lr=0.01)
    step = train_step(
        model, build_loss("cross_entropy"), optimizer, (images.float(), masks), amp=torch.bfloat16
    )
    assert step.finite
    before = checkpoint.merged(copy.deepcopy(ema.model.state_dict()))
    ema.update(model)
    moved = checkpoint.merged(ema.model.state_dict())
    name = "backbone.features.1.0.attn.qkv.weight"
    assert not torch.equal(before[name], moved[name])
    own = {id(parameter) for parameter in model.parameters()}
    assert not own & {id(parameter) for parameter in ema.model.parameters()}


def test_a_saved_model_is_plain(tmp_path: Path) -> None:
    model = updated().float()
    save(model, tmp_path / "model.pt", classes=["a", "b", "c"])
    saved = checkpoint.load(tmp_path / "model.pt")["model"]
    assert set(saved) == set(build().state_dict())
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    assert load(tmp_path / "model.pt", device="cpu")(image).mask.shape == (32, 32)


@pytest.fixture
def signals() -> Iterator[None]:
    """Takes back what a training in this process does to signals."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def failing_at(call: int) -> Callable[..., Any]:
    calls = iter(range(1, 1000))

    def step(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise ConfigError("planned")
        return train_step(*args, **options)

    return step


@pytest.mark.usefixtures("signals")
def test_a_resumed_run_is_the_same_to_the_bit_and_its_best_is_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    demo = {"name": "demo", "root": "demo", "part": "train", "train": 20, "test": 5, "size": 64}
    cfg = {
        "data": {"train": demo, "folds": 2, "selection": 0.2, "workers": 0},
        "model": {
            **{"backbone": "swin_tiny", "decoder": DECODER, "weights": None},
            **{"lora": 2, "lora_alpha": 4, "freeze": 1},
        },
        "augment": {"train": [{"name": "crop", "size": [32, 32]}]},
        "optim": {"lr": 0.01, "backbone_lr_factor": 1.0, "warmup_steps": 0, "layer_decay": 0.9},
        "train": {
            **{"epochs": 1, "batch_size": 4, "accumulate": 2, "save_every": 1},
            **{"ema": 0.5, "average": 0.9},
        },
        "track": {"images": 0},
    }
    Path("lora.json").write_text(json.dumps(cfg))
    options = ["--cfg", "lora.json", "--folds", "0", "--quiet", "--run-dir"]
    train.main([*options, "steady"])
    monkeypatch.setattr(train, "train_step", failing_at(2))
    with pytest.raises(ConfigError, match="planned"):
        train.main([*options, "broken"])
    monkeypatch.setattr(train, "train_step", train_step)
    assert checkpoint.load(Path("broken/fold0/last.pt"))["step"] == 1
    train.main([*options, "broken", "--resume"])
    steady, resumed = (checkpoint.load(Path(run) / "fold0/last.pt") for run in ("steady", "broken"))
    assert resumed["step"] == steady["step"] == 2
    assert any(name.endswith("lora.up") for name in steady["model"])
    for part in (("model",), ("ema", "model"), ("window", "model")):
        ours, theirs = (state[part[0]] for state in (steady, resumed))
        for key in part[1:]:
            ours, theirs = ours[key], theirs[key]
        assert all(torch.equal(ours[name], theirs[name]) for name in {**ours, **theirs})
    best = checkpoint.load(Path("steady/fold0/best.pt"))
    plain = build_model("swin_tiny", DECODER, num_classes=11).state_dict()
    assert set(best["model"]) == set(plain)
    merged = checkpoint.merged(steady[best["average"]]["model"])
    assert all(torch.equal(best["model"][name], merged[name]) for name in plain)
    last, _, _ = load_model(Path("steady/fold0/last.pt"))
    assert set(last.state_dict()) == set(plain)
