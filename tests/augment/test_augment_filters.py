"""Filters equal those of Pillow, torchvision and NumPy."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import functional as tv

from segkit.augment import Pipeline
from segkit.augment.filters import FILTERS
from segkit.augment.median import network
from segkit.core.errors import ConfigError


def image(size: tuple[int, int] = (33, 41)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, *size), generator=generator).to(torch.uint8)


def filtered(name: str, pixels: Tensor, **arguments) -> Tensor:
    return FILTERS[name](np.random.default_rng(0), **arguments)(pixels)


def pillow(pixels: Tensor, kind: ImageFilter.Filter) -> np.ndarray:
    photo = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return np.asarray(photo.filter(kind)).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_blur_equals_pillow(size: int) -> None:
    result = filtered("blur", image(), sizes=(size,))
    expected = pillow(image(), ImageFilter.BoxBlur(size // 2))
    assert np.abs(result.numpy() - expected).max() <= 1


def test_the_median_of_single_pixels_is_the_image() -> None:
    result = filtered("median_blur", image(), sizes=(1,))  # Pillow may crash at this size
    assert torch.equal(result.to(torch.uint8), image())


@pytest.mark.parametrize("size", [3, 5, 7, 9])
def test_median_blur_equals_pillow(size: int) -> None:
    result = filtered("median_blur", image(), sizes=(size,))
    inside = slice(size // 2, -(size // 2) or None)
    expected = pillow(image(), ImageFilter.MedianFilter(size))
    assert np.array_equal(result[:, inside, inside].numpy(), expected[:, inside, inside])


def test_median_blur_at_the_border_and_on_tiny_images() -> None:
    pixels = image((2, 3))
    padded = np.pad(pixels.numpy(), ((0, 0), (2, 2), (2, 2)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))
    result = filtered("median_blur", pixels, sizes=(5,))
    assert np.array_equal(result.numpy(), np.median(windows, axis=(-2, -1)))


@pytest.mark.parametrize(("size", "steps"), [(3, 20), (5, 116)])
def test_the_median_of_every_square_of_zeros_and_ones(size: int, steps: int) -> None:
    """A network correct for zeros and ones is correct for all numbers (zero-one principle)."""
    count = size * size
    squares = np.arange(2**count // 8, dtype=np.uint32)  # eight to a byte, numbered by their pixels
    pixels = [np.full(len(squares), low, np.uint8) for low in (0b10101010, 0b11001100, 0b11110000)]
    pixels += [((squares >> pixel) & 1).astype(np.uint8) * 255 for pixel in range(count - 3)]
    ones = sum(np.unpackbits(pixel) for pixel in pixels)
    steps_by_number = {step.number: step for step in network(size)}

    @functools.cache
    def computed(number: int, down: int, right: int) -> np.ndarray:
        if not number:
            return pixels[down * size + right]
        step = steps_by_number[number]
        function = {"minimum": np.bitwise_and, "maximum": np.bitwise_or}[step.function]
        return function(
            *(computed(n, d + down, r + right) for n, d, r in (step.first, step.second))
        )

    last = network(size)[-1].number
    assert np.array_equal(computed(last, 0, 0), np.packbits(ones > count // 2))
    assert len(steps_by_number) == steps


@pytest.mark.parametrize("sigma", [0.5, 1.7])
def test_gaussian_blur_equals_torchvision(sigma: float) -> None:
    result = filtered("gaussian_blur", image(), sigma=(sigma, sigma))
    reach = int(np.ceil(3 * sigma))
    expected = tv.gaussian_blur(image().float(), [2 * reach + 1] * 2, [sigma, sigma])
    inside = slice(reach, -reach)
    torch.testing.assert_close(
        result[:, inside, inside], expected[:, inside, inside], atol=0.01, rtol=0
    )
    assert (result.mean() - image().float().mean()).abs() < 2


@pytest.mark.parametrize("factor", [0.0, 1.0, 2.0])
def test_sharpen_equals_torchvision(factor: float) -> None:
    result = filtered("sharpen", image(), range=(factor, factor))
    expected = tv.adjust_sharpness(image(), factor).float()
    assert (result - expected).abs()[:, 1:-1, 1:-1].max() <= 1.01


def test_noise_has_its_deviation_and_repeats() -> None:
    gray = torch.full((3, 128, 128), 128, dtype=torch.uint8)
    result = filtered("noise", gray, levels=(5.0, 5.0))
    assert (result - 128).std() == pytest.approx(5, rel=0.02)
    assert (result - 128).mean().abs() < 0.1
    assert torch.equal(result, filtered("noise", gray, levels=(5.0, 5.0)))


def test_jpeg_loses_more_at_less_quality() -> None:
    smooth = torch.arange(64).repeat(3, 64, 1).mul(4).to(torch.uint8)
    losses = []
    for quality in (20, 90):
        result = filtered("jpeg", smooth, quality=(quality, quality))
        losses.append((result.float() - smooth).abs().mean())
    assert losses[0] > 2 * losses[1]
    assert losses[0] < 10


@pytest.mark.parametrize("size", [3, 7])
def test_morphology_equals_pillow(size: int) -> None:
    grow, shrink = ImageFilter.MaxFilter(size), ImageFilter.MinFilter(size)
    inside = slice(size - 1, 1 - size)
    for name, order in (("closing", (grow, shrink)), ("opening", (shrink, grow))):
        result = filtered(name, image(), sizes=(size,))
        between = torch.from_numpy(pillow(image(), order[0]).copy())
        expected = pillow(between, order[1])
        assert np.array_equal(result[:, inside, inside].numpy(), expected[:, inside, inside])


def test_closing_fills_a_class_and_leaves_ignored_pixels() -> None:
    mask = torch.ones((9, 9), dtype=torch.uint8) * 2
    mask[2, 2], mask[4, 4], mask[6, 6] = 0, 5, 255
    closed = filtered("closing", mask, on="mask", sizes=(3,), classes=(2,))
    expected = torch.full((9, 9), 2, dtype=torch.uint8)
    expected[6, 6] = 255
    assert torch.equal(closed, expected)
    assert mask[2, 2] == 0


def test_opening_removes_small_regions_of_a_class() -> None:
    mask = torch.zeros((9, 9), dtype=torch.uint8)
    mask[1, 1] = 2
    mask[4:8, 4:8] = 2
    mask[1, 7] = 3
    opened = filtered("opening", mask, on="mask", sizes=(3,), classes=(2,))
    expected = mask.clone()
    expected[1, 1] = 0
    assert torch.equal(opened, expected)


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_levels_stay_levels(name: str) -> None:
    """Filters accept bytes and floats, change neither, and stay within 0 to 255."""
    pixels = image()
    make = functools.partial(filtered, name)
    from_bytes = make(pixels)
    from_floats = make(pixels.float())
    assert torch.equal(pixels, image())
    assert from_bytes.shape == pixels.shape
    torch.testing.assert_close(from_bytes.float(), from_floats.float(), atol=1e-3, rtol=0)
    assert from_bytes.min() >= -1e-3
    assert from_bytes.max() <= 255 + 1e-3


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("blur", {"sizes": (4,)}),
        ("median_blur", {"sizes": ()}),
        ("median_blur", {"sizes": (11,)}),
        ("gaussian_blur", {"sigma": (0.0, 1.0)}),
        ("jpeg", {"quality": (0, 50)}),
        ("closing", {"on": "mask"}),
        ("opening", {"classes": (1,)}),
    ],
)
def test_bad_arguments_are_refused(name: str, arguments: dict) -> None:
    with pytest.raises(ConfigError, match=r"sizes|sigma|quality|classes"):
        Pipeline([{"name": name, **arguments}])
