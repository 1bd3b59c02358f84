"""The loss of mask transformers: queries are matched with the segments of an image."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from segkit.core.config import check_bounds
from segkit.core.distributed import sum_over_ranks
from segkit.core.labels import IGNORE
from segkit.models.layers import sample_points
from segkit.training.assignment import assign
from segkit.training.pixels import StepTotals, at_least_fp32, no_autocast


class MaskClassification(nn.Module):
    """Class and mask losses of queries, each matched with at most one segment of its image.

    Each class in an image is one segment. In every supervised layer, segments and queries are
    assigned to each other with the least total cost; a matched query learns its segment's class
    and mask, the others learn the class "no object". Masks are scored at random points, most of
    them where the prediction is uncertain. The points depend on torch's random generator alone,
    which a training step seeds.

    Cheng et al. 2022 (Mask2Former), https://arxiv.org/abs/2112.01527; the points: Kirillov et al.
    2020 (PointRend), https://arxiv.org/abs/1912.08193

    Args:
        points: Points of a mask that are scored.
        oversampling: Candidates per point, of which the most uncertain are scored.
        importance: Share of the points that are chosen by uncertainty; the others are random.
        class_factor: Factor of the cross-entropy of the class, in the loss and in the assignment.
        mask_factor: The same of the binary cross-entropy of the mask.
        dice_factor: The same of the Dice loss of the mask.
        no_object: Coefficient of the class "no object".

    Shape:
        query_classes: (layers, B, queries, classes + 1), logits
        query_masks: (layers, B, queries, h, w), logits
        target: (B, H, W); images without a valid pixel are ignored
        loss: (), the sum over the layers

    Departs from the authors' code: a point has the label of the pixel that it lies in, and no loss
    if it is ignored; the candidates of the assignment share their points in all layers; means of
    classes are over all ranks.
    """

    def __init__(
        self,
        *,
        points: int = 12544,
        oversampling: float = 3.0,
        importance: float = 0.75,
        class_factor: float = 2.0,
        mask_factor: float = 5.0,
        dice_factor: float = 5.0,
        no_object: float = 0.1,
    ) -> None:
        super().__init__()
        check_bounds(1, 1 << 20, points=points)
        check_bounds(1, 100, oversampling=oversampling)
        check_bounds(0, 1, importance=importance, no_object=no_object)
        factors = {"mask_factor": mask_factor, "dice_factor": dice_factor}
        check_bounds(0, float("inf"), class_factor=class_factor, **factors)
        self.points, self.oversampling, self.importance = points, oversampling, importance
        self.class_factor, self.no_object = class_factor, no_object
        self.mask_factor, self.dice_factor = mask_factor, dice_factor

    def forward(
        self, outputs: Mapping[str, Tensor], target: Tensor, totals: StepTotals | None = None
    ) -> Tensor:
        classes, masks = outputs["query_classes"], outputs["query_masks"]
        with no_autocast(classes):
            classes = classes.to(at_least_fp32(classes))
            present = _present(target, classes.shape[3] - 1)
            matches = self._match(classes, masks, target, present)
            named = self._class_losses(classes, matches, present)
            layers = zip(masks, matches, strict=True)
            scored = torch.stack([self._mask_losses(x, target, *match) for x, match in layers])
            counts = self._counts(present, totals, queries=classes.shape[2])
            sums = torch.stack([named, scored.sum(), *counts.to(named)])
            named, scored, queries, segments = sum_over_ranks(sums) if self.training else sums
            # Both counts are 0 if no image has a valid pixel; then the losses are 0 too.
            classified = self.class_factor * named / (queries + (queries == 0))
            return classified + scored / (segments + (segments == 0))

    def _counts(self, present: Tensor, totals: StepTotals | None, *, queries: int) -> Tensor:
        """Return the sum of the queries' coefficients, and the matched segments, per part."""
        parts = 1
        if totals is not None:
            present, parts = totals.count[:, : present.shape[1]] > 0, totals.micro_batches
        segments = present.sum(1).clamp_max(queries)
        known = queries * present.any(1)
        counts = torch.stack([segments + self.no_object * (known - segments), 1.0 * segments])
        return counts.sum(1) / parts

    @torch.no_grad()
    def _match(self, classes: Tensor, masks: Tensor, target: Tensor, present: Tensor) -> Tensor:
        """Return the matches in each layer, (layers, 3, matches): image, query and class."""
        segments = [row.nonzero()[0] for row in present.cpu().numpy()]  # waits for a GPU
        labels = pad_sequence([*map(torch.as_tensor, segments)], batch_first=True).to(target.device)
        points = torch.rand(len(target), self.points, 2, device=target.device)
        truth = _labels_at(target, points, torch.arange(len(target), device=target.device))
        sampled = (sample_points(x.to(classes.dtype), points) for x in masks)
        layers = zip(classes, sampled, strict=True)
        costs = torch.stack([self._costs(*layer, truth, labels) for layer in layers])
        costs = costs.nan_to_num(1e9, 1e9, -1e9).clamp(-1e9, 1e9)  # a diverged query comes last
        matches = []
        for layer in costs.mT.cpu().numpy():
            parts = []
            for image, named in enumerate(segments):
                rows, queries = assign(layer[image, : len(named)])
                parts.append(np.stack([np.full_like(queries, image), queries, named[rows]]))
            matches.append(np.concatenate(parts, axis=1))
        return torch.from_numpy(np.stack(matches)).to(target.device)

    def _costs(self, classes: Tensor, x: Tensor, truth: Tensor, labels: Tensor) -> Tensor:
        """Return a layer's costs, (B, queries, labels), of its masks ``x`` at the points."""
        inside = (truth[:, :, None] == labels[:, None]).to(x)  # (B, points, classes)
        valid = (truth != IGNORE)[:, None].to(x)
        p = x.sigmoid() * valid
        entropy = (F.softplus(x) * valid).sum(2, keepdim=True) - x @ inside
        union = p.sum(2, keepdim=True) + inside.sum(1, keepdim=True)
        dice = 1 - (2 * p @ inside + 1) / (union + 1)
        probability = classes.softmax(2).gather(2, labels[:, None].expand(-1, x.shape[1], -1))
        mask = entropy / valid.sum(2, keepdim=True).clamp_min(1)
        return self.mask_factor * mask + self.dice_factor * dice - self.class_factor * probability

    def _class_losses(self, classes: Tensor, matches: Tensor, present: Tensor) -> Tensor:
        """Return the weighted sum of the cross-entropies of all queries of known images."""
        nothing = classes.shape[3] - 1
        index = torch.full(classes.shape[:3], nothing, device=classes.device)
        layer = torch.arange(len(classes), device=classes.device)[:, None]
        index[layer, matches[:, 0], matches[:, 1]] = matches[:, 2]
        # By gather: F.cross_entropy is not deterministic on CUDA.
        losses = -classes.log_softmax(3).gather(3, index[..., None]).squeeze(3)
        coefficients = torch.where(index == nothing, self.no_object, 1.0)
        return (losses * coefficients * present.any(1)[:, None]).sum()

    def _mask_losses(
        self, masks: Tensor, target: Tensor, image: Tensor, query: Tensor, label: Tensor
    ) -> Tensor:
        """Return the sum of the mask losses of a layer's matches."""
        x = masks[image, query][:, None]
        x = x.to(at_least_fp32(x))
        points = self._points(x.detach(), target, image)
        truth = _labels_at(target, points, image)
        logits = sample_points(x, points)[:, 0]
        valid = (truth != IGNORE).to(logits)
        inside = (truth == label[:, None]).to(logits)
        losses = F.binary_cross_entropy_with_logits(logits, inside, valid, reduction="none")
        p = logits.sigmoid() * valid
        dice = 1 - (2 * (p * inside).sum(1) + 1) / (p.sum(1) + inside.sum(1) + 1)
        entropy = losses.sum(1) / valid.sum(1).clamp_min(1)
        return (self.mask_factor * entropy + self.dice_factor * dice).sum()

    @torch.no_grad()
    def _points(self, masks: Tensor, target: Tensor, image: Tensor) -> Tensor:
        """Return (segments, points, 2): the most uncertain of random points, and random points."""
        uncertain = int(self.importance * self.points)
        number = int(self.oversampling * self.points)
        candidates = torch.rand(len(masks), number, 2, device=masks.device)
        doubt = -sample_points(masks, candidates)[:, 0].abs()
        doubt.masked_fill_(_labels_at(target, candidates, image) == IGNORE, -torch.inf)
        best = doubt.topk(uncertain, 1).indices
        chosen = candidates.gather(1, best[:, :, None].expand(-1, -1, 2))
        others = torch.rand(len(masks), self.points - uncertain, 2, device=masks.device)
        return torch.cat([chosen, others], 1)


def _present(target: Tensor, classes: int) -> Tensor:
    """Return (B, classes): True for the classes in each image."""
    seen = torch.zeros(len(target), IGNORE + 1, dtype=torch.bool, device=target.device)
    return seen.scatter_(1, target.flatten(1).long(), True)[:, :classes]


def _labels_at(target: Tensor, points: Tensor, image: Tensor) -> Tensor:
    """Return the labels, (N, P), of the pixels of N images of the target that points lie in."""
    height, width = target.shape[1:]
    column = (points[..., 0] * width).long().clamp_max(width - 1)
    row = (points[..., 1] * height).long().clamp_max(height - 1)
    return target[image[:, None], row, column].long()
