"""Folders of Cityscapes: leftImg8bit and gtFine, with 19 of 34 label ids as classes.

Cordts et al. 2016, https://arxiv.org/abs/1604.01685
"""

from pathlib import Path
from typing import Any, Literal

from segkit.core.errors import DataError
from segkit.data.masks import MaskSource
from segkit.data.source import OnError

CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train"),
    *("motorcycle", "bicycle"),
)

LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Values of the classes in files of labelIds; all others are ignored."""

_LABELS = ("gtFine", "gtCoarse")


def open_cityscapes(
    *,
    root: str,
    part: Literal["train", "val", "test", "train_extra"] = "train",
    on_error: OnError = "raise",
) -> MaskSource:
    """Images and masks in the folders of Cityscapes, with the 19 classes of its benchmark.

    Args:
        root: Folder that holds leftImg8bit and gtFine (or gtCoarse).
        part: The subfolder.
    """
    labels = next((name for name in _LABELS if (Path(root) / name / part).is_dir()), None)
    images = Path(root) / "leftImg8bit" / part
    if labels is None or not images.is_dir():
        raise DataError(f"{root} has no leftImg8bit/{part} and gtFine/{part}; expected Cityscapes")
    masks = Path(root) / labels / part
    ids = any(masks.glob("*/*_labelIds.png"))
    values = dict(zip(LABEL_IDS, CLASSES, strict=True)) if ids else dict(enumerate(CLASSES))
    source = MaskSource(
        images=str(images), masks=str(masks), classes=CLASSES, image_suffix="_leftImg8bit",
        mask_suffix=f"_{labels}_label{'Ids' if ids else 'TrainIds'}",
        values={**{str(value): name for value, name in values.items()}, "*": None},
        on_error=on_error,
    )  # fmt: skip
    source.origin = f"Cityscapes in {root}"
    return source


def recognize(folder: Path, part: str) -> dict[str, Any] | None:
    """Return the arguments that read a part of a folder, or ``None``."""
    labels = any((folder / name / part).is_dir() for name in _LABELS)
    if labels and (folder / "leftImg8bit" / part).is_dir():
        return {"root": str(folder), "part": part}
    return None
