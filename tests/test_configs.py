"""The large shipped configurations train: three steps on crops of 64 x 64."""

import pytest
import torch

from segkit.core import config
from segkit.training.build import build_training
from segkit.training.step import train_step

LARGE = ("beit_l", "convnext_xl", "segformer_b5", "swin_l_mask", "vit_b_eomt", "vit_l_upernet")
CLASSES = 4


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_three_steps(name: str) -> None:
    cfg = config.override(config.load(name), ["train.amp=off"])
    state, criterion = build_training(cfg, CLASSES, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    masks = torch.randint(CLASSES, (2, 64, 64), generator=generator, dtype=torch.uint8)
    before = {key: x.clone() for key, x in state.model.decoder.named_parameters()}
    for _ in range(3):
        step = train_step(state.model, criterion, state.optimizer, (images, masks))
        assert step.finite
        assert step.loss.isfinite()
    changed = [
        key for key, x in state.model.decoder.named_parameters() if not torch.equal(x, before[key])
    ]
    assert len(changed) > 0.9 * len(before)
