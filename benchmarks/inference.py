"""Inference against the libraries whose models these are.

    python -m benchmarks.inference [--json] [--rounds 10] [--threads 2] [--case NAME ...]
        [--size 256] [--amp]

The models of ``benchmarks.step``, on two images in inference mode. Ours is the pass of the
:class:`Predictor` that ``infer.py`` builds: BatchNorm fused into the convolutions, channels_last,
and on CUDA a graph of the shape. GFLOP/s are computed as there.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks import Figure, clock_for, matmul_rate, show, take_turns
from benchmarks.peers import logits_of
from benchmarks.step import (
    BATCH,
    CASES,
    ON_CPU,
    Case,
    batch,
    chosen,
    flops,
    model_arguments,
    ours,
    rates,
)
from segkit.core.config import IMAGENET_MEAN, IMAGENET_STD
from segkit.inference.predictor import Predictor
from segkit.models.kernels.fuse_relu import for_prediction

Pass = Callable[[], object]


def our_pass(
    case: Case, size: int, amp: torch.dtype | None, device: str, *, images: int = BATCH
) -> Pass:
    """Return this library's pass from normalized images to logits of their size."""
    predict = Predictor(
        for_prediction(ours(case, device).eval(), amp),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        amp=amp,
        channels_last=True,
    )
    pixels, _ = batch(size, device, images)
    return torch.inference_mode()(lambda: predict._logits(pixels))


def their_pass(
    case: Case,
    size: int,
    amp: torch.dtype | None,
    device: str,
    *,
    images: int = BATCH,
    layout: torch.memory_format = torch.contiguous_format,
    without_aux: bool = False,
) -> Pass:
    """Return the peer's pass; ``layout`` and ``without_aux`` are what an informed user adds."""
    with torch.device(device):
        model = case.theirs().eval().to(memory_format=layout)
    for name in ("aux_classifier", "auxiliary_head"):  # torchvision's, transformers'
        if without_aux and hasattr(model, name):
            setattr(model, name, None)
    return _pass(model, batch(size, device, images)[0], amp, layout)


def _pass(
    model: nn.Module, pixels: Tensor, amp: torch.dtype | None, layout: torch.memory_format
) -> Pass:
    @torch.inference_mode()
    def run() -> object:
        with torch.autocast(pixels.device.type, dtype=amp, enabled=amp is not None):
            outputs = model(pixels.contiguous(memory_format=layout))
            return logits_of(outputs, pixels.shape[-2:])

    return run


def figures(
    rounds: int,
    threads: int,
    *,
    names: Sequence[str] = ON_CPU,
    size: int = 256,
    amp: torch.dtype | None = None,
    device: str = "cpu",
) -> Iterator[Figure]:
    """Yield each model against the library it is compared with."""
    torch.set_num_threads(threads)
    rate = matmul_rate(amp or torch.float32, device)
    for name in names:
        case = CASES[name]
        if not (version := case.version()):
            continue
        turns = take_turns(
            our_pass(case, size, amp, device),
            their_pass(case, size, amp, device),
            rounds=rounds,
            warm_up=1,
            clock=clock_for(threads, device),
        )
        work = flops(case, size, training=False)
        reached = rates(work, turns, rate, device)
        about = f"inference, {name}, {size}, {'bf16' if amp else 'fp32'}"
        yield Figure(about, case.package, version, *turns[:2], threads, *reached)


if __name__ == "__main__":
    options = model_arguments(__doc__ or "").parse_args()
    show(figures(options.rounds, options.threads, **chosen(options)), as_json=options.json)
