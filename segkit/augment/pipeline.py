"""Augmentation pipeline: draws all random numbers into a plan, then renders the plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segkit.augment.color import COLOR, CURVES, NO_CHANGE, affine, curved, recolored
from segkit.augment.filters import FILTERS
from segkit.augment.geometry import GEOMETRY, IDENTITY, Canvas, Resize, Size, warp
from segkit.augment.mix import MIX, Others
from segkit.core.config import Config, build
from segkit.core.errors import ConfigError

OPERATIONS: dict[str, Callable[..., Any]] = {**GEOMETRY, **COLOR, **CURVES, **FILTERS, **MIX}


_LEVELS = np.tile([0.0, 255.0], (3, 1))

# Freeing a block of this size raises glibc's mmap threshold, so that later blocks are reused for
# the next sample. Otherwise they are returned to the system, and the page faults cost more than
# the work.
torch.empty(31 << 20, dtype=torch.uint8)


def generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the random generator of one sample, the same in every process."""
    return np.random.default_rng((seed, epoch, index))


@dataclass(frozen=True)
class Warp:
    """A resampling of the image and its mask through a (3, 3) matrix to ``size``."""

    matrix: np.ndarray
    size: Size


@dataclass(frozen=True)
class Recolor:
    """A multiplication of colors by a (4, 4) matrix."""

    matrix: np.ndarray


@dataclass(frozen=True)
class Curve:
    """A lookup of values in a table."""

    table: np.ndarray


@dataclass(frozen=True)
class Filter:
    """An operation on pixels and their neighbors: a function of (image, mask)."""

    run: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Mix:
    """A mix with another image: a function of (image, mask, 1 where the image is not padding)."""

    run: Callable[
        [Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None, Tensor | None]
    ]


Step = Warp | Recolor | Curve | Filter | Mix


@dataclass(frozen=True)
class Plan:
    """All steps for one image; rendering it draws no random numbers.

    Args:
        steps: The steps in order.
        color: (4, 4), the last color matrix, which is multiplied with the normalization.
        size: Height and width of the result.
    """

    steps: tuple[Step, ...]
    color: np.ndarray
    size: Size


class Pipeline:
    """Augmentation of an image and its mask with as few passes over the pixels as possible.

    Geometric operations are multiplied to one matrix and color operations to another, so a list of
    both needs one resampling of the image, one of the mask, and one color product that includes the
    normalization. Geometry and color commute. Filters, curves and mixing operations keep their
    place in the list: all operations before them are applied first, except color operations before
    a linear filter, which commute with it.

    Args:
        operations: ``{"name": ..., "p": ..., arguments}`` in order. ``p`` is the probability of
            applying it, 1 by default (flips 0.5, grayscale 0.1).
        size: Height and width that every result is resized to at the end; ``None``: no resize.
        mean: Mean of R, G, B in 0..1. Padding has this color, which is 0 in the result.
        std: Standard deviation of R, G, B in 0..1.

    Raises:
        ConfigError: An operation is unknown or has an invalid argument.
    """

    def __init__(
        self,
        operations: Sequence[Mapping[str, Any] | str],
        *,
        size: Size | None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.size = size
        self._operations = [
            _operation(spec, f"augment.train[{position}]")
            for position, spec in enumerate(operations)
        ]
        deviations, means = np.array(std, dtype=float), np.array(mean, dtype=float)
        self._normalizing = affine(np.diag(1 / deviations), -means / deviations)
        self._limits = np.stack([-means, 1 - means], axis=1) / deviations[:, None]

    def plan(
        self,
        size: Size,
        rng: np.random.Generator,
        mask: Tensor | None = None,
        others: Others | None = None,
    ) -> Plan:
        """Draw all random numbers for one image.

        Args:
            size: Height and width of the image.
            rng: See :func:`generator`. The same generator state gives the same plan.
            mask: Mask of the image, (H, W), for operations that depend on positions of classes.
            others: Draws another image and its mask with ``rng``, for mixing operations.
        """
        draft = _Draft(Canvas(size, source=mask))
        for name, chance, operation in self._operations:
            if rng.random() >= chance:
                continue
            if name in GEOMETRY:
                draft.canvas = operation(draft.canvas, rng)
            elif name in COLOR:
                draft.recolor(operation(rng))
            elif name in CURVES:
                draft.stand(Curve(operation(rng)))
            elif name in FILTERS:
                colors_pass = getattr(operation, "linear", False)
                draft.stand(Filter(operation(rng)), colors_pass=colors_pass)
            else:
                draft.stand(Mix(operation(draft.canvas.size, rng, others)))
        if self.size is not None and draft.canvas.size != self.size:
            draft.canvas = Resize(size=self.size)(draft.canvas, rng)
        return draft.plan()

    def __call__(
        self,
        image: Tensor,
        mask: Tensor | None,
        rng: np.random.Generator,
        others: Others | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Plan and render one image.

        Shape:
            image: (3, H, W) uint8; mask: (H, W) uint8
            result: (3, h, w) float32, normalized; (h, w) uint8
        """
        height, width = image.shape[-2:]
        return self.render_one(image, mask, self.plan((height, width), rng, mask, others))

    def render(
        self, images: Sequence[Tensor] | Tensor, masks: Sequence[Tensor] | Tensor, plans: list[Plan]
    ) -> tuple[Tensor, Tensor]:
        """Render a batch on its device, with plans of equal size.

        Shape:
            images[i]: (3, H, W) uint8, of any size; masks[i]: (H, W) uint8
            result: (B, 3, h, w) float32, normalized; (B, h, w) uint8
        """
        pairs = [
            self.render_one(image, mask, plan)
            for image, mask, plan in zip(images, masks, plans, strict=True)
        ]
        rendered = torch.stack([image for image, _ in pairs])
        return rendered, torch.stack([mask for _, mask in pairs if mask is not None])

    def render_one(
        self, image: Tensor, mask: Tensor | None, plan: Plan
    ) -> tuple[Tensor, Tensor | None]:
        """Render one image with its plan; shapes as in :meth:`__call__`."""
        inside: Tensor | None = None
        for step in plan.steps:
            if isinstance(step, Warp):
                image, mask, inside = _warped(image, mask, inside, step)
            elif isinstance(step, Recolor):
                image = recolored(image, step.matrix, limits=_LEVELS)
            elif isinstance(step, Curve):
                image = curved(image, step.table)
            elif isinstance(step, Filter):
                image, mask = step.run(image, mask)
            else:
                image, mask, inside = step.run(image, mask, inside)
        image = recolored(image, self._normalizing @ plan.color, unit=1.0, limits=self._limits)
        if inside is not None:
            image.mul_(inside)
        # A mask that was only copied may be a view of its source, which may be a cache.
        copied = None if mask is None else mask.clone(memory_format=torch.contiguous_format)
        return image, copied


def _operation(spec: Mapping[str, Any] | str, path: str) -> tuple[str, float, Callable[..., Any]]:
    """Return the name, probability and function of one operation of the configuration."""
    component = {"name": spec} if isinstance(spec, str) else dict(spec)
    chance = component.pop("p", None)
    operation = build(OPERATIONS, component, path)
    if chance is None:
        chance = getattr(operation, "default_p", 1.0)
    if isinstance(chance, bool) or not isinstance(chance, int | float) or not 0 <= chance <= 1:
        raise ConfigError(f"{path}.p: expected a number from 0 to 1; got {chance!r}")
    return component["name"], float(chance), operation


class _Draft:
    """Builder of a plan that joins operations into one step where possible.

    Each curve, filter and mixing operation ends a section of the list. The geometry of a section is
    one step, followed by its colors as one step. Colors before a linear filter are moved behind it.
    """

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas
        self.color = NO_CHANGE
        self._steps: list[Step] = []

    def recolor(self, matrix: np.ndarray) -> None:
        self.color = matrix @ self.color

    def stand(self, step: Curve | Filter | Mix, *, colors_pass: bool = False) -> None:
        """Add a step that keeps its place: everything planned before is applied before it."""
        self._move()
        if not colors_pass and self.color is not NO_CHANGE:
            self._steps.append(Recolor(self.color))
            self.color = NO_CHANGE
        self._steps.append(step)

    def plan(self) -> Plan:
        self._move()
        return Plan(tuple(self._steps), self.color, self.canvas.size)

    def _move(self) -> None:
        if self.canvas.matrix is not IDENTITY:
            self._steps.append(Warp(self.canvas.matrix, self.canvas.size))
            self.canvas = self.canvas.rendered()


def _warped(
    image: Tensor, mask: Tensor | None, inside: Tensor | None, step: Warp
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Apply a warp to an image that may have padding already."""
    warped, labels, within = warp(image, mask, step.matrix, step.size)
    if inside is not None:
        _, warped_inside, _ = warp(image, inside.to(torch.uint8), step.matrix, step.size)
        within = None if warped_inside is None else (warped_inside == 1).float()
    return warped, labels, within


def build_pipeline(config: Config) -> Pipeline:
    """Build the augmentation of training images from a configuration."""
    data, augment = config.data, config.augment
    return Pipeline(augment.train, size=augment.size, mean=data.mean, std=data.std)
