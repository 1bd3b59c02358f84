"""An evaluation pass against the libraries whose models these are.

    python -m benchmarks.inference [--json] [--rounds 10] [--threads 2] [--case NAME ...]
        [--size 256] [--amp]

The models of ``benchmarks.step``, on two images in inference mode. Ours is as ``infer.py`` runs it:
BatchNorm folded into the convolutions, channels_last. What a side reaches is reckoned as there.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks import Figure, clock_for, matmul_rate, show, take_turns, version_of
from benchmarks.step import CASES, Case, batch, chosen, flops, model_arguments, ours, rates
from segkit.models.kernels.fuse import fuse_batch_norm


def our_pass(case: Case, size: int, amp: torch.dtype | None, device: str) -> Callable[[], object]:
    """This library's side."""
    model = fuse_batch_norm(ours(case, device).eval())
    images = batch(size, device)[0].contiguous(memory_format=torch.channels_last)
    return _inference(model, images, amp)


def their_pass(case: Case, size: int, amp: torch.dtype | None, device: str) -> Callable[[], object]:
    """The peer's side."""
    return _inference(case.theirs().to(device).eval(), batch(size, device)[0], amp)


def _inference(model: nn.Module, images: Tensor, amp: torch.dtype | None) -> Callable[[], object]:
    @torch.inference_mode()
    def run() -> object:
        with torch.autocast(images.device.type, dtype=amp, enabled=amp is not None):
            return model(images)

    return run


def figures(
    rounds: int,
    threads: int,
    *,
    names: Sequence[str] = tuple(CASES),
    size: int = 256,
    amp: torch.dtype | None = None,
    device: str = "cpu",
) -> Iterator[Figure]:
    """Each model against the library it is compared with."""
    torch.set_num_threads(threads)
    rate = matmul_rate(amp or torch.float32, device)
    for name in names:
        case = CASES[name]
        if not (version := version_of(case.package)):
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
