"""Pseudo labels: thresholds by hand, and the file read back to the same masks."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from segkit.core.errors import DataError
from segkit.data.coco import CocoSource
from segkit.inference.pseudo import Confidence, confident, write_pseudo_labels

CLASSES = ("ground", "paper", "metal")


def _column(*pixels: tuple[float, float, float]) -> Tensor:
    """Probabilities (3, N, 1) of pixels one below the other."""
    return torch.tensor(pixels).T[:, :, None]


def test_confident_by_hand() -> None:
    probabilities = _column(
        (0.7, 0.2, 0.1), (0.6, 0.3, 0.1), (0.1, 0.5, 0.4), (0.0, 0.9, 0.1), (0.1, 0.1, 0.8)
    )
    mask = confident(probabilities, [0.7, 0.6, 0.85])
    assert mask[:, 0].tolist() == [0, 255, 255, 1, 255]
    assert mask.dtype == torch.uint8


def _two_class_pixels(*confidences: float) -> Tensor:
    return _column(*((value, 1 - value, 0.0) for value in confidences))


@pytest.mark.parametrize(
    ("quantile", "kept"), [(0.0, 10), (0.25, 8), (0.5, 5), (0.75, 3), (0.9, 1), (1.0, 1)]
)
def test_a_quantile_keeps_its_share(quantile: float, kept: int) -> None:
    confidences = [0.51, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.99999]
    probabilities = _two_class_pixels(*confidences)
    count = Confidence(3)
    for pixel in probabilities.split(3, dim=1):  # in several images
        count.add(pixel)
    thresholds = count.thresholds(quantile)
    assert thresholds[1:] == [1, 1]
    mask = confident(probabilities, thresholds)
    assert (mask[:, 0] == 0).tolist() == [False] * (10 - kept) + [True] * kept


def test_quantiles_by_class_match_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = (5 * torch.randn(3, 200, 300, generator=generator)).softmax(0)
    count = Confidence(3)
    count.add(probabilities)
    shares = [0.2, 0.5, 0.9]
    confidence, classes = probabilities.max(0)
    for index, threshold in enumerate(count.thresholds(shares)):
        exact = confidence[classes == index].quantile(shares[index])
        assert (1 - threshold) / (1 - float(exact)) == pytest.approx(1, abs=0.02)


def test_sure_pixels_have_a_threshold_they_reach() -> None:
    probabilities = _column((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    count = Confidence(3)
    count.add(probabilities)
    mask = confident(probabilities, count.thresholds(0.5))
    assert mask[:, 0].tolist() == [0, 1]


def test_bad_quantile() -> None:
    with pytest.raises(ValueError, match="0 to 1"):
        Confidence(3).thresholds(1.5)


@pytest.mark.parametrize("classes", [CLASSES, ("sky", "road", "car")])
def test_the_file_reads_back_to_the_same_masks(tmp_path: Path, classes: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for name, size in {"a.png": (65, 97), "b.png": (1, 7), "c.png": (33, 32)}.items():
        values = torch.tensor([0, 1, 2, 255], dtype=torch.uint8)
        masks[name] = values[torch.randint(0, 4, size, generator=generator)]
        Image.new("RGB", size[::-1]).save(tmp_path / name)
    path = tmp_path / "pseudo.json"
    write_pseudo_labels(path, masks.items(), classes=classes, info={"round": 1})
    source = CocoSource(annotations=str(tmp_path / "pseudo.json"), background=classes[0])
    assert source.classes == classes
    assert source.names == tuple(masks)
    for index, mask in enumerate(masks.values()):
        assert torch.equal(source.mask(index), mask)
    content = json.loads((tmp_path / "pseudo.json").read_text())
    assert content["info"] == {"round": 1}
    assert source.info == {"round": 1}


@pytest.mark.parametrize("masks", [[], [("a.png", torch.zeros(2, 2, dtype=torch.uint8))]])
def test_labels_of_nothing_are_refused(tmp_path: Path, masks: list[tuple[str, Tensor]]) -> None:
    with pytest.raises(DataError, match="no pixel was labelled"):
        write_pseudo_labels(tmp_path / "pseudo.json", masks, classes=CLASSES)
    assert not list(tmp_path.iterdir())
