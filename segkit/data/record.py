"""What a run trains on, kept so that other data is noticed when the run goes on."""

from collections.abc import Mapping, Sequence
from typing import Any

from segkit.core.errors import quoted
from segkit.data.loader import digests
from segkit.data.memo import on_threads
from segkit.data.source import Source

FORMAT = 1
"""Of a record; to be raised when digests are made in another way."""


def data_record(parts: Mapping[str, tuple[Source, Sequence[int]]]) -> dict[str, Any]:
    """Return the classes, and digests of each image and its label by the image's name.

    Args:
        parts: The source and the images of each part of the data, ``train`` first.
    """
    first, _ = parts["train"]
    category_ids = getattr(first, "category_ids", None)
    return {
        "format": FORMAT,
        "classes": list(first.classes),
        "category_ids": category_ids and {str(key): index for key, index in category_ids.items()},
        "images": {part: _marks(source, indices) for part, (source, indices) in parts.items()},
    }


def data_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Say what differs between two records, each thing in a clause; nothing if they are equal."""
    changes = []
    old, new = before["classes"], after["classes"]
    if len(old) != len(new):
        changes.append(f"{len(new)} classes instead of {len(old)}")
    elif old != new:
        renamed = [f"{quoted(b)} was {quoted(a)}" for a, b in zip(old, new, strict=True) if a != b]
        changes.append(f"other classes: {_some(renamed)}")
    elif before["category_ids"] != after["category_ids"]:
        changes.append("other category ids of the classes")
    for part, images in before["images"].items():
        now = after["images"].get(part, {})
        both = [name for name in images if name in now]
        differing = {
            "missing images": [name for name in images if name not in now],
            "new images": [name for name in now if name not in images],
            "other pixels": [name for name in both if images[name][0] != now[name][0]],
            "other labels": [name for name in both if images[name][1] != now[name][1]],
        }
        for what, names in differing.items():
            if names:
                changes.append(f"{what} in data.{part}: {_some(list(map(quoted, names)))}")
    return changes


def _some(items: Sequence[str]) -> str:
    """The first items of a list, and how many more there are."""
    more = f" (and {len(items) - 3} more)" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more


def label_digests(source: Source, indices: Sequence[int]) -> list[str]:
    """Return a short digest of all that determines each image's mask."""
    return [digest[:16] for digest in on_threads(source.label_digest, indices, "reading labels")]


def _marks(source: Source, indices: Sequence[int]) -> dict[str, list[str]]:
    pairs = zip(digests(source, indices), label_digests(source, indices), strict=True)
    return {source.names[i]: list(pair) for i, pair in zip(indices, pairs, strict=True)}
