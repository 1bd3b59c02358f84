"""train.compile: a compiled model learns along the same curve."""

import shutil

import pytest
import torch

from segkit.engine import train_step
from segkit.losses import build_loss
from segkit.model import build_model
from segkit.optim import build_optimizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="needs a C++ compiler"
    ),
]


@pytest.mark.parametrize("decoder", ["unetplusplus", {"name": "upernet", "width": 32}], ids=str)
def test_the_loss_of_a_compiled_model_is_that_of_the_model(decoder: object) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 128, 128, generator=generator)
    masks = torch.randint(3, (2, 128, 128), generator=generator)
    criterion = build_loss(["cross_entropy", "dice"], num_classes=3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    curves = []
    for compiled in (False, True):
        model = build_model("resnet18_half", decoder, num_classes=3)
        for module in model.modules():
            if isinstance(module, torch.nn.modules.dropout._DropoutNd):
                module.p = 0.0  # a compiled model draws other numbers
        optimizer = build_optimizer(model, "adamw", lr=1e-3)
        if compiled:
            model.compile()
        curves.append(
            [
                float(
                    train_step(
                        model,
                        criterion,
                        optimizer,
                        [(images, masks)],
                        amp=None,
                        scaler=scaler,
                        clip_norm=None,
                    ).loss
                )
                for _ in range(10)
            ]
        )
    plain, compiled = curves
    assert plain[-1] < plain[0] - 0.1
    assert compiled == pytest.approx(plain, rel=1e-3)
