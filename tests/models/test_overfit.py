"""Every family of transformers, and of new convolutional networks, overfits four photographs."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from benchmarks.overfit import GOAL, crops, fit
from segkit.models.backbones import BACKBONES
from segkit.models.backbones.beit import beit
from segkit.models.backbones.convnextv2 import ResponseNormBlock
from segkit.models.backbones.efficientnet_lite import TAPS, lite
from segkit.models.backbones.mit import MiT
from segkit.models.backbones.torchvision import convnext, convnext_of, efficientnet
from segkit.models.backbones.vit import vit
from segkit.models.segmenter import build_model
from segkit.training.losses import build_loss

TINY = {
    "vit": partial(vit, 48, 4, 3, patch=8, positions=8),
    "vit_rotary": partial(vit, 48, 6, 3, 2, gated=True, patch=8, positions=0),
    "beit": partial(beit, 48, 12, 3, 0.1),
    "convnext_v2": partial(
        convnext, convnext_of(16, 1, 1, 2, 1, block=ResponseNormBlock), drop_path=0.0
    ),
    "mit": partial(MiT, (16, 32, 80, 128), (1, 1, 1, 1)),
    "efficientnet_lite": partial(efficientnet, lite(0.5, 0.5), TAPS, 224, like="smp"),
}
UPERNET = {"name": "upernet", "width": 32, "aux_width": None}
QUERIES = {"name": "mask2former", "width": 32, "queries": 16, "layers": 3, "heads": 4}
QUERIES |= {"feedforward": 64, "pixel_layers": 1, "pixel_feedforward": 64}
CROSS_ENTROPY = {"name": "cross_entropy"}
MASKS = {"name": "mask_classification", "points": 512}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "vit upernet": ("vit", UPERNET, CROSS_ENTROPY),
    "vit map": (
        {"name": "vit", "output": "map"},
        {"name": "segformer", "width": 32},
        CROSS_ENTROPY,
    ),
    "eomt": (
        {"name": "vit_rotary", "output": "tokens", "omitted_blocks": 2},
        {"name": "eomt", "blocks": 2, "queries": 16, "heads": 3, "rotary": True, "annealing": 200},
        MASKS,
    ),
    "beit": ("beit", UPERNET, CROSS_ENTROPY),
    "convnext_v2": ("convnext_v2", UPERNET, CROSS_ENTROPY),
    "segformer": ("mit", {"name": "segformer", "width": 64}, CROSS_ENTROPY),
    "mask2former deformable": ("convnext_v2", QUERIES, MASKS),
    "mask2former fpn": ("convnext_v2", {**QUERIES, "pixel_decoder": "fpn"}, MASKS),
    "efficientnet_lite": ("efficientnet_lite", "unet", CROSS_ENTROPY),
}


@pytest.fixture(scope="module")
def photographs(shared_data: Path) -> tuple[Tensor, Tensor, int]:
    return crops(shared_data / "trashbags", 64, candidates=24)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_four_photographs_are_learned(
    name: str, photographs: tuple[Tensor, Tensor, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, build in TINY.items():
        monkeypatch.setitem(BACKBONES, key, build)
    images, masks, num_classes = photographs
    backbone, decoder, loss = MODELS[name]
    model = build_model(backbone, decoder, num_classes=num_classes, seed=0)
    criterion = build_loss([loss], num_classes=num_classes)
    miou, _ = fit(model, criterion, images, masks, num_classes, name, steps=300, lr=2e-3, every=20)
    assert miou > GOAL
