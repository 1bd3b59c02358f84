"""Build the model, loss and optimizer that a configuration describes."""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from segkit.core import distributed
from segkit.core.config import Config
from segkit.core.errors import ConfigError
from segkit.models.kernels.sync_batch_norm import convert_sync_batch_norm
from segkit.models.lora import add_lora
from segkit.models.segmenter import build_model
from segkit.training.losses import Criterion, build_loss
from segkit.training.optim import EMA, build_optimizer
from segkit.training.state import TrainState
from segkit.training.step import autocast_dtype, move_model, should_recompute


def build_training(
    cfg: Config,
    num_classes: int | None,
    device: torch.device,
    *,
    weights: str | None = None,
    initialize: bool = True,
) -> tuple[TrainState, Criterion]:
    """Return the training state before the first step, and the loss.

    ``num_classes`` is None while it is not known. Weights that are not loaded are initialized;
    ``initialize`` is False if a checkpoint will replace all of them.
    """
    model = build_model(
        cfg.model.backbone,
        cfg.model.decoder,
        num_classes=num_classes or 2,
        weights=weights,
        freeze_batch_norm=cfg.model.freeze_batch_norm,
        freeze=cfg.model.freeze,
        seed=cfg.train.seed,
        initialize=initialize,
    )
    if cfg.model.lora:
        seed, alpha = cfg.train.seed, cfg.model.lora_alpha
        add_lora(model, rank=cfg.model.lora, alpha=alpha, seed=seed)
    move_model(model, device, channels_last=cfg.train.channels_last)
    if cfg.train.sync_batch_norm:
        convert_sync_batch_norm(model, device)
    criterion = build_loss(
        cfg.loss.terms, aux_weight=cfg.loss.aux_weight, num_classes=num_classes,
        teacher_terms=cfg.loss.teacher_terms if cfg.data.teacher is not None else (),
        teacher_weight=cfg.loss.teacher_weight,
    ).to(device)  # fmt: skip
    if cfg.optim.lr is None or cfg.optim.backbone_lr_factor is None:
        raise ConfigError("optim.lr: is null; expected a number, as defaults.set_rates sets it")
    optimizer = build_optimizer(
        model, cfg.optim.optimizer, lr=cfg.optim.lr,
        backbone_lr_factor=cfg.optim.backbone_lr_factor, layer_decay=cfg.optim.layer_decay,
    )  # fmt: skip
    fp16 = autocast_dtype(cfg.train.amp, device) is torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=fp16)
    ema = EMA(model, decay=cfg.train.ema) if cfg.train.ema is not None else None
    return TrainState(model, optimizer, scaler, ema), criterion


def step_options(cfg: Config, device: torch.device) -> dict[str, Any]:
    """Return the arguments of :func:`segkit.training.step.train_step` set by the configuration."""
    return {
        "amp": autocast_dtype(cfg.train.amp, device),
        "clip_norm": cfg.optim.clip_norm,
        "recompute": should_recompute(cfg.train.recompute, device),
        "exact": cfg.train.accumulate_exact,
    }


def parallelize(model: nn.Module, cfg: Config, device: torch.device) -> nn.Module:
    """Return the model, compiled if configured, in DistributedDataParallel if there are ranks."""
    if cfg.train.compile:
        model.compile()
    if distributed.world_size() == 1:
        return model
    return DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def losses_per_micro_batch(criterion: Criterion, cfg: Config) -> list[str]:
    """Return the names of the losses that are computed on each micro-batch separately."""
    sums = [] if cfg.train.accumulate_exact else criterion.accumulated("two_pass")
    return [*sums, *criterion.accumulated("mean")]


def dropout_seeds(cfg: Config, step: int) -> list[int]:
    """Return a dropout seed for each micro-batch of this rank; no random state is saved.

    Micro-batches are numbered over all ranks: 4 on one rank use the same seeds as 2 on each of two
    ranks.
    """
    world_size, rank = distributed.world_size(), distributed.rank()
    numbers = range(cfg.train.accumulate)
    return [mix(cfg.train.seed, step, number * world_size + rank) for number in numbers]


def mix(*numbers: int) -> int:
    """Return one seed computed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
