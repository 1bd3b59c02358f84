"""Rules of a plan, each worked by hand."""

from typing import Any

import pytest

from segkit.core import config
from segkit.core.machine import Machine
from segkit.data.fingerprint import Fingerprint, join
from segkit.training import rules
from segkit.training.rules import Choice, Cost

CPU = Machine("cpu", "CPU", 16.0, 2, 40.0)
GPU = Machine("cuda", "a GPU", 40.0, 16, 400.0)
SMALL_GPU = Machine("cuda", "a GPU", 8.0, 4, 400.0)


def data(**changes: Any) -> Fingerprint:
    """300 photographs of 400 x 300 with a large and a small class."""
    known = Fingerprint(
        images=300, sizes=[(300, 400)] * 10, classes=("ground", "can"), pixels=(900, 100),
        shown=(10, 10), sides=[40.0] * 10, gray=False, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.004),
    )  # fmt: skip
    return known._replace(**changes)


def values(choices: list[Choice]) -> dict[str, Any]:
    assert all(choice.reason for choice in choices)
    return {choice.key: choice.value for choice in choices}


def test_the_model_follows_the_device_and_its_memory() -> None:
    names = [[m.backbone["name"] for m in rules.models(x)] for x in (CPU, SMALL_GPU, GPU)]
    assert names == [["mobilenet_v2"], ["resnet34"], ["convnext_tiny", "resnet34"]]
    assert rules.decoder_for("mobilenet_v2") == rules.LIGHT.decoder
    assert rules.decoder_for("resnet101")["name"] == "unet"
    assert rules.decoder_for("swin_b")["name"] == "upernet"


@pytest.mark.parametrize(
    ("size", "side", "machine", "factor"),
    [
        ((300, 400), 40, CPU, 1.0),
        ((1536, 2048), 40, CPU, 0.25),  # 512 / 2048; objects of 10 pixels remain
        ((1536, 2048), 40, GPU, 0.5),  # 1024 / 2048
        ((1536, 2048), 16, CPU, 0.5),  # 8 / 16: smaller objects would vanish
        ((1536, 2048), 4, CPU, 1.0),  # they are small already
    ],
)
def test_large_images_are_scaled_down_if_objects_remain(
    size: tuple[int, int], side: float, machine: Machine, factor: float
) -> None:
    fingerprint = data(sizes=[size], sides=[side] * 10)
    assert rules.scale_factor(fingerprint, machine)[0] == factor


def test_crops_fit_scaled_images() -> None:
    assert rules.crop(data(), 1.0, CPU) == (256, 256)
    assert rules.crop(data(), 1.0, GPU) == (288, 384)
    assert rules.crop(data(), 0.5, GPU) == (128, 192)  # of 150 x 200


@pytest.mark.parametrize(
    ("images", "room", "machine", "size", "parts"),
    [
        (240, 100.0, CPU, 8, 1),
        (240, 100.0, GPU, 16, 1),
        (20, 100.0, GPU, 4, 1),  # a quarter of 20 is 5
        (3, 100.0, GPU, 2, 1),
        (1, 100.0, GPU, 1, 1),
        (240, 5.0, GPU, 16, 4),  # parts of 4 images
        (240, 0.3, GPU, 16, 16),
    ],
)
def test_the_batch(images: int, room: float, machine: Machine, size: int, parts: int) -> None:
    chosen = values(rules.batch(images, room, machine))
    assert chosen == {"train.batch_size": size, "train.accumulate": parts}


def test_losses_follow_the_imbalance() -> None:
    balanced, skewed = (rules.losses(data(pixels=x))[0].value for x in ((900, 100), (991, 9)))
    assert [term["name"] for term in balanced] == ["cross_entropy"]
    assert [term["name"] for term in skewed] == ["cross_entropy", "dice"]


def test_few_steps_have_twice_the_rate() -> None:
    rates = rules.rates("adamw", pretrained=True, batch_norm=True)
    length = [Choice("train.batch_size", 8, "a"), Choice("data.folds", 4, "b")]
    # 300 images, three of four folds in batches of 8: 28 steps
    few = values(rules.hasten([*rates, *length, Choice("train.epochs", 35, "c")], 300))
    assert (few["optim.lr"], few["optim.backbone_lr_factor"]) == (0.002, 0.2)
    many = values(rules.hasten([*rates, *length, Choice("train.epochs", 36, "c")], 300))
    assert (many["optim.lr"], many["optim.backbone_lr_factor"]) == (0.001, 0.1)


def test_images_of_seldom_classes_are_repeated() -> None:
    assert rules.repeats(data(shown=(300, 30))) == []  # a tenth of the images
    (seldom,) = rules.repeats(data(shown=(300, 3)))
    assert (seldom.key, seldom.value) == ("data.repeat_threshold", 0.1)
    assert "can is in 1 % of the images, drawn 3.2 times as often" in seldom.reason  # sqrt(10)


def test_crops_aim_at_classes_if_one_is_small() -> None:
    def crop(factor: float, **changes: Any) -> dict[str, Any]:
        (made, _) = rules.augmentation(data(**changes), factor, (150, 200))
        return next(spec for spec in made.value if spec["name"] == "crop")

    assert "aim" not in crop(1.0)  # a tenth of the pixels
    assert crop(1.0, pixels=(990, 10))["aim"] == 0.33
    assert "aim" not in crop(0.5, pixels=(990, 10))  # the crop is the whole image
    (made, _) = rules.augmentation(data(pixels=(990, 10)), 1.0, (150, 200))
    assert "aim at a class, as can has 1 % of the pixels" in made.reason


def test_rare_classes_are_said() -> None:
    assert rules.warnings_about(data()) == []
    (rare,) = rules.warnings_about(data(pixels=(90_000, 9), shown=(10, 9)))
    assert "can is rare: 9 images, 0.01 % of pixels" in rare
    (rare,) = rules.warnings_about(data(images=2, shown=(2, 1)))  # the background is in all images
    assert "can is rare: 1 image, " in rare


def test_time_worked_by_hand() -> None:
    cost = Cost(step=2.0, image=0.5)
    # 3 folds x (20 epochs x 30 steps x 2 s + 10 evaluations x 60 images x 0.5 s) = 4500 s
    assert rules.hours_of(cost, 20, 3, 30, 60) == 1.25
    assert rules.epochs_within(1.25, cost, 3, 30, 60) == 20
    assert rules.epochs_within(1.2499, cost, 3, 30, 60) == 19
    assert rules.epochs_within(0.001, cost, 3, 30, 60) == 1
    assert rules.epochs_within(1e9, cost, 3, 30, 60) == 300
    assert rules.epochs_within(1e9, cost, 3, 400, 60) == 100  # 40,000 steps


def test_folds_follow_the_number_of_images_and_the_time() -> None:
    cost = Cost(step=1.0, image=0.1)
    chosen = values(rules.schedule(data(), 10.0, cost, 8, None))
    assert (chosen["data.selection"], chosen["data.folds"]) == (0.1, 5)
    few = values(rules.schedule(data(images=30), 10.0, cost, 4, None))
    assert (few["data.selection"], few["data.folds"]) == (0.0, 3)  # 30 // 8
    # 270 images; 2 folds of 16 steps: 20 epochs take 2 x (320 + 135) s = 0.253 h
    short = values(rules.schedule(data(), 0.26, cost, 8, None))
    assert (short["data.folds"], short["train.epochs"]) == (2, 20)
    fixed = values(rules.schedule(data(), 10.0, cost, 8, 50))
    assert "data.folds" not in fixed
    # 300 // 8 = 37 steps, 10 evaluations of 5 s: the 300 epochs take 11150 s
    assert fixed["train.epochs"] == 300


def test_too_little_time_is_said() -> None:
    (epochs, *_) = rules.schedule(data(), 0.001, Cost(9.0, 1.0), 8, 50)
    assert epochs.value == 1
    assert "more than the 0.001 h allowed" in epochs.reason


def test_groups_are_units() -> None:
    names = ("a", "b", "c", "d", "e")
    groups = join(names, [(0, 2), (2, 4)])
    assert groups == [["a", "c", "e"]]
    assert data(images=5, groups=groups).units == 3


def test_colors_follow_the_images_and_the_weights() -> None:
    (gray, _) = rules.augmentation(data(gray=True), 1.0, (64, 64))
    assert {"hue", "photometric"}.isdisjoint(spec["name"] for spec in gray.value)
    (few, _) = rules.augmentation(data(images=199), 0.5, (64, 96))
    assert few.value[0] == {"name": "scale", "range": [0.35, 0.7]}
    assert [spec["name"] for spec in few.value] == [
        "scale", "rotate", "crop", "hflip", "photometric"
    ]  # fmt: skip
    assert rules.normalization(data(), pretrained=True) == []
    assert values(rules.normalization(data(), pretrained=False)) == {
        "data.mean": [0.5, 0.5, 0.5],
        "data.std": [0.2, 0.2, 0.01],
    }


def test_loading() -> None:
    # 300 x 300 x 400 x 4 bytes = 0.144 GB
    assert values(rules.loading(data(), CPU)) == {"data.workers": 0, "data.cache_gb": 1.0}
    many = values(rules.loading(data(images=300_000), GPU))
    assert many == {"data.workers": 8, "data.cache_gb": 172.8}
    assert values(rules.loading(data(images=300_000), CPU))["data.cache_gb"] == 20.0


def test_choices_become_a_configuration() -> None:
    choices = [
        Choice("model.weights", None, "none"),
        Choice("optim.warmup_steps", None, "later"),
        *rules.batch(240, 100.0, CPU),
    ]
    raw = rules.nested(choices)
    assert raw == {"model": {"weights": None}, "train": {"batch_size": 8, "accumulate": 1}}
    assert config.parse(raw).model.weights is None
