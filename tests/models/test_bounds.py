"""Any number in any component of a configuration: it is built, or refused in a sentence."""

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from segkit import train
from segkit.augment import pipeline
from segkit.augment.pipeline import OPERATIONS, Pipeline
from segkit.core import config
from segkit.core.config import bind, build, check_bounds, override, parse
from segkit.core.errors import ConfigError, SegkitError
from segkit.models.backbones import BACKBONES
from segkit.models.decoders import DECODERS
from segkit.models.segmenter import build_model
from segkit.training.losses import LOSSES, build_loss
from segkit.training.optim import OPTIMIZERS, SCHEDULES, build_optimizer, build_schedule

FEW = (-1, 0, 2**62), (-1.0, 0.5, 1e308)
MANY = (-1, 0, 1, 3, 2**31, 2**62, 2**64), (-1e308, -1.0, 0.0, 0.5, 1.5, 1e308)
"""Integers and floats."""

Numbers = tuple[tuple[int, ...], tuple[float, ...]]
GIVEN = {"channels", "strides", "num_classes", "groups", "lr", "progress", *pipeline.GIVEN}
Registry = Mapping[str, Callable[..., Any]]


def values(hint: Any, numbers: Numbers) -> list[Any]:
    """Numbers for an argument's annotation."""
    inner = typing.get_args(hint)
    if hint is int:
        return list(numbers[0])
    if hint is float:
        return list(numbers[1])
    if typing.get_origin(hint) is tuple:
        return [
            [],
            *([value] * (len(inner) - (... in inner)) for value in values(inner[0], numbers)),
        ]
    if typing.get_origin(hint) is typing.Literal:
        return []
    return [value for part in inner for value in values(part, numbers)]


def components(registry: Registry, numbers: Numbers) -> Iterator[dict[str, Any]]:
    seen = set()
    for name, target in registry.items():
        make, hints = config.constructor(target), config.hints(target)
        for key in inspect.signature(target).parameters:
            family = make.__qualname__, make.__module__, key
            if key in GIVEN or key not in hints or family in seen:
                continue  # torchvision's ten ResNets take the same arguments
            seen.add(family)
            yield from ({"name": name, key: value} for value in values(hints[key], numbers))


def make_backbone(spec: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = build_model(spec, "fcn", num_classes=3)
    if not spec["name"].startswith("regnet"):  # has its parameters on the CPU all the same
        with torch.device("meta"):
            model(torch.ones(2, spec.get("in_channels", 3), 64, 64))


def make_decoder(spec: dict[str, Any]) -> None:
    with torch.device("meta"):
        build_model("resnet18_half", spec, num_classes=3)(torch.ones(2, 3, 64, 64))


MAKERS: dict[str, tuple[Registry, Callable[[dict[str, Any]], object]]] = {
    "backbone": (BACKBONES, make_backbone),
    "decoder": (DECODERS, make_decoder),
    "loss": (LOSSES, lambda spec: build_loss(["cross_entropy", spec], num_classes=3)),
    "optimizer": (OPTIMIZERS, lambda spec: build_optimizer(nn.Linear(2, 2), spec, lr=0.1)),
    "schedule": (SCHEDULES, lambda spec: build_schedule(spec, total=100, warmup=5)),
    "operation": (
        OPERATIONS,
        lambda spec: Pipeline((spec,), size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3),
    ),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's, of empty tensors
@pytest.mark.parametrize("numbers", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", MAKERS)
def test_any_number_is_taken_or_refused(part: str, numbers: Numbers) -> None:
    registry, make = MAKERS[part]
    taken, sentences = 0, list[str]()
    for spec in components(registry, numbers):
        try:
            make(spec)
            taken += 1
        except SegkitError as error:
            sentences.append(str(error))
    assert taken > 0
    assert len(sentences) > 0
    assert not [sentence for sentence in sentences if "\n" in sentence or len(sentence) > 500]


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("optim.optimizer.weight_decay=-1", r"optim\.optimizer: .*weight_decay=-1"),
        ("model.decoder.aux_width=18446744073709551616", r"model\.decoder\.aux_width: expected an"),
        ("model.decoder.aux_width=4611686018427387904", r"model\.decoder: .*aux_width=46116860184"),
        ("model.decoder.width=-8", r"model\.decoder: .*width=-8 \("),
        (
            "model.backbone.in_channels=4",
            r"model\.backbone\.in_channels: is 4, but data\.train",
        ),
        ("model.decoder.width=0", r"model\.decoder: a size is 0"),
        ("model.decoder.bins=[1,0]", r"model\.decoder: bins: expected 1 to 1024, got 0"),
        ("train.epochs=18446744073709551616", r"train\.epochs: expected an integer of 64 bits"),
    ],
)
def test_training_refuses_it_before_anything_is_made(
    setting: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.json").write_text(
        '{"data": {"train": {"name": "demo", "root": "demo"}}, "model": {"decoder": "upernet"}}'
    )
    with pytest.raises(ConfigError, match=words) as caught:
        train.main(["--cfg", "tiny.json", "--set", setting])
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


def test_a_fault_of_segkits_own_is_not_told_as_the_configurations() -> None:
    def broken(*, width: int = 3) -> None:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        build({"broken": broken}, "broken", "model.decoder")
    with pytest.raises(ConfigError, match=r"model\.decoder: cannot be made with width=4 \(a fault"):
        build({"broken": broken}, {"name": "broken", "width": 4}, "model.decoder")


def test_bounds_name_the_argument() -> None:
    check_bounds(1, 3, sides=(1, 2, 3), side=1)
    with pytest.raises(ConfigError, match=r"sides: expected 1 to 3, got 4"):
        check_bounds(1, 3, side=1, sides=(1, 4))


def test_integers_have_64_bits() -> None:
    for value in (2**63, -(2**63) - 1, 10**400):
        with pytest.raises(ConfigError, match=r"train\.seed: expected an integer of 64 bits"):
            parse({"train": {"seed": value}})
        with pytest.raises(ConfigError, match=r"train\.seed: expected an integer of 64 bits"):
            override(config.Config(), [f"train.seed={value}"])
        with pytest.raises(ConfigError, match=r"x\.width: expected an integer of 64 bits"):
            bind(DECODERS, {"name": "fcn", "width": value}, "x", given=tuple(GIVEN))
