"""Closed ranges in the arguments of operations: checked when built, drawn from when planned."""

import math

import numpy as np

from segkit.core.errors import ConfigError

Range = tuple[float, float]


def check(
    name: str, value: Range, *, low: float = -math.inf, high: float = math.inf, above: bool = False
) -> None:
    """Refuse a range that is not two numbers in order between ``low`` and ``high``.

    Args:
        name: Of the argument, for the error.
        value: The range.
        low: Smallest number allowed.
        high: Largest number allowed.
        above: Whether ``low`` itself is refused too.

    Raises:
        ConfigError: The range cannot be meant.
    """
    first, last = value
    ordered = math.isfinite(first) and math.isfinite(last) and first <= last
    if not ordered or first < low or last > high or (above and first <= low):
        bounds = [f"{'above' if above else 'at least'} {low:g}"] if low > -math.inf else []
        bounds += [f"at most {high:g}"] if high < math.inf else []
        limits = f", each {' and '.join(bounds)}" if bounds else ""
        raise ConfigError(
            f"{name}: expected two numbers, low then high{limits}; got [{first:g}, {last:g}]"
        )


def check_size(name: str, value: tuple[int, int]) -> None:
    """Refuse a (height, width) with a side below one pixel."""
    if min(value) < 1:
        raise ConfigError(f"{name}: expected height and width of at least 1; got {list(value)}")


def draw(rng: np.random.Generator, value: Range) -> float:
    """A number of the range, uniformly."""
    return float(rng.uniform(*value))
