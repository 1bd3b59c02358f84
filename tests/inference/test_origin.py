"""origin.json: which files segkit wrote, and damaged contents."""

import json
from pathlib import Path

import pytest

from segkit.core.errors import SegkitError
from segkit.inference.origin import mark_folders, update_origin


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b'{"segkit": "0.1", "fi', b"\xff\xfe{}", b"[]", b"null", b"[" * 100_000),
        *(b'{"segkit": "0.1"}', b'{"files": {"a": 1}}', b'{"files": [1]}'),
        *(b'{"files": ["../kept"]}', b'{"files": [""]}'),
    ],
)
def test_a_damaged_file_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    mark_folders([folder])
    (folder / "origin.json").write_bytes(content)
    write(tmp_path, "kept")
    for use in (lambda: mark_folders([folder]), lambda: update_origin(folder, {"a": 1}, ["b"])):
        with pytest.raises(SegkitError, match=r"origin\.json: is damaged .*delete the folder"):
            use()
    assert (folder / "origin.json").read_bytes() == content
    assert (tmp_path / "kept").exists()


def test_what_was_listed_goes_with_its_origin(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    mark_folders([folder])
    update_origin(folder, {"of": 1}, ["masks/a", "masks/b"])
    write(folder, "masks/a", "masks/b", "masks/mine")
    update_origin(folder, {"of": 1}, ["masks/a", "soft/a"])  # the same origin: nothing goes
    assert (folder / "masks/b").exists()
    with pytest.raises(SegkitError, match="segkit did not write"):
        update_origin(folder, {"of": 2}, ["masks/mine"])
    assert (folder / "masks/b").exists()
    update_origin(folder, {"of": 2}, ["masks/c"])
    assert sorted(path.name for path in folder.rglob("*")) == ["masks", "mine", "origin.json"]
    assert json.loads((folder / "origin.json").read_text()) == {"of": 2, "files": ["masks/c"]}


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    mark_folders([folder])
    update_origin(folder, {"of": 1}, ["masks/a"])
    write(tmp_path, "data/a")
    (folder / "masks").symlink_to(tmp_path / "data")
    with pytest.raises(SegkitError, match="symbolic link"):
        update_origin(folder, {"of": 2}, ["masks/b"])
    assert (tmp_path / "data/a").exists()


def test_only_new_empty_or_own_folders_are_claimed(tmp_path: Path) -> None:
    new, empty, foreign = tmp_path / "new", tmp_path / "empty", tmp_path / "foreign"
    empty.mkdir()
    write(empty, ".origin.json.writing")  # a kill left it
    write(foreign, ".env")
    with pytest.raises(SegkitError, match="foreign: is not empty"):
        mark_folders([new, foreign])
    assert not new.exists()
    for _ in range(2):
        mark_folders([new, empty])
    mark_folders([new], reads=[tmp_path / "photo.jpg"])
    with pytest.raises(SegkitError, match="holds the images to predict"):
        mark_folders([new], reads=[new / "masks/photo.jpg"])
