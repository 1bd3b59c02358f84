"""Label errors: images and regions whose annotation contradicts a model that has not seen them.

Lad and Mueller 2023, https://arxiv.org/abs/2307.05080
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from segkit.core import checkpoint
from segkit.core.distributed import Progress
from segkit.core.errors import ArgumentError, SegkitError
from segkit.core.files import write_text
from segkit.core.labels import IGNORE
from segkit.core.run import Run
from segkit.data.areas import Box, connected_areas
from segkit.data.loader import EvalBatch, EvalBatches
from segkit.inference.model_file import load
from segkit.inference.prediction import predicted_classes
from segkit.inference.predictor import Predictor
from segkit.inference.trained_run import Images, TrainedRun

TEMPERATURE = 0.1
WINDOW = 1 / 16  # side of the window of local means, as a share of the image's longer side
MIN_AREA = 16  # pixels of a contradicted region
MAX_REGIONS = 5  # of an image

COLUMNS = (
    *("file", "annotated", "predicted", "left", "top", "right", "bottom", "score"),
    *("image_score", "part"),
)
"""Columns of the list of contradicted regions."""


class Contradiction(NamedTuple):
    """A connected region of one annotated class in which a model predicts one other class.

    ``score`` is the soft minimum of the annotated class's local likelihood in the region.
    """

    annotated: int
    predicted: int
    area: int
    box: Box
    score: float


@dataclass(frozen=True)
class LabelScore:
    """Score of an image's labels, low if they may be wrong, and the contradicted regions.

    Args:
        part: Part of the run's data, ``train`` or ``val``.
        score: Soft minimum of the local likelihood of the annotation, 0 to 1.
        regions: At most :data:`MAX_REGIONS`, the lowest score first.
    """

    part: str
    index: int
    name: str
    score: float
    regions: tuple[Contradiction, ...]


def soft_minimum(values: Tensor, temperature: float = TEMPERATURE) -> float:
    """Return the mean of ``values`` (0 to 1), weighted by the softmax of (1 - value) / temperature.

    A lower temperature is closer to the minimum. The weighted mean of no value is 1.
    """
    values = values.double().flatten()
    return float((values * ((1 - values) / temperature).softmax(0)).sum()) if len(values) else 1.0


def local_means(likelihood: Tensor, labelled: Tensor, window: int) -> Tensor:
    """Return the mean likelihood of the labelled pixels in a window around each pixel.

    ``window`` is its side; an even one is enlarged by 1. All tensors are (H, W).
    """
    reach = window // 2
    planes = torch.stack([likelihood * labelled, labelled.to(likelihood)])[None]
    for kernel, padding in (((2 * reach + 1, 1), (reach, 0)), ((1, 2 * reach + 1), (0, reach))):
        planes = functional.avg_pool2d(planes, kernel, stride=1, padding=padding)
    total, weight = planes[0]
    return total / weight.clamp_min(torch.finfo(weight.dtype).tiny)


def label_quality(
    likelihood: Tensor,
    predicted: Tensor,
    mask: Tensor,
    *,
    window: float = WINDOW,
    temperature: float = TEMPERATURE,
) -> tuple[float, list[Contradiction]]:
    """Score the labels of an image by the likelihood that a model gives to the annotated classes.

    Departs from the paper: the soft minimum is over the likelihood's means in a window, because the
    pixels at the borders of objects have a low likelihood in every image.

    Args:
        likelihood: Probability of the annotated class of each pixel; any value where it is ignored.
        predicted: The most probable class.
        mask: The annotated class, 255 for ignored pixels.
        window: Side of the window as a share of the image's longer side; 0 for single pixels.
        temperature: As in :func:`soft_minimum`.

    Shape:
        likelihood, predicted, mask: (H, W)

    Returns:
        The score of the image, 1 if all of it is ignored, and the contradicted regions, the lowest
        score first.
    """
    labelled = mask != IGNORE
    local = local_means(likelihood, labelled, round(window * max(mask.shape)))
    pair = mask.int() * 256 + predicted.int()  # never 255, which predicts the value of no class
    pairs = torch.where(labelled & (mask != predicted), pair, IGNORE).numpy()
    regions = []
    for value, area, box, _ in connected_areas(pairs):
        if area >= MIN_AREA:
            left, top, right, bottom = box
            inside = np.s_[top:bottom, left:right]
            values = local[inside][torch.from_numpy(pairs[inside] == value)]
            score = soft_minimum(values, temperature)
            regions.append(Contradiction(*divmod(value, 256), area, box, score))
    regions.sort(key=lambda region: (region.score, -region.area))
    return soft_minimum(local[labelled], temperature), regions


def unseen_images(run: TrainedRun) -> tuple[list[tuple[Path, Images]], list[Images]]:
    """Return images with labels by a checkpoint that did not train on them, and those without one.

    Checkpoints record digests of their training images, so equal files are the same image; one that
    records none may have trained on all.
    """
    trained_on = {p: checkpoint.entries(p).get("trained_on") for p in run.best_checkpoints()}
    scored, rest = [], []
    for images in run.labelled():
        left = dict(zip(images.indices, images.digests(), strict=True))
        for path, known in trained_on.items():
            trained = {*left.values()} if known is None else {*known}
            unseen = [i for i, digest in left.items() if digest not in trained]
            left = {i: digest for i, digest in left.items() if digest in trained}
            scored.append((path, replace(images, indices=unseen)))
        rest.append(replace(images, indices=list(left)))
    return [(p, x) for p, x in scored if x.indices], [x for x in rest if x.indices]


def score_labels(
    run: TrainedRun | str | Path,
    *,
    device: torch.device | str | None = None,
    seen: bool = False,
    window: float = WINDOW,
    temperature: float = TEMPERATURE,
) -> Iterator[tuple[LabelScore, Tensor]]:
    """Predict each labelled image of a run with a fold that has not seen it, and score its labels.

    Args:
        run: A run, or its folder; with one fold, only its validation images and the selection set
            are unseen.
        device: Where the models run; default: CUDA if available, else the CPU.
        seen: Also score images that every fold trained on; their scores are too high.
        window, temperature: As in :func:`label_quality`.

    Yields:
        The score and the predicted mask (H, W) of an image; no image is held.

    Raises:
        ArgumentError: Every fold trained on every image, and ``seen`` is False.
        SegkitError: The classes of the labels are not those of the run.
    """
    run = run if isinstance(run, TrainedRun) else TrainedRun(Run.open(run))
    work, rest = unseen_images(run)
    if seen:
        work += [(run.best_checkpoints()[0], images) for images in rest]
    if not work:
        raise ArgumentError(f"{run.folder}: every fold trained on every image", seen=[True])
    total = sum(len(images.indices) for _, images in work)
    progress = Progress(None, "label errors", total=total, unit="image")
    for path, images in work:
        predictor = load(path, device=device, overrides=run.overrides)
        if predictor.classes != images.source.classes:
            raise SegkitError(f"{path}: has other classes than data.{images.title}; restore them")
        batches = EvalBatches(
            images.source, images.indices, labels=True, batch_size=run.config.infer.batch_size,
            workers=run.config.data.workers, device=predictor.device,
        )  # fmt: skip
        for batch in batches:
            for index, *maps in _likelihoods(predictor, batch):
                score, regions = label_quality(*maps, window=window, temperature=temperature)
                name, kept = images.source.names[index], tuple(regions[:MAX_REGIONS])
                yield LabelScore(images.title, index, name, score, kept), maps[1]
            progress.update(len(batch.indices))
    progress.close()


def rank_labels(run: TrainedRun | str | Path, **options: Any) -> list[LabelScore]:
    """Return the scores of :func:`score_labels`, the most suspicious image first."""
    return sorted((score for score, _ in score_labels(run, **options)), key=attrgetter("score"))


def _likelihoods(
    predictor: Predictor, batch: EvalBatch
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield index, likelihood of the annotated class, predicted class and mask of each image."""
    assert batch.masks is not None
    masks = batch.masks
    likelihood, predicted = torch.empty(masks.shape), torch.empty_like(masks)
    for top, scores in predictor.probability_bands(batch.images):
        rows = slice(top, top + scores.shape[2])
        labels = masks[:, None, rows].to(scores.device).long().clamp_max(scores.shape[1] - 1)
        likelihood[:, rows] = scores.gather(1, labels)[:, 0].cpu()
        predicted[:, rows] = predicted_classes(scores).cpu()
    yield from zip(batch.indices, likelihood, predicted, masks, strict=True)


def region_rows(scores: Sequence[LabelScore], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row of :data:`COLUMNS` for each contradicted region, the lowest score first."""
    names = classes if len(classes) > 1 else ("background", *classes)
    rows = []
    for image in scores:
        for annotated, predicted, _, box, score in image.regions:
            own = round(score, 4), round(image.score, 4), image.part
            row = (image.name, names[annotated], names[predicted], *box, *own)
            rows.append(dict(zip(COLUMNS, row, strict=True)))
    return sorted(rows, key=lambda row: row["score"])


def write_region_lists(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows as ``path`` with the suffixes ``.csv`` and ``.json``."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path.with_suffix(".csv"), text.getvalue())
    write_text(path.with_suffix(".json"), json.dumps({"columns": COLUMNS, "regions": rows}) + "\n")
