"""The files of a run as its page needs them: curves, best evaluations, scores, settings."""

import json
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from statistics import mean
from typing import Any

from segkit.core.files import matches_schema
from segkit.core.run import EVENTS, Run
from segkit.training.metrics import FEW_IMAGES

Event = dict[str, Any]

SCORE = {"miou": float, "interval": [float, float], "images": int}
"""Shape of a score in ``scores.json``."""

_MEAN = {"mean": (float, None), "interval": ([float, float], None)}
_CLASSES = {"per_class": [(float, None)], "per_class_intervals": [([float, float], None)]}
DETAILS = {str: _MEAN | _CLASSES}
"""Shape of the ``details`` of a score in ``scores.json``."""


class LoggedFold:
    """The logged events of a fold, without evaluations of another number of classes.

    ``records`` are the evaluations that scored higher than all before them; the last is the best.
    """

    def __init__(self, number: int, events: list[Event], num_classes: int) -> None:
        self.number, self.events = number, events
        self.start = next((e for e in reversed(events) if e["event"] == "start"), {})
        self.steps = [e for e in events if e["event"] == "step"]
        evaluations = [e for e in events if e["event"] == "evaluate"]
        self.evaluations = [e for e in evaluations if len(e["iou"]) == num_classes]
        self.records: list[Event] = []
        for evaluation in self.evaluations:
            if not self.records or evaluation["miou"] > self.records[-1]["miou"]:
                self.records.append(evaluation)

    def curve(self, key: str) -> dict[str, Any]:
        """Return a curve for a chart: ``key`` of the events by step."""
        return self._curve((e["step"], e.get(key)) for e in [*self.steps, *self.evaluations])

    def class_curve(self, c: int) -> dict[str, Any]:
        """Return the curve of a class's IoU."""
        return self._curve((e["step"], e["iou"][c]) for e in self.evaluations)

    def _curve(self, points: Iterable[tuple[int, Any]]) -> dict[str, Any]:
        known = [(step, float(f"{y:.5g}")) for step, y in points if matches_schema(y, float)]
        x, y = ([point[axis] for point in known if math.isfinite(point[1])] for axis in (0, 1))
        return {"name": f"fold {self.number}", "x": x, "y": y}


class RunLog:
    """The files of a run, of which any but ``config.json`` may be missing or damaged.

    Attributes:
        settings: The configuration, by ``section.key``.
        folds: The logged folds by number.
        best: The best evaluation of each fold that has any.
        notes: The events about faulty files and steps that were not finite.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.name = run.folder.resolve().name
        events = list(run.events())
        self.settings = dict(flatten(run.read("config.json")))
        self.summary: dict[str, Any] = run.read_or_default("summary.json", {})
        count = next((len(e["iou"]) for e in events if e["event"] == "evaluate"), 0)
        numbered = {"classes": [f"class {c}" for c in range(count)]}
        self.classes: list[str] = run.read_or_default("classes.json", numbered)["classes"]
        logged: dict[int, list[Event]] = {}
        for event in events:
            if "fold" in EVENTS.get(event["event"], {}):
                logged.setdefault(event["fold"], []).append(event)
        self.folds = {n: LoggedFold(n, logged[n], len(self.classes)) for n in sorted(logged)}
        self.best = {n: fold.records[-1] for n, fold in self.folds.items() if fold.records}
        self.notes = [event for event in events if event["event"] in ("fault", "non-finite")]

    @cached_property
    def state(self) -> tuple[str, str]:
        """State of the run, see :meth:`Run.state`; ``done`` as soon as the summary has all folds.

        The process that trains writes its last page before it ends.
        """
        state, sentence = self.run.state()
        complete = self.folds and all(f"fold{n}" in self.summary for n in self.folds)
        return ("done" if state == "running" and complete else state), sentence

    @property
    def data(self) -> tuple[str, str]:
        """A name for the data of the run, and all that identifies it: sources and classes."""
        keys = ("annotations", "images", "root", "name")
        names = (self.setting(f"data.train.{key}", "") for key in keys)
        parts = ("data.train", "data.val", "data.test")
        sources = {k: v for k, v in self.settings.items() if k.startswith(parts)}
        identity = json.dumps([sources, self.classes], sort_keys=True)
        return next(filter(None, names), "unnamed data"), identity

    def setting(self, path: str, default: Any) -> Any:
        """Return a setting, or ``default`` if it is missing or of another type."""
        value = self.settings.get(path)
        return value if matches_schema(value, type(default)) else default

    def evaluations(self) -> dict[int, dict[str, Any]]:
        """Return each fold's ``evaluation.json``; those of other classes are left out."""
        files = {n: self.run.read_or_default(f"fold{n}/evaluation.json", None) for n in self.folds}
        size, keys = len(self.classes), {str(c) for c in range(len(self.classes))}
        return {
            n: content
            for n, content in files.items()
            if content is not None
            and {size} == {len(content["matrix"]), *map(len, content["matrix"])}
            and all(keys.issuperset(picture["iou"]) for picture in content["pictures"])
        }

    def shares(self) -> list[dict[str, Any]]:
        """Return the class shares of each part; those of other classes are left out."""
        parts, count = self.run.read_or_default("shares.json", []), len(self.classes)
        return [p for p in parts if len(p["with_class"]) == len(p["of_pixels"]) == count]

    @cached_property
    def combined(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Latest results of ``infer``: the image sets that every row has a score on, and rows."""
        rows = self.run.read_or_default("infer/scores.json", [])
        titles = ("selection", "test") if rows else ()
        return [t for t in titles if all(matches_schema(row.get(t), SCORE) for row in rows)], rows

    @cached_property
    def score(self) -> tuple[float, float, float] | None:
        """Mean of the folds' best mean IoU, and its 95 % interval.

        Folds validate on different images, so the widths of their intervals combine as those of
        independent values.
        """
        if not self.best:
            return None
        best = self.best.values()
        value = mean(e["miou"] for e in best)
        below = math.hypot(*(e["miou"] - e["interval"][0] for e in best)) / len(best)
        above = math.hypot(*(e["interval"][1] - e["miou"] for e in best)) / len(best)
        return value, value - below, value + above

    @cached_property
    def class_iou(self) -> list[float | None]:
        """IoU of each class, averaged over the folds' best evaluations."""
        return [average(v) for v in zip(*(e["iou"] for e in self.best.values()), strict=True)]

    def class_change(self, c: int) -> float | None:
        """Return the change of a class's IoU from the record before to the best, over folds."""
        records = [fold.records[-2:] for fold in self.folds.values() if len(fold.records) > 1]
        pairs = [(old["iou"][c], new["iou"][c]) for old, new in records]
        return average(new - old for old, new in pairs if None not in (old, new))

    @cached_property
    def few_images(self) -> int | None:
        """Number of validation images of the smallest fold, if too few for a good interval."""
        images = [fold.start.get("validation") for fold in self.folds.values()]
        fewest = min((count for count in images if isinstance(count, int)), default=FEW_IMAGES)
        return fewest if fewest < FEW_IMAGES else None

    @cached_property
    def seconds(self) -> float:
        """Training time: from the summary, or from the first to the last event of each fold."""
        if self.summary:
            return sum(fold["seconds"] for fold in self.summary.values())
        times = [[event["time"] for event in fold.events] for fold in self.folds.values()]
        return sum(max(t) - min(t) for t in times)

    @property
    def parameters(self) -> int:
        """Number of the model's parameters, 0 if unknown."""
        return next((f.start["parameters"] for f in self.folds.values() if f.start), 0)


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path (``section.key``) and value of each leaf of nested dicts; a list is a leaf."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flatten(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def average(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not ``None``, or ``None`` if there are none."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None
