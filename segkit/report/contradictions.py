"""Section of the data page: images whose labels the models of a run contradict."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from segkit.data.source import Source, background
from segkit.inference.label_errors import LabelScore
from segkit.inference.outputs import ERROR, Color, overlay
from segkit.report import html
from segkit.report.gallery import small_mask, small_photograph
from segkit.report.html import escape

PANELS = ("photograph", "annotation", "prediction", "contradicted")


class ContradictedImages:
    """The images of the lowest scores, with small masks of their predictions.

    Args:
        size: Number of images to keep.
    """

    def __init__(self, size: int = 24) -> None:
        self._size = size
        self._kept: list[tuple[LabelScore, np.ndarray]] = []

    def add(self, labels: LabelScore, predicted: Tensor) -> None:
        """Keep an image if its score is among the lowest so far."""
        full = len(self._kept) == self._size
        if labels.regions and not (full and labels.score >= self._kept[-1][0].score):
            self._kept.append((labels, small_mask(predicted)))
            self._kept = sorted(self._kept, key=lambda kept: kept[0].score)[: self._size]

    def section(self, sources: Mapping[str, Source], colors: Sequence[Color], note: str) -> str:
        """Return the section as HTML; ``sources`` are the parts of the run's data by name."""
        figures = ""
        for labels, predicted in self._kept:
            source = sources[labels.part]
            names = html.class_labels(source.classes, colors)
            if len(names) == 1:
                names = ["background", *names]
            pairs = dict.fromkeys((x.annotated, x.predicted) for x in labels.regions)
            text = "; ".join(f"{names[a]} predicted as {names[b]}" for a, b in pairs)
            images = panels(source, labels, predicted, colors)
            pictures = ""
            for panel, image in zip(PANELS, images, strict=True):
                shown = html.picture(image, f"{labels.name}, {panel}")
                pictures += f'<div data-layer="{panel}">{shown}</div>'
            figures += (
                f'<figure class="sheet"><div class="panels">{pictures}</div><figcaption>'
                f"<b>{labels.score:.3f}</b> {escape(labels.name)}<br>{text}</figcaption></figure>"
            )
        return f"<p>{escape(note)}</p>\n{figures}"


def panels(
    source: Source, labels: LabelScore, predicted: np.ndarray, colors: Sequence[Color]
) -> list[Image.Image]:
    """Return photograph, annotation, prediction and contradicted regions of an image, small."""
    mask = source.mask(labels.index)
    truth = small_mask(mask)
    scale = truth.shape[1] / mask.shape[1], truth.shape[0] / mask.shape[0]
    photograph = small_photograph(source, labels.index, truth)
    pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)
    wrong, boxes = np.zeros_like(truth), []
    for region in labels.regions:
        box = [round(x * scale[n % 2]) for n, x in enumerate(region.box)]
        inside = np.s_[box[1] : box[3] + 1, box[0] : box[2] + 1]
        pair = (truth[inside] == region.annotated) & (predicted[inside] == region.predicted)
        wrong[inside] |= pair.astype(np.uint8)
        boxes.append(box)
    ground = background(source)
    layers = (truth, colors, ground), (predicted, colors, ground), (wrong, (ERROR, ERROR), 0)
    draw = partial(overlay, pixels, classes=(), legend=False)
    shown = [draw(torch.from_numpy(m), colors=c, background=g) for m, c, g in layers]
    ImageDraw.Draw(shown[-1]).rectangle(boxes[0], outline=ERROR, width=2)
    return [photograph, *shown]
