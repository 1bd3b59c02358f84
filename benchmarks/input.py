"""Input: the cache against decoding, and steps fed by the loader against steps on one batch.

    python -m benchmarks.input [--json] [--rounds 25] [--device cpu] [--workers 8] [--size 512]

Reading is of 512 x 512 photographs with ten COCO polygons each. An epoch trains on crops of
256 x 256 with ``data.workers`` 0 and 2, and is compared with the same steps on one batch that never
changes: 1.0 is an input pipeline that costs nothing.

With ``--device cuda`` the steps are those of UNet++ on ResNet-34, 16 crops of 512 x 512, fed by
``--workers`` with the augmentations of the shipped configuration ``swin``, rendered on the CPU and
on the model's device (``augment.device``). The loader alone comes first, in images per second.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import Figure, alternate, arguments, ratio_of, show, take_turns
from benchmarks.step import CASES, our_step
from segkit import build_loss, build_model, build_optimizer, train_step
from segkit.augment import Pipeline
from segkit.core.backend import cudnn_autotuning
from segkit.data import CachedSource, CocoSource, Source
from segkit.data.loader import TrainImages, TrainOrder, train_batches
from segkit.training.step import autocast_dtype

SIZE, IMAGES, BATCH = 512, 16, 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def operations(crop: int) -> list[dict[str, Any]]:
    """Return the augmentations of the contest's configurations, with crops of this side."""
    return [
        {"name": "scale", "range": [0.5, 2.0]},
        {"name": "rotate", "degrees": [-180, 180], "p": 0.5},
        {"name": "crop", "size": [crop, crop], "max_class_share": 0.75},
        {"name": "hflip"},
        {"name": "photometric"},
    ]


def write_set(folder: Path) -> CocoSource:
    """Write photographs of smooth colors and fine texture, with polygons of forty corners."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(IMAGES):
        coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 16, 16))).float()
        pixels = nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic")[0]
        pixels += torch.from_numpy(rng.normal(0, 12, (3, SIZE, SIZE))).float()
        photograph = pixels.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(photograph).save(folder / f"{i}.jpg", quality=90)
        images.append({"id": i, "file_name": f"{i}.jpg", "height": SIZE, "width": SIZE})
        for _ in range(10):
            angles = np.sort(rng.uniform(0, 2 * np.pi, 40))
            radius, center = rng.uniform(20, 120), rng.uniform(100, SIZE - 100, 2)
            outline = center + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": i,
                    "category_id": int(rng.integers(1, 11)),
                    "iscrowd": 0,
                    "area": float(radius**2 * np.pi),
                    "segmentation": [outline.clip(0, SIZE).ravel().tolist()],
                }
            )
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 11)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "set.json").write_text(json.dumps(content))
    return CocoSource(annotations=str(folder / "set.json"))


def read_all(source: Source) -> Callable[[], int]:
    """Return a function that reads all bytes of all images and masks, mapped files too."""

    def run() -> int:
        pairs = ((source.image(i), source.mask(i)) for i in range(len(source)))
        return sum(int(image.sum()) + int(mask.sum()) for image, mask in pairs)

    return run


def trainer() -> Callable[[tuple[Tensor, Tensor]], None]:
    """Return a training step of a small model, which takes more than 0.2 seconds on a CPU."""
    model = build_model("resnet18_half", {"name": "upernet", "width": 64}, num_classes=11).train()
    criterion = build_loss(["cross_entropy", "dice"], num_classes=11)
    optimizer = build_optimizer(model, "sgd", lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        train_step(
            model, criterion, optimizer, [batch], amp=None, scaler=scaler, clip_norm=None,
            recompute=True,
        )  # fmt: skip

    return step


def epoch(source: Source, workers: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return the steps of an epoch fed by the pipeline, and as many on one batch."""
    step = trainer()
    pipeline = Pipeline(operations(SIZE // 2), size=None, mean=MEAN, std=STD)
    indices = list(range(len(source)))
    images = TrainImages(source, indices, pipeline, seed=0)
    order = TrainOrder(indices, epochs=10**6, batch_size=BATCH, accumulate=1, seed=0)
    batches = train_batches(images, order, workers=workers, device=torch.device("cpu"))
    fixed = next(batches)

    def fed() -> None:
        for _ in range(order.steps_per_epoch):
            step(next(batches))

    def still() -> None:
        for _ in range(order.steps_per_epoch):
            step(fixed)

    return fed, still


def feed(
    source: Source, *, size: int, batch: int, workers: int, device: str, render: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an endless iterator of augmented batches on a device."""
    pipeline = Pipeline(operations(size), size=None, mean=MEAN, std=STD)
    indices = list(range(len(source)))
    images = TrainImages(source, indices, pipeline, seed=0, render=render)
    order = TrainOrder(indices, epochs=10**6, batch_size=batch, accumulate=1, seed=0)
    return iter(train_batches(images, order, workers=workers, device=torch.device(device)))


def fed_steps(
    device: str,
    size: int = SIZE,
    *,
    case: str = "UNet++ ResNet-34",
    batch: int = IMAGES,
    workers: int = 8,
    steps: int = 40,
    rounds: int = 2,
) -> Iterator[Figure]:
    """Yield the rates of steps and of the loader alone, for each device that can augment."""
    amp = autocast_dtype("auto", torch.device(device))
    step = our_step(CASES[case], size, amp, device, images=batch, recompute="off")
    with tempfile.TemporaryDirectory() as root, cudnn_autotuning(True):
        source = CachedSource(write_set(Path(root)), Path(root, "cache"), limit=1e9)
        for where in ("cpu", "model"):
            render = where == "cpu"
            batches = feed(
                source, size=size, batch=batch, workers=workers, device=device, render=render
            )
            # The workers prepare up to 4 batches each while other sides are measured.
            seconds = turns(step, batches, steps=steps, rounds=rounds, ahead=4 * workers + 2)
            del batches  # ends the workers
            fed, fixed, alone = (
                rounds * steps * batch / sum(seconds[side]) for side in ("fed", "fixed", "alone")
            )
            middle, low, high = ratio_of(seconds["fixed"], seconds["fed"])
            about = f"{case}, {batch} x {size}, {workers} workers, augment.device={where}"
            yield Figure(
                f"fed steps, {about}", "one batch", "", middle, (low, high), 1, fed, fixed, alone,
                "images/s; the last is the loader alone",
            )  # fmt: skip


def turns(
    step: Callable[..., object], batches: Iterator, *, steps: int, rounds: int, ahead: int
) -> dict[str, list[float]]:
    """Return the seconds of steps on new batches, of as many on one batch, and of batches alone."""
    fixed = next(batches)

    def run(side: str) -> None:
        for _ in range(steps):
            given = fixed if side == "fixed" else next(batches)
            if side != "alone":
                step(*given)

    step(*fixed)
    seconds: dict[str, list[float]] = {"fed": [], "fixed": [], "alone": []}
    for _ in range(rounds):
        for side, taken in seconds.items():
            if side != "fixed":
                drain(batches, ahead)
            taken += alternate({side: partial(run, side)}, rounds=1, warm_up=0)[side]
    return seconds


def drain(batches: Iterator, number: int) -> None:
    """Take batches and throw them away."""
    for _ in range(number):
        next(batches)


def figures(rounds: int) -> Iterator[Figure]:
    """Yield reading, and epochs."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        plain = write_set(Path(root))
        cached = CachedSource(plain, Path(root, "cache"), limit=1e9)
        ratio, spread, *_ = take_turns(read_all(cached), read_all(plain), rounds=rounds)
        yield Figure("read an image and its mask", "JPEG and COCO", "", ratio, spread, 1)
        for workers in (0, 2):
            fed, still = epoch(cached, workers)
            ratio, spread, *_ = take_turns(fed, still, rounds=max(3, rounds // 5), warm_up=1)
            yield Figure(f"an epoch, {workers} workers", "one batch", "", ratio, spread, 1)


if __name__ == "__main__":
    parser = arguments(__doc__ or "")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--workers", type=int, default=8, help="of the loader, with cuda")
    parser.add_argument("--size", type=int, default=SIZE, help="side of the crops, with cuda")
    options = parser.parse_args()
    if options.device == "cuda":
        show(fed_steps("cuda", options.size, workers=options.workers), as_json=options.json)
    else:
        show(figures(options.rounds), as_json=options.json)
