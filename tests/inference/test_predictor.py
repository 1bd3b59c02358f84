"""Prediction: one normalization, any size, tiles that equal the whole."""

from collections import deque

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peak_memory
from segkit.inference.predictor import Predictor
from segkit.inference.tiling import resized_rows, tiles
from segkit.inference.tta import parse_views
from segkit.inference.voting import HardVote, SoftVote

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class _Local(nn.Module):
    """Sees ``radius`` pixels around each, and subsamples by ``stride`` first."""

    def __init__(self, radius: int = 0, stride: int = 1, classes: int = 4) -> None:
        super().__init__()
        self.stride = stride
        generator = torch.Generator().manual_seed(1)
        shape = (classes, 3, 2 * radius + 1, 2 * radius + 1)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator) * 3 / (2 * radius + 1))
        self.seen: list[Tensor] | deque[Tensor] = []

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        self.seen.append(image)
        x = image[..., :: self.stride, :: self.stride]
        x = F.conv2d(x, self.weight, padding="same")
        x = x.repeat_interleave(self.stride, -1).repeat_interleave(self.stride, -2)
        return {"out": x[..., : image.shape[-2], : image.shape[-1]]}


def _photograph(*size: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_normalizes_as_the_formula_says() -> None:
    model, image = _Local(), _photograph(65, 97)
    Predictor(model, **IMAGENET).probabilities(image)
    mean, std = (torch.tensor(IMAGENET[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(model.seen[0][0], (image / 255 - mean) / std, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (31, 33), (65, 97)])
def test_probabilities_and_mask_have_the_photographs_size(size: tuple[int, int]) -> None:
    predict = Predictor(_Local(), **PLAIN)
    image = _photograph(*size)
    probabilities = predict.probabilities(image)
    assert probabilities.shape == (4, *size)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(0), torch.ones(size))
    mask = predict.mask(image)
    assert mask.dtype == torch.uint8
    assert torch.equal(mask.long(), probabilities.argmax(0))


def test_small_images_are_padded_for_the_model_only() -> None:
    model = _Local()
    image = _photograph(3, 50)
    probabilities = Predictor(model, **PLAIN).probabilities(image)
    assert model.seen[0].shape == (1, 3, 32, 50)
    expected = model(image[None] / 255)["out"].softmax(1)[0]
    torch.testing.assert_close(probabilities, expected)


def test_a_batch_equals_its_images() -> None:
    predict = Predictor(_Local(2), **PLAIN, views=parse_views("flips,scale1.3"), tile=64)
    images = torch.stack([_photograph(65, 97, seed=seed) for seed in range(3)])
    together = predict.probabilities(images)
    assert together.shape == (3, 4, 65, 97)
    for image, alone in zip(images, together, strict=True):
        torch.testing.assert_close(predict.probabilities(image), alone)
    assert predict.mask(images).shape == (3, 65, 97)


def test_evaluation_mode_and_no_gradient() -> None:
    model = _Local().train()
    probabilities = Predictor(model, **PLAIN).probabilities(_photograph(40, 40))
    assert not model.training
    assert not probabilities.requires_grad


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("size", [(65, 97), (97, 300), (129, 64), (200, 31)])
def test_tiles_equal_the_whole_for_a_pointwise_model(size: tuple[int, int], overlap: float) -> None:
    image = _photograph(*size)
    whole = Predictor(_Local(), **PLAIN).probabilities(image)
    tiled = Predictor(_Local(), **PLAIN, tile=64, overlap=overlap)
    torch.testing.assert_close(tiled.probabilities(image), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 8, 32])
def test_tiles_equal_the_whole_for_a_model_that_sees_a_quarter_of_the_overlap(stride: int) -> None:
    image = _photograph(200, 333)
    radius = max(1, 32 // 4 // stride) if stride < 32 else 0
    whole = Predictor(_Local(radius, stride), **PLAIN).probabilities(image)
    model = _Local(radius, stride)
    tiled = Predictor(model, **PLAIN, tile=128, overlap=0.25).probabilities(image)
    assert len(model.seen) == 2 * 4
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=1e-4)


def test_tiles_of_a_model_that_sees_further_differ() -> None:
    image = _photograph(200, 200)
    whole = Predictor(_Local(9), **PLAIN).probabilities(image)
    tiled = Predictor(_Local(9), **PLAIN, tile=128, overlap=0.25).probabilities(image)
    assert (tiled - whole).abs().max() > 1e-3


@pytest.mark.parametrize("length", [1, 64, 65, 96, 97, 1000, 20000])
@pytest.mark.parametrize(("tile", "overlap"), [(32, 0.5), (64, 0.25), (100, 0.9), (512, 0.5)])
def test_windows_sum_to_one(length: int, tile: int, overlap: float) -> None:
    total = torch.zeros(length, dtype=torch.float64)
    ends = 0
    for start, stop, weight in tiles(length, tile, overlap):
        assert 0 < stop - start <= tile
        assert start % 32 == 0
        assert weight.min() >= 0
        assert stop > ends
        ends = stop
        total[start:stop] += weight
    assert ends == length
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)


def test_bands_are_the_mask_and_are_small() -> None:
    predict = Predictor(_Local(), **PLAIN, tile=64)
    image = _photograph(1000, 70)
    bands = list(predict.bands(image))
    heights = [len(band) for _, band in bands]
    assert [top for top, _ in bands] == [sum(heights[:i]) for i in range(len(heights))]
    assert max(heights) <= 64
    mask = torch.cat([band for _, band in bands])
    assert torch.equal(mask, predict.mask(image))
    assert torch.equal(mask.long(), Predictor(_Local(), **PLAIN).probabilities(image).argmax(0))


@pytest.mark.parametrize("size", [60, 97, 200])
def test_size_is_the_longest_side_the_model_sees(size: int) -> None:
    model = _Local()
    image = _photograph(65, 97)
    probabilities = Predictor(model, **PLAIN, size=size).probabilities(image)
    assert model.seen[0].shape[-2:] == (round(65 * size / 97), size)
    assert probabilities.shape == (4, 65, 97)
    small = F.interpolate(
        image[None], tuple(model.seen[0].shape[-2:]), mode="bilinear", antialias=True
    )
    scores = model(small / 255)["out"].softmax(1)
    expected = F.interpolate(scores, (65, 97), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=1e-4)


def test_rows_of_a_resize_equal_the_resize() -> None:
    scores = torch.rand(2, 3, 17, 23, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(scores, (101, 67), mode="bilinear", align_corners=False)
    for top, bottom in [(0, 1), (0, 101), (37, 60), (100, 101)]:
        rows = resized_rows(scores, top, bottom, 101, 67)
        torch.testing.assert_close(rows, whole[:, :, top:bottom], atol=1e-5, rtol=1e-5)


def test_views_coefficients_and_amp_reach_the_model() -> None:
    model = _Local()
    image = _photograph(65, 97)
    views = parse_views("identity,rot90,scale1.3")
    bf16 = Predictor(
        model, **PLAIN, views=views, coefficients=(2, 1, 1), amp=torch.bfloat16
    ).probabilities(image)
    assert [tuple(x.shape[-2:]) for x in model.seen] == [(65, 97), (97, 65), (84, 126)]
    assert bf16.dtype == torch.float32
    full = Predictor(model, **PLAIN, views=views, coefficients=(2, 1, 1)).probabilities(image)
    torch.testing.assert_close(bf16, full, atol=0.05, rtol=0)
    assert not torch.equal(bf16, full)
    merged = Predictor(model, **PLAIN, views=views, merge="max").probabilities(image)
    assert not torch.allclose(merged, full, atol=1e-3)


def test_channels_last_reaches_the_model() -> None:
    model = _Local()
    Predictor(model, **PLAIN, channels_last=True, views=parse_views("square")).probabilities(
        _photograph(40, 50)
    )
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in model.seen)


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.uint8), _photograph(4, 4)[:1]]
)
def test_wrong_images(image: Tensor) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        Predictor(_Local(), **PLAIN).probabilities(image)


def test_tiny_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        Predictor(_Local(), **PLAIN, tile=16)


def _large(side: int, tile: int) -> None:
    torch.set_num_threads(1)
    image = torch.zeros(3, side, side, dtype=torch.uint8)
    model = _Local()
    model.seen = deque(maxlen=1)
    mask = Predictor(model, **PLAIN, tile=tile).mask(image)
    assert mask.shape == (side, side)


def test_bands_of_probabilities_are_the_probabilities() -> None:
    images = torch.stack([_photograph(150, 70, seed=seed) for seed in range(2)])
    for options in ({"tile": 64}, {"size": 60}, {}):
        predict = Predictor(_Local(), **PLAIN, **options)
        bands = torch.cat([band for _, band in predict.probability_bands(images)], 2)
        assert torch.equal(bands, predict.probabilities(images))
        alone = torch.cat([band for _, band in predict.probability_bands(images[0])], 1)
        torch.testing.assert_close(alone, bands[0])


def _large_vote(side: int, tile: int) -> None:
    torch.set_num_threads(1)
    image = torch.zeros(3, side, side, dtype=torch.uint8)
    votes = [kind([(side, side)], 4, max_bytes=0) for kind in (HardVote, SoftVote)]
    for voter in range(2):
        model = _Local()
        model.seen = deque(maxlen=1)
        for top, band in Predictor(model, **PLAIN, tile=tile).probability_bands(image):
            for vote in votes:
                vote.add(0, band, voter=voter, top=top)
    for vote in votes:
        assert vote.result(0).shape == (side, side)


@pytest.mark.slow
def test_a_vote_holds_bands_of_a_large_image() -> None:
    side, mebibyte = 6000, 2**20
    photograph_and_two_masks = (3 + 2) * side**2 / mebibyte
    counted = 8 * 4 * 2**22 / mebibyte  # a result counts 2^22 scores at a time
    probabilities = 4 * 4 * side**2 / mebibyte
    assert photograph_and_two_masks + counted < probabilities
    assert peak_memory(_large_vote, side, 128) < photograph_and_two_masks + counted


@pytest.mark.slow
def test_the_tile_bounds_the_memory_of_a_large_image() -> None:
    side, mebibyte = 6000, 2**20
    photograph_and_mask = (3 + 1) * side**2 / mebibyte
    band = 4 * 4 * 128 * side / mebibyte
    assert peak_memory(_large, side, 128) < photograph_and_mask + 6 * band
