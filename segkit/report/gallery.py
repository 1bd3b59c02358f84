"""Pictures of an evaluation for the page of a run."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from segkit.core import distributed
from segkit.core.files import write_json
from segkit.core.run import Run
from segkit.data.images import as_rgb
from segkit.data.source import IGNORE, Source, background
from segkit.inference.outputs import ERROR, PALETTES, Color, color_table, comparison_image, outlines
from segkit.report.html import data_uri
from segkit.training.evaluate import Evaluation
from segkit.training.metrics import per_image_miou

SIDE = 320  # longest side of a picture on the page
MAX_SHEETS = 6  # pictures of an evaluation that trackers get

_order = attrgetter("miou", "index")


@dataclass(eq=False)
class Picture:
    """A validation image and its masks, small; :meth:`Gallery.pictures` sets the last two fields.

    ``worst`` is True if the image was selected for its low IoU.
    """

    index: int
    name: str
    miou: float
    counts: Tensor
    truth: np.ndarray
    predicted: np.ndarray
    image: Image.Image = field(init=False)
    worst: bool = field(init=False)


class Gallery:
    """Evaluation callback that selects images: half with the lowest IoU, half evenly spread.

    It keeps small masks only; photographs are read again at the end. With several ranks, each keeps
    its own candidates and rank 0 selects.

    Args:
        size: Number of images to select.
    """

    def __init__(self, source: Source, indices: Sequence[int], *, size: int) -> None:
        self._source, self._size = source, size
        places = np.linspace(0, len(indices) - 1, size // 2).astype(int)
        self._evenly = {indices[place] for place in places}
        self._spread: list[Picture] = []
        self._worst: list[Picture] = []

    def add(self, index: int, predicted: Tensor, truth: Tensor, counts: Tensor) -> None:
        """Keep the image if it may be selected.

        Shape:
            predicted, truth: (H, W)
            counts: (C, 3), from :func:`segkit.training.metrics.counts_of`
        """
        miou = float(per_image_miou(counts))
        if not self._size or math.isnan(miou):  # NaN: the image has no labelled pixel
            return
        low = len(self._worst) < self._size or miou < self._worst[-1].miou
        if low or index in self._evenly:
            name, masks = self._source.names[index], (small_mask(truth), small_mask(predicted))
            kept = self._spread if index in self._evenly else self._worst
            kept.append(Picture(index, name, miou, counts, *masks))
            self._worst = sorted(self._worst, key=_order)[: self._size]

    def gather(self) -> None:
        """Move the candidates of all ranks to rank 0; called by all ranks."""
        shares = distributed.gather(self._spread + self._worst)
        kept = [picture for share in shares for picture in share]
        self._spread = [picture for picture in kept if picture.index in self._evenly]
        self._worst = [picture for picture in kept if picture.index not in self._evenly]

    def pictures(self) -> list[Picture]:
        """Return the selection, the lowest IoU first."""
        kept = sorted(self._spread + self._worst, key=_order)
        half = self._size - self._size // 2
        rest = sorted(kept[half:], key=lambda picture: picture.index not in self._evenly)
        chosen = kept[:half] + sorted(rest[: self._size - half], key=_order)
        for place, picture in enumerate(chosen):
            picture.worst = place < half
            picture.image = small_photograph(self._source, picture.index, picture.truth)
        return chosen

    def sheet(self, picture: Picture, colors: Sequence[Color]) -> Image.Image:
        """Return photograph, truth, prediction and errors side by side."""
        image = torch.from_numpy(np.array(picture.image)).permute(2, 0, 1)
        truth, predicted = torch.from_numpy(picture.truth), torch.from_numpy(picture.predicted)
        return comparison_image(
            image, predicted, truth, colors=colors, background=background(self._source)
        )

    def to_json(self, picture: Picture, colors: Sequence[Color]) -> dict[str, Any]:
        """Return a picture as JSON values; images are ``data:`` addresses."""
        correct, true, predicted = picture.counts.unbind(-1)
        union = true + predicted - correct
        ground = background(self._source)
        return {
            "name": picture.name,
            "miou": round(picture.miou, 4),
            "iou": {int(c): round(float(correct[c] / union[c]), 4) for c in union.nonzero()[:, 0]},
            "worst": picture.worst,
            "size": picture.image.size,
            "photograph": data_uri(picture.image),
            "truth": _layer(picture.truth, colors, ground),
            "predicted": _layer(picture.predicted, colors, ground),
            "errors": _errors(picture.truth, picture.predicted),
        }


def record(
    run: Run, fold: int, step: int, evaluation: Evaluation, gallery: Gallery
) -> Iterator[tuple[str, Image.Image]]:
    """Write ``evaluation.json`` of a fold's best evaluation for its page.

    With several ranks, only rank 0 calls this, after :meth:`Gallery.gather`.

    Returns:
        Name and sheet of the worst pictures, drawn when iterated.
    """
    pictures = gallery.pictures()
    colors = PALETTES[run.read("config.json")["infer"]["palette"]]
    shown = [gallery.to_json(picture, colors) for picture in pictures]
    content = {"step": step, "matrix": evaluation.matrix.tolist(), "pictures": shown}
    write_json(run.fold(fold) / "evaluation.json", content)
    return ((picture.name, gallery.sheet(picture, colors)) for picture in pictures[:MAX_SHEETS])


def small_mask(mask: Tensor) -> np.ndarray:
    """Return a mask of at most :data:`SIDE` rows and columns, sampled without interpolation."""
    scale = min(1.0, SIDE / max(mask.shape))
    size = [max(1, round(side * scale)) for side in mask.shape]
    pixels = mask.cpu().to(torch.uint8)[None, None]
    return functional.interpolate(pixels, size, mode="nearest-exact")[0, 0].numpy()


def small_photograph(source: Source, index: int, mask: np.ndarray) -> Image.Image:
    """Return a photograph in the size of its small mask."""
    photograph = Image.fromarray(as_rgb(source.image(index)).permute(1, 2, 0).numpy())
    return photograph.resize(mask.shape[::-1], Image.Resampling.BOX, reducing_gap=2)


def _layer(mask: np.ndarray, colors: Sequence[Color], ground: int | None) -> str:
    """Return a mask to draw over its photograph: translucent areas with opaque outlines."""
    palette, alpha = color_table(colors), np.full(256, 150, np.uint8)
    alpha[[IGNORE] if ground is None else [IGNORE, ground]] = 0
    first = 128  # palette entry of the first outline, if there are fewer classes
    if (mask[mask != IGNORE] < first - 1).all():
        mask = np.where(outlines(mask) & (mask != IGNORE), mask + first, mask)
        palette[first:IGNORE] = palette[: IGNORE - first]
        alpha[first:IGNORE] = np.where(alpha[: IGNORE - first] > 0, 255, 0)
    return _png(mask, palette, alpha)


def _errors(truth: np.ndarray, predicted: np.ndarray) -> str:
    """Return an image that is transparent where the prediction is right, gray if unknown."""
    values = np.where(truth == IGNORE, 2, truth != predicted).astype(np.uint8)
    colors = np.array([(0, 0, 0, 0), (*ERROR, 215), (128, 128, 128, 190)], np.uint8)
    return _png(values, colors[:, :3], colors[:, 3])


def _png(values: np.ndarray, palette: np.ndarray, alpha: np.ndarray) -> str:
    image = Image.fromarray(values)
    image.putpalette(palette.tobytes())
    image.info["transparency"] = alpha.tobytes()
    return data_uri(image, format="PNG")
