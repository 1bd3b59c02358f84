"""Boundary and object scores of a mask against the prediction of the mask.

    python -m benchmarks.details [--json] [--rounds 25] [--threads 1]

A mask of 11 classes in smooth regions, and one image predicted by MobileNetV2 with a U-Net decoder
(512 x 512), and by the demo's model (128 x 128). ms are the medians of both sides.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import Figure, arguments, clock_for, show, take_turns
from segkit.inference.predictor import Predictor
from segkit.models.segmenter import build_model
from segkit.training.details import DetailCounter

CLASSES = 11
DEMO = "resnet18_half", {"name": "upernet", "width": 32, "aux_width": None}
MODELS = (("mobilenet_v2", "unet", 512), (*DEMO, 128))


def regions(side: int, generator: torch.Generator) -> Tensor:
    """Return a mask of smooth regions, about 24 pixels wide."""
    coarse = torch.rand(1, CLASSES, side // 24, side // 24, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    return smooth.argmax(1)[0].to(torch.uint8)


def figures(rounds: int, threads: int) -> Iterator[Figure]:
    """Yield the time of an image's scores against that of its prediction, for each model."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    for backbone, decoder, side in MODELS:
        predictor = Predictor(build_model(backbone, decoder, num_classes=CLASSES))
        image = torch.randint(0, 256, (3, side, side), generator=generator).to(torch.uint8)
        masks = regions(side, generator), regions(side, generator)
        counter = DetailCounter([0], CLASSES)
        turns = take_turns(
            partial(counter.add, 0, *masks, torch.empty(0)),
            partial(predictor.mask, image),
            rounds=rounds,
            clock=clock_for(threads),
        )
        name, peer = f"boundaries and objects of {side} x {side}", f"prediction, {backbone}"
        seconds = 1000 * turns.ours, 1000 * turns.theirs
        yield Figure(
            name, peer, torch.__version__, *turns[:2], threads, *seconds, unit="ms"
        )  # fmt: skip


if __name__ == "__main__":
    parser = arguments(__doc__ or "")
    parser.set_defaults(threads=1)
    options = parser.parse_args()
    show(figures(options.rounds, options.threads), as_json=options.json)
