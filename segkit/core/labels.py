"""The size of an image, and the labels in a mask: the value of ignored pixels, and a check."""

from torch import Tensor

from segkit.core.errors import DataError

IGNORE = 255
"""Mask value that losses and metrics ignore."""

Size = tuple[int, int]
"""Height and width of an image in pixels."""


def check_labels(target: Tensor, num_classes: int) -> None:
    """Raise an error if a target has a value that is neither a class nor ``IGNORE``.

    On a GPU this waits for the device. So the losses call it on the CPU only; elsewhere they are
    infinite for such a target, and :func:`segkit.train_step` calls it if the gradient is not
    finite.

    Raises:
        DataError: The message has the value.
    """
    invalid = (target >= num_classes) & (target != IGNORE)
    if target.dtype.is_signed:
        invalid |= target < 0
    if invalid.any():
        raise DataError(
            f"target holds {int(target[invalid][0])}; expected a class, 0 to {num_classes - 1}, or "
            f"{IGNORE} for ignored pixels"
        )
