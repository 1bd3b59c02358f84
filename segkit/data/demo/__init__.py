"""The embedded demo set: scenes of litter in the contest's format, drawn from a seed."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
from PIL import Image

from segkit.core.distributed import Progress
from segkit.core.errors import DataError
from segkit.core.files import regular
from segkit.data.coco import CocoSource
from segkit.data.demo.litter import LITTER
from segkit.data.demo.scene import Scene, draw_scene
from segkit.data.demo.shapes import polygon_area

CLASSES = ("Background", *(kind.name for kind in LITTER))
VERSION = 3  # of the drawing: a folder drawn by another version is another data set


def open_demo(
    *,
    root: str,
    part: Literal["train", "test", "test_labels"] = "train",
    train: int = 240,
    test: int = 80,
    size: int = 128,
    seed: int = 0,
) -> CocoSource:
    """A part of the demo set, which is drawn on first use.

    Args:
        root: Folder of the set.
        part: ``test`` has no labels; ``test_labels`` are the same images with them, for scoring.
        train: Number of training images.
        test: Number of test images.
        size: Side of the square images in pixels.
        seed: Another seed is another set.

    Raises:
        DataError: The folder holds something else, or a demo set of other numbers.
    """
    draw_demo(Path(root), train=train, test=test, size=size, seed=seed)
    return CocoSource(annotations=str(Path(root, f"{part}.json")), background=CLASSES[0])


def draw_demo(
    folder: Path, *, train: int = 240, test: int = 80, size: int = 128, seed: int = 0
) -> bool:
    """Draw the demo set into a new folder, unless it is there already; see :func:`open_demo`.

    The folder appears whole or not at all, so several processes may call this at once. The same
    numbers give the same bytes wherever NumPy and Pillow are the same.

    Returns:
        Whether this call has drawn it.

    Raises:
        DataError: As :func:`open_demo`; or a number that makes no set.
    """
    recipe = {"version": VERSION, "train": train, "test": test, "size": size, "seed": seed}
    if min(train, test) < 1 or size < 32 or seed < 0:
        raise DataError(
            f"a demo set of {train} and {test} images of {size} pixels with seed {seed} cannot be "
            "drawn; expected at least 1 and 1 images, 32 pixels and seed 0"
        )
    folder = folder.resolve()
    if _holds(folder, recipe):
        return False
    draft = folder.with_name(f".{folder.name}-{uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        labelled = _write_part(draft, "batch_01", number=0, images=train, size=size, seed=seed)
        _write_json(draft / "train.json", labelled)
        labelled = _write_part(draft, "batch_02", number=1, images=test, size=size, seed=seed)
        _write_json(draft / "test_labels.json", labelled)
        del labelled["annotations"]
        _write_json(draft / "test.json", labelled)
        _write_json(draft / "demo.json", recipe)
        draft.rename(folder)
    except OSError:
        if not _holds(folder, recipe):  # it is there where another process was first
            raise
        return False
    finally:
        if draft.exists():
            shutil.rmtree(draft)
    return True


def _holds(folder: Path, recipe: dict[str, int]) -> bool:
    """Whether the demo set of this recipe lies there; False where nothing does."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads(regular(folder / "demo.json").read_text())
    except (OSError, ValueError):
        raise DataError(f"{folder} is in use and holds no demo set; name a new folder") from None
    if found != recipe:
        raise DataError(
            f"{folder} holds a demo set of {found}, not of {recipe}; "
            "name a new folder, or delete this one to draw it again"
        )
    return True


def _write_part(
    folder: Path, batch: str, *, number: int, images: int, size: int, seed: int
) -> dict[str, Any]:
    """Draw one part's photographs, and return its COCO content."""
    (folder / batch).mkdir()
    scenes = {}
    hands = Progress(_deal(images, np.random.default_rng((seed, number))), f"drawing {batch}")
    for i, classes in enumerate(hands):
        rng = np.random.default_rng((seed, number, i))
        scenes[f"{batch}/{i:04d}.jpg"] = scene = draw_scene(rng, size=size, classes=classes)
        quality = int(rng.integers(80, 95))
        Image.fromarray(scene.image).save(folder / batch / f"{i:04d}.jpg", quality=quality)
    return _coco(scenes)


def _deal(images: int, rng: np.random.Generator) -> list[list[int]]:
    """The classes of each image's objects, from one deck that holds every class at least once."""
    objects = rng.integers(3, 7, images)
    shares = [kind.share for kind in LITTER]
    drawn = rng.choice(len(LITTER), max(0, objects.sum() - len(LITTER)), p=shares)
    deck = rng.permutation(np.concatenate([np.arange(len(LITTER)), drawn])) + 1
    return [hand.tolist() for hand in np.split(deck, objects.cumsum())[:-1]]


def _coco(scenes: Mapping[str, Scene]) -> dict[str, Any]:
    """Scenes by file name as a COCO instance file's content."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, scene in scenes.items():
        height, width = scene.mask.shape
        images.append({"id": len(images), "file_name": name, "height": height, "width": width})
        for category, outlines in scene.objects:
            low, high = (
                np.min([o.min(0) for o in outlines], 0),
                np.max([o.max(0) for o in outlines], 0),
            )
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": images[-1]["id"],
                    "category_id": category,
                    "segmentation": [outline.ravel().tolist() for outline in outlines],
                    "area": round(sum(map(polygon_area, outlines)), 2),
                    "bbox": [*low.tolist(), *(high - low).round(2).tolist()],
                    "iscrowd": 0,
                }
            )
    categories = [
        {"id": i, "name": kind.name, "supercategory": kind.name} for i, kind in enumerate(LITTER, 1)
    ]
    return {"images": images, "categories": categories, "annotations": annotations}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
