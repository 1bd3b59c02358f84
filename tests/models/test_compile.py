"""train.compile: a compiled model learns along the same curve.

In float64: BatchNorm over few images magnifies roundings tenfold a step, which in fp32 moves the
losses by 1e-3 after a handful of steps, compiled or not.
"""

import shutil
from functools import partial

import pytest
import torch
from torch import nn

from segkit.models.segmenter import build_model
from segkit.training.losses import build_loss
from segkit.training.optim import build_optimizer
from segkit.training.step import train_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="needs a C++ compiler"
    ),
]


@pytest.mark.parametrize("decoder", ["unetplusplus", {"name": "upernet", "width": 32}], ids=str)
def test_the_losses_of_a_compiled_model_are_those_of_the_model(decoder: object) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 128, 128, generator=generator, dtype=torch.float64)
    masks = torch.randint(3, (2, 128, 128), generator=generator)
    step = partial(
        train_step,
        criterion=build_loss(["cross_entropy", "dice"], num_classes=3),
        batches=[(images, masks)],
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
