"""Losses by hand-worked values, identities and derivatives."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import segkit
import segkit.training.pixels
from segkit.core.errors import ConfigError, DataError
from segkit.training.losses import (
    IGNORE,
    LOSSES,
    MSSSIM,
    Criterion,
    CrossEntropy,
    Dice,
    DiceSemimetric,
    Focal,
    Jaccard,
    JaccardMetric,
    Lovasz,
    OHEMCrossEntropy,
    Presence,
    SigmoidFocal,
    SoftCrossEntropy,
    Tversky,
    build_loss,
)

OTHER_OUTPUTS = ("presence", "mask_classification")
MAP_LOSSES = {
    **{name: make for name, make in LOSSES.items() if name not in OTHER_OUTPUTS},
    "smoothed": lambda: CrossEntropy(class_weights=(0.2, 1.0, 3.0), label_smoothing=0.1),
    "focal alpha": lambda: Focal(gamma=0.5, alpha=(0.2, 1.0, 3.0)),
    "sigmoid focal alpha": lambda: SigmoidFocal(gamma=1.5, alpha=0.3),
    "dice per image": lambda: Dice(smooth=1.0, per_image=True),
    "tversky all": lambda: Tversky(classes="all"),
    "jaccard metric per image": lambda: JaccardMetric(smooth=1.0, per_image=True, classes="all"),
    "lovasz per image": lambda: Lovasz(per_image=True),
    "ohem kept": lambda: OHEMCrossEntropy(threshold=0.3, min_kept=20),
}
map_losses = pytest.mark.parametrize("make", MAP_LOSSES.values(), ids=MAP_LOSSES)


def batch(
    size: tuple[int, int] = (65, 97),
    images: int = 2,
    classes: int = 3,
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype = torch.uint8,
) -> tuple[Tensor, Tensor]:
    """Logits and a target of which about a quarter is ignored."""
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(images, classes, *size, generator=rng, dtype=torch.float64)
    target = torch.randint(classes, (images, *size), generator=rng)
    target[torch.rand(target.shape, generator=rng) < 0.25] = IGNORE
    return logits.to(dtype).requires_grad_(), target.to(target_dtype)


def from_probabilities(rows: list[list[float]]) -> Tensor:
    """Logits of one row of pixels, (1, C, 1, pixels), from each pixel's probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log().T[None, :, None]


TWO_PIXELS = from_probabilities([[0.8, 0.2], [0.4, 0.6]])
ZERO_ONE = torch.tensor([[[0, 1]]], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (CrossEntropy(), -(math.log(0.8) + math.log(0.6)) / 2),
        (CrossEntropy(class_weights=(1.0, 3.0)), -(math.log(0.8) + 3 * math.log(0.6)) / 4),
        (Focal(gamma=2.0), -(0.2**2 * math.log(0.8) + 0.4**2 * math.log(0.6)) / 2),
        (Focal(alpha=(0.5, 2.0), gamma=1.0), -(0.1 * math.log(0.8) + 0.8 * math.log(0.6)) / 2),
        # class 0: I .8, P 1.2, T 1; class 1: I .6, P .8, T 1
        (Dice(), 1 - (1.6 / 2.2 + 1.2 / 1.8) / 2),
        (Dice(smooth=1.0), 1 - (2.6 / 3.2 + 2.2 / 2.8) / 2),
        (Jaccard(), 1 - (0.8 / 1.4 + 0.6 / 1.2) / 2),
        (Jaccard(smooth=1.0), 1 - (1.8 / 2.4 + 1.6 / 2.2) / 2),
        (Tversky(alpha=0.3, beta=0.7), 1 - (0.8 / 1.06 + 0.6 / 0.94) / 2),
        # class 0: background is wrong by .4, then foreground by .2, each worth 1/2;
        # class 1: foreground is wrong by .4, worth 1, then background by .2, worth 0
        (Lovasz(), ((0.4 / 2 + 0.2 / 2) + 0.4) / 2),
        (OHEMCrossEntropy(threshold=0.7, min_kept=0), -math.log(0.6)),
        (OHEMCrossEntropy(threshold=0.5, min_kept=1), -math.log(0.6)),
        (OHEMCrossEntropy(threshold=0.5, min_kept=2), -(math.log(0.8) + math.log(0.6)) / 2),
        (OHEMCrossEntropy(threshold=0.5, min_kept=0), 0.0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_two_pixels_worked_by_hand(loss: torch.nn.Module, expected: float) -> None:
    assert loss(TWO_PIXELS, ZERO_ONE).item() == pytest.approx(expected, abs=1e-9)


def test_sigmoid_focal_worked_by_hand() -> None:
    logits = torch.tensor([math.log(3.0), 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    target = torch.zeros(1, 1, 1, dtype=torch.uint8)
    # sigmoid: 3/4 for the true class, 1/2 for the other
    right, wrong = -(0.25**2) * math.log(0.75), -(0.5**2) * math.log(0.5)
    assert SigmoidFocal()(logits, target).item() == pytest.approx((right + wrong) / 2)
    with_alpha = SigmoidFocal(alpha=0.25)(logits, target).item()
    assert with_alpha == pytest.approx((0.25 * right + 0.75 * wrong) / 2)


def test_absent_classes_are_left_out_unless_all_are_asked_for() -> None:
    target = torch.zeros(1, 1, 2, dtype=torch.uint8)
    zero = 2 * 1.2 / (1.2 + 2)
    assert Dice()(TWO_PIXELS, target).item() == pytest.approx(1 - zero)
    assert Dice(classes="all")(TWO_PIXELS, target).item() == pytest.approx(1 - zero / 2)


def test_per_image_is_the_mean_over_images_and_present_classes() -> None:
    logits, target = batch(dtype=torch.float64)
    target[1][target[1] == 2] = IGNORE
    expected = [
        Dice()(logits[i : i + 1], target[i : i + 1]) * present for i, present in ((0, 3), (1, 2))
    ]
    torch.testing.assert_close(Dice(per_image=True)(logits, target), sum(expected) / 5)


@pytest.mark.parametrize("weights", [None, (0.2, 1.0, 3.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_pytorchs(weights: tuple[float, ...] | None, smoothing: float) -> None:
    logits, target = batch()
    theirs = F.cross_entropy(
        logits,
        target.long(),
        weight=None if weights is None else torch.tensor(weights),
        ignore_index=IGNORE,
        label_smoothing=smoothing,
    )
    ours = CrossEntropy(class_weights=weights, label_smoothing=smoothing)(logits, target)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        *torch.autograd.grad(ours, logits), *torch.autograd.grad(theirs, logits)
    )


@pytest.mark.parametrize("classes", [2, 7])
def test_focal_with_gamma_zero_is_cross_entropy(classes: int) -> None:
    logits, target = batch(classes=classes)
    assert torch.equal(Focal(gamma=0.0)(logits, target), CrossEntropy()(logits, target))


def test_sigmoid_focal_with_gamma_zero_is_binary_cross_entropy() -> None:
    logits, target = batch()
    valid = target != IGNORE
    truth = F.one_hot(target.long() * valid, 3).permute(0, 3, 1, 2).to(logits)
    theirs = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    expected = (theirs * valid[:, None]).sum() / (3 * valid.sum())
    torch.testing.assert_close(SigmoidFocal(gamma=0.0)(logits, target), expected)


def test_tversky_at_its_corners_is_dice_and_jaccard() -> None:
    logits, target = batch()
    assert torch.equal(Tversky(alpha=0.5, beta=0.5)(logits, target), Dice()(logits, target))
    assert torch.equal(Tversky(alpha=1.0, beta=1.0)(logits, target), Jaccard()(logits, target))


def test_lovasz_of_a_hard_prediction_is_the_jaccard_loss() -> None:
    _, target = batch()
    predicted = torch.roll(target, 1, dims=2) % 3
    logits = 200.0 * F.one_hot(predicted.long(), 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(Lovasz()(logits, target), Jaccard()(logits, target))


def test_lovasz_gradient_by_the_published_recurrence() -> None:
    logits, target = batch(size=(5, 7), dtype=torch.float64)
    valid = target.flatten() != IGNORE
    losses = []
    for c, p in enumerate(logits.softmax(1).transpose(0, 1).flatten(1)):
        truth = (target.flatten() == c)[valid].double()
        errors, order = (truth - p[valid]).abs().sort(descending=True)
        hits = truth[order].cumsum(0)
        jaccard = 1 - (truth.sum() - hits) / (truth.sum() + torch.arange(1, len(truth) + 1) - hits)
        losses.append(errors @ torch.diff(jaccard, prepend=torch.zeros(1)))
    expected = torch.stack(losses).mean()
    ours = Lovasz()(logits, target)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        *torch.autograd.grad(ours, logits), *torch.autograd.grad(expected, logits)
    )


def test_ohem_is_the_common_code_where_nothing_ties() -> None:
    logits, target = batch(dtype=torch.float64)
    p = logits.softmax(1).gather(1, (target.long() % IGNORE)[:, None])[:, 0]
    p = p[target != IGNORE]
    for threshold, kept in ((0.1, 1000), (0.6, 1000), (0.0, 17)):
        limit = max(threshold, p.sort().values[kept].item())
        ours = OHEMCrossEntropy(threshold=threshold, min_kept=kept)(logits, target)
        torch.testing.assert_close(ours, -p[p < limit].log().mean())


def test_ohem_keeps_all_pixels_that_tie() -> None:
    loss = OHEMCrossEntropy(threshold=0.1, min_kept=1)
    assert loss(torch.zeros(1, 4, 3, 3), torch.ones(1, 3, 3)).item() == pytest.approx(math.log(4))


def test_ms_ssim_of_equal_maps_is_zero_and_of_opposite_maps_is_not() -> None:
    _, target = batch(size=(177, 180), images=1)
    right = 200.0 * F.one_hot(target.long() % IGNORE, 3).permute(0, 3, 1, 2)
    assert MSSSIM()(right, target).item() == pytest.approx(0, abs=1e-6)
    assert MSSSIM()(-right, target).item() > 0.3


def test_ms_ssim_of_constant_maps_worked_by_hand() -> None:
    # One class everywhere, its probability q: no variance, so structure is 1 and luminance
    # (2 q + c) / (q^2 + 1 + c); the other class has 0 against 1 - q.
    q, c, weights = 0.7, 1e-4, MSSSIM.scale_weights
    logits = from_probabilities([[q, 1 - q]]).expand(1, 2, 48, 50)  # 48: three scales
    luminance = [(2 * q + c) / (q * q + 1 + c), c / ((1 - q) ** 2 + c)]
    power = weights[2] / sum(weights[:3])
    expected = 1 - sum(((value + 1) / 2) ** power for value in luminance) / 2
    target = torch.zeros(1, 48, 50, dtype=torch.uint8)
    assert MSSSIM()(logits, target).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("size", "scales"), [(11, 1), (21, 1), (22, 2), (45, 3), (176, 5)])
def test_ms_ssim_by_its_definition_window_by_window(size: int, scales: int) -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, size, size + 3, generator=rng, dtype=torch.float64)
    target = torch.randint(2, (1, size, size + 3), generator=rng)
    bell = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    weight = torch.tensor([[a * b for a in bell] for b in bell], dtype=torch.float64)
    weight = weight.flatten()[:, None] / weight.sum()
    powers = MSSSIM.scale_weights[:scales]
    values = []
    for c in range(2):
        x, y = logits.softmax(1)[:, c : c + 1], (target == c)[:, None].double()
        value = torch.ones((), dtype=torch.float64)
        for scale, power in enumerate(powers, 1):
            (p,), (t,) = (F.unfold(z, 11) for z in (x, y))  # a column for each window
            mean_p, mean_t = (weight * p).sum(0), (weight * t).sum(0)
            var_p, var_t = (weight * (p - mean_p) ** 2).sum(0), (weight * (t - mean_t) ** 2).sum(0)
            covariance = (weight * (p - mean_p) * (t - mean_t)).sum(0)
            similar = (2 * covariance + 0.03**2) / (var_p + var_t + 0.03**2)
            if scale == scales:
                similar *= (2 * mean_p * mean_t + 0.01**2) / (mean_p**2 + mean_t**2 + 0.01**2)
            value *= ((similar.mean() + 1) / 2) ** (power / sum(powers))
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        values.append(1 - value)
    torch.testing.assert_close(MSSSIM()(logits, target), sum(values) / 2)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (11, 30), (22, 22), (175, 176), (176, 180)])
def test_ms_ssim_takes_any_size(size: tuple[int, int]) -> None:
    logits, target = batch(size=size, images=1)
    loss = MSSSIM()(logits, target)
    loss.backward()
    assert 0 <= loss.item() <= 1
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_presence_worked_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0), 0.0], [9.0, 9.0, 9.0]])
    target = torch.tensor([[[0, 1, IGNORE]], [[IGNORE, IGNORE, IGNORE]]], dtype=torch.uint8)
    expected = (math.log(2) + math.log(4 / 3) + math.log(2)) / 3
    assert Presence()(logits, target).item() == pytest.approx(expected)
    without = (math.log(4 / 3) + math.log(2)) / 2
    assert Presence(background=False)(logits, target).item() == pytest.approx(without)


@map_losses
def test_derivative(make) -> None:
    logits, target = batch(size=(3, 5), dtype=torch.float64)
    loss = make()
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits)


def test_presence_derivative() -> None:
    logits, target = batch(size=(5, 7), dtype=torch.float64)
    pooled = logits.detach().amax((2, 3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: Presence()(x, target), pooled)


@map_losses
def test_ignored_pixels_have_no_say(make) -> None:
    logits, target = batch()
    loss = make()(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    ignored = (target == IGNORE)[:, None].expand_as(logits)
    assert gradient[ignored].abs().max() == 0
    assert gradient[~ignored].abs().max() > 0
    other = torch.where(ignored, torch.randn_like(logits) * 30, logits)
    torch.testing.assert_close(make()(other, target), loss)


@map_losses
def test_a_batch_with_every_pixel_ignored_gives_zero_with_a_gradient(make) -> None:
    logits, target = batch()
    loss = make()(logits, torch.full_like(target, IGNORE))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)  # MS-SSIM: 1 - 1 in fp32
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


@map_losses
def test_target_types_and_memory_formats_agree(make) -> None:
    logits, target = batch()
    expected = make()(logits, target)
    assert torch.equal(make()(logits, target.long()), expected)
    last = logits.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    loss = make()(last, target)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, last)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, logits))


@map_losses
def test_pieces_join_without_a_seam(make, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = batch(size=(13, 11))
    whole = make()(logits, target)
    (gradient,) = torch.autograd.grad(whole, logits)
    monkeypatch.setattr(segkit.training.pixels, "_PIECE", 3 * 17)  # 17 pixels, of 143
    cut = make()(logits, target)
    torch.testing.assert_close(cut, whole)
    torch.testing.assert_close(*torch.autograd.grad(cut, logits), gradient)


@map_losses
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("images", [2, 3])  # more are computed in pieces
def test_batches_of_a_gpu_have_the_loss_of_pieces(
    make, layout: torch.memory_format, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, target = batch(images=3)
    expected = make()(logits, target)
    (gradient,) = torch.autograd.grad(expected, logits)
    monkeypatch.setattr(segkit.training.pixels, "on_cpu", lambda x: False)
    monkeypatch.setattr(segkit.training.pixels, "_LARGE_PIECE", images * logits[0].numel())
    x = logits.detach().contiguous(memory_format=layout).requires_grad_()
    loss = make()(x, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*torch.autograd.grad(loss, x), gradient, rtol=1e-4, atol=1e-7)


@map_losses
@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.int64])
def test_an_invalid_label_is_named(make, target_dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = batch(target_dtype=target_dtype)
    target[1, 2, 3] = 3
    sentence = "target holds 3; expected a class, 0 to 2, or 255 for ignored pixels"
    with pytest.raises(DataError, match=sentence):
        make()(logits, target)
    # A GPU would wait for the check, so there the loss and its gradient are not finite.
    monkeypatch.setattr(segkit.training.pixels, "on_cpu", lambda x: False)
    loss = make()(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not loss.isfinite()
    assert not gradient.isfinite().all()


@map_losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_fp32_under_autocast(make, dtype) -> None:
    half, target = batch(dtype=dtype)
    full = half.detach().float().requires_grad_()
    expected = make()(full, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = make()(half, target)
        (gradient,) = torch.autograd.grad(2**15 * loss, half)  # as a GradScaler would
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss, expected)
    (exact,) = torch.autograd.grad(2**15 * expected, full)
    torch.testing.assert_close(gradient.float(), exact, rtol=0.01, atol=1e-4 * exact.abs().max())


@map_losses
def test_extreme_logits_stay_finite(make) -> None:
    logits, target = batch()
    extreme = (logits.detach() * 1e4).requires_grad_()
    loss = make()(extreme, target)
    loss.backward()
    assert loss.isfinite()
    assert extreme.grad is not None
    assert extreme.grad.isfinite().all()


def test_large_half_precision_masks_do_not_overflow() -> None:
    # 300 * 300 pixels are more than fp16's largest number, 65,504.
    logits = torch.zeros(1, 2, 300, 300, dtype=torch.float16)
    target = torch.zeros(1, 300, 300, dtype=torch.uint8)
    assert Dice()(logits, target).item() == pytest.approx(1 - 2 * 0.5 / 1.5)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) and \(2, 4, 5\)"):
        CrossEntropy()(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 5, dtype=torch.uint8))


# Soft labels

HARD_FORMS = {SoftCrossEntropy: CrossEntropy, JaccardMetric: Jaccard, DiceSemimetric: Dice}
soft_losses = pytest.mark.parametrize("make", HARD_FORMS)


def teacher_of(logits: Tensor) -> Tensor:
    """Soft labels for a batch."""
    rng = torch.Generator().manual_seed(3)
    noise = torch.randn(logits.shape, generator=rng, dtype=torch.float64)
    return (logits.detach() + noise).to(logits).softmax(1)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (
            SoftCrossEntropy(),
            -(0.6 * math.log(0.8) + 0.4 * math.log(0.2) + 0.1 * math.log(0.4) + 0.9 * math.log(0.6))
            / 2,
        ),
        # class 0: min .6 + .1, max .8 + .4; class 1: min .2 + .6, max .4 + .9
        (JaccardMetric(), 1 - (0.7 / 1.2 + 0.8 / 1.3) / 2),
        (JaccardMetric(smooth=1.0), 1 - (1.7 / 2.2 + 1.8 / 2.3) / 2),
        # class 0: P 1.2, Q .7; class 1: P .8, Q 1.3
        (DiceSemimetric(), 1 - (1.4 / 1.9 + 1.6 / 2.1) / 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_soft_labels_of_two_pixels_worked_by_hand(loss: torch.nn.Module, expected: float) -> None:
    soft = from_probabilities([[0.6, 0.4], [0.1, 0.9]]).exp()
    assert loss(TWO_PIXELS, ZERO_ONE, soft).item() == pytest.approx(expected, abs=1e-9)


def test_jaccard_metric_is_the_paper_s_first_form() -> None:
    logits, target = batch(dtype=torch.float64)
    soft, valid = teacher_of(logits), (target != IGNORE)[:, None]
    x, y = (logits.softmax(1) * valid).transpose(0, 1), (soft * valid).transpose(0, 1)
    both, apart = (x + y).sum((1, 2, 3)), (x - y).abs().sum((1, 2, 3))
    expected = 1 - ((both - apart) / (both + apart)).mean()
    torch.testing.assert_close(JaccardMetric()(logits, target, soft), expected)
    torch.testing.assert_close(DiceSemimetric()(logits, target, soft), (apart / both).mean())


@soft_losses
def test_losses_of_soft_labels_are_the_common_ones_on_labels(make) -> None:
    logits, target = batch(dtype=torch.float64)
    one_hot = F.one_hot(target.long() % IGNORE, 3).permute(0, 3, 1, 2).double()
    expected = HARD_FORMS[make]()(logits, target)
    (gradient,) = torch.autograd.grad(expected, logits)
    for soft in (None, one_hot):
        ours = make()(logits, target, soft)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(*torch.autograd.grad(ours, logits), gradient)


@soft_losses
def test_losses_of_soft_labels_are_least_at_the_soft_labels(make) -> None:
    logits, target = batch(dtype=torch.float64)
    soft = teacher_of(logits)
    at = soft.log().requires_grad_()
    least = make()(at, target, soft)
    assert least < make()(logits, target, soft)
    assert least < make()(2 * at, target, soft)
    if make is SoftCrossEntropy:  # a metric has a corner there
        assert torch.autograd.grad(least, at)[0].abs().max() < 1e-9
        entropy = -(soft * soft.log()).sum(1)[target != IGNORE].mean()
        torch.testing.assert_close(least, entropy)
    else:
        assert least.item() == pytest.approx(0, abs=1e-9)


def test_a_soft_jaccard_loss_of_products_would_be_least_elsewhere() -> None:
    soft = from_probabilities([[0.6, 0.4], [0.3, 0.7]])

    def products(logits: Tensor) -> Tensor:
        p, q = logits.softmax(1), soft.exp()
        both = (p * q).sum((0, 2, 3))
        return 1 - (both / (p.sum((0, 2, 3)) + q.sum((0, 2, 3)) - both)).mean()

    assert products(2 * soft) < products(soft)
    assert JaccardMetric()(2 * soft, ZERO_ONE, soft.exp()) > 0.1
    assert JaccardMetric()(soft, ZERO_ONE, soft.exp()).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("make", [JaccardMetric, DiceSemimetric])
def test_metric_losses_are_symmetric(make) -> None:
    logits, target = batch(dtype=torch.float64)
    soft = teacher_of(logits)
    ours = make()(logits, target, soft)
    torch.testing.assert_close(make()(soft.log(), target, logits.softmax(1)), ours)


@soft_losses
def test_derivative_with_soft_labels(make) -> None:
    logits, target = batch(size=(3, 5), dtype=torch.float64)
    soft, loss = teacher_of(logits), make()
    assert torch.autograd.gradcheck(lambda x: loss(x, target, soft), logits)


@soft_losses
def test_soft_labels_of_ignored_pixels_have_no_say(make) -> None:
    logits, target = batch()
    soft = teacher_of(logits)
    other = torch.where((target == IGNORE)[:, None], soft.flip(1), soft)
    assert torch.equal(make()(logits, target, other), make()(logits, target, soft))


def test_soft_labels_of_a_binary_model_have_two_planes() -> None:
    logits = torch.tensor([0.8, 0.4]).logit().view(1, 1, 1, 2)
    soft = torch.tensor([[0.4, 0.6], [0.9, 0.1]]).T[None, :, None]
    target = torch.tensor([[[1, 0]]])  # class 1: min .6 + .1, max .8 + .4
    loss = build_loss("jaccard_metric", num_classes=1)
    assert loss(logits, target, soft).item() == pytest.approx(1 - 0.7 / 1.2)
    with pytest.raises(ValueError, match=r"soft labels \(1, 2, 1, 2\), got \(1, 1, 1, 2\)"):
        loss(logits, target, soft[:, 1:])


# Criterion


def test_criterion_sums_terms_and_auxiliary_outputs() -> None:
    logits, target = batch()
    other = (logits * 0.3).detach()
    pooled = torch.tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]])
    criterion = build_loss(
        [{"name": "cross_entropy"}, {"name": "dice", "weight": 0.5}],
        num_classes=3,
        aux_weight=(0.4, 0.2),
    )
    loss, parts = criterion.with_terms(
        {"out": logits, "aux": other, "aux_presence": pooled}, target
    )
    entropy, dice = CrossEntropy(), Dice()
    aux = entropy(other, target) + 0.5 * dice(other, target)
    presence = Presence()(pooled, target)
    expected = entropy(logits, target) + 0.5 * dice(logits, target) + 0.4 * aux + 0.2 * presence
    torch.testing.assert_close(loss, expected)
    assert list(parts) == ["cross_entropy", "dice", "aux", "aux_presence"]
    torch.testing.assert_close(parts["dice"], dice(logits, target).detach())
    torch.testing.assert_close(parts["aux"], aux.detach())
    assert not any(part.requires_grad for part in parts.values())


def test_terms_share_one_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = batch()
    criterion = build_loss(["cross_entropy", "dice", "focal", "jaccard"], num_classes=3)
    calls = []
    forward = segkit.training.pixels._SoftmaxSums.forward

    def counted(ctx, *args: Tensor):
        calls.append(args)
        return forward(ctx, *args)

    monkeypatch.setattr(segkit.training.pixels._SoftmaxSums, "forward", staticmethod(counted))
    criterion({"out": logits}, target)
    assert len(calls) == 1


def test_criterion_works_without_auxiliary_outputs_whatever_their_weights() -> None:
    logits, target = batch()
    criterion = build_loss(["cross_entropy"], num_classes=3, aux_weight=(0.4, 0.2)).eval()
    loss = criterion({"out": logits}, target)
    assert torch.equal(loss, CrossEntropy()(logits, target))


def test_criterion_refuses_what_the_decoder_does_not_give() -> None:
    logits, target = batch()
    listed = build_loss(["cross_entropy"], num_classes=3, aux_weight=(0.4, 0.2))
    with pytest.raises(ConfigError, match=r"loss\.aux_weight: lists 2 weights.* has 1 auxiliary"):
        listed({"out": logits, "aux": logits}, target)
    present = build_loss(["cross_entropy", "presence"], num_classes=3)
    with pytest.raises(ConfigError, match="'presence' scores a presence output"):
        present({"out": logits}, target)
    present.eval()({"out": logits}, target)


@pytest.mark.parametrize(
    ("terms", "sentence"),
    [
        ([], "at least one loss"),
        (["presence"], "at least one loss"),
        ([{"weight": 2.0}], r"loss\.terms\[0\]\.name"),
        (["cross_entropy", {"name": "dise"}], r"loss\.terms\[1\]\.name.*did you mean 'dice'"),
        ([{"name": "dice", "weight": -1.0}], r"loss\.terms\[0\]\.weight: .*-1"),
        ([{"name": "dice", "weight": True}], r"loss\.terms\[0\]\.weight"),
        ([{"name": "dice", "smoth": 1.0}], r"loss\.terms\[0\]\.smoth.*did you mean 'smooth'"),
        (
            [{"name": "focal", "gamma": -1.0}],
            r"loss\.terms\[0\]: gamma: expected at least 0, got -1",
        ),
        ([{"name": "focal", "gamma": math.nan}], "expected a finite number"),
        ([{"name": "cross_entropy", "label_smoothing": 1.5}], "expected 0 to 1, got 1.5"),
        ([{"name": "ms_ssim", "window": 7}], r"loss\.terms\[0\]\.window"),
        (["dice", {"name": "dice", "smooth": 1.0}], "two terms have the same name"),
        (
            [{"name": "cross_entropy", "class_weights": [1.0, 2.0]}],
            r"loss\.terms\[0\]\.class_weights: expected 3 numbers.*got 2",
        ),
        ([{"name": "focal", "alpha": [0.0, 0.0, 0.0]}], r"loss\.terms\[0\].*not all 0"),
    ],
)
def test_bad_terms_fail_with_their_path(terms: list, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build_loss(terms, num_classes=3)


def test_terms_of_a_teacher_have_their_share_of_the_loss() -> None:
    logits, target = batch()
    soft = teacher_of(logits)
    twice = {"name": "jaccard_metric", "weight": 2.0}
    criterion = build_loss("dice", teacher_terms=[twice], teacher_weight=0.3)
    expected = 0.7 * Dice()(logits, target) + 0.6 * JaccardMetric()(logits, target, soft)
    torch.testing.assert_close(criterion(logits, target, soft), expected)
    with pytest.raises(ConfigError, match=r"loss\.teacher_terms\[0\]\.weight: expected a number"):
        build_loss("dice", teacher_terms=[{"name": "jaccard_metric", "weight": -1}])


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_built_by_its_name(name: str) -> None:
    criterion = build_loss(
        [{"name": "cross_entropy"}] * (name != "cross_entropy") + [name], num_classes=3
    )
    assert isinstance(criterion, Criterion)
    assert isinstance(criterion.losses[name], LOSSES[name])


# Ranks

SPREAD = [
    *("cross_entropy", "focal", "sigmoid_focal", "dice", "dice per image", "jaccard", "tversky"),
    *("soft_cross_entropy", "jaccard_metric", "jaccard metric per image", "dice_semimetric"),
]


def _one_rank(rank: int, store: str, results: str) -> None:
    """This rank's share of the batch: 1 image of the first rank, 2 of the second."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    logits, target = batch(images=3)
    mine = slice(0, 1) if rank == 0 else slice(1, 3)
    soft = teacher_of(logits)
    computed = {}
    for name in SPREAD:
        part = logits[mine].detach().requires_grad_()
        loss = MAP_LOSSES[name]()(part, target[mine], soft[mine])
        computed[name] = loss.detach(), *torch.autograd.grad(loss, part)
    pooled = logits[mine].detach().amax((2, 3)).requires_grad_()
    loss = Presence()(pooled, target[mine])
    computed["presence"] = loss.detach(), *torch.autograd.grad(loss, pooled)
    torch.save(computed, f"{results}{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_uneven_ranks_have_the_loss_and_the_gradient_of_the_whole_batch(tmp_path) -> None:
    results = str(tmp_path / "rank")
    torch.multiprocessing.spawn(_one_rank, (str(tmp_path / "store"), results), nprocs=2)
    first, second = (torch.load(f"{results}{rank}.pt") for rank in (0, 1))
    for name in [*SPREAD, "presence"]:
        logits, target = batch(images=3)
        whole = logits.detach().amax((2, 3)) if name == "presence" else logits.detach()
        whole.requires_grad_()
        if name == "presence":
            loss = Presence()(whole, target)
        else:
            loss = MAP_LOSSES[name]()(whole, target, teacher_of(logits))
        (gradient,) = torch.autograd.grad(loss, whole)
        torch.testing.assert_close(first[name][0], loss.detach())
        torch.testing.assert_close(second[name][0], loss.detach())
        # DistributedDataParallel takes the mean over ranks, so each holds twice its share.
        mean = torch.cat([first[name][1], second[name][1]]) / 2
        torch.testing.assert_close(mean, gradient, rtol=1e-5, atol=1e-9)


# ---- one logit plane


def binary_batch() -> tuple[Tensor, Tensor]:
    logits, target = batch(classes=2, dtype=torch.float64)
    return logits[:, 1:].detach().requires_grad_(), target


def test_binary_cross_entropy_is_pytorchs() -> None:
    logits, target = binary_batch()
    valid = target != IGNORE
    expected = F.binary_cross_entropy_with_logits(logits[:, 0][valid], target[valid].double())
    for loss in (build_loss("cross_entropy", num_classes=1), Focal(gamma=0.0)):
        torch.testing.assert_close(loss(logits, target), expected)
    torch.testing.assert_close(SigmoidFocal(gamma=0.0, alpha=0.5)(logits, target), expected / 2)


def test_binary_losses_of_regions_score_class_one() -> None:
    logits = torch.tensor([0.8, 0.4]).logit().view(1, 1, 1, 2)
    target = torch.tensor([[[1, 0]]])  # I .8, P 1.2, T 1
    assert Dice()(logits, target).item() == pytest.approx(1 - 1.6 / 2.2)
    assert Jaccard()(logits, target).item() == pytest.approx(1 - 0.8 / 1.4)
    assert Tversky(alpha=0.3, beta=0.7)(logits, target).item() == pytest.approx(1 - 0.8 / 1.06)
    assert Dice(per_image=True)(logits, target).item() == pytest.approx(1 - 1.6 / 2.2)
    # the background pixel is wrong by .4, worth 1 / 2; then the other by .2, worth 1 / 2
    assert Lovasz()(logits, target).item() == pytest.approx(0.4 / 2 + 0.2 / 2)


def test_binary_losses_of_regions_without_class_one() -> None:
    logits, target = torch.zeros(1, 1, 2, 2, requires_grad=True), torch.zeros(1, 2, 2).long()
    assert Dice()(logits, target) == Lovasz()(logits, target) == 0
    assert Dice(classes="all", smooth=1.0)(logits, target).item() == pytest.approx(1 - 1 / 3)


@map_losses
def test_every_loss_is_binary_with_one_plane(make) -> None:
    if any(len(values) > 2 for values in make().buffers()):
        pytest.skip("has coefficients of three classes")
    logits, target = binary_batch()
    loss = make()(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss > 0
    assert gradient.shape == logits.shape
    assert gradient.abs().max() > 0
    better = torch.where(target == 1, 5.0, -5.0)[:, None].double()
    assert make()(better, target) < loss
    target[0, 0, 0] = 2
    with pytest.raises(DataError, match="target holds 2; expected a class, 0 to 1, or 255"):
        make()(logits, target)


def test_binary_presence_is_that_of_class_one() -> None:
    target = torch.tensor([[[0, 1]], [[0, 0]]])
    expected = F.binary_cross_entropy_with_logits(torch.ones(2, 1), torch.tensor([[1.0], [0.0]]))
    for background in (True, False):
        loss = Presence(background=background)(torch.ones(2, 1), target)
        torch.testing.assert_close(loss, expected)


# ---- as users write them


def test_losses_as_users_write_them() -> None:
    logits, target = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randint(3, (2, 8, 8))
    criterion = segkit.build_loss("cross_entropy")
    torch.testing.assert_close(criterion(logits, target), F.cross_entropy(logits, target))
    torch.testing.assert_close(criterion({"out": logits}, target), criterion(logits, target))
    both = segkit.build_loss(["cross_entropy", {"name": "dice", "weight": 2.0}])
    both(logits, target).backward()
    assert logits.grad is not None
    total, terms = both.with_terms(logits, target)
    torch.testing.assert_close(total, terms["cross_entropy"] + 2 * terms["dice"])
    dice = segkit.build_loss({"name": "dice"})
    torch.testing.assert_close(dice({"out": logits}, target), terms["dice"])


def test_losses_are_listed_by_name_and_pattern() -> None:
    assert segkit.list_losses() == list(LOSSES)
    assert segkit.list_losses("focal") == ["focal", "sigmoid_focal"]
    names = ["cross_entropy", "soft_cross_entropy", "ohem_cross_entropy"]
    assert segkit.list_losses("*entropy") == names
    assert segkit.list_losses("metric") == ["jaccard_metric", "dice_semimetric"]


def test_coefficients_of_a_binary_loss_are_two() -> None:
    build_loss({"name": "cross_entropy", "class_weights": [1.0, 3.0]}, num_classes=1)
    with pytest.raises(ConfigError, match=r"class_weights: expected 2 numbers, one per class"):
        build_loss({"name": "cross_entropy", "class_weights": [1.0]}, num_classes=1)
