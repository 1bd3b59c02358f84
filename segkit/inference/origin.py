"""Track the files that segkit wrote; no other file is ever deleted or overwritten.

In a result folder ``origin.json`` lists them, with everything that the results depend on. A single
file is recognized by a mark in its content.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from segkit.core.errors import DataError, SegkitError
from segkit.core.files import matches_schema, require_regular_file, write_json
from segkit.data.inputs import check_name, inside

NAME = "origin.json"
_DRAFT = f".{NAME}.writing"  # may remain if a process is killed while writing


def mark_folders(folders: Iterable[Path], *, reads: Iterable[Path] = ()) -> None:
    """Mark folders as result folders; each must be new, empty, or a result folder already.

    ``reads`` are files that are read while results are written, and so must not be replaced.
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
                f"{folder}: holds the images to predict, which new results might overwrite; "
                "name another folder"
            )
    for folder in folders:
        if not (folder / NAME).exists():
            write_json(folder / NAME, {"files": []})


def update_origin(folder: Path, origin: Mapping[str, Any], files: Sequence[str]) -> None:
    """List files that segkit will write; delete listed files if the origin has changed.

    Args:
        folder: A folder of :func:`mark_folders`.
        origin: JSON values of everything that the results depend on.
        files: Paths relative to the folder. One that exists unlisted is an error.
    """
    origin = json.loads(json.dumps(origin))
    known = _read(folder)
    listed: list[str] = known.pop("files")
    for name in {*files}.difference(listed):
        if os.path.lexists(folder / name):
            raise SegkitError(
                f"{folder / name}: a result needs this path, but segkit did not write this file; "
                "move it or name another folder"
            )
    if known != origin:
        for parent in {str(Path(name).parent) for name in listed}:
            inside(folder, parent)  # refuses links out of the folder
        for name in listed:
            (folder / name).unlink(missing_ok=True)
        listed = []
    write_json(folder / NAME, {**origin, "files": list(dict.fromkeys([*listed, *files]))})


def check_written_by_segkit(path: Path, mark: bytes) -> None:
    """Raise an error if the file exists without the mark of files that segkit writes."""
    if os.path.lexists(path) and mark not in require_regular_file(path).read_bytes():
        raise SegkitError(
            f"{path}: exists already and segkit did not write it; move it or name another file"
        )


def _read(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's ``origin.json``; ``files`` in it is a list of paths."""
    path = folder / NAME
    try:
        content = json.loads(require_regular_file(path).read_text(encoding="utf-8"))
        valid = matches_schema(content, {"files": [str]})
        for name in content["files"] if valid else ():
            check_name(name)  # paths stay in their folder
    except (ValueError, RecursionError, DataError):
        valid = False
    if not valid:
        raise SegkitError(
            f"{path}: is damaged or from an older segkit, so the files that segkit wrote are "
            "unknown; delete the folder, or name another"
        )
    return dict(content)
