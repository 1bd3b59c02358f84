"""Data sources, folds, and batches."""

from collections.abc import Callable
from pathlib import Path

from segkit.core import distributed
from segkit.core.config import Config, build
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
]

SOURCES: dict[str, Callable[..., Source]] = {
    "coco": CocoSource,
    "masks": MaskSource,
    "demo": open_demo,
    **{name: label_format.source for name, label_format in FORMATS.items()},
}
"""Sources by their name in the configuration's ``data`` section."""


def open_source(config: Config, part: str, *, cached: bool = True) -> Source:
    """Open a source of the ``data`` section on rank 0 and broadcast it to the other ranks.

    ``train`` and ``val`` are read through the cache, unless ``data.cache_gb`` is 0. Digests of the
    images are kept in ``data.cache`` for the next start.

    Args:
        config: Configuration of the run.
        part: ``train``, ``val``, ``test``, ``test_labels`` or ``pseudo``.
        cached: If false, the files are read without the cache.

    Raises:
        ConfigError: The component is invalid, or has other than 3 channels.
        DataError: The data cannot be used.
    """
    main = distributed.is_main()
    spec = getattr(config.data, part)
    if spec.get("channels", 3) != 3:
        raise ConfigError(
            f"data.{part}.channels: is {spec['channels']}, but training and prediction by commands "
            "take 3; remove it, or train from Python with segkit.create_model(in_channels=...)"
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
