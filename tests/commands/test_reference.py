"""``--help`` and ``segkit list``: every key and argument, its default and meaning."""

import json
from pathlib import Path

import pytest

from segkit import infer, train
from segkit.__main__ import COMMANDS
from segkit.commands import reference
from segkit.core.config import Config, load, to_dict
from segkit.core.errors import ConfigError

ROOT = Path(__file__).parents[2]
DEFAULTS = {section: keys for section, keys in to_dict(Config()).items() if isinstance(keys, dict)}
COMPONENTS = [(kind, name) for kind, group in reference.KINDS.items() for name in group.registry]


def shown(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    reference.main(arguments)
    return capsys.readouterr().out


def help_of(main, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("main", [train.main, infer.main])
def test_help_has_every_key_within_80_columns(main, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(main, capsys, "--help")
    assert max(map(len, text.splitlines())) <= 80
    for section, keys in DEFAULTS.items():
        part = text[text.index(f"\n{section}: ") :]
        assert all(f"\n  {key} " in part for key in keys)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_fits_80_columns(command: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(COMMANDS[command][0], capsys, "--help")
    assert max(map(len, text.splitlines())) <= 80
    assert f"usage: segkit {command} " in text
    assert "--debug" in text
    assert "`" not in text


@pytest.mark.parametrize(("main", "option"), [(train.main, "--cfg"), (infer.main, "--images")])
def test_a_word_without_its_option_names_the_option(main, option: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["photos"])
    assert option in capsys.readouterr().err.splitlines()[-1].partition("; give ")[2]


@pytest.mark.parametrize("section", DEFAULTS)
def test_help_of_a_section_has_types_and_defaults(section: str, capsys) -> None:
    text = help_of(train.main, capsys, "--help", section)
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for key, default in DEFAULTS[section].items():
        assert f"{section}.{key}: " in words
        assert f"default {json.dumps(default)}" in words.partition(f"{section}.{key}: ")[2]


def test_help_of_a_section_has_ranges(capsys) -> None:
    text = help_of(train.main, capsys, "--help", "data")
    assert "  data.pseudo_weight: a number, 0 to 1, default 1.0\n" in text
    assert "  data.cache_gb: a number, 0 or more, default 4.0\n" in text


def test_help_of_an_unknown_section_names_the_nearest(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(["--help", "trian"])
    assert ended.value.code == 2
    assert "unknown section 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_list_names_every_kind(capsys) -> None:
    for kind in json.loads(shown(capsys, "--json")):
        assert kind in shown(capsys)
        text = shown(capsys, kind)
        assert max(map(len, text.splitlines())) <= 80
        for name in json.loads(shown(capsys, kind, "--json")):
            assert f"\n  {name}" in f"\n{text}"


def test_list_shows_a_component(capsys) -> None:
    text = shown(capsys, "losses", "tversky")
    assert "https://arxiv.org/abs/1706.05721" in text
    assert "  alpha: a number, default 0.3\n      Coefficient of false positives.\n" in text
    assert "  weight: a number, default 1.0\n" in text
    assert "; null for a quarter" in shown(capsys, "decoders", "fcn")
    assert "Must be 32" in shown(capsys, "backbones", "convnext_tiny")
    assert "Must be 32" not in shown(capsys, "backbones", "resnet50")
    assert "num_classes" not in shown(capsys, "decoders", "upernet")
    assert shown(capsys, "configs", "swin").split() == load("swin").note.split()


def test_list_as_json_has_values(capsys) -> None:
    settings = {
        each["name"]: each for each in json.loads(shown(capsys, "sources", "coco", "--json"))
    }
    assert settings["crowd"]["default"] == "ignore"
    assert settings["images"]["default"] is None
    assert "default" not in settings["annotations"]
    flip = json.loads(shown(capsys, "augmentations", "hflip", "--json"))
    assert [each["default"] for each in flip if each["name"] == "p"] == [0.5]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["loses"], "unknown kind 'loses'; did you mean 'losses'?"),
        (["losses", "dise"], "losses: unknown 'dise'; did you mean 'dice'?"),
    ],
)
def test_list_names_the_nearest(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reference.main(arguments)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(("kind", "name"), COMPONENTS)
def test_every_argument_is_documented(kind: str, name: str) -> None:
    for setting in reference.settings_of(kind, name):
        assert setting.help, f"{kind} {name}: {setting.name} has no line in an Args section"
    text = reference.component_text(kind, name)
    assert max(map(len, text.splitlines())) <= 80
    assert not set("`") & set(text)


def test_the_documentation_is_up_to_date() -> None:
    command = "segkit list --markdown > docs/configuration.md"
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == reference.page(), f"run: {command}"
    assert command in written
