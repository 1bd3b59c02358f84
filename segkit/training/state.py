"""The training state: saved in ``last.pt``, and loaded when a run is resumed."""

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
from segkit.training.optim import EMA, WindowMean

_PLAIN = ("init", "step", "seconds", "bad_in_row", "bad_steps")


@dataclass
class TrainState:
    """Everything in a training that changes from step to step.

    Args:
        model: The model without DDP or other wrappers.
        scaler: Gradient scaler; enabled for fp16 only.
        ema: The moving average of the model, if there is one.
        window: The mean of the last weights before an evaluation, if there is one.
        init: Digest of the initial weights.
        step: Number of optimizer steps taken.
        seconds: Time spent training, including evaluations.
        top: (score, epoch) of the checkpoints that are kept, from best to worst.
        bad_in_row: Number of consecutive steps without a finite gradient, up to the last step.
        bad_steps: Number of all steps without a finite gradient.
    """

    model: Segmenter
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    ema: EMA | None = None
    window: WindowMean | None = None
    init: str = ""
    step: int = 0
    seconds: float = 0.0
    top: list[tuple[float, int]] = field(default_factory=list)
    bad_in_row: int = 0
    bad_steps: int = 0

    def averages(self) -> dict[str, nn.Module]:
        """Return the models to evaluate by name: ``last`` or ``ema``, and ``window``."""
        models: dict[str, nn.Module] = {"last": self.model}
        if self.ema is not None:
            models = {"ema": self.ema.model}
        return models if self.window is None else {**models, "window": self.window.model}

    def advance(self, finite: bool) -> None:
        """Count a step, and update the moving average if the step had a finite gradient."""
        self.step += 1
        if finite:
            self.bad_in_row = 0
            if self.ema is not None:
                self.ema.update(self.model)
            if self.window is not None:
                self.window.update(self.model, self.step)
        else:
            self.bad_in_row += 1
            self.bad_steps += 1

    def summary(self) -> dict[str, Any]:
        """Return the best score, its epoch, and the numbers of steps."""
        score, epoch = self.top[0] if self.top else (None, None)
        return {"miou": score, "epoch": epoch, "steps": self.step, "bad_steps": self.bad_steps}

    def state_dict(self) -> dict[str, Any]:
        """Return the entries of ``last.pt``, :data:`segkit.core.checkpoint.RESUME`."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "window": self.window.state_dict() if self.window is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "top": [list(pair) for pair in self.top],
            **{name: getattr(self, name) for name in _PLAIN},
        }

    def load_state_dict(self, state: Mapping[str, Any], path: Path) -> None:
        """Load the state saved in ``last.pt``; errors name its ``path``.

        Raises:
            CheckpointError: The state does not fit the model or the optimizer.
        """
        checkpoint.check_weights(self.model, state["model"], path)
        self.model.load_state_dict(state["model"])
        for name, setting in (("ema", "train.ema"), ("window", "train.average")):
            average, saved = getattr(self, name), state.get(name)
            if average is not None:
                if saved is None:
                    raise CheckpointError(f"{path}: has no average, which {setting} asks for")
                checkpoint.check_weights(average.model, saved["model"], path)
                average.load_state_dict(saved)
        _load_optimizer(self.optimizer, self.scaler, state, path)
        self.top = [(score, epoch) for score, epoch in state["top"]]
        for name in _PLAIN:
            setattr(self, name, state[name])


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
    # PyTorch does not validate the entries, and a damaged file may hold anything.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: its optimizer or scaler cannot be read ({e!r:.200})") from e
    if not same:
        raise CheckpointError(f"{path}: its optimizer is of another model, or has other settings")


def _same_settings(expected: Mapping[str, Any], loaded: Mapping[str, Any]) -> bool:
    """Return whether two parameter groups have equal settings, except for the learning rate."""
    return all(
        loaded[key] == value for key, value in expected.items() if key not in ("params", "lr")
    ) and isinstance(loaded["lr"], float)
