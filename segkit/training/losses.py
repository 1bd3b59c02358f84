"""Losses over logits and class indices; 255 is ignored; all in fp32, also under autocast.

Most losses are functions of a few sums over pixels. :class:`Pixels` computes each sum once; the
terms of a :class:`Criterion` share them, and they are summed over the ranks, so the loss and its
gradient are those of the global batch. OHEM, Lovász and MS-SSIM are not functions of sums; they are
computed on each rank's own batch.

A batch may be processed in several micro-batches (``train.accumulate``). The loss of the step is
then the mean of their losses, each normalized by the :class:`StepTotals`: see
:attr:`Loss.accumulation`.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from segkit.core.config import Component, build, check_bounds, matching
from segkit.core.distributed import sum_over_ranks
from segkit.core.errors import ConfigError, closest, quoted
from segkit.core.labels import IGNORE, check_labels
from segkit.models.queries import QUERY_OUTPUTS
from segkit.training.mask_classification import MaskClassification
from segkit.training.pixels import Pixels, SigmoidFocalSums, StepTotals, at_least_fp32, no_autocast

Outputs = Tensor | Mapping[str, Tensor]
"""Logits (B, C, H, W), or a decoder's outputs by name, of which ``out`` is the logits."""


class Loss(nn.Module):
    """A loss of :class:`Pixels`; callable on its own, or a term of a :class:`Criterion`.

    Attributes:
        accumulation: Relation of the mean of the micro-batches' losses to the loss of the step:
            ``"exact"``: they are equal; ``"two_pass"``: they are equal if a first pass over the
            micro-batches collects :attr:`Pixels.sums`; ``"mean"``: each has a loss of its own.
        smoothed: True if the loss reads :attr:`Pixels.log_area`.
        soft: True if the loss reads :attr:`Pixels.soft_labels`.

    Shape:
        outputs: logits (B, C, H, W), or a decoder's outputs, of which ``out`` is scored
        target: (B, H, W), uint8 or int64; ``IGNORE`` for ignored pixels
        soft_labels: (B, C, H, W), see :class:`Pixels`; only read by losses of soft labels
        loss: (), fp32 (float64 for float64 logits)
    """

    accumulation: Literal["exact", "two_pass", "mean"] = "exact"
    smoothed = False
    soft = False

    def of(self, pixels: Pixels) -> Tensor:
        """Return the loss of pixels, whose quantities other losses may share."""
        raise NotImplementedError

    def forward(
        self, outputs: Outputs, target: Tensor, soft_labels: Tensor | None = None
    ) -> Tensor:
        logits = outputs if isinstance(outputs, Tensor) else outputs["out"]
        with no_autocast(logits):
            pixels = Pixels(
                logits, target, across_ranks=self.training, smoothed=self.smoothed,
                soft_labels=soft_labels,
            )  # fmt: skip
            return pixels.guarded(self.of(pixels))


class CrossEntropy(Loss):
    """Mean negative log-probability of the true class.

    Args:
        class_weights: One coefficient per class; the mean is then weighted, as in PyTorch.
        label_smoothing: Share of the target distributed evenly over all classes.
    """

    class_weights: Tensor | None

    def __init__(
        self, *, class_weights: tuple[float, ...] | None = None, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        check_bounds(0, 1, label_smoothing=label_smoothing)
        self.register_buffer("class_weights", _weights(class_weights), persistent=False)
        self.label_smoothing = label_smoothing
        self.smoothed = label_smoothing > 0

    def of(self, pixels: Pixels) -> Tensor:
        weights = self.class_weights
        loss = -pixels.sum(pixels.log_true, weights)
        count = pixels.step_valid
        if weights is not None:
            count = (pixels.step_count * weights.to(loss)).sum()
        if self.smoothed:
            log_area = pixels.log_area if weights is None else pixels.log_area * weights.to(loss)
            loss = torch.lerp(loss, -log_area.mean(1).sum(), self.label_smoothing)
        return pixels.step_mean(loss, count)


class SoftCrossEntropy(Loss):
    """Mean cross-entropy of soft labels, the probabilities of a teacher (``data.teacher``).

    Hinton et al. 2015, https://arxiv.org/abs/1503.02531

    It is least where the predicted probabilities equal the soft labels; their difference from the
    least value is the Kullback-Leibler divergence. Without soft labels it is cross-entropy.

    Departs from the paper: the temperature is 1.
    """

    soft = True

    def of(self, pixels: Pixels) -> Tensor:
        return pixels.step_mean(-pixels.soft_log, pixels.step_valid)


class Focal(Loss):
    """Cross-entropy with the factor ``(1 - p)^gamma``, which reduces the loss of confident pixels.

    Lin et al. 2017, https://arxiv.org/abs/1708.02002

    Args:
        gamma: Exponent; 0 is cross-entropy.
        alpha: One factor per class; the mean is over pixels and ignores the factors.

    Departs from the paper: softmax over all classes; :class:`SigmoidFocal` is the paper's form.
    """

    alpha: Tensor | None

    def __init__(self, *, gamma: float = 2.0, alpha: tuple[float, ...] | None = None) -> None:
        super().__init__()
        check_bounds(0, math.inf, gamma=gamma)
        self.register_buffer("alpha", _weights(alpha), persistent=False)
        self.gamma = gamma

    def of(self, pixels: Pixels) -> Tensor:
        # The lower bound keeps the derivative of the power finite at p = 1 for any gamma.
        doubt = (-pixels.log_true.expm1()).clamp_min(torch.finfo(pixels.log_true.dtype).eps)
        losses = -pixels.log_true * doubt**self.gamma
        return pixels.step_mean(pixels.sum(losses, self.alpha), pixels.step_valid)


class SigmoidFocal(Loss):
    """Binary focal loss of each class against all others, mean over pixels and classes.

    Lin et al. 2017, https://arxiv.org/abs/1708.02002

    Args:
        gamma: Exponent; 0 is binary cross-entropy.
        alpha: Factor of the true class; the others have ``1 - alpha``. None for no factors.
    """

    def __init__(self, *, gamma: float = 2.0, alpha: float | None = None) -> None:
        super().__init__()
        check_bounds(0, math.inf, gamma=gamma)
        if alpha is not None:
            check_bounds(0, 1, alpha=alpha)
        self.gamma = gamma
        self.alpha = alpha

    def of(self, pixels: Pixels) -> Tensor:
        if pixels.binary:
            alpha = None if self.alpha is None else (1 - self.alpha, self.alpha)
            return Focal(gamma=self.gamma, alpha=alpha).to(pixels.logits.device).of(pixels)
        true, others = SigmoidFocalSums.apply(pixels.logits, pixels.index, pixels.valid, self.gamma)
        right, wrong = (1.0, 1.0) if self.alpha is None else (self.alpha, 1 - self.alpha)
        loss = right * true + wrong * others
        return pixels.step_mean(loss, pixels.step_valid * pixels.logits.shape[1])


class Tversky(Loss):
    """1 - Tversky index ``TP / (TP + alpha FP + beta FN)`` of probabilities, mean over classes.

    Salehi et al. 2017, https://arxiv.org/abs/1706.05721

    Args:
        alpha: Coefficient of false positives.
        beta: Coefficient of false negatives.
        smooth: Added to numerator and denominator, in pixels.
        per_image: Mean of the loss of each image; else one for the whole batch.
        classes: Mean over classes present in the target, or over all.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.3,
        beta: float = 0.7,
        smooth: float = 0.0,
        per_image: bool = False,
        classes: Literal["present", "all"] = "present",
    ) -> None:
        super().__init__()
        check_bounds(0, math.inf, alpha=alpha, beta=beta, smooth=smooth)
        self.alpha = alpha
        self.beta = beta
        self.smooth = smooth
        self.per_image = per_image
        self.classes = classes
        self.accumulation = "exact" if per_image else "two_pass"

    def of(self, pixels: Pixels) -> Tensor:
        if self.per_image:
            sums = pixels.soft_image_sums if self.soft else pixels.image_sums
        else:
            sums = pixels.soft_sums if self.soft else pixels.sums
        counted = self._counted(sums[-1], pixels)
        sums = pixels.of_regions(sums[:3])
        index = _TverskyIndex.apply(sums, self.alpha, self.beta, self.smooth)
        loss = ((1 - index) * counted).sum()
        if self.per_image:
            return pixels.step_mean(loss, self._counted(pixels.step_count, pixels).sum())
        return loss / counted.sum().clamp_min(1)

    def _counted(self, truth: Tensor, pixels: Pixels) -> Tensor:
        """Return True for the classes of each image that the mean is over."""
        present = truth > 0
        if self.classes == "all":
            present = present.any(1, keepdim=True).expand_as(truth)
        return pixels.of_regions(present)


class Dice(Tversky):
    """1 - Dice coefficient ``(2 I + smooth) / (P + T + smooth)``, mean over classes.

    Milletari et al. 2016, https://arxiv.org/abs/1606.04797. Arguments as for :class:`Tversky`.

    Departs from the paper: the denominator has plain sums, not sums of squares, as is now usual.
    """

    def __init__(
        self,
        *,
        smooth: float = 0.0,
        per_image: bool = False,
        classes: Literal["present", "all"] = "present",
    ) -> None:
        super().__init__(
            alpha=0.5, beta=0.5, smooth=smooth / 2, per_image=per_image, classes=classes
        )


class Jaccard(Tversky):
    """1 - intersection over union ``(I + smooth) / (P + T - I + smooth)``, mean over classes.

    Rahman and Wang 2016, https://doi.org/10.1007/978-3-319-50835-1_22. Arguments as for
    :class:`Tversky`.
    """

    def __init__(
        self,
        *,
        smooth: float = 0.0,
        per_image: bool = False,
        classes: Literal["present", "all"] = "present",
    ) -> None:
        super().__init__(alpha=1.0, beta=1.0, smooth=smooth, per_image=per_image, classes=classes)


class JaccardMetric(Jaccard):
    """Jaccard metric loss of soft labels q, ``1 - sum(min(p, q)) / sum(max(p, q))``.

    Wang et al. 2023, https://arxiv.org/abs/2302.05666; their first form, written there as
    ``1 - (|p| + |q| - |p - q|) / (|p| + |q| + |p - q|)``. It is a metric, so it is 0 only for
    p = q; with ``sum(p q)`` as the intersection, the loss would be least elsewhere. Without soft
    labels, which ``data.teacher`` gives, it is the Jaccard loss.
    """

    soft = True


class DiceSemimetric(Dice):
    """Dice semimetric loss of soft labels q, ``1 - 2 sum(min(p, q)) / (sum(p) + sum(q))``.

    Wang et al. 2023, https://arxiv.org/abs/2303.16296; ``|p - q| / (|p| + |q|)``, 0 only for p = q.
    Without soft labels, which ``data.teacher`` gives, it is the Dice loss.
    """

    soft = True


class OHEMCrossEntropy(Loss):
    """Cross-entropy over the hard pixels only (online hard example mining, OHEM).

    Shrivastava et al. 2016, https://arxiv.org/abs/1604.03540

    Args:
        threshold: A pixel is hard if the probability of its true class is lower than this.
        min_kept: Number of hardest pixels of a rank's batch that always count as hard.

    Departs from the common code, which keeps ``p < max(threshold, p[min_kept])``: pixels equal to
    the limit are all kept, so ties never leave the selection empty.
    """

    accumulation = "mean"

    def __init__(self, *, threshold: float = 0.7, min_kept: int = 100_000) -> None:
        super().__init__()
        check_bounds(0, 1, threshold=threshold)
        check_bounds(0, math.inf, min_kept=min_kept)
        self.threshold = threshold
        self.min_kept = min_kept

    def of(self, pixels: Pixels) -> Tensor:
        confidence = pixels.log_true.detach().masked_fill(~pixels.valid, math.inf).flatten()
        kept = min(self.min_kept, confidence.numel())
        if not kept:
            limit = confidence.new_tensor(-math.inf)
        elif torch.are_deterministic_algorithms_enabled():  # torch 2.9: no kthvalue on CUDA
            limit = confidence.sort().values[kept - 1]
        else:
            limit = confidence.kthvalue(kept).values
        threshold = math.log(self.threshold) if self.threshold else -math.inf
        hard = ((confidence < threshold) | (confidence <= limit)) & pixels.valid.flatten()
        return pixels.mean(-(pixels.log_true.flatten() * hard).sum(), hard.sum())


class Lovasz(Loss):
    """Lovász-softmax: the convex extension of the IoU loss, over each rank's own batch.

    Berman et al. 2018, https://arxiv.org/abs/1705.08790

    Args:
        per_image: Mean of the loss of each image; else the batch is scored as one image.

    The mean is over classes present in the target.
    """

    accumulation = "mean"

    def __init__(self, *, per_image: bool = False) -> None:
        super().__init__()
        self.per_image = per_image

    def of(self, pixels: Pixels) -> Tensor:
        images = range(len(pixels.target)) if self.per_image else [slice(None)]
        present = (pixels.count > 0).tolist()  # read once: on a GPU this waits
        classes = range(1 if pixels.binary else 0, pixels.logits.shape[1])
        losses = []
        for image in images:
            valid = pixels.valid[image].flatten()
            target = pixels.target[image].flatten()
            by_class = [
                _lovasz(pixels.probabilities[image, c].flatten(), target == c, valid)
                for c in classes
                if (present[image][c] if self.per_image else any(row[c] for row in present))
            ]
            if by_class:
                losses.append(torch.stack(by_class).mean())
        if not losses:
            return 0 * pixels.area.sum()  # 0, with a gradient
        return torch.stack(losses).mean()


class MSSSIM(Loss):
    """1 - multi-scale structural similarity (MS-SSIM) of probabilities and one-hot target.

    Wang et al. 2003, https://doi.org/10.1109/ACSSC.2003.1292216
    Huang et al. 2020 (UNet 3+), https://arxiv.org/abs/2004.08790

    Computed for each image and class of a rank's batch, then averaged; ignored pixels are 0 in both
    maps. Five scales need 176 pixels on the shorter side. Smaller images use fewer scales, with
    renormalized coefficients; below 11 pixels the window is smaller.

    Departs from the paper: similarities are mapped from -1..1 to 0..1 before the powers, because a
    fractional power of a negative number is NaN.
    """

    accumulation = "mean"
    scale_weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    window = 11
    sigma = 1.5

    def of(self, pixels: Pixels) -> Tensor:
        x, y = pixels.probabilities * pixels.valid[:, None], pixels.one_hot
        if pixels.binary:
            x, y = x[:, 1:], y[:, 1:]
        side = min(x.shape[2:])
        window = min(self.window, side - (side + 1) % 2)
        weights = self.scale_weights[: (side // window).bit_length()]
        at = torch.arange(window, dtype=x.dtype, device=x.device) - window // 2
        kernel = (-(at**2) / (2 * self.sigma**2)).softmax(0)
        similarity = torch.ones_like(x[:, :, 0, 0])
        for scale, weight in enumerate(weights, 1):
            luminance, structure = _ssim(x, y, kernel)
            if scale == len(weights):
                structure = luminance * structure
            value = (structure.mean((2, 3)) + 1) / 2
            similarity = similarity * value.clamp_min(1e-6) ** (weight / sum(weights))
            if scale < len(weights):
                x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return 1 - similarity.mean()


class Presence(nn.Module):
    """Binary cross-entropy of the classes present in an image, for a decoder's presence output.

    Args:
        background: Score class 0 too, although nearly every image has it.

    Shape:
        logits: (B, C)
        target: (B, H, W); images without a valid pixel are ignored
    """

    def __init__(self, *, background: bool = True) -> None:
        super().__init__()
        self.background = background

    def forward(self, logits: Tensor, target: Tensor, totals: StepTotals | None = None) -> Tensor:
        with no_autocast(logits):
            logits = logits.to(at_least_fp32(logits))
            seen = logits.new_zeros(len(target), IGNORE + 1)
            seen.scatter_(1, target.flatten(1).long(), 1.0)
            planes = logits.shape[1]
            first = 0 if self.background or planes == 1 else 1
            truth = seen[:, 1:2] if planes == 1 else seen[:, first:planes]
            losses = F.binary_cross_entropy_with_logits(logits[:, first:], truth, reduction="none")
            known = seen[:, :IGNORE].any(1, keepdim=True).expand_as(losses)
            count = known.sum()
            if totals is not None:
                images = totals.count[:, :IGNORE].any(1).sum()
                count = images * losses.shape[1] / totals.micro_batches
            sums = torch.stack([(losses * known).sum(), count.to(losses)])
            total, count = sum_over_ranks(sums) if self.training else sums
            return total / torch.where(count > 0, count, 1)


class Criterion(nn.Module):
    """Weighted sum of losses over the outputs of a decoder.

    Map outputs (4-D) are scored by every map loss, presence outputs (2-D) by :class:`Presence`, and
    the queries of mask transformers by :class:`MaskClassification`: the configured term, or one
    with default arguments.

    Args:
        terms: (name, weight, loss) of each term; names are keys of the returned dict.
        aux_weight: Weight of every output except ``out``; one number, or one per output, in order.
    """

    def __init__(
        self,
        terms: Sequence[tuple[str, float, nn.Module]],
        *,
        aux_weight: float | tuple[float, ...] = 0.4,
    ) -> None:
        super().__init__()
        if len({name for name, _, _ in terms}) < len(terms):
            raise ConfigError("loss.terms: two terms have the same name; remove one of them")
        self.weights = dict.fromkeys(_OF_OTHER_OUTPUTS, 1.0)
        self.weights |= {name: weight for name, weight, _ in terms}
        self.losses = nn.ModuleDict({name: loss for name, _, loss in terms})
        self.soft = any(getattr(loss, "soft", False) for loss in self.losses.values())
        self.needs_presence = "presence" in self.losses
        self.needs_queries = "mask_classification" in self.losses
        for name, make in _OF_OTHER_OUTPUTS.items():
            if name not in self.losses:
                self.losses[name] = make()
        self.aux_weight = aux_weight

    def accumulated(self, how: str) -> list[str]:
        """Return the names of the terms whose :attr:`Loss.accumulation` is ``how``."""
        return [
            name
            for name, loss in self.losses.items()
            if isinstance(loss, Loss) and loss.accumulation == how
        ]

    def check_labels(self, outputs: Outputs, target: Tensor) -> None:
        """Raise a DataError if the target has an invalid label; waits for a GPU."""
        logits = outputs if isinstance(outputs, Tensor) else outputs["out"]
        check_labels(target, max(2, logits.shape[1]))

    @torch.no_grad()
    def collect(
        self,
        outputs: Mapping[str, Tensor],
        target: Tensor,
        totals: StepTotals,
        soft_labels: Tensor | None = None,
    ) -> None:
        """Add a micro-batch's sums to those of its step; called before any is scored."""
        for name, logits in outputs.items():
            if logits.dim() != 4 or name in QUERY_OUTPUTS:
                continue
            with no_autocast(logits):
                pixels = Pixels(logits, target, across_ranks=self.training, soft_labels=soft_labels)
                sums = {(name, False): pixels.sums}
                if self.soft:
                    sums[name, True] = pixels.soft_sums
            for key, value in sums.items():
                totals.sums[key] = totals.sums.get(key, 0) + value

    def forward(
        self, outputs: Outputs, target: Tensor, soft_labels: Tensor | None = None
    ) -> Tensor:
        return self.with_terms(outputs, target, soft_labels=soft_labels)[0]

    def with_terms(
        self,
        outputs: Outputs,
        target: Tensor,
        totals: StepTotals | None = None,
        soft_labels: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and its unweighted values: each term on ``out``, each other output.

        Args:
            outputs: Logits, or outputs of the decoder.
            target: Class indices.
            totals: Totals of the step that has this batch as a micro-batch; None if it is all of
                the step. The mean over the micro-batches is the loss of the step.
            soft_labels: A teacher's probabilities, (B, C, H, W); read by the terms of soft labels.

        Raises:
            ConfigError: The decoder's outputs do not fit the configured terms or weights.
            DataError: The target has an invalid label; only on the CPU, see :func:`check_labels`.
        """
        if isinstance(outputs, Tensor):
            outputs = {"out": outputs}
        if self.training and self.needs_presence and all(x.dim() > 2 for x in outputs.values()):
            raise ConfigError(
                "loss.terms: 'presence' scores a presence output, and this decoder has none; "
                "remove the term or turn the decoder's presence head on"
            )
        has_queries = outputs.keys() >= set(QUERY_OUTPUTS)
        if self.training and self.needs_queries and not has_queries:
            raise ConfigError(
                "loss.terms: 'mask_classification' scores a decoder's queries, and this decoder "
                "has none; remove the term or use a decoder such as 'mask2former'"
            )
        others = [name for name in outputs if name not in ("out", *QUERY_OUTPUTS)]
        with no_autocast(outputs["out"]):
            scored = partial(
                Pixels, target=target, across_ranks=self.training, totals=totals,
                smoothed=any(getattr(loss, "smoothed", False) for loss in self.losses.values()),
                soft_labels=soft_labels,
            )  # fmt: skip
            pixels = scored(outputs["out"])
            terms = self._terms(pixels)
            if has_queries:
                queries = self.losses["mask_classification"](outputs, target, totals)
                terms = {"mask_classification": queries, **terms}
            values = {name: value.detach() for name, value in terms.items()}
            loss = self._weighted_sum(terms)
            for name, weight in zip(others, self._aux_weights(len(others)), strict=True):
                logits = outputs[name]
                if logits.dim() == 2:
                    terms = {"presence": self.losses["presence"](logits, target, totals)}
                else:
                    terms = self._terms(scored(logits, output=name))
                value = self._weighted_sum(terms)
                values[name] = value.detach()
                loss = loss + weight * value
            return pixels.guarded(loss), values

    def _terms(self, pixels: Pixels) -> dict[str, Tensor]:
        return {
            name: loss.of(pixels) for name, loss in self.losses.items() if isinstance(loss, Loss)
        }

    def _weighted_sum(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the terms times their weights; a weight of 1 costs no kernel."""
        first, *others = (
            value if self.weights[name] == 1 else self.weights[name] * value
            for name, value in terms.items()
        )
        for value in others:
            first = first + value
        return first

    def _aux_weights(self, number: int) -> tuple[float, ...]:
        if isinstance(self.aux_weight, int | float):
            return (self.aux_weight,) * number
        if number and len(self.aux_weight) != number:
            raise ConfigError(
                f"loss.aux_weight: lists {len(self.aux_weight)} weights, "
                f"but the decoder has {number} auxiliary outputs"
            )
        return self.aux_weight[:number]


def build_loss(
    terms: str | Component | Sequence[str | Component],
    *,
    num_classes: int | None = None,
    aux_weight: float | tuple[float, ...] = 0.4,
    teacher_terms: Sequence[Component] = (),
    teacher_weight: float = 0.5,
) -> Criterion:
    """Build a loss, such as ``build_loss(["cross_entropy", "dice"])``.

    It maps logits, or the outputs of a model, and a target to a scalar; ``with_terms`` also returns
    the value of each term.

    Args:
        terms: A name of :func:`list_losses` or ``{"name": ..., "weight": 1.0, arguments}``, or
            several, which are summed.
        num_classes: Checked against coefficients per class; ``None`` if not known yet. 1 is binary
            and has two coefficients.
        aux_weight: See :class:`Criterion`.
        teacher_terms: Further terms, all of them losses of soft labels.
        teacher_weight: If there are any, factor of their weights; 1 - this is that of the others.

    Raises:
        ConfigError: Invalid configuration; the message has the path of the key.
    """
    listed = [terms] if isinstance(terms, str | Mapping) else terms
    share = 1 - teacher_weight if teacher_terms else 1.0
    components = [
        (f"loss.terms[{i}]", share, {"name": term} if isinstance(term, str) else dict(term))
        for i, term in enumerate(listed)
    ]
    soft = [known for known, loss in LOSSES.items() if getattr(loss, "soft", False)]
    for i, term in enumerate(teacher_terms):
        path, name = f"loss.teacher_terms[{i}]", term.get("name")
        if name not in soft:
            raise ConfigError(f"{path}.name: {quoted(name)} has no soft labels{closest('', soft)}")
        components.append((path, teacher_weight, dict(term)))
    if all(term.get("name") == "presence" for _, _, term in components):
        raise ConfigError("loss.terms: expected at least one loss of the output map")
    built = []
    for path, share, term in components:
        weight = term.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
            raise ConfigError(f"{path}.weight: expected a number of at least 0, got {weight!r}")
        loss = build(LOSSES, term, path)
        for name, values in loss.named_buffers():
            if num_classes is not None and len(values) != max(2, num_classes):
                raise ConfigError(
                    f"{path}.{name}: expected {max(2, num_classes)} numbers, one per class, "
                    f"got {len(values)}"
                )
        built.append((term["name"], share * weight, loss))
    return Criterion(built, aux_weight=aux_weight)


def list_losses(filter: str = "") -> list[str]:
    """Return the losses' names that contain or match ``filter``: ``focal``, ``*entropy``."""
    return matching(LOSSES, filter)


LOSSES: dict[str, type[nn.Module]] = {
    "cross_entropy": CrossEntropy,
    "soft_cross_entropy": SoftCrossEntropy,
    "focal": Focal,
    "sigmoid_focal": SigmoidFocal,
    "dice": Dice,
    "jaccard": Jaccard,
    "tversky": Tversky,
    "jaccard_metric": JaccardMetric,
    "dice_semimetric": DiceSemimetric,
    "ohem_cross_entropy": OHEMCrossEntropy,
    "lovasz": Lovasz,
    "ms_ssim": MSSSIM,
    "presence": Presence,
    "mask_classification": MaskClassification,
}

_OF_OTHER_OUTPUTS: dict[str, type[nn.Module]] = {
    name: LOSSES[name] for name in ("presence", "mask_classification")
}
"""The losses of outputs that are no map; one with default arguments if none is configured."""


class _TverskyIndex(torch.autograd.Function):
    """The index of intersections, areas and counts; its gradient in few kernels.

    Shape:
        sums: (3, ..., C)
        index: (..., C)
    """

    @staticmethod
    def forward(ctx: Any, sums: Tensor, alpha: float, beta: float, smooth: float) -> Tensor:
        true_positive, predicted, truth = sums
        denominator = torch.add(alpha * predicted, truth, alpha=beta)
        rest = 1 - alpha - beta
        if rest:
            denominator.add_(true_positive, alpha=rest)
        if smooth:
            denominator.add_(smooth)
            true_positive = true_positive + smooth
        denominator.clamp_min_(1e-7)
        index = true_positive / denominator
        ctx.save_for_backward(index, denominator)
        ctx.alpha, ctx.rest = alpha, rest
        return index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        index, denominator = ctx.saved_tensors
        d_true_positive = gradient / denominator
        slope = d_true_positive * index
        if ctx.rest:
            d_true_positive.sub_(slope, alpha=ctx.rest)
        d_predicted = slope.mul(-ctx.alpha)
        return torch.stack([d_true_positive, d_predicted, slope.zero_()]), None, None, None


def _lovasz(probability: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Return the Lovász extension of a class's Jaccard loss; (N,) each, ``truth`` not all False."""
    errors, order = ((truth.to(probability) - probability).abs() * valid).sort(descending=True)
    truth = truth[order]
    positives = truth.cumsum(0)
    size = positives[-1]
    union = size + torch.arange(1, len(positives) + 1, device=positives.device) - positives
    # Differences of successive Jaccard losses, in a form without cancellation.
    missed = 1 / union.to(errors)
    wrong = (size - positives).to(errors) / (union.to(errors) * (union - 1).clamp_min(1))
    return errors @ torch.where(truth, missed, wrong)


def _ssim(x: Tensor, y: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Return luminance and contrast-structure similarity of each window of maps in 0..1."""
    maps = torch.stack([x, y, x * x, y * y, x * y])
    flat = maps.flatten(0, 2)[:, None]
    flat = F.conv2d(F.conv2d(flat, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    mean_x, mean_y, xx, yy, xy = flat.view(*maps.shape[:3], *flat.shape[2:])
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    covariance = xy - mean_x * mean_y
    variances = xx - mean_x**2 + yy - mean_y**2
    return luminance, (2 * covariance + c2) / (variances + c2)


def _weights(values: tuple[float, ...] | None) -> Tensor | None:
    if values is None:
        return None
    if not values or min(values) < 0 or sum(values) == 0:
        raise ConfigError("expected weights of at least 0, not all 0, one per class")
    return torch.tensor(values)
