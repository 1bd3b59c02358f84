"""Images of other than three bands of 8 bits, from the folder to the results."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import segkit
from segkit import infer, train
from segkit.commands import check, plan
from segkit.core import config
from segkit.data.bands import find_reading
from segkit.data.images import as_rgb
from segkit.training.defaults import set_channels

SIDE = 40


def scene(i: int) -> tuple[np.ndarray, np.ndarray]:
    """Brightness in 0..1 with a bright square, and its mask."""
    rng = np.random.default_rng(i)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    top, left = rng.integers(0, SIDE - 20, 2)
    mask[top : top + 20, left : left + 20] = 1
    return np.clip(0.2 + 0.6 * mask + rng.normal(0, 0.05, mask.shape), 0, 1), mask


def gray_of_12_bits(values: np.ndarray, path: Path) -> None:
    Image.fromarray((4095 * values).astype(np.uint16)).save(path.with_suffix(".png"))


def four_bands(values: np.ndarray, path: Path) -> None:
    bands = np.stack([0 * values, 0 * values, 0 * values, values], 2)  # seen in the fourth only
    image = Image.fromarray((255 * bands).clip(1, 254).astype(np.uint8), "RGBA")
    image.save(path.with_suffix(".tif"))


KINDS = {
    "gray": (gray_of_12_bits, {"channels": 1, "range": [0, 4095]}),
    "four bands": (four_bands, {"channels": 4}),
}


def folder(kind: str) -> Path:
    """Make photographs of a kind, their masks, and photographs to predict."""
    for part, count in (("images", 10), ("new", 2)):
        Path(part).mkdir()
        for i in range(count):
            values, mask = scene(i + 50 * (part == "new"))
            KINDS[kind][0](values, Path(part, f"{i}.x"))
            if part == "images":
                Path("masks").mkdir(exist_ok=True)
                Image.fromarray(mask).save(f"masks/{i}.png")
    Path("new/notes.txt").write_text("mine")
    return Path("images")


def configuration(reading: dict[str, Any]) -> dict[str, Any]:
    source = {
        "name": "masks",
        "images": "images",
        "masks": "masks",
        "classes": ["ground", "square"],
    }
    return {
        "data": {"train": {**source, **reading}, "folds": 2, "selection": 0, "workers": 0},
        "model": {"backbone": {"name": "unet", "width": 8}, "decoder": "fcn", "weights": None},
        "augment": {"train": ["hflip", "photometric", {"name": "gamma", "range": [0.9, 1.1]}]},
        "optim": {"lr": 0.01, "backbone_lr_factor": 1},
        "train": {"epochs": 40, "batch_size": 4, "evaluate_every": 40},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_folder_to_masks(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images, reading = folder(kind), KINDS[kind][1]
    assert find_reading(sorted(images.iterdir())) == reading
    Path("cfg.json").write_text(json.dumps(configuration(reading)))
    check.main(["--cfg", "cfg.json"])
    train.main(["--cfg", "cfg.json", "--run-dir", "run", "--device", "cpu", "--folds", "0"])
    bands = reading["channels"]
    assert f"images of {bands} bands: color operations change" in capsys.readouterr().out
    recorded = json.loads(Path("run/config.json").read_text())
    assert recorded["model"]["backbone"]["in_channels"] == bands
    assert len(recorded["data"]["mean"]) == len(recorded["data"]["std"]) == bands
    infer.main(["--run-dir", "run", "--images", "new", "--device", "cpu"])
    assert "1 file left out in new: 1 .txt, such as notes.txt" in capsys.readouterr().err
    predict = segkit.load("run/fold0/best.pt", device="cpu")
    for i in range(2):
        photo = next(Path("new").glob(f"{i}.*"))
        written = np.array(Image.open(f"run/infer-images/masks/{i}.png"))
        prediction = predict(photo)
        assert np.array_equal(prediction.mask.numpy(), written)
        assert prediction.image.shape == (bands, SIDE, SIDE)
        assert prediction.overlay().size[0] >= SIDE
        true = scene(i + 50)[1]
        assert (written == true).mean() > 0.8


def test_a_plan_measures_bands_and_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "check_memory", lambda *_, **__: 1.0)
    monkeypatch.setattr(plan, "obtain", lambda *_, **__: (None, "offline"))
    Path("photos").mkdir()
    monkeypatch.chdir("photos")
    folder("gray")
    monkeypatch.chdir(tmp_path)
    made = segkit.plan("photos", hours=1, device="cpu").config["data"]
    assert (made["train"]["channels"], made["train"]["range"]) == (1, [0, 4095])
    assert made["mean"] == pytest.approx([0.35], abs=0.05)  # a quarter of the pixels is bright


def test_statistics_of_rgb_are_extended_to_the_bands() -> None:
    def made(channels: int, **data: Any) -> config.DataConfig:
        raw = configuration({"channels": channels})
        return set_channels(config.parse({**raw, "data": {**raw["data"], **data}})).data

    assert made(3).mean == config.IMAGENET_MEAN
    assert made(5).mean == (0.485, 0.456, 0.406, 0.485, 0.456)
    assert made(1).std == (pytest.approx(0.226, abs=1e-3),)
    assert made(2, mean=[0.1, 0.2]).mean == (0.1, 0.2)
    with pytest.raises(config.ConfigError, match=r"data\.mean: has 2 numbers; expected 4"):
        made(4, mean=[0.1, 0.2])


def test_alpha_is_no_band(tmp_path: Path) -> None:
    pixels = np.full((8, 8, 4), 255, np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    assert find_reading([tmp_path / "a.png"]) == {}
    Image.fromarray(pixels[..., 0].astype(np.float32) - 300).save(tmp_path / "b.tif")
    assert find_reading([tmp_path / "b.tif"]) == {"channels": 1, "range": [-45.0, -45.0]}


def test_a_band_is_shown_as_gray() -> None:
    image = torch.arange(8, dtype=torch.uint8).view(2, 2, 2)
    assert torch.equal(as_rgb(image), image[:1].expand(3, 2, 2))
    assert torch.equal(as_rgb(torch.cat([image, image])), torch.cat([image, image])[:3])
