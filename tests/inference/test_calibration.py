"""Calibration: a planted miscalibration is mended, errors by hand, masks unchanged."""

import math

import pytest
import torch
from torch import Tensor, nn

from segkit.inference.calibration import CalibrationCounter, TemperatureFit, sharpened
from segkit.inference.predictor import Predictor

CPU = torch.device("cpu")


def _planted(seed: int, *, factor: float, size: int = 48) -> tuple[Tensor, Tensor]:
    """Labels drawn from known probabilities, and these with logits multiplied by a factor."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(4, size, size, generator=generator)
    probabilities = logits.softmax(0)
    chosen = torch.multinomial(probabilities.flatten(1).T, 1, generator=generator)
    target = chosen.view(size, size).to(torch.uint8)
    target[:5] = 255
    return (factor * logits).softmax(0), target


def _fitted(factor: float, images: int = 40) -> float:
    fit = TemperatureFit(range(images + 1))
    for image in range(images):
        fit.add(image, *_planted(image, factor=factor))
    fit.add(images, torch.rand(4, 8, 8), torch.full((8, 8), 255))  # without a label: no effect
    return fit.temperature(CPU)


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_a_planted_temperature_is_recovered(factor: float) -> None:
    """The logits are ``factor`` times too large: this is the temperature that undoes it."""
    assert _fitted(factor) == pytest.approx(factor, rel=0.04)


def _scores(factor: float, temperature: float) -> tuple[float, float]:
    counter = CalibrationCounter(range(20), 4)
    for index in range(20):
        probabilities, target = _planted(100 + index, factor=factor)
        counter.add(index, sharpened(probabilities, temperature), target)
    result = counter.result(CPU)
    return result["ece"]["mean"], result["brier"]["mean"]


def test_a_planted_miscalibration_is_mended() -> None:
    """Other images than those that the temperature was fitted on."""
    wrong, mended, right = _scores(3, 1), _scores(3, _fitted(3)), _scores(1, 1)
    assert wrong[0] > 0.1
    assert mended[0] < 0.03
    assert wrong[1] > 1.1 * right[1]
    assert mended[1] == pytest.approx(right[1], rel=0.01)


def test_a_temperature_divides_logits() -> None:
    logits = torch.randn(2, 5, 7, 9, generator=torch.Generator().manual_seed(0)).double()
    expected = (logits / 2.5).softmax(1)
    torch.testing.assert_close(sharpened(logits.softmax(1), 2.5), expected)
    probabilities = logits.softmax(1)
    assert sharpened(probabilities, 1) is probabilities


def test_errors_by_hand() -> None:
    """Four valid pixels of two classes; 0.94 and 0.95 are in the same bin of 1/15."""
    first = torch.tensor([[0.94, 0.95, 0.6, 0.3, 0.2]])
    target = torch.tensor([[0, 1, 0, 1, 255]])
    counter = CalibrationCounter([7], 2)
    counter.add(7, torch.stack([first, 1 - first]).double(), target)
    result = counter.result(CPU)
    # Class 0: a bin with 0.94 + 0.95 - 1 too much, and one with 0.4 too little, of 3 pixels.
    error = [(0.89 + 0.4) / 3, 0.3]  # class 1: a pixel of 0.7, which is right
    assert result["ece"]["per_class"] == pytest.approx(error)
    assert result["ece"]["mean"] == pytest.approx(sum(error) / 2)
    brier = (0.06**2 + 0.95**2 + 0.4**2 + 0.3**2) / 4
    assert result["brier"]["per_class"] == pytest.approx([brier, brier])


def test_a_class_that_is_never_predicted_has_no_error() -> None:
    counter = CalibrationCounter(range(2), 3)
    for index in range(2):
        scores = torch.tensor([0.7, 0.2, 0.1])[:, None, None].expand(3, 4, 4)
        counter.add(index, scores, torch.zeros(4, 4, dtype=torch.uint8))
    assert counter.result(CPU)["ece"]["per_class"] == [pytest.approx(0.3), None, None]


def test_shards_sum_to_the_whole() -> None:
    whole = CalibrationCounter(range(4), 4)
    shards = [CalibrationCounter(range(4), 4) for _ in range(2)]
    for index in range(4):
        pair = _planted(index, factor=2)
        whole.add(index, *pair)
        shards[index % 2].add(index, *pair)
    for name in ("_errors", "_squares"):
        parts = [getattr(shard, name) for shard in shards]
        assert torch.equal(parts[0] + parts[1], getattr(whole, name))


class _Logits(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([image, image[:, :1].flip(-1)], 1)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 7.0])
def test_a_predictor_with_a_temperature_gives_the_same_masks(temperature: float) -> None:
    image = torch.randint(0, 256, (3, 33, 47), generator=torch.Generator().manual_seed(0))
    image = image.to(torch.uint8)
    plain, scaled = Predictor(_Logits()), Predictor(_Logits(), temperature=temperature)
    prediction = scaled(image)
    assert torch.equal(prediction.mask, plain.mask(image))
    assert torch.equal(scaled.mask(image), plain.mask(image))
    expected = sharpened(plain.probabilities(image), temperature)
    assert torch.equal(prediction.probabilities, expected)
    assert torch.equal(scaled.probabilities(image), expected)
    assert math.isclose(float(prediction.probabilities.sum(0).mean()), 1, rel_tol=1e-5)
