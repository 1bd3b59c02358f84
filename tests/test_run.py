"""A run's folder: which one is picked."""

import json
import os
from pathlib import Path

import pytest

from segkit.run import newest


def add_run(name: str, started: float) -> Path:
    """A folder in ``runs/`` whose configuration was written at a given time."""
    folder = Path("runs", name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({}))
    os.utime(folder / "config.json", (started, started))
    return folder


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_newest_run_of_a_name_is_of_that_name_alone() -> None:
    own = add_run("one-20260101-000000", 1)
    for started, name in enumerate(
        ["one-small-20260101-000000", "one-2-20260101-000000", "one-mine"], 2
    ):
        add_run(name, started)
    assert newest("one") == own
    assert newest("o") is None
    assert newest() == Path("runs/one-mine")


def test_brackets_in_a_name_are_no_pattern() -> None:
    add_run("a-20260101-000000", 2)
    own = add_run("[ab]-20260101-000000", 1)
    assert newest("[ab]") == own
    assert newest("?") is None
