"""Recognition of folders of images and of folders of masks with the same file names."""

import functools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from segkit.data.images import SUFFIXES
from segkit.data.legend import Color, distinct
from segkit.data.pairing import NO_AFFIXES, Rule, rules
from segkit.data.parts import part_of

CLASS_FILES = (
    *("classes.txt", "class_names.txt", "label_names.txt", "names.txt", "labels.txt"),
    *("label_colors.txt", "class_dict.csv", "labelmap.txt", "_classes.csv"),
)
"""Names of files with a class per line."""

VOID = ("void", "unlabelled", "unlabeled", "ignore", "ignored")

COLORS = 64
"""A file with more colors than this is a photograph."""

MAX_MASKS = 1000
"""Number of masks that are read to find their values."""


class MaskFolders(NamedTuple):
    """A folder of images, the folder of their masks, and the affixes of their names."""

    images: Path
    masks: Path
    affixes: Rule
    matches: int

    def settings(self) -> dict[str, str]:
        """Return the arguments of the mask source that name the affixes."""
        of_images, of_masks = self.affixes
        settings = {
            "image_prefix": of_images.prefix,
            "image_suffix": of_images.suffix,
            "mask_prefix": of_masks.prefix,
            "mask_suffix": of_masks.suffix,
        }
        return {key: value for key, value in settings.items() if value}


def recognize(folder: Path, part: str) -> dict[str, Any] | None:
    """Return the arguments of the mask source of a part, or ``None``.

    Folders belong together if most images have a mask of the same name, perhaps with an ending such
    as ``_mask``. Values of masks are read to find classes and ignored values.
    """
    folders = _folders(folder)
    pairs = _pairs(folders)
    train = _of_part(folder, pairs, "train")
    pair = train if part == "train" else _of_part(folder, pairs, part)
    if train is None:
        return None
    classes = _classes(folder, train)
    if pair is not None:
        paths = {"images": str(pair.images), "masks": str(pair.masks)}
        return {**paths, **pair.settings(), **classes}
    if part != "test":
        return None
    used = {path for pair in pairs for path in (pair.images, pair.masks)}
    unlabelled = [path for path in folders if path not in used]
    tests = [path for path in unlabelled if part_of(path.relative_to(folder).as_posix()) == part]
    if not tests or _are_masks(tests[0], tuple(folders[tests[0]][:3])):
        return None
    return {"images": str(tests[0]), "classes": classes["classes"]}


def _folders(folder: Path) -> dict[Path, list[str]]:
    """Return the folders that hold images, and the names of these files."""
    folders: dict[Path, list[str]] = {}
    for parent, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith((".", "__")))
        names = [x for x in sorted(files) if x.lower().endswith(SUFFIXES) and x[0] != "."]
        if names:
            folders[Path(parent)] = names
    return folders


@functools.lru_cache(maxsize=256)
def _are_masks(folder: Path, names: tuple[str, ...]) -> bool:
    """Return True if files have the few colors of a mask."""
    return all(_few_colors(folder / name) for name in names)


def _black_and_white(paths: Iterable[Path]) -> bool:
    """Return True for JPEG files with black and white pixels, and few others, at edges."""
    bright = False
    for path in paths:
        image = _jpeg(path)
        if image is None:
            return False
        gray = np.asarray(image.convert("L"))
        if ((gray > 32) & (gray < 223)).mean() > 0.02:
            return False
        bright = bright or bool(gray.max() >= 223)
    return bright


def refusals(folder: Path) -> Iterator[str]:
    """Yield a sentence for each folder of masks whose small values JPEG has changed."""
    folders = _folders(folder)
    stems = _stems(folders)
    for path, names in folders.items():
        others = (other for other in folders if other != path)
        named = any(2 * _pair(other, path, stems).matches > len(names) for other in others)
        images = (_jpeg(path / name) for name in names[:3])
        if named and all(x is not None and np.asarray(x).max() < COLORS for x in images):
            yield (
                f"{path}: its JPEG files look like masks of small values, which JPEG changes; "
                "expected masks in PNG: write them again as PNG, from where they come from"
            )


def _jpeg(path: Path) -> Image.Image | None:
    """Return a JPEG image; ``None`` for another file, or a damaged one."""
    try:
        with Image.open(path) as image:
            return image.copy() if image.format == "JPEG" else None
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def _few_colors(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits, which getcolors refuses
                return len(np.unique(np.asarray(image))) <= COLORS
            return image.format != "JPEG" and image.getcolors(COLORS) is not None
    except (OSError, ValueError, Image.DecompressionBombError):
        return False


def _stems(folders: dict[Path, list[str]]) -> dict[Path, set[str]]:
    """Return the names of each folder's files without their suffixes."""
    return {path: {Path(name).stem for name in names} for path, names in folders.items()}


def _pairs(folders: dict[Path, list[str]]) -> list[MaskFolders]:
    stems = _stems(folders)
    masks = [path for path, names in folders.items() if _are_masks(path, tuple(names[:3]))]
    masks = masks or [
        path
        for path, names in folders.items()
        if _black_and_white(path / name for name in names[:3])
    ]
    pairs = []
    for path, names in folders.items():  # photographs and their masks in one folder
        pair = _pair(path, path, stems)
        ended = [name for name in names if pair.affixes[1].fit(Path(name).stem)]
        if 3 * pair.matches > len(names) and _are_masks(path, tuple(ended[:3])):
            pairs.append(pair)
    for path in masks:
        candidates = [_pair(images, path, stems) for images in folders if images not in masks]
        best = max(candidates, key=lambda x: (x.matches, _shared(x.images, x.masks)), default=None)
        if best is not None and 2 * best.matches > len(stems[best.images]):
            pairs.append(best)
    return pairs


def _pair(images: Path, masks: Path, stems: dict[Path, set[str]]) -> MaskFolders:
    """Return a pair with the affixes by which the most images have a mask."""
    some = sorted(stems[masks])[:20]
    candidates = Counter(rule for mask in some for rule in rules(mask, stems[images]))
    if images == masks:
        del candidates[NO_AFFIXES, NO_AFFIXES]  # an image is not its own mask
    counts = {
        (of_images, of_masks): sum(
            of_masks.around(of_images.key(image)) in stems[masks]
            for image in stems[images]
            if of_images.fit(image)
        )
        for (of_images, of_masks), _ in candidates.most_common(4)
    }
    shortest = sorted(counts, key=lambda rule: sum(map(len, rule[0] + rule[1])))
    rule = max(shortest, key=lambda x: counts[x], default=(NO_AFFIXES, NO_AFFIXES))
    return MaskFolders(images, masks, rule, counts.get(rule, 0))


def _shared(first: Path, second: Path) -> int:
    """Return the number of components that two paths have in common, from the front and the end."""
    return len(set(first.parts) & set(second.parts))


def _of_part(folder: Path, pairs: Sequence[MaskFolders], part: str) -> MaskFolders | None:
    """Return the pair of a part; several are joined if they are below the same two folders."""
    said = {pair: part_of(pair.images.relative_to(folder).as_posix()) for pair in pairs}
    chosen = [pair for pair in pairs if said[pair] == part]
    if part == "train" and not chosen:
        chosen = [pair for pair in pairs if said[pair] is None]
    if len(chosen) < 2:
        return chosen[0] if chosen else None
    roots = {_roots(pair) for pair in chosen}
    if len(roots) == 1:
        images, masks = roots.pop()
        if {pair.affixes for pair in chosen} == {chosen[0].affixes} and images != masks:
            matches = sum(pair.matches for pair in chosen)
            return MaskFolders(images, masks, chosen[0].affixes, matches)
    return max(chosen, key=lambda pair: pair.matches)


def _roots(pair: MaskFolders) -> tuple[Path, Path]:
    """Return the pair's folders without the end of their paths that is the same."""
    images, masks = pair.images, pair.masks
    while images.name == masks.name and images != masks:
        images, masks = images.parent, masks.parent
    return images, masks


def _classes(folder: Path, pair: MaskFolders) -> dict[str, Any]:
    """Return the arguments about classes, from a file of names or from the values of the masks."""
    places = dict.fromkeys((folder, pair.masks, pair.images, pair.masks.parent, pair.images.parent))
    files = [place / name for place in places for name in CLASS_FILES]
    path = next((path for path in files if path.is_file()), None)
    if path is not None and path.name == "_classes.csv":  # of Roboflow; it lists the values
        return {"classes": str(path)}
    values, colors = _contents(pair)
    if path is None:
        return named_by_color(colors) if colors else named_by_value(values)
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    names = [re.sub(r"[\d\s,;:]+", " ", line).strip() for line in lines if line.strip()]
    if (
        len(names) == len(values)
        and values[-1] >= len(names)
        and (len(names) == 2 or values[-1] < 255)
    ):
        return {"classes": str(path), "values": {str(value): i for i, value in enumerate(values)}}
    return {"classes": str(path), **ignored(names, values)}


def ignored(names: Sequence[str], values: Iterable[int]) -> dict[str, Any]:
    """Return the value of masks that is no class, for a list of names.

    It is that of a last name such as "void", or the only value without a name.
    """
    if names and names[-1].casefold() in VOID:
        return {"ignore_index": len(names) - 1}
    unnamed = [value for value in values if value >= len(names)]
    return {"ignore_index": unnamed[0]} if len(unnamed) == 1 else {}


def named_by_value(values: Sequence[int]) -> dict[str, Any]:
    """Return classes for values without names.

    Two values are background and object. Otherwise 255 is ignored, and values that are not
    0, 1, 2, ... are numbered in their order.
    """
    if len(values) == 2 and values[0] == 0:
        scaled = {} if values[1] == 1 else {"values": {"0": 0, str(values[1]): 1}}
        return {"classes": ["background", "object"], **scaled}
    shown = [value for value in values if value != 255]
    void = {"ignore_index": 255} if len(shown) < len(values) else {}
    if min(shown, default=0) == 0 and max(shown, default=0) < 2 * len(shown) + 8:
        return {"classes": [f"class {i}" for i in range(max(shown, default=0) + 1)], **void}
    numbered = {str(value): i for i, value in enumerate(shown)}
    if void:
        return {"classes": [f"value {x}" for x in shown], "values": {**numbered, "255": None}}
    return {"classes": [f"value {x}" for x in shown], "values": numbered}


def named_by_color(colors: Sequence[Color]) -> dict[str, Any]:
    """Return classes for colors without names, in their order; black is the background."""
    texts = [",".join(map(str, color)) for color in colors]
    names = ["background" if text == "0,0,0" else f"color {text}" for text in texts]
    return {"classes": names, "values": {text: i for i, text in enumerate(texts)}}


def _contents(pair: MaskFolders) -> tuple[list[int], list[Color]]:
    """Return the values and the colors of a pair's masks, or of a thousand of them."""
    names = ((path, name) for path, names in _folders(pair.masks).items() for name in names)
    paths = [path / name for path, name in names if pair.affixes[1].fit(Path(name).stem)]
    values: set[int] = set()
    colors: set[Color] = set()
    for path in paths[:: max(1, len(paths) // MAX_MASKS)]:
        of_path = distinct(path)
        values.update(of_path[0])
        colors.update(of_path[1])
    if colors:  # a mask of one gray color among colored ones
        colors.update((value, value, value) for value in values)
    return sorted(values), sorted(colors)
