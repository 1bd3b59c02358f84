"""The demo data set: generated pictures of litter in the contest's format."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
from PIL import Image

from segkit.core.distributed import Progress
from segkit.core.errors import DataError
from segkit.core.files import require_regular_file
from segkit.data.coco import CocoSource
from segkit.data.demo.scene import LITTER, draw_scene, polygon_area

CLASSES = ("Background", *(kind.name for kind in LITTER))

VERSION = 4
"""Version of the drawing; sets of different versions differ."""


def open_demo(
    *,
    root: str,
    part: Literal["train", "test", "test_labels"] = "train",
    train: int = 240,
    test: int = 80,
    size: int = 128,
    seed: int = 0,
) -> CocoSource:
    """Open a part of the demo set, which is drawn on first use.

    Args:
        root: Folder of the set.
        part: ``test`` has no labels; ``test_labels`` is the same images with labels.
        train: Number of training images.
        test: Number of test images.
        size: Side of the square images in pixels.
        seed: Random seed of the pictures.

    Raises:
        DataError: The folder contains something else, or a demo set of other numbers.
    """
    draw_demo(Path(root), train=train, test=test, size=size, seed=seed)
    return CocoSource(annotations=str(Path(root, f"{part}.json")), background=CLASSES[0])


def draw_demo(
    folder: Path, *, train: int = 240, test: int = 80, size: int = 128, seed: int = 0
) -> bool:
    """Draw the demo set into a new folder, unless it is there; arguments as in :func:`open_demo`.

    The folder is created atomically, so several processes may call this at once. The same numbers
    give the same bytes with the same NumPy and Pillow.

    Returns:
        True if this call drew the set.

    Raises:
        DataError: As in :func:`open_demo`, or a number is out of range.
    """
    settings = {"version": VERSION, "train": train, "test": test, "size": size, "seed": seed}
    if min(train, test) < 1 or size < 32 or seed < 0:
        raise DataError(
            f"a demo set of {train} and {test} images of {size} pixels with seed {seed} cannot be "
            "drawn; expected at least 1 and 1 images, 32 pixels and seed 0"
        )
    folder = folder.resolve()
    if _exists(folder, settings):
        return False
    draft = folder.with_name(f".{folder.name}-{uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        _write_json(draft / "train.json", _draw_part(draft / "batch_01", train, size, (seed, 0)))
        labelled = _draw_part(draft / "batch_02", test, size, (seed, 1))
        _write_json(draft / "test_labels.json", labelled)
        del labelled["annotations"]
        _write_json(draft / "test.json", labelled)
        _write_json(draft / "demo.json", settings)
        draft.rename(folder)
    except OSError:
        if not _exists(folder, settings):  # it exists if another process was first
            raise
        return False
    finally:
        if draft.exists():
            shutil.rmtree(draft)
    return True


def _exists(folder: Path, settings: dict[str, int]) -> bool:
    """Return whether the folder is the demo set of these settings; raise if it is in use."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        existing = json.loads(require_regular_file(folder / "demo.json").read_text())
    except (OSError, ValueError):
        raise DataError(f"{folder} is in use and holds no demo set; name a new folder") from None
    if existing != settings:
        raise DataError(
            f"{folder} holds a demo set of {existing}, not of {settings}; "
            "name a new folder, or delete this one to draw it again"
        )
    return True


def _draw_part(folder: Path, images: int, size: int, seed: tuple[int, int]) -> dict[str, Any]:
    """Draw the pictures of a part into a folder; return their COCO content."""
    folder.mkdir()
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    classes = _choose_classes(images, np.random.default_rng(seed))
    for i, chosen in enumerate(Progress(classes, f"drawing {folder.name}")):
        rng, name = np.random.default_rng((*seed, i)), f"{folder.name}/{i:04d}.jpg"
        scene = draw_scene(rng, size=size, classes=chosen)
        picture = Image.fromarray(scene.image)
        picture.save(folder.parent / name, quality=int(rng.integers(80, 95)))
        records.append({"id": i, "file_name": name, "height": size, "width": size})
        for category, outline in scene.objects:
            low, high = outline.min(0), outline.max(0)
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": i,
                    "category_id": category,
                    "segmentation": [outline.ravel().tolist()],
                    "area": round(polygon_area(outline), 2),
                    "bbox": [*low.tolist(), *(high - low).round(2).tolist()],
                    "iscrowd": 0,
                }
            )
    categories = [
        {"id": i, "name": kind.name, "supercategory": kind.name} for i, kind in enumerate(LITTER, 1)
    ]
    return {"images": records, "categories": categories, "annotations": annotations}


def _choose_classes(images: int, rng: np.random.Generator) -> list[list[int]]:
    """Return the classes of each image's 3 to 6 objects; every class occurs at least once."""
    counts = rng.integers(3, 7, images)
    shares = [kind.share for kind in LITTER]
    drawn = rng.choice(len(LITTER), max(0, counts.sum() - len(LITTER)), p=shares)
    classes = rng.permutation(np.concatenate([np.arange(len(LITTER)), drawn])) + 1
    return [part.tolist() for part in np.split(classes, counts.cumsum())[:-1]]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
