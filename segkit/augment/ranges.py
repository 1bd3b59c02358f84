"""Types of the arguments of operations, with checks that run when a pipeline is built."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np

from segkit.core.config import check_bounds
from segkit.core.errors import ConfigError

Check = Callable[[Any, str], None]
"""Function of an argument's value and of its path in the configuration, for errors."""

Range = tuple[float, float]


def between(low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Check:
    """Return the check of a range: two ascending numbers between ``low`` and ``high``.

    With ``above``, ``low`` itself is not allowed either.
    """

    def check(value: Range, path: str) -> None:
        first, last = value
        if not low <= first <= last <= high or (above and first == low):
            bounds = [f"{'above' if above else 'at least'} {low:g}"] if low > -math.inf else []
            bounds += [f"at most {high:g}"] if high < math.inf else []
            limits = f", each {' and '.join(bounds)}" if bounds else ""
            raise ConfigError(
                f"{path}: expected two numbers, low then high{limits}; got [{first:g}, {last:g}]"
            )

    return check


def within(low: float, high: float = math.inf) -> Check:
    """Return the check of a number, or of each number of a list."""
    return lambda value, path: check_bounds(low, high, **{path: value})


def odd(largest: float = math.inf) -> Check:
    """Return the check of a list of window sizes: odd numbers of pixels."""

    def check(value: Sequence[int], path: str) -> None:
        if not value or any(size % 2 == 0 or not 1 <= size <= largest for size in value):
            most = f", at most {largest}" if largest < math.inf else ""
            raise ConfigError(f"{path}: expected odd numbers of pixels{most}; got {list(value)}")

    return check


Factor = Annotated[Range, between(0)]
PositiveFactor = Annotated[Range, between(0, above=True)]
Angle = Annotated[Range, between()]
Sides = Annotated[tuple[int, int], within(1)]
"""Height and width."""

WindowSizes = Annotated[tuple[int, ...], odd()]


def draw(rng: np.random.Generator, value: Range) -> float:
    """Return a number drawn uniformly from the range."""
    return float(rng.uniform(*value))
