"""Pictures for the run's page, of predictions that an evaluation makes anyway."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segkit.core import distributed
from segkit.data.source import IGNORE, Source, background
from segkit.inference.outputs import ERROR, Color, color_table, outlines, sheet
from segkit.report.blocks import data_uri
from segkit.training.metrics import per_image_miou

SIDE = 256
"""Longest side of a picture on the page."""

_FILL, _EDGE = 150, 255  # opacity of areas and of their outlines
_RIGHT, _WRONG, _UNKNOWN = 0, 1, 2
_ERRORS = ((0, 0, 0, 0), (*ERROR, 215), (128, 128, 128, 190))


@dataclass(frozen=True)
class _Seen:
    index: int
    miou: float
    counts: Tensor
    truth: np.ndarray
    predicted: np.ndarray


@dataclass(frozen=True)
class Picture:
    """A validation image with its truth and prediction, small.

    Args:
        name: The image's file name.
        miou: Over the classes in truth or prediction.
        iou: Of each of these classes, by its index.
        image: The photograph.
        truth: Its mask.
        predicted: The predicted mask.
        worst: Whether it was chosen for its errors.
    """

    name: str
    miou: float
    iou: dict[int, float]
    image: Image.Image
    truth: np.ndarray
    predicted: np.ndarray
    worst: bool


class Gallery:
    """Looks on during an evaluation and keeps some images: half the worst, half evenly spread.

    Only small masks are kept, and photographs are read again at the end, so it costs next to
    nothing. Over several ranks each keeps its own, and rank 0 chooses among them.

    Args:
        source: The images.
        indices: Those evaluated, over all ranks.
        size: How many to keep.
    """

    def __init__(self, source: Source, indices: Sequence[int], *, size: int) -> None:
        self._source, self._size = source, size
        spread = np.linspace(0, len(indices) - 1, size // 2).astype(int).tolist() if size else []
        self._spread = {indices[at] for at in spread}
        self._seen: list[_Seen] = []

    def add(self, index: int, predicted: Tensor, truth: Tensor, counts: Tensor) -> None:
        """Look at an image's prediction.

        Shape:
            predicted, truth: (H, W)
            counts: (C, 3), from :func:`segkit.training.metrics.image_counts`
        """
        score = float(per_image_miou(counts))
        if not self._size or score != score:  # an image without a labelled pixel has none
            return
        others = [one.miou for one in self._seen if one.index not in self._spread]
        enters = len(others) < self._size or score < max(others)
        if enters or index in self._spread:
            self._seen.append(_Seen(index, score, counts, _small(truth), _small(predicted)))
            self._seen = self._best_of(self._seen)

    def _best_of(self, seen: list[_Seen]) -> list[_Seen]:
        """The spread ones, and of the others as many of the worst as could be needed."""
        ranked = sorted(seen, key=lambda one: (one.miou, one.index))
        worst = [one for one in ranked if one.index not in self._spread][: self._size]
        return [one for one in ranked if one.index in self._spread] + worst

    def pictures(self) -> list[Picture]:
        """What was kept, the worst first; called by all ranks, empty on all but rank 0."""
        shares = distributed.gather(self._seen)
        seen = sorted((one for share in shares for one in share), key=lambda o: (o.miou, o.index))
        worst = {one.index for one in seen[: self._size - self._size // 2]}
        spread = [one.index for one in seen if one.index in self._spread - worst]
        more = [one.index for one in seen if one.index not in {*worst, *spread}]
        chosen = {*worst, *[*spread, *more][: self._size - len(worst)]}
        return [self._picture(one, one.index in worst) for one in seen if one.index in chosen]

    def _picture(self, one: _Seen, worst: bool) -> Picture:
        photograph = Image.fromarray(self._source.image(one.index).permute(1, 2, 0).numpy())
        height, width = one.truth.shape
        right, true, predicted = one.counts.unbind(-1)
        union = true + predicted - right
        iou = {int(c): round(float(right[c] / union[c]), 4) for c in union.nonzero()[:, 0]}
        return Picture(
            name=self._source.names[one.index],
            miou=one.miou,
            iou=iou,
            image=photograph.resize((width, height), Image.Resampling.BOX, reducing_gap=2.0),
            truth=one.truth,
            predicted=one.predicted,
            worst=worst,
        )

    def sheet(self, one: Picture, colors: Sequence[Color]) -> Image.Image:
        """Photograph, truth, prediction and errors beside each other."""
        return sheet(
            torch.from_numpy(np.array(one.image)).permute(2, 0, 1),
            torch.from_numpy(one.predicted),
            torch.from_numpy(one.truth),
            colors=colors,
            background=background(self._source),
        )

    def to_json(self, pictures: Sequence[Picture], colors: Sequence[Color]) -> list[dict[str, Any]]:
        """Pictures as plain values: images are addresses that hold them."""
        ground = background(self._source)
        return [
            {
                "name": one.name,
                "miou": round(one.miou, 4),
                "iou": one.iou,
                "worst": one.worst,
                "size": one.image.size,
                "photograph": data_uri(one.image),
                "truth": _layer(one.truth, colors, ground),
                "predicted": _layer(one.predicted, colors, ground),
                "errors": _errors(one.truth, one.predicted),
            }
            for one in pictures
        ]


def _small(mask: Tensor) -> np.ndarray:
    """A mask of which every n-th row and column is kept, at most :data:`SIDE` of them."""
    height, width = mask.shape
    scale = min(1.0, SIDE / max(height, width))
    rows, columns = (
        ((torch.arange(n) + 0.5) * (side / n)).long()
        for side, n in ((height, round(height * scale)), (width, round(width * scale)))
    )
    return mask.cpu()[rows[:, None], columns].to(torch.uint8).numpy()


def _layer(mask: np.ndarray, colors: Sequence[Color], ground: int | None) -> str:
    """A mask to lie over its photograph: areas let it through, outlines do not."""
    palette, alpha = color_table(colors), np.full(256, _FILL, np.uint8)
    alpha[[IGNORE] if ground is None else [IGNORE, ground]] = 0
    half = 128  # with fewer classes, the values from here on are outlines
    if (mask[mask != IGNORE] < half - 1).all():
        mask = np.where(outlines(mask) & (mask != IGNORE), mask + half, mask)
        palette[half:IGNORE] = palette[: IGNORE - half]
        alpha[half:IGNORE] = np.where(alpha[: IGNORE - half] > 0, _EDGE, 0)
    return _png(mask, palette, alpha)


def _errors(truth: np.ndarray, predicted: np.ndarray) -> str:
    values = np.where(truth == predicted, _RIGHT, _WRONG)
    values[truth == IGNORE] = _UNKNOWN
    table = np.array(_ERRORS, np.uint8)
    return _png(values.astype(np.uint8), table[:, :3], table[:, 3])


def _png(values: np.ndarray, palette: np.ndarray, alpha: np.ndarray) -> str:
    image = Image.fromarray(values)
    image.putpalette(palette.tobytes())
    image.info["transparency"] = alpha.tobytes()
    return data_uri(image, format="PNG")
