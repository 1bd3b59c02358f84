"""The state of a training, as ``last.pt`` holds it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from segkit.core import checkpoint
from segkit.core.errors import CheckpointError
from segkit.training.optim import EMA


def restore(
    path: Path,
    state: Mapping[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    ema: EMA | None,
) -> None:
    """Give what learns the state of a run's ``last.pt``.

    Args:
        path: The file, for errors.
        state: Its entries, :data:`segkit.core.checkpoint.RESUME`.
        model: Without any wrapper.
        optimizer: Of the model.
        scaler: Of the gradients.
        ema: The average of the model, if the run has one.

    Raises:
        CheckpointError: The state is of another model or optimizer.
    """
    checkpoint.check_weights(model, state["model"], path)
    model.load_state_dict(state["model"])
    if ema is not None:
        if state["ema"] is None:
            raise CheckpointError(f"{path}: has no moving average, which train.ema asks for")
        checkpoint.check_weights(ema.model, state["ema"]["model"], path)
        ema.load_state_dict(state["ema"])
    before = [{**group} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        same = all(map(_same_settings, before, optimizer.param_groups)) and all(
            tensor.is_floating_point() and tensor.shape == (() if name == "step" else weight.shape)
            for weight, tensors in optimizer.state.items()
            for name, tensor in tensors.items()
        )
        same &= len({frozenset(tensors) for tensors in optimizer.state.values()}) <= 1
    # PyTorch reads the entries as they come, and a file may hold anything in their place.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: its optimizer or scaler cannot be read ({e!r:.200})") from e
    if not same:
        raise CheckpointError(f"{path}: its optimizer is of another model, or has other settings")


def _same_settings(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two groups of an optimizer are equal but for the step's learning rate."""
    return all(
        theirs[key] == value for key, value in mine.items() if key not in ("params", "lr")
    ) and isinstance(theirs["lr"], float)
