"""A run's folder, read for its page: curves, best evaluations, scores."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from statistics import mean
from typing import Any

from segkit.core.files import fits
from segkit.core.run import EVENTS, Run
from segkit.training.metrics import FEW_IMAGES

Event = dict[str, Any]

SCORE = {"miou": float, "interval": [float, float], "images": int}
"""A column of a row of ``scores.json``."""


@dataclass
class Fold:
    """What a fold has logged."""

    number: int
    start: Event = field(default_factory=dict)
    steps: list[Event] = field(default_factory=list)
    evaluations: list[Event] = field(default_factory=list)

    @property
    def best(self) -> Event | None:
        """The evaluation of the highest mean IoU, of equals the first."""
        return max(self.evaluations, key=lambda one: one["miou"], default=None)

    @property
    def best_before(self) -> Event | None:
        """The best evaluation up to the one before the best."""
        if self.best is None:
            return None
        before = [one for one in self.evaluations if one["step"] < self.best["step"]]
        return max(before, key=lambda one: one["miou"], default=None)

    def curve(self, key: str) -> dict[str, Any]:
        """The series of a chart: ``key`` of every step or evaluation logged, by step."""
        events = [one for one in [*self.steps, *self.evaluations] if fits(one.get(key), float)]
        points = [(one["step"], float(f"{one[key]:.5g}")) for one in events]
        points = [one for one in points if math.isfinite(one[1])]
        x, y = [x for x, _ in points], [y for _, y in points]
        return {"name": f"fold {self.number}", "x": x, "y": y}


class RunLog:
    """A run as its files tell it, whatever there is of them yet."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.name = run.folder.resolve().name
        self._logged = list(run.events())
        self.config: dict[str, Any] = run.read("config.json")
        self.classes = self._classes()
        self.folds: dict[int, Fold] = {}
        self.events: list[Event] = []
        for event in self._logged:
            kind = event["event"]
            if kind in EVENTS and "fold" in event:
                fold = self.folds.setdefault(event["fold"], Fold(event["fold"]))
                if kind == "start":
                    fold.start = event
                elif kind == "step":
                    fold.steps.append(event)
                elif kind == "evaluate" and len(event["iou"]) == len(self.classes):
                    fold.evaluations.append(event)
            if kind in ("fault", "non-finite"):
                self.events.append(event)
        self.folds = dict(sorted(self.folds.items()))

    def setting(self, path: str, default: Any) -> Any:
        """Return a value of ``config.json``; ``default`` where another version had none such.

        Args:
            path: ``section.key``.
            default: Its type is what is expected.
        """
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value if fits(value, type(default)) else default

    def _classes(self) -> list[str]:
        """Names of the classes; numbers if only their count is known."""
        known = self.run.optional("classes.json", None)
        scored = [event["iou"] for event in self._logged if event["event"] == "evaluate"]
        count = len(scored[0]) if scored else 0
        return known["classes"] if known else [f"class {number}" for number in range(count)]

    def evaluations(self) -> dict[int, dict[str, Any]]:
        """Return each fold's ``evaluation.json``; one of other classes is left out."""
        files = {
            fold: self.run.optional(f"fold{fold}/evaluation.json", None) for fold in self.folds
        }
        return {fold: content for fold, content in files.items() if content and self._fits(content)}

    def _fits(self, evaluation: dict[str, Any]) -> bool:
        count = len(self.classes)
        keys = {key for picture in evaluation["pictures"] for key in picture["iou"]}
        sides = [len(evaluation["matrix"]), *map(len, evaluation["matrix"])]
        return set(sides) == {count} and keys <= set(map(str, range(count)))

    def shares(self) -> list[dict[str, Any]]:
        """Return each part's shares of the classes; those of other classes are left out."""
        parts, count = self.run.optional("shares.json", []), len(self.classes)
        return [p for p in parts if len(p["with_class"]) == len(p["of_pixels"]) == count]

    @cached_property
    def combined(self) -> tuple[list[str], list[dict[str, Any]]]:
        """What infer.py wrote last: the columns that every row has, and the rows."""
        rows = self.run.optional("infer/scores.json", [])
        titles = ("selection", "test") if rows else ()
        return [t for t in titles if all(fits(row.get(t), SCORE) for row in rows)], rows

    @cached_property
    def score(self) -> tuple[float, float, float] | None:
        """Mean of the folds' best mean IoU, and its 95 % interval.

        Folds validate on different images, so the widths of their intervals add up as those of
        independent figures do.
        """
        best = [fold.best for fold in self.folds.values() if fold.best is not None]
        if not best:
            return None
        value = mean(one["miou"] for one in best)
        below = math.hypot(*(one["miou"] - one["interval"][0] for one in best)) / len(best)
        above = math.hypot(*(one["interval"][1] - one["miou"] for one in best)) / len(best)
        return value, value - below, value + above

    @cached_property
    def few_images(self) -> int | None:
        """Validation images of the smallest fold, if they are few for an interval."""
        images = [fold.start.get("validation") for fold in self.folds.values()]
        fewest = min((count for count in images if isinstance(count, int)), default=FEW_IMAGES)
        return fewest if fewest < FEW_IMAGES else None

    @cached_property
    def class_iou(self) -> list[float | None]:
        """IoU of each class, the mean over the folds' best evaluations."""
        lists = [fold.best["iou"] for fold in self.folds.values() if fold.best is not None]
        return [_mean(values) for values in zip(*lists, strict=True)]

    @cached_property
    def seconds(self) -> float:
        """Time in training: as the summary has it, or from the first to the last line of a fold."""
        done = self.run.optional("summary.json", {})
        if done:
            return sum(one["seconds"] for one in done.values())
        return sum(_span(fold) for fold in self.folds.values())

    @property
    def parameters(self) -> int | None:
        """Of the model."""
        return next((f.start["parameters"] for f in self.folds.values() if f.start), None)

    def settings(self) -> dict[str, Any]:
        """The configuration, flat: ``section.key`` to value."""
        return dict(flat(self.config))


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested objects by their path; lists are leaves."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _mean(values: Any) -> float | None:
    known = [one for one in values if one is not None]
    return mean(known) if known else None


def _span(fold: Fold) -> float:
    times = [one["time"] for one in [fold.start, *fold.steps, *fold.evaluations] if one]
    return max(times, default=0.0) - min(times, default=0.0)
