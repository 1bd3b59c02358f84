"""The programs of the README and of docs/ run as they stand, and pass mypy --strict."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from PIL import Image

import segkit
from segkit.core import config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"^<!-- test: program -->\n```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
DEMO = re.compile(r"^<!-- ci: demo -->\n```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
PROGRAMS = {page: programs for page in PAGES if (programs := PROGRAM.findall(page.read_text()))}


@pytest.fixture(autouse=True)
def _photograph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A photograph in the current folder; what programs register is removed afterwards."""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((97, 65), 80).convert("RGB").save("photo.jpg")
    with patch.dict(segkit.DECODERS), patch.dict(segkit.BACKBONES), patch.dict(segkit.LOSSES):
        yield


def test_the_pages_have_programs() -> None:
    assert {"README.md", "extending.md", "library.md"} <= {page.name for page in PROGRAMS}


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.name)
def test_the_programs_run(page: Path) -> None:
    for number, program in enumerate(PROGRAMS[page]):
        exec(compile(program, f"{page.name}, program {number}", "exec"), {})
    for written in Path().glob("overlay.png"):
        with Image.open(written) as image:
            assert image.width >= 97
            assert image.height >= 65


def test_the_readmes_program_is_short() -> None:
    (program,) = PROGRAMS[ROOT / "README.md"]
    assert len(program.strip().splitlines()) <= 25
    assert "overlay.png" in program


def test_the_demos_folds_start_from_its_first_model() -> None:
    (block,) = DEMO.findall((ROOT / "README.md").read_text())
    (folder,) = re.findall(r"--cfg demo --folds 0 --run-dir (\S+)", block)
    start, folds = config.load("demo"), config.load("demo_soup")
    assert "--cfg demo_soup" in block
    assert folds.model.weights == f"{folder}/fold0/best.pt"
    first, second = start.data.train, folds.data.train
    assert first is not None
    assert second is not None
    assert first["root"] != second["root"]
    assert first.get("seed", 0) != second["seed"]


@pytest.mark.slow
def test_the_demos_soup_is_better_than_its_best_fold() -> None:
    """Reads the scores of the README's commands, which .ci/run runs before the slow tests.

    The best fold is the one with the highest score on the selection set, as a user would choose it.
    """
    written = sorted((ROOT / "runs").glob("demo_soup-*/infer/scores.json"))
    if not written:
        pytest.skip("the README's demo was not run in this clone")
    rows = {row["name"]: row for row in json.loads(written[-1].read_text())}
    folds = [row for name, row in rows.items() if re.fullmatch(r"fold\d+", name)]
    assert len(folds) == 4
    best = max(folds, key=lambda row: row["selection"]["miou"])
    for part in ("selection", "test"):
        assert rows["greedy soup"][part]["miou"] > best[part]["miou"]


@pytest.mark.slow
def test_the_programs_pass_mypy_strict(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    files = []
    for page, programs in PROGRAMS.items():
        for number, program in enumerate(programs):
            files.append(tmp_path / f"{page.stem.lower()}_{number}.py")
            files[-1].write_text(program)
    options = ["--strict", "--follow-imports=silent", "--ignore-missing-imports"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *map(str, files)],
        env={"MYPYPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
