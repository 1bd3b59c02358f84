"""The training step, its precision, and its recomputation setting."""

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
    """Result of a training step; values are tensors, so only reading them waits for the device.

    Args:
        loss: Loss of the step's batch, over all ranks.
        parts: The loss of each term, by name.
        gradient_norm: Norm of the gradient before clipping.
        finite: True if the gradient was finite and the weights were updated.
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
    """Run forward, loss and backward over the parts of a batch, then one optimizer step.

    If the gradient is not finite, weights, optimizer and BatchNorm statistics stay unchanged.
    The gradient is that of all ranks, so they all make the same decision.

    Args:
        model: Plain or DistributedDataParallel; in training mode.
        criterion: Maps (outputs, masks) to (loss, parts).
        optimizer: Optimizer of the model's parameters.
        batches: (images, masks) of each part, on the model's device; :attr:`Loss.shares` tells
            which losses equal those of the whole batch.
        amp: Precision of autocast; ``None`` turns autocast off.
        scaler: Gradient scaler; enabled for fp16 only.
        clip_norm: Largest norm of the gradient; ``None`` for no clipping.
        recompute: Recompute outputs of norms and activations in backward, to save memory.
        seeds: Dropout seed of each part; default: torch's own generator.
        exact: Run the forward pass twice if a loss needs sums over all parts (such as Dice), so
            that it equals the loss of the whole batch.
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

    without_sync = model.no_sync if isinstance(model, DistributedDataParallel) else nullcontext
    if whole is not None and exact and criterion.sharing("sums"):
        seeds = seeds or torch.randint(2**62, (len(batches),)).tolist()
        # Not under no_grad: attention could choose another kernel, with different dropout masks.
        for number, (_, masks) in enumerate(batches):
            with without_sync():
                criterion.collect(forward(number), masks, whole)
        for buffer, before in statistics:
            buffer.copy_(before)
    values: list[Tensor] = []
    for number, (_, masks) in enumerate(batches):
        with without_sync() if number < len(batches) - 1 else nullcontext():
            loss, parts = criterion(forward(number), masks, whole)
            scaler.scale(loss / len(batches)).backward()
        values.append(torch.stack([loss.detach(), *parts.values()]))
    value = torch.stack(values).mean(0)
    if criterion.sharing("nothing"):  # the value differs between ranks
        value = all_reduce(value) / world_size()
    scaler.unscale_(optimizer)
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    norm = get_total_norm(gradients, foreach=True)
    finite = bool(norm.isfinite())
    if finite:
        if clip_norm is not None:
            clip_grads_with_norm_(trained, clip_norm, norm, foreach=True)
        scaler.step(optimizer)
    else:
        for buffer, before in statistics:
            buffer.copy_(before)
    scaler.update()
    return Step(value[0], dict(zip(parts, value[1:], strict=True)), norm.detach(), finite)


def precision(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of ``train.amp`` on ``device``: bf16, fp16, or ``None`` for full precision.

    ``auto`` is bf16 where the hardware supports it, else fp16 on CUDA, else full precision.
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
    """Return whether ``train.recompute`` turns recomputation on for ``device``.

    ``auto`` is on for the CPU, where it costs almost nothing, and off for a GPU, where it costs
    2 to 27 % of a step (measured on an H200).
    """
    return device.type == "cpu" if setting == "auto" else setting == "on"
