"""Folders of Pascal VOC: JPEGImages, SegmentationClass, ImageSets.

Everingham et al. 2010, http://host.robots.ox.ac.uk/pascal/VOC/
"""

from pathlib import Path
from typing import Any, Literal

from segkit.core.errors import DataError
from segkit.data.inputs import read_text
from segkit.data.masks import MaskSource
from segkit.data.samples import SampleRange
from segkit.data.source import OnError

CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)

BORDER = "224,224,192"
"""Color of the borders between objects, which have no class."""

_MASKS = ("SegmentationClassPNG", "SegmentationClass")
_CLASS_FILES = ("labelmap.txt", "class_names.txt")


def open_voc(
    *,
    root: str,
    part: Literal["train", "val", "trainval", "test"] | None = None,
    classes: str | tuple[str, ...] | None = None,
    range: SampleRange | None = None,
    channels: int = 3,
    on_error: OnError = "raise",
) -> MaskSource:
    """Images and masks in the folders of Pascal VOC.

    Args:
        root: Folder that holds JPEGImages and SegmentationClass.
        part: Name of a list in ImageSets/Segmentation; default: trainval.txt or default.txt if it
            is there, else all images.
        classes: Class names in the order of their values, or a file of them; default:
            labelmap.txt (of CVAT, with colors) or class_names.txt (of labelme), else VOC's 21.
    """
    folder = Path(root)
    masks = next((folder / name for name in _MASKS if (folder / name).is_dir()), None)
    if masks is None or not (folder / "JPEGImages").is_dir():
        raise DataError(f"{root} has no JPEGImages and SegmentationClass; expected Pascal VOC")
    files = [folder / name for name in _CLASS_FILES if (folder / name).is_file()]
    listed = classes or (str(files[0]) if files else CLASSES)
    colored = isinstance(listed, str) and listed.endswith("labelmap.txt")
    split = _split(folder, part)
    source = MaskSource(
        images=str(folder / "JPEGImages"), masks=str(masks), split=str(split) if split else None,
        classes=listed, ignore_index=255, values={BORDER: None} if colored else None,
        range=range, channels=channels, on_error=on_error,
    )  # fmt: skip
    source.origin = f"Pascal VOC in {root}"
    return source


def _split(folder: Path, part: str | None) -> Path | None:
    names = ("trainval", "default") if part is None else (part,)
    paths = [folder / "ImageSets" / "Segmentation" / f"{name}.txt" for name in names]
    return next((path for path in paths if part or path.is_file()), None)


def recognize(folder: Path, part: str) -> dict[str, Any] | None:
    """Return the arguments that read a part of a folder, or ``None``."""
    for root in (folder, *sorted(folder.glob("VOC*")), *sorted(folder.glob("VOCdevkit/VOC*"))):
        has_masks = any((root / name).is_dir() for name in _MASKS)
        if not has_masks or not (root / "JPEGImages").is_dir():
            continue
        path = _split(root, part)
        if path and path.is_file() and read_text(path).strip():
            return {"root": str(root), "part": part}
        if part == "train":
            return {"root": str(root)}
    return None
