"""Overfitting: train each shipped model on four photographs until their mean IoU is over 0.9.

    python -m benchmarks.overfit --data FOLDER [--cfg NAME ...] [--json]

FOLDER holds photographs with COCO labels, ``annotations/train.json`` and ``images``. Of two hundred
spread over the file, the four whose rarest class is the largest are cropped to the center and
resized. Weights are random; loss and model are the configuration's own, with dropout and drop path.
The score is in evaluation mode, with BatchNorm statistics of the four crops, as for a soup.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.models import NAMES
from segkit.core import config
from segkit.data.coco import CocoSource
from segkit.inference.soup import reestimate_batchnorm
from segkit.models.segmenter import Segmenter, build_model
from segkit.training.losses import Criterion, build_loss
from segkit.training.metrics import classes_of, confusion_matrix, scores
from segkit.training.optim import build_optimizer, build_schedule, set_lr
from segkit.training.step import train_step

GOAL = 0.9
PHOTOGRAPHS = 4


@dataclass(frozen=True)
class Result:
    """The result of a model.

    Args:
        name: Name of the configuration.
        miou: Last mean IoU, over the classes of the crops.
        steps: Number of steps.
        seconds: Time of training and scoring.
        reached: True if the mean IoU is over the goal.
    """

    name: str
    miou: float
    steps: int
    seconds: float
    reached: bool


def crops(folder: Path, size: int, candidates: int = 200) -> tuple[Tensor, Tensor, int]:
    """Return the clearest photographs as normalized images and masks, and the number of classes."""
    source = CocoSource(
        annotations=str(folder / "annotations" / "train.json"), images=str(folder / "images")
    )
    classes = len(source.classes)

    def small(i: int) -> tuple[Tensor, Tensor]:
        image, mask = source.image(i), source.mask(i)
        side = min(mask.shape)
        top, left = ((whole - side) // 2 for whole in mask.shape)
        image = image[:, top : top + side, left : left + side].float()[None] / 255
        mask = mask[top : top + side, left : left + side][None, None]
        return (
            F.interpolate(image, (size, size), mode="bilinear", antialias=True),
            F.interpolate(mask, (size, size), mode="nearest")[:, 0],
        )

    def clearness(pair: tuple[Tensor, Tensor]) -> tuple[int, int]:
        counts = pair[1].flatten().bincount(minlength=classes)
        return int((counts > 0).sum()), int(counts[counts > 0].min())

    spread = range(0, len(source), max(1, len(source) // candidates))
    images, masks = zip(
        *sorted(map(small, spread), key=clearness, reverse=True)[:PHOTOGRAPHS], strict=True
    )
    batch = torch.cat(images)
    mean, std = batch.mean((0, 2, 3), keepdim=True), batch.std((0, 2, 3), keepdim=True)
    return (batch - mean) / std, torch.cat(masks), classes


def overfit(
    name: str, images: Tensor, masks: Tensor, num_classes: int, *, steps: int, lr: float, every: int
) -> Result:
    """Train until the goal is reached, or to the last step."""
    settings = config.load(name)
    model = build_model(
        settings.model.backbone, settings.model.decoder, num_classes=num_classes, seed=0
    )
    criterion = build_loss(
        settings.loss.terms, num_classes=num_classes, aux_weight=settings.loss.aux_weight
    )
    start = time.perf_counter()
    miou, taken = fit(model, criterion, images, masks, num_classes, name, steps, lr, every)
    return Result(name, miou, taken, time.perf_counter() - start, miou > GOAL)


def fit(
    model: Segmenter,
    criterion: Criterion,
    images: Tensor,
    masks: Tensor,
    num_classes: int,
    name: str,
    steps: int,
    lr: float,
    every: int,
) -> tuple[float, int]:
    """Train a model until the goal is reached; return its mean IoU and the steps taken."""
    optimizer = build_optimizer(model.train(), "adamw", lr=lr)
    schedule = build_schedule("cosine", total=steps, warmup=20)
    torch.manual_seed(0)  # of dropout
    miou = 0.0
    for step in range(1, steps + 1):
        set_lr(optimizer, schedule(step - 1))
        train_step(
            model, criterion, optimizer, [(images, masks)], clip_norm=5.0, recompute=True,
        )  # fmt: skip
        if step % every == 0 or step == steps:
            miou = score(model, images, masks, num_classes)
            print(f"{name}: step {step}, mIoU {miou:.3f}", file=sys.stderr, flush=True)
            if miou > GOAL:
                break
    return miou, step


@torch.no_grad()
def score(model: torch.nn.Module, images: Tensor, masks: Tensor, num_classes: int) -> float:
    """Return the mean IoU over true and predicted classes; the model's state stays."""
    before = {key: x.clone() for key, x in model.named_buffers()}
    reestimate_batchnorm(model, [images])
    predicted = classes_of(model.eval()(images)["out"])
    for key, buffer in model.train().named_buffers():
        buffer.copy_(before[key])
    return scores(confusion_matrix(predicted, masks, num_classes)).miou or 0.0


def main() -> None:
    """Print one line per model, and progress to stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON per model")
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs and masks")
    parser.add_argument("--cfg", nargs="+", default=NAMES, help="configurations to train")
    parser.add_argument("--size", type=int, default=96, help="side of the crops")
    parser.add_argument("--steps", type=int, default=600, help="at most")
    parser.add_argument("--every", type=int, default=20, help="steps between scores")
    parser.add_argument("--lr", type=float, default=5e-4, help="AdamW's learning rate")
    options = parser.parse_args()
    images, masks, num_classes = crops(options.data, options.size)
    for name in options.cfg:
        result = overfit(
            name,
            images,
            masks,
            num_classes,
            steps=options.steps,
            lr=options.lr,
            every=options.every,
        )
        if options.json:
            print(json.dumps(asdict(result)), flush=True)
        else:
            print(
                f"{result.name:<24}mIoU {result.miou:.3f}  {result.steps:>4} steps  "
                f"{result.seconds:7.0f} s  {'reached' if result.reached else 'NOT REACHED'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
