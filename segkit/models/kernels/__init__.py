"""Faster replacements of PyTorch operations, and the devices on which each is used."""

from torch import Tensor

from segkit.core.backend import is_exporting

DEVICES = {
    "conv_doubled": ("cpu", "cuda"),
    "conv_resized": ("cpu", "cuda"),
    "depthwise": ("cpu",),
}
"""The device types on which a kernel was measured and is faster; PyTorch's own form elsewhere."""


def used(kernel: str, x: Tensor) -> bool:
    """Return whether a kernel is used for ``x``; false during export, where sizes are symbolic."""
    return x.device.type in DEVICES[kernel] and not is_exporting()
