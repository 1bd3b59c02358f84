"""Record of a run's training data, to detect changed data when the run is resumed."""

from collections.abc import Mapping, Sequence
from typing import Any

from segkit.core.errors import quoted
from segkit.data.loader import digests
from segkit.data.memo import on_threads
from segkit.data.source import Source

FORMAT = 1
"""Version of a record; to be raised when digests are computed differently."""


def data_record(parts: Mapping[str, tuple[Source, Sequence[int]]]) -> dict[str, Any]:
    """Return the classes, and the digests of each image and its label by the image's name.

    ``parts`` has the source and the image indices of each part; ``train`` is required.
    """
    first, _ = parts["train"]
    category_ids = getattr(first, "category_ids", None)
    return {
        "format": FORMAT,
        "classes": list(first.classes),
        "category_ids": category_ids and {str(key): index for key, index in category_ids.items()},
        "images": {part: _digests(source, indices) for part, (source, indices) in parts.items()},
    }


def data_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the differences between two records, one phrase each; empty if they are equal."""
    changes = []
    old, new = before["classes"], after["classes"]
    if len(old) != len(new):
        changes.append(f"{len(new)} classes instead of {len(old)}")
    elif old != new:
        renamed = [f"{quoted(b)} was {quoted(a)}" for a, b in zip(old, new, strict=True) if a != b]
        changes.append(f"other classes: {_shortened(renamed)}")
    elif before["category_ids"] != after["category_ids"]:
        changes.append("other category ids of the classes")
    for part, images in before["images"].items():
        now = after["images"].get(part, {})
        common = [name for name in images if name in now]
        differing = {
            "missing images": [name for name in images if name not in now],
            "new images": [name for name in now if name not in images],
            "other pixels": [name for name in common if images[name][0] != now[name][0]],
            "other labels": [name for name in common if images[name][1] != now[name][1]],
        }
        for change, names in differing.items():
            if names:
                changes.append(f"{change} in data.{part}: {_shortened(list(map(quoted, names)))}")
    return changes


def _shortened(items: Sequence[str]) -> str:
    """Return the first three items as text, and the number of further ones."""
    more = f" (and {len(items) - 3} more)" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more


def _digests(source: Source, indices: Sequence[int]) -> dict[str, list[str]]:
    """Return short digests of each image and of all that determines its mask, by its name."""
    labels = on_threads(source.label_digest, indices, "reading labels")
    known = zip(indices, digests(source, indices), labels, strict=True)
    return {source.names[i]: [image, label[:16]] for i, image, label in known}
