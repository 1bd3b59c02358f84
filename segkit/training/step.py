"""The training step, its precision, and its recomputation setting."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from segkit.core.distributed import all_reduce, world_size
from segkit.models.kernels.recompute import recompute_activations
from segkit.training.losses import Criterion
from segkit.training.pixels import StepTotals

MicroBatch = tuple[Tensor, Tensor]
"""Images and masks: a micro-batch, which is computed at once."""


@dataclass(frozen=True)
class StepResult:
    """Result of a training step; values are tensors, so only reading them waits for the device."""

    loss: Tensor  # of the step's batch, over all ranks
    terms: dict[str, Tensor]  # the loss of each term, by name
    gradient_norm: Tensor  # before clipping
    finite: bool  # the gradient was finite and the weights were updated


def train_step(
    model: nn.Module,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    batch: MicroBatch | Sequence[MicroBatch],
    *,
    amp: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    clip_norm: float | None = None,
    recompute: bool = False,
    seeds: Sequence[int] | None = None,
    exact: bool = False,
    teacher: Callable[[Tensor], Tensor] | None = None,
) -> StepResult:
    """Run forward, loss and backward over the micro-batches, then one optimizer step.

    If the gradient is not finite, weights, optimizer and BatchNorm statistics stay unchanged.
    The gradient is that of all ranks, so they all make the same decision.

    Args:
        model: Plain or DistributedDataParallel; in training mode.
        criterion: The loss, from :func:`segkit.build_loss`.
        optimizer: Optimizer of the model's parameters.
        batch: (images, masks) on the model's device, or a sequence of such micro-batches,
            whose gradients are averaged; :attr:`Loss.accumulation` tells which losses equal those
            of the whole batch.
        amp: Precision of autocast; ``None`` turns autocast off.
        scaler: Gradient scaler, for fp16.
        clip_norm: Largest norm of the gradient; ``None`` for no clipping.
        recompute: Recompute outputs of norms and activations in backward, to save memory.
        seeds: Dropout seed of each micro-batch; default: torch's own generator.
        exact: Run the forward pass twice if a loss needs sums over all micro-batches (such as
            Dice), so that it equals the loss of the whole batch.
        teacher: Returns the soft labels (B, C, H, W) of a micro-batch's images, for losses of them.

    Raises:
        DataError: The masks have an invalid label.
    """
    micro_batches = cast(list[MicroBatch], [batch] if isinstance(batch[0], Tensor) else list(batch))
    recompute_context = recompute_activations if recompute else nullcontext
    statistics = _Statistics(model)
    optimizer.zero_grad(set_to_none=True)
    totals = None
    if len(micro_batches) > 1:
        totals = StepTotals([masks for _, masks in micro_batches])

    def forward(number: int) -> Any:
        if seeds is not None:
            torch.manual_seed(seeds[number])
        images = micro_batches[number][0]
        with recompute_context(), torch.autocast(images.device.type, amp, enabled=amp is not None):
            return model(images)

    def soft_labels(number: int) -> Tensor | None:
        return None if teacher is None else teacher(micro_batches[number][0])

    without_sync = model.no_sync if isinstance(model, DistributedDataParallel) else nullcontext
    if totals is not None and exact and criterion.accumulated("two_pass"):
        seeds = seeds or torch.randint(2**62, (len(micro_batches),)).tolist()
        # Not under no_grad: attention could choose another kernel, with different dropout masks.
        for number, (_, masks) in enumerate(micro_batches):
            soft = soft_labels(number)
            with without_sync():
                criterion.collect(forward(number), masks, totals, soft)
        statistics.restore()
    values: list[Tensor] = []
    for number, (_, masks) in enumerate(micro_batches):
        with without_sync() if number < len(micro_batches) - 1 else nullcontext():
            soft = soft_labels(number)  # first, while nothing of the forward pass is held
            outputs = forward(number)
            loss, terms = criterion.with_terms(outputs, masks, totals, soft)
            scaled = loss / len(micro_batches)
            (scaled if scaler is None else scaler.scale(scaled)).backward()
        values.append(torch.stack([loss.detach(), *terms.values()]))
    value = torch.stack(values).mean(0)
    if criterion.accumulated("mean"):  # the value differs between ranks
        value = all_reduce(value) / world_size()
    norm, finite = _update(model, optimizer, scaler, clip_norm)
    if not finite:
        statistics.restore()
        for _, masks in micro_batches:
            criterion.check_labels(outputs, masks)
    return StepResult(value[0], dict(zip(terms, value[1:], strict=True)), norm, finite)


def _update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    clip_norm: float | None,
) -> tuple[Tensor, bool]:
    """Step the optimizer if the gradient is finite.

    Return (gradient norm before clipping, True if it is finite).

    A fused optimizer decides on the device: it reads the attribute ``found_inf``, which a
    GradScaler sets too. So the only value that the CPU waits for is copied before the optimizer's
    work is queued, and a GPU does that work while the CPU queues the next step.
    """
    if scaler is not None:
        scaler.unscale_(optimizer)
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    norm = get_total_norm(gradients, foreach=True)
    finite = norm.isfinite()
    read = _copy_to_cpu(finite)
    if clip_norm is not None:
        clip_grads_with_norm_(trained, clip_norm, norm, foreach=True)
    scaled = scaler is not None and scaler.is_enabled()
    # Without state, a skipped step would leave SGD's new momentum uninitialized.
    if optimizer.state and not scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif read():
        optimizer.step() if scaler is None else scaler.step(optimizer)
    if scaler is not None:
        scaler.update()
    return norm.detach(), read()


def _copy_to_cpu(x: Tensor) -> Callable[[], bool]:
    """Begin to copy a boolean; the returned function waits for the copy, not for later work."""
    if x.device.type != "cuda":
        return lambda: bool(x)
    copy = x.to("cpu", non_blocking=True)
    event = torch.cuda.current_stream(x.device).record_event()

    def read() -> bool:
        event.synchronize()
        return bool(copy)

    return read


class _Statistics:
    """Snapshot of BatchNorm buffers, concatenated per device and dtype to save kernel launches."""

    def __init__(self, model: nn.Module) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for module in model.modules():
            if isinstance(module, _NormBase) and module.training:
                for x in (module.running_mean, module.running_var, module.num_batches_tracked):
                    if x is not None:
                        groups.setdefault((x.device, x.dtype), []).append(x)
        self.saved = [(x, torch.cat([buffer.view(-1) for buffer in x])) for x in groups.values()]

    def restore(self) -> None:
        """Set the buffers to the saved values."""
        for buffers, saved in self.saved:
            parts = saved.split([buffer.numel() for buffer in buffers])
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))


def move_model(model: nn.Module, device: str | torch.device, *, channels_last: bool) -> None:
    """Move a model to a device and a memory format."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(device).to(memory_format=layout)


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of ``train.amp`` on ``device``: bf16, fp16, or ``None`` for full precision.

    ``auto`` is bf16 where the hardware supports it, else fp16 on CUDA, else full precision.
    """
    fixed = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if amp in fixed:
        return fixed[amp]
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


def should_recompute(setting: str, device: torch.device) -> bool:
    """Return whether ``train.recompute`` turns recomputation on for ``device``.

    ``auto`` is on for the CPU, where it costs almost nothing, and off for a GPU, where it costs
    2 to 27 % of a step (measured on an H200).
    """
    return device.type == "cpu" if setting == "auto" else setting == "on"
