"""Recognition of COCO files in a folder, and of the folder of their images."""

import functools
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from segkit.core.errors import DataError, quoted
from segkit.core.files import matches_schema
from segkit.data.inputs import existing_name, read_json
from segkit.data.parts import WORDS, part_of

MAX_FILES, HEAD = 200, 1 << 16
"""Largest number of JSON files that are opened, and bytes that are read to recognize a file."""


def recognize(folder: Path, part: str) -> dict[str, Any] | None:
    """Return the arguments of the COCO source of a part, or ``None``.

    Of several files of a part, the first with the most annotations is used. A file whose name says
    no part is the training part, unless another file says that it is.
    """
    files: dict[str, list[tuple[int, Path, Path]]] = {}
    for path in _json_files(folder):
        try:
            content = _read(path)
        except (OSError, DataError):
            continue  # the file may belong to another program; see refusals
        root = None if content is None else _image_folder(folder, path, content.names)
        if content is not None and root is not None:
            said = part_of(path.relative_to(folder).as_posix()) or "train"
            files.setdefault(said, []).append((-content.annotations, path, root))
    if part not in files:
        return None
    count, path, root = min(files[part])
    if not count and part != "test":
        return None
    arguments = {"annotations": str(path)}
    return arguments if root == path.parent else {**arguments, "images": str(root)}


def _json_files(folder: Path) -> Iterator[Path]:
    count = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(".json") and not name.startswith(".") and count < MAX_FILES:
                count += 1
                yield Path(parent, name)


class Content(NamedTuple):
    """The number of annotations of a COCO file, and the names of its first images."""

    annotations: int
    names: list[Any]


def _read(path: Path) -> Content | None:
    """Return the content of a COCO file, read once for all parts; ``None`` for another file."""
    about = path.stat()
    return _content(path, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=MAX_FILES)
def _content(path: Path, modified: int, size: int) -> Content | None:
    with path.open("rb") as file:
        head = file.read(HEAD).replace(b"\0", b"")  # also of two bytes per character
    if not any(word in head for word in (b'"images"', b'"annotations"', b'"categories"')):
        return None
    content = read_json(path)
    schema = {"images": [dict], "annotations": list}
    if not matches_schema({"annotations": [], **content}, schema) or not content["images"]:
        return None
    names = [image.get("file_name") for image in content["images"][:20]]
    return Content(len(content.get("annotations", [])), names)


def refusals(folder: Path, used: Collection[str] = ()) -> Iterator[str]:
    """Yield a sentence for each COCO file in a folder that cannot be used; ``used`` files can."""
    for path in _json_files(folder):
        if str(path) in used:
            continue
        try:
            content = _read(path)
        except (OSError, DataError) as error:
            yield str(error)
            continue
        if content is None:
            continue
        if _image_folder(folder, path, content.names) is None:
            name = quoted(content.names[0])
            yield (
                f"{path}: its image {name} is not in {folder}; put the images there, or correct "
                "the file names"
            )
        elif not content.annotations and part_of(path.relative_to(folder).as_posix()) != "test":
            yield f"{path} has no annotations; label its images"


def _image_folder(folder: Path, path: Path, listed: list[Any]) -> Path | None:
    """Return the folder that has most of the first images of a COCO file, or ``None``."""
    names = [name for name in listed if isinstance(name, str)]
    part = part_of(path.relative_to(folder).as_posix())
    below = ["", "images", "img", "data", *(WORDS[part] if part else ()), path.stem.split("_")[-1]]
    below += [f"images/{word}" for word in below if word]
    parents = (path.parent, path.parent.parent, folder)
    roots = (parent / name for parent in parents for name in below)
    counts = {
        root: sum((root / existing_name(root, name)).is_file() for name in names)
        for root in roots
        if root.is_relative_to(folder)
    }
    best = max(counts, key=lambda root: counts[root])
    return best if counts[best] else None
