"""Tests that need a GPU: ``python -m pytest -m gpu``, in under 5 minutes on one H100.

Without a CUDA device these tests are skipped. ``SEGKIT_TEST_DEVICE=cpu python -m pytest -m gpu``
runs them on the CPU with small images, which checks the tests' own code and nothing else.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pyramids import PYRAMID_DECODERS
from ranks import run_ranks
from test_readme import DEMO
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import segkit
from segkit import infer, train
from segkit.augment import Pipeline
from segkit.augment.pipeline import generator
from segkit.core import backend, checkpoint, config, distributed
from segkit.core.background import HostCopy
from segkit.core.config import Config
from segkit.core.run import Run
from segkit.data import open_source
from segkit.data.loader import EvalBatches
from segkit.inference import soup
from segkit.inference.predictor import Predictor
from segkit.inference.teacher import Teacher
from segkit.inference.tta import parse_views
from segkit.models.kernels.fuse_relu import for_prediction
from segkit.models.kernels.sync_batch_norm import convert_sync_batch_norm
from segkit.models.segmenter import build_model
from segkit.training.evaluate import evaluate
from segkit.training.losses import LOSSES, build_loss
from segkit.training.metrics import confusion_matrix
from segkit.training.optim import build_optimizer
from segkit.training.step import autocast_dtype, train_step

ROOT = Path(__file__).parents[1]
DEVICE = torch.device(os.environ.get("SEGKIT_TEST_DEVICE", "cuda"))
ON_CPU = DEVICE.type == "cpu"
CLASSES = 11
IMAGENET: dict[str, Any] = {"mean": config.IMAGENET_MEAN, "std": config.IMAGENET_STD}

CONFIGS = [path.stem for path in sorted((ROOT / "configs").glob("*.json"))]
SMALL_CONFIGS = ("demo", "camvid")
"""Those whose models are small enough for steps on the CPU."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE.type == "cuda" and not torch.cuda.is_available(),
        reason="needs a CUDA device (SEGKIT_TEST_DEVICE=cpu runs small versions without one)",
    ),
]


@pytest.fixture(autouse=True)
def _exact_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions in full precision, cuBLAS ready for deterministic steps, memory given back."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
    backend.set_deterministic(False)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


# ---- steps of the shipped configurations


def crop_size(cfg: Config) -> tuple[int, int]:
    """The size of training images: that of the last operation that sets one, or the demo's."""
    if ON_CPU:
        return 64, 64
    sizes = [tuple(spec["size"]) for spec in cfg.augment.train if "size" in spec]
    height, width = cfg.augment.size or (*sizes, (128, 128))[0]
    return height, width


class Steps:
    """Training steps of a configuration on noise.

    Args:
        name: Of the configuration.
        amp: ``train.amp``.
    """

    def __init__(self, name: str, amp: str) -> None:
        if ON_CPU and name not in SMALL_CONFIGS:
            pytest.skip("too large for a CPU")
        cfg = config.load(name)
        torch.manual_seed(0)  # build_model seeds the CPU's generator only
        with torch.device(DEVICE):
            self.model = build_model(cfg.model.backbone, cfg.model.decoder, num_classes=CLASSES)
        self.model.to(DEVICE, memory_format=torch.channels_last)
        self.criterion = build_loss(
            cfg.loss.terms, aux_weight=cfg.loss.aux_weight, num_classes=CLASSES
        ).to(DEVICE)
        self.optimizer = build_optimizer(self.model, cfg.optim.optimizer, lr=1e-4)
        self.amp = autocast_dtype(amp, DEVICE)
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=amp == "fp16")
        height, width = crop_size(cfg)
        rng = torch.Generator().manual_seed(0)
        images = torch.randn(2, 3, height, width, generator=rng).to(DEVICE)
        self.images = images.contiguous(memory_format=torch.channels_last)
        masks = torch.randint(CLASSES, (2, height, width), generator=rng, dtype=torch.uint8)
        masks[:, : height // 8] = 255
        self.masks = masks.to(DEVICE)

    def take(self, number: int) -> Any:
        torch.manual_seed(number)  # of dropout
        return train_step(
            self.model,
            self.criterion,
            self.optimizer,
            [(self.images, self.masks)],
            amp=self.amp,
            scaler=self.scaler,
            clip_norm=1.0,
        )


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
@pytest.mark.parametrize("name", CONFIGS)
def test_three_steps_of_every_configuration(name: str, amp: str) -> None:
    steps = Steps(name, amp)
    results = [steps.take(number) for number in range(3)]
    number = 3
    while amp == "fp16" and sum(result.finite for result in results) < 3 and number < 20:
        results.append(steps.take(number))  # the scaler begins too high, and halves
        number += 1
    finite = [result for result in results if result.finite]
    assert len(finite) >= 3
    assert all(bool(result.loss.isfinite()) for result in finite)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_deterministic(name: str) -> None:
    backend.set_deterministic(True)
    steps = Steps(name, "bf16")
    for group in steps.optimizer.param_groups:
        group["lr"] = 0.0  # so that both steps start from the same weights
    results, gradients = [], []
    for _ in range(2):
        results.append(steps.take(0))
        gradients.append([x.grad.cpu() for x in steps.model.parameters() if x.grad is not None])
    assert all(result.finite for result in results)
    torch.testing.assert_close(results[1].loss, results[0].loss, rtol=0, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_recomputed_gradients_are_equal() -> None:
    models = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build_model("efficientnet_b0", {"name": "unet"}, num_classes=3).to(DEVICE)
        for module in model.modules():
            if isinstance(module, nn.Dropout | nn.Dropout2d) or hasattr(module, "mode"):
                module.eval()  # stochastic depth too
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        train_step(
            model,
            build_loss(["cross_entropy"], num_classes=3),
            build_optimizer(model, "sgd", lr=0.0),
            [(images, torch.zeros(2, 64, 64, dtype=torch.uint8, device=DEVICE))],
            amp=None,
            scaler=torch.amp.GradScaler(DEVICE.type, enabled=False),
            clip_norm=None,
            recompute=recompute,
        )
        models.append({name: x.grad for name, x in model.named_parameters()})
    kept, recomputed = (torch.cat([x.flatten() for x in grads.values()]) for grads in models)
    assert float((recomputed - kept).norm() / kept.norm()) < 1e-3


# ---- runs


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a configuration ``tiny.json`` of a demo set of 20 images."""
    monkeypatch.chdir(tmp_path)
    demo = {"name": "demo", "root": "demo", "train": 20, "test": 4, "size": 64}
    parts = {part: {**demo, "part": part} for part in ("train", "test", "test_labels")}
    cfg = {
        "data": {**parts, "folds": 2, "selection": 0.2, "workers": 0},
        "model": {
            "weights": None,
            "backbone": "resnet18_half",
            "decoder": {"name": "upernet", "width": 8},
        },
        "augment": {"train": ["hflip", {"name": "crop", "size": [64, 64]}]},
        "optim": {"lr": 0.002},
        "train": {"epochs": 2, "batch_size": 4, "save_every": 1, "log_every": 1},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(cfg))
    return tmp_path


def arguments(run: str, *settings: str) -> list[str]:
    pairs = [part for setting in settings for part in ("--set", setting)]
    where = ["--cfg", "tiny.json", "--folds", "0", "--run-dir", run, "--device", DEVICE.type]
    return [*where, "--quiet", *pairs]


def losses(run: str) -> list[float]:
    return [event["loss"] for event in Run(Path(run)).events() if event["event"] == "step"]


@pytest.mark.usefixtures("tiny")
def test_a_killed_run_goes_on_to_the_same_bits() -> None:
    settings = ("train.deterministic=true", "augment.device=model")
    train.main(arguments("whole", *settings))
    words = [sys.executable, str(ROOT / "tests" / "faults.py"), "kill", "step", "0", "struck"]
    killed = subprocess.run([*words, *arguments("killed", *settings)], timeout=120, check=False)
    assert killed.returncode == -9
    assert Path("struck").exists()
    train.main([*arguments("killed", *settings), "--resume"])
    whole, resumed = (checkpoint.load(Path(run, "fold0/last.pt")) for run in ("whole", "killed"))
    torch.testing.assert_close(resumed["model"], whole["model"], rtol=0, atol=0)
    torch.testing.assert_close(
        resumed["optimizer"]["state"], whole["optimizer"]["state"], rtol=0, atol=0
    )


@pytest.mark.skipif(ON_CPU, reason="takes 5 minutes on the CPU, where test_compile.py does it")
@pytest.mark.usefixtures("tiny")
def test_a_compiled_model_trains() -> None:
    decoder = {"name": "fcn", "dropout": 0.0, "aux": False}
    settings = (
        f"model.decoder={json.dumps(decoder)}",
        "train.amp=off",
        "optim.lr=1e-5",
        "train.epochs=1",
    )
    train.main(arguments("plain", *settings))
    train.main(arguments("compiled", *settings, "train.compile=true"))
    assert losses("compiled") == pytest.approx(losses("plain"), rel=0.02)


@pytest.mark.usefixtures("tiny")
def test_the_models_device_renders_what_the_cpu_renders() -> None:
    train.main(arguments("run", "augment.device=model"))
    assert len(losses("run")) == 4
    operations = config.load("swin").augment.train
    pipeline = Pipeline(operations, size=(48, 48), **IMAGENET)
    source = open_source(config.load("tiny.json"), "train")
    image, mask = source.image(0), source.mask(0)
    for number in range(8):
        plan = pipeline.plan((64, 64), generator(0, 0, number), mask)
        x, y = pipeline.render([image], [mask], [plan])
        x_there, y_there = pipeline.render([image.to(DEVICE)], [mask.to(DEVICE)], [plan])
        assert float((x_there.cpu() - x).abs().mean()) < 1e-3
        assert float((y_there.cpu() != y).float().mean()) < 1e-2


def test_the_two_commands_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = DEMO.findall((ROOT / "README.md").read_text())
    trainings = re.findall(r"python train\.py ([^&]*) &&", block)
    (inference,) = re.findall(r"python infer\.py (.*)", block)
    assert len(trainings) == 2
    monkeypatch.chdir(tmp_path)
    device = ["--device", DEVICE.type]
    short = ["data.train.train=40", "data.train.size=64", "train.epochs=2"] if ON_CPU else []
    for part in ("test", "test_labels") if ON_CPU else ():
        short += [f"data.{part}.train=40", f"data.{part}.test=8", f"data.{part}.size=64"]
    short += ["data.train.test=8"] if ON_CPU else ["train.epochs=2"]
    settings = [word for setting in short for word in ("--set", setting)]
    for training in trainings:
        train.main([*training.split(), *device, *settings])
    infer.main([*inference.split(), *device])
    (run,) = Path("runs").glob("demo_soup-*")
    rows = json.loads((run / "infer" / "scores.json").read_text())
    assert 0 < rows[-1]["test"]["miou"] <= 1


# ---- what a device computes is what the CPU computes


def logits_and_target() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    target = torch.randint(0, 5, (2, 48, 56), generator=rng, dtype=torch.uint8)
    target[0, :9] = 255
    return 3 * torch.randn(2, 5, 48, 56, generator=rng), target


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"presence", "mask_classification"}))
def test_losses_are_those_of_the_cpu(name: str) -> None:
    options = {"min_kept": 500} if name == "ohem_cross_entropy" else {}
    logits, target = logits_and_target()
    results = []
    for device in (torch.device("cpu"), DEVICE):
        criterion = build_loss([{"name": name, **options}], num_classes=5).to(device)
        x = logits.to(device, copy=True).requires_grad_()
        loss = criterion({"out": x}, target.to(device))
        (gradient,) = torch.autograd.grad(loss, x)
        results.append((loss.detach().cpu(), gradient.cpu()))
    (expected, slope), (loss, gradient) = results
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert float((gradient - slope).norm() / slope.norm()) < 1e-4


def test_metrics_are_those_of_the_cpu() -> None:
    logits, target = logits_and_target()
    there = confusion_matrix(logits.to(DEVICE), target.to(DEVICE), 5)
    assert torch.equal(there.cpu(), confusion_matrix(logits, target, 5))


def photograph(height: int = 97, width: int = 121) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 9, 11, generator=rng)
    image = nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return (image[0].clamp(0, 1) * 255).to(torch.uint8)


def untrained() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet18_half", {"name": "upernet", "width": 16}, num_classes=5).eval()


@pytest.mark.parametrize(
    "options", [{}, {"views": parse_views("flips,scale1.5,rotate5")}, {"tile": 64}, {"size": 80}]
)
def test_predictions_are_those_of_the_cpu(options: dict[str, Any]) -> None:
    expected = Predictor(untrained(), **IMAGENET, **options).probabilities(photograph())
    there = Predictor(untrained().to(DEVICE), **IMAGENET, **options).probabilities(photograph())
    assert there.device.type == DEVICE.type
    torch.testing.assert_close(there.cpu(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PYRAMID_DECODERS)
def test_replayed_predictions_are_those_of_ordinary_calls(name: str) -> None:
    """Up to roundings: within a graph, cuDNN and cuBLAS may choose other bf16 kernels."""
    model = build_model("swin_t" if name == "upernet" else "resnet18", name, num_classes=5)
    model.to(DEVICE, memory_format=torch.channels_last)
    amp = None if ON_CPU else torch.bfloat16
    exact, plain, graphed = (
        Predictor(model, channels_last=True, **options).probabilities
        for options in ({}, {"amp": amp}, {"amp": amp, "graphs": True})
    )
    images = [photograph(), photograph(130, 100)]
    for _ in range(2):
        for number in (0, 1, 0, 1, 0, 0, 1):
            expected = exact(images[number])
            errors = [float((f(images[number]) - expected).norm()) for f in (plain, graphed)]
            assert errors[1] < 1.5 * errors[0] + 1e-4 * float(expected.norm())
        if not ON_CPU:
            assert len(graphed.__self__._forward._graphs) == 2
        with torch.no_grad():  # a replay reads the weights of the moment
            for parameter in model.parameters():
                parameter.mul_(1.2)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "se_resnet50", "efficientnet_b0"])
def test_fused_predictions_are_those_of_the_model(backbone: str) -> None:
    model = build_model(backbone, "fcn", num_classes=5)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
    model.to(DEVICE, memory_format=torch.channels_last)
    exact = Predictor(model, channels_last=True).probabilities(photograph())
    errors = []
    for predicted in (model, for_prediction(model, torch.bfloat16)):
        predict = Predictor(predicted, channels_last=True, amp=torch.bfloat16)
        for _ in range(4):  # also of a graph
            error = float((predict.probabilities(photograph()) - exact).norm() / exact.norm())
        errors.append(error)
    assert errors[0] < 0.3  # what bf16 itself costs with random weights
    assert errors[1] < 1.5 * errors[0] + 1e-3


def test_a_copy_on_the_host_has_the_values_of_its_step() -> None:
    weight = torch.rand(64, 32, 3, 3).to(DEVICE, memory_format=torch.channels_last)
    state = {"model": {"weight": weight, "count": torch.tensor(3, device=DEVICE)}, "step": 7}
    host = HostCopy()
    for _ in range(3):
        expected = weight.cpu().clone()
        copied = host.take(state)
        weight.mul_(1.5)
        values = copied()
        assert torch.equal(values["model"]["weight"], expected)
        assert values["model"]["weight"].stride() == weight.stride()
        assert values["model"]["count"].device.type == "cpu"
        assert (int(values["model"]["count"]), values["step"]) == (3, 7)


@pytest.mark.usefixtures("tiny")
def test_evaluations_are_those_of_the_cpu() -> None:
    source = open_source(config.load("tiny.json"), "train")
    matrices = []
    for device in (torch.device("cpu"), DEVICE):
        model = build_model("resnet18_half", {"name": "upernet", "width": 16}, num_classes=CLASSES)
        predict = Predictor(model.to(device), **IMAGENET)
        matrices.append(
            evaluate(predict.mask, EvalBatches(source, range(8), labels=True), device=device).matrix
        )
    expected, there = matrices
    assert int(there.sum()) == int(expected.sum())
    assert int((there - expected).abs().sum()) <= 0.002 * int(expected.sum())


@pytest.mark.usefixtures("tiny")
def test_soups_are_those_of_the_cpu() -> None:
    for number in range(2):
        torch.manual_seed(number)
        model = build_model(
            "resnet18_half", {"name": "fcn", "width": 8}, num_classes=5, seed=number
        )
        state = {"model": model.state_dict(), "classes": ["a"], "config": {}}
        checkpoint.save({**state, "init": "same", "trained_on": []}, Path(f"{number}.pt"))
    mixed = soup.uniform([Path("0.pt"), Path("1.pt")]).weights
    rng = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 3, 64, 64, generator=rng) for _ in range(3)]
    buffers = []
    for device in (torch.device("cpu"), DEVICE):
        model = build_model("resnet18_half", {"name": "fcn", "width": 8}, num_classes=5)
        model.load_state_dict(mixed)
        model.to(device)
        assert soup.reestimate_batchnorm(model, (x.to(device) for x in batches))
        buffers.append({name: x.cpu() for name, x in model.named_buffers()})
    torch.testing.assert_close(buffers[1], buffers[0], rtol=1e-4, atol=1e-4)


def test_soft_labels_are_those_of_the_cpu(tmp_path: Path) -> None:
    paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
    for seed, path in enumerate(paths):
        model = build_model("resnet18_half", "fcn", num_classes=3, seed=seed)
        segkit.save(model, path, classes=["a", "b", "c"])
    images = torch.randn(2, 3, 65, 97, generator=torch.Generator().manual_seed(0))
    expected = Teacher(paths, **IMAGENET, device=torch.device("cpu"))(images)
    soft = Teacher(paths, **IMAGENET, device=DEVICE)(images.to(DEVICE))
    torch.testing.assert_close(soft.cpu(), expected, rtol=0, atol=0.02)  # bf16


# ---- ranks and memory


def train_rank(device: str, shares: list[slice]) -> list[Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1)]
    model = nn.Sequential(*layers).double().to(device)
    convert_sync_batch_norm(model, torch.device(device))
    net = DistributedDataParallel(model) if distributed.world_size() > 1 else model
    criterion = build_loss(["cross_entropy", "dice"], num_classes=5).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rng = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 9, 7, generator=rng, dtype=torch.float64).to(device)
    masks = torch.randint(5, (6, 7, 5), generator=rng, dtype=torch.uint8).to(device)
    mine = shares[distributed.rank()]
    for _ in range(5):
        optimizer.zero_grad()
        loss = criterion({"out": net(images[mine])}, masks[mine])
        loss.backward()
        optimizer.step()
    return [x.detach().cpu() for x in model.parameters()]


def numpy_weights(device: str, shares: list[slice]) -> list[Any]:
    return [x.numpy() for x in train_rank(device, shares)]


def test_two_ranks_on_one_device_are_one_process() -> None:
    whole = train_rank(DEVICE.type, [slice(0, 6)])
    for weights in run_ranks(numpy_weights, 2, DEVICE.type, [slice(0, 4), slice(4, 6)]):
        for mine, expected in zip(weights, whole, strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), expected, rtol=0, atol=1e-9)


@pytest.mark.skipif(ON_CPU, reason="the CPU's memory is not limited here")
def test_memory_is_free_again_after_too_large_an_image() -> None:
    predict = Predictor(untrained().to(DEVICE), **IMAGENET)
    expected = predict.probabilities(photograph())
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / total)
    try:
        try:
            predict.probabilities(torch.zeros(3, 8000, 8000, dtype=torch.uint8))
        except torch.OutOfMemoryError:
            pass  # pytest.raises would keep the frames, and what they hold
        else:
            pytest.fail("the image was not too large")
        assert torch.cuda.memory_allocated() <= before
        torch.testing.assert_close(predict.probabilities(photograph()), expected, rtol=0, atol=1e-5)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
