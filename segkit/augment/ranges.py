"""Arguments of operations: fields of a dataclass that check their values."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from segkit.core.errors import ConfigError

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """Base class of operations: construction checks the arguments declared by :func:`between` etc.

    Raises:
        ConfigError: An argument is invalid.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if "check" in field.metadata:
                field.metadata["check"](field.name, getattr(self, field.name))


def between(
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    default: Any = dataclasses.MISSING,
) -> Any:
    """Declare a range argument: two ascending numbers between ``low`` and ``high``.

    With ``above``, ``low`` itself is not allowed either. A single number is checked as 0 to it.
    """
    check = functools.partial(_check_range, low=low, high=high, above=above)
    return dataclasses.field(default=default, metadata={"check": check})


def height_and_width() -> Any:
    """Declare a required size argument: height and width of at least 1."""
    return dataclasses.field(metadata={"check": _check_size})


def odd_sizes(largest: int | None = None) -> Any:
    """Declare a list of window sizes: odd numbers of pixels, 3 and 5 by default."""
    check = functools.partial(_check_odd, largest=largest)
    return dataclasses.field(default=(3, 5), metadata={"check": check})


def draw(rng: np.random.Generator, value: Range) -> float:
    """Return a number drawn uniformly from the range."""
    return float(rng.uniform(*value))


def _check_range(name: str, value: Range | float, *, low: float, high: float, above: bool) -> None:
    first, last = value if isinstance(value, Sequence) else (0, value)
    ordered = math.isfinite(first) and math.isfinite(last) and first <= last
    if not ordered or first < low or last > high or (above and first <= low):
        bounds = [f"{'above' if above else 'at least'} {low:g}"] if low > -math.inf else []
        bounds += [f"at most {high:g}"] if high < math.inf else []
        limits = f", each {' and '.join(bounds)}" if bounds else ""
        raise ConfigError(
            f"{name}: expected two numbers, low then high{limits}; got [{first:g}, {last:g}]"
        )


def _check_size(name: str, value: tuple[int, int]) -> None:
    if min(value) < 1:
        raise ConfigError(f"{name}: expected height and width of at least 1; got {list(value)}")


def _check_odd(name: str, value: Sequence[int], *, largest: int | None) -> None:
    limit = math.inf if largest is None else largest
    if not value or any(size % 2 == 0 or not 1 <= size <= limit for size in value):
        most = "" if largest is None else f", at most {largest}"
        raise ConfigError(f"{name}: expected odd numbers of pixels{most}; got {list(value)}")
