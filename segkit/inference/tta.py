"""Test-time augmentation: flipped, rotated and scaled views of an image, merged."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from segkit.core.errors import ConfigError, closest, quoted
from segkit.core.labels import IGNORE, Size

Merge = Literal["mean", "logits", "geometric", "max"]


@dataclass(frozen=True)
class View:
    """A test-time augmentation of an image, and its inverse for the model's prediction.

    ``apply`` scales, flips horizontally, rotates by quarter turns, then rotates by ``angle``.
    Flips and quarter turns, the eight symmetries of the square, move pixels without interpolation.
    ``first * second`` applies ``first``, then ``second``.

    Args:
        mirrored: Flip horizontally.
        quarter_turns: Number of counter-clockwise quarter turns, 0 to 3.
        scale: Factor on both sides; sizes are rounded, and ``invert`` returns to the exact size.
        angle: Degrees counter-clockwise. The canvas grows so that no pixel is lost, and its corners
            are filled by reflection.

    Shape:
        apply: (B, 3, H, W) -> (B, 3, h, w)
        invert: (B, C, h, w) -> (B, C, H, W)
    """

    mirrored: bool = False
    quarter_turns: int = 0
    scale: float = 1.0
    angle: float = 0.0

    def apply(self, image: Tensor) -> Tensor:
        """Return the augmented image."""
        scaled, _, canvas = self._sizes(_size(image))
        # Downscaling averages pixels, as the training pipeline does.
        image = _resize(image, scaled, antialias=self.scale < 1)
        image = image.mT if self.quarter_turns % 2 else image
        image = image.flip(self._flipped) if self._flipped else image
        return _rotate(image, self.angle, canvas) if self.angle else image

    def invert(self, scores: Tensor, size: Size) -> Tensor:
        """Return logits or probabilities of the augmented image, mapped back to (H, W) ``size``."""
        _, turned, _ = self._sizes(size)
        if self.angle:
            scores = _rotate(scores, -self.angle, turned)
        scores = scores.flip(self._flipped) if self._flipped else scores
        scores = scores.mT if self.quarter_turns % 2 else scores
        return _resize(scores, size)

    @property
    def _flipped(self) -> list[int]:
        """Return the axes to flip after the transposition of odd turns; needs a single copy."""
        turns = (self.quarter_turns - self.mirrored) % 4
        return [-2] * (turns in (1, 2)) + [-1] * (turns in (2, 3))

    def _sizes(self, size: Size) -> tuple[Size, Size, Size]:
        """Return (h, w) after each step of ``apply``: scale, quarter turns, rotation by angle."""
        h, w = (max(1, round(side * self.scale)) for side in size)
        turned = (w, h) if self.quarter_turns % 2 else (h, w)
        cos, sin = math.cos(math.radians(self.angle)), abs(math.sin(math.radians(self.angle)))
        canvas = tuple(math.ceil(a * cos + b * sin) for a, b in (turned, turned[::-1]))
        return (h, w), turned, (canvas[0], canvas[1])

    def __mul__(self, then: "View") -> "View":
        # A flip after a rotation reverses the rotation's direction.
        sign = -1 if then.mirrored else 1
        return View(
            mirrored=self.mirrored != then.mirrored,
            quarter_turns=(sign * self.quarter_turns + then.quarter_turns) % 4,
            scale=self.scale * then.scale,
            angle=sign * self.angle + then.angle,
        )

    def __str__(self) -> str:
        parts = [_SYMMETRY_NAMES[self.mirrored, self.quarter_turns]]
        parts += [f"scale{self.scale:g}"] if self.scale != 1 else []
        parts += [f"rotate{self.angle:g}"] if self.angle else []
        return "*".join(parts[1:] if parts[0] == "identity" and parts[1:] else parts)


SYMMETRIES = {
    "identity": View(),
    "hflip": View(mirrored=True),
    "vflip": View(mirrored=True, quarter_turns=2),
    "rot90": View(quarter_turns=1),
    "rot180": View(quarter_turns=2),
    "rot270": View(quarter_turns=3),
    "transpose": View(mirrored=True, quarter_turns=1),
    "antitranspose": View(mirrored=True, quarter_turns=3),
}
_SYMMETRY_NAMES = {(v.mirrored, v.quarter_turns): name for name, v in SYMMETRIES.items()}

SETS = {
    "flips": ("identity", "hflip", "vflip", "rot180"),
    "square": tuple(SYMMETRIES),
    "flip_rotate_scale": tuple(
        f"{flip}*{turn}*scale{scale}"
        for scale in (1, 0.75, 1.25, 1.5)
        for turn in ("identity", "rot90")
        for flip in ("identity", "hflip")
    ),
}
"""Named sets of views. ``flip_rotate_scale`` has the contest's 16 views."""


Views: TypeAlias = str | Sequence[str | View]
"""Views, or their names; see :func:`parse_views`."""


def parse_views(spec: Views) -> tuple[View, ...]:
    """Parse views: a name, a set (``"flips"``), or a product (``"hflip*scale1.5"``).

    Args:
        spec: Names and views, or a comma-separated string of names. Duplicates are removed.

    Raises:
        ConfigError: A name is unknown, or a scale or an angle is out of range.
    """
    views: list[View] = []
    for name in spec.split(",") if isinstance(spec, str) else spec:
        if isinstance(name, View):
            views.append(name)
        else:
            products = SETS.get(name.strip(), (name,))
            views += [reduce(mul, map(_parse_factor, product.split("*"))) for product in products]
    return tuple(dict.fromkeys(views))


def _parse_factor(name: str) -> View:
    name = name.strip()
    if name in SYMMETRIES:
        return SYMMETRIES[name]
    if name in SETS:
        raise ConfigError(
            f"view {quoted(name)}: a set cannot be multiplied; name its views separately"
        )
    number = re.fullmatch(r"(scale|rotate)(-?\d+(?:\.\d+)?)", name)
    if number is None:
        words = [*SYMMETRIES, *SETS, "scale1.5", "rotate5"]
        raise ConfigError(f"unknown view {quoted(name)}{closest(name, words)}")
    value = float(number[2])
    if number[1] == "scale":
        if not 0.05 <= value <= 20:
            raise ConfigError(f"view {quoted(name)}: expected a scale from 0.05 to 20")
        return View(scale=value)
    if not -45 <= value <= 45:
        raise ConfigError(
            f"view {quoted(name)}: expected an angle from -45 to 45; multiply by rot90"
        )
    return View(angle=value)


def merge_views(
    logits_of: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    views: Views = (),
    merge: Merge = "mean",
    coefficients: Sequence[float] | None = None,
) -> Tensor:
    """Return probabilities merged over several views of an image, one view in memory at a time.

    Args:
        logits_of: Maps an image to logits of its size.
        views: The views; empty for the image itself.
        merge: ``"mean"`` of the probabilities, ``"max"`` of them (scaled to sum to one), or the
            probabilities of the mean ``"logits"``. ``"geometric"``, the mean of logarithms scaled
            to sum to one, equals ``"logits"``, since a softmax depends on differences only.
        coefficients: One per view, of any sum; default: equal.

    Shape:
        image: (B, 3, H, W) -> (B, C, H, W), float32

    Raises:
        ConfigError: The coefficients do not fit the views or the merge.
    """
    views = parse_views(views) or (View(),)
    normalized = _normalized(coefficients, len(views), merge)
    merged: Tensor | None = None
    for view, coefficient in zip(views, normalized, strict=True):
        part = view.invert(logits_of(view.apply(image)).float(), _size(image))
        if merge in ("mean", "max"):
            part = part.softmax(1)
        if merge == "max":
            merged = part if merged is None else torch.maximum(merged, part, out=merged)
        else:
            merged = part * coefficient if merged is None else merged.add_(part, alpha=coefficient)
    assert merged is not None
    if merge == "max":
        return merged / merged.sum(1, keepdim=True)
    return merged if merge == "mean" else merged.softmax(1)


def true_class_samples(probabilities: Tensor, target: Tensor, *, samples: int = 1024) -> Tensor:
    """Return the probability of the true class at pixels sampled evenly over an image.

    Args:
        target: Class indices; if all are ignored, the result is NaN.
        samples: Number of pixels, equal for every image so that all images count equally.

    Shape:
        probabilities: (C, H, W)
        target: (H, W)
        returns: (samples,)
    """
    chosen = sample_pixels(target, samples)
    if not len(chosen):
        return probabilities.new_full((samples,), math.nan)
    classes = target.flatten()[chosen].long().to(probabilities.device)
    return probabilities.flatten(1)[classes, chosen.to(probabilities.device)]


def sample_pixels(target: Tensor, samples: int = 1024) -> Tensor:
    """Return pixels that are not ignored, spread evenly over a flattened mask; none if all are."""
    known = (target.flatten() != IGNORE).nonzero()[:, 0]
    if not len(known):
        return known
    return known[torch.arange(samples, device=known.device) * len(known) // samples]


def fit_coefficients(probabilities: Tensor, *, steps: int = 100) -> list[float]:
    """Return the view coefficients that maximize the likelihood of the true classes.

    Expectation maximization of a mixture's coefficients (Dempster et al. 1977): every step raises
    the likelihood, which has a single maximum. Fit on images that no model trained on.

    Args:
        probabilities: :func:`true_class_samples` of each view, (views, N).
        steps: Number of iterations; more change little, as the likelihood is flat near its maximum.
    """
    probabilities = probabilities.double().clamp_min(1e-12)
    coefficients = torch.full_like(probabilities[:, :1], 1 / len(probabilities))
    for _ in range(steps):
        joint = coefficients * probabilities
        coefficients = (joint / joint.sum(0)).mean(1, keepdim=True)
    return coefficients[:, 0].tolist()


def _normalized(coefficients: Sequence[float] | None, count: int, merge: Merge) -> list[float]:
    if coefficients is None:
        return [1 / count] * count
    if merge == "max":
        raise ConfigError("merging views by max takes no view coefficients; leave them out")
    if len(coefficients) != count:
        raise ConfigError(f"{len(coefficients)} view coefficients were given for {count} views")
    if min(coefficients) < 0 or not 0 < sum(coefficients) < math.inf:
        raise ConfigError(
            f"view coefficients must be positive or zero and not all zero, not {coefficients}"
        )
    return [value / sum(coefficients) for value in coefficients]


def _size(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]


def _resize(image: Tensor, size: Size, *, antialias: bool = False) -> Tensor:
    if _size(image) == size:
        return image
    return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=antialias)


def _rotate(image: Tensor, angle: float, canvas: Size) -> Tensor:
    """Return the image rotated counter-clockwise about its center, on a canvas of another size."""
    (h, w), (rows, columns) = _size(image), canvas
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    # Maps canvas to image coordinates, both from the center in units of half a side.
    source = image.new_tensor(
        [[cos * columns / w, -sin * rows / w, 0], [sin * columns / h, cos * rows / h, 0]]
    ).expand(len(image), 2, 3)
    grid = F.affine_grid(source, [len(image), 1, rows, columns], align_corners=False)
    return F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)
