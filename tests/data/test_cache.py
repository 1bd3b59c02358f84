"""The cache returns equal bytes, writes its files atomically, and keeps its limit."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segkit.core import config
from segkit.core.errors import DataError
from segkit.data import CocoSource, MaskSource, open_source
from segkit.data.cache import CachedSource
from segkit.data.source import Source

SIZE = (30, 41)
BYTES = 8 + 4 * SIZE[0] * SIZE[1]
PLENTY = 1e9


def write_set(folder: Path, images: int = 5) -> None:
    """Write images of noise, each with one polygon."""
    rng = np.random.default_rng(0)
    records, annotations = [], []
    for i in range(images):
        pixels = rng.integers(0, 256, (*SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
        records.append({"id": i, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]})
        annotations.append(
            {"id": i, "image_id": i, "category_id": 1, "iscrowd": 0, "area": 100.0 + i,
             "bbox": [2, 3, 10, 10], "segmentation": [[2, 3, 12 + i, 3, 12, 13, 2, 13]]}
        )  # fmt: skip
    write_labels(folder, records, annotations)


def write_labels(folder: Path, images: list[dict], annotations: list[dict]) -> None:
    categories = [{"id": 1, "name": "can"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "set.json").write_text(json.dumps(content))


def source(folder: Path) -> CocoSource:
    return CocoSource(annotations=str(folder / "set.json"))


def cached(folder: Path, limit: float = PLENTY) -> CachedSource:
    return CachedSource(source(folder), folder / "cache", limit=limit)


def files(folder: Path) -> list[Path]:
    paths = (folder / "cache").rglob("*")
    return sorted(file for file in paths if file.is_file() and file.name != "memo.json")


def assert_equal(actual: Source, other: Source) -> None:
    assert actual.names == other.names
    assert actual.classes == other.classes
    for i in range(len(other)):
        assert actual.size(i) == other.size(i)
        assert torch.equal(actual.image(i), other.image(i))
        assert torch.equal(actual.mask(i), other.mask(i))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path)
    return tmp_path


def test_the_same_bytes_in_the_same_layout(folder: Path) -> None:
    for _ in range(2):
        kept = cached(folder)
        assert_equal(kept, source(folder))
        assert kept.category_ids == source(folder).category_ids
        assert kept.image(0).stride() == source(folder).image(0).stride()
    assert [file.stat().st_size for file in files(folder)] == [BYTES] * 5


def test_nothing_is_decoded_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(folder)
    for name in ("image", "mask"):
        monkeypatch.setattr(CocoSource, name, lambda *_: pytest.fail("read from the source"))
    kept = pickle.loads(pickle.dumps(cached(folder)))
    assert [int(kept.mask(i).max()) for i in range(5)] == [1] * 5
    assert kept.image(4).shape == (3, *SIZE)


def test_masks_in_png_are_cached_and_known_by_their_content(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    mask = np.arange(6, dtype=np.uint8).reshape(2, 3) % 2
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "images/a.png")

    def opened() -> CachedSource:
        plain = MaskSource(
            images=str(tmp_path / "images"), masks=str(tmp_path / "masks"), classes=("a", "b")
        )
        return CachedSource(plain, tmp_path / "cache", limit=PLENTY)

    for labels in (mask, 1 - mask):
        Image.fromarray(labels).save(tmp_path / "masks/a.png")
        assert np.array_equal(opened().mask(0).numpy(), labels)


def test_a_changed_image_or_annotation_is_read_anew(folder: Path) -> None:
    cached(folder)
    content = json.loads((folder / "set.json").read_text())
    changed = {"segmentation": [[0, 0, 40, 0, 40, 29, 0, 29]], "area": 1160, "bbox": [0, 0, 40, 29]}
    content["annotations"][2] |= changed
    write_labels(folder, content["images"], content["annotations"])
    assert_equal(cached(folder), source(folder))
    assert len(files(folder)) == 6
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(folder / "copy.png")
    content["images"][1]["file_name"] = "copy.png"
    write_labels(folder, content["images"], content["annotations"])
    assert_equal(cached(folder), source(folder))
    assert len(files(folder)) == 7


def test_what_does_not_fit_is_decoded_and_told(folder: Path) -> None:
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"3 of 5 images.*data\.cache_gb"):
            part = cached(folder, limit=2.5 * BYTES)
        assert len(files(folder)) == 2
        assert_equal(part, source(folder))
    assert_equal(cached(folder), source(folder))
    assert len(files(folder)) == 5


def test_writing_into_an_image_leaves_the_cache_alone(folder: Path) -> None:
    kept = cached(folder)
    kept.image(0).fill_(7)
    kept.mask(0).fill_(7)
    assert_equal(kept, source(folder))


def test_a_broken_image_is_one_sentence_and_leaves_no_file(folder: Path) -> None:
    (folder / "3.jpg").write_bytes((folder / "3.jpg").read_bytes()[:200])
    with pytest.raises(DataError, match=r"3\.jpg"):
        cached(folder)
    assert all(file.stat().st_size == BYTES for file in files(folder))


def test_a_missing_image_is_one_sentence(folder: Path) -> None:
    (folder / "3.jpg").unlink()
    with pytest.raises(DataError, match=r"3\.jpg cannot be read"):
        cached(folder)


def fill(folder: Path, results: "multiprocessing.Queue[int]") -> None:
    kept = cached(folder)
    results.put(int(sum(int(kept.image(i).sum()) for i in range(len(kept)))))


def test_two_processes_fill_one_folder(tmp_path: Path) -> None:
    write_set(tmp_path, images=12)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    pair = [context.Process(target=fill, args=(tmp_path, results)) for _ in range(2)]
    for process in pair:
        process.start()
    sums = [results.get(timeout=120) for _ in pair]
    for process in pair:
        process.join()
        assert process.exitcode == 0
    plain = source(tmp_path)
    assert sums == [sum(int(plain.image(i).sum()) for i in range(12))] * 2
    assert [file.stat().st_size for file in files(tmp_path)] == [BYTES] * 12


def test_files_of_others_are_neither_deleted_nor_counted(folder: Path) -> None:
    names = ["project/.env", "ab/.gitignore", "ab/.note.writing", "ab/large.bin", ".hidden"]
    for name in names:
        path = folder / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(BYTES))
        os.utime(path, (0, time.time() - 7200))
    assert_equal(cached(folder, limit=5 * BYTES), source(folder))  # a warning is an error
    assert all((folder / "cache" / name).exists() for name in names)
    assert len(files(folder)) == 5 + len(names)


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process by a signal")
def test_a_kill_half_way_leaves_whole_files(folder: Path) -> None:
    """The process is killed while it writes the third file."""
    script = (
        "import os, signal, sys; from pathlib import Path; import numpy as np\n"
        "from test_cache import cached\n"
        "from segkit.data import cache\n"
        "count, mask = 0, cache.CachedSource._make\n"
        "def make(self, i):\n"
        "    global count; count += 1\n"
        "    if count < 3: return mask(self, i)\n"
        "    with cache.atomic_write(self._folder / self._keys[i], shared=True) as draft:\n"
        "        draft.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache.CachedSource._make = make; os.cpu_count = lambda: 1\n"
        f"cached(Path({str(folder)!r}))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    died = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert died.returncode == -signal.SIGKILL
    sizes = {file.name.endswith("writing"): file.stat().st_size for file in files(folder)}
    assert sizes == {True: 4, False: BYTES}
    for file in files(folder):
        os.utime(file, (0, time.time() - 7200))
    assert_equal(cached(folder), source(folder))
    assert [file.stat().st_size for file in files(folder)] == [BYTES] * 5


def test_the_configuration_switches_it(folder: Path) -> None:
    data = {
        "train": {"name": "coco", "annotations": str(folder / "set.json")},
        "cache": str(folder / "cache"),
    }
    opened = open_source(config.parse({"data": data}), "train")
    assert isinstance(opened, CachedSource)
    assert len(files(folder)) == 5
    off = open_source(config.parse({"data": {**data, "cache_gb": 0}}), "train")
    assert isinstance(off, CocoSource)


def test_bands_and_ranges_have_entries_of_their_own(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(0, 4096, (*SIZE,)).astype(np.uint16)
    for part, pixels in (("images", samples), ("masks", (samples > 9).astype(np.uint8))):
        (tmp_path / part).mkdir()
        Image.fromarray(pixels).save(tmp_path / part / "a.png")
    paths = {part: str(tmp_path / part) for part in ("images", "masks")}
    for channels in (1, 3):
        for high in (4095, 8191):
            plain = MaskSource(**paths, classes=("a", "b"), range=(0, high), channels=channels)
            kept = CachedSource(plain, tmp_path / "cache", limit=1e9)
            assert kept.channels == channels
            assert kept.image(0).shape == (channels, *SIZE)
            assert torch.equal(kept.image(0), plain.image(0))
            assert torch.equal(kept.mask(0), plain.mask(0))
