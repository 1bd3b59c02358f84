"""Boundary and object scores: by brute force, in shards, with ignored pixels."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from segkit.data.areas import connected_regions
from segkit.training.boundary import boundary_counts, boundary_f, contour_counts, near_boundary
from segkit.training.details import DetailCounter
from segkit.training.metrics import class_iou, summary
from segkit.training.objects import SIZES, object_counts

CLASSES = 11


def _mask(seed: int, size: tuple[int, int] = (33, 47), classes: int = CLASSES) -> Tensor:
    """Rectangles of classes over each other."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(size, dtype=np.uint8)
    for _ in range(12):
        (top, left), value = rng.integers(0, size), rng.integers(0, classes)
        mask[top : top + rng.integers(1, 16), left : left + rng.integers(1, 16)] = value
    return torch.from_numpy(mask)


def _pair(seed: int, **options: int) -> tuple[Tensor, Tensor]:
    """A prediction that is the truth with errors, and a truth with ignored pixels."""
    truth, other = _mask(seed, **options), _mask(seed + 1000, **options)
    predicted = truth.clone()
    predicted[10:25, 5:30] = other[10:25, 5:30]
    truth[3:9, 20:40] = 255
    truth[-1] = 255
    return predicted, truth


def _near(mask: Tensor, ignored: Tensor, distance: int) -> np.ndarray:
    """The definition: some pixel of the square is outside, or valid and of another class."""
    height, width = mask.shape
    near = np.zeros(mask.shape, dtype=bool)
    for y in range(height):
        for x in range(width):
            for i in range(y - distance, y + distance + 1):
                for j in range(x - distance, x + distance + 1):
                    inside = 0 <= i < height and 0 <= j < width
                    other = not inside or bool(not ignored[i, j] and mask[i, j] != mask[y, x])
                    near[y, x] |= other and not ignored[y, x]
    return near


@pytest.mark.parametrize("distance", [1, 2, 4])
def test_near_a_boundary_by_brute_force(distance: int) -> None:
    predicted, truth = (mask[:24, 8:36] for mask in _pair(distance))
    ignored = truth == 255
    for mask in (predicted, truth):
        near = near_boundary(mask, ignored, distance)
        assert (near.numpy() == _near(mask, ignored, distance)).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_boundary_counts_by_brute_force(seed: int) -> None:
    predicted, truth = _pair(seed)
    ignored = truth == 255
    distance = max(1, round(0.02 * math.hypot(33, 47)))
    ours, theirs = (_near(mask, ignored, distance) for mask in (predicted, truth))
    counts = boundary_counts(predicted, truth, CLASSES)
    for c in range(CLASSES):
        band = (predicted == c).numpy() & ours, (truth == c).numpy() & theirs
        assert counts[c].tolist() == [(band[0] & band[1]).sum(), band[1].sum(), band[0].sum()]


@pytest.mark.parametrize(("seed", "classes"), [(0, 11), (1, 20), (2, 3)])
def test_contours_by_brute_force(seed: int, classes: int) -> None:
    """Above 8 classes there are several planes of bits; at 130 x 190, contours match 2 apart."""
    predicted, truth = _pair(seed, size=(130, 190), classes=classes)
    ignored = truth == 255
    ours, theirs = (near_boundary(mask, ignored, 1).numpy() for mask in (predicted, truth))
    counts = contour_counts(predicted, truth, classes)
    for c in range(classes):
        a = np.argwhere((predicted == c).numpy() & ours)
        b = np.argwhere((truth == c).numpy() & theirs)
        distances = np.abs(a[:, None] - b[None]).max(2) if len(a) and len(b) else np.empty((0, 0))
        hit, reached = (
            int((distances.min(axis) <= 2).sum()) if distances.size else 0 for axis in (1, 0)
        )
        assert counts[c].tolist() == [reached, len(b), len(a), hit]


def test_a_shifted_square_by_hand() -> None:
    """A square of 10 x 10, and the same 1 to the right; bands are 1 wide, as in 40 x 40 pixels."""
    truth = torch.zeros(40, 40, dtype=torch.uint8)
    truth[10:20, 10:20] = 1
    predicted = truth.roll(1, 1)
    counts = boundary_counts(predicted, truth, 2)
    assert counts[1].tolist() == [18, 36, 36]  # two rows of 9 pixels that both have
    assert boundary_f(contour_counts(predicted, truth, 2)).tolist() == [1, 1]  # 1 apart
    far = boundary_f(contour_counts(truth.roll(3, 1), truth, 2))
    assert far[1].item() == 0.5  # of 36, 8 at the top, 8 at the bottom, and 2 next to them


def test_a_perfect_mask_scores_1_and_an_absent_class_nothing() -> None:
    predicted, truth = _mask(3), _mask(3)
    truth[:4] = 255
    classes = 1 + int(truth[truth != 255].max())
    for counts, statistic in (
        (boundary_counts(predicted, truth, classes + 1), class_iou),
        (contour_counts(predicted, truth, classes + 1), boundary_f),
    ):
        values = statistic(counts)
        assert values[: classes - 1].nansum() == (~values[: classes - 1].isnan()).sum()
        assert values[classes].isnan()


def test_a_class_of_one_mask_alone_scores_0() -> None:
    truth = torch.zeros(20, 20, dtype=torch.uint8)
    predicted = truth.clone()
    predicted[5:9, 5:9] = 1
    assert boundary_f(contour_counts(predicted, truth, 2))[1] == 0
    assert boundary_f(contour_counts(truth, predicted, 2))[1] == 0


def test_pixels_under_ignored_ones_change_nothing() -> None:
    predicted, truth = _pair(5)
    other = torch.where(truth == 255, (predicted + 1) % CLASSES, predicted)
    for function in (boundary_counts, contour_counts, object_counts):
        assert torch.equal(
            function(predicted, truth, CLASSES), function(other, truth, CLASSES)
        )  # fmt: skip


def _flood(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    left, regions = {(y, x) for y, x in np.ndindex(*mask.shape)}, []
    while left:
        todo, region = [left.pop()], set()
        while todo:
            y, x = todo.pop()
            region.add((y, x))
            for place in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if place in left and mask[place] == mask[y, x]:
                    left.remove(place)
                    todo.append(place)
        regions.append(region)
    return regions


@pytest.mark.parametrize("seed", range(4))
def test_regions_by_flooding(seed: int) -> None:
    mask = np.random.default_rng(seed).integers(0, 2 + seed, (23, 31)).astype(np.uint8)
    numbers, values = connected_regions(mask)
    expected = _flood(mask)
    assert len(values) == len(expected) == numbers.max() + 1
    for region in expected:
        (number,) = {int(numbers[place]) for place in region}
        assert {int(mask[place]) for place in region} == {int(values[number])}


def test_regions_of_a_spiral_are_one() -> None:
    mask = np.zeros((9, 9), dtype=np.uint8)
    mask[0], mask[:, 8], mask[8], mask[2:, 0], mask[2, :7] = 1, 1, 1, 1, 1
    numbers, values = connected_regions(mask)
    assert len(set(numbers[mask == 1].tolist())) == 1
    assert sorted(values) == [0, 1]


def test_objects_by_hand() -> None:
    truth = torch.zeros(200, 200, dtype=torch.uint8)
    truth[:10, :10] = 1  # 100 pixels, of which 60 are right
    truth[20:30, :10] = 1  # 100 pixels, of which 50 are right: no more than half
    truth[40:80, :40] = 1  # 1600 pixels: medium
    truth[100:200, 100:200] = 2  # 10000 pixels: large, but 5000 are ignored
    truth[100:150, 100:200] = 255
    predicted = torch.zeros_like(truth)
    predicted[:6, :10] = 1
    predicted[20:25, :10] = 1
    predicted[40:80, :40] = 2
    predicted[150:, 100:] = 2
    counts = object_counts(predicted, truth, 3)
    assert counts[1].tolist() == [[1, 2], [0, 1], [0, 0]]
    assert counts[2].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert counts[0, :, 1].sum() == 1


def test_shards_sum_to_the_whole() -> None:
    pairs = [_pair(seed) for seed in range(6)]
    whole = DetailCounter(range(6), CLASSES)
    shards = [DetailCounter(range(6), CLASSES) for _ in range(2)]
    for index, (predicted, truth) in enumerate(pairs):
        for counter in (whole, shards[index % 2]):
            counter.add(index, predicted, truth, torch.empty(0))
    results = [counter.result(torch.device("cpu")) for counter in (whole, *shards)]
    for name in ("boundaries", "contours", "objects"):
        expected, first, second = (getattr(result, name) for result in results)
        assert torch.equal(first + second, expected)
        assert expected.sum() > 0
    scores = results[0].to_dict()
    assert [*scores] == ["boundary_iou", "boundary_f", *(f"recall_{size}" for size in SIZES)]
    assert scores["recall_large"]["mean"] is None  # of 33 x 47 pixels, none is large
    assert scores["recall_large"]["per_class_intervals"] == [None] * CLASSES
    for score in scores.values():
        values = zip(score["per_class"], score["per_class_intervals"], strict=True)
        for value, interval in [(score["mean"], score["interval"]), *values]:
            assert (value is None) == (interval is None)
            assert value is None or interval[0] <= interval[1]
    low, high = scores["boundary_iou"]["interval"]
    assert low < scores["boundary_iou"]["mean"] < high


def test_the_summary_of_a_constant_has_no_spread() -> None:
    counts = torch.tensor([[[3, 4, 5]] * 2] * 7)
    values = summary(counts, class_iou)
    assert values["per_class"] == [0.5, 0.5]
    assert values["per_class_intervals"] == [[0.5, 0.5]] * 2
