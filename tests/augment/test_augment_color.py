"""Color operations equal torchvision's where the mathematics agrees, and are near it elsewhere."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as tv

from segkit.augment import Pipeline
from segkit.augment.color import (
    COLOR,
    CURVES,
    IDENTITY,
    affine,
    apply_matrix,
    apply_table,
    brightness_matrix,
    contrast_matrix,
    hue_matrix,
    photometric,
    saturation_matrix,
)
from segkit.core.errors import ConfigError

LEVELS = np.array([[0.0, 255.0]] * 3)


def image() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 65, 97), generator=generator).to(torch.uint8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_no_change_is_the_image() -> None:
    assert torch.equal(apply_matrix(image(), IDENTITY, limits=LEVELS), image().float())


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.7])
def test_brightness_and_saturation_equal_torchvision(factor: float) -> None:
    for matrix, reference in (
        (brightness_matrix(factor), tv.adjust_brightness),
        (saturation_matrix(factor), tv.adjust_saturation),
    ):
        expected = reference(image().float() / 255, factor) * 255  # its uint8 is clipped twice
        assert (apply_matrix(image(), matrix, limits=LEVELS) - expected).abs().max() < 0.01


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.7])
def test_contrast_about_the_mean_equals_torchvision(factor: float) -> None:
    mean = float(tv.rgb_to_grayscale(image()).float().mean()) / 255
    expected = tv.adjust_contrast(image(), factor).float()
    result = apply_matrix(image(), contrast_matrix(factor, mean), limits=LEVELS)
    assert (result - expected).abs().max() <= 1.01


def test_contrast_by_hand() -> None:
    pixel = torch.tensor([0, 127, 200], dtype=torch.uint8).view(3, 1, 1)
    matrix = COLOR["contrast"](rng(), range=(0.5, 0.5))
    result = apply_matrix(pixel, matrix, limits=LEVELS).flatten()
    torch.testing.assert_close(result, torch.tensor([63.75, 127.25, 163.75]))


def test_grayscale_equals_pillow() -> None:
    result = apply_matrix(image(), COLOR["grayscale"](rng()))
    gray = np.asarray(Image.fromarray(image().permute(1, 2, 0).numpy()).convert("L"))
    assert np.abs(result.numpy() - gray).max() <= 1


def test_hue_turns_red_to_green_to_blue() -> None:
    red, green, blue = np.eye(3)
    turn = hue_matrix(120)[:3, :3]
    np.testing.assert_allclose(turn @ red, green, atol=1e-12)
    np.testing.assert_allclose(turn @ green, blue, atol=1e-12)
    np.testing.assert_allclose(hue_matrix(360), IDENTITY, atol=1e-12)


def test_hue_keeps_grays_and_means() -> None:
    turn = hue_matrix(37)[:3, :3]
    np.testing.assert_allclose(turn @ [0.4, 0.4, 0.4], [0.4, 0.4, 0.4])
    np.testing.assert_allclose(np.ones(3) @ turn, np.ones(3))


@pytest.mark.parametrize("degrees", [-36.0, -10.0, 10.0, 36.0])
def test_hue_stays_near_a_turn_in_hsv(degrees: float) -> None:
    """Mild colors change by about the same amount in the same direction."""
    mild = (image().float() * 0.3 + 90).round().to(torch.uint8)
    expected = tv.adjust_hue(mild, degrees / 360).float()
    result = apply_matrix(mild, hue_matrix(degrees), limits=LEVELS)
    assert (result - expected).abs().max() < 25
    changed = (expected - mild.float()).flatten()
    assert torch.corrcoef(torch.stack([changed, (result - mild).flatten()]))[0, 1] > 0.75


def test_rgb_shift_by_hand() -> None:
    matrix = COLOR["rgb_shift"](rng(), levels=(-20.0, 20.0))
    shift = rng().uniform(-20, 20, 3)
    result = apply_matrix(torch.full((3, 1, 1), 100, dtype=torch.uint8), matrix).flatten()
    np.testing.assert_allclose(result.numpy(), 100 + shift, rtol=1e-5)
    assert len(set(shift)) == 3


def test_products_apply_from_right_to_left_and_clip_once() -> None:
    pixel = torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1)
    there_and_back = brightness_matrix(0.25) @ brightness_matrix(4)
    torch.testing.assert_close(apply_matrix(pixel, there_and_back, limits=LEVELS), pixel.float())
    assert apply_matrix(pixel, brightness_matrix(4), limits=LEVELS).max() == 255
    shifted = brightness_matrix(0.5) @ affine(np.eye(3), 0.2)
    result = apply_matrix(pixel, shifted).flatten()
    torch.testing.assert_close(result, torch.tensor([125.5, 75.5, 50.5]))


def test_photometric_keeps_ssds_order() -> None:
    """Brightness is first; contrast is before or after saturation and hue."""
    seen = set()
    for seed in range(200):
        draws = rng(seed)
        on = draws.random(4) < 0.5
        first = draws.random() < 0.5
        levels, contrast = draws.uniform(-32, 32) / 255, draws.uniform(0.5, 1.5)
        saturation, degrees = draws.uniform(0.5, 1.5), draws.uniform(-36, 36)
        expected = affine(np.eye(3), levels) if on[0] else IDENTITY
        steps = [
            contrast_matrix(contrast, 0) if on[1] else IDENTITY,
            saturation_matrix(saturation) if on[2] else IDENTITY,
            hue_matrix(degrees) if on[3] else IDENTITY,
        ]
        for step in steps if first else [*steps[1:], steps[0]]:
            expected = step @ expected
        np.testing.assert_allclose(photometric(rng(seed)), expected, atol=1e-12)
        seen.add((*on, first))
    assert len(seen) == 32


@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.8])
def test_gamma_equals_torchvision(gamma: float) -> None:
    result = apply_table(image(), CURVES["gamma"](rng(), range=(gamma, gamma)))
    assert (result - tv.adjust_gamma(image(), gamma).float()).abs().max() <= 1.01


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_posterize_equals_torchvision(bits: int) -> None:
    result = apply_table(image(), CURVES["posterize"](rng(), bits=bits))
    torch.testing.assert_close(result, tv.posterize(image(), bits).float(), atol=1e-3, rtol=0)


def test_solarize_equals_torchvision() -> None:
    result = apply_table(image(), CURVES["solarize"](rng(), range=(100.0, 100.0)))
    torch.testing.assert_close(result, tv.solarize(image(), 100).float(), atol=1e-3, rtol=0)


def test_curves_read_between_levels() -> None:
    between = torch.full((3, 1, 1), 100.5)
    result = apply_table(between, CURVES["gamma"](rng(), range=(2.0, 2.0)))
    assert (result - 100.5**2 / 255).abs().max() < 0.05


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("brightness", {"range": (-0.1, 1.0)}),
        ("contrast", {"range": (1.2, 0.8)}),
        ("rgb_shift", {"levels": (-300.0, 0.0)}),
        ("photometric", {"levels": -1.0}),
        ("gamma", {"range": (0.0, 1.0)}),
        ("posterize", {"bits": 0}),
        ("solarize", {"range": (0.0, 300.0)}),
    ],
)
def test_bad_arguments_are_refused(name: str, arguments: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        Pipeline([{"name": name, **arguments}])
