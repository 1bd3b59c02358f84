"""The folder of a run: its files, its lock, its log and its state."""

import json
import math
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch
import torchvision

from segkit.core import __version__, distributed
from segkit.core.checkpoint import RESUME, load_latest
from segkit.core.config import Config, merge, to_dict
from segkit.core.errors import (
    LOST_RANK,
    ArgumentError,
    SegkitError,
    closest,
    explain,
    reason,
    shorten,
    summary,
)
from segkit.core.files import (
    is_locked,
    lock,
    matches_schema,
    require_regular_file,
    set_error_filename,
    write_json,
    write_text,
)

RUNS = Path("runs")

CHANGEABLE = {
    "note",
    "data.workers",
    "data.cache",
    "data.cache_gb",
    "train.save_every",
    "train.log_every",
    "train.timeout",
    "infer.batch_size",
    "infer.graphs",
}
"""Settings that a resumed run may change: the trained weights do not depend on them."""

EPOCHS = "train.epochs"
"""Setting that a resumed run may raise, or lower down to the epochs already begun."""

LOST_MACHINE = 180.0
"""Seconds until a file server releases the locks of a lost machine."""

_CLASSES = {"classes": [str], "category_ids": ({str: int}, None)}
_PICTURE = {
    "name": str,
    "miou": float,
    "iou": {str: float},
    "worst": bool,
    "size": [int, int],
    "photograph": str,
    "truth": str,
    "predicted": str,
    "errors": str,
}

SCHEMAS: dict[str, Any] = {
    "config.json": {str: Any},
    "environment.json": {str: Any},
    "classes.json": _CLASSES,
    "data.json": {**_CLASSES, "format": int, "images": {str: {str: [str, str]}}},
    "shares.json": [{"title": str, "images": int, "with_class": [float], "of_pixels": [float]}],
    "summary.json": {str: {"seconds": float}},
    "evaluation.json": {"matrix": [[int]], "pictures": [_PICTURE]},
    "scores.json": [{"name": str}],
    "status.json": {"state": str, "sentence": str},
    "wandb.json": {"id": str},
}
"""Schema of each of a run's JSON files; see :func:`segkit.core.files.matches_schema`."""

EVENT = {"event": str, "time": float}
"""Schema of every line of ``log.jsonl``."""

_STEP = {"fold": int, "step": int}

EVENTS: dict[str, Any] = {
    "start": {**_STEP, "parameters": int},
    "resume": _STEP,
    "step": {**_STEP, "epoch": int, "images_per_s": float},
    "evaluate": {
        **_STEP,
        "epoch": int,
        "miou": float,
        "interval": [float, float],
        "iou": [(float, None)],
    },
    "non-finite": {**_STEP, "images": [str]},
    "fault": {"file": str, "sentence": str},
}
"""Additional keys required of each kind of event."""


class Run:
    """The folder of one training run.

    It contains ``config.json`` (merged and complete), ``folds.json``, ``classes.json``,
    ``environment.json``, ``data.json`` (the data it trains on), ``log.jsonl``, ``status.json``,
    ``summary.json``, and for each fold ``fold0/`` with ``last.pt``, ``best.pt`` and the best
    checkpoints; the process that trains locks ``lock``.

    Args:
        folder: Path of the folder. The constructor creates nothing; :meth:`check` and
            :meth:`begin` do.

    Attributes:
        listeners: Functions that are called with every event after it was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self._lock: TextIO | None = None

    @classmethod
    def open(cls, folder: str | Path | None) -> "Run":
        """Return an existing run: a folder, or a name in ``runs/``.

        Without a name, return the most recently started run that has a model.
        """
        if folder is None:
            trained = next((run for run in runs() if run.folds()), None)
            if trained is None:
                raise SegkitError(
                    f"no run in {RUNS.resolve()} has a model (best.pt) yet; train one, or name the "
                    "folder of a run"
                )
            return trained
        for path in (Path(folder), RUNS / folder):
            if os.path.isfile(path / "config.json"):  # also False if the name is too long
                return cls(path)
        known = [path.parent.name for path in RUNS.glob("*/config.json")]
        raise SegkitError(
            f"{shorten(str(folder), 300)}: is not a run folder{closest(str(folder), known)}"
        )

    @property
    def exists(self) -> bool:
        """True if the folder holds a run: :meth:`begin` writes ``config.json`` last."""
        return os.path.lexists(self.folder / "config.json")

    def check(self, config: Mapping[str, Any], *, resume: bool) -> None:
        """Check that a run may begin in the folder, or continue; creates nothing.

        An existing run is locked: only one process (and its ranks) may continue it at a time. A job
        that torchrun restarts waits for the lock, because a file server releases the lock of a lost
        machine only after some time.

        Raises:
            SegkitError: The folder belongs to another run, or to a run with another configuration,
                or another process trains in it.
        """
        folder = self.folder
        if not self.exists:
            if folder.exists() and _holds_others(folder):
                raise SegkitError(f"{folder}: is not empty and holds no run; choose another folder")
            return
        if not resume:
            problem = f"{folder}: holds a run already"
            raise ArgumentError(problem, "choose another folder", resume=[True])
        self._take_lock(LOST_MACHINE if self.interrupted_here() else None)
        changed = _differences(_complete(self.read("config.json")), _complete(config))
        if differing := [path for path in changed if path not in {*CHANGEABLE, EPOCHS}]:
            raise SegkitError(
                f"{folder}: was started with another configuration ({', '.join(differing)}); "
                "resume with the same one or choose another folder"
            )
        if EPOCHS in changed and config["train"]["epochs"] < (begun := self.epochs_begun()):
            raise SegkitError(
                f"train.epochs: is {config['train']['epochs']}, but {folder} has begun epoch "
                f"{begun}; give {begun} or more"
            )

    def begin(self, config: Mapping[str, Any], files: Mapping[str, Any] = {}) -> None:
        """Create the folder, or continue in it; ``files`` are JSON files of a new run, by name."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SegkitError(
                f"{self.folder}: cannot be made ({reason(error)}); choose another folder"
            ) from error
        if self._lock is None:
            self._take_lock()
            self.check(config, resume=False)  # another process may have begun a run meanwhile
            files = {**files, "environment.json": environment()}
        self._cut_log()
        for name, value in files.items():
            self.write(name, value)
        if not self.exists or self.read("config.json") != config:
            self.write("config.json", config)

    def _take_lock(self, timeout: float | None = None) -> None:
        try:
            self._lock = lock(self.folder / "lock", timeout)
        except BlockingIOError as error:
            raise SegkitError(
                f"{self.folder}: {error.strerror} trains in it; wait for its end, or choose "
                "another folder"
            ) from error

    def interrupted_here(self) -> bool:
        """Return True if torchrun is restarting the job that began this run and did not finish it.

        torchrun does so after a failure and when a machine joins or leaves. The job is identified
        by its ``--rdzv-id``, or by torchrun's process if it has none.
        """
        job = _job()
        if job is None or not self.exists or (self.folder / "summary.json").exists():
            return False
        return self.read_or_default("environment.json", {}).get("job") == job

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Write to ``status.json`` that the run is in progress, and how it ends; on all ranks.

        All ranks wait for the first record, so that it does not replace that of a rank that failed.
        """
        if distributed.is_main():
            self._record("running")
        distributed.barrier()
        try:
            yield
        except (SystemExit, KeyboardInterrupt):
            self._record("stopped")
            raise
        except BaseException as error:
            sentence = explain(error) or summary(error)
            if sentence.startswith(LOST_RANK):
                time.sleep(1)  # the rank that failed knows the cause, and records it first
            with suppress(OSError):  # the disk may be full, which may be the error itself
                self._record("failed", sentence)
            raise
        if distributed.is_main():
            self._record("done")

    def _record(self, state: str, sentence: str = "") -> None:
        known = self.read_or_default("status.json", {}) if state == "failed" else {}
        if known.get("state") != "failed":  # the first rank that failed knows the cause
            content = {"state": state, "sentence": sentence}
            write_json(self.folder / "status.json", content, durable=True, shared=True)

    def state(self) -> tuple[str, str]:
        """Return the state of the run and, if it failed, the error.

        The state is ``running``, ``done``, ``stopped`` (by a signal, or killed) or ``failed``.
        """
        mine = self._lock is not None  # a trial of the lock by its own process would release it
        if not mine and is_locked(self.folder / "lock"):
            return "running", ""
        ended = "done" if (self.folder / "summary.json").exists() else "stopped"
        status = self.read_or_default("status.json", {"state": ended, "sentence": ""})
        state = "stopped" if status["state"] == "running" and not mine else status["state"]
        return state, status["sentence"]

    def resumable(self) -> bool:
        """Return True if the run has a saved state, or did not fail."""
        saved = any(self.folder.glob("fold*/last.pt"))
        status = self.read_or_default("status.json", {})
        return saved or status.get("state") != "failed"

    def fold(self, number: int) -> Path:
        """Return the folder of a fold's checkpoints."""
        return self.folder / f"fold{number}"

    def folds(self) -> list[int]:
        """Return the folds that have a best checkpoint."""
        names = (path.parent.name for path in self.folder.glob("fold*/best.pt"))
        return sorted(int(name[4:]) for name in names if name[4:].isdecimal())

    def read(self, name: str) -> Any:
        """Read a JSON file of the run.

        Raises:
            SegkitError: It is missing, unreadable or damaged, or differs from :data:`SCHEMAS`.
        """
        path = self.folder / name
        try:
            value = json.loads(require_regular_file(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise SegkitError(f"{path}: cannot be read ({reason(error)})") from error
        except (ValueError, RecursionError) as error:
            raise SegkitError(f"{path}: is damaged, it is not valid JSON ({error})") from error
        if not matches_schema(value, SCHEMAS.get(path.name, Any)):
            raise self._damaged(name)
        return value

    def _damaged(self, name: str) -> SegkitError:
        return SegkitError(f"{self.folder / name}: is damaged, or of another version of segkit")

    def category_ids(self) -> dict[int, int] | None:
        """Return the class index of each category id; ``None`` if the labels have no ids."""
        known = self.read("classes.json")["category_ids"]
        try:
            return None if known is None else {int(key): index for key, index in known.items()}
        except ValueError as error:
            raise self._damaged("classes.json") from error

    def read_or_default(self, name: str, default: Any) -> Any:
        """Read an optional JSON file; ``default`` if missing, or with a warning if damaged."""
        if not os.path.lexists(self.folder / name):
            return default
        try:
            return self.read(name)
        except SegkitError as error:
            warnings.warn(f"{error}; left out", stacklevel=2)
            return default

    def write(self, name: str, value: Any) -> None:
        """Replace a JSON file of the run atomically, even in a power cut."""
        write_json(self.folder / name, value, durable=True)

    def log(self, **event: Any) -> None:
        """Append an event to ``log.jsonl`` and call the listeners."""
        event = {"time": round(time.time(), 3), **event}
        path = self.folder / "log.jsonl"
        with set_error_filename(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        for listener in self.listeners:
            listener(event)

    def _cut_log(self) -> None:
        """Remove an incomplete last line of ``log.jsonl``, left by a kill or a power cut."""
        lines = self._lines()
        if lines and not lines[-1].endswith(b"\n"):
            path = self.folder / "log.jsonl"
            with set_error_filename(path):
                os.truncate(path, sum(map(len, lines[:-1])))

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events of ``log.jsonl``.

        An incomplete last line is skipped. Lines that are damaged or lack keys of their kind of
        event are skipped with a warning.
        """
        invalid = []
        for number, line in enumerate(self._lines(), 1):
            event = _parse(line)
            if event and matches_schema(event, EVENT | EVENTS.get(str(event.get("event")), {})):
                yield event
            elif line.endswith(b"\n"):
                invalid.append(number)
        if invalid:
            warnings.warn(
                f"{self.folder / 'log.jsonl'}: {len(invalid)} lines are damaged or of another "
                f"version of segkit, the first is line {invalid[0]}; left out",
                stacklevel=2,
            )

    def _lines(self) -> list[bytes]:
        path = self.folder / "log.jsonl"
        if not os.path.lexists(path):
            return []
        with set_error_filename(path), require_regular_file(path).open("rb") as file:
            return file.readlines()

    def epochs_begun(self) -> int:
        """Return the number of epochs begun by the furthest fold, according to the log."""
        lengths: dict[int, Any] = {}
        begun = 0
        for event in self.events():
            if event["event"] in ("start", "resume"):
                length = event.get("steps_per_epoch")
                lengths[event["fold"]] = length if matches_schema(length, int) else 0
            elif event["event"] == "step":
                length = lengths.get(event["fold"])
                begun = max(begun, math.ceil(event["step"] / length) if length else event["epoch"])
        return begun

    def reopen(self, fold: int) -> None:
        """Remove a fold from ``summary.json``, because its training continues."""
        folds = self.read_or_default("summary.json", {})
        if folds.pop(f"fold{fold}", None) is None:
            return
        if folds:
            self.write("summary.json", folds)
        else:
            (self.folder / "summary.json").unlink()

    def rewind(self, fold: int, step: int) -> None:
        """Remove events of ``fold`` after ``step``: a resumed run writes them again."""
        events = filter(None, map(_parse, self._lines()))
        kept = [
            json.dumps(event) + "\n"
            for event in events
            if not matches_schema(event, _STEP) or event["fold"] != fold or event["step"] <= step
        ]
        write_text(self.folder / "log.jsonl", "".join(kept), durable=True)

    def load_last_state(self, fold: int) -> dict[str, Any] | None:
        """Load the state to resume ``fold`` from; ``None`` if none was saved."""
        return load_latest(self.fold(fold) / "last.pt", needs=RESUME)


def _parse(line: bytes) -> dict[str, Any] | None:
    """Parse a line of ``log.jsonl``; return ``None`` if it is incomplete or not a JSON object."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if line.endswith(b"\n") and isinstance(event, dict) else None


def runs(name: str | None = None) -> list[Run]:
    """Return the runs in ``runs/``, or those of the configuration ``name``; newest first."""
    folders = [path.parent for path in RUNS.glob("*/config.json")]
    if name is not None:
        own = re.compile(re.escape(name) + r"-\d{8}-\d{6}")  # as new_folder names them
        folders = [folder for folder in folders if own.fullmatch(folder.name)]
    folders.sort(key=lambda folder: (folder / "config.json").stat().st_mtime, reverse=True)
    return list(map(Run, folders))


def find_run(name: str, folder: Path | None, *, resume: bool) -> tuple[Run, bool]:
    """Return the run that a command begins or resumes, and whether it resumes it.

    Without ``folder``, it is a new run, or the newest one of the configuration ``name``. Its folder
    may not exist yet. A run that torchrun is restarting is always resumed.
    """
    candidates = [Run(folder)] if folder else runs(name)
    interrupted = bool(candidates) and candidates[0].interrupted_here()
    if not folder and not interrupted:
        candidates = [run for run in candidates if resume and run.resumable()]
    run = candidates[0] if candidates else Run(new_folder(name))
    return run, resume or interrupted


def new_folder(name: str) -> Path:
    """Return a folder for a run that starts now."""
    return RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def environment() -> dict[str, Any]:
    """Return what a result depends on in addition to the configuration: versions and hardware."""
    return {
        "command": " ".join(sys.argv),
        "segkit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "job": _job(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
    }


def _job() -> str | None:
    """Return torchrun's name of this job, or its process if the job has no name."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    job = os.environ["TORCHELASTIC_RUN_ID"]
    return f"process {os.getppid()} on {platform.node()}" if job == "none" else job


def _holds_others(folder: Path) -> bool:
    """Return True if there are files other than those of an interrupted :meth:`Run.begin`."""
    names = {path.name for path in folder.iterdir()}
    if "lock" not in names:  # "lock" is created first
        return bool(names)
    known = {*SCHEMAS, "folds.json", "lock"}
    return any(name not in known and not name.endswith(".json.writing") for name in names)


def _complete(config: Mapping[str, Any]) -> Any:
    """Return a configuration with the defaults of keys that its version of segkit did not have."""
    return merge(to_dict(Config()), config)


def _differences(known: Any, wanted: Any, path: str = "") -> list[str]:
    """Return the paths of the keys that differ between two configurations."""
    if not (isinstance(known, Mapping) and isinstance(wanted, Mapping)):
        return [] if known == wanted else [path]
    prefix = f"{path}." if path else ""
    return [
        name
        for key in sorted({*known, *wanted})
        for name in _differences(known.get(key), wanted.get(key), f"{prefix}{key}")
    ]
