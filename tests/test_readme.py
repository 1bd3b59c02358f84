"""The programs of the README and of docs/ run as they stand, and pass mypy --strict."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from PIL import Image

import segkit

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"^<!-- test: program -->\n```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
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
