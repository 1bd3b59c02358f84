"""Sources of labelled photographs, folds, and batches."""

from collections.abc import Callable
from pathlib import Path

from segkit import distributed
from segkit.config import Config, build
from segkit.data.cache import CachedSource
from segkit.data.coco import CocoSource
from segkit.data.demo import open_demo
from segkit.data.masks import MaskSource
from segkit.data.source import Fault, Source

__all__ = [
    "SOURCES",
    "CachedSource",
    "CocoSource",
    "Fault",
    "MaskSource",
    "Source",
    "open_demo",
    "open_source",
]

SOURCES: dict[str, Callable[..., Source]] = {
    "coco": CocoSource,
    "masks": MaskSource,
    "demo": open_demo,
}
"""Name in the configuration's ``data`` section → source."""


def open_source(config: Config, part: str, *, cached: bool = True) -> Source:
    """A part of the ``data`` section, opened on rank 0 first: it may have to be made.

    Labelled images are read through the cache, unless ``data.cache_gb`` is 0.

    Args:
        config: Of the run.
        part: ``train``, ``val``, ``test``, ``test_labels`` or ``pseudo``.
        cached: ``False`` reads the files themselves.

    Raises:
        ConfigError: The component cannot be meant.
        DataError: What is there cannot be used.
    """
    if not distributed.is_main():
        distributed.barrier()
    source = build(SOURCES, getattr(config.data, part), f"data.{part}")
    if cached and part in ("train", "val") and config.data.cache_gb:
        source = CachedSource(source, Path(config.data.cache), limit=config.data.cache_gb * 1e9)
    if distributed.is_main():
        distributed.barrier()
    return source
