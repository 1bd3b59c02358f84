"""Closed ranges as arguments of operations: validation and uniform sampling."""

import math

import numpy as np

from segkit.core.errors import ConfigError

Range = tuple[float, float]


def check(
    name: str, value: Range, *, low: float = -math.inf, high: float = math.inf, above: bool = False
) -> None:
    """Raise an error unless a range is two ascending numbers between ``low`` and ``high``.

    Args:
        name: Name of the argument, for the error message.
        value: The range.
        low: Smallest number allowed.
        high: Largest number allowed.
        above: If true, ``low`` itself is not allowed either.

    Raises:
        ConfigError: The range is invalid.
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
    """Raise an error if the height or the width is below 1."""
    if min(value) < 1:
        raise ConfigError(f"{name}: expected height and width of at least 1; got {list(value)}")


def draw(rng: np.random.Generator, value: Range) -> float:
    """Return a number drawn uniformly from the range."""
    return float(rng.uniform(*value))
