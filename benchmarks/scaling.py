"""Two ranks of one thread against one rank of one thread, with the same batch per rank.

    python -m benchmarks.scaling [--json] [--rounds 10] [--size 256] [--sync-batch-norm]

UPerNet on ResNet-18, two images per rank, gloo. Two processes alternate between three kinds of
step: rank 0 alone, both without exchange, and both with DistributedDataParallel as ``train.py``
wraps it. The ratio is the images per second of two ranks over those of one; without exchange it is
what the machine allows. The last figure is the share of the gradient exchange that overlaps with
backward (from a profile of one step).
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile

from benchmarks import Figure, arguments, show
from segkit.models.kernels.sync_batch_norm import convert_sync_batch_norm
from segkit.models.segmenter import build_model
from segkit.training.losses import build_loss
from segkit.training.optim import build_optimizer
from segkit.training.step import train_step

RANKS, BATCH, CLASSES = 2, 2, 11


def stepper(size: int, *, exchange: bool, sync_batch_norm: bool = False) -> Callable[[], object]:
    """Return a training step of this rank, with or without exchange of gradients."""
    model = build_model("resnet18", {"name": "upernet", "width": 256}, num_classes=CLASSES)
    model = model.to(memory_format=torch.channels_last).train()
    if sync_batch_norm:
        convert_sync_batch_norm(model, torch.device("cpu"))
    criterion = build_loss(["cross_entropy"], num_classes=CLASSES)
    if not exchange:
        criterion.eval()  # in training a loss sums over the ranks
    optimizer = build_optimizer(model, "adamw", lr=1e-4)
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if exchange else model
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    generator = torch.Generator().manual_seed(dist.get_rank())
    images = torch.randn(BATCH, 3, size, size, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    masks = torch.randint(CLASSES, (BATCH, size, size), generator=generator)
    return lambda: train_step(
        net, criterion, optimizer, [(images, masks)], amp=None, scaler=scaler, clip_norm=None,
        recompute=True,
    )  # fmt: skip


def rank(
    number: int, store: str, result: str, rounds: int, size: int, sync_batch_norm: bool
) -> None:
    """Run one of the two processes; the first writes the result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=number, world_size=RANKS)
    alone = stepper(size, exchange=False)
    together = stepper(size, exchange=True, sync_batch_norm=sync_batch_norm)
    rows = []
    for turn in range(-1, rounds):
        seconds = []
        for step, ranks in ((alone, 1), (alone, RANKS), (together, RANKS)):
            dist.barrier()
            start = time.perf_counter()
            if number < ranks:
                step()
            dist.barrier()
            seconds.append(time.perf_counter() - start)
        if turn >= 0:
            rows.append(seconds)
    with profile() as trace:
        together()
    if number == 0:
        torch.save({"seconds": rows, "hidden": hidden(trace)}, result)
    dist.destroy_process_group()


def hidden(trace: profile) -> float:
    """Return the share of the exchanges' time before backward's last operation ends."""
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in trace.events()]
    exchanges = [(start, end) for name, start, end in spans if name == "gloo:all_reduce"]
    last = max(end for name, _, end in spans if name.endswith("Backward0") or "Backward" in name)
    inside = sum(max(0, min(end, last) - start) for start, end in exchanges)
    return inside / sum(end - start for start, end in exchanges)


def figures(rounds: int, size: int, sync_batch_norm: bool) -> Iterator[Figure]:
    """Yield the throughput, the machine's own, and the overlap."""
    with tempfile.TemporaryDirectory() as folder:
        store, result = f"{folder}/store", Path(folder, "result.pt")
        torch.multiprocessing.spawn(
            rank, (store, str(result), rounds, size, sync_batch_norm), nprocs=RANKS
        )
        measured = torch.load(result)
    peer = "one rank"
    limits = [RANKS * alone / both for alone, both, _ in measured["seconds"]]
    ratios = [RANKS * alone / joined for alone, _, joined in measured["seconds"]]
    limit = statistics.median(limits)
    for name, values in (("two, no exchange", limits), ("two, DDP", ratios)):
        low, middle, high = statistics.quantiles(values, n=4)
        name += ", synchronized BatchNorm" if sync_batch_norm and values is ratios else ""
        yield Figure(
            f"images/s, {size}: {name}", peer, torch.__version__, middle, (low, high), 1,
            middle, 1.0, limit, "times",
        )  # fmt: skip
    share = measured["hidden"]
    yield Figure("exchange inside backward", "all of it", "", share, (share, share), 1)


if __name__ == "__main__":
    parser = arguments(__doc__ or "", rounds=10)
    parser.add_argument("--sync-batch-norm", action="store_true", help="as train.py's default")
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    options = parser.parse_args()
    show(figures(options.rounds, options.size, options.sync_batch_norm), as_json=options.json)
