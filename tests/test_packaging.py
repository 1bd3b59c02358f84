"""The source distribution is complete, and builds the same wheel as the repository."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_SHIPPED = (".ci/", ".gitignore", ".pre-commit-config.yaml")

pytestmark = pytest.mark.slow
pytest.importorskip("setuptools", minversion="77")


def built(kind: str, source: Path) -> Path:
    """Build the ``sdist`` or ``wheel`` of a folder, and return its path."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=source, check=True, capture_output=True
    )
    (path,) = (source / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return path


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_sdist_is_complete_and_builds_the_same_wheel(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git repository")
    tracked = [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    clone = tmp_path / "clone"
    for name in tracked:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, clone / name, follow_symlinks=False)
    with tarfile.open(built("sdist", clone)) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    missing = [name for name in tracked if not (unpacked / name).exists()]
    assert [name for name in missing if not name.startswith(NOT_SHIPPED)] == []

    wheel = contents(built("wheel", unpacked))
    assert wheel == contents(built("wheel", clone))
    shipped = {name.removeprefix("segkit/") for name in wheel if name.startswith("segkit/configs/")}
    assert shipped == {name for name in tracked if name.startswith("configs/")}
    package = [name for name in tracked if name.startswith("segkit/") and (ROOT / name).is_file()]
    assert [name for name in package if name not in wheel] == []
