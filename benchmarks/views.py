"""Views against plain forward passes and ttach; soups against reading.

    python -m benchmarks.views [--json] [--rounds 25]

UPerNet on ResNet-18, 11 classes, one photograph on one thread, in processor time. The first peer is
a loop of the bare model over as many inputs of the views' sizes, so 0.95 or more means that a
prediction takes at most 1.05 times its forward passes. The last figure is the time to read and
verify five checkpoints over the time to also average them.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import Figure, arguments, show, take_turns, version_of
from segkit.core import checkpoint
from segkit.inference import soup
from segkit.inference.predictor import Predictor
from segkit.inference.tta import parse_views
from segkit.models.segmenter import build_model

SIZE = (256, 320)
VIEWS = ("flips", "square", "flip_rotate_scale")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def plain(model: nn.Module, views: str, image: Tensor) -> Callable[[], None]:
    """Return forward passes of the bare model on inputs of each view's size."""
    inputs = [
        view.apply(image.float()).contiguous(memory_format=torch.channels_last)
        for view in parse_views(views)
    ]

    @torch.inference_mode()
    def run() -> None:
        for x in inputs:
            model(x)

    return run


def ours(model: nn.Module, views: str, image: Tensor) -> Callable[[], object]:
    """Return the prediction of probabilities merged from the views."""
    predict = Predictor(model, mean=MEAN, std=STD, views=parse_views(views), channels_last=True)
    return lambda: predict.probabilities(image)


def ttach(model: nn.Module, image: Tensor) -> Callable[[], object]:
    """Return the same eight views by ttach, with softmax in place of its mean of sigmoids."""
    import ttach as peer

    class Probabilities(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x)["out"].softmax(1)

    wrapped = peer.SegmentationTTAWrapper(
        Probabilities(), peer.aliases.d4_transform(), merge_mode="mean"
    )
    pixels = (image.float() / 255).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run() -> object:
        return wrapped(pixels)

    return run


def mixing(folder: Path, rounds: int) -> Figure:
    """Return a uniform soup of five checkpoints against reading and verifying them once."""
    paths = [folder / f"{seed}.pt" for seed in range(5)]
    for seed, path in enumerate(paths):
        model = build_model("resnet50", "upernet", num_classes=11, seed=seed)
        about = {"classes": ["a"], "init": "same", "trained_on": []}
        checkpoint.save({"model": model.state_dict(), **about}, path)
    ratio, spread, *_ = take_turns(
        lambda: soup.uniform(paths),
        lambda: [checkpoint.load(path) for path in paths],
        rounds=max(3, rounds // 5),
    )
    return Figure("uniform soup of 5 ResNet-50 UPerNets", "reading them", "", ratio, spread, 1)


def figures(rounds: int) -> Iterator[Figure]:
    """Yield each set of views, then a soup."""
    torch.set_num_threads(1)
    compare = partial(take_turns, rounds=rounds, warm_up=1, clock=time.process_time)
    model = build_model("resnet18", "upernet", num_classes=11).eval()
    model = model.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8, generator=generator)
    for views in VIEWS:
        ratio, spread, *_ = compare(ours(model, views, image), plain(model, views, image))
        yield Figure(f"views: {views}", "plain passes", "", ratio, spread, threads=1)
    if version := version_of("ttach"):
        ratio, spread, *_ = compare(ours(model, "square", image), ttach(model, image))
        yield Figure("views: square", "ttach", version, ratio, spread, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        yield mixing(Path(folder), rounds)


if __name__ == "__main__":
    options = arguments(__doc__ or "").parse_args()
    show(figures(options.rounds), as_json=options.json)
