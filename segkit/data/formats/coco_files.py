"""Recognition of COCO files in a folder, and of the folder of their images."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segkit.core.errors import DataError
from segkit.data.inputs import read_json
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
        content = _coco(path)
        root = None if content is None else _image_folder(folder, path, content["images"])
        if content is not None and root is not None:
            said = part_of(path.relative_to(folder).as_posix()) or "train"
            files.setdefault(said, []).append((-len(content.get("annotations", [])), path, root))
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


def _coco(path: Path) -> dict[str, Any] | None:
    """Return the content of a COCO file; ``None`` for another file."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
        if not any(word in head for word in (b'"images"', b'"annotations"', b'"categories"')):
            return None
        content = read_json(path)
    except (OSError, DataError):
        return None  # the file may belong to another program; if it is the only one, plan says so
    images, annotations = content.get("images"), content.get("annotations", [])
    if not isinstance(images, list) or not images or not isinstance(annotations, list):
        return None
    return content if all(isinstance(image, dict) for image in images) else None


def _image_folder(folder: Path, path: Path, images: list[dict[str, Any]]) -> Path | None:
    """Return the folder that the file names of a COCO file are relative to."""
    names = [image["file_name"] for image in images[:5] if isinstance(image.get("file_name"), str)]
    part = part_of(path.relative_to(folder).as_posix())
    below = ["", "images", "img", "data", *(WORDS[part] if part else ()), path.stem.split("_")[-1]]
    for parent in (path.parent, path.parent.parent, folder):
        for name in (*below, *(f"images/{word}" for word in below if word)):
            root = parent / name
            inside = root.is_relative_to(folder)
            if inside and names and all((root / image).is_file() for image in names):
                return root
    return None
