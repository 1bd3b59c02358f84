"""A network as one file that runs without this library: a torch.export program, or ONNX."""

import importlib.util
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import _meta_registrations, nn
from torch.export import Dim

from segkit.core.errors import SegkitError

EXAMPLE = (2, 3, 161, 193)
"""A shape to trace with; no two sizes are alike, so that none is taken for another."""


def export(model: nn.Module, path: str | Path) -> None:
    """Write what the network does in evaluation, for batches, heights and widths of any size.

    A ``.pt2`` file is read back by ``torch.export.load(path).module()``, which maps an image to
    the same dict as the model. An ``.onnx`` file has the input ``image`` and the output ``out``.
    Images smaller than some cells of the deepest feature map are refused by the program.

    Args:
        model: A :class:`segkit.models.segmenter.Segmenter`; its mode is left as it was.
        path: Ends in ``.pt2`` or ``.onnx``; a file that is there is replaced.

    Raises:
        SegkitError: Another ending, or packages that ONNX needs are not installed.
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
    image = next(model.parameters()).new_zeros(EXAMPLE)
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    try:
        with torch.no_grad(), _any_pooled_size():
            program = torch.export.export(
                model.eval(),
                (image,),
                dynamic_shapes={"image": free},
                prefer_deferred_runtime_asserts_over_guards=True,  # else any guard is an error
            )
    finally:
        model.train(training)
    if path.suffix == ".pt2":
        torch.export.save(program, path)
    else:
        with _any_pooled_size():  # the program is traced once more
            torch.onnx.export(program, (), path, output_names=["out"], verbose=False)


@contextmanager
def _any_pooled_size() -> Iterator[None]:
    """Let a max pooling be traced for any size, as torch 2.14 does by itself.

    Before, torch asks for the remainder of its division, though ``//`` rounds down without it, and
    the program refuses every size that leaves another remainder than the example's.
    """
    if torch.__version__ >= "2.14":
        yield
        return
    before = _meta_registrations.div_rtn
    _meta_registrations.div_rtn = operator.floordiv
    try:
        yield
    finally:
        _meta_registrations.div_rtn = before
