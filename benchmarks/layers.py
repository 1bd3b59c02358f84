"""Layers of ``segkit.models.kernels`` against PyTorch's, forward and backward.

    python -m benchmarks.layers [--json] [--rounds 25] [--threads 2]

In channels_last, fp32 and bf16 (if the CPU has it): a depthwise convolution of 5 x 5, of sizes that
EfficientNet-B5 has in images of 256 x 256; squeeze and excitation; a 3 x 3 convolution of an
upsampled map, of sizes that UNet++ has. Times are in milliseconds per pass.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation

from benchmarks import Figure, arguments, bf16, clock_for, show, take_turns
from segkit.models.backbones.stages import GlobalAverage
from segkit.models.kernels.depthwise import DepthwiseConv2d
from segkit.models.kernels.doubled import conv_doubled

PASSES, BATCH = 3, 2
Layer = Callable[[Tensor], Tensor]


def depthwise(kind: type[nn.Conv2d], channels: int, dtype: torch.dtype) -> Layer:
    """Return a depthwise convolution of 5 x 5."""
    conv = kind(channels, channels, 5, padding=2, groups=channels, bias=False)
    return conv.to(dtype=dtype, memory_format=torch.channels_last)


def squeeze(average: nn.Module, channels: int, dtype: torch.dtype) -> Layer:
    """Return squeeze and excitation with a sixteenth of the channels."""
    layer = SqueezeExcitation(channels, channels // 16)
    layer.avgpool = average
    return layer.to(dtype=dtype, memory_format=torch.channels_last)


def doubled(
    convolve: Callable[[Tensor, Tensor], Tensor], channels: int, dtype: torch.dtype
) -> Layer:
    """Return a convolution with as many output as input channels."""
    weight = nn.Parameter(torch.randn(channels, channels, 3, 3, dtype=dtype) / channels)
    return lambda x: convolve(x, weight)


def resized(x: Tensor, weight: Tensor) -> Tensor:
    """Upsample the map, then convolve it."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)


CASES = {
    "depthwise 5 x 5": (
        *(depthwise, DepthwiseConv2d, nn.Conv2d),
        [(1824, 8), (1056, 16), (384, 32)],
    ),
    "squeeze and excitation": (
        *(squeeze, GlobalAverage(), nn.AdaptiveAvgPool2d(1)),
        [(1024, 16), (240, 64)],
    ),
    "3 x 3 of a doubled map": (*(doubled, conv_doubled, resized), [(64, 64), (256, 16)]),
}
"""A function that builds a layer, its arguments on each side, and channels and sides of maps."""


def passes(layer: Layer, channels: int, size: int, dtype: torch.dtype) -> Callable[[], object]:
    """Return a function that runs the layer forward and backward, three times."""
    x = torch.randn(BATCH, channels, size, size, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()

    def run() -> None:
        for _ in range(PASSES):
            y = layer(x * 1)  # as after another layer, which takes a gradient of any layout
            y.backward(y.detach())

    return run


def figures(rounds: int, threads: int) -> Iterator[Figure]:
    """Yield each layer in each size and precision."""
    torch.set_num_threads(threads)
    dtypes = [torch.float32, *filter(None, [bf16()])]
    for name, (build, ours, theirs, shapes) in CASES.items():
        for channels, size in shapes:
            for dtype in dtypes:
                sides = (
                    passes(build(how, channels, dtype), channels, size, dtype)
                    for how in (ours, theirs)
                )
                turns = take_turns(*sides, rounds=rounds, warm_up=1, clock=clock_for(threads))
                reached = (1e3 * side / PASSES for side in (turns.ours, turns.theirs))
                about = f"{name}, {channels} x {size} x {size}, {str(dtype)[6:]}"
                yield Figure(
                    about, "PyTorch", torch.__version__, *turns[:2], threads, *reached, unit="ms"
                )


if __name__ == "__main__":
    options = arguments(__doc__ or "").parse_args()
    show(figures(options.rounds, options.threads), as_json=options.json)
