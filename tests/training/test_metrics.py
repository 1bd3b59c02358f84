"""Metrics against brute force over pixels, and counts that add up."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import segkit.training.metrics
from segkit.training.metrics import (
    IGNORE,
    bootstrap_interval,
    classes_of,
    confusion_matrix,
    counts_of,
    matrices_of,
    paired_difference,
    per_image_miou,
    pixel_counts,
    scores,
)


def batch(
    images: int = 3, classes: int = 4, size: tuple[int, int] = (65, 97)
) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(images, classes, *size, generator=rng)
    target = torch.randint(classes, (images, *size), generator=rng, dtype=torch.uint8)
    target[torch.rand(target.shape, generator=rng) < 0.2] = IGNORE
    return logits, target


def brute_force(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for truth in range(classes):
        for label in range(classes):
            matrix[truth, label] = ((target == truth) & (predicted == label)).sum()
    return matrix


@pytest.mark.parametrize("classes", [2, 11, 150, 255])
def test_classes_of_is_argmax_in_bytes(classes: int) -> None:
    logits, _ = batch(classes=classes, size=(13, 17))
    logits = (logits * 2).round()  # equal maxima are common
    expected = logits.argmax(1)
    for form in (logits, logits.to(memory_format=torch.channels_last), logits.bfloat16()):
        predicted = classes_of(form)
        assert predicted.dtype == torch.uint8
        assert torch.equal(predicted.long(), expected)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute on the CPU in the way that is chosen elsewhere."""
    monkeypatch.setattr(segkit.training.metrics, "on_cpu", lambda x: False)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("classes", [2, 11, 127, 128, 255])
def test_confusion_matrix_by_brute_force(
    classes: int, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gpu:
        as_on_a_gpu(monkeypatch)
    logits, target = batch(classes=classes, size=(9, 31))
    predicted = logits.argmax(1)
    expected = brute_force(predicted, target, classes) if classes < 20 else None
    matrix = confusion_matrix(logits, target, classes)
    assert matrix.dtype == torch.int64
    if expected is None:
        valid = target != IGNORE
        flat = target[valid].long() * classes + predicted[valid]
        expected = torch.bincount(flat, minlength=classes**2).view(classes, classes)
    assert torch.equal(matrix, expected)
    for form in (predicted, predicted.to(torch.uint8), predicted.int()):
        assert torch.equal(confusion_matrix(form, target.long(), classes), expected)


def test_a_logit_plane_is_binary_with_threshold_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = torch.tensor([[[[-1.0, 0.0, 2.0, 3.0]]]]), torch.tensor([[[0, 1, 0, 1]]])
    expected = torch.tensor([[1, 1], [1, 1]])
    for _ in range(2):
        assert torch.equal(confusion_matrix(logits, target, 1), expected)
        assert torch.equal(confusion_matrix((logits > 0)[:, 0].long(), target, 1), expected)
        as_on_a_gpu(monkeypatch)


def test_counts_of_several_batches_are_checked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = batch()
    expected = matrices_of(pixel_counts(logits, target, 4))
    as_on_a_gpu(monkeypatch)
    good = pixel_counts(logits, target, 4)
    assert good[:, 0].sum() == (target == IGNORE).sum()
    assert torch.equal(matrices_of(torch.cat([good, good])), torch.cat([expected, expected]))
    target[0, 0, :3], target[0, 1, 0] = 4, 254
    with pytest.raises(ValueError, match="target holds no class index in 4 pixels"):
        matrices_of(torch.cat([good, pixel_counts(logits, target, 4)]))
    with pytest.raises(ValueError, match="prediction holds no class index in 1 pixels"):
        matrices_of(pixel_counts(torch.tensor([[[-1, 3]]]), torch.tensor([[[0, 1]]]), 4))
    with pytest.raises(ValueError, match="prediction holds no class index in"):
        confusion_matrix(logits, torch.zeros_like(target), 2)


def test_shards_sum_to_the_whole() -> None:
    logits, target = batch()
    whole = confusion_matrix(logits, target, 4)
    assert torch.equal(matrices_of(pixel_counts(logits, target, 4)).sum(0), whole)
    parts = [confusion_matrix(logits[i : i + 1], target[i : i + 1], 4) for i in range(3)]
    assert torch.equal(sum(parts), whole)
    counts = counts_of(matrices_of(pixel_counts(logits, target, 4)))
    assert counts.shape == (3, 4, 3)
    assert torch.equal(counts.sum(0), counts_of(whole))
    assert whole.sum() == (target != IGNORE).sum()


def test_counts_are_right_true_and_predicted() -> None:
    predicted = torch.tensor([[[0, 1, 1, 2]]])
    target = torch.tensor([[[0, 1, 2, IGNORE]]])
    expected = torch.tensor([[[1, 1, 1], [1, 1, 2], [0, 1, 0]]])
    assert torch.equal(counts_of(matrices_of(pixel_counts(predicted, target, 3))), expected)


@pytest.mark.parametrize("value", [4, 200, 254])
def test_a_target_that_is_no_class_is_named(value: int) -> None:
    logits, target = batch()
    target[1, 2, 3] = value
    with pytest.raises(ValueError, match=f"target holds {value}, but there are 4 classes"):
        confusion_matrix(logits, target, 4)


@pytest.mark.parametrize("value", [-1, 256, 1000])
def test_values_beyond_a_byte_are_named(value: int) -> None:
    logits, target = batch()
    wide = target.long()
    wide[1, 2, 3] = value
    with pytest.raises(ValueError, match=f"target holds {value};"):
        confusion_matrix(logits, wide, 4)
    with pytest.raises(ValueError, match=f"prediction holds {value};"):
        confusion_matrix(wide, target, 4)


def test_a_prediction_that_is_no_class_is_named() -> None:
    logits, target = batch()
    with pytest.raises(ValueError, match="prediction holds 3, but there are 3 classes"):
        confusion_matrix(logits, target, 3)


def test_sizes_that_differ_are_refused() -> None:
    logits, target = batch()
    with pytest.raises(ValueError, match=r"same size.*\(3, 65, 97\) and \(3, 65, 96\)"):
        confusion_matrix(logits, target[..., 1:], 4)


MATRIX = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0]])


def test_scores_worked_by_hand() -> None:
    result = scores(MATRIX)
    assert result.iou == (pytest.approx(6 / 13), pytest.approx(3 / 6), None, 0.0)
    assert result.dice == (pytest.approx(12 / 19), pytest.approx(6 / 9), None, 0.0)
    assert result.absent == (2,)
    assert result.miou == pytest.approx((6 / 13 + 3 / 6) / 3)
    assert result.mean_dice == pytest.approx((12 / 19 + 6 / 9) / 3)
    assert result.pixel_accuracy == pytest.approx(9 / 16)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["iou"][2] is None


def test_background_is_left_out_of_means_only() -> None:
    result = scores(MATRIX, include_background=False)
    assert result.miou == pytest.approx((3 / 6) / 2)
    assert result.mean_dice == pytest.approx((6 / 9) / 2)
    assert result.iou == scores(MATRIX).iou
    assert result.pixel_accuracy == scores(MATRIX).pixel_accuracy


def test_nothing_counted_has_no_score() -> None:
    result = scores(torch.zeros(3, 3, dtype=torch.int64))
    assert result.miou is None
    assert result.pixel_accuracy is None
    assert result.absent == (0, 1, 2)


def test_counts_beyond_fp32_are_exact() -> None:
    matrix = torch.tensor([[2**40, 0], [1, 0]])
    assert scores(matrix).iou[0] == 2**40 / (2**40 + 1)
    assert scores(matrix).pixel_accuracy < 1


def test_per_image_miou_is_each_images_own() -> None:
    logits, target = batch()
    target[1] = IGNORE
    target[2][target[2] == 3] = IGNORE
    matrices = matrices_of(pixel_counts(logits, target, 4))
    mious = per_image_miou(counts_of(matrices))
    expected = [scores(matrix).miou for matrix in matrices]
    assert expected[1] is None
    assert math.isnan(mious[1])
    assert mious[[0, 2]].tolist() == pytest.approx([expected[0], expected[2]])


def noisy_counts(noise: float, images: int = 40, seed: int = 0) -> Tensor:
    """Counts of predictions that are the truth but for a share of ``noise``."""
    rng = torch.Generator().manual_seed(seed)
    target = torch.randint(3, (images, 8, 8), generator=rng)
    wrong = torch.rand(target.shape, generator=rng) < noise * torch.rand(
        images, 1, 1, generator=rng
    )
    return counts_of(
        matrices_of(pixel_counts(torch.where(wrong, (target + 1) % 3, target), target, 3))
    )


def test_bootstrap_interval_holds_the_score_and_depends_on_its_seed() -> None:
    counts = noisy_counts(0.5)
    score = per_image_miou(counts.sum(0)).item()
    low, high = bootstrap_interval(counts)
    assert low < score < high
    assert bootstrap_interval(counts) == (low, high)
    assert bootstrap_interval(counts, seed=1) != (low, high)
    narrow = bootstrap_interval(counts, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval(counts.repeat(4, 1, 1))[0] > low  # more images, narrower


def test_bootstrap_of_one_image_is_its_score() -> None:
    counts = noisy_counts(0.5, images=1)
    score = per_image_miou(counts[0]).item()
    assert bootstrap_interval(counts) == (pytest.approx(score), pytest.approx(score))


def test_a_redrawn_set_without_a_class_leaves_it_out_of_its_mean() -> None:
    """The second class is in the first image only, and wrongly predicted in the others."""
    first = [[4, 5, 6], [2, 3, 4], [0, 0, 0], [0, 0, 1]]
    others = [[[3 + i, 9, 5 + i], [0, 0, 2], [0, 0, 0], [0, 0, 1]] for i in range(4)]
    values = []
    for draws in np.random.default_rng(0).multinomial(5, [0.2] * 5, 1000):
        sums = (draws[:, None, None] * np.array([first, *others])).sum(0)
        classes = [0, 1, 3] if draws[0] else [0, 3]  # the fourth is in no image at all: IoU 0
        iou = [sums[c, 0] / (sums[c, 1] + sums[c, 2] - sums[c, 0]) for c in classes]
        values.append(sum(iou) / len(iou))
    low, high = bootstrap_interval(torch.tensor([first, *others]), level=0.5)
    # Student's t with 4 degrees of freedom is 0.741 at 75 %; the normal distribution of
    # -0.741 * sqrt(5 / 4) is 0.204.
    assert np.quantile(values, 0.20) <= low <= np.quantile(values, 0.21)
    assert np.quantile(values, 0.79) <= high <= np.quantile(values, 0.80)


def photographs(count: int) -> Tensor:
    """Counts of images of eight classes, of which some are in few images, and their confusions."""
    rng = np.random.default_rng(0)
    share = np.array([1, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1])
    quality = np.array([3, 1.8, 1.4, 0.8, 0.4, 1.4, 0.8, 0])
    area = (rng.random((count, 8)) < share) * np.exp(rng.normal(0, 1, (count, 8))) * 200
    area[:, 0] *= 20
    recall = quality + 0.7 * rng.normal(0, 1, (count, 1)) + rng.normal(0, 1.2, (count, 8))
    right = area / (1 + np.exp(-recall))
    missed = area - right
    right[:, 0] += 0.85 * missed[:, 0]
    missed[:, 0] *= 0.15
    predicted = right + 0.4 * np.roll(missed, 1, axis=1)
    predicted[:, 0] = right[:, 0] + 0.6 * missed[:, 1:].sum(1)
    predicted[np.arange(count), rng.integers(1, 8, count)] += missed[:, 0]
    return torch.from_numpy(np.stack([right, area, predicted], -1).round()).long()


def coverage(everything: Tensor, images: int, trials: int) -> tuple[float, float]:
    """Return the shares of 95 % intervals around the mean IoU of all images, and below it."""
    score = per_image_miou(everything.sum(0)).item()
    rng = torch.Generator().manual_seed(0)
    held = below = 0
    for _ in range(trials):
        chosen = torch.randint(len(everything), (images,), generator=rng)
        low, high = bootstrap_interval(everything[chosen])
        held += low <= score <= high
        below += high < score
    return held / trials, below / trials


def test_intervals_of_few_images_hold_the_mean_iou_of_all() -> None:
    held, below = coverage(photographs(20_000), images=10, trials=200)
    assert held > 0.87
    assert below < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("images", "least"), [(10, 0.89), (30, 0.9), (80, 0.9)])
def test_intervals_hold_the_mean_iou_about_as_often_as_they_say(images: int, least: float) -> None:
    held, _ = coverage(photographs(200_000), images, trials=1000)
    assert least < held < 0.98


def test_paired_difference() -> None:
    better, worse = noisy_counts(0.3), noisy_counts(0.5)
    difference, low, high = paired_difference(worse, better)
    expected = per_image_miou(better.sum(0)) - per_image_miou(worse.sum(0))
    assert difference == pytest.approx(expected.item())
    assert 0 < low < difference < high
    assert paired_difference(better, worse) == pytest.approx((-difference, -high, -low))
    assert paired_difference(better, better) == (0, 0, 0)
    unpaired = bootstrap_interval(better)
    assert high - low < unpaired[1] - unpaired[0]


def test_paired_difference_needs_the_same_images() -> None:
    with pytest.raises(ValueError, match="same images"):
        paired_difference(noisy_counts(0.3), noisy_counts(0.3, images=39))
    with pytest.raises(ValueError, match="at least one image"):
        bootstrap_interval(noisy_counts(0.3)[:0])
