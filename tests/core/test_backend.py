"""Operations that CUDA cannot compute deterministically, and where cuDNN's autotuner is on.

No GPU is needed: the operations are recorded, from tensors without data where that is possible.
"""

import ctypes
import importlib
import inspect
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyramids import PYRAMID_DECODERS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from segkit import train
from segkit.core import backend, config
from segkit.inference.predictor import Predictor
from segkit.models.backbones import BACKBONES
from segkit.models.layers import average_pool
from segkit.models.segmenter import build_model
from segkit.training.losses import LOSSES, build_loss
from segkit.training.optim import build_optimizer
from segkit.training.step import autocast_dtype

FREEING = """
import resource, sys, torch
sys.path.insert(0, sys.argv[1])
from segkit.core import backend
backend.keep_freed_memory()
for step in range(8):
    if step == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(1 << 22) for _ in range(8)]  # 4096 pages each
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

CONFIGS = [
    pytest.param(path.stem, marks=() if path.stem in ("demo", "swin") else pytest.mark.slow)
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.json"))
]

REFUSED = {
    "torch.nn.AvgPool3d": ["avg_pool3d_backward"],
    "torch.nn.AdaptiveAvgPool2d": ["_adaptive_avg_pool2d_backward"],
    "torch.nn.AdaptiveAvgPool3d": ["_adaptive_avg_pool3d_backward"],
    "torch.nn.AdaptiveMaxPool2d": ["adaptive_max_pool2d_backward"],
    "torch.nn.FractionalMaxPool2d": ["fractional_max_pool2d_backward"],
    "torch.nn.FractionalMaxPool3d": ["fractional_max_pool3d_backward"],
    "torch.nn.MaxPool3d": ["max_pool3d_with_indices_backward"],
    "torch.nn.MaxUnpool1d": ["max_unpool2d"],
    "torch.nn.MaxUnpool2d": ["max_unpool2d"],
    "torch.nn.MaxUnpool3d": ["max_unpool3d"],
    "torch.nn.functional.interpolate": [
        "upsample_linear1d_backward",
        "upsample_bilinear2d_backward",
        "upsample_bicubic2d_backward",
        "upsample_trilinear3d_backward",
        "_upsample_bilinear2d_aa_backward",
        "_upsample_bicubic2d_aa_backward",
    ],
    "torch.nn.ReflectionPad1d": ["reflection_pad1d_backward"],
    "torch.nn.ReflectionPad2d": ["reflection_pad2d_backward"],
    "torch.nn.ReflectionPad3d": ["reflection_pad3d_backward"],
    "torch.nn.ReplicationPad1d": ["replication_pad1d_backward"],
    "torch.nn.ReplicationPad2d": ["replication_pad2d_backward"],
    "torch.nn.ReplicationPad3d": ["replication_pad3d_backward"],
    "torch.nn.NLLLoss": ["nll_loss_forward", "nll_loss2d_forward"],
    "torch.nn.CTCLoss": ["_ctc_loss_backward"],
    "torch.nn.EmbeddingBag": ["_embedding_bag"],
    "torch.Tensor.put_": ["put_", "put"],
    "torch.histc": ["histc"],
    "torch.bincount": ["bincount"],
    "torch.kthvalue": ["kthvalue"],
    "torch.median": ["median.dim"],
    "torch.cumsum": ["cumsum"],
    "torch.nn.functional.grid_sample": ["grid_sampler_2d_backward", "grid_sampler_3d_backward"],
    "torch.Tensor.scatter_reduce": ["scatter_reduce"],
    "torch.Tensor.resize_": [],  # of quantized tensors only
}
"""By the name in PyTorch's documentation: the operations that raise with deterministic algorithms.

``kthvalue`` and ``cumsum`` of floats are refused by torch 2.9 only.
"""

OPERATIONS = {name for names in REFUSED.values() for name in names}


class Recorder(TorchDispatchMode):
    """Collects the refused operations among those that run in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name, overload = func._schema.name.removeprefix("aten::"), func._overloadname
        if {name, f"{name}.{overload}"} & OPERATIONS:
            whole_numbers = name == "cumsum" and not args[0].is_floating_point()
            unweighted = name == "bincount" and (len(args) < 2 or args[1] is None)
            if not whole_numbers and not unweighted:
                self.refused.add(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Deterministic algorithms, and bilinear interpolation as it is on CUDA then."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(F, "interpolate", interpolate_as_on_cuda)
    backend.set_deterministic(True)
    yield
    backend.set_deterministic(False)


PLAIN_INTERPOLATE = F.interpolate
BY_INDEX = importlib.import_module("torch._decomp.decompositions")._upsample_linear_vec


def interpolate_as_on_cuda(
    x: Tensor, size: Any = None, mode: str = "nearest", align_corners: Any = None, **rest: Any
) -> Tensor:
    if mode == "bilinear" and not rest:
        return BY_INDEX(x, list(size), align_corners, None)
    return PLAIN_INTERPOLATE(x, size, mode=mode, align_corners=align_corners, **rest)


def test_bilinear_interpolation_is_made_of_indices_on_cuda() -> None:
    source = inspect.getsource(PLAIN_INTERPOLATE)
    assert re.search(r"are_deterministic_algorithms_enabled\(\)(.|\n)*_upsample_linear_vec", source)


def test_the_list_is_that_of_the_documentation() -> None:
    assert torch.use_deterministic_algorithms.__doc__
    text = torch.use_deterministic_algorithms.__doc__.split(":class:`RuntimeError` when ``mode")[1]
    named = re.findall(r"\* :\w+:`([\w.]+)`", text.split("In addition")[0])
    assert len(named) > 20
    assert set(named) <= set(REFUSED)


def refused_in_a_step(backbone: Any, decoder: Any, terms: Any, aux_weight: Any = 0.4) -> set[str]:
    """Refused operations of a step: of the model without data, and of its loss on noise."""
    with torch.device("meta"):
        model = build_model(backbone, decoder, num_classes=4).to("meta")
    criterion = build_loss(terms, aux_weight=aux_weight, num_classes=4)
    with Recorder() as recorder:
        outputs = model(torch.empty(2, 3, 96, 128, device="meta"))
        sum(x.sum() for x in outputs.values()).backward()
        noise = {name: torch.randn(x.shape).mul(1).requires_grad_() for name, x in outputs.items()}
        target = torch.randint(0, 4, (2, 96, 128))
        target[0, :9] = 255
        criterion(noise, target).backward()
    return recorder.refused


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_trains_deterministically(name: str) -> None:
    cfg = config.load(name)
    refused = refused_in_a_step(
        cfg.model.backbone, cfg.model.decoder, cfg.loss.terms, cfg.loss.aux_weight
    )
    assert not refused


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("decoder", PYRAMID_DECODERS)
def test_every_decoder_trains_deterministically(decoder: str) -> None:
    small = {"queries": 3, "layers": 3, "pixel_layers": 1} if decoder == "mask2former" else {}
    assert not refused_in_a_step("resnet18_half", {"name": decoder, **small}, ["cross_entropy"])


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_every_backbone_trains_deterministically(backbone: str) -> None:
    assert not refused_in_a_step(backbone, "fcn", ["cross_entropy"])


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"presence", "mask_classification"}))
def test_every_loss_trains_deterministically(loss: str) -> None:
    terms = [{"name": loss, **({"min_kept": 50} if loss == "ohem_cross_entropy" else {})}]
    assert not refused_in_a_step("resnet18_half", "fcn", terms)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_every_optimizer_steps_deterministically(name: str) -> None:
    model = build_model("resnet18_half", {"name": "fcn", "width": 8}, num_classes=2)
    optimizer = build_optimizer(model, name, lr=0.1)
    model(torch.randn(1, 3, 64, 64))["out"].sum().backward()
    with Recorder() as recorder:
        optimizer.step()
    assert not recorder.refused


def test_the_recorder_sees_what_is_refused() -> None:
    x = torch.randn(1, 1, 9, 9, requires_grad=True)
    with Recorder() as recorder:
        F.adaptive_avg_pool2d(x, 2).sum().backward()
        PLAIN_INTERPOLATE(x, (5, 5), mode="bilinear").sum().backward()
        x.flatten().kthvalue(3)
        torch.ones(3).cumsum(0)
    expected = {"_adaptive_avg_pool2d_backward", "upsample_bilinear2d_backward"}
    assert recorder.refused == {*expected, "kthvalue", "cumsum"}


@pytest.mark.parametrize("size", [(13, 7), (6, 6), (2, 3), (1, 1)])
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_both_forms_of_average_pooling_are_equal(size: tuple[int, int], bins: int) -> None:
    x = torch.randn(2, 3, *size, requires_grad=True)
    results = []
    for enabled in (False, True):
        backend.set_deterministic(enabled)
        try:
            y = average_pool(x, bins)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
        finally:
            backend.set_deterministic(False)
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_average_pooling_in_half_precision_is_rounded_once() -> None:
    x = torch.rand(1, 2, 17, 17).bfloat16()
    backend.set_deterministic(True)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            y = average_pool(x, 3)
    finally:
        backend.set_deterministic(False)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, F.adaptive_avg_pool2d(x.float(), 3).bfloat16(), rtol=0, atol=4e-3)


def test_hard_pixels_are_the_same_in_both_forms() -> None:
    logits, target = torch.randn(2, 4, 9, 9), torch.randint(0, 4, (2, 9, 9))
    loss = build_loss([{"name": "ohem_cross_entropy", "min_kept": 30}], num_classes=4)
    plain = loss(logits, target)
    backend.set_deterministic(True)
    try:
        sorted_ = loss(logits, target)
    finally:
        backend.set_deterministic(False)
    assert sorted_ == plain


def test_cublas_is_told_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    values = []

    def session(*_: Any, **__: Any) -> None:
        values.append(os.environ["CUBLAS_WORKSPACE_CONFIG"])
        raise KeyboardInterrupt

    monkeypatch.setattr(train.distributed, "session", session)
    try:
        with pytest.raises(KeyboardInterrupt):
            train.main(["--cfg", "demo", "--set", "train.deterministic=true"])
    finally:
        backend.set_deterministic(False)
    assert values == [":4096:8"]


@pytest.fixture
def benchmark() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = before


@pytest.mark.usefixtures("benchmark")
@pytest.mark.parametrize("enabled", [False, True])
def test_autotuning_is_put_back(enabled: bool) -> None:
    torch.backends.cudnn.benchmark = enabled
    with backend.cudnn_autotuning(not enabled):
        assert torch.backends.cudnn.benchmark is not enabled
    assert torch.backends.cudnn.benchmark is enabled


@pytest.mark.usefixtures("benchmark")
def test_no_autotuning_in_prediction() -> None:
    class Model(nn.Module):
        def forward(self, image: Tensor) -> dict[str, Tensor]:
            assert not torch.backends.cudnn.benchmark
            return {"out": image}

    torch.backends.cudnn.benchmark = True
    predict = Predictor(Model(), mean=(0, 0, 0), std=(1, 1, 1))
    predict.mask(torch.zeros(3, 40, 50, dtype=torch.uint8))
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("deterministic", [False, True])
def test_autotuning_in_training_steps_whose_shapes_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    demo = {"name": "demo", "root": "demo", "train": 12, "test": 1, "size": 32}
    decoder = {"name": "fcn", "width": 8, "aux": False}
    settings = {
        "data": {"train": demo, "folds": 2, "workers": 0},
        "model": {"backbone": "resnet18_half", "decoder": decoder},
        "train": {"epochs": 1, "batch_size": 2, "deterministic": deterministic},
    }
    Path("tiny.json").write_text(json.dumps(settings))
    steps, evaluations = [], []
    take_step, evaluate = train.train_step, train.evaluate

    def watched_step(*args: Any, **options: Any) -> Any:
        steps.append(torch.backends.cudnn.benchmark)
        return take_step(*args, **options)

    def watched_evaluate(*args: Any, **options: Any) -> Any:
        evaluations.append(torch.backends.cudnn.benchmark)
        return evaluate(*args, **options)

    monkeypatch.setattr(train, "train_step", watched_step)
    monkeypatch.setattr(train, "evaluate", watched_evaluate)
    try:
        train.main(["--cfg", "tiny.json", "--folds", "0", "--run-dir", "run"])
    finally:
        backend.set_deterministic(False)
    assert not steps[0]
    assert len(steps) > 1
    assert all(enabled is not deterministic for enabled in steps[1:])
    assert evaluations == [False]
    assert not torch.backends.cudnn.benchmark


def test_automatic_precision_is_the_same_on_torch_2_9(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    newer = autocast_dtype("auto", cpu)
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        for name, key in (("amx_tile", "amx_bf16"), ("avx512_bf16", "avx512_bf16")):
            supported = bool(capabilities.get(key))
            monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda yes=supported: yes)
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert autocast_dtype("auto", cpu) is newer


on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


@on_glibc
def test_freed_memory_is_kept() -> None:
    """A page that the system took back costs a fault; most of 163,840 do by default."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FREEING, str(Path(__file__).parents[2])]
    assert int(subprocess.check_output(command, env=clean)) < 1000


@on_glibc
def test_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(gnu_get_libc_version=None))
    backend.keep_freed_memory()  # mallopt would be missing
