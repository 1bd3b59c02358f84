"""Export of a model to a file that runs without this library: torch.export or ONNX."""

import importlib.util
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import _meta_registrations, nn
from torch.export import Dim

from segkit.core.errors import SegkitError

EXAMPLE = (2, 161, 193)
"""Batch, height and width of the traced images; all differ, so that none is taken for another."""


def export(model: nn.Module, path: str | Path) -> None:
    """Write the model's evaluation forward pass, for any batch size, height and width.

    A ``.pt2`` file is read by ``torch.export.load(path).module()``, which maps an image to the same
    dict as the model. An ``.onnx`` file has the input ``image`` and the output ``out``. The program
    rejects images smaller than a few pixels of the deepest feature map.

    Args:
        model: A :class:`segkit.models.segmenter.Segmenter`; its training mode is not changed.
        path: File to write, ending in ``.pt2`` or ``.onnx``; an existing file is replaced.

    Raises:
        SegkitError: If ``path`` has another suffix, or packages that ONNX needs are not installed.
    """
    path = Path(path)
    if path.suffix not in (".pt2", ".onnx"):
        raise SegkitError(f"{path}: expected a file name that ends in .pt2 or .onnx")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise SegkitError(
            f"{path}: ONNX needs packages that are not installed; run: "
            f"pip install {' '.join(missing)}"
        )
    training = model.training
    batch, height, width = EXAMPLE
    channels = getattr(model.get_submodule("backbone"), "in_channels", 3)
    image = next(model.parameters()).new_zeros(batch, channels, height, width)
    dynamic = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    try:
        with torch.no_grad(), _any_pooled_size():
            program = torch.export.export(
                model.eval(),
                (image,),
                dynamic_shapes={"image": dynamic},
                prefer_deferred_runtime_asserts_over_guards=True,  # else every guard is an error
            )
    finally:
        model.train(training)
    if path.suffix == ".pt2":
        torch.export.save(program, path)
    else:
        with _any_pooled_size():  # the program is traced again
            torch.onnx.export(program, (), path, output_names=["out"], verbose=False)


@contextmanager
def _any_pooled_size() -> Iterator[None]:
    """Make max pooling traceable for any size, as it is from torch 2.14 on.

    Older versions compute the remainder of a division that ``//`` already rounds down, and so the
    program rejects every size whose remainder differs from the example's.
    """
    if torch.__version__ >= "2.14":
        yield
        return
    original = _meta_registrations.div_rtn
    _meta_registrations.div_rtn = operator.floordiv
    try:
        yield
    finally:
        _meta_registrations.div_rtn = original
