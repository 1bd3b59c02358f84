"""BatchNorm over the batches of all ranks, on the CPU too.

Replaces ``nn.SyncBatchNorm``, which raises on the CPU.
Chosen on the CPU for every size; CUDA uses PyTorch's own class.
Gain: synchronized training on the CPU; its cost is shown by ``python -m benchmarks.scaling
--sync-batch-norm``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segkit.core.distributed import all_reduce, rank, world_size


class NormalizeOverRanks(torch.autograd.Function):
    """Forward and backward of BatchNorm over all ranks, with PyTorch's fused kernels.

    Given fixed statistics, these kernels compute the normalized input. In backward they compute the
    sums over this rank's batch, and the part of the gradient that does not depend on the
    statistics. What remains is one all-reduce of two sums per channel and one affine operation.
    The saved tensors are those of PyTorch's ``SyncBatchNorm``, in the same order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        parts = x.new_zeros(world_size(), 3, x.shape[1])
        parts[rank()] = torch.stack([torch.full_like(mean, x.numel() / len(mean)), mean, variance])
        counts, means, variances = all_reduce(parts).unbind(1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean) ** 2)).sum(0) / total
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), total)
        ctx.mark_non_differentiable(mean, variance, total)
        y = nn.functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        return y, mean, variance, total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        x, weight, mean, rstd, total = ctx.saved_tensors
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, rstd**-2, None, None, False, 0.0, [True, True, True]
        )
        dweights, dbiases = all_reduce(torch.stack([dweight, dbias]))
        slope = -weight * rstd**2 * dweights / total
        shift = -weight * rstd * dbiases / total - slope * mean
        shape = [1, -1] + [1] * (x.dim() - 2)
        dx += torch.addcmul(shift.view(shape), x, slope.view(shape))
        return dx, dweight, dbias, None


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over the batches of all ranks on the CPU, where ``nn.SyncBatchNorm`` raises.

    Ranks exchange each channel's count, mean and variance once per forward pass, and combine them
    as in Chan et al. 1979, which loses no precision to cancellation.
    """

    _check_input_dim = nn.SyncBatchNorm._check_input_dim

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        weight = x.new_ones(self.num_features) if self.weight is None else self.weight
        bias = x.new_zeros(self.num_features) if self.bias is None else self.bias
        y, mean, variance, total = NormalizeOverRanks.apply(x, weight, bias, self.eps)
        if self.track_running_stats:
            self._track(mean, variance * total / (total - 1).clamp_min(1))
        return y.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


def convert_sync_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Replace each BatchNorm of ``model`` by one over all ranks, in place.

    State-dict keys stay the same. With one rank nothing is changed. CUDA gets PyTorch's own
    ``nn.SyncBatchNorm``.
    """
    if world_size() == 1:
        return
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place, unless model is a BatchNorm
    if device.type != "cuda":
        norms: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
        for norm in norms:
            norm.__class__ = SyncBatchNorm
