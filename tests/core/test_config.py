"""The configuration: every bad input is refused in one sentence that names the key."""

import argparse
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.run import get_args_parser

import segkit.infer
import segkit.train
from segkit.core.config import Config, bind, build, load, override, parse, to_dict
from segkit.core.errors import ConfigError

ROOT = Path(__file__).parents[2]


class Toy:
    def __init__(
        self,
        *,
        width: int,
        rate: float = 0.5,
        mode: Literal["soft", "hard"] = "soft",
        stride: Literal[8, 16] = 8,
        sizes: tuple[int, ...] = (),
        pair: tuple[float, float] | None = None,
        inner: Mapping[str, Any] | None = None,
        channels: tuple[int, ...] = (),
    ) -> None:
        if width < 0:
            raise ConfigError(f"width: expected 0 or more, got {width}")
        self.width, self.rate, self.sizes = width, rate, sizes


TOYS = {"toy": Toy}


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "some.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_resolved_form_reads_back_equal() -> None:
    changed = override(
        Config(), ["train.epochs=3", "augment.size=[64,96]", "model.backbone=swin_t"]
    )
    assert changed.train.epochs == 3
    assert changed.augment.size == (64, 96)
    assert changed.model.backbone == {"name": "swin_t"}
    assert parse(to_dict(changed)) == changed


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Config().train.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"trian": {}}, ["trian", "unknown key", "'train'"]),
        ({"train": {"epoch": 3}}, ["train.epoch", "'epochs'"]),
        ({"train": 3}, ["train", "an object", "3"]),
        ({"train": {"epochs": "3"}}, ["train.epochs", "an integer", '"3"']),
        ({"train": {"epochs": True}}, ["train.epochs", "an integer", "true"]),
        ({"train": {"epochs": 3.0}}, ["train.epochs", "an integer", "3.0"]),
        ({"train": {"epochs": 0}}, ["train.epochs", "at least 1", "0"]),
        ({"train": {"epochs": None}}, ["train.epochs", "an integer", "null"]),
        ({"train": {"compile": 1}}, ["train.compile", "true or false", "1"]),
        ({"train": {"ema": True}}, ["train.ema", "a number or null", "true"]),
        ({"train": {"ema": 1.5}}, ["train.ema", "0 to 1"]),
        ({"train": {"amp": "bf61"}}, ["train.amp", "'bf16'", "bf61"]),
        ({"optim": {"lr": "1e-3"}}, ["optim.lr", "a number"]),
        ({"optim": {"lr": 10**400}}, ["optim.lr", "finite"]),
        ({"augment": {"size": [64, 64, 3]}}, ["augment.size", "a list of 2", "3 values"]),
        ({"data": {"mean": [1, 2, "3"]}}, ["data.mean[2]", "a number"]),
        ({"augment": {"train": {"name": "hflip"}}}, ["augment.train", "a list"]),
        ({"augment": {"train": [3]}}, ["augment.train[0]", "an object", "3"]),
        ({"model": {"weights": 3}}, ["model.weights", "a string or null"]),
        ({"note": ["x"]}, ["note", "a string", "a list of 1"]),
    ],
)
def test_bad_values_are_named(raw: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(raw, "some.json")
    for word in ["some.json", *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"\xff\xfe{}", "UTF-8 .* segkit plan FOLDER writes"),
        (b"{", "not valid JSON"),
        (b"[1]", "a JSON object"),
        (b'{"note": "a", "note": "b"}', "duplicated"),
        (b'{"optim": {"lr": NaN}}', "NaN"),
        (b'{"optim": {"lr": Infinity}}', "Infinity"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, word: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=word) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"tr\n\033[31main": {}}, "some.json")
    assert str(caught.value).startswith(r"some.json: tr\n\x1b[31main: unknown key")


def test_missing_file_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "swan.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert load("swan") == load("swan.json") == Config()
    with pytest.raises(ConfigError, match="'swann'; did you mean 'swan'"):
        load("swann")


def test_a_folder_is_not_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; expected a configuration"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.epochs", ["expected section.key=value"]),
        ("=3", ["expected section.key=value"]),
        ("train..epochs=3", ["expected section.key=value"]),
        ("trian.epochs=3", ["'trian'", "'train'"]),
        ("train.epoch=3", ["train.epoch", "'epochs'"]),
        ("train.epochs=many", ["train.epochs", "an integer", "many"]),
        ("train.epochs.x=3", ["train.epochs", "holds 50"]),
        ("loss.terms.1.weight=3", ["loss.terms", "1 items"]),
        ("loss.terms.x.weight=3", ["loss.terms", "'x'"]),
    ],
)
def test_bad_overrides_are_named(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        override(Config(), [text])
    for word in ["override", *words]:
        assert word in str(caught.value)


def test_overrides_reach_into_components() -> None:
    changed = override(
        Config(), ["optim.optimizer.weight_decay=0.2", "loss.terms.0.label_smoothing=0.1"]
    )
    assert changed.optim.optimizer == {"name": "adamw", "weight_decay": 0.2}
    assert changed.loss.terms == ({"name": "cross_entropy", "label_smoothing": 0.1},)


def test_later_overrides_win() -> None:
    assert override(Config(), ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_bind_converts_by_annotation() -> None:
    toy = bind(TOYS, {"name": "toy", "width": 3, "rate": 1, "sizes": [1, 2]}, "model.toy")()
    assert (toy.width, toy.rate, toy.sizes) == (3, 1.0, (1, 2))
    assert isinstance(toy.rate, float)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({}, ["model.toy.name", "missing", "toy"]),
        ({"name": 3}, ["model.toy.name"]),
        ({"name": "toi"}, ["model.toy.name", "'toi'", "'toy'"]),
        ({"name": "toy"}, ["model.toy.width", "missing", "an integer"]),
        ({"name": "toy", "width": 1, "with": 2}, ["model.toy.with", "'width'"]),
        ({"name": "toy", "width": True}, ["model.toy.width", "an integer", "true"]),
        ({"name": "toy", "width": 1, "mode": "softt"}, ["model.toy.mode", "'soft'", "softt"]),
        ({"name": "toy", "width": 1, "stride": "8"}, ["model.toy.stride", "one of 8, 16", '"8"']),
        ({"name": "toy", "width": 1, "stride": 8.0}, ["model.toy.stride", "one of 8, 16", "8.0"]),
        ({"name": "toy", "width": 1, "pair": [1]}, ["model.toy.pair", "2", "1 values"]),
        ({"name": "toy", "width": 1, "pair": [1, None]}, ["model.toy.pair[1]", "null"]),
        ({"name": "toy", "width": 1, "inner": 3}, ["model.toy.inner", "an object or null"]),
        ({"name": "toy", "width": 1, "channels": [3]}, ["model.toy.channels", "no such"]),
    ],
)
def test_bind_names_what_is_wrong(spec: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        bind(TOYS, spec, "model.toy", given=("channels",))
    for word in words:
        assert word in str(caught.value)


def test_build_tells_where_a_constructor_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model\.toy: width: expected 0 or more, got -1$"):
        build(TOYS, {"name": "toy", "width": -1}, "model.toy")


@pytest.mark.parametrize("command", [segkit.train, segkit.infer])
def test_torchrun_leaves_our_options_alone(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torchrun parses abbreviations of its own options, even after the script's name.
    parsers: list[argparse.ArgumentParser] = []

    def parse_args(parser: argparse.ArgumentParser, argv: list[str]) -> None:
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(SystemExit):
        command.parse_arguments([])
    ours = [text for action in parsers[0]._actions for text in action.option_strings]
    theirs = [text for action in get_args_parser()._actions for text in action.option_strings]
    assert "--run-dir" in ours
    for option in {*ours} - {"-h", "--help"}:
        assert not [text for text in theirs if text.startswith(option)], option


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_configurations_hold_only_what_differs(path: Path) -> None:
    raw = json.loads(path.read_text())
    assert raw["note"]
    base = to_dict(load(raw["base"]) if "base" in raw else Config())
    raw.pop("model", None)  # the model is written in full
    for section, values in raw.items():
        for key, value in values.items() if isinstance(values, dict) else []:
            assert value != base[section][key], f"{section}.{key} is the default"


def chain(folder: Path, **files: Any) -> Path:
    """Write each file, and return the path of the first."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / f"{next(iter(files))}.json"


def test_a_configuration_builds_on_another(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    path = chain(
        tmp_path,
        top={
            "base": "below/middle.json",
            "optim": {"lr": 0.1, "optimizer": {"weight_decay": 0.0}},
            "model": {"backbone": {"name": "swin_b"}, "decoder": "upernet"},
            "loss": {"terms": ["dice"]},
        },
    )
    chain(
        tmp_path / "below",
        middle={"base": "bottom", "train": {"epochs": 7}, "optim": {"lr": 0.2}},
        bottom={
            "train": {"epochs": 5, "seed": 3},
            "optim": {"lr": 0.3, "optimizer": {"name": "sgd", "weight_decay": 0.5}},
            "model": {
                "backbone": {"name": "swin_l", "window": 12},
                "decoder": {"name": "upernet", "width": 8},
            },
            "loss": {"terms": ["focal", "jaccard"]},
        },
    )
    cfg = load(path, ["train.seed=4"])
    assert (cfg.train.epochs, cfg.train.seed, cfg.optim.lr) == (7, 4, 0.1)
    assert cfg.optim.optimizer == {"name": "sgd", "weight_decay": 0.0}
    assert cfg.model.backbone == {"name": "swin_b"}  # another component replaces the base's
    assert cfg.model.decoder == {"name": "upernet", "width": 8}
    assert cfg.loss.terms == ({"name": "dice"},)
    assert "base" not in to_dict(cfg)
    assert parse(to_dict(cfg)) == cfg


def test_a_base_can_be_a_shipped_configuration(tmp_path: Path) -> None:
    cfg = load(chain(tmp_path, mine={"base": "swin", "train": {"epochs": 3}}))
    assert cfg == override(load("swin"), ["train.epochs=3"])


def test_a_base_beside_the_file_comes_before_a_shipped_one(tmp_path: Path) -> None:
    path = chain(tmp_path, mine={"base": "swin"}, swin={"train": {"epochs": 3}})
    assert load(path) == override(Config(), ["train.epochs=3"])


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a": {"base": "a"}}, ["a.json: base: 'a' is a cycle", "a.json → "]),
        (
            {"a": {"base": "b"}, "b": {"base": "c"}, "c": {"base": "b.json"}},
            ["c.json: base: 'b.json' is a cycle", "a.json → ", "b.json → ", "c.json → "],
        ),
        (
            {"a": {"base": "b"}, "b": {"base": "swim"}},
            ["b.json: base: no configuration file 'swim'", "a.json → ", "did you mean 'swin'?"],
        ),
        ({"a": {"base": 3}}, ["a.json: base: expected a string, got 3"]),
        ({"a": {"base": "b"}, "b": {"train": {"epoch": 3}}}, ["b.json: train.epoch: unknown key"]),
        ({"a": {"base": "b"}, "b": {"train": 3}}, ["b.json: train: expected an object, got 3"]),
    ],
)
def test_a_bad_base_is_one_sentence(tmp_path: Path, files: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(chain(tmp_path, **files))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=9,
)
KEYS = [
    f"{section}.{key}"
    for section, keys in to_dict(Config()).items()
    for key in (keys if isinstance(keys, dict) else ())
]


@given(st.sampled_from(KEYS), VALUES)
@hypothesis.settings(max_examples=500, deadline=None)
def test_any_value_anywhere_is_taken_or_refused(key: str, value: Any) -> None:
    section, name = key.split(".")
    raw = to_dict(Config())
    raw[section][name] = value
    with suppress(ConfigError):
        parse(raw, "some.json")


@given(
    st.text(max_size=40) | st.sampled_from(KEYS).map(lambda key: f"{key}="), st.text(max_size=20)
)
@hypothesis.settings(max_examples=500, deadline=None)
def test_any_override_is_taken_or_refused(start: str, end: str) -> None:
    with suppress(ConfigError):
        override(Config(), [start + end])


@pytest.mark.slow
def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    """5,000 configurations with bytes changed."""
    whole = (ROOT / "configs" / "swin.json").read_bytes()
    rng = np.random.default_rng(0)
    read, sentences = 0, list[str]()
    for _ in range(5_000):
        mutated = bytearray(whole)
        for at in rng.integers(0, len(whole), rng.integers(1, 4)):
            mutated[at] = rng.integers(32, 127) if rng.random() < 0.8 else rng.integers(256)
        try:
            load(write(tmp_path, bytes(mutated)))
            read += 1
        except ConfigError as error:
            sentences.append(str(error))
    assert read > 0
    assert len(sentences) > 0
    assert not [sentence for sentence in sentences if "\n" in sentence]
