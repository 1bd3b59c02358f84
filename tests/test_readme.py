"""The README's program runs as it stands there."""

import re
from pathlib import Path

import pytest
from PIL import Image

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(r"<!-- test: program -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found
    program = found[1]
    assert len(program.strip().splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "README.md", "exec"), {})
    with Image.open(tmp_path / "overlay.png") as image:
        assert image.width >= 97
        assert image.height >= 65
