"""Mask transformers from end to end: they overfit, and are as any other model to the commands."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from segkit import infer, train
from segkit.core import checkpoint
from segkit.data.demo import draw_demo, open_demo
from segkit.models.segmenter import build_model
from segkit.training.losses import build_loss
from segkit.training.metrics import classes_of, confusion_matrix, scores
from segkit.training.optim import build_optimizer, build_schedule, set_lr
from segkit.training.step import train_step

HERE = Path(__file__).parent
SMALL = {
    "name": "mask2former",
    "width": 32,
    "queries": 16,
    "layers": 3,
    "heads": 4,
    "feedforward": 64,
    "pixel_layers": 1,
    "pixel_feedforward": 64,
}
LOSS = {"name": "mask_classification", "points": 256}
MODELS: dict[str, dict[str, Any]] = {
    "mask2former": {"backbone": "resnet18_half", "decoder": SMALL},
    "eomt": {
        "backbone": {
            "name": "vit_s_dinov2", "positions": 5, "output": "tokens", "omitted_blocks": 8,
        },
        "decoder": {"name": "eomt", "blocks": 2, "queries": 16, "annealing": 12},
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("pixel_decoder", ["deformable", "fpn"])
def test_mask2former_overfits_four_images(tmp_path: Path, pixel_decoder: str) -> None:
    source = open_demo(root=str(tmp_path / "demo"), train=4, test=1, size=64)
    images = torch.stack([source.image(i).float() for i in range(4)])
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    masks, classes, steps = torch.stack([source.mask(i) for i in range(4)]), 11, 150
    decoder = {**SMALL, "pixel_decoder": pixel_decoder}
    model = build_model("resnet18_half", decoder, num_classes=classes)
    criterion = build_loss(LOSS, num_classes=classes)
    optimizer = build_optimizer(model, "adamw", lr=1e-3)
    schedule = build_schedule("cosine", total=steps, warmup=10)
    for step in range(steps):
        set_lr(optimizer, schedule(step))
        train_step(model, criterion, optimizer, (images, masks), clip_norm=5.0, seeds=[step])
    with torch.no_grad():
        predicted = classes_of(model(images)["out"])
    assert scores(confusion_matrix(predicted, masks, classes)).miou > 0.9


def drawn(home: Path) -> dict[str, Any]:
    """The parts of ``data``: 20 drawn images and 4 of a test."""
    draw_demo(home / "demo", train=20, test=4, size=64)
    demo = {"name": "demo", "root": "demo", "train": 20, "test": 4, "size": 64}
    return {part: {**demo, "part": part} for part in ("train", "test", "test_labels")}


def photographed(home: Path, folder: Path) -> dict[str, Any]:
    """The same of photographs with COCO labels."""
    labels = json.loads((folder / "annotations/train.json").read_text())
    spread = labels["images"][:: len(labels["images"]) // 24]
    parts = {"train": spread[:20], "test": spread[20:24]}
    for part, images in parts.items():
        ids = {image["id"] for image in images}
        annotations = [x for x in labels["annotations"] if x["image_id"] in ids]
        subset = {**labels, "images": images, "annotations": annotations}
        (home / f"{part}.json").write_text(json.dumps(subset))
    coco = {"name": "coco", "images": str(folder / "images")}
    return {part: {**coco, "annotations": f"{part}.json"} for part in parts}


@pytest.fixture(
    scope="module",
    params=[f"{model} {data}" for data in ("drawn", "trashbags") for model in MODELS],
)
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and a run of two folds on two ranks, ``mask``."""
    home = tmp_path_factory.mktemp("home")
    model, data = request.param.split()
    if data == "drawn":
        parts = drawn(home)
    else:
        parts = photographed(home, request.getfixturevalue("shared_data") / "trashbags")
    cfg = {
        "data": {**parts, "folds": 2, "selection": 0.2, "workers": 0},
        "model": {"weights": None, **MODELS[model]},
        "augment": {"train": [{"name": "crop", "size": [64, 64]}]},
        "loss": {"terms": [LOSS]},
        "optim": {"lr": 1e-3, "warmup_steps": 1, "clip_norm": 1.0},
        "train": {"epochs": 2, "batch_size": 4, "accumulate": 2, "amp": "off", "save_every": 1},
    }
    (home / "tiny.json").write_text(json.dumps(cfg))
    torchrun(home, str(HERE.parent / "train.py"), *options("mask"))
    return home


def options(run: str) -> list[str]:
    return ["--cfg", "tiny.json", "--run-dir", f"runs/{run}", "--quiet"]


def torchrun(home: Path, *words: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launcher, "--max-restarts=1", *words], cwd=home, timeout=300, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_two_ranks_go_on_to_the_same_bits_after_one_is_killed(home: Path) -> None:
    fault = (str(HERE / "faults.py"), "kill", "step", "1", "struck")
    torchrun(home, *fault, *options("killed"), "--folds", "0")
    assert (home / "struck").exists()
    runs: list[Any] = [
        checkpoint.load(home / f"runs/{run}/fold0/last.pt") for run in ("mask", "killed")
    ]
    whole, killed = runs
    assert whole["step"] == killed["step"] > 2
    torch.testing.assert_close(killed["model"], whole["model"], rtol=0, atol=0)
    states = (run["optimizer"]["state"] for run in runs)
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.slow
def test_soups_and_votes_with_a_upernet_of_another_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    upernet = json.dumps({"name": "upernet", "width": 8, "aux_width": None})
    other = [f"model.decoder={upernet}", "model.backbone=resnet18_half"]
    other += ['loss.terms=["cross_entropy"]', "train.epochs=1"]
    settings = [word for setting in other for word in ("--set", setting)]
    train.main([*options("upernet"), "--folds", "0", *settings])
    infer.main(["--run-dir", "mask", "--soup", "--compare", "--out", "soup"])
    rows = {row["name"] for row in json.loads(Path("soup/scores.json").read_text())}
    assert {"fold0", "fold1", "uniform soup", "soft vote"} <= rows
    votes = ["--run-dir", "mask", "--run-dir", "upernet", "--vote", "soft", "--tta", "hflip"]
    infer.main([*votes, "--out", "vote"])
    rows = {row["name"] for row in json.loads(Path("vote/scores.json").read_text())}
    assert {"mask fold0", "mask fold1", "upernet fold0", "soft vote, views"} <= rows
    assert len(list(Path("vote/masks").rglob("*.png"))) == 4
