"""Scores of labels, rankings of planted errors, and the images that a run's folds have not seen."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from segkit.commands.explore import main as explore
from segkit.core import checkpoint
from segkit.core.errors import ArgumentError, SegkitError
from segkit.core.run import Run
from segkit.data.loader import digests
from segkit.inference.label_errors import (
    Contradiction,
    label_quality,
    local_means,
    rank_labels,
    soft_minimum,
    unseen_images,
)
from segkit.inference.trained_run import TrainedRun
from segkit.train import main as train


def test_soft_minimum_by_hand() -> None:
    low, high = math.exp((1 - 0.2) / 0.1), math.exp((1 - 0.9) / 0.1)
    expected = (0.2 * low + 2 * 0.9 * high) / (low + 2 * high)
    assert soft_minimum(torch.tensor([0.9, 0.2, 0.9])) == pytest.approx(expected, rel=1e-6)
    assert soft_minimum(torch.full((5, 5), 0.5)) == pytest.approx(0.5)
    assert soft_minimum(torch.zeros(0)) == 1


def test_local_means_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    values, labelled = rng.random((9, 14)), rng.random((9, 14)) > 0.3
    means = local_means(torch.from_numpy(values), torch.from_numpy(labelled), 5).numpy()
    for y, x in zip(*labelled.nonzero(), strict=True):
        window = np.s_[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
        assert means[y, x] == pytest.approx(values[window][labelled[window]].mean())


def test_regions_by_hand() -> None:
    mask = torch.zeros(20, 30, dtype=torch.uint8)
    mask[0] = 255
    predicted, likelihood = torch.zeros_like(mask), torch.ones(20, 30, dtype=torch.float64)
    predicted[:6, 10:15] = 2  # an object without an annotation, of which a row is ignored
    likelihood[:6, 10:15] = 0.25
    predicted[10, 10:14] = 1  # too small for a region
    likelihood[10, 10:14] = 0.5
    score, regions = label_quality(likelihood, predicted, mask, window=0)
    assert regions == [Contradiction(0, 2, 25, (10, 1, 15, 6), pytest.approx(0.25))]
    w = {value: math.exp((1 - value) / 0.1) for value in (0.25, 0.5, 1)}
    total = 25 * w[0.25] + 4 * w[0.5] + 541 * w[1]
    expected = (25 * 0.25 * w[0.25] + 4 * 0.5 * w[0.5] + 541 * w[1]) / total
    assert score == pytest.approx(expected)
    assert label_quality(likelihood, predicted, torch.full_like(mask, 255)) == (1, [])


# ------------------------------------------------------- planted errors in drawn pictures

SIDE = 64


def picture(number: int) -> Tensor:
    """A true mask with two objects of different classes."""
    rng = np.random.default_rng(number)
    mask = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    for left, kind in zip((4, 36), rng.permutation(3)[:2] + 1, strict=True):
        side, top = rng.integers(12, 20), rng.integers(4, 40)
        mask[top : top + side, left : left + side] = int(kind)
    return mask


def imitated(mask: Tensor) -> Tensor:
    """Probabilities of a good model: the true class, unsure within some pixels of the borders."""
    planes = F.one_hot(mask.long(), 4).permute(2, 0, 1).double()
    return 0.04 + 0.84 * F.avg_pool2d(planes[None], 5, 1, 2, count_include_pad=False)[0]


def faulty(mask: Tensor, kind: str, number: int) -> Tensor:
    """The annotation of a picture, with an error in one of its objects."""
    value = [c for c in (1, 2, 3) if (mask == c).any()][number % 2]
    inside, mask = mask == value, mask.clone()
    mask[inside] = value % 3 + 1 if kind == "swapped" else 0
    if kind == "shifted":
        mask[inside.roll((6, 6), (0, 1))] = value
    return mask


@pytest.mark.parametrize("kind", ["swapped", "missing", "shifted"])
def test_planted_errors_are_ranked_first(kind: str) -> None:
    planted = {7, 31, 52, 88}
    scores = {}
    for number in range(100):
        mask = picture(number)
        probabilities = imitated(mask)
        label = faulty(mask, kind, number) if number in planted else mask
        likelihood = probabilities.gather(0, label[None].long())[0]
        predicted = probabilities.argmax(0).to(torch.uint8)
        score, regions = label_quality(likelihood, predicted, label)
        scores[number] = score
        if number in planted:
            left, top, right, bottom = regions[0].box
            wrong = label != mask
            assert (wrong[top:bottom, left:right].sum() > 0.4 * wrong.sum()).item()
            assert (regions[0].annotated, regions[0].predicted) in {
                *zip(label[wrong].tolist(), mask[wrong].tolist(), strict=True)
            }
    assert {*sorted(scores, key=scores.__getitem__)[:4]} == planted


# ----------------------------------------------------------------------- labels of a run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two folds, ``both``, and one of its first fold only, ``single``."""
    home = tmp_path_factory.mktemp("home")
    demo = {"name": "demo", "root": str(home / "demo"), "train": 20, "test": 2, "size": 64}
    cfg = {
        "data": {"train": demo, "folds": 2, "selection": 0.2, "workers": 0},
        "model": {
            "weights": None,
            "backbone": "resnet18_half",
            "decoder": {"name": "upernet", "width": 8, "aux_width": None},
        },
        "augment": {"train": ["hflip"]},
        "train": {"epochs": 1, "batch_size": 4, "amp": "off"},
        "optim": {"warmup_steps": 1},
    }
    (home / "tiny.json").write_text(json.dumps(cfg))
    for name, folds in (("both", "0,1"), ("single", "0")):
        options = ["--run-dir", str(home / name), "--folds", folds, "--quiet"]
        train(["--cfg", str(home / "tiny.json"), *options])
    return home


def test_images_are_scored_by_a_fold_that_has_not_seen_them(runs: Path) -> None:
    run = TrainedRun(Run(runs / "both"))
    scored, rest = unseen_images(run)
    assert rest == []
    assert sorted(i for _, images in scored for i in images.indices) == list(range(20))
    for path, images in scored:
        trained_on = checkpoint.entries(path)["trained_on"]
        assert not {*trained_on}.intersection(digests(images.source, images.indices))
    scores = rank_labels(run, device="cpu")
    assert len(scores) == 20
    assert scores == sorted(scores, key=lambda labels: labels.score)


def test_a_single_fold_scores_what_it_has_not_seen(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, out = TrainedRun(Run(runs / "single")), tmp_path / "explore.html"
    _, [rest] = unseen_images(run)
    assert len(rest.indices) == 8  # those it trained on, of 20
    assert len(rank_labels(runs / "single", device="cpu")) == 12
    assert len(rank_labels(run, device="cpu", seen=True)) == 20
    explore(["--run", str(runs / "single"), "--out", str(out), "--device", "cpu"])
    told = capsys.readouterr().out
    assert "12 images were predicted by a fold that has not seen them; 8 are not scored" in told
    assert "Contradicted labels" in out.read_text()
    with out.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    regions = json.loads(out.with_suffix(".json").read_text())["regions"]
    assert [row["file"] for row in rows] == [region["file"] for region in regions]
    for region in regions:
        i = rest.source.names.index(region["file"])
        present = {rest.source.classes[c] for c in rest.source.mask(i).unique()}
        assert i not in rest.indices
        assert region["annotated"] in present
        assert region["annotated"] != region["predicted"]
        assert 0 <= region["left"] < region["right"] <= 64
        assert 0 <= region["score"] <= 1
    explore(["--run", str(runs / "single"), "--out", str(out), "--device", "cpu"])  # replaced
    out.with_suffix(".csv").write_text("mine")
    with pytest.raises(SegkitError, match=r"explore\.csv: exists already"):
        explore(["--run", str(runs / "single"), "--out", str(out), "--device", "cpu"])


def test_without_an_unseen_image_an_argument_is_named(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TrainedRun(Run(runs / "single"))
    everything = digests(run.source("train"), range(20))
    monkeypatch.setattr(checkpoint, "entries", lambda path: {"trained_on": everything})
    with pytest.raises(ArgumentError, match=r"every fold trained on every image; pass seen=True"):
        rank_labels(run, device="cpu")
    with pytest.raises(SegkitError, match=r"pass --seen$"):
        explore(["--run", str(runs / "single"), "--device", "cpu"])


def test_other_classes_are_refused(runs: Path) -> None:
    run = TrainedRun(Run(runs / "single"), ["data.train.train=20"])
    source = run.source("train")
    object.__setattr__(source, "classes", (*source.classes[:-1], "other"))
    with pytest.raises(SegkitError, match=r"best\.pt: has other classes than data\.train"):
        rank_labels(run, device="cpu")
