"""Sources of labelled photographs, folds, and batches."""

from collections.abc import Callable

from segkit.data.coco import CocoSource
from segkit.data.demo import open_demo
from segkit.data.masks import MaskSource
from segkit.data.source import IGNORE, Fault, Source

__all__ = ["IGNORE", "SOURCES", "CocoSource", "Fault", "MaskSource", "Source", "open_demo"]

SOURCES: dict[str, Callable[..., Source]] = {
    "coco": CocoSource,
    "masks": MaskSource,
    "demo": open_demo,
}
"""Name in the configuration's ``data`` section → source."""
