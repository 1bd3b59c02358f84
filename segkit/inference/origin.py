"""Which files segkit wrote: no other one is ever deleted or overwritten.

In a folder of results ``origin.json`` lists them, with all that the results come from. A file that
stands alone has a mark in it.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from segkit.core.errors import DataError, SegkitError
from segkit.core.files import regular, write_json
from segkit.data.inputs import check_name, inside

NAME = "origin.json"
_DRAFT = f".{NAME}.writing"  # what a kill may leave of the first one


def claim(folders: Iterable[Path], *, reads: Iterable[Path] = ()) -> None:
    """Make folders segkit's, each of which is new, empty, or segkit's already.

    Args:
        folders: Of results.
        reads: Files that are read while results are written, and so must stay.

    Raises:
        SegkitError: A folder holds other files or some of ``reads``, or its ``origin.json`` is
            damaged.
    """
    folders = list(folders)
    sources = {parent.resolve() for parent in {path.parent for path in reads}}
    for folder in folders:
        if (folder / NAME).exists():
            _read(folder)
        elif folder.exists() and any(path.name != _DRAFT for path in folder.iterdir()):
            raise SegkitError(
                f"{folder}: is not empty and holds no results of segkit; name another folder"
            )
        if any(source.is_relative_to(folder.resolve()) for source in sources):
            raise SegkitError(
                f"{folder}: holds the images to predict, which its new results may replace; "
                "name another folder"
            )
    for folder in folders:
        if not (folder / NAME).exists():
            write_json(folder / NAME, {"files": []})


def renew(folder: Path, origin: Mapping[str, Any], files: Sequence[str]) -> None:
    """List files as segkit's, to be written next; the listed ones of another origin are deleted.

    Args:
        folder: One that was claimed.
        origin: Everything that the results depend on; JSON can hold it.
        files: Paths in the folder.

    Raises:
        SegkitError: One of the files is there already and segkit did not write it, or
            ``origin.json`` is damaged.
    """
    origin = json.loads(json.dumps(origin))
    known = _read(folder)
    listed: list[str] = known.pop("files")
    for name in {*files}.difference(listed):
        if os.path.lexists(folder / name):
            raise SegkitError(
                f"{folder / name}: is in the way of a result, and segkit did not write it; move it "
                "or name another folder"
            )
    if known != origin:
        for parent in {str(Path(name).parent) for name in listed}:
            inside(folder, parent)  # no link out of the folder
        for name in listed:
            (folder / name).unlink(missing_ok=True)
        listed = []
    write_json(folder / NAME, {**origin, "files": list(dict.fromkeys([*listed, *files]))})


def refuse_foreign(path: Path, mark: bytes) -> None:
    """Raise an error if a file is there without the mark that segkit's own have.

    Raises:
        SegkitError: There is such a file.
        OSError: There is a folder, or what cannot be read.
    """
    if os.path.lexists(path) and mark not in regular(path).read_bytes():
        raise SegkitError(
            f"{path}: is there already and segkit did not write it; move it or name another file"
        )


def _read(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's ``origin.json``, in which ``files`` is a list of names."""
    path = folder / NAME
    try:
        content = json.loads(regular(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not _are_names(content.get("files")):
        raise SegkitError(
            f"{path}: is damaged or of an older segkit, and so does not tell which files here "
            "segkit wrote; delete the folder, or name another"
        )
    return content


def _are_names(files: Any) -> bool:
    """Return whether this is a list of paths that stay in their folder."""
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        return False
    try:
        for name in files:
            check_name(name)
    except DataError:
        return False
    return True
