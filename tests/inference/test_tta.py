"""Views: inverses, products, merging and fitted coefficients."""

import math
import weakref
from itertools import product

import pytest
import torch
from torch import Tensor

from segkit.core.errors import ConfigError
from segkit.inference.tta import (
    SETS,
    SYMMETRIES,
    View,
    fit_coefficients,
    merge_views,
    parse_views,
    true_class_samples,
)

SIZES = [(65, 97), (97, 65), (64, 64), (1, 7), (33, 2)]


def _noise(size: tuple[int, int], channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(seed))


def _smooth(size: tuple[int, int], channels: int = 3) -> Tensor:
    """A picture that resampling hardly changes: slow waves."""
    rows = torch.linspace(0, 2.0, size[0])[:, None]
    columns = torch.linspace(0, 2.5, size[1])
    return torch.stack([torch.sin(rows * (i + 1) / 2 + columns) for i in range(channels)])[None]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SYMMETRIES)
def test_symmetries_come_back_bit_for_bit(name: str, size: tuple[int, int]) -> None:
    (view,) = parse_views(name)
    image = _noise(size)
    seen = view.apply(image)
    assert torch.equal(view.invert(seen, size), image)
    assert name == "identity" or size == (1, 7) or not torch.equal(seen, image)


def test_symmetries_by_hand() -> None:
    image = torch.tensor([[1.0, 2, 3], [4, 5, 6]])[None, None]
    expected = {
        "identity": [[1, 2, 3], [4, 5, 6]],
        "hflip": [[3, 2, 1], [6, 5, 4]],
        "vflip": [[4, 5, 6], [1, 2, 3]],
        "rot180": [[6, 5, 4], [3, 2, 1]],
        "rot90": [[3, 6], [2, 5], [1, 4]],
        "rot270": [[4, 1], [5, 2], [6, 3]],
        "transpose": [[1, 4], [2, 5], [3, 6]],
        "antitranspose": [[6, 3], [5, 2], [4, 1]],
    }
    assert {n: v.apply(image)[0, 0].tolist() for n, v in SYMMETRIES.items()} == expected


@pytest.mark.parametrize(("first", "second"), list(product(SYMMETRIES, repeat=2)))
def test_product_is_first_then_second(first: str, second: str) -> None:
    image = _noise((5, 8))
    both = SYMMETRIES[first] * SYMMETRIES[second]
    one_by_one = SYMMETRIES[second].apply(SYMMETRIES[first].apply(image))
    assert torch.equal(both.apply(image), one_by_one)
    assert parse_views(f"{first}*{second}") == (both,)
    assert parse_views(str(both)) == (both,)


def test_product_with_an_angle_is_first_then_second() -> None:
    image = _smooth((60, 80))
    for names in ("rotate7*hflip", "hflip*rotate7", "rotate7*transpose", "rot90*rotate7"):
        first, second = parse_views(names.split("*"))
        (both,) = parse_views(names)
        one_by_one = second.apply(first.apply(image))
        assert both.apply(image).shape == one_by_one.shape
        torch.testing.assert_close(both.apply(image), one_by_one, atol=0.02, rtol=0)


@pytest.mark.parametrize("size", [(65, 97), (97, 65), (64, 64)])
@pytest.mark.parametrize("factor", [0.75, 1.25, 1.3, 1.5, 2])
def test_scales_round_and_return_to_the_exact_size(factor: float, size: tuple[int, int]) -> None:
    view = View(scale=factor)
    image = _smooth(size)
    seen = view.apply(image)
    assert seen.shape[-2:] == tuple(round(side * factor) for side in size)
    back = view.invert(seen, size)
    assert back.shape == image.shape
    error = (back - image).abs()
    assert error[..., 2:-2, 2:-2].max() < 0.005
    assert error.max() < 0.03


def test_a_scale_never_vanishes() -> None:
    assert View(scale=0.05).apply(_noise((3, 5))).shape == (1, 3, 1, 1)


@pytest.mark.parametrize("size", [(65, 97), (97, 65)])
@pytest.mark.parametrize("angle", [-30, -5, 1, 5, 12.5, 45])
def test_rotations_come_back_and_lose_nothing(angle: float, size: tuple[int, int]) -> None:
    view = View(angle=angle)
    image = _smooth(size)
    seen = view.apply(image)
    assert seen.shape[-2] > size[0]
    assert seen.shape[-1] > size[1] or abs(angle) == 45
    back = view.invert(seen, size)
    error = (back - image).abs()
    assert error[..., 2:-2, 2:-2].max() < 0.005
    assert error.max() < 0.05  # the border too: its neighbors are its own mirror image


def test_rotation_turns_counter_clockwise() -> None:
    image = torch.zeros(1, 1, 41, 41)
    image[..., 20, 38] = 1  # to the right of the center
    row = View(angle=30).apply(image)[0, 0].sum(1).argmax()
    size = View(angle=30).apply(image).shape[-2]
    assert row == round((size - 1) / 2 - 18 * math.sin(math.radians(30)))


@pytest.mark.parametrize("merge", ["mean", "logits", "geometric", "max"])
@pytest.mark.parametrize("views", [*SETS, "hflip*scale1.3", "transpose*rotate5"])
def test_a_pointwise_model_is_the_same_in_every_view(views: str, merge: str) -> None:
    image = _smooth((65, 97))
    whole = (3 * image).softmax(1)
    merged = merge_views(lambda x: 3 * x, image, views=parse_views(views), merge=merge)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, whole, atol=0.03, rtol=0)
    if views in ("flips", "square"):
        torch.testing.assert_close(merged, whole, atol=1e-6, rtol=0)


def test_no_views_is_the_image_as_it_is() -> None:
    image = _noise((5, 7))
    assert torch.equal(merge_views(lambda x: x, image), image.softmax(1))


def _left_right(x: Tensor) -> Tensor:
    """Logits ln 3 for class 0 in the left column, ln 1 elsewhere: (.75, .25) and (.5, .5)."""
    logits = torch.zeros(1, 2, *x.shape[-2:])
    logits[:, 0, :, 0] = math.log(3)
    return logits


@pytest.mark.parametrize(
    ("merge", "coefficients", "left"),
    [
        ("mean", None, (0.75 + 0.5) / 2),
        ("mean", (3, 1), (3 * 0.75 + 0.5) / 4),
        ("logits", None, 3**0.5 / (3**0.5 + 1)),
        ("geometric", None, (0.75 * 0.5) ** 0.5 / ((0.75 * 0.5) ** 0.5 + (0.25 * 0.5) ** 0.5)),
        ("logits", (0, 2), 0.5),
        ("max", None, 0.75 / (0.75 + 0.5)),
    ],
)
def test_merges_by_hand(merge: str, coefficients: tuple[float, ...] | None, left: float) -> None:
    image = torch.zeros(1, 3, 2, 2)
    merged = merge_views(
        _left_right,
        image,
        views=parse_views("identity,hflip"),
        merge=merge,
        coefficients=coefficients,
    )
    assert merged[0, 0, 0, 0].item() == pytest.approx(left)
    torch.testing.assert_close(merged.sum(1), torch.ones(1, 2, 2))


def test_merging_leaves_the_models_output_alone() -> None:
    image = _noise((4, 4))
    kept = image.clone()
    for merge in ("mean", "logits", "max"):
        merge_views(lambda x: x, image, views=parse_views("flips"), merge=merge)
        assert torch.equal(image, kept)


@pytest.mark.parametrize("merge", ["mean", "logits", "max"])
def test_one_view_is_in_memory_at_a_time(merge: str) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive = []

    def model(x: Tensor) -> Tensor:
        alive.append(sum(reference() is not None for reference in made))
        logits = x.clone()
        made.append(weakref.ref(logits))
        return logits

    views = parse_views("square,hflip*scale1.5")
    merge_views(model, _noise((8, 12)), views=views, merge=merge)
    assert len(alive) == len(views) >= 8
    assert max(alive) <= 1  # the previous one, until its name is assigned again


def test_sets() -> None:
    assert [len(parse_views(name)) for name in SETS] == [4, 8, 16]
    assert len(set(parse_views(["square", "flips", "scale1.5"]))) == 9
    assert parse_views("identity, hflip*scale1.5") == (View(), View(mirrored=True, scale=1.5))
    assert all(parse_views(name)[0] == View() for name in SETS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hflop", "did you mean 'hflip'"),
        ("scale0", "0.05 to 20"),
        ("scale-1", "0.05 to 20"),
        ("rotate90", "multiply by rot90"),
        ("scale1e3", "unknown view"),
        ("", "unknown view ''"),
        ("hflip*", "unknown view ''"),
        ("hflip*flips", "a set cannot be multiplied"),
    ],
)
def test_bad_views(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        parse_views(spec)


@pytest.mark.parametrize(
    ("coefficients", "merge", "message"),
    [
        ((1,), "mean", "1 view coefficients were given for 2"),
        ((1, -1), "mean", "positive"),
        ((0, 0), "mean", "all zero"),
        ((1, math.nan), "mean", "all zero"),
        ((1, 1), "max", "takes no view coefficients"),
    ],
)
def test_bad_coefficients(coefficients: tuple[float, ...], merge: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge_views(
            lambda x: x,
            torch.zeros(1, 3, 2, 2),
            views=parse_views("identity,hflip"),
            merge=merge,
            coefficients=coefficients,
        )


def test_true_class_samples_by_hand() -> None:
    planes = torch.arange(8.0).view(2, 2, 2)  # 0..3 of class 0, 4..7 of class 1
    target = torch.tensor([[0, 1], [255, 1]], dtype=torch.uint8)
    assert true_class_samples(planes, target, samples=3).tolist() == [0, 5, 7]
    assert true_class_samples(planes, target, samples=6).tolist() == [0, 0, 5, 5, 7, 7]
    assert true_class_samples(planes, target, samples=1).tolist() == [0]
    nothing = torch.full((2, 2), 255, dtype=torch.uint8)
    assert true_class_samples(planes, nothing, samples=2).isnan().all()


def test_fitted_weights_by_hand() -> None:
    # Maximum of ln(w) + ln(1 - w) twice weighted: of 3 pixels view 0 is right on 2, view 1 on 1.
    right = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert fit_coefficients(right) == pytest.approx([2 / 3, 1 / 3])
    assert fit_coefficients(torch.full((4, 9), 0.3)) == pytest.approx([0.25] * 4)
    assert fit_coefficients(torch.tensor([[0.9, 0.8], [0.2, 0.1]]))[0] > 0.999


def test_fitted_weights_beat_every_weight_on_a_grid() -> None:
    probabilities = torch.rand(2, 500, generator=torch.Generator().manual_seed(0)).double()
    probabilities[0] = probabilities[0].sqrt()

    def likelihood(first: float) -> float:
        return float((first * probabilities[0] + (1 - first) * probabilities[1]).log().mean())

    first, second = fit_coefficients(probabilities)
    assert first + second == pytest.approx(1)
    assert first > 0.5
    assert likelihood(first) >= max(likelihood(step / 50) for step in range(51)) - 1e-4
