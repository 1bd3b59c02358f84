"""One training step, one evaluation, and a model from its checkpoint."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from segkit.augment import Pipeline
from segkit.core import checkpoint
from segkit.core.config import Config, parse
from segkit.core.distributed import Progress, all_reduce, rank, world_size
from segkit.core.errors import CheckpointError, ConfigError
from segkit.data.loader import eval_batches
from segkit.data.source import Source
from segkit.models.kernels.recompute import recompute_activations
from segkit.models.segmenter import Segmenter, build_model
from segkit.training.losses import Criterion, WholeStep
from segkit.training.metrics import counts_of, image_matrices
from segkit.training.optim import EMA

Watch = Callable[[int, Tensor, Tensor, Tensor], None]
"""Who looks on during an evaluation: index, predicted mask, true mask, counts (C, 3)."""


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


@dataclass(frozen=True)
class Evaluation:
    """Integer counts of an evaluation, the same on every rank.

    Shape:
        counts: (N, C, 3) int64; for each image and class the pixels right, true and predicted.
        matrix: (C, C) int64, rows truth; the sum over all images.
    """

    names: list[str]
    counts: Tensor
    matrix: Tensor


def predictions(
    predict: Callable[[Tensor], Tensor],
    source: Source,
    indices: Sequence[int],
    *,
    labels: bool,
    batch_size: int = 1,
    workers: int = 0,
    left_out: dict[int, str] | None = None,
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """This rank's share of ``indices``: index, prediction, and with ``labels`` the true mask.

    Args:
        predict: Maps images, (B, 3, H, W) uint8, to masks or probabilities.
        source: The images.
        indices: Which of them.
        labels: Whether to read masks too.
        batch_size: Images of one size predicted together.
        workers: Processes that read images.
        left_out: Takes a sentence for each image that cannot be read; without it the first such
            image is an error.
    """
    for batch in eval_batches(
        source,
        indices,
        labels=labels,
        batch_size=batch_size,
        workers=workers,
        left_out=left_out,
    ):
        truth = batch.masks if batch.masks is not None else [None] * len(batch.indices)
        yield from zip(batch.indices, predict(batch.images), truth, strict=True)


def tally(
    predicted: Iterable[tuple[int, Tensor, Tensor | None]],
    source: Source,
    indices: Sequence[int],
    *,
    device: torch.device,
    description: str = "evaluate",
    watch: Watch | None = None,
) -> Evaluation:
    """Compare masks with labels; every image counts once, however many ranks share them.

    Args:
        predicted: This rank's share: index, predicted mask, true mask.
        source: The images.
        indices: All of them, over all ranks.
        device: Where ranks exchange their counts.
        description: Of the progress bar.
        watch: Called with each image of this rank's share.
    """
    classes = len(source.classes)
    counts = torch.zeros(len(indices), classes, 3, dtype=torch.int64)
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    row = {index: number for number, index in enumerate(indices)}
    share = len(indices[rank() :: world_size()])
    for index, mask, truth in Progress(predicted, description, total=share, unit="image"):
        mask = mask.cpu()
        [found] = image_matrices(mask[None], truth[None], classes)
        counts[row[index]] = counts_of(found)
        matrix += found
        if watch is not None:
            watch(index, mask, truth, counts[row[index]])
    return Evaluation(
        names=[source.names[index] for index in indices],
        counts=all_reduce(counts.to(device)).cpu(),
        matrix=all_reduce(matrix.to(device)).cpu(),
    )


def evaluate(
    predict: Callable[[Tensor], Tensor],
    source: Source,
    indices: Sequence[int],
    *,
    device: torch.device,
    batch_size: int = 1,
    workers: int = 0,
    description: str = "evaluate",
    watch: Watch | None = None,
) -> Evaluation:
    """:func:`tally` of :func:`predictions`; ``predict`` maps images to masks."""
    predicted = predictions(
        predict, source, indices, labels=True, batch_size=batch_size, workers=workers
    )
    return tally(predicted, source, indices, device=device, description=description, watch=watch)


def build_pipeline(config: Config) -> Pipeline:
    """The augmentation of training images that a configuration asks for."""
    data, augment = config.data, config.augment
    return Pipeline(augment.train, size=augment.size, mean=data.mean, std=data.std)


def load_model(path: Path, *, verify: bool = True) -> tuple[Segmenter, Config, dict[str, Any]]:
    """A model from its checkpoint alone, with the configuration it was trained with.

    Args:
        path: A checkpoint of a run, or a soup; of averaged weights and others, the averaged ones.
        verify: Compare the file with its digest first.

    Returns:
        The model in evaluation mode on the CPU, its configuration, and the checkpoint's other
        entries (``classes``, ``score``, ...).
    """
    state = checkpoint.load(path, mmap=True, verify=verify, needs=checkpoint.MODEL)
    config = parse(state["config"], str(path))

    def build() -> Segmenter:
        return build_model(
            config.model.backbone,
            config.model.decoder,
            num_classes=len(state["classes"]),
            freeze_batch_norm=config.model.freeze_batch_norm,
            initialize=False,
        )

    try:
        with torch.device("meta"):  # a model that the file does not hold may be of any size
            checkpoint.check_fit(build(), checkpoint.weights(state), path)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    model = build()
    checkpoint.check_weights(model, checkpoint.weights(state), path)
    model.load_state_dict(checkpoint.weights(state))
    others = {key: value for key, value in state.items() if key not in ("model", "ema")}
    return model.eval(), config, others


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
