"""A run's folder, read for its page: curves, best evaluations, scores."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from statistics import mean
from typing import Any

from segkit.metrics import FEW_IMAGES
from segkit.run import Run

Event = dict[str, Any]


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
        events = [one for one in [*self.steps, *self.evaluations] if one.get(key) is not None]
        points = [(one["step"], float(f"{one[key]:.5g}")) for one in events]
        points = [one for one in points if math.isfinite(one[1])]
        x, y = [x for x, _ in points], [y for _, y in points]
        return {"name": f"fold {self.number}", "x": x, "y": y}


class RunLog:
    """A run as its files tell it, whatever there is of them yet."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.name = run.folder.resolve().name
        self.config: dict[str, Any] = run.read("config.json")
        self.folds: dict[int, Fold] = {}
        self.events: list[Event] = []
        for event in run.events():
            kind = event["event"]
            if "fold" in event:
                fold = self.folds.setdefault(event["fold"], Fold(event["fold"]))
                if kind == "start":
                    fold.start = event
                elif kind == "step":
                    fold.steps.append(event)
                elif kind == "evaluate":
                    fold.evaluations.append(event)
            if kind in ("fault", "non-finite"):
                self.events.append(event)
        self.folds = dict(sorted(self.folds.items()))

    def optional(self, name: str, default: Any = None) -> Any:
        """A JSON file of the run, if it is there."""
        return self.run.read(name) if (self.run.folder / name).is_file() else default

    @cached_property
    def classes(self) -> list[str]:
        """The class names."""
        return list(self.optional("classes.json", {"classes": []})["classes"])

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
        images = [fold.start.get("validation", FEW_IMAGES) for fold in self.folds.values()]
        fewest = min(images, default=FEW_IMAGES)
        return fewest if fewest < FEW_IMAGES else None

    @cached_property
    def class_iou(self) -> list[float | None]:
        """IoU of each class, the mean over the folds' best evaluations."""
        lists = [fold.best["iou"] for fold in self.folds.values() if fold.best is not None]
        return [_mean(values) for values in zip(*lists, strict=True)]

    @cached_property
    def seconds(self) -> float:
        """Time in training: as the summary has it, or from the first to the last line of a fold."""
        done = self.optional("summary.json", {})
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
