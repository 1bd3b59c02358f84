"""Only regular files are opened: one sentence refuses files that can block forever."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from segkit.core import checkpoint, config
from segkit.core.errors import DataError, SegkitError
from segkit.core.files import require_regular_file
from segkit.core.run import Run
from segkit.data.coco import CocoSource
from segkit.data.images import image_size, read_image
from segkit.data.inputs import inside, read_json, read_text
from segkit.data.loader import digests
from segkit.data.masks import MaskSource
from segkit.data.photos import PhotoSource
from segkit.models.pretrained.reading import read_file


@pytest.fixture(autouse=True)
def _no_wait() -> Iterator[None]:
    """End a test that waits for a pipe."""

    def end(*_: object) -> None:
        pytest.fail("waits forever")  # no Exception, which a reader might turn into its own

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def mask_source(path: Path) -> None:
    """Read the mask ``path``, a PNG in a folder of its own."""
    images = path.parent.parent / "images"
    images.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(images / f"{path.stem}.jpg")
    source = MaskSource(images=str(images), masks=str(path.parent), classes=("a", "b"))
    source.mask(0)


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "weights": ("a.pth", read_file),
    "safetensors": ("a.safetensors", read_file),
    "checkpoint": ("a.pt", checkpoint.load),
    "unverified": ("a.pt", lambda path: checkpoint.load(path, verify=False)),
    "latest": ("last.pt", checkpoint.load_latest),
    "digest": ("a.pt", checkpoint.digest),
    "configuration": ("a.json", config.load),
    "json": ("a.json", read_json),
    "text": ("a.txt", read_text),
    "coco": ("a.json", lambda path: CocoSource(annotations=str(path))),
    "image": ("a.jpg", read_image),
    "size": ("a.jpg", image_size),
    "mask": ("a.png", mask_source),
    "photo": ("a.jpg", lambda path: PhotoSource(paths=(str(path.parent),)).image(0)),
    "image digest": ("a.jpg", lambda path: digests(PhotoSource(paths=(str(path.parent),)), [0])),
    "run": ("config.json", lambda path: Run(path.parent).read(path.name)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "loop"])
def test_a_file_that_is_not_regular_is_refused_without_waiting(
    kind: str, reader: str, tmp_path: Path
) -> None:
    name, read = READERS[reader]
    path = tmp_path / "in" / name
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to(path)
    with pytest.raises((SegkitError, OSError)) as caught:
        read(path)
    if isinstance(caught.value, SegkitError):
        assert "\n" not in str(caught.value)
    else:
        assert caught.value.filename is not None


def test_regular_names_the_kind_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert require_regular_file(str(tmp_path / "link")) == tmp_path / "link"
    with pytest.raises(OSError, match="it is a device; expected a regular file: '/dev/null'"):
        require_regular_file("/dev/null")
    with pytest.raises(IsADirectoryError):
        require_regular_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        require_regular_file(tmp_path / "none")


def test_a_link_to_itself_in_the_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg is a symbolic link to itself"):
        inside(tmp_path, "a.jpg")
