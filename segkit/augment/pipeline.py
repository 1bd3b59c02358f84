"""The pipeline: a list of operations, planned with random numbers, then rendered without any."""

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

# Once a block of this size was freed, glibc keeps what is freed later for the next sample. Else it
# goes back to the system each time, and the pages anew cost more than the work done on them.
torch.empty(31 << 20, dtype=torch.uint8)


def generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one sample, wherever and whenever it is made."""
    return np.random.default_rng((seed, epoch, index))


@dataclass(frozen=True)
class Warp:
    """Read the image and its mask through a (3, 3) matrix into ``size``."""

    matrix: np.ndarray
    size: Size


@dataclass(frozen=True)
class Recolor:
    """Multiply colors by a (4, 4) matrix."""

    matrix: np.ndarray


@dataclass(frozen=True)
class Curve:
    """Look values up in a table."""

    table: np.ndarray


@dataclass(frozen=True)
class Filter:
    """Work on pixels and their neighbors: a function of (image, mask)."""

    run: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Mix:
    """Bring another image in: a function of (image, mask, where the image is not padding)."""

    run: Callable[
        [Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None, Tensor | None]
    ]


Step = Warp | Recolor | Curve | Filter | Mix


@dataclass(frozen=True)
class Plan:
    """All that will be done to one image; no random number is left to draw.

    Args:
        steps: In order.
        color: (4, 4), the last change of colors, which is one product with the normalization.
        size: Height and width of the result.
    """

    steps: tuple[Step, ...]
    color: np.ndarray
    size: Size


class Pipeline:
    """Operations on an image and its mask that touch the pixels once.

    Geometry multiplies to one matrix and color to one, so a list of both is one reading of the
    image, one of the mask, and one product of colors that ends normalized. Both are pointwise in
    their own way and change places freely; operations on neighborhoods, curves and mixtures stand
    where they are in the list, and what is before them is carried out first, but for colors before
    a blur, which come to the same after it.

    Args:
        operations: ``{"name": ..., "p": ..., arguments}`` in order. ``p`` is the chance that it is
            applied, 1 if left out (flips 0.5, grayscale 0.1).
        size: Height and width that every result is stretched to at the end; ``None`` leaves them.
        mean: Of R, G, B in 0..1. Padding has this color: it is zero in the result.
        std: Of R, G, B in 0..1.

    Raises:
        ConfigError: An operation is unknown, or an argument of it cannot be meant.
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
            _operation(spec, f"augment.train[{place}]") for place, spec in enumerate(operations)
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
        """Draw everything random for one image.

        Args:
            size: Height and width of the image.
            rng: See :func:`generator`. The same numbers give the same plan.
            mask: Of the image, (H, W); for operations that look where classes are.
            others: Gives another image and its mask, chosen with ``rng``, to operations that mix.
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
        """Render a batch, on whichever device it lies, by plans of one size.

        Shape:
            images[i]: (3, H, W) uint8, each of its own size; masks[i]: (H, W) uint8
            result: (B, 3, h, w) float32, normalized; (B, h, w) uint8
        """
        done = [
            self.render_one(image, mask, plan)
            for image, mask, plan in zip(images, masks, plans, strict=True)
        ]
        rendered = torch.stack([one for one, _ in done])
        return rendered, torch.stack([one for _, one in done if one is not None])

    def render_one(
        self, image: Tensor, mask: Tensor | None, plan: Plan
    ) -> tuple[Tensor, Tensor | None]:
        """Carry a plan out; see :meth:`__call__`."""
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
    """Name, chance and function of one operation of the configuration."""
    component = {"name": spec} if isinstance(spec, str) else dict(spec)
    chance = component.pop("p", None)
    operation = build(OPERATIONS, component, path)
    if chance is None:
        chance = getattr(operation, "default_p", 1.0)
    if isinstance(chance, bool) or not isinstance(chance, int | float) or not 0 <= chance <= 1:
        raise ConfigError(f"{path}.p: expected a number from 0 to 1; got {chance!r}")
    return component["name"], float(chance), operation


class _Draft:
    """A plan in the making: joins what can be one step.

    A part of the list ends at each curve, filter and mixture. Its geometry is one step, before its
    colors. Colors pass a linear filter, and are one step with those after it.
    """

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas
        self.color = NO_CHANGE
        self._steps: list[Step] = []

    def recolor(self, matrix: np.ndarray) -> None:
        self.color = matrix @ self.color

    def stand(self, step: Curve | Filter | Mix, *, colors_pass: bool = False) -> None:
        """Add a step that keeps its place: what is before it is carried out before it."""
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
    """A warp, of an image with padding too."""
    warped, labels, within = warp(image, mask, step.matrix, step.size)
    if inside is not None:
        _, still, _ = warp(image, inside.to(torch.uint8), step.matrix, step.size)
        within = None if still is None else (still == 1).float()
    return warped, labels, within


def build_pipeline(config: Config) -> Pipeline:
    """The augmentation of training images that a configuration asks for."""
    data, augment = config.data, config.augment
    return Pipeline(augment.train, size=augment.size, mean=data.mean, std=data.std)
