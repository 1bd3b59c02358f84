"""A run's folder: it explains itself to whoever opens it."""

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
from segkit.core.errors import SegkitError, closest, explain, reason, shorten, summary
from segkit.core.files import fits, is_locked, lock, naming, regular, write_json, write_text

RUNS = Path("runs")

FREE = {
    *("data.workers", "data.cache", "data.cache_gb"),
    *("train.save_every", "train.log_every", "train.timeout"),
    "infer.batch_size",
}
"""Settings that a resumed run may change: no weight depends on them."""

GROWS = "train.epochs"
"""A setting that a resumed run may raise, and lower down to what is done."""

LOST_MACHINE = 180.0
"""Seconds after which a file server has freed the locks of a machine that was lost."""

SHAPES: dict[str, Any] = {
    "config.json": {str: Any},
    "environment.json": {str: Any},
    "classes.json": {"classes": [str], "category_ids": ({str: int}, None)},
    "data.json": {
        "format": int,
        "classes": [str],
        "category_ids": ({str: int}, None),
        "images": {str: {str: [str, str]}},
    },
    "shares.json": [{"title": str, "images": int, "with_class": [float], "of_pixels": [float]}],
    "summary.json": {str: {"seconds": float}},
    "evaluation.json": {
        "matrix": [[int]],
        "pictures": [
            {
                **{"name": str, "miou": float, "iou": {str: float}, "worst": bool},
                **{"size": [int, int], "photograph": str, "truth": str},
                **{"predicted": str, "errors": str},
            }
        ],
    },
    "scores.json": [{"name": str}],
    "status.json": {"state": str, "sentence": str},
    "wandb.json": {"id": str},
}
"""What readers of a run's JSON files need of them; see :func:`segkit.core.files.fits`."""

EVENT = {"event": str, "time": float}
"""What every line of ``log.jsonl`` has."""

EVENTS: dict[str, Any] = {
    "start": {"fold": int, "step": int, "parameters": int},
    "resume": {"fold": int, "step": int},
    "step": {"fold": int, "step": int, "epoch": int, "images_per_s": float},
    "evaluate": {
        **{"fold": int, "step": int, "epoch": int, "miou": float},
        **{"interval": [float, float], "iou": [(float, None)]},
    },
    "non-finite": {"fold": int, "step": int, "images": [str]},
    "fault": {"file": str, "sentence": str},
}
"""What each kind of event has besides."""


class Run:
    """The folder of one training run.

    ``config.json`` (resolved), ``folds.json``, ``classes.json``, ``environment.json``,
    ``data.json`` (what it trains on), ``log.jsonl``, ``status.json`` (how it stands),
    ``summary.json``, and for each fold ``fold0/`` with ``last.pt``, ``best.pt`` and the top-k;
    ``lock`` is locked by the process that trains.

    Args:
        folder: Created by :meth:`create`; opened as it is here.

    Attributes:
        followers: Called with every event after it was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.followers: list[Callable[[dict[str, Any]], None]] = []
        self._lock: TextIO | None = None

    @classmethod
    def create(cls, folder: Path, config: Mapping[str, Any], *, resume: bool = False) -> "Run":
        """A new run folder, or with ``resume`` the same one again: :meth:`check`, :meth:`begin`."""
        run = cls(folder)
        run.check(config, resume=resume)
        run.begin(config)
        return run

    @property
    def exists(self) -> bool:
        """Whether the folder holds a run: ``config.json`` is written last when one begins."""
        return os.path.lexists(self.folder / "config.json")

    def check(self, config: Mapping[str, Any], *, resume: bool) -> None:
        """Make sure that the folder may begin a run, or go on with its own; nothing is made yet.

        A run that is there already is locked: it goes on in one process (and its ranks) at a time.
        A job that torchrun starts again waits for the lock: where its machine was lost, a file
        server frees it after some time.

        Raises:
            SegkitError: The folder belongs to another run, or to a run with another configuration,
                or another process trains in it.
        """
        folder = self.folder
        if not self.exists:
            if folder.exists() and _holds_others(folder):
                raise SegkitError(
                    f"{folder}: is not empty and holds no run; name another --run-dir"
                )
            return
        if not resume:
            raise SegkitError(
                f"{folder}: holds a run already; add --resume or name another --run-dir"
            )
        self._take_lock(LOST_MACHINE if self.interrupted_here() else None)
        changed = _differences(self.read("config.json"), config)
        if differing := [path for path in changed if path not in {*FREE, GROWS}]:
            raise SegkitError(
                f"{folder}: was started with another configuration ({', '.join(differing)}); "
                "resume with the same one or name another --run-dir"
            )
        if GROWS in changed and config["train"]["epochs"] < (begun := self.epochs_begun()):
            raise SegkitError(
                f"train.epochs: is {config['train']['epochs']}, but {folder} has begun epoch "
                f"{begun}; give {begun} or more"
            )

    def begin(self, config: Mapping[str, Any], files: Mapping[str, Any] = {}) -> None:
        """Make the folder, or go on in it.

        Args:
            config: As :meth:`check` has seen it.
            files: JSON files of a new run, by name.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._take_lock()
            self.check(config, resume=False)  # another process may have begun one meanwhile
            files = {**files, "environment.json": environment()}
        self._cut_log()
        for name, value in files.items():
            self.write(name, value)
        if not self.exists or self.read("config.json") != config:
            self.write("config.json", config)

    def _take_lock(self, patience: float | None = None) -> None:
        try:
            self._lock = lock(self.folder / "lock", patience)
        except BlockingIOError as error:
            raise SegkitError(
                f"{self.folder}: {error.strerror} trains in it; wait for its end, or name another "
                "--run-dir"
            ) from error

    @classmethod
    def open(cls, folder: str | Path | None) -> "Run":
        """An existing run: the folder named (also by its name in ``runs/``).

        Without a name it is the run started last of those that have a model.
        """
        if folder is None:
            trained = next((run for run in runs() if run.folds()), None)
            if trained is None:
                raise SegkitError(
                    f"no run in {RUNS.resolve()} has a model (best.pt) yet; train one, or name it "
                    "by --run-dir"
                )
            return trained
        for path in (Path(folder), RUNS / folder):
            if os.path.isfile(path / "config.json"):  # False also for too long a name
                return cls(path)
        known = [path.parent.name for path in RUNS.glob("*/config.json")]
        raise SegkitError(
            f"{shorten(str(folder), 300)}: is not a run folder{closest(str(folder), known)}"
        )

    def interrupted_here(self) -> bool:
        """Whether torchrun starts again the job that began this run and has not finished it.

        It does so after a failure, and when a machine joins or leaves. The job is known by its
        ``--rdzv-id``, or where it has none by torchrun's process.
        """
        job = _job()
        if job is None or not self.exists or (self.folder / "summary.json").exists():
            return False
        return self.optional("environment.json", {}).get("job") == job

    # ---- how it ends

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep in ``status.json`` that this run is under way, and how it ends; on all ranks."""
        if distributed.is_main():
            self._record("running")
        try:
            yield
        except (SystemExit, KeyboardInterrupt):
            self._record("stopped")
            raise
        except BaseException as error:
            with suppress(OSError):  # of a full disk, which may be the error itself
                self._record("failed", explain(error) or summary(error))
            raise
        if distributed.is_main():
            self._record("done")

    def _record(self, state: str, sentence: str = "") -> None:
        known = self.optional("status.json", {}) if state == "failed" else {}
        if known.get("state") != "failed":  # the first rank that fails has the reason
            self.write("status.json", {"state": state, "sentence": sentence})

    def state(self) -> tuple[str, str]:
        """Return how the run stands, and why it failed.

        ``running``, ``done``, ``stopped`` (by a signal, or killed) or ``failed``. Not to be asked
        by the process that trains: it would lose its lock.
        """
        if is_locked(self.folder / "lock"):
            return "running", ""
        ended = "done" if (self.folder / "summary.json").exists() else "stopped"
        status = self.optional("status.json", {"state": ended, "sentence": ""})
        return "stopped" if status["state"] == "running" else status["state"], status["sentence"]

    def resumable(self) -> bool:
        """Whether ``--resume`` may pick this run: it has something saved, or did not fail."""
        saved = any(self.folder.glob("fold*/last.pt"))
        status = self.optional("status.json", {})
        return saved or status.get("state") != "failed"

    def fold(self, number: int) -> Path:
        """The folder of one fold's checkpoints."""
        return self.folder / f"fold{number}"

    def folds(self) -> list[int]:
        """Folds that have a best checkpoint."""
        names = (path.parent.name for path in self.folder.glob("fold*/best.pt"))
        return sorted(int(name[4:]) for name in names if name[4:].isdecimal())

    def read(self, name: str) -> Any:
        """Read a JSON file of the run.

        Raises:
            SegkitError: It is missing, unreadable, damaged, or not of its shape in :data:`SHAPES`.
        """
        path = self.folder / name
        try:
            value = json.loads(regular(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise SegkitError(f"{path}: cannot be read ({reason(error)})") from error
        except (ValueError, RecursionError) as error:
            raise SegkitError(f"{path}: is damaged, it is not valid JSON ({error})") from error
        if not fits(value, SHAPES.get(path.name, Any)):
            raise self._damaged(name)
        return value

    def _damaged(self, name: str) -> SegkitError:
        return SegkitError(f"{self.folder / name}: is damaged, or of another version of segkit")

    def category_ids(self) -> dict[int, int] | None:
        """Return the class index of each category id of the labels; ``None`` if they had none."""
        known = self.read("classes.json")["category_ids"]
        try:
            return None if known is None else {int(key): index for key, index in known.items()}
        except ValueError as error:
            raise self._damaged("classes.json") from error

    def optional(self, name: str, default: Any) -> Any:
        """Read a JSON file that the run can do without; one that is damaged is left out."""
        if not os.path.lexists(self.folder / name):
            return default
        try:
            return self.read(name)
        except SegkitError as error:
            warnings.warn(f"{error}; left out", stacklevel=2)
            return default

    def write(self, name: str, value: Any) -> None:
        """Replace a JSON file of the run, whole or not at all; after a power cut, too."""
        write_json(self.folder / name, value, durable=True)

    def log(self, **event: Any) -> None:
        """Append one event to ``log.jsonl``, and tell the followers."""
        event = {"time": round(time.time(), 3), **event}
        path = self.folder / "log.jsonl"
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        for follow in self.followers:
            follow(event)

    def _cut_log(self) -> None:
        """Remove a last line of ``log.jsonl`` that a kill or a power cut left without an end."""
        lines = self._lines()
        if lines and not lines[-1].endswith(b"\n"):
            path = self.folder / "log.jsonl"
            with naming(path):
                os.truncate(path, sum(map(len, lines[:-1])))

    def events(self) -> Iterator[dict[str, Any]]:
        """Read the events of ``log.jsonl``.

        A last line cut by a kill is left out; so is one that is damaged or lacks what events of its
        kind have, with a warning.
        """
        strange = []
        for number, line in enumerate(self._lines(), 1):
            event = _parse(line)
            if event is not None and fits(
                event, {**EVENT, **EVENTS.get(str(event.get("event")), {})}
            ):
                yield event
            elif line.endswith(b"\n"):
                strange.append(number)
        if strange:
            warnings.warn(
                f"{self.folder / 'log.jsonl'}: {len(strange)} lines are damaged or of another "
                f"version of segkit, the first is line {strange[0]}; left out",
                stacklevel=2,
            )

    def _lines(self) -> list[bytes]:
        path = self.folder / "log.jsonl"
        if not os.path.lexists(path):
            return []
        with naming(path), regular(path).open("rb") as file:
            return file.readlines()

    def epochs_begun(self) -> int:
        """Epochs that the furthest fold has taken a step of, as the log has it."""
        steps_per_epoch: dict[int, Any] = {}
        begun = 0
        for event in self.events():
            if event["event"] in ("start", "resume"):
                length = event.get("steps_per_epoch")
                steps_per_epoch[event["fold"]] = length if fits(length, int) else 0
            elif event["event"] == "step":
                length = steps_per_epoch.get(event["fold"])
                begun = max(begun, math.ceil(event["step"] / length) if length else event["epoch"])
        return begun

    def reopen(self, fold: int) -> None:
        """Remove a fold from ``summary.json``: it is trained further."""
        path = self.folder / "summary.json"
        summary = self.optional(path.name, {})
        if summary.pop(f"fold{fold}", None) is None:
            return
        if summary:
            self.write(path.name, summary)
        else:
            path.unlink()

    def rewind(self, fold: int, step: int) -> None:
        """Drop events of ``fold`` after ``step``: a resumed run writes them again."""
        kept = []
        for event in map(_parse, self._lines()):
            if event is None:
                continue
            placed = fits(event, {"fold": int, "step": int})
            if not (placed and event["fold"] == fold and event["step"] > step):
                kept.append(json.dumps(event) + "\n")
        write_text(self.folder / "log.jsonl", "".join(kept), durable=True)

    def last(self, fold: int) -> dict[str, Any] | None:
        """The state to resume ``fold`` from, if it was ever saved."""
        return load_latest(self.fold(fold) / "last.pt", needs=RESUME)


def _parse(line: bytes) -> dict[str, Any] | None:
    """Read a line of ``log.jsonl``; ``None`` if it is cut or no JSON object."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if line.endswith(b"\n") and isinstance(event, dict) else None


def runs(name: str | None = None) -> list[Run]:
    """The runs in ``runs/``, or those of configuration ``name``; the ones started last first."""
    folders = [path.parent for path in RUNS.glob("*/config.json")]
    if name is not None:
        own = re.compile(re.escape(name) + r"-\d{8}-\d{6}")  # as new_folder names them
        folders = [folder for folder in folders if own.fullmatch(folder.name)]
    return [Run(folder) for folder in sorted(folders, key=_started, reverse=True)]


def _started(folder: Path) -> float:
    return (folder / "config.json").stat().st_mtime


def new_folder(name: str) -> Path:
    """A folder for a run that starts now."""
    return RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def environment() -> dict[str, Any]:
    """What a result depends on besides the configuration."""
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
    """What torchrun calls this job; without a name, which torchrun process has started it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    job = os.environ["TORCHELASTIC_RUN_ID"]
    return f"process {os.getppid()} on {platform.node()}" if job == "none" else job


def _holds_others(folder: Path) -> bool:
    """Whether there are files that a kill during :meth:`Run.begin` did not leave."""
    names = {path.name for path in folder.iterdir()}
    if "lock" not in names:  # which is made first
        return bool(names)
    known = {*SHAPES, "folds.json", "lock"}
    return any(name not in known and not name.endswith(".json.writing") for name in names)


def _differences(known: Any, wanted: Any, path: str = "") -> list[str]:
    """Paths of the keys that differ between two configurations."""
    if isinstance(known, Mapping) and isinstance(wanted, Mapping):
        keys = sorted({*known, *wanted})
        return [
            name
            for key in keys
            for name in _differences(
                known.get(key), wanted.get(key), f"{path}.{key}" if path else key
            )
        ]
    return [] if known == wanted else [path]
