"""Mixtures: operations that bring a second image into the first.

An operation plans for a canvas: it asks for another image, chooses how that one is scaled, flipped
and placed, and gives a step that pastes some of it. Put these first in the list, and all that comes
after treats the mixture as one image.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segkit.augment.geometry import Size, flipping, scaling, shifting, warp
from segkit.augment.ranges import check, draw
from segkit.core.errors import ConfigError
from segkit.core.labels import IGNORE

Others = Callable[[np.random.Generator], tuple[Tensor, Tensor]]
"""Another labelled image, chosen with the numbers it is given: (3, H, W) and (H, W), uint8."""

Run = Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None, Tensor | None]]

_COARSE = 64  # longest side of the grid on which objects of one class are told apart


def rare_weights(counts: np.ndarray) -> np.ndarray:
    """How often to choose each image so that the classes it shows are chosen alike.

    Args:
        counts: (N, C) pixels of each class in each image, without the background.

    Returns:
        (N,) chances that add up to one. An image weighs what its rarest class does: one over the
        number of images that show that class. An image without objects is never chosen.

    Raises:
        ConfigError: No image shows an object.
    """
    shows = np.asarray(counts) > 0
    images = shows.sum(axis=0)
    weights = np.where(shows, 1 / np.maximum(images, 1), 0).max(axis=1, initial=0)
    if not weights.any():
        raise ConfigError("mixtures need objects, and no training image shows one")
    return weights / weights.sum()


@dataclass(frozen=True, kw_only=True)
class CopyPaste:
    """Paste objects of another image, where and as large as they happen to fall.

    Ghiasi et al. 2021, https://arxiv.org/abs/2012.07177

    Args:
        scale: Range of the other image's size, in sizes of its own.
        objects: Fewest and most objects pasted.
        rare: Classes to take first where the other image shows one of them.
        background: Class that is never pasted.

    Departs from the paper: an object is a connected region of one class, since masks hold no
    instances; edges are hard (the paper found blending to make no difference).
    """

    scale: tuple[float, float] = (0.8, 1.25)
    objects: tuple[int, int] = (1, 3)
    rare: tuple[int, ...] = ()
    background: int = 0

    def __post_init__(self) -> None:
        check("scale", self.scale, low=0, above=True)
        check("objects", self.objects, low=1)

    def __call__(self, size: Size, rng: np.random.Generator, others: Others | None) -> Run:
        image, mask = _other("copy_paste", others, rng)
        count = int(rng.integers(self.objects[0], self.objects[1] + 1))
        chosen = _objects(mask, count, rng, self.rare, self.background)
        matrix = _placed(mask, size, draw(rng, self.scale), rng)
        return functools.partial(_paste, other=image, labels=mask, chosen=chosen, matrix=matrix)


@dataclass(frozen=True, kw_only=True)
class CutMix:
    """Replace a rectangle by that of another image.

    Yun et al. 2019, https://arxiv.org/abs/1905.04899

    Args:
        area: Range of the rectangle's share of the canvas; its proportions are the canvas's.
        scale: Range of the other image's size, in sizes that just cover the canvas.
    """

    area: tuple[float, float] = (0.1, 0.5)
    scale: tuple[float, float] = (1.0, 1.5)

    def __post_init__(self) -> None:
        check("area", self.area, low=0, high=1)
        check("scale", self.scale, low=0, above=True)

    def __call__(self, size: Size, rng: np.random.Generator, others: Others | None) -> Run:
        image, mask = _other("cutmix", others, rng)
        side = math.sqrt(draw(rng, self.area))
        height, width = (max(1, round(length * side)) for length in size)
        top, left = rng.integers(size[0] - height + 1), rng.integers(size[1] - width + 1)
        window = torch.zeros(size, dtype=torch.bool)
        window[top : top + height, left : left + width] = True
        matrix = _placed(mask, size, _cover(mask, size) * draw(rng, self.scale), rng)
        return functools.partial(_paste, other=image, labels=mask, window=window, matrix=matrix)


@dataclass(frozen=True, kw_only=True)
class ClassMix:
    """Paste all regions of half of another image's classes.

    Olsson et al. 2020, https://arxiv.org/abs/2007.07936

    Args:
        scale: Range of the other image's size, in sizes that just cover the canvas.

    Departs from the paper: pastes labels of people, where the paper pastes a model's own.
    """

    scale: tuple[float, float] = (1.0, 1.5)

    def __post_init__(self) -> None:
        check("scale", self.scale, low=0, above=True)

    def __call__(self, size: Size, rng: np.random.Generator, others: Others | None) -> Run:
        image, mask = _other("classmix", others, rng)
        classes = [int(index) for index in mask.unique() if index != IGNORE]
        half = rng.permutation(classes)[: (len(classes) + 1) // 2]
        chosen = torch.isin(mask, torch.as_tensor(half, dtype=torch.uint8))
        matrix = _placed(mask, size, _cover(mask, size) * draw(rng, self.scale), rng)
        return functools.partial(_paste, other=image, labels=mask, chosen=chosen, matrix=matrix)


def _other(name: str, others: Others | None, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    if others is None:
        raise ConfigError(f"{name}: needs other labelled images, and there are none here")
    return others(rng)


def _cover(mask: Tensor, size: Size) -> float:
    """The factor by which an image just covers a canvas."""
    return max(size[0] / mask.shape[0], size[1] / mask.shape[1])


def _placed(mask: Tensor, size: Size, scale: float, rng: np.random.Generator) -> np.ndarray:
    """From the canvas to the other image: scaled, flipped half of the time, moved about.

    As much of it as can be lies on the canvas.
    """
    height, width = mask.shape[-2] * scale, mask.shape[-1] * scale
    top, left = rng.random() * (height - size[0]), rng.random() * (width - size[1])
    flip = flipping(mask.shape[-1]) if rng.random() < 0.5 else np.eye(3)
    return flip @ scaling(1 / scale, 1 / scale) @ shifting(left, top)


def _objects(
    mask: Tensor, count: int, rng: np.random.Generator, rare: Sequence[int], background: int
) -> Tensor:
    """Where some objects are: connected regions, each found from one of its pixels."""
    free = (mask != background) & (mask != IGNORE)
    chosen = torch.zeros_like(free)
    for _ in range(count):
        left = mask[free & ~chosen].unique()
        if not len(left):
            break
        wanted = [int(index) for index in left if index in rare] or left.tolist()
        own = (mask == int(rng.choice(wanted))) & ~chosen
        places = own.nonzero()
        chosen |= _region(own, places[int(rng.integers(len(places)))])
    return chosen


def _region(own: Tensor, seed: Tensor) -> Tensor:
    """The pixels connected to one, as far as a coarse grid tells."""
    height, width = own.shape
    cell = max(1, math.ceil(max(height, width) / _COARSE))
    coarse = F.max_pool2d(own[None].float(), cell, ceil_mode=True)
    reached = torch.zeros_like(coarse)
    reached[0, int(seed[0]) // cell, int(seed[1]) // cell] = 1
    while True:
        grown = F.max_pool2d(reached, 3, stride=1, padding=1) * coarse
        if torch.equal(grown, reached):
            break
        reached = grown
    fine = reached[0].repeat_interleave(cell, 0).repeat_interleave(cell, 1)[:height, :width]
    return own & (fine > 0)


def _paste(
    image: Tensor,
    mask: Tensor | None,
    inside: Tensor | None,
    *,
    other: Tensor,
    labels: Tensor,
    matrix: np.ndarray,
    chosen: Tensor | None = None,
    window: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Lay over an image, within a window of it, what is chosen in another."""
    size = (image.shape[-2], image.shape[-1])
    device = image.device
    laid, seen, within = warp(other.to(device), labels.to(device), matrix, size)
    over = (
        torch.ones(size, dtype=torch.bool, device=device) if window is None else window.to(device)
    )
    if within is not None:
        over = over & (within > 0)
    if chosen is not None:
        _, picked, _ = warp(other[:1].to(device), chosen.to(device, torch.uint8), matrix, size)
        over = over & (picked == 1)
    if not image.is_floating_point():
        laid = laid.round().to(image.dtype) if laid.is_floating_point() else laid
    image = torch.where(over, laid.to(image.dtype), image)
    if mask is not None and seen is not None:
        mask = torch.where(over, seen, mask)
    return image, mask, inside if inside is None else inside.maximum(over.float())


MIX: dict[str, Callable[..., Callable[[Size, np.random.Generator, Others | None], Run]]] = {
    "copy_paste": CopyPaste,
    "cutmix": CutMix,
    "classmix": ClassMix,
}
