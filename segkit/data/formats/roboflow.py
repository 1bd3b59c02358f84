"""Exports of Roboflow: COCO files or masks beside the images of each part.

https://docs.roboflow.com/datasets/dataset-versions/exporting-data
"""

from pathlib import Path
from typing import Any, Literal

from segkit.core.errors import DataError
from segkit.data.coco import CocoSource
from segkit.data.masks import MaskSource
from segkit.data.parts import WORDS
from segkit.data.source import OnError, Source

COCO, CLASSES = "_annotations.coco.json", "_classes.csv"


def open_roboflow(
    *, root: str, part: Literal["train", "val", "test"] = "train", on_error: OnError = "raise"
) -> Source:
    """Images of a Roboflow export as "COCO Segmentation" or "Semantic Segmentation Masks".

    Args:
        root: Folder that holds train, valid and test.
        part: The part of the data.
        on_error: ``"skip"`` reads every image once, and leaves out faulty images; ``faults`` lists
            them.
    """
    folder = _folder(Path(root), part)
    if folder is None:
        raise DataError(
            f"{root} has no folder {' or '.join(WORDS[part])} with {COCO} or {CLASSES}; "
            "expected an export of Roboflow for segmentation"
        )
    source: CocoSource | MaskSource
    if (folder / COCO).is_file():
        source = CocoSource(annotations=str(folder / COCO), on_error=on_error)
    else:
        source = MaskSource(
            images=str(folder), masks=str(folder), classes=str(folder / CLASSES),
            mask_suffix="_mask", on_error=on_error,
        )  # fmt: skip
    source.origin = f"Roboflow's export {folder}"
    return source


def _folder(root: Path, part: str) -> Path | None:
    folders = [root / name for name in WORDS[part]]
    return next((f for f in folders if (f / COCO).is_file() or (f / CLASSES).is_file()), None)


def recognize(folder: Path, part: str) -> dict[str, Any] | None:
    """Return the arguments that read a part of a folder, or ``None``."""
    return {"root": str(folder), "part": part} if _folder(folder, part) else None
