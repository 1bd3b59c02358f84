"""Recall of planted label errors: share of the faulty images among the first of the ranking.

    python -m benchmarks.labels --annotations FILE --images FOLDER --weights FILE [--groups FILE]

Errors are planted into a copy of COCO annotations, in 5 % of the images and equally often: an
object of another class, a missing object, and a polygon shifted by half its width and height.
A MobileNetV2 with a U-Net decoder trains on the copy in folds, its errors included, and each image
is scored by the fold that has not seen it. With ``--run`` the run of an earlier call is used.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from segkit import train
from segkit.commands import console
from segkit.inference.label_errors import rank_labels

KINDS = ("swapped", "missing", "shifted")


def plant(content: dict[str, Any], share: float, seed: int) -> dict[str, str]:
    """Plant an error into a share of the images; return its kind by file name."""
    rng = random.Random(seed)
    categories = [category["id"] for category in content["categories"]]
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    owned: dict[int, list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        if isinstance(annotation["segmentation"], list):
            owned.setdefault(annotation["image_id"], []).append(annotation)
    images = [image for image in content["images"] if image["id"] in owned]
    kinds = {}
    for n, image in enumerate(rng.sample(images, round(share * len(content["images"])))):
        kind, annotation = KINDS[n % len(KINDS)], rng.choice(owned[image["id"]])
        kinds[image["file_name"]] = kind
        if kind == "swapped":
            others = [c for c in categories if c != annotation["category_id"]]
            annotation["category_id"] = rng.choice(others)
        elif kind == "missing":
            content["annotations"].remove(annotation)
        else:
            shift(annotation, sizes[image["id"]], rng)
    return kinds


def shift(annotation: dict[str, Any], size: tuple[int, int], rng: random.Random) -> None:
    """Move an object's polygons by half its width and height, to the side with more room."""
    left, top, width, height = annotation["bbox"]
    by = (
        width / 2 if left + width / 2 < size[0] / 2 else -width / 2,
        height / 2 if top + height / 2 < size[1] / 2 else -height / 2,
    )
    annotation["segmentation"] = [
        [min(max(x + by[n % 2], 0), size[n % 2]) for n, x in enumerate(polygon)]
        for polygon in annotation["segmentation"]
    ]
    del annotation["bbox"], annotation["area"]


def configuration(args: argparse.Namespace, annotations: Path) -> dict[str, Any]:
    """Return the configuration to train with."""
    data = {"name": "coco", "annotations": str(annotations), "images": str(args.images.resolve())}
    crop = {"name": "crop", "size": [args.crop, args.crop]}
    return {
        "data": {
            "train": data,
            "folds": args.folds,
            "selection": 0.0,
            "workers": 0,
            "groups": str(args.groups.resolve()) if args.groups else None,
        },
        "model": {
            "backbone": "mobilenet_v2",
            "decoder": {"name": "unet", "widths": [96, 64, 48, 32, 16]},
            "weights": str(args.weights.resolve()),
        },
        "augment": {
            "train": [
                {"name": "scale", "range": args.scale},
                {"name": "rotate", "degrees": [-10, 10], "p": 0.5},
                crop,
                "hflip",
                {"name": "photometric", "p": 0.5},
            ]
        },
        "loss": {"terms": ["cross_entropy", "dice"]},
        "optim": {"lr": 0.002, "backbone_lr_factor": 0.2, "warmup_steps": 20, "clip_norm": 5.0},
        "train": {"epochs": args.epochs, "ema": 0.98, "evaluate_every": args.epochs},
        "infer": {"size": args.size},
    }


def trained(args: argparse.Namespace) -> Path:
    """Plant errors, train all folds and return the folder of the run."""
    folder = args.run or Path(tempfile.mkdtemp(prefix="labels-"))
    if not (folder / "run" / "summary.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        content = json.loads(args.annotations.read_text())
        kinds = plant(content, args.share, args.seed)
        (folder / "planted.json").write_text(json.dumps(kinds))
        (folder / "annotations.json").write_text(json.dumps(content))
        cfg = configuration(args, (folder / "annotations.json").resolve())
        (folder / "labels.json").write_text(json.dumps(cfg))
        start = time.process_time()
        train.main(["--cfg", str(folder / "labels.json"), "--run-dir", str(folder / "run")])
        seconds = time.process_time() - start
        print(f"trained in {seconds:.0f} s of processor time: {folder}", file=sys.stderr)
    return folder


def main() -> None:
    """Print the recall within the first 5, 10 and 20 % of the ranking, and that of each kind."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotations", type=Path, required=True, help="COCO file")
    parser.add_argument("--images", type=Path, required=True, help="folder of its images")
    parser.add_argument("--weights", type=Path, required=True, help="of MobileNetV2")
    parser.add_argument("--groups", type=Path, help="groups of images that stay in one fold")
    parser.add_argument("--run", type=Path, help="folder of an earlier call, or a new one")
    parser.add_argument("--share", type=float, default=0.05, help="share of faulty images")
    parser.add_argument("--seed", type=int, default=0, help="of the errors")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--crop", type=int, default=192)
    parser.add_argument("--size", type=int, default=256, help="longest side that is predicted")
    parser.add_argument("--scale", type=float, nargs=2, default=[0.4, 0.6])
    parser.add_argument("--json", action="store_true", help="print a line of JSON")
    args = parser.parse_args()
    folder = trained(args)
    kinds = json.loads((folder / "planted.json").read_text())
    ranking = rank_labels(folder / "run")
    names = [labels.name for labels in ranking]
    result: dict[str, Any] = {"images": len(names), "planted": len(kinds)}
    for percent in (5, 10, 20):
        first = names[: round(percent / 100 * len(names))]
        result[f"recall_{percent}"] = sum(name in kinds for name in first) / len(kinds)
        if percent == 10:
            for kind in KINDS:
                of_kind = [name for name in kinds if kinds[name] == kind]
                result[kind] = sum(name in first for name in of_kind) / len(of_kind)
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:<12}{value:.3f}" if isinstance(value, float) else f"{key:<12}{value}")


if __name__ == "__main__":
    console.run(lambda _: main())
