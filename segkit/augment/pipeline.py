"""Augmentation pipeline: draws all random numbers into a plan, then renders the plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segkit.augment.color import COLOR, CURVES, affine, apply_matrix, apply_table, of_bands
from segkit.augment.color import IDENTITY as SAME_COLOR
from segkit.augment.filters import FILTERS, LINEAR
from segkit.augment.geometry import GEOMETRY, IDENTITY, Canvas, resize
from segkit.augment.mix import MIX, Others, Step
from segkit.augment.warp import Parts, warp
from segkit.core.config import Config, DataConfig, bind, matching
from segkit.core.errors import ConfigError, DataError
from segkit.core.labels import Size

OPERATIONS: dict[str, Callable[..., Any]] = {**GEOMETRY, **COLOR, **CURVES, **FILTERS, **MIX}

GIVEN = ("canvas", "canvas_size", "rng", "others")
"""Arguments of operations that the pipeline passes."""

DEFAULT_P = {"hflip": 0.5, "vflip": 0.5, "grayscale": 0.1}
"""Probabilities of operations that are not 1 by default."""

Picture = Tensor | np.ndarray | Image.Image


def list_augmentations(filter: str = "") -> list[str]:
    """Return the sorted names of the augmentations that contain ``filter``; ``*`` is a wildcard."""
    return sorted(matching(OPERATIONS, f"*{filter}*"))


def generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the random generator of one sample, the same in every process."""
    return np.random.default_rng((seed, epoch, index))


@dataclass(frozen=True)
class Plan:
    """All steps for one image; rendering it draws no random numbers."""

    steps: tuple[Step, ...]
    color: np.ndarray  # (4, 4), the last color matrix, multiplied with the normalization
    size: Size  # of the result


class Pipeline:
    """Augmentation of an image and its mask with as few passes over the pixels as possible.

    Geometric operations are multiplied to one matrix and color operations to another, so a list of
    both needs one resampling of the image, one of the mask, and one color product that includes the
    normalization. Geometry and color commute. Filters, curves and mixing operations keep their
    place in the list: all operations before them are applied first, except color operations before
    a linear filter, which commute with it.

    Args:
        operations: ``{"name": ..., "p": ..., arguments}`` in order, or names. ``p`` is the
            probability of applying it, 1 by default (flips 0.5, grayscale 0.1).
        size: Height and width that every result is resized to at the end; ``None``: no resize.
        mean: Mean of each band, such as R, G, B, in 0..1; as many as the images have bands.
            Padding has this color, which is 0 in the result.
        std: Standard deviation of each band in 0..1.
        path: Name of ``operations`` in error messages.

    Raises:
        ConfigError: An operation is unknown or has an invalid argument.
    """

    def __init__(
        self,
        operations: Sequence[Mapping[str, Any] | str],
        *,
        size: Size | None = None,
        mean: Sequence[float] = DataConfig.mean,
        std: Sequence[float] = DataConfig.std,
        path: str = "operations",
    ) -> None:
        self.size = size
        self._operations = [
            _operation(spec, f"{path}[{position}]") for position, spec in enumerate(operations)
        ]
        deviations, means = np.array(std, dtype=float), np.array(mean, dtype=float)
        self._normalizing = affine(np.diag(1 / deviations), -means / deviations)
        self._limits = np.stack([-means, 1 - means], axis=1) / deviations[:, None]
        self._bands = len(means)

    @overload
    def __call__(
        self,
        image: Picture,
        mask: Picture,
        rng: np.random.Generator | None = None,
        others: Others | None = None,
        *,
        long: bool = False,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def __call__(
        self,
        image: Picture,
        mask: Picture | None = None,
        rng: np.random.Generator | None = None,
        others: Others | None = None,
        *,
        long: bool = False,
    ) -> tuple[Tensor, Tensor | None]: ...

    def __call__(
        self,
        image: Picture,
        mask: Picture | None = None,
        rng: np.random.Generator | None = None,
        others: Others | None = None,
        *,
        long: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Augment and normalize one image.

        Args:
            image: uint8 pixels: an array (H, W, C), a PIL image, or a tensor (C, H, W), with as
                many bands C as the pipeline's ``mean`` has numbers: 3 by default.
            mask: Class indices (H, W), 255 = ignore: an array of integers or bools, a PIL image,
                or a uint8 tensor.
            rng: Source of the random numbers, such as :func:`generator`; default: a new one.
            others: Draws another image and its mask, for mixing operations; see :meth:`plan`.
            long: Return the mask as int64, as losses of PyTorch need it.

        Returns:
            The image, float32 (C, h, w), normalized; the mask (h, w), uint8 or int64.

        Raises:
            DataError: The image or the mask has another type or shape.
        """
        pixels = _pixels(image, self._bands)
        labels = None if mask is None else _labels(mask)
        size = pixels.shape[-2], pixels.shape[-1]
        if labels is not None and labels.shape != size:
            raise DataError(f"mask: has shape {tuple(labels.shape)}; expected {size} as the image")
        rng = np.random.default_rng() if rng is None else rng
        plan = self.plan(size, rng, labels, others)
        result, labels = self.render_one(pixels, labels, plan)
        return result, labels.long() if long and labels is not None else labels

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
        canvas, color, steps = Canvas(size, source=mask), SAME_COLOR, list[Step]()
        for name, probability, operation in self._operations:
            if rng.random() >= probability:
                continue
            if name in GEOMETRY:
                canvas = operation(canvas, rng)
                continue
            if name in COLOR:
                color = operation(rng) @ color
                continue
            if name in CURVES:
                step: Step = partial(_change, run=partial(apply_table, table=operation(rng)))
            elif name in FILTERS:
                on = operation.keywords.get("on", "image")
                step = partial(_change, run=operation(rng), on=on)
            elif others is None:
                raise ConfigError(f"{name}: needs other labelled images, and there are none here")
            else:
                step = operation(canvas.size, rng, others)
            canvas = _add_warp(steps, canvas)
            if color is not SAME_COLOR and name not in LINEAR:
                limits = np.tile([0.0, 255.0], (self._bands, 1))
                matrix = of_bands(color, self._bands)
                recolor = partial(apply_matrix, matrix=matrix, limits=limits)
                steps.append(partial(_change, run=recolor))
                color = SAME_COLOR
            steps.append(step)
        if self.size is not None and canvas.size != self.size:
            canvas = resize(canvas, rng, size=self.size)
        canvas = _add_warp(steps, canvas)
        return Plan(tuple(steps), color, canvas.size)

    def render(
        self, images: Sequence[Tensor] | Tensor, masks: Sequence[Tensor] | Tensor, plans: list[Plan]
    ) -> tuple[Tensor, Tensor]:
        """Render a batch on its device, with plans of equal size.

        Shape:
            images[i]: (C, H, W) uint8, of any size; masks[i]: (H, W) uint8
            result: (B, C, h, w) float32, normalized; (B, h, w) uint8
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
        """Render one image (C, H, W) and its mask (H, W), both uint8, with its plan."""
        inside: Tensor | None = None
        for step in plan.steps:
            image, mask, inside = step(image, mask, inside)
        matrix = self._normalizing @ of_bands(plan.color, self._bands)
        image = apply_matrix(image, matrix, unit=1.0, limits=self._limits)
        if inside is not None:
            image.mul_(inside)
        # A mask that was only copied may be a view of its source, which may be a cache.
        copied = None if mask is None else mask.clone(memory_format=torch.contiguous_format)
        return image, copied


def build_pipeline(config: Config) -> Pipeline:
    """Build the augmentation of training images from a configuration."""
    data, augment = config.data, config.augment
    return Pipeline(
        augment.train or (), size=augment.size, mean=data.mean, std=data.std, path="augment.train"
    )


def _operation(spec: Mapping[str, Any] | str, path: str) -> tuple[str, float, partial]:
    """Return the name, probability and function of one operation of the configuration."""
    component: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    probability = component.pop("p", None)
    operation = bind(OPERATIONS, component, path, given=GIVEN)
    name, arguments = component["name"], operation.keywords
    on_mask, classes = arguments.get("on") == "mask", arguments.get("classes")
    if name in ("closing", "opening") and on_mask != bool(classes):
        raise ConfigError(f"{path}.classes: expected with on='mask', and only there")
    if probability is None:
        probability = DEFAULT_P.get(name, 1.0)
    is_number = isinstance(probability, int | float) and not isinstance(probability, bool)
    if not is_number or not 0 <= probability <= 1:
        raise ConfigError(f"{path}.p: expected a number from 0 to 1; got {probability!r}")
    return name, float(probability), operation


def _pixels(image: Picture, bands: int) -> Tensor:
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != bands:
            raise DataError(f"image: has shape {tuple(image.shape)}; a tensor is ({bands}, H, W)")
        return image
    is_rgb = isinstance(image, Image.Image) and bands == 3
    pixels = np.array(image.convert("RGB") if is_rgb else image)  # type: ignore[union-attr]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != bands:
        raise DataError(
            f"image: is {pixels.dtype} of shape {pixels.shape}; expected uint8 (H, W, {bands})"
        )
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _labels(mask: Picture) -> Tensor:
    if isinstance(mask, Tensor):
        return mask
    labels = np.array(mask)
    if labels.dtype.kind not in "iub" or labels.ndim != 2:
        raise DataError(
            f"mask: is {labels.dtype} of shape {labels.shape}; expected integers (H, W)"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() <= 255:
        raise DataError(
            f"mask: has values {labels.min()} to {labels.max()}; expected 0 to 255, 255 = ignore"
        )
    return torch.from_numpy(labels.astype(np.uint8))


def _add_warp(steps: list[Step], canvas: Canvas) -> Canvas:
    """Add the canvas's geometry to the steps, if it has any; return the canvas after it."""
    if canvas.matrix is IDENTITY:
        return canvas
    steps.append(partial(_warp, matrix=canvas.matrix, size=canvas.size))
    return canvas.rendered()


def _warp(
    image: Tensor, mask: Tensor | None, inside: Tensor | None, *, matrix: np.ndarray, size: Size
) -> Parts:
    """Resample an image that may have padding already, and its mask."""
    warped, labels, covered = warp(image, mask, matrix, size)
    if inside is not None:
        _, warped_inside, _ = warp(image, inside.to(torch.uint8), matrix, size)
        covered = None if warped_inside is None else (warped_inside == 1).float()
    return warped, labels, covered


def _change(
    image: Tensor,
    mask: Tensor | None,
    inside: Tensor | None,
    *,
    run: Callable[[Tensor], Tensor],
    on: str = "image",
) -> Parts:
    """Apply a function to the image (values in 0..255), or to the mask if ``on`` is ``"mask"``."""
    if on == "image":
        return run(image), mask, inside
    return image, None if mask is None else run(mask), inside
