"""Errors in one sentence: with a reason, the right file, and of bounded length."""

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from segkit.commands import console
from segkit.core import config
from segkit.core.config import parse
from segkit.core.errors import SegkitError, closest
from segkit.core.files import atomic_write
from segkit.core.run import Run
from segkit.data.photos import PhotoSource
from segkit.inference.results import Results
from segkit.inference.tta import parse_views
from segkit.models.decoders import DECODERS
from segkit.training import preparation

LONG = "a long name " * 500


@pytest.mark.parametrize("name", ["a" * 6000, LONG])
def test_a_long_name_is_quoted_shortened(name: str) -> None:
    refusals: list[Any] = [
        lambda: config.load(name),
        lambda: parse({name: 1}),
        lambda: parse({"data": {name: 1}}),
        lambda: config.override(config.Config(), [name]),
        lambda: config.override(config.Config(), [f"{name}=1"]),
        lambda: config.override(config.Config(), [f"data.{name}=1"]),
        lambda: config.bind(DECODERS, {"name": name}, "model.decoder"),
        lambda: config.bind(DECODERS, {"name": "fcn", name: 1}, "model.decoder"),
        lambda: Run.open(name),
        lambda: parse_views([name]),
        lambda: preparation.chosen_folds(name, 5),
    ]
    for refuse in refusals:
        with pytest.raises(SegkitError) as caught:
            refuse()
        assert len(str(caught.value)) < 1000, str(caught.value)


def test_of_many_valid_names_200_are_listed() -> None:
    options = [f"run{number:05d}" for number in range(5000)]
    assert closest("x", options).endswith("run00199, and 4800 more")


def test_an_error_without_a_number_has_its_reason_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(_: list[str]) -> None:
        with atomic_write(tmp_path / "image"):
            raise OSError("72 requested and 0 written")  # of NumPy on a full disk

    said: list[Any] = []
    monkeypatch.setattr("sys.argv", ["command"])
    monkeypatch.setattr(console, "end", lambda *words: said.append(words) or sys.exit(1))
    with pytest.raises(SystemExit):
        console.run(main)
    assert said == [(f"{tmp_path / 'image'}: 72 requested and 0 written", 1)]


def test_a_truncated_mask_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    results = Results(
        tmp_path / "out", PhotoSource(paths=(str(tmp_path / "a.png"),)), classes=["ground"],
        outputs=("csv",),
    )  # fmt: skip
    mask = tmp_path / "out/masks/a.png"
    mask.parent.mkdir(parents=True)
    mask.write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(SegkitError, match=r"masks/a\.png cannot be decoded"):
        results.finish([0], category_ids=None)
