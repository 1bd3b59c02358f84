"""Settings that a configuration leaves open: worked by hand, and a training by data alone."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from segkit import train
from segkit.core import config
from segkit.core.errors import CheckpointError
from segkit.core.run import Run
from segkit.models.pretrained import published
from segkit.training.defaults import (
    as_recorded,
    augmentation,
    crop_size,
    learning_rate,
    set_rates,
    warmup_steps,
)

ROOT = Path(__file__).parents[2]
SMALL = ("model.backbone=resnet18_half", "train.batch_size=4", "data.workers=0", "train.amp=off")


@pytest.mark.parametrize(
    ("sizes", "crop"),
    [
        ([(600, 800)] * 3, (512, 512)),
        ([(65, 97)], (64, 96)),
        ([(31, 40)], (31, 32)),  # smaller than a multiple: as it is
        # of 20 images, the two smallest sides may be smaller than the crop
        ([(40, 500)] * 2 + [(300, 200)] * 18, (288, 192)),
        ([(40, 500)] * 3 + [(300, 200)] * 17, (32, 192)),
    ],
)
def test_a_crop_fits_nine_of_ten_images(
    sizes: list[tuple[int, int]], crop: tuple[int, int]
) -> None:
    assert crop_size(sizes) == crop


def test_learning_rates() -> None:
    assert learning_rate("sgd", pretrained=True, batch_norm=True) == (1e-2, 1.0)
    assert learning_rate("adamw", pretrained=True, batch_norm=False) == (1e-3, 0.1)
    assert learning_rate("adamw", pretrained=False, batch_norm=True) == (2e-3, 1.0)
    assert learning_rate("adamw", pretrained=False, batch_norm=False) == (3e-4, 1.0)


def test_the_norms_of_the_backbone_set_the_rate() -> None:
    for name, lr in (("resnet18", 2e-3), ("swin_t", 3e-4)):
        words = [f"model.backbone={name}", "model.weights=null"]
        optim = set_rates(config.override(config.Config(), words)).optim
        assert (optim.lr, optim.backbone_lr_factor) == (lr, 1.0)
    cfg = config.override(config.Config(), ["model.weights=a.pth", "optim.lr=0.5"])
    assert (set_rates(cfg).optim.lr, set_rates(cfg).optim.backbone_lr_factor) == (0.5, 0.1)


def test_a_warm_up_is_shorter_than_any_training() -> None:
    assert [warmup_steps(steps) for steps in (1, 19, 20, 400, 100_000)] == [0, 0, 1, 20, 500]


def test_values_of_a_run_are_used_again() -> None:
    old = config.to_dict(config.Config()) | {"optim": {"lr": 6e-5, "warmup_steps": 0}}
    old["augment"]["train"] = []
    old["model"]["weights"] = None
    cfg = as_recorded(config.Config(), old)
    assert (cfg.optim.lr, cfg.optim.warmup_steps) == (6e-5, 0)
    assert (cfg.augment.train, cfg.model.weights) == ((), None)
    given = config.override(config.Config(), ["optim.lr=0.1", "model.weights=a.pth"])
    cfg = as_recorded(given, old)
    assert (cfg.optim.lr, cfg.model.weights) == (0.1, "a.pth")


def draw(folder: Path, sizes: list[tuple[int, int]], *, seed: int = 0) -> None:
    """Write photographs with a bright square, and a COCO file of the squares."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for i, (height, width) in enumerate(sizes):
        pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
        top, left, side = height // 4, width // 4, min(height, width) // 2
        pixels[top : top + side, left : left + side, i % 3] = 250
        name = f"{seed}_{i}.png"
        Image.fromarray(pixels).save(folder / name)
        corners = [left, top, left + side, top, left + side, top + side, left, top + side]
        images.append({"id": i, "file_name": name, "height": height, "width": width})
        annotations.append(
            {"id": i, "image_id": i, "category_id": 1 + i % 2, "segmentation": [corners]}
        )
    categories = [{"id": 1, "name": "can"}, {"id": 2, "name": "bag"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / ("train.json" if seed == 0 else "test.json")).write_text(json.dumps(content))


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of photographs of several sizes, on a machine without a network and weights."""

    def refuse(url: str, argument: str) -> Path:
        raise CheckpointError(f"{argument}: {url} cannot be downloaded")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(published, "_download", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    draw(tmp_path / "photos", [(40, 56), (48, 33), (64, 64), (36, 47)] * 3)
    draw(tmp_path / "photos", [(33, 35)], seed=1)
    return tmp_path


def trained(words: tuple[str, ...], cfg: dict[str, Any]) -> dict[str, Any]:
    """Train a fold of a configuration for one epoch; return the run's configuration."""
    Path("photos.json").write_text(json.dumps(cfg))
    options = [part for word in (*words, "train.epochs=1") for part in ("--set", word)]
    train.main(["--cfg", "photos.json", "--folds", "0", "--run-dir", "run", *options])
    return Run(Path("run")).read("config.json")


def test_data_alone_trains_and_records_what_was_set(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"train": {"name": "coco", "annotations": "photos/train.json"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        recorded = trained(SMALL, {"data": data})
    assert recorded["model"]["weights"] is None
    assert recorded["augment"]["train"] == [*map(dict, augmentation((32, 32)))]
    assert (recorded["optim"]["lr"], recorded["optim"]["warmup_steps"]) == (2e-3, 0)
    said = capsys.readouterr().out
    assert "random weights" in said
    assert "optim.lr: 0.002, times 1 for the backbone (adamw, random weights)" in said
    again = ["--cfg", "photos.json", "--folds", "0", "--run-dir", "run", "--resume"]
    words = [part for word in (*SMALL, "train.epochs=2") for part in ("--set", word)]
    train.main([*again, *words])
    assert Run(Path("run")).read("config.json")["optim"] == recorded["optim"]


def documented() -> list[Any]:
    """The configurations of README.md and docs/ that can train by themselves."""
    cases = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for text in re.findall(r"^```json\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            if '"photos/train.json"' in text:
                marks = () if page.name == "README.md" else pytest.mark.slow
                cases.append(pytest.param(json.loads(text), id=page.name, marks=marks))
    return cases


def test_there_are_documented_configurations() -> None:
    assert len(documented()) >= 3


@pytest.mark.parametrize("cfg", documented())
@pytest.mark.usefixtures("photos")
def test_a_documented_configuration_trains(cfg: dict[str, Any]) -> None:
    recorded = trained(("train.batch_size=4", "data.workers=0", "train.amp=off"), cfg)
    assert recorded["optim"]["warmup_steps"] == 0
    assert torch.isfinite(torch.tensor(Run(Path("run")).read("summary.json")["fold0"]["miou"]))
