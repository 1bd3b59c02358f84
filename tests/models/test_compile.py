"""``train.compile``: one graph per model, and the same loss curve as without it.

The curve is compared in float64: BatchNorm over few images magnifies roundings tenfold per step,
which in fp32 moves the losses by 1e-3 after a few steps, compiled or not.
"""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from segkit.core import config
from segkit.models.segmenter import build_model
from segkit.training.losses import build_loss
from segkit.training.optim import build_optimizer
from segkit.training.step import train_step

CONFIGS = [path.stem for path in sorted((Path(__file__).parents[2] / "configs").glob("*.json"))]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "name",
    [x if x in ("demo", "swin_b") else pytest.param(x, marks=pytest.mark.slow) for x in CONFIGS],
)
def test_a_shipped_model_compiles_to_one_graph(name: str, training: bool) -> None:
    cfg = config.load(name).model
    torch.compiler.reset()
    with torch.device("meta"):
        model = build_model(cfg.backbone, cfg.decoder, num_classes=11).train(training)
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # raises on a graph break
    with torch.autocast("cpu", torch.bfloat16):
        outputs = compiled(torch.empty(2, 3, 128, 128, device="meta"))
    assert outputs["out"].shape == (2, 11, 128, 128)


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="needs a C++ compiler"
)
@pytest.mark.parametrize("decoder", ["unetplusplus", {"name": "upernet", "width": 32}], ids=str)
def test_the_losses_of_a_compiled_model_are_those_of_the_model(decoder: object) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 128, 128, generator=generator, dtype=torch.float64)
    masks = torch.randint(3, (2, 128, 128), generator=generator)
    step = partial(
        train_step,
        criterion=build_loss(["cross_entropy", "dice"], num_classes=3),
        batch=(images, masks),
        amp=None,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        clip_norm=None,
    )
    curves = []
    for compiled in (False, True):
        model = build_model("resnet18_half", decoder, num_classes=3).double()
        for module in model.modules():
            if isinstance(module, nn.Dropout | nn.Dropout2d):
                module.p = 0.0  # a compiled model draws other numbers
        optimizer = build_optimizer(model, "sgd", lr=0.02)
        if compiled:
            model.compile()
        curves.append([float(step(model, optimizer=optimizer).loss) for _ in range(8)])
    plain, compiled = curves
    assert plain[-1] < plain[0] - 0.1
    assert compiled == pytest.approx(plain, rel=1e-3)
