"""Training steps, inference, losses, evaluation and input on a GPU, against the peers' best.

    python -m benchmarks.gpu [--json] [--part step compiled inference loss matrix input]
        [--case NAME ...] [--size 512] [--rounds 7] [--batch N] [--documented] [--device cuda]

The models of ``benchmarks.step`` under bf16 autocast, 11 classes. All sides alternate in one
process; cuDNN's autotuning is on in steps and off in inference, for all of them. A peer is used as
an informed user writes it: in channels_last, with fused AdamW, without auxiliary heads in
inference; ``--documented`` adds the peer as its documentation has it.
A ratio is the peer's time over ours, with the quartiles of the rounds.

Each part prints a table. ``off`` and ``on`` are ``train.recompute``. Peak memory is of one side,
with weights, gradients and moments; in inference it is what the allocator reserves. CPU time is
that of a step of two images of half the size, which the device does not limit. The share of the
card's rate is of the multiply-adds of the peer's model, for both sides. A row that fails is
reported on stderr, and the exit code is 1.
"""

import argparse
import gc
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import (
    Figure,
    alternate,
    arguments,
    best_of,
    bf16,
    copy_rate,
    evaluation,
    loss,
    matmul_rate,
    ratio_of,
    version_of,
)
from benchmarks import input as feeding
from benchmarks.inference import our_pass, their_pass
from benchmarks.step import CASES, Case, batch, flops, our_step, their_step
from segkit.core.backend import cudnn_autotuning

BATCHES = {
    "UPerNet Swin-L window 12": 8,
    "UNet++ EfficientNet-B5": 16,
    "UNet++ ResNet-34": 16,
    "DeepLabV3+ SE-ResNet-152": 16,
    "FCN ResNet-50": 16,
    "UPerNet Swin-T": 16,
    "SegFormer MiT-B5": 16,
    "UPerNet BEiT-L": 8,
    "Mask2Former Swin-L window 12": 8,
    "EoMT DINOv3 ViT-L": 8,
    "EoMT DINOv3 ViT-L, masked": 8,
}
"""Images of a training step."""

COMPILED = ("UPerNet Swin-L window 12", "UNet++ EfficientNet-B5")
"""Models of the part ``compiled``: each of its rows takes a minute or two."""

Work = Callable[..., object]
Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """Settings that all rows have in common.

    Args:
        device: ``cuda``, or ``cpu`` to test this script.
        size: Side of the images.
        rounds: Number of measurements of each side.
        amp: Precision of autocast.
        rate: GFLOP/s of a large matrix product of this precision.
        batch: Images of a step and of the larger pass, in place of the rows' own numbers.
        documented: Measure the peer as documented, too.
    """

    device: str
    size: int
    rounds: int
    amp: torch.dtype | None
    rate: float
    batch: int | None = None
    documented: bool = False

    def of(self, case: Case, **options: Any) -> dict[str, Any]:
        """Return the arguments of a side."""
        return {"case": case, "size": self.size, "amp": self.amp, "device": self.device, **options}


def free() -> None:
    """Return the memory of earlier rows."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prepared(
    make: Callable[[], Work], device: str, warm_up: int, *, memory: str = "allocated"
) -> tuple[Work, float | None]:
    """Return a side after ``warm_up`` calls, and its peak memory in GB.

    ``memory`` is ``allocated`` or ``reserved``, which includes the memory of CUDA graphs.
    """
    free()
    start = time.perf_counter()
    key = f"{memory}_bytes.all"
    before = torch.cuda.memory_stats().get(f"{key}.current", 0) if device == "cuda" else 0
    side = make()
    for _ in range(warm_up):
        side()
    if device != "cuda":
        return side, None
    torch.cuda.synchronize()
    print(f"a side was prepared in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    free()
    torch.cuda.reset_peak_memory_stats()
    side()
    torch.cuda.synchronize()
    return side, (torch.cuda.memory_stats()[f"{key}.peak"] - before) / 1e9


def cpu_time(side: Work, setup: Setup) -> float:
    """Return the milliseconds of a step in which the device waits for the CPU."""
    small = batch(max(32, setup.size // 2), setup.device)
    with cudnn_autotuning(False):
        seconds = alternate({"side": lambda: side(*small)}, rounds=5, warm_up=2)["side"]
    return 1e3 * median(seconds)


def launches(side: Work) -> int | None:
    """Return the number of kernels that the CPU launches; a graph is one launch."""
    if not torch.cuda.is_available():
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        side()
        torch.cuda.synchronize()
    events = trace.events()
    assert events is not None
    calls = sum("Launch" in event.name for event in events)
    return calls or sum(event.device_type is DeviceType.CUDA for event in events)


def step(setup: Setup, name: str) -> Row:
    """Measure a training step that recomputes nothing, and one that recomputes activations."""
    case, images = CASES[name], setup.batch or BATCHES[name]
    options = setup.of(case, images=images)
    makers: dict[str, Callable[[], Work]] = {
        "off": partial(our_step, recompute="off", **options),
        "on": partial(our_step, recompute="on", **options),
        "peer": partial(their_step, fused=True, layout=torch.channels_last, **options),
    }
    if setup.documented:
        makers["documented"] = partial(their_step, **options)
    made = {side: prepared(make, setup.device, warm_up=3) for side, make in makers.items()}
    sides = {side: work for side, (work, _) in made.items()}
    seconds = alternate(sides, rounds=setup.rounds, warm_up=1)
    row: Row = {"model": name, "batch": images, "peer": case.package}
    row |= {f"images/s {side}": images / median(took) for side, took in seconds.items()}
    row["peer / off"] = ratio_of(seconds["peer"], seconds["off"])
    row["on / off"] = ratio_of(seconds["on"], seconds["off"])
    row |= {f"GB {side}": peak for side, (_, peak) in made.items()}
    work = 3 * flops(case, setup.size, training=True, images=images)
    for side in ("off", "peer"):
        row[f"ms {side}"] = 1e3 * median(seconds[side])
        row[f"CPU ms {side}"] = cpu_time(sides[side], setup)
        row[f"launches {side}"] = launches(sides[side])
        row[f"of matrix rate {side}"] = work / median(seconds[side]) / setup.rate
    return row


def compiled(setup: Setup, name: str) -> Row:
    """Measure a compiled step against the peer's, and against ours without compilation."""
    torch._dynamo.reset()
    case, images = CASES[name], setup.batch or BATCHES[name]
    options = setup.of(case, images=images)
    peer = partial(their_step, fused=True, compiled=True, layout=torch.channels_last, **options)
    ours = partial(our_step, recompute="off", **options)
    makers = {"ours": partial(ours, compiled=True), "peer": peer, "eager": ours}
    first, sides, peaks = {}, {}, {}
    for side, make in makers.items():

        def timed(make: Callable[[], Work] = make, side: str = side) -> Work:
            work = make()
            first[side] = best_of(work, 1)
            return work

        sides[side], peaks[side] = prepared(timed, setup.device, warm_up=2)
    seconds = alternate(sides, rounds=setup.rounds, warm_up=1)
    row: Row = {"model": name, "batch": images, "peer": case.package}
    row |= {f"images/s {side}": images / median(took) for side, took in seconds.items()}
    row["peer / ours"] = ratio_of(seconds["peer"], seconds["ours"])
    row["eager / ours"] = ratio_of(seconds["eager"], seconds["ours"])
    row |= {f"GB {side}": peak for side, peak in peaks.items()}
    row |= {f"first step, s, {side}": first[side] for side in ("ours", "peer")}
    return row


def inference(setup: Setup, name: str, images: int) -> Row:
    """Measure the pass of a Predictor."""
    case = CASES[name]
    options = setup.of(case, images=images)
    peer = partial(their_pass, layout=torch.channels_last, without_aux=True, **options)
    with cudnn_autotuning(False):
        makers = {"ours": partial(our_pass, **options), "peer": peer}
        if setup.documented:
            makers["documented"] = partial(their_pass, **options)
        # A graph is captured when a shape comes for the third time.
        made = {
            side: prepared(make, setup.device, warm_up=4, memory="reserved")
            for side, make in makers.items()
        }
        sides = {side: work for side, (work, _) in made.items()}
        seconds = alternate(sides, rounds=3 * setup.rounds, warm_up=2)
    row: Row = {"model": name, "batch": images, "peer": case.package}
    row |= {f"ms {side}": 1e3 * median(took) for side, took in seconds.items()}
    row["peer / ours"] = ratio_of(seconds["peer"], seconds["ours"])
    row |= {f"GB {side}": peak for side, (_, peak) in made.items()}
    work = flops(case, setup.size, training=False, images=images)
    for side in ("ours", "peer"):
        row[f"launches {side}"] = launches(sides[side])
        row[f"of matrix rate {side}"] = work / median(seconds[side]) / setup.rate
    return row


def as_row(figure: Figure) -> Row:
    """Return a figure of another script as a row."""
    row = {
        "task": figure.name,
        "peer": figure.peer,
        "ratio": (figure.ratio, *figure.spread),
        "ours": figure.ours,
        "theirs": figure.theirs,
    }
    return row | {"the card's": figure.limit, "unit": figure.unit}


Rows = Iterator[tuple[str, Callable[[], Row | list[Row]]]]


def rows_of(part: str, setup: Setup, names: list[str] | None) -> Rows:
    """Yield the name of each row of a part, and the function that measures it."""
    if part in ("step", "compiled"):
        measure = {"step": step, "compiled": compiled}[part]
        for name in names or (COMPILED if part == "compiled" else BATCHES):
            if CASES[name].version():
                yield name, partial(measure, setup, name)
    elif part == "inference":
        for name in names or BATCHES:
            for images in (1, setup.batch or 16):
                if CASES[name].version():
                    yield f"{name}, batch {images}", partial(inference, setup, name, images)
    else:
        common = 3 * setup.rounds, torch.get_num_threads(), setup.device, setup.size
        figures: Mapping[str, Callable[[], Iterator[Figure]]] = {
            "loss": partial(loss.figures, *common),
            "matrix": partial(evaluation.figures, *common),
            "input": partial(feeding.fed_steps, setup.device, setup.size),
        }
        yield part, lambda: [as_row(figure) for figure in figures[part]()]


PARTS = ("step", "compiled", "inference", "loss", "matrix", "input")


def text(value: Any) -> str:
    """Return a cell of a table."""
    if isinstance(value, tuple):
        middle, low, high = value
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def show_row(part: str, row: Row, *, first: bool, as_json: bool) -> None:
    """Print a row, and before the first row of a part the head of its table."""
    if as_json:
        print(json.dumps({"part": part, **row}), flush=True)
        return
    if first:
        print(f"\n{part}\n\n| {' | '.join(row)} |\n|{' --- |' * len(row)}")
    print(f"| {' | '.join(map(text, row.values()))} |", flush=True)


def run(parts: list[str], setup: Setup, names: list[str] | None, *, as_json: bool) -> bool:
    """Measure and print all rows; return True if none failed."""
    complete = True
    for part in parts:
        first = True
        for name, measure in rows_of(part, setup, names):
            start = time.perf_counter()
            try:
                measured = measure()
                for row in measured if isinstance(measured, list) else [measured]:
                    show_row(part, row, first=first, as_json=as_json)
                    first = False
            except Exception:  # the other rows are still wanted
                complete = False
                print(f"{part}, {name}: failed\n{traceback.format_exc()}", file=sys.stderr)
            free()
            took = time.perf_counter() - start
            print(f"{part}, {name}: {took:.0f} s", file=sys.stderr, flush=True)
    return complete


def machine(device: str, amp: torch.dtype | None) -> Row:
    """Return the device, its rates, and the versions of torch and the peers."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    packages = sorted({CASES[name].package for name in BATCHES} | {"torchmetrics"})
    return {
        "device": name,
        "torch": torch.__version__,
        **{package: version_of(package) for package in packages},
        "precision": str(amp or torch.float32)[6:],
        "copy, GB/s": copy_rate(device),
        "matrix product, TFLOP/s": matmul_rate(amp or torch.float32, device) / 1e3,
        "date": time.strftime("%Y-%m-%d"),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments(__doc__ or "", rounds=7)
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--case", nargs="+", choices=CASES, help="models, in place of the tables'")
    parser.add_argument("--size", type=int, default=512, help="side of the images")
    parser.add_argument("--batch", type=int, help="images, in place of the tables' 8 or 16")
    parser.add_argument("--documented", action="store_true", help="also the peer as documented")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = parse(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and PyTorch finds none here.", file=sys.stderr)
        return 1
    torch.backends.cudnn.benchmark = True
    amp = bf16(options.device)
    about = machine(options.device, amp)
    show_row("machine", about, first=True, as_json=options.json)
    setup = Setup(
        device=options.device,
        size=options.size,
        rounds=options.rounds,
        amp=amp,
        rate=1e3 * about["matrix product, TFLOP/s"],
        batch=options.batch,
        documented=options.documented,
    )
    return 0 if run(options.part, setup, options.case, as_json=options.json) else 1


if __name__ == "__main__":
    sys.exit(main())
