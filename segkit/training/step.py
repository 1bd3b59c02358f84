"""One training step, and the precision it computes in."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from segkit.core.distributed import all_reduce, world_size
from segkit.models.kernels.recompute import recompute_activations
from segkit.training.losses import Criterion, WholeStep


@dataclass(frozen=True)
class Step:
    """What a training step has to tell; tensors, so that asking for them is what waits.

    Args:
        loss: Of the step's batch, over all ranks.
        parts: The loss by its terms.
        gradient_norm: Before clipping.
        finite: Whether the weights moved.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    gradient_norm: Tensor
    finite: bool


def train_step(
    model: nn.Module,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    amp: torch.dtype | None,
    scaler: torch.amp.GradScaler,
    clip_norm: float | None,
    recompute: bool = False,
    seeds: Sequence[int] | None = None,
    exact: bool = False,
) -> Step:
    """Forward, loss and backward over the parts of a batch, then one optimizer step.

    A step whose gradient is not finite leaves weights, optimizer and BatchNorm statistics as they
    were. The gradient is that of all ranks, so all of them decide alike.

    Args:
        model: Plain or DistributedDataParallel; in training mode.
        criterion: Maps (outputs, masks) to (loss, parts).
        optimizer: Holds the model's parameters.
        batches: (images, masks) of each part, on the model's device; see :attr:`Loss.shares` for
            which losses are those of the whole batch.
        amp: Precision of autocast; ``None`` for none.
        scaler: Enabled for fp16 only.
        clip_norm: Largest norm of the gradient.
        recompute: Compute outputs of norms and activations again in backward, to save memory.
        seeds: Of each part's dropout; default: from torch's own generator.
        exact: Pass over the parts twice where a loss needs sums over all of them (Dice and its
            like), so that it is the loss of the whole batch, too.
    """
    saving = recompute_activations if recompute else nullcontext
    statistics = [(buffer, buffer.clone()) for buffer in model.buffers()]
    optimizer.zero_grad(set_to_none=True)
    whole = WholeStep([masks for _, masks in batches]) if len(batches) > 1 else None

    def forward(number: int) -> Any:
        if seeds is not None:
            torch.manual_seed(seeds[number])
        images = batches[number][0]
        with saving(), torch.autocast(images.device.type, amp, enabled=amp is not None):
            return model(images)

    alone = model.no_sync if isinstance(model, DistributedDataParallel) else nullcontext
    if whole is not None and exact and criterion.sharing("sums"):
        seeds = seeds or torch.randint(2**62, (len(batches),)).tolist()
        # Not under no_grad, where attention may take other kernels, which draw another dropout.
        for number, (_, masks) in enumerate(batches):
            with alone():
                criterion.collect(forward(number), masks, whole)
        for buffer, before in statistics:
            buffer.copy_(before)
    values: list[Tensor] = []
    for number, (_, masks) in enumerate(batches):
        with alone() if number < len(batches) - 1 else nullcontext():
            loss, parts = criterion(forward(number), masks, whole)
            scaler.scale(loss / len(batches)).backward()
        values.append(torch.stack([loss.detach(), *parts.values()]))
    value = torch.stack(values).mean(0)
    if criterion.sharing("nothing"):  # each rank has a value of its own
        value = all_reduce(value) / world_size()
    scaler.unscale_(optimizer)
    learning = [one for one in model.parameters() if one.grad is not None]
    norm = get_total_norm([one.grad for one in learning if one.grad is not None], foreach=True)
    finite = bool(norm.isfinite())
    if finite:
        if clip_norm is not None:
            clip_grads_with_norm_(learning, clip_norm, norm, foreach=True)
        scaler.step(optimizer)
    else:
        for buffer, before in statistics:
            buffer.copy_(before)
    scaler.update()
    return Step(value[0], dict(zip(parts, value[1:], strict=True)), norm.detach(), finite)


def precision(amp: str, device: torch.device) -> torch.dtype | None:
    """What ``train.amp`` means on ``device``: bf16, fp16, or ``None`` for full precision.

    ``auto`` is bf16 where the hardware computes in it, else fp16 on CUDA, else full precision.
    """
    if amp == "off":
        return None
    if amp == "bf16":
        return torch.bfloat16
    if amp == "fp16":
        return torch.float16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    if device.type != "cpu":
        return None
    if hasattr(torch.cpu, "get_capabilities"):
        cpu = torch.cpu.get_capabilities()
        fast = cpu.get("amx_bf16") or cpu.get("avx512_bf16") or cpu.get("bf16")
    else:  # torch 2.9
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else None


def recomputes(setting: str, device: torch.device) -> bool:
    """Return whether ``train.recompute`` recomputes on ``device``.

    ``auto`` does on the CPU, where it costs next to nothing, and does not on a GPU, where it costs
    2 to 27 % of a step (on an H200).
    """
    return device.type == "cpu" if setting == "auto" else setting == "on"
