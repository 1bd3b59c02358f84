"""Folders of the ADE20K scene parsing challenge: images, annotations, objectInfo150.txt.

Zhou et al. 2017, https://arxiv.org/abs/1608.05442
"""

from pathlib import Path
from typing import Any, Literal

from segkit.core.errors import DataError
from segkit.data.inputs import read_text
from segkit.data.masks import MaskSource
from segkit.data.source import OnError

INFO = "objectInfo150.txt"

_FOLDERS = {"train": "training", "val": "validation"}


def open_ade20k(
    *, root: str, part: Literal["train", "val"] = "train", on_error: OnError = "raise"
) -> MaskSource:
    """Images and masks in the folders of the ADE20K challenge; the value 0 has no class.

    Args:
        root: Folder that holds images, annotations and objectInfo150.txt.
        part: ``"train"`` or ``"val"``.
    """
    folder = Path(root)
    rows = [line.split("\t") for line in read_text(folder / INFO).splitlines() if line.strip()]
    names = tuple(row[-1].split(",")[0].strip() for row in rows[1:] if row[0].strip().isdecimal())
    values = {row[0].strip(): n for n, row in enumerate(rows[1:]) if row[0].strip().isdecimal()}
    if len(names) != len(rows) - 1:
        raise DataError(f"{folder / INFO}: expected lines of index, ratio, counts and names")
    unique = [f"{name} {n}" if name in names[:n] else name for n, name in enumerate(names)]
    images, masks = (folder / kind / _FOLDERS[part] for kind in ("images", "annotations"))
    source = MaskSource(
        images=str(images), masks=str(masks), classes=tuple(unique), values={**values, "0": None},
        on_error=on_error,
    )  # fmt: skip
    source.origin = f"ADE20K in {root}"
    return source


def recognize(folder: Path, part: str) -> dict[str, Any] | None:
    """Return the arguments that read a part of a folder, or ``None``."""
    name = _FOLDERS.get(part, part)
    is_part = all((folder / kind / name).is_dir() for kind in ("images", "annotations"))
    return {"root": str(folder), "part": part} if is_part and (folder / INFO).is_file() else None
