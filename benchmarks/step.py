"""A training step against the libraries whose models these are.

    python -m benchmarks.step [--json] [--rounds 10] [--threads 2] [--case NAME ...]
        [--size 256] [--amp] [--memory] [--versus peer]

A step is forward, cross-entropy at the image's size, backward and AdamW, on two images. Both sides
are the same network (``tests/test_parity.py`` compares outputs) with the same auxiliary heads, loss
and precision; ours is ``segkit.train_step`` in channels_last, as ``train.py`` runs it, theirs is
what their users write. GFLOP/s are the multiply-adds of the peer's convolutions and matrix products
(backward: twice those of forward), two FLOP each, in a side's time, and the machine's rate for
large matrix products of that precision. In places ours computes fewer.

``--memory`` measures the peak of two steps in a new process, with weights, gradients and the
optimizer's moments. ``--versus keeping`` compares our step that recomputes activations with one
that keeps them, ``--versus eager`` a compiled step (``train.compile``) with one that is not.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import segkit
from benchmarks import (
    Figure,
    Turns,
    arguments,
    bf16,
    clock_for,
    matmul_rate,
    peak_memory,
    show,
    take_turns,
    version_of,
)
from benchmarks.peers import (
    CLASSES,
    SMP,
    beit_l,
    eomt_l,
    loss_of,
    mask2former,
    segformer_b5,
    smp,
    torchvision,
    upernet,
)
from segkit.core.config import Component
from segkit.models.segmenter import build_model
from segkit.training.losses import build_loss
from segkit.training.optim import build_optimizer
from segkit.training.step import should_recompute, train_step

BATCH = 2


@dataclass(frozen=True)
class Case:
    """A model of this library and the same model of a peer.

    Args:
        backbone: Our backbone.
        decoder: Our decoder.
        package: The peer.
        theirs: Builds the peer's model.
        aux_weight: Coefficient of both sides' auxiliary heads.
        loss: Our loss; that of the peer is the same.
        needs: Other packages that the peer's model needs.
    """

    backbone: Component | str
    decoder: Component | str
    package: str
    theirs: Callable[[], nn.Module]
    aux_weight: float = 0.4
    loss: str = "cross_entropy"
    needs: tuple[str, ...] = ()

    def version(self) -> str | None:
        """Return the peer's version; ``None``, and a line on stderr, if a package is missing."""
        versions = [version_of(package) for package in (self.package, *self.needs)]
        return versions[0] if all(versions) else None


of_queries = partial(Case, package="transformers", loss="mask_classification", needs=("scipy",))

SWIN_L = 192, (2, 2, 18, 2), (6, 12, 24, 48), 12
VIT_L = {"name": "vit_l_dinov3", "output": "tokens", "omitted_blocks": 4}

CASES = {
    "UNet++ EfficientNet-B0": Case(
        {"name": "efficientnet_b0", "like": "smp"},
        "unetplusplus",
        SMP,
        partial(smp, "UnetPlusPlus", "efficientnet-b0"),
    ),
    "UNet++ EfficientNet-B5": Case(
        {"name": "efficientnet_b5", "like": "smp"},
        "unetplusplus",
        SMP,
        partial(smp, "UnetPlusPlus", "efficientnet-b5"),
    ),
    "UNet++ ResNet-34": Case(
        "resnet34", "unetplusplus", SMP, partial(smp, "UnetPlusPlus", "resnet34")
    ),
    "DeepLabV3+ SE-ResNet-152": Case(
        {"name": "se_resnet152", "output_stride": 16},
        "deeplabv3plus",
        SMP,
        partial(smp, "DeepLabV3Plus", "se_resnet152"),
    ),
    "UPerNet Swin-T": Case(
        "swin_t",
        "upernet",
        "transformers",
        partial(upernet, 96, (2, 2, 6, 2), (3, 6, 12, 24)),
    ),
    "UPerNet Swin-B": Case(
        "swin_b",
        "upernet",
        "transformers",
        partial(upernet, 128, (2, 2, 18, 2), (4, 8, 16, 32)),
    ),
    "UPerNet Swin-L window 12": Case(
        {"name": "swin_l", "window": 12},
        "upernet",
        "transformers",
        partial(upernet, *SWIN_L),
    ),
    "FCN ResNet-50": Case(
        {"name": "resnet50", "output_stride": 8},
        "fcn",
        "torchvision",
        partial(torchvision, "fcn_resnet50"),
    ),
    "SegFormer MiT-B5": Case(
        "mit_b5", {"name": "segformer", "width": 768}, "transformers", segformer_b5
    ),
    "UPerNet BEiT-L": Case(
        {"name": "beit_l", "window": 32}, {"name": "upernet", "width": 1024}, "transformers", beit_l
    ),
    "Mask2Former Swin-L window 12": of_queries(
        {"name": "swin_l", "window": 12}, "mask2former", theirs=partial(mask2former, *SWIN_L)
    ),
    "EoMT DINOv3 ViT-L": of_queries(
        VIT_L, {"name": "eomt", "rotary": True}, theirs=partial(eomt_l, masked=False)
    ),
    "EoMT DINOv3 ViT-L, masked": of_queries(
        VIT_L,
        {"name": "eomt", "rotary": True, "annealing": 10**9},
        theirs=partial(eomt_l, masked=True),
    ),
}


LARGE = (
    "UPerNet Swin-L window 12",
    "SegFormer MiT-B5",
    "UPerNet BEiT-L",
    "Mask2Former Swin-L window 12",
    "EoMT DINOv3 ViT-L",
    "EoMT DINOv3 ViT-L, masked",
)
ON_CPU = tuple(name for name in CASES if name not in LARGE)
"""Cases that are measured on a CPU by default."""


def batch(size: int, device: str, images: int = BATCH) -> tuple[Tensor, Tensor]:
    """Return normalized images and their masks."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, size, size, generator=generator)
    masks = torch.randint(CLASSES, (images, size, size), generator=generator)
    return pixels.to(device), masks.to(device)


def ours(case: Case, device: str) -> nn.Module:
    """Return this library's model."""
    with torch.device(device):
        model = build_model(case.backbone, case.decoder, num_classes=CLASSES)
    return model.to(memory_format=torch.channels_last)


Step = Callable[..., object]
"""A training step; called with images and masks, it trains on these."""


def our_step(
    case: Case,
    size: int,
    amp: torch.dtype | None,
    device: str,
    *,
    images: int = BATCH,
    compiled: bool = False,
    recompute: str = "auto",
) -> Step:
    """Return this library's step, as ``train.py`` runs it."""
    model = ours(case, device).train()
    if compiled:
        model.compile()
    criterion = build_loss([case.loss], num_classes=CLASSES, aux_weight=case.aux_weight)
    criterion.to(device)
    optimizer = build_optimizer(model, "adamw", lr=1e-4)
    scaler = torch.amp.GradScaler(device, enabled=False)
    saving = should_recompute(recompute, torch.device(device))
    given = batch(size, device, images)

    def step(pixels: Tensor = given[0], masks: Tensor = given[1]) -> object:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return train_step(
            model, criterion, optimizer, [(pixels, masks.to(torch.uint8))], amp=amp, scaler=scaler,
            clip_norm=None, recompute=saving,
        )  # fmt: skip

    return step


def their_step(
    case: Case,
    size: int,
    amp: torch.dtype | None,
    device: str,
    *,
    images: int = BATCH,
    compiled: bool = False,
    layout: torch.memory_format = torch.contiguous_format,
    fused: bool | None = None,
) -> Step:
    """Return the peer's step; ``layout`` and ``fused`` are what an informed user adds."""
    with torch.device(device):
        model = case.theirs().train().to(memory_format=layout)
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    given = batch(size, device, images)

    def step(pixels: Tensor = given[0], masks: Tensor = given[1]) -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype=amp, enabled=amp is not None):
            pixels = pixels.contiguous(memory_format=layout)
            loss = loss_of(model, pixels, masks, aux_weight=case.aux_weight)
        loss.backward()
        optimizer.step()

    return step


SIDES = {
    "peer": (our_step, their_step),
    "keeping": (partial(our_step, recompute="on"), partial(our_step, recompute="off")),
    "eager": (partial(our_step, compiled=True), our_step),
}
"""Both sides, by the name of the second."""


def memory(side: Callable[..., Callable[[], object]], threads: int, *rest: Any) -> None:
    """Run two steps; a new process measures its memory."""
    torch.set_num_threads(threads)
    run = side(*rest)
    for _ in range(2):
        run()


def flops(case: Case, size: int, *, training: bool, images: int = BATCH) -> float:
    """Return the GFLOP of a forward pass of the peer's model."""
    device = "meta" if case.loss == "cross_entropy" else "cpu"  # models of queries read values
    with torch.device(device):
        model, pixels = case.theirs().train(training), torch.zeros(images, 3, size, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixels)
    return counter.get_total_flops() / 1e9


def rates(
    work: float, turns: Turns, limit: float, device: str
) -> tuple[float, float, float | None, str]:
    """Return both sides' rates, the machine's, and the unit: images/s on a GPU."""
    if device == "cuda":
        return BATCH / turns.ours, BATCH / turns.theirs, None, "images/s"
    return work / turns.ours, work / turns.theirs, limit, "GFLOP/s"


def figures(
    rounds: int,
    threads: int,
    *,
    names: Sequence[str] = ON_CPU,
    size: int = 256,
    amp: torch.dtype | None = None,
    measure_memory: bool = False,
    versus: str = "peer",
    device: str = "cpu",
) -> Iterator[Figure]:
    """Yield each model against the library it is compared with."""
    torch.set_num_threads(threads)
    rate = matmul_rate(amp or torch.float32, device)
    for name in names:
        case = CASES[name]
        package = case.package
        if not (version := case.version()):
            continue
        if versus != "peer":
            package, version = "segkit", segkit.__version__
        about = f"step, {name}, {size}, {'bf16' if amp else 'fp32'}"
        if measure_memory:
            used = [
                peak_memory(memory, side, threads, case, size, amp, device, device=device)
                for side in SIDES[versus]
            ]
            ratio = used[1] / used[0]
            about = f"memory, {about}"
            yield Figure(about, package, version, ratio, (ratio, ratio), threads, *used, unit="MiB")
            continue
        mine, theirs = (side(case, size, amp, device) for side in SIDES[versus])
        turns = take_turns(mine, theirs, rounds=rounds, warm_up=1, clock=clock_for(threads, device))
        work = 3 * flops(case, size, training=True)
        reached = rates(work, turns, rate, device)
        yield Figure(about, package, version, *turns[:2], threads, *reached)


def model_arguments(description: str) -> argparse.ArgumentParser:
    """Return the parser of benchmarks that run the cases."""
    parser = arguments(description, rounds=10)
    parser.add_argument("--case", nargs="+", default=list(ON_CPU), choices=CASES)
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("--amp", action="store_true", help="both sides under bf16 autocast")
    return parser


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """Return those options as arguments of ``figures``; no names where bf16 would be emulated."""
    amp = bf16() if options.amp else None
    names = [] if options.amp and amp is None else options.case
    return {"names": names, "size": options.size, "amp": amp}


if __name__ == "__main__":
    parser = model_arguments(__doc__ or "")
    parser.add_argument("--memory", action="store_true", help="peak memory in place of time")
    parser.add_argument("--versus", choices=SIDES, default="peer", help="the other side")
    options = parser.parse_args()
    what = {**chosen(options), "measure_memory": options.memory, "versus": options.versus}
    show(figures(options.rounds, options.threads, **what), as_json=options.json)
