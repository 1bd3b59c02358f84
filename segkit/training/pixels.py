"""Quantities of logits and target that losses share, each computed once and at least in fp32.

On the CPU, and for large batches, they are computed in pieces that fit a cache or bound the memory,
and again in backward. Other batches on a GPU take plain operations on all of the logits: there a
step waits for the launches of kernels, not for memory.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from segkit.core.backend import on_cpu
from segkit.core.distributed import sum_over_ranks, world_size
from segkit.core.labels import IGNORE, check_labels


class StepTotals:
    """Quantities of a whole step that its micro-batches share: pixel counts, and collected sums.

    Args:
        targets: (B, H, W) each, of all micro-batches of this rank.

    Attributes:
        count: (images, 256), pixels of each target value in all images of the step.
        sums: :attr:`Pixels.sums` of each output over all micro-batches and ranks, by the output's
            name and whether they are of soft labels, from :meth:`Criterion.collect`.
    """

    def __init__(self, targets: Sequence[Tensor]) -> None:
        self.micro_batches = len(targets)
        self.count = torch.cat([_count(target) for target in targets])
        self.sums: dict[tuple[str, bool], Tensor] = {}


class Pixels:
    """Logits and target, with the quantities that the losses need, each computed once.

    One logit plane is binary: it is the logit of class 1, and that of class 0 is 0.

    Args:
        logits: (B, C, H, W), any floating type; everything below is at least fp32.
        target: (B, H, W) class indices, uint8 or int64; ``IGNORE`` for ignored pixels.
        across_ranks: Make :meth:`total` sum over the ranks of a distributed run.
        totals: Totals of the step that has these pixels as a micro-batch; None if they are all of
            the step.
        output: Name of the decoder's output.
        smoothed: Also compute :attr:`log_area`.
        soft_labels: (B, C, H, W) probabilities to learn, with two planes if there is one plane of
            logits; default: the target's, 1 for its class.

    Raises:
        ValueError: The shapes do not match.
        DataError: The target has an invalid label; only on the CPU, see :func:`check_labels`.
    """

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        across_ranks: bool = False,
        totals: StepTotals | None = None,
        output: str = "out",
        smoothed: bool = False,
        soft_labels: Tensor | None = None,
    ) -> None:
        if logits.dim() != 4 or target.shape != logits.shape[:1] + logits.shape[2:]:
            raise ValueError(
                f"expected logits (B, C, H, W) and target (B, H, W), "
                f"got {tuple(logits.shape)} and {tuple(target.shape)}"
            )
        self.binary = logits.shape[1] == 1
        self.logits = torch.cat([torch.zeros_like(logits), logits], 1) if self.binary else logits
        if soft_labels is not None and soft_labels.shape != self.logits.shape:
            raise ValueError(
                f"expected soft labels {tuple(self.logits.shape)}, got {tuple(soft_labels.shape)}"
            )
        self._soft_labels = soft_labels
        self.target = target
        self.across_ranks = across_ranks
        self.totals = totals
        self.output = output
        self.smoothed = smoothed
        if on_cpu(target):
            check_labels(target, self.logits.shape[1])

    @cached_property
    def index(self) -> Tensor:
        """(B, H, W) int64: the target; any class where it is no class."""
        return self.target.long().clamp(0, self.logits.shape[1] - 1)

    @cached_property
    def valid(self) -> Tensor:
        """(B, H, W) bool: True where the target is a class."""
        if self.target.dtype.is_signed:
            return self.index == self.target
        return self.target < self.logits.shape[1]

    def guarded(self, loss: Tensor) -> Tensor:
        """Return ``loss``; off the CPU infinite, as is its gradient, if a label is invalid."""
        if on_cpu(self.target):
            return loss
        return loss / (self.valid != (self.target == IGNORE)).all()

    @cached_property
    def _in_pieces(self) -> bool:
        """True on the CPU, and for large batches: :class:`_SoftmaxSums` keeps no large tensor."""
        return on_cpu(self.logits) or self.logits.numel() > _LARGE_PIECE

    @cached_property
    def _softmax_sums(self) -> tuple[Tensor, Tensor, Tensor]:
        return _SoftmaxSums.apply(self.logits, self.index, self.valid, self.smoothed)

    @cached_property
    def _log_softmax(self) -> tuple[Tensor, int]:
        """The log-probabilities, in the logits' memory format, and the axis of the classes."""
        x, axis = self.logits, 1
        if x.stride(1) == 1:  # channels_last
            x, axis = x.permute(0, 2, 3, 1), 3
        return x.log_softmax(axis, dtype=at_least_fp32(x)), axis

    @cached_property
    def log_true(self) -> Tensor:
        """(B, H, W): log-probability of the true class, 0 where ignored."""
        if self._in_pieces:
            return self._softmax_sums[0]
        log_p, axis = self._log_softmax
        log_true = log_p.gather(axis, self.index.unsqueeze(axis)).squeeze(axis)
        return torch.where(self.valid, log_true, 0)

    @cached_property
    def area(self) -> Tensor:
        """(B, C): sum of each class's probability over the valid pixels."""
        if self._in_pieces:
            return self._softmax_sums[1]
        log_p, axis = self._log_softmax
        return (log_p.exp() * self.valid.unsqueeze(axis)).sum((2, 3) if axis == 1 else (1, 2))

    @cached_property
    def log_area(self) -> Tensor:
        """(B, C): sum of each class's log-probability over the valid pixels, if ``smoothed``."""
        if self._in_pieces:
            return self._softmax_sums[2]
        log_p, axis = self._log_softmax
        return (log_p * self.valid.unsqueeze(axis)).sum((2, 3) if axis == 1 else (1, 2))

    @cached_property
    def _class_sums(self) -> tuple[Tensor, Tensor]:
        return _ClassSums.apply(self.log_true, self.index, self.valid, self.logits.shape[1])

    @property
    def intersection(self) -> Tensor:
        """(B, C): sum of the true class's probability over the pixels of each true class."""
        return self._class_sums[0]

    @property
    def count(self) -> Tensor:
        """(B, C): valid pixels of each true class."""
        return self._class_sums[1]

    @cached_property
    def one_hot(self) -> Tensor:
        """(B, C, H, W): 1 for the true class, 0 for other classes and where ignored."""
        planes = torch.zeros_like(self.logits, dtype=at_least_fp32(self.logits))
        return planes.scatter_(1, self.index[:, None], 1.0) * self.valid[:, None]

    @cached_property
    def soft_labels(self) -> Tensor:
        """(B, C, H, W): probabilities to learn, 0 where ignored; without any, :attr:`one_hot`."""
        if self._soft_labels is None:
            return self.one_hot
        return self._soft_labels * self.valid[:, None]

    @property
    def soft_log(self) -> Tensor:
        """(): sum over pixels and classes of the soft label times the log-probability."""
        log_p, axis = self._log_softmax
        return (self.soft_labels * log_p.movedim(axis, 1)).sum()

    @cached_property
    def image_sums(self) -> Tensor:
        """(3, B, C): intersection, area and count."""
        return torch.stack([self.intersection, self.area, self.count])

    @cached_property
    def soft_image_sums(self) -> Tensor:
        """(4, B, C): sums over valid pixels of min(p, q), p, and q, the soft label; then count."""
        log_p, axis = self._log_softmax
        q = self.soft_labels
        common = torch.minimum(log_p.movedim(axis, 1).exp(), q).sum((2, 3))
        return torch.stack([common, self.area, q.sum((2, 3)), self.count])

    @cached_property
    def sums(self) -> Tensor:
        """(3, 1, C): :attr:`image_sums` of the batch, or of the step if collected."""
        return self._of_step(self.image_sums, soft=False)

    @cached_property
    def soft_sums(self) -> Tensor:
        """(4, 1, C): :attr:`soft_image_sums` of the batch, or of the step if collected."""
        return self._of_step(self.soft_image_sums, soft=True)

    def _of_step(self, sums: Tensor, *, soft: bool) -> Tensor:
        sums, key = sums.sum(1, keepdim=True), (self.output, soft)
        if self.totals is None or key not in self.totals.sums:
            return self.total(sums)
        # The value of the step with the gradient of this micro-batch; the factor undoes the average
        # of gradients over micro-batches and ranks.
        averaged = self.totals.micro_batches * (world_size() if self.across_ranks else 1)
        return self.totals.sums[key] + averaged * (sums - sums.detach())

    @property
    def step_count(self) -> Tensor:
        """(images, C): :attr:`count` of all images of the step."""
        if self.totals is None:
            return self.count
        return self.totals.count[:, : self.logits.shape[1]].to(at_least_fp32(self.logits))

    @property
    def step_valid(self) -> Tensor:
        """(): valid pixels of the step."""
        return self.valid.sum() if self.totals is None else self.totals.count[:, :IGNORE].sum()

    @cached_property
    def probabilities(self) -> Tensor:
        """(B, C, H, W): softmax of the logits; only for losses that need all of it."""
        return self.logits.to(at_least_fp32(self.logits)).softmax(1)

    def sum(self, values: Tensor, factors: Tensor | None) -> Tensor:
        """Sum (B, H, W) values, 0 where ignored, times the factor of each pixel's true class."""
        if factors is None:
            return values.sum()
        return (values * factors.to(values)[self.index]).sum()

    def of_regions(self, x: Tensor) -> Tensor:
        """Return (..., C) values of the classes that losses of regions score: class 1 if binary."""
        return x[..., 1:] if self.binary else x

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over the ranks if ``across_ranks``, else ``x``."""
        return sum_over_ranks(x) if self.across_ranks else x

    def mean(self, total: Tensor, count: Tensor) -> Tensor:
        """Return ``total / count`` of the global batch; 0, with a gradient, if the count is 0."""
        if self.across_ranks and world_size() > 1:
            total, count = self.total(torch.stack([total, count.to(total)])).unbind()
        if count.is_floating_point():
            return total / (count + (count == 0))
        return total / count.clamp_min(1)

    def step_mean(self, total: Tensor, step_count: Tensor) -> Tensor:
        """Return ``total`` divided by the average count of the step's micro-batches, over the
        ranks.

        The mean of this value over the micro-batches is the mean over the whole step.
        """
        if self.totals is not None:
            step_count = step_count / self.totals.micro_batches
        return self.mean(total, step_count)


class _SoftmaxSums(torch.autograd.Function):
    """Quantities of a softmax that the losses need, computed without storing all of it.

    Returns :attr:`Pixels.log_true`, :attr:`Pixels.area` and :attr:`Pixels.log_area`. Backward
    computes the probabilities again, so nothing of the logits' size is kept between the passes.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, index: Tensor, valid: Tensor, smoothed: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = logits.flatten(2)
        index, valid = index.flatten(1), valid.flatten(1)
        log_true = x.new_empty(index.shape, dtype=at_least_fp32(logits))
        log_z = torch.empty_like(log_true)
        area = log_true.new_zeros(x.shape[:2])
        log_area = torch.zeros_like(area)
        for at in _pieces(x):
            pixels = at[0], at[2]
            scores = x[at].to(log_true.dtype)
            top = scores.amax(1)
            powers = (scores - top[:, None]).exp_()
            z = powers.sum(1)
            area[at[0]] += _sum_pixels(powers, valid[pixels] / z)
            z = z.log_().add_(top)
            if smoothed:
                weight = valid[pixels].to(z)
                log_area[at[0]] += _sum_pixels(scores, weight) - (z * weight).sum(1)[:, None]
            true = scores.gather(1, index[pixels][:, None])[:, 0]
            log_true[pixels] = (true - z).masked_fill_(~valid[pixels], 0)
            # exp(score - inf) = 0, so ignored pixels have no gradient in backward.
            log_z[pixels] = z.masked_fill_(~valid[pixels], math.inf)
        ctx.save_for_backward(logits, index, valid, log_z)
        ctx.set_materialize_grads(False)
        return log_true.view(logits[:, 0].shape), area, log_area

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_true: Tensor | None, d_area: Tensor | None, d_log_area: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        logits, index, valid, log_z = ctx.saved_tensors
        x = logits.flatten(2)
        gradient = torch.empty_like(x)
        at_true = torch.zeros_like(log_z) if d_true is None else d_true.flatten(1) * valid
        for at in _pieces(x):
            pixels = at[0], at[2]
            p = (x[at] - log_z[pixels][:, None]).exp_()
            slope = -at_true[pixels][:, None]
            if d_log_area is not None:
                slope = slope - d_log_area[at[0]].sum(1)[:, None, None]
            if d_area is not None:
                d = d_area[at[0]]
                slope = d[:, :, None] + (slope - _sum_classes(p, d)[:, None])
            p.mul_(slope)
            if d_log_area is not None:
                p.addcmul_(d_log_area[at[0], :, None], valid[pixels][:, None].to(p))
            gradient[at] = p.scatter_add_(1, index[pixels][:, None], at_true[pixels][:, None])
        return gradient.view_as(logits), None, None, None


class _ClassSums(torch.autograd.Function):
    """:attr:`Pixels.intersection` and :attr:`Pixels.count`."""

    @staticmethod
    def forward(
        ctx: Any, log_true: Tensor, index: Tensor, valid: Tensor, classes: int
    ) -> tuple[Tensor, Tensor]:
        values = log_true.new_empty(2, *log_true.shape)
        p = torch.mul(log_true.exp(), valid, out=values[0])
        values[1] = valid
        # Row by row first: more accurate sums, and fewer atomic additions to the same address.
        rows = p.new_zeros(*values.shape[:3], classes)
        rows.scatter_add_(3, index.expand(values.shape), values)
        ctx.save_for_backward(p, index)
        intersection, count = rows.sum(2).unbind()
        ctx.mark_non_differentiable(count)
        return intersection, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
        p, index = ctx.saved_tensors
        return gradient.gather(1, index.flatten(1)).view_as(p) * p, None, None, None


class SigmoidFocalSums(torch.autograd.Function):
    """Sums over the valid pixels of the focal loss of the true class, and of all other classes.

    The true class's logit is negated, so that one formula holds for all classes.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, index: Tensor, valid: Tensor, gamma: float
    ) -> tuple[Tensor, Tensor]:
        x = logits.flatten(2)
        index, valid = index.flatten(1), valid.flatten(1)
        true = x.new_zeros((), dtype=at_least_fp32(logits))
        total = torch.zeros_like(true)
        for at in _pieces(x):
            pixels = at[0], at[2]
            p, entropy = _wrong(x[at], index[pixels][:, None], total.dtype)
            losses = entropy.mul_(p.pow_(gamma))
            true += (losses.gather(1, index[pixels][:, None])[:, 0] * valid[pixels]).sum()
            total += (losses.sum(1) * valid[pixels]).sum()
        ctx.save_for_backward(logits, index, valid)
        ctx.gamma = gamma
        return true, total - true

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_true: Tensor, d_others: Tensor) -> tuple[Tensor, None, None, None]:
        logits, index, valid = ctx.saved_tensors
        x = logits.flatten(2)
        gradient = torch.empty_like(x)
        for at in _pieces(x):
            pixels = at[0], at[2]
            true = index[pixels][:, None]
            p, entropy = _wrong(x[at], true, d_true.dtype)
            slope = entropy.mul_(1 - p).mul_(ctx.gamma).add_(p).mul_(p.pow_(ctx.gamma))
            at_true = slope.gather(1, true) * (-d_true * valid[pixels])[:, None]
            slope.mul_((d_others * valid[pixels])[:, None])
            gradient[at] = slope.scatter_(1, true, at_true)
        return gradient.view_as(logits), None, None, None


def _wrong(x: Tensor, true: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``sigmoid`` and ``softplus`` of the logits, with the true class's logit negated."""
    x = x.to(dtype, copy=True)
    x.scatter_(1, true, -x.gather(1, true))
    if not on_cpu(x):
        return x.sigmoid(), F.softplus(x)
    # Exact within 1e-7, and five times as fast as torch's own on the CPU.
    softplus = x.abs().sigmoid_().log_().neg_().add_(x.relu())
    return x.sigmoid_(), softplus


_PIECE = 1 << 18  # numbers on the CPU: 1 MiB of fp32, which fits a core's cache
_LARGE_PIECE = 1 << 26  # elsewhere: 256 MiB of fp32, so that a batch takes few launches


def _pieces(x: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Yield the pieces of (B, C, pixels) that are computed together: images, or parts of one."""
    images, channels, pixels = x.shape
    size = _PIECE if on_cpu(x) else _LARGE_PIECE
    together = max(1, size // max(1, channels * pixels))
    step = max(1, size // channels)
    for b in range(0, images, together):
        for start in range(0, pixels, step):
            yield slice(b, b + together), slice(None), slice(start, start + step)


def _sum_pixels(x: Tensor, weight: Tensor) -> Tensor:
    """Sum x * weight over the pixels: (B, C, N) and (B, N) to (B, C)."""
    if on_cpu(x):
        return torch.stack([image @ w for image, w in zip(x, weight, strict=True)])
    # A product of matrices has as many blocks as results here, and may round to TF32.
    return (x * weight[:, None]).sum(2)


def _sum_classes(x: Tensor, weight: Tensor) -> Tensor:
    """Sum x * weight over the classes: (B, C, N) and (B, C) to (B, N)."""
    if on_cpu(x):
        with no_autocast(x):  # backward may run under autocast
            return torch.stack([w @ image for image, w in zip(x, weight, strict=True)])
    return (x * weight[:, :, None]).sum(1)


def _count(target: Tensor) -> Tensor:
    """Count the pixels of each value, (B, H, W) to (B, 256), without waiting for the device."""
    rows = torch.zeros(*target.shape[:2], IGNORE + 1, device=target.device)
    ones = torch.ones(target.shape, device=target.device)
    return rows.scatter_add_(2, target.long(), ones).sum(1)


def at_least_fp32(x: Tensor) -> torch.dtype:
    """Return float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def no_autocast(x: Tensor) -> torch.autocast:
    """Return a context without autocast on the device of ``x``."""
    return torch.autocast(x.device.type, enabled=False)
