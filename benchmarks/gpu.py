"""Losses, evaluation, training steps and inference on a GPU, for whoever has one.

    python -m benchmarks.gpu [--json] [--rounds 25] [--size 512]

The same comparisons as the scripts of those names, on the first CUDA device. What a side reaches in
steps and passes is images a second.
"""

import sys
from collections.abc import Iterator
from itertools import chain

import torch

from benchmarks import Figure, arguments, evaluation, inference, loss, show, step


def figures(rounds: int, threads: int, size: int) -> Iterator[Figure]:
    """Everything that has a device."""
    torch.backends.cudnn.benchmark = True
    yield from chain(
        loss.figures(rounds, threads, "cuda"), evaluation.figures(rounds, threads, "cuda")
    )
    for amp in (None, torch.bfloat16):
        options = {"size": size, "amp": amp, "device": "cuda"}
        yield from step.figures(rounds, threads, **options)
        yield from step.figures(rounds, threads, measure_memory=True, **options)
        yield from inference.figures(rounds, threads, **options)


if __name__ == "__main__":
    parser = arguments(__doc__ or "")
    parser.add_argument("--size", type=int, default=512, help="side of the images")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA device, and PyTorch finds none here.")
    show(figures(options.rounds, options.threads, options.size), as_json=options.json)
