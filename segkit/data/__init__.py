"""Data sources, folds, and batches."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segkit.core import distributed
from segkit.core.config import Component, Config, DataConfig, build
from segkit.core.errors import ConfigError
from segkit.data.cache import CachedSource, cache_keys
from segkit.data.coco import CocoSource
from segkit.data.demo import open_demo
from segkit.data.formats import FORMATS
from segkit.data.loader import digests
from segkit.data.masks import MaskSource
from segkit.data.memo import MEMO
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
    "part_spec",
    "reading",
]

SOURCES: dict[str, Callable[..., Source]] = {
    "coco": CocoSource,
    "masks": MaskSource,
    "demo": open_demo,
    **{name: label_format.source for name, label_format in FORMATS.items()},
}
"""Sources by their name in the configuration's ``data`` section."""


def reading(data: DataConfig) -> dict[str, Any]:
    """Return ``range`` and ``channels`` with which the training images are read."""
    spec = data.train or {}
    limits = spec.get("range")
    limits = tuple(limits) if isinstance(limits, list | tuple) else limits
    return {"range": limits, "channels": spec.get("channels", 3)}


def part_spec(data: DataConfig, part: str) -> Component | None:
    """Return the component of a part, which reads images as ``data.train`` unless it says how."""
    spec, train = getattr(data, part), data.train or {}
    if spec is None or spec.get("name") not in SOURCES:
        return spec
    arguments = inspect.signature(SOURCES[spec["name"]]).parameters
    shared = {key: train[key] for key in reading(data) if key in train and key in arguments}
    return {**shared, **spec}


def open_source(config: Config, part: str, *, cached: bool = True) -> Source:
    """Open a source of the ``data`` section on rank 0 and broadcast it to the other ranks.

    ``train`` and ``val`` are read through the cache, unless ``data.cache_gb`` is 0. Digests of the
    images are kept in ``data.cache`` for the next start.

    Args:
        config: Configuration of the run.
        part: ``train``, ``val``, ``test``, ``test_labels`` or ``pseudo``.
        cached: If false, the files are read without the cache.

    Raises:
        ConfigError: The component is invalid, or has other channels than ``data.train``.
        DataError: The data cannot be used.
    """
    main = distributed.is_main()
    spec: Any = part_spec(config.data, part)
    channels = reading(config.data)["channels"]
    if config.data.train is not None and spec.get("channels", 3) != channels:
        raise ConfigError(
            f"data.{part}.channels: is {spec.get('channels', 3)}, but data.train has {channels}; "
            "expected the same, as one model takes both"
        )
    folder = Path(config.data.cache)
    with MEMO.kept_in(folder):
        # Only rank 0 reads the data; the others get the result.
        source = build(SOURCES, spec, f"data.{part}") if main else None
        source = distributed.broadcast(source)
        if not cached:
            return source
        everything = range(len(source))
        images = digests(source, everything) if main else []
        if distributed.world_size() > 1:
            MEMO.share(source.path(i) for i in everything)
        if part not in ("train", "val") or not config.data.cache_gb:
            return source
        keys = distributed.broadcast(cache_keys(source, images) if main else None)
        if not main:
            distributed.barrier()
        source = CachedSource(source, folder, limit=config.data.cache_gb * 1e9, keys=keys)
        if main:
            distributed.barrier()
    return source
