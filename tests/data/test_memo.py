"""The memo saves digests between starts: no file is read twice, and no stale value is used."""

import functools
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ranks import run_ranks
from test_cache import write_set

from segkit.core import config
from segkit.core.config import Config
from segkit.core.run import Run
from segkit.data import CocoSource, MaskSource, memo, open_source
from segkit.data.folds import Split
from segkit.data.loader import digests
from segkit.data.memo import MEMO, Memo
from segkit.data.source import Source
from segkit.training.preparation import TrainData, check_data, split_data

IMAGES = 5


def write_masks(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for part, shape in (("images", (30, 41, 3)), ("masks", (30, 41))):
        (folder / part).mkdir()
        for i in range(IMAGES):
            pixels = rng.integers(0, 2, shape, np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{i}.png")


def configured(folder: Path, **settings: object) -> Config:
    if (folder / "set.json").exists():
        spec = {"name": "coco", "annotations": str(folder / "set.json")}
    else:
        paths = {part: str(folder / part) for part in ("images", "masks")}
        spec = {"name": "masks", "classes": ["ground", "can"], **paths}
    settings = {"train": spec, "cache": str(folder / "cache"), "folds": 2, **settings}
    return config.override(Config(), [f"data.{k}={json.dumps(v)}" for k, v in settings.items()])


def start(cfg: Config, run: Path) -> Source:
    """Do the same as train.py before its first fold in a new process."""
    MEMO.__init__()  # type: ignore[misc]
    run.mkdir()
    with MEMO.kept_in(Path(cfg.data.cache)):
        source = open_source(cfg, "train")
        _, files = split_data(cfg, source, source, Run(run), lambda _: None)
        files |= check_data(Run(run), TrainData(source, source, Split(**files["folds.json"])))
    (run / "files.json").write_text(json.dumps(files))
    return source


@pytest.mark.parametrize("write", [write_set, write_masks])
@pytest.mark.parametrize(("cache_gb", "on_error"), [(0, "raise"), (1, "raise"), (0, "skip")])
def test_a_second_start_reads_no_image_and_no_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write, cache_gb: int, on_error: str
) -> None:
    write(tmp_path)
    cfg = configured(tmp_path, cache_gb=cache_gb)
    cfg = config.override(cfg, [f"data.train.on_error={on_error}"])
    first = digests(start(cfg, tmp_path / "one"), range(IMAGES))
    monkeypatch.setattr(memo, "read_digest", lambda path, _: pytest.fail(f"{path} is read"))
    for kind in (CocoSource, MaskSource):
        for name in ("image", "mask"):
            monkeypatch.setattr(kind, name, lambda *_: pytest.fail("an image or mask is decoded"))
    assert digests(start(cfg, tmp_path / "two"), range(IMAGES)) == first
    assert (tmp_path / "one/files.json").read_text() == (tmp_path / "two/files.json").read_text()


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    for content in (b"one", b"two"):
        path.write_bytes(content)
        changed = os.stat(path).st_mtime_ns + content[0]  # in the same tick of the clock, maybe
        os.utime(path, ns=(changed, changed))
        assert MEMO.digest(path) == hashlib.sha256(content).hexdigest()
    assert MEMO.digest(path, b"0") == hashlib.sha256(b"0two").hexdigest()


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "[" * 100_000, "\0", '{"format": 2}', '{"format": 1}',
        '{"format": 1, "files": [], "numbers": 3}',
        '{"format": 1, "files": {"PATH": 3}, "numbers": {"a": 3}}',
        '{"format": 1, "files": {"PATH": [SIZE, CHANGED, 7]}}',
        '{"format": 1, "files": {"PATH": [true, CHANGED, "0"]}, "numbers": {"a": [-1, 1e9, "1"]}}',
    ],
)  # fmt: skip
def test_a_damaged_memo_is_replaced(tmp_path: Path, content: str) -> None:
    write_set(tmp_path)
    path = tmp_path / "0.jpg"
    about = path.stat()
    for word, value in (("PATH", path), ("SIZE", about.st_size), ("CHANGED", about.st_mtime_ns)):
        content = content.replace(word, str(value))
    cfg = configured(tmp_path, cache_gb=0)
    file = tmp_path / "cache/memo.json"
    file.parent.mkdir()
    file.write_text(content)
    for _ in range(2):
        MEMO.__init__()  # type: ignore[misc]
        wanted = hashlib.sha256(path.read_bytes()).hexdigest()
        assert digests(open_source(cfg, "train"), [0]) == [wanted[:16]]
    assert json.loads(file.read_text())["files"][str(path)][2] == wanted


def test_numbers_that_are_no_counts_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "memo.json"
    numbers = {"a": [1, 2], "b": [2**70], "c": [-1]}
    path.write_text(json.dumps({"format": 1, "files": {}, "numbers": numbers}))
    memo = Memo()
    memo._load(path)
    assert memo._numbers == {"a": [1, 2]}


def test_a_folder_that_cannot_be_written_gives_one_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    write_set(tmp_path)
    (tmp_path / "file").write_text("")
    cfg = configured(tmp_path, cache_gb=0, cache=str(tmp_path / "file" / "cache"))
    assert len(digests(start(cfg, tmp_path / "run"), range(IMAGES))) == IMAGES
    [warning] = [str(warning.message) for warning in recwarn if warning.category is UserWarning]
    assert "cache/memo.json: cannot be written (Not a directory)" in warning


def test_two_processes_merge_their_entries_and_the_oldest_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, third = memo.Memo(), memo.Memo(), memo.Memo()
    with ours.kept_in(tmp_path), theirs.kept_in(tmp_path):
        ours.keep("a", [1])
        theirs.keep("b", [2])
    with third.kept_in(tmp_path):
        assert (third.numbers("a"), third.numbers("b")) == ([1], [2])
        monkeypatch.setattr(memo, "MAX_ENTRIES", 2)
        third.keep("c", [3])
    assert len(json.loads((tmp_path / "memo.json").read_text())["numbers"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["memo.json"]


def noting(touched: list[str], owner: Any, name: str) -> None:
    """Record each call of a function or method, with its last argument."""
    whole = getattr(owner, name)

    @functools.wraps(whole)
    def noted(*args: Any, **options: Any) -> Any:
        touched.append(f"{name} {args[-1]}" if name != "__init__" else name)
        return whole(*args, **options)

    setattr(owner, name, noted)


def reads(folder: Path) -> tuple[list[str], list[str]]:
    """Return the reads of a start on this rank, and the digests of the images."""
    touched: list[str] = []
    for name in ("__init__", "image", "mask"):
        noting(touched, CocoSource, name)
    noting(touched, memo, "read_digest")
    source = open_source(configured(folder, cache_gb=1), "train")
    return touched, digests(source, range(len(source)))


def test_rank_0_alone_reads_the_data(tmp_path: Path) -> None:
    write_set(tmp_path)
    (read, ours), (others_read, theirs) = run_ranks(reads, 2, tmp_path)
    assert read[0] == "__init__"
    wanted = [f"{name} {i}" for name in ("image", "mask") for i in range(IMAGES)]
    assert [name for name in sorted(read) if name.startswith(("image", "mask"))] == wanted
    assert sum(name.startswith("read_digest") for name in read) == IMAGES
    assert len(read) == 1 + 3 * IMAGES
    assert others_read == []
    assert ours == theirs


def test_the_start_of_a_training_names_equal_files_of_two_parts(tmp_path: Path) -> None:
    for part in ("one", "two"):
        (tmp_path / part).mkdir()
        write_masks(tmp_path / part)
    shutil.copy(tmp_path / "one/images/0.png", tmp_path / "one/images/1.png")
    Image.new("RGB", (41, 30)).save(tmp_path / "two/images/4.png")
    source, validation = (
        open_source(configured(tmp_path / part), "train") for part in ("one", "two")
    )
    said: list[str] = []
    run = Run(tmp_path / "run")
    split_data(configured(tmp_path / "one"), source, validation, run, said.append)
    (sentence,) = (line for line in said if "equal files" in line)
    assert "warning: 3 images of one part are equal files in another" in sentence
    assert "0.png of data.val and 0.png of data.train: scores are too high" in sentence
    split_data(configured(tmp_path / "one"), validation, validation, run, said.append)
    assert sum("equal files" in line for line in said) == 1
    for i in range(1, IMAGES):
        shutil.copy(tmp_path / "two/images/0.png", tmp_path / f"two/images/{i}.png")
    validation = open_source(configured(tmp_path / "two"), "train")
    split_data(configured(tmp_path / "two"), validation, validation, run, said.append)
    assert ".png of fold 1 and " in said[-1]
