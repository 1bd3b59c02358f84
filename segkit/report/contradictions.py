"""Section of the data page: images whose labels the models of a run contradict."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from segkit.data.images import as_rgb
from segkit.data.source import Source, background
from segkit.inference.label_errors import LabelScore
from segkit.inference.outputs import ERROR, Color, overlay
from segkit.report import html
from segkit.report.gallery import small_mask
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
            images = zip(PANELS, panels(source, labels, predicted, colors), strict=True)
            pictures = "".join(
                f'<div data-layer="{panel}"><img src="{html.data_uri(image)}" loading="lazy" '
                f'decoding="async" alt="{escape(labels.name)}, {panel}"></div>'
                for panel, image in images
            )
            figures += (
                f'<figure class="sheet"><div class="panels">{pictures}</div><figcaption>'
                f"<b>{labels.score:.3f}</b> {escape(labels.name)}<br>{text}</figcaption></figure>"
            )
        return f"<p>{escape(note)}</p>\n{figures}"


def panels(
    source: Source, labels: LabelScore, predicted: np.ndarray, colors: Sequence[Color]
) -> list[Image.Image]:
    """Return photograph, annotation, prediction and contradicted regions of an image, small."""
    truth = small_mask(source.mask(labels.index))
    photograph = Image.fromarray(as_rgb(source.image(labels.index)).permute(1, 2, 0).numpy())
    scale = truth.shape[1] / photograph.width, truth.shape[0] / photograph.height
    photograph = photograph.resize(truth.shape[::-1], Image.Resampling.BOX, reducing_gap=2)
    pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)
    wrong, boxes = np.zeros_like(truth), []
    for region in labels.regions:
        box = [round(x * scale[n % 2]) for n, x in enumerate(region.box)]
        inside = np.s_[box[1] : box[3] + 1, box[0] : box[2] + 1]
        pair = (truth[inside] == region.annotated) & (predicted[inside] == region.predicted)
        wrong[inside] |= pair.astype(np.uint8)
        boxes.append(box)
    shown = [
        overlay(
            pixels, torch.from_numpy(mask), classes=(), colors=palette, background=ground,
            legend=False,
        )
        for mask, palette, ground in (
            (truth, colors, background(source)),
            (predicted, colors, background(source)),
            (wrong, (ERROR, ERROR), 0),
        )
    ]  # fmt: skip
    ImageDraw.Draw(shown[-1]).rectangle(boxes[0], outline=ERROR, width=2)
    return [photograph, *shown]
