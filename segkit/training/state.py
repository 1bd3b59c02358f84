"""The state of a training: what ``last.pt`` holds, and what a resumed one goes on from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from segkit.core import checkpoint
from segkit.core.errors import CheckpointError
from segkit.models.segmenter import Segmenter
from segkit.training.optim import EMA


@dataclass
class TrainState:
    """Everything of a training that changes from step to step.

    Args:
        model: Without any wrapper.
        optimizer: Of the model's parameters.
        scaler: Of the gradients; enabled for fp16 only.
        ema: The moving average of the model, if there is one.
        init: Digest of the weights that the training began with.
        step: Optimizer steps taken.
        seconds: Time spent training, evaluations included.
        top: (score, epoch) of the checkpoints that are kept, from best to worst.
        bad_in_row: Steps without a finite gradient since the last one with one.
        bad_steps: All steps without a finite gradient.
    """

    model: Segmenter
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    ema: EMA | None = None
    init: str = ""
    step: int = 0
    seconds: float = 0.0
    top: list[tuple[float, int]] = field(default_factory=list)
    bad_in_row: int = 0
    bad_steps: int = 0

    @property
    def averaged(self) -> nn.Module:
        """The model to evaluate: the moving average, if there is one."""
        return self.model if self.ema is None else self.ema.model

    def advance(self, finite: bool) -> None:
        """Count a step, and update the moving average if the step had a finite gradient."""
        self.step += 1
        if finite:
            self.bad_in_row = 0
            if self.ema is not None:
                self.ema.update(self.model)
        else:
            self.bad_in_row += 1
            self.bad_steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the entries of ``last.pt``, :data:`segkit.core.checkpoint.RESUME`."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "init": self.init,
            "step": self.step,
            "seconds": self.seconds,
            "top": [list(pair) for pair in self.top],
            "bad_in_row": self.bad_in_row,
            "bad_steps": self.bad_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any], path: Path) -> None:
        """Take the state of ``last.pt``.

        Args:
            state: Its entries.
            path: The file, for errors.

        Raises:
            CheckpointError: The state is of another model or optimizer.
        """
        checkpoint.check_weights(self.model, state["model"], path)
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            if state["ema"] is None:
                raise CheckpointError(f"{path}: has no moving average, which train.ema asks for")
            checkpoint.check_weights(self.ema.model, state["ema"]["model"], path)
            self.ema.load_state_dict(state["ema"])
        _load_optimizer(self.optimizer, self.scaler, state, path)
        self.init, self.step, self.seconds = state["init"], state["step"], state["seconds"]
        self.top = [(score, epoch) for score, epoch in state["top"]]
        self.bad_in_row, self.bad_steps = state["bad_in_row"], state["bad_steps"]


def _load_optimizer(
    optimizer: Optimizer, scaler: torch.amp.GradScaler, state: Mapping[str, Any], path: Path
) -> None:
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
    """Return whether two groups of an optimizer are equal but for the step's learning rate."""
    return all(
        theirs[key] == value for key, value in mine.items() if key not in ("params", "lr")
    ) and isinstance(theirs["lr"], float)
