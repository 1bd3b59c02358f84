"""Experiment trackers; an optional package is imported only if its tracker is configured."""

import csv
import importlib
import io
import json
import secrets
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from segkit.core.config import Component, bind
from segkit.core.errors import ConfigError, SegkitError
from segkit.core.files import require_regular_file, set_error_filename, write_text
from segkit.core.run import Run

Event = Mapping[str, Any]
Pictures = Sequence[tuple[str, Image.Image]]
"""Captions and pictures."""


class Tracker:
    """A tracker of one fold of a run, which continues from ``step``; this one records nothing."""

    def __init__(self, *, run: Run, fold: int, step: int) -> None:
        self._classes: list[str] = run.read("classes.json")["classes"]

    def event(self, event: Event) -> None:
        """Record an event of the log about this fold."""

    def pictures(self, step: int, pictures: Pictures) -> None:
        """Record pictures of an evaluation."""

    def close(self) -> None:
        """Finish tracking; called when the fold ends or is interrupted."""


_TABLES = {"step": "steps.csv", "evaluate": "evaluations.csv"}


class CSVTracker(Tracker):
    """A tracker that writes ``steps.csv`` and ``evaluations.csv`` to the fold's folder.

    Rows after the step from which the fold continues are removed.
    """

    def __init__(self, *, run: Run, fold: int, step: int) -> None:
        super().__init__(run=run, fold=fold, step=step)
        self._folder = run.fold(fold)
        self._columns: dict[Path, list[str]] = {}
        for name in _TABLES.values():
            if (self._folder / name).exists():
                self._remove_rows_after(step, self._folder / name)

    def _remove_rows_after(self, step: int, path: Path) -> None:
        with set_error_filename(path):
            text = require_regular_file(path).read_text(encoding="utf-8", errors="replace")
        text = text.replace("\0", "")  # a power failure may leave NULs or incomplete rows
        kept = io.StringIO(newline="")
        if text.strip():
            try:
                header, *rows = csv.reader(io.StringIO(text, newline=""))
                place = header.index("step")
            except (csv.Error, ValueError) as error:
                raise SegkitError(f"{path}: is damaged; move it elsewhere, then resume") from error
            whole = [row for row in rows if len(row) == len(header) and row[place].isdecimal()]
            rows = [header, *(row for row in whole if int(row[place]) <= step)]
            csv.writer(kept, lineterminator="\n").writerows(rows)
            self._columns[path] = header
        write_text(path, kept.getvalue())

    def event(self, event: Event) -> None:
        if event["event"] not in _TABLES:
            return
        path = self._folder / _TABLES[event["event"]]
        row = {"epoch": event["epoch"], "step": event["step"], **scalars(event, self._classes)}
        new = path not in self._columns
        columns = self._columns.setdefault(path, list(row))
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


class TensorBoardTracker(Tracker):
    """A tracker that writes TensorBoard event files to the run's ``tensorboard/fold0``.

    Needs the package ``tensorboard``. A resumed fold hides events after the step it resumes from.
    """

    def __init__(self, *, run: Run, fold: int, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(run=run, fold=fold, step=step)
        folder = run.folder / "tensorboard" / f"fold{fold}"
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        if not step:
            text = json.dumps(run.read("config.json"), indent=2)
            self._writer.add_text("config", f"```\n{text}\n```", 0)

    def event(self, event: Event) -> None:
        for name, value in scalars(event, self._classes).items():
            if value is not None:
                self._writer.add_scalar(name, value, event["step"], walltime=event["time"])
        if event["event"] == "evaluate":
            lines = [f"| {' | '.join(row)} |" for row in _class_table(event, self._classes)]
            lines.insert(1, "| --- | --- | --- |")
            self._writer.add_text("classes", "\n".join(lines), event["step"])

    def pictures(self, step: int, pictures: Pictures) -> None:
        for caption, image in pictures:
            self._writer.add_image(caption, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandbTracker(Tracker):
    """A tracker that records each fold as a Weights & Biases run, grouped by run folder.

    Needs the package ``wandb``. The id is saved in the fold's ``wandb.json``, so a resumed fold
    continues the same run.

    Args:
        project: Name of the project.
        entity: Team or user; default: the user logged in.
        mode: ``offline`` writes to the run's folder; ``wandb sync`` uploads it later.
    """

    def __init__(
        self,
        *,
        run: Run,
        fold: int,
        step: int,
        project: str = "segkit",
        entity: str | None = None,
        mode: Literal["online", "offline"] = "online",
    ) -> None:
        import wandb

        super().__init__(run=run, fold=fold, step=step)
        self._wandb = wandb
        path = f"fold{fold}/wandb.json"
        if not (run.folder / path).exists():
            run.write(path, {"id": secrets.token_hex(4), "project": project, "entity": entity})
        name, folder = run.folder.name, str(run.folder)
        self._tracked = wandb.init(
            id=run.read(path)["id"], project=project, entity=entity, mode=mode,
            group=name, name=f"{name}-fold{fold}", dir=folder, config=run.read("config.json"),
            resume="allow", reinit="finish_previous",
            settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip

    def event(self, event: Event) -> None:
        numbers = scalars(event, self._classes).items()
        values: dict[str, Any] = {name: value for name, value in numbers if value is not None}
        if event["event"] == "evaluate":
            head, *rows = _class_table(event, self._classes)
            values["classes"] = self._wandb.Table(columns=head, data=rows)
        if values:
            self._tracked.log(values, step=event["step"])

    def pictures(self, step: int, pictures: Pictures) -> None:
        shown = [self._wandb.Image(image, caption=caption) for caption, image in pictures]
        self._tracked.log({"pictures": shown}, step=step)

    def close(self) -> None:
        self._tracked.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "csv": CSVTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}
_GIVEN = ("run", "fold", "step")


def check(specs: Sequence[Component]) -> None:
    """Check ``track.trackers`` before any data is read.

    Raises:
        ConfigError: An unknown name or argument, or a package that is not installed.
    """
    for number, spec in enumerate(specs):
        path, package = f"track.trackers[{number}]", spec["name"]
        bind(TRACKERS, spec, path, given=_GIVEN)
        try:
            importlib.import_module(package)  # csv is Python's own
        except ImportError as error:
            raise ConfigError(
                f"{path}: needs the package {package}; pip install {package}"
            ) from error


class Trackers:
    """The trackers of a run, opened by the ``start`` or ``resume`` event of each fold.

    As a context, they follow the run's log. At the end of the block they are closed; after an error
    they have five seconds for that, because a tracker may wait for a network.
    """

    def __init__(self, run: Run, specs: Sequence[Component]) -> None:
        self._run, self._specs = run, specs
        self._fold: int | None = None
        self._open: list[Tracker] = []

    @property
    def show_pictures(self) -> bool:
        """True if a tracker of the current fold shows pictures."""
        return any(not isinstance(tracker, CSVTracker) for tracker in self._open)

    def event(self, event: Event) -> None:
        """Pass the event to the trackers of its fold."""
        if event["event"] in ("start", "resume"):
            self.close()
            self._fold = event["fold"]
            for number, spec in enumerate(self._specs):
                make = bind(TRACKERS, spec, f"track.trackers[{number}]", given=_GIVEN)
                self._open.append(make(run=self._run, fold=self._fold, step=event["step"]))
        elif event.get("fold") == self._fold:
            for tracker in self._open:
                tracker.event(event)

    def pictures(self, step: int, pictures: Iterable[tuple[str, Image.Image]]) -> None:
        """Pass pictures to the trackers of the current fold."""
        shown = list(pictures)
        for tracker in self._open:
            tracker.pictures(step, shown)

    def close(self) -> None:
        """Close all open trackers."""
        while self._open:
            self._open.pop().close()

    def __enter__(self) -> "Trackers":
        self._run.listeners.append(self.event)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._run.listeners.remove(self.event)
        if kind is None or issubclass(kind, SystemExit):
            self.close()
            return
        closing = threading.Thread(target=self._close_quietly, daemon=True)
        closing.start()
        closing.join(5)

    def _close_quietly(self) -> None:
        with suppress(Exception):  # only the error that ended the run is reported
            self.close()


def scalars(event: Event, classes: Sequence[str]) -> dict[str, float | None]:
    """Return the numbers of a ``step`` or ``evaluate`` event by name, with each class's IoU."""
    values: dict[str, float | None] = {}
    if event["event"] == "step":
        values = {key: event[key] for key in ("loss", "lr", "gradient_norm", "images_per_s")}
        values |= {f"loss/{name}": part for name, part in event["parts"].items()}
    elif event["event"] == "evaluate":
        values = {key: event[key] for key in ("miou", "mean_dice", "pixel_accuracy")}
        values |= dict(zip(("miou_low", "miou_high"), event["interval"], strict=True))
        values |= {f"iou/{name}": v for name, v in zip(classes, event["iou"], strict=True)}
    return values


def _class_table(event: Event, classes: Sequence[str]) -> list[list[Any]]:
    rows = zip(classes, event["iou"], event["dice"], strict=True)
    shown = [[name, *("" if v is None else f"{v:.4f}" for v in pair)] for name, *pair in rows]
    return [["class", "iou", "dice"], *shown]
