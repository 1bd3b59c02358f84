"""Label formats of other tools, one file per format, and recognition of them in a folder.

A format is a pair: ``source`` opens its files, and is a source of the configuration's ``data``
section, such as ``{"name": "labelme", "labels": "photos"}``; ``recognize(folder, part)`` returns
the arguments of ``source`` that read that part of the data set in ``folder``, or ``None`` if the
folder is not in this format or has no such part. ``part`` is ``"train"``, ``"val"`` or ``"test"``;
the training part of a folder without divisions is all of it. A recognizer reads names and the
beginnings of few files, follows no link, writes nothing, and raises no error for a folder of
another kind.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from segkit.data.coco import CocoSource
from segkit.data.formats import (
    ade20k,
    cityscapes,
    coco_files,
    cvat,
    label_studio,
    labelme,
    mask_folders,
    roboflow,
    via,
    voc,
    yolo,
)
from segkit.data.masks import MaskSource
from segkit.data.source import Source

Part = Literal["train", "val", "test"]


class Format(NamedTuple):
    """A label format: the function that opens it, and the one that recognizes it in a folder."""

    source: Callable[..., Source]
    recognize: Callable[[Path, Part], dict[str, Any] | None]


FORMATS: dict[str, Format] = {
    "roboflow": Format(roboflow.open_roboflow, roboflow.recognize),
    "cityscapes": Format(cityscapes.open_cityscapes, cityscapes.recognize),
    "ade20k": Format(ade20k.open_ade20k, ade20k.recognize),
    "voc": Format(voc.open_voc, voc.recognize),
    "yolo": Format(yolo.open_yolo, yolo.recognize),
    "labelme": Format(labelme.open_labelme, labelme.recognize),
    "cvat": Format(cvat.open_cvat, cvat.recognize),
    "label_studio": Format(label_studio.open_label_studio, label_studio.recognize),
    "via": Format(via.open_via, via.recognize),
    "coco": Format(CocoSource, coco_files.recognize),
    "masks": Format(MaskSource, mask_folders.recognize),
}
"""Formats by the name of their source, the most specific first."""


def recognize(folder: Path | str, part: Part = "train") -> dict[str, Any] | None:
    """Return the component that reads a part of the data set in ``folder``, or ``None``.

    Returns:
        ``{"name": ..., arguments}`` as in the configuration's ``data`` section, of the first format
        that recognizes the folder.
    """
    for name, label_format in FORMATS.items():
        arguments = label_format.recognize(Path(folder), part)
        if arguments is not None:
            return {"name": name, **arguments}
    return None
