"""Optimizers, learning rate schedules, and the moving average of weights."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from segkit.core.config import Component, bind, build
from segkit.core.errors import ConfigError
from segkit.models.backbones.depth import depths

NO_DECAY = ("relative_position_bias_table", "layer_scale", "logit_scale", "cpb_mlp")
"""Name parts of parameters that have more than one axis but no weight decay.

0 is no meaningful target for them. The authors of Swin exempt the same parameters, including the
network that computes position biases (``cpb_mlp``).
"""


def adamw(
    groups: Iterable[dict[str, Any]],
    *,
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> AdamW:
    """Return Adam with decoupled weight decay.

    Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101

    Args:
        weight_decay: Share of a weight that a step removes, relative to ``lr``.
        betas: Decay of the averages of the gradient and of its square.
        eps: Added to the denominator.
    """
    return AdamW(groups, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=True)


def sgd(
    groups: Iterable[dict[str, Any]],
    *,
    lr: float,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> SGD:
    """Return stochastic gradient descent with momentum.

    Args:
        weight_decay: Coefficient of the weights that is added to the gradient.
        momentum: Decay of the sum of gradients.
        nesterov: Use Nesterov's momentum.
    """
    return SGD(
        groups, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, fused=True
    )


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": adamw, "sgd": sgd}


def build_optimizer(
    model: nn.Module,
    optimizer: Component | str = "adamw",
    *,
    lr: float,
    backbone_lr_factor: float = 1.0,
    decoder_lr_factor: float = 1.0,
    layer_decay: float = 1.0,
) -> Optimizer:
    """Build an optimizer of the parameters that require gradients.

    Args:
        model: Parameters under ``backbone`` are the backbone's, all others the decoder's.
        optimizer: A name of :data:`OPTIMIZERS`, or ``{"name": ..., arguments}``.
        lr: Peak learning rate; each group stores its own as ``base_lr``.
        backbone_lr_factor: Factor on ``lr`` for the backbone.
        decoder_lr_factor: Factor on ``lr`` for the decoder.
        layer_decay: Factor on the rate of each layer of the backbone for the layer before it. Of n
            layers, layer i (from 0) has the factor ``layer_decay ** (n - i)``, and norms of the
            feature maps 1. Bao et al. 2021, https://arxiv.org/abs/2106.08254

    Raises:
        ConfigError: All parameters are frozen, or the backbone does not list its stages.

    Parameters of at most one axis (biases, norms) and :data:`NO_DECAY` have no weight decay.
    """
    factors = {"backbone": backbone_lr_factor, "decoder": decoder_lr_factor}
    below: dict[str, int] = {}  # how many layers below the decoder each parameter is
    if layer_decay != 1:
        known, count = depths(model.get_submodule("backbone"))
        below = {f"backbone.{name}": count - depth for name, depth in known.items()}
    groups: dict[tuple[str, int, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "backbone" if name.startswith("backbone.") else "decoder"
            decays = parameter.dim() > 1 and not any(part in name for part in NO_DECAY)
            groups.setdefault((part, below.get(name, 0), decays), []).append(parameter)
    if not groups:
        raise ConfigError("model.freeze: no parameter is left to train; freeze less")
    described = []
    for (part, layers, decays), parameters in sorted(groups.items()):
        base_lr = lr * factors[part] * layer_decay**layers
        group = {"params": parameters, "lr": base_lr, "base_lr": base_lr, "part": part}
        described.append(group if decays else {**group, "weight_decay": 0.0})
    return build(OPTIMIZERS, optimizer, "optim.optimizer", groups=described, lr=lr)


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Set the learning rate of every group to ``factor`` times its ``base_lr``."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


# A schedule is a pure function of the progress, 0 at the end of the warm-up and 1 at the last step
# and after it; it returns the factor on the learning rate.

WARMUP_START = 0.1
"""Factor at the first step of a warm-up, from which it rises linearly to 1."""


def cosine(progress: float, *, min_factor: float = 0.0) -> float:
    """Return half a cosine from 1 to ``min_factor``.

    Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983

    Args:
        min_factor: Factor on the learning rate at the last step.
    """
    return _half_cosine(progress, 1.0, min_factor)


def poly(progress: float, *, power: float = 0.9, min_factor: float = 0.0) -> float:
    """Return ``(1 - progress) ** power``, scaled to fall from 1 to ``min_factor``.

    Chen et al. 2017, https://arxiv.org/abs/1606.00915

    Args:
        power: Exponent; 1 is linear.
        min_factor: Factor on the learning rate at the last step.
    """
    return min_factor + (1 - min_factor) * (1 - progress) ** power


def constant(progress: float) -> float:
    """Return 1 after the warm-up."""
    return 1.0


def cosine_restarts(
    progress: float,
    *,
    periods: tuple[float, ...] = (3.0, 5.0),
    peaks: tuple[float, ...] = (1.0, 0.3),
    min_factor: float = 0.0,
) -> float:
    """Return several half cosines in sequence.

    Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983

    Args:
        periods: Lengths of the periods, relative to each other.
        peaks: Factor at the start of each period.
        min_factor: Factor at the end of each period.
    """
    if len(periods) != len(peaks) or not periods or min(periods) <= 0:
        raise ConfigError("periods, peaks: expected lists of equal length, every period above 0")
    at = progress * sum(periods)
    for period, peak in zip(periods[:-1], peaks, strict=False):
        if at < period:
            return _half_cosine(at / period, peak, min_factor)
        at -= period
    return _half_cosine(min(1.0, at / periods[-1]), peaks[-1], min_factor)


SCHEDULES: dict[str, Callable[..., float]] = {
    "cosine": cosine,
    "poly": poly,
    "constant": constant,
    "cosine_restarts": cosine_restarts,
}


def build_schedule(
    schedule: Component | str, *, total: int, warmup: int = 0
) -> Callable[[int], float]:
    """Build a function that maps a step to the factor on the learning rate.

    Args:
        schedule: A name of :data:`SCHEDULES`, or ``{"name": ..., arguments}``.
        total: Number of steps of the whole run.
        warmup: Number of warm-up steps among them.

    Raises:
        ConfigError: A factor is outside 0..1.
    """
    path = "optim.schedule"
    make = bind(SCHEDULES, schedule, path, given=("progress",))

    def factor(step: int) -> float:
        if step < warmup:
            return WARMUP_START + (1 - WARMUP_START) * step / warmup
        return make(min(1.0, (step - warmup) / max(1, total - warmup)))

    for step in (warmup, *range(0, total + 1, max(1, total // 100))):
        try:
            value = factor(step)
        except ConfigError as error:
            raise ConfigError(f"{path}.{error}") from error
        except ArithmeticError as error:
            raise ConfigError(f"{path}: returns no number at step {step} ({error})") from error
        if not 0 <= value <= 1:
            raise ConfigError(
                f"{path}: factor on the learning rate is {value:g} at step {step}; expected 0 to 1"
            )
    return factor


class EMA:
    """Exponential moving average of a model's weights; ``model`` is the averaged model.

    Args:
        model: The trained model, without DDP or other wrappers.
        decay: Share of the average that an update keeps; smaller in the first updates:
            ``min(decay, (1 + t) / (10 + t))`` at update t, counted from 0.

    Buffers are copied: BatchNorm's statistics are averages already, and others are integers.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.999) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    def update(self, model: nn.Module) -> None:
        """Update the average with ``model``'s weights, after an optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        _blend(self.model, model, 1 - decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state needed to continue exactly."""
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state returned by :meth:`state_dict`."""
        self.updates = state["updates"]
        self.model.load_state_dict(state["model"])


class WindowMean:
    """Mean of a model's weights after each of the last steps before an evaluation; ``model`` is it.

    Latest weight averaging (LAWA): Sanyal et al. 2023, https://arxiv.org/abs/2306.03241; a window
    of 1 % of the steps: Ajroldi et al. 2025, https://arxiv.org/abs/2502.06761

    Args:
        model: The trained model, without DDP or other wrappers.
        window: Number of steps; no more than ``every`` are used.
        every: Steps between evaluations.
        total: Number of steps of the whole run; the last is evaluated.

    Departs from the papers: as the steps of evaluations are known, the weights after each step of
    the window are summed, rather than some checkpoints held in a queue. Buffers are copied.
    """

    def __init__(self, model: nn.Module, *, window: int, every: int, total: int) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.window, self.every, self.total = window, every, total
        self.end = self.updates = 0

    def update(self, model: nn.Module, step: int) -> None:
        """Add ``model``'s weights after a step, counted from 1, if it is in a window."""
        end = min(-(-step // self.every) * self.every, self.total)
        if step <= end - self.window:
            return
        if end != self.end:
            self.end, self.updates = end, 0
        self.updates += 1
        _blend(self.model, model, 1 / self.updates)

    def ends_at(self, step: int) -> bool:
        """Return True if the mean is that of the window that ends with this step."""
        return self.updates > 0 and self.end == step

    def state_dict(self) -> dict[str, Any]:
        """Return the state needed to continue exactly."""
        return {"end": self.end, "updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state returned by :meth:`state_dict`."""
        self.end, self.updates = state["end"], state["updates"]
        self.model.load_state_dict(state["model"])


@torch.no_grad()
def _blend(averaged: nn.Module, model: nn.Module, share: float) -> None:
    """Move an average by a share of the way to the weights of ``model``, and copy its buffers.

    torch's own optimizers use the same ``_foreach`` functions: a few kernels for all tensors.
    """
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), share)
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for old, new in zip(averaged.buffers(), model.buffers(), strict=True):
        group = groups.setdefault(new.dtype, ([], []))
        group[0].append(old)
        group[1].append(new)
    for targets, sources in groups.values():
        torch._foreach_copy_(targets, sources)


def _half_cosine(progress: float, high: float, low: float) -> float:
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2
