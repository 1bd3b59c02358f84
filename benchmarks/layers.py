"""Layers of ``segkit.models.kernels`` against PyTorch's, forward and backward.

    python -m benchmarks.layers [--json] [--rounds 25] [--threads 2] [--device cpu]

In channels_last, fp32 and bf16 (if the CPU has it; on a GPU autocast): a depthwise convolution of
5 x 5, of sizes that EfficientNet-B5 has in images of 256 x 256; squeeze and excitation; a 3 x 3
convolution of a map that is doubled, of sizes that UNet++ has, or resized to 4 times its sides, as
in UPerNet. Two images on the CPU, 16 on a GPU, where only the last two differ from PyTorch's. Times
are in milliseconds per pass.
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
from segkit.models.kernels.resized import conv_resized

PASSES = 3
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


def weighted(
    convolve: Callable[[Tensor, Tensor], Tensor], channels: int, dtype: torch.dtype
) -> Layer:
    """Return a convolution with as many output as input channels."""
    weight = nn.Parameter(torch.randn(channels, channels, 3, 3, dtype=dtype) / channels)
    return lambda x: convolve(x, weight)


def double_first(x: Tensor, weight: Tensor) -> Tensor:
    """Upsample the map, then convolve it."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)


def resize_first(x: Tensor, weight: Tensor) -> Tensor:
    """Resize the map, then convolve it."""
    return F.conv2d(F.interpolate(x, scale_factor=4, mode="bilinear"), weight, padding=1)


def resize_last(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve the map as if it was resized."""
    return conv_resized(x, [4 * side for side in x.shape[2:]], weight)


CASES = {
    "depthwise 5 x 5": (
        *(depthwise, DepthwiseConv2d, nn.Conv2d),
        [(1824, 8), (1056, 16), (384, 32)],
    ),
    "squeeze and excitation": (
        *(squeeze, GlobalAverage(), nn.AdaptiveAvgPool2d(1)),
        [(1024, 16), (240, 64)],
    ),
    "3 x 3 of a doubled map": (*(weighted, conv_doubled, double_first), [(64, 64), (256, 16)]),
    "3 x 3 of a resized map": (*(weighted, resize_last, resize_first), [(128, 16)]),
}
"""A function that builds a layer, its arguments on each side, and channels and sides of maps."""

GPU_SHAPES = {
    "3 x 3 of a doubled map": [(32, 256), (64, 128), (128, 64), (256, 32)],
    "3 x 3 of a resized map": [(512, 32)],
}
"""Channels and sides of maps on a GPU."""


def passes(
    layer: Layer, channels: int, size: int, dtype: torch.dtype, device: str
) -> Callable[[], object]:
    """Return a function that runs the layer forward and backward, three times."""
    x = torch.randn(2 if device == "cpu" else 16, channels, size, size, dtype=dtype, device=device)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()

    def run() -> None:
        for _ in range(PASSES):
            with torch.autocast(device, dtype, enabled=device != "cpu" and dtype.itemsize == 2):
                y = layer(x * 1)  # as after another layer, which takes a gradient of any layout
            y.backward(y.detach())

    return run


def figures(rounds: int, threads: int, device: str = "cpu") -> Iterator[Figure]:
    """Yield each layer in each size and precision."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True
    for name, (build, ours, theirs, shapes) in CASES.items():
        on_device = shapes if device == "cpu" else GPU_SHAPES.get(name, [])
        for channels, size in on_device:
            for dtype in [torch.float32, *filter(None, [bf16(device)])]:
                with torch.device(device):
                    weights = dtype if device == "cpu" else torch.float32  # autocast
                    layers = [build(how, channels, weights) for how in (ours, theirs)]
                sides = (passes(layer, channels, size, dtype, device) for layer in layers)
                turns = take_turns(
                    *sides, rounds=rounds, warm_up=1, clock=clock_for(threads, device)
                )
                reached = (1e3 * side / PASSES for side in (turns.ours, turns.theirs))
                about = f"{name}, {channels} x {size} x {size}, {str(dtype)[6:]}"
                yield Figure(
                    about, "PyTorch", torch.__version__, *turns[:2], threads, *reached, unit="ms"
                )


if __name__ == "__main__":
    parser = arguments(__doc__ or "")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    show(figures(options.rounds, options.threads, options.device), as_json=options.json)
