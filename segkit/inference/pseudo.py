"""Pseudo labels: confident predictions as training labels; all other pixels are ignored."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segkit.core import checkpoint, distributed
from segkit.core.errors import DataError, SegkitError
from segkit.core.files import write_text
from segkit.core.labels import IGNORE
from segkit.inference import soup
from segkit.inference.calibration import sharpened
from segkit.inference.candidate_predictor import CandidatePredictor
from segkit.inference.candidates import Candidate
from segkit.inference.outputs import NamedMasks, encode_rle
from segkit.inference.results import Results
from segkit.inference.trained_run import Images


class Confidence:
    """Histogram of a model's confidence in each class it predicts, over any number of images."""

    # Equal steps of log2(1 - confidence), down to float32's last bit: most pixels are near 1.
    _STEPS, _BITS = 100, 24

    def __init__(self, num_classes: int) -> None:
        self.counts = torch.zeros(num_classes, self._STEPS * self._BITS + 1, dtype=torch.int64)

    def add(self, probabilities: Tensor) -> None:
        """Count the pixels of one image, (C, H, W)."""
        num_classes, steps = self.counts.shape
        confidence, classes = probabilities.max(0)
        error_probability = (1 - confidence).clamp_min(2.0**-self._BITS)
        bins = classes * steps + (-error_probability.log2() * self._STEPS).long()
        counts = torch.bincount(bins.flatten(), minlength=num_classes * steps)
        self.counts += counts.cpu().view(num_classes, steps)

    def thresholds(self, quantile: float | Sequence[float]) -> list[float]:
        """Return a confidence threshold per class: the given quantile of its pixels' confidence.

        An equal share of every class is kept, independent of its frequency, as in class-balanced
        self-training (Zou et al. 2018, https://arxiv.org/abs/1810.07911).

        Args:
            quantile: Share of pixels below the threshold: 0 keeps every pixel, 1 only the most
                confident ones. One number, or one per class.

        Returns:
            One threshold per class; 1 for a class that was never predicted.
        """
        quantiles = torch.as_tensor(quantile, dtype=torch.float64).expand(len(self.counts))
        if not ((quantiles >= 0) & (quantiles <= 1)).all():
            raise ValueError(f"quantile: expected numbers from 0 to 1, got {quantile}")
        below = self.counts.cumsum(1) - self.counts
        wanted = (self.counts.sum(1) * quantiles)[:, None]
        # The highest non-empty step with at most the wanted share of pixels below it.
        allowed = (below <= wanted) & (self.counts > 0)
        steps = torch.arange(self.counts.shape[1]).where(allowed, -1).amax(1).double()
        edges = 1 - torch.exp2(-steps / self._STEPS)
        return edges.where(steps >= 0, 1.0).tolist()


def confident(probabilities: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Return the most probable class where it reaches its class's threshold; 255 elsewhere.

    Shape:
        probabilities: (C, H, W)
        thresholds: C numbers
        returns: (H, W) uint8
    """
    confidence, classes = probabilities.max(0)
    least = torch.tensor(thresholds, dtype=confidence.dtype, device=confidence.device)
    return classes.to(torch.uint8).masked_fill(confidence < least[classes], IGNORE)


def write_pseudo_labels(
    path: Path, masks: NamedMasks, *, classes: Sequence[str], info: Mapping[str, Any] | None = None
) -> None:
    """Write masks as a COCO file, one RLE per class and image; ignored pixels are a crowd region.

    ``CocoSource(annotations=path, images=folder, background=classes[0])`` reads the same masks and
    classes: pixels without an annotation are class 0.

    Args:
        masks: File names, each once, and masks.
        info: Origin of the labels (checkpoints, round, thresholds).

    Raises:
        DataError: No pixel is labelled.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, mask) in enumerate(masks, 1):
        height, width = mask.shape
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for value in mask.unique().tolist():
            if value == 0:
                continue
            region = mask == value
            annotations.append({
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": 1 if value == IGNORE else value,
                "iscrowd": int(value == IGNORE),
                "segmentation": encode_rle(region),
                "area": int(region.sum()),
            })  # fmt: skip
    if not annotations:
        raise DataError(f"{path}: no pixel was labelled; lower the thresholds or add images")
    content = {
        "info": dict(info or {}),
        "categories": [{"id": index, "name": name} for index, name in enumerate(classes) if index],
        "images": images,
        "annotations": annotations,
    }
    write_text(path, json.dumps(content))


def label_confident(
    folder: Path,
    predictor: CandidatePredictor,
    candidate: Candidate,
    photos: Images,
    given: Sequence[float],
    *,
    quantiles: bool,
    temperature: float,
) -> str:
    """Write a candidate's confident predictions as labels to train on, and link the images.

    Images of which the runs have labels are left out. ``given`` has the least probability of a
    label, or with ``quantiles`` the share of pixels to leave unlabelled: one, or one per class.
    ``temperature`` calibrates the probabilities. Return a message with the number of images, and
    the setting that trains on them.
    """
    source = photos.source
    needs = (*checkpoint.MODEL, "trained_on")
    states = [checkpoint.entries(path, needs) for path in candidate.paths]
    classes = states[0]["classes"]
    labelled_images = [images for run in predictor.runs for images in run.labelled()]
    known = {digest for images in labelled_images for digest in images.digests()}
    digests = zip(photos.indices, photos.digests(), strict=True)
    images = replace(photos, indices=[index for index, digest in digests if digest not in known])
    if len(given) not in (1, len(classes)):
        raise SegkitError(
            f"{len(given)} thresholds were given for {len(classes)} classes; give one, or one per "
            "class"
        )
    thresholds = list(given) * (len(classes) // len(given))
    if quantiles:
        confidence = Confidence(len(classes))
        for _, scored, _ in predictor.predict(candidate, images, soft=True):
            confidence.add(sharpened(scored, temperature))
        confidence.counts = distributed.all_reduce(confidence.counts.to(predictor.device)).cpu()
        thresholds = confidence.thresholds(thresholds)
    info = {
        "round": 1 + max(state.get("pseudo_round") or 0 for state in states),
        "candidate": candidate.name,
        "models": [predictor.digest(path) for path in candidate.paths],
        "thresholds": thresholds,
        "temperature": temperature,
        "trained_on": sorted(soup.trained_on(states)),
    }
    labels = Results(folder, source, indices=images.indices, classes=classes, outputs=())
    links = {index: f"images/{source.names[index]}" for index in images.indices}
    origin = {**predictor.origin(candidate), **info}
    missing = labels.start(origin, others=["pseudo.json", *links.values()])
    unlabelled = replace(images, indices=missing)
    for index, scored, _ in predictor.predict(candidate, unlabelled, soft=True):
        labels.write(index, confident(sharpened(scored, temperature), thresholds))
    distributed.barrier()
    names: list[str] = []

    def labelled() -> Iterator[tuple[str, Tensor]]:
        for index in images.indices:
            name = source.names[index]
            mask = labels.mask(name)
            if (mask != IGNORE).any():
                checkpoint.link(source.path(index), folder / links[index])
                names.append(name)
                yield name, mask

    if distributed.is_main():
        write_pseudo_labels(folder / "pseudo.json", labelled(), classes=classes, info=info)
    paths = {"annotations": str(folder / "pseudo.json"), "images": str(folder / "images")}
    spec = {"name": "coco", **paths, "background": classes[0]}
    left = len(photos.indices) - len(images.indices)
    return (
        f"pseudo labels of {len(names)} images ({left} are labelled already): {folder}\n"
        f"train on them too with: --set 'data.pseudo={json.dumps(spec)}'"
    )
