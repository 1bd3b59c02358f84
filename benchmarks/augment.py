"""Augmentation against albumentations, torchvision's transforms.v2 and kornia.

    python -m benchmarks.augment [--json] [--rounds 25] [--parts]

One 512×512 uint8 photograph with its mask becomes a normalized float tensor of 384×384, on one
thread; the libraries alternate, and times are of the processor, not wall clock. A peer that is not
installed is named on stderr and left out. torchvision has no RGB shift and does without.

``--parts`` compares the slowest functions with OpenCV's, on an image of the result's size: sampling
through a rotation (``grid_sample``), and the median of 5×5.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import Figure, arguments, peak_memory, show, take_turns, version_of
from segkit.augment import Pipeline, generator
from segkit.augment.filters import _median
from segkit.augment.geometry import Canvas, rotate, shift_matrix
from segkit.augment.warp import _grid

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SOURCE, RESULT = (512, 512), (384, 384)
SAMPLES = 10  # per measurement, so that random choices average out

Sample = Callable[[int], Any]


def photograph() -> tuple[Tensor, Tensor]:
    """Return smooth colors with fine texture, in ``read_image``'s layout, and a mask of patches."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 16, 16))).float()
    image = F.interpolate(coarse, SOURCE, mode="bicubic")[0]
    image += torch.from_numpy(rng.normal(0, 12, (3, *SOURCE))).float()
    patches = torch.from_numpy(rng.integers(0, 11, (16, 16), dtype=np.uint8))
    mask = patches.repeat_interleave(32, 0).repeat_interleave(32, 1)
    pixels = image.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    return pixels.permute(2, 0, 1), mask


def segkit(p: float, blur: bool) -> Sample:
    """Return this library's side."""
    operations: list[dict[str, Any]] = [
        {"name": "resized_crop", "size": RESULT, "area": (0.25, 1.0)},
        {"name": "rotate", "degrees": (-30.0, 30.0), "p": p},
        {"name": "hflip", "p": p},
        {"name": "brightness", "range": (0.8, 1.2), "p": p},
        {"name": "contrast", "range": (0.8, 1.2), "p": p},
        {"name": "hue", "degrees": (-20.0, 20.0), "p": p},
        {"name": "saturation", "range": (0.7, 1.3), "p": p},
        {"name": "rgb_shift", "levels": (-20.0, 20.0), "p": p},
    ]
    if blur:
        operations += [{"name": "blur", "p": 0.3}, {"name": "median_blur", "p": 0.3}]
    pipeline = Pipeline(operations, size=None, mean=MEAN, std=STD)
    image, mask = photograph()
    return lambda index: pipeline(image, mask, generator(0, 0, index))


def albumentations(p: float, blur: bool) -> Sample:
    """Return albumentations' side, on OpenCV."""
    import albumentations as peer
    import cv2
    from albumentations.pytorch import ToTensorV2

    cv2.setNumThreads(0)
    filters = [peer.Blur((3, 5), p=0.3), peer.MedianBlur((3, 5), p=0.3)] if blur else []
    transform = peer.Compose(
        [
            peer.RandomResizedCrop(RESULT, scale=(0.25, 1.0), p=1),
            peer.Rotate(30, fill_mask=255, p=p),
            peer.HorizontalFlip(p=p),
            peer.RandomBrightnessContrast(0.2, 0.2, p=p),
            peer.HueSaturationValue(p=p),
            peer.RGBShift(p=p),
            *filters,
            peer.Normalize(MEAN, STD),
            ToTensorV2(),
        ],
        seed=0,
    )
    image, mask = photograph()
    pixels, labels = image.permute(1, 2, 0).contiguous().numpy(), mask.numpy()
    return lambda index: transform(image=pixels, mask=labels)


def torchvision(p: float, blur: bool) -> Sample:
    """Return torchvision's side: transforms.v2 on tensors. It has no median blur."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    def maybe(transform: torch.nn.Module, chance: float) -> torch.nn.Module:
        return v2.RandomApply([transform], p=chance)

    filters = [maybe(v2.GaussianBlur(3), 0.3)] if blur else []
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(RESULT, scale=(0.25, 1.0)),
            maybe(v2.RandomRotation(30, v2.InterpolationMode.BILINEAR), p),
            v2.RandomHorizontalFlip(p),
            maybe(v2.ColorJitter(0.2, 0.2, 0.3, 0.055), p),
            *filters,
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    image, mask = photograph()
    pair = tv_tensors.Image(image), tv_tensors.Mask(mask)
    return lambda index: transform(*pair)


def kornia(p: float, blur: bool) -> Sample:
    """Return kornia's side, a batch of one image."""
    import kornia.augmentation as peer

    filters = [peer.RandomBoxBlur((3, 3), p=0.3), peer.RandomMedianBlur((3, 3), p=0.3)]
    transform = peer.AugmentationSequential(
        peer.RandomResizedCrop(RESULT, scale=(0.25, 1.0)),
        peer.RandomRotation(30.0, p=p),
        peer.RandomHorizontalFlip(p=p),
        peer.ColorJiggle(0.2, 0.2, 0.3, 0.055, p=p),
        peer.RandomRGBShift(0.08, 0.08, 0.08, p=p),
        *(filters if blur else []),
        peer.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        data_keys=["input", "mask"],
    )
    image, mask = photograph()
    return lambda index: transform(image[None].float() / 255, mask[None, None].float())


PEERS: dict[str, Callable[[float, bool], Sample]] = {
    "albumentations": albumentations,
    "torchvision": torchvision,
    "kornia": kornia,
}

TASKS = {
    "every operation applied": (1.0, False),
    "each half of the time": (0.5, False),
    "all applied, blur and median at 0.3": (1.0, True),
    "half of the time, blur and median at 0.3": (0.5, True),
}


def several(sample: Sample) -> Callable[[], None]:
    """Return a function that makes a few samples, different ones in each call."""
    turn = iter(range(10**9))

    def run() -> None:
        start = next(turn) * SAMPLES
        for index in range(start, start + SAMPLES):
            sample(index)

    return run


def memory(side: Callable[[float, bool], Sample], p: float, blur: bool) -> None:
    """Make samples; a new process measures its memory."""
    torch.set_num_threads(1)
    several(side(p, blur))()


def figures(rounds: int) -> Iterator[Figure]:
    """Yield each task against each peer that is installed."""
    torch.set_num_threads(1)
    for name, peer in PEERS.items():
        if not (version := version_of(name)):
            continue
        for task, (p, blur) in TASKS.items():
            ours, theirs = several(segkit(p, blur)), several(peer(p, blur))
            turns = take_turns(ours, theirs, rounds=rounds, clock=time.process_time)
            took = turns.ours / SAMPLES * 1e3, turns.theirs / SAMPLES * 1e3
            yield Figure(task, name, version, *turns[:2], 1, *took, unit="ms")
        used = peak_memory(memory, peer, 1.0, False) / peak_memory(memory, segkit, 1.0, False)
        yield Figure("memory, every operation applied", name, version, used, (used, used), 1)


def parts(rounds: int) -> Iterator[Figure]:
    """Yield single functions against OpenCV's, in milliseconds."""
    if not (version := version_of("opencv-python-headless")):
        return
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    image, mask = photograph()
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    turn = rotate(Canvas(SOURCE), generator(0, 0, 0), degrees=(20, 20)).then(shift_matrix(64, 64))
    matrix = (
        shift_matrix(-0.5, -0.5) @ turn.matrix @ shift_matrix(0.5, 0.5)
    )  # OpenCV's pixels are points
    warp = functools.partial(cv2.warpAffine, M=matrix[:2], dsize=RESULT[::-1])
    grid, levels = _grid(turn.matrix, RESULT, image), image.float()
    labels = mask[None].float()
    small = image[:, : RESULT[0], : RESULT[1]]
    small_pixels = small.permute(1, 2, 0).contiguous().numpy()
    sides: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "reading, bilinear": (
            lambda: F.grid_sample(levels[None], grid, align_corners=False),
            lambda: warp(pixels, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP),
        ),
        "reading a mask, nearest": (
            lambda: F.grid_sample(labels[None], grid, mode="nearest", align_corners=False),
            lambda: warp(mask.numpy(), flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP),
        ),
        "median of 5 × 5": (
            lambda: _median(small, 5),
            lambda: cv2.medianBlur(small_pixels, 5),
        ),
    }
    for name, (ours, theirs) in sides.items():
        turns = take_turns(ours, theirs, rounds=rounds, clock=time.process_time)
        took = turns.ours * 1e3, turns.theirs * 1e3
        yield Figure(name, "opencv", version, *turns[:2], 1, *took, unit="ms")


if __name__ == "__main__":
    parser = arguments(__doc__ or "")
    parser.add_argument("--parts", action="store_true", help="single functions")
    options = parser.parse_args()
    measured = parts(options.rounds) if options.parts else figures(options.rounds)
    show(measured, as_json=options.json)
