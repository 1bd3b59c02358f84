"""Claims of the field, measured on photographs: pairs of trainings or combinations over seeds.

    python -m benchmarks.claims --cfg trashbags --weights FILE [--seeds 5] [--jobs 2] [--json]
    python -m benchmarks.claims --cfg trashbags --weights FILE --small

Each claim compares two ways to train or to combine, by their mean IoU on the labelled test images.
Both sides of a pair share a seed (weights, folds, order, augmentation); the 95 % interval is
Student's t over the seeds. The test images are the same for all seeds, so the interval holds for
other trainings, not for other photographs.

Runs are kept in ``--cache``, one folder for each training and seed: a second call trains only what
is missing, and goes on where a stopped one was. ``--scores`` also keeps the scores in a file, which
is enough where the runs are gone. ``--minutes`` ends the call early; what is finished by then is in
the table. ``--jobs`` trainings run side by side.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from segkit.core import config
from segkit.core.files import write_text
from segkit.inference.candidates import SOUPS

LOSSES = {
    "cross_entropy": ["cross_entropy"],
    "dice": ["dice"],
    "focal": ["focal"],
    "focal_dice": ["focal", "dice"],
}

TRAININGS: dict[str, tuple[str, ...]] = {
    "base": (),
    **{name: (f"loss.terms={json.dumps(terms)}",) for name, terms in LOSSES.items()},
    "random_weights": ("model.weights=null", "optim.backbone_lr_factor=1"),
    "equal_rates": ("optim.backbone_lr_factor=1",),
    "repeated": ("data.repeat_threshold=0.5",),
    "average": ("train.average=0.01",),
    "random_folds": ("data.stratify=false",),
    "copy_paste": (),
    "pseudo": (),
    "student": (),
}
"""Settings of each training, on top of the configuration and :data:`COMMON`.

Those of ``copy_paste`` depend on the configuration, those of :data:`AFTER` on another training."""

AFTER = {"pseudo": "base", "student": "base"}
"""Trainings that use the run of another training with the same seed, which is made before."""

COMMON = ("data.selection=0.15", "optim.backbone_lr_factor=0.1", "data.workers=0")

SMALL = (
    "train.epochs=5",
    "train.evaluate_every=5",
    "optim.warmup_steps=20",
    "infer.size=192",
    "infer.batch_norm_images=64",
    "infer.details=off",
    'augment.train=[{"name": "scale", "range": [0.25, 0.5]}, '
    '{"name": "crop", "size": [128, 128], "max_class_share": 0.9}, {"name": "hflip"}]',
)
"""Settings of ``--small``: a training of ``trashbags`` takes a minute on one CPU core."""

FOLDS = {"base": "0,1,2", "random_folds": "0,1,2"}
"""Folds that a training has; the others have fold 0 alone."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Args:
        training: A name of :data:`TRAININGS`.
        candidate: A row of its ``scores.json``, or ``best fold``: the fold with the highest score
            on the selection set.
    """

    training: str
    candidate: str = "fold0"


@dataclass(frozen=True)
class Claim:
    """A claim, that ``better`` has a higher mean IoU than ``worse``.

    Args:
        topic: Selects it with ``--only``.
        sentence: Its wording.
        better: The side that should win.
        worse: The other side.
    """

    topic: str
    sentence: str
    better: Side
    worse: Side


BASE = Side("base")
BEST = Side("base", "best fold")
VOTE = Side("base", "soft vote")
RANDOM_VOTE = Side("random_folds", "soft vote")

CLAIMS = (
    *(
        Claim("loss", f"CE + Dice over {name}", BASE, Side(training))
        for name, training in {
            "CE": "cross_entropy",
            "Dice": "dice",
            "focal + Dice": "focal_dice",
        }.items()
    ),
    Claim("loss", "focal + Dice over focal", Side("focal_dice"), Side("focal")),
    Claim("views", "views over none, one model", Side("base", "fold0, views"), BASE),
    Claim("views", "views over none, vote", Side("base", "soft vote, views"), VOTE),
    *(
        Claim("soups", f"{kind} soup over the best fold", Side("base", f"{kind} soup"), BEST)
        for kind in SOUPS
    ),
    Claim("votes", "vote of folds over the best fold", VOTE, BEST),
    Claim("votes", "vote of folds over their greedy soup", VOTE, Side("base", "greedy soup")),
    Claim("folds", "vote of stratified folds over vote of random folds", VOTE, RANDOM_VOTE),
    Claim("rates", "backbone at 0.1 of the rate over equal rates", BASE, Side("equal_rates")),
    Claim("weights", "ImageNet weights over random ones", BASE, Side("random_weights")),
    Claim("rare", "copy-paste over none", Side("copy_paste"), BASE),
    Claim("rare", "repeated rare images over none", Side("repeated"), BASE),
    Claim("average", "mean of the last 1 % of the steps over EMA alone", Side("average"), BASE),
    Claim("pseudo", "pseudo labels of the test images over none", Side("pseudo"), BASE),
    Claim("distillation", "student of the vote over the same model", Side("student"), BASE),
    Claim("distillation", "vote over its student", VOTE, Side("student")),
)


@dataclass(frozen=True)
class Evidence:
    """A claim's result.

    Args:
        claim: Its wording.
        effect: Mean difference of the mean IoU on the test images.
        low, high: 95 % interval of the effect over seeds; NaN with one seed.
        differences: Of each seed.
        better, worse: Mean IoU of each side, averaged over the seeds.
        verdict: ``holds``, ``contradicted``, or ``within noise``.
    """

    claim: str
    effect: float
    low: float
    high: float
    differences: tuple[float, ...]
    better: float
    worse: float
    verdict: str


STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
"""0.975 quantile of Student's t distribution with 1, 2, ... degrees of freedom."""


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of paired differences; NaN for fewer than two."""
    count = len(differences)
    if count < 2:
        return math.nan, math.nan
    quantile = STUDENT[min(count - 1, len(STUDENT)) - 1]
    half = quantile * statistics.stdev(differences) / math.sqrt(count)
    mean = statistics.fmean(differences)
    return mean - half, mean + half


def evidence(claim: Claim, pairs: Sequence[tuple[float, float]]) -> Evidence:
    """Return the result of a claim from the (better, worse) scores of each seed."""
    differences = tuple(better - worse for better, worse in pairs)
    low, high = interval(differences)
    verdict = "holds" if low > 0 else "contradicted" if high < 0 else "within noise"
    return Evidence(
        claim=claim.sentence,
        effect=statistics.fmean(differences),
        low=low,
        high=high,
        differences=differences,
        better=statistics.fmean(better for better, _ in pairs),
        worse=statistics.fmean(worse for _, worse in pairs),
        verdict=verdict,
    )


def score(rows: Sequence[Mapping[str, Any]], candidate: str) -> float | None:
    """Return the test mean IoU of a candidate of ``scores.json``, ``None`` if it is not there."""
    if candidate == "best fold":
        folds = [row for row in rows if str(row["name"]).startswith("fold") and not row["views"]]
        if not all("selection" in row for row in folds):
            return None
        candidate = max(folds, key=lambda row: row["selection"]["miou"])["name"]
    for row in rows:
        if row["name"] == candidate or (candidate == "fold0" and row["name"] == "best checkpoint"):
            return float(row["test"]["miou"])
    return None


class Trainings:
    """Trained and scored runs, in a folder that later calls go on with.

    Args:
        name: A configuration.
        settings: ``section.key=value`` that all trainings share.
        cache: Folder of the runs.
        threads: CPU threads of each process.
        scores: JSON file of the scores of finished runs, which need not be in the folder.
    """

    def __init__(
        self,
        name: str,
        settings: Sequence[str],
        cache: Path,
        threads: int,
        scores: Path | None = None,
    ) -> None:
        self.name, self.settings, self.cache, self.scores = name, tuple(settings), cache, scores
        self._environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
        self._recording, self._again = Lock(), Lock()

    def folder(self, training: str, seed: int) -> Path:
        """Return the folder of a run."""
        return self.cache / f"{self.name}-{training}-{seed}"

    def rows(self, training: str, seed: int) -> list[dict[str, Any]] | None:
        """Return the scores of a finished run, else ``None``."""
        path = self.folder(training, seed) / "infer" / "scores.json"
        if path.is_file():
            return json.loads(path.read_text())
        return self._recorded().get(self.folder(training, seed).name)

    def make(self, training: str, seed: int) -> None:
        """Train and score a run, unless that is done."""
        if self.rows(training, seed) is None:
            if training in AFTER:
                with self._again:  # its scores may be known, but its weights gone
                    self._train(AFTER[training], seed)
            self._train(training, seed)
            compared = ["--compare"] if training in FOLDS else ["--brief"]
            compared += ["--soup", "--tta"] if training == "base" else []
            folder = str(self.folder(training, seed))
            self._run(["infer.py", "--run-dir", folder, "--quiet", *compared])
        self._record(training, seed)

    def _recorded(self) -> dict[str, list[dict[str, Any]]]:
        if self.scores is None or not self.scores.is_file():
            return {}
        return json.loads(self.scores.read_text())

    def _record(self, training: str, seed: int) -> None:
        """Add the mean IoU of a run's candidates to the file of scores."""
        rows = self.rows(training, seed)
        if self.scores is None or rows is None:
            return
        parts = ("selection", "test")
        short = [
            {"name": row["name"], "views": row["views"]}
            | {part: {"miou": round(row[part]["miou"], 6)} for part in parts if part in row}
            for row in rows
        ]
        with self._recording:
            known = self._recorded() | {self.folder(training, seed).name: short}
            lines = [f"{json.dumps(name)}: {json.dumps(known[name])}" for name in sorted(known)]
            write_text(self.scores, "{\n" + ",\n".join(lines) + "\n}\n")

    def _train(self, training: str, seed: int) -> None:
        folder = self.folder(training, seed)
        if (folder / "summary.json").is_file():  # all folds are trained
            return
        settings = [*COMMON, *self.settings, f"train.seed={seed}", *self._own(training, seed)]
        train = ["train.py", "--cfg", self.name, "--run-dir", str(folder), "--resume", "--quiet"]
        train += ["--folds", FOLDS.get(training, "0")]
        self._run(train + [word for setting in settings for word in ("--set", setting)])

    def _own(self, training: str, seed: int) -> tuple[str, ...]:
        """Return the settings of one training."""
        if training == "copy_paste":
            settings = dict(setting.split("=", 1) for setting in self.settings)
            given = settings.get("augment.train")
            operations = json.loads(given) if given else config.load(self.name).augment.train
            return (f"augment.train={json.dumps(['copy_paste', *(operations or [])])}",)
        if training == "pseudo":
            return (f"data.pseudo={json.dumps(self._pseudo_labels(seed))}",)
        if training == "student":
            return (f"data.teacher={self.folder(AFTER[training], seed)}",)
        return TRAININGS[training]

    def _pseudo_labels(self, seed: int) -> dict[str, str]:
        """Label the test images by the vote of the base run's folds; return a data source."""
        base = self.folder(AFTER["pseudo"], seed)
        folder = base.with_name(f"{base.name}-pseudo")
        scratch = base.with_name(f"{base.name}-predicted")
        if not (folder / "pseudo.json").is_file():
            self._run(
                ["infer.py", "--run-dir", str(base), "--brief", "--quiet", "--tta",
                 "--out", str(scratch), "--pseudo", str(folder)]
            )  # fmt: skip
        background = json.loads((base / "classes.json").read_text())["classes"][0]
        return {
            "name": "coco",
            "annotations": str(folder / "pseudo.json"),
            "images": str(folder / "images"),
            "background": background,
        }

    def _run(self, command: Sequence[str]) -> None:
        done = subprocess.run(
            [sys.executable, *command], env=self._environment, capture_output=True, text=True
        )
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise RuntimeError(f"{' '.join(command)}: {last}")


def measure(
    claims: Sequence[Claim], trainings: Trainings, seeds: int, jobs: int, minutes: float
) -> Iterator[Evidence]:
    """Train what is missing, then yield the evidence of each claim with a finished pair."""
    names = dict.fromkeys(s.training for claim in claims for s in (claim.worse, claim.better))
    names |= dict.fromkeys(AFTER[name] for name in names if name in AFTER)
    end = time.monotonic() + 60 * minutes
    failures: list[str] = []

    def make(pair: tuple[str, int]) -> None:
        if time.monotonic() > end:
            return
        try:
            trainings.make(*pair)
            print(f"{pair[0]}, seed {pair[1]}: done", file=sys.stderr, flush=True)
        except RuntimeError as error:
            failures.append(str(error))
            print(error, file=sys.stderr, flush=True)

    for later in (False, True):
        group = [name for name in names if (name in AFTER) == later]
        with ThreadPoolExecutor(jobs) as pool:  # each waits for a process
            list(pool.map(make, [(name, seed) for seed in range(seeds) for name in group]))
    for claim in claims:
        pairs = []
        for seed in range(seeds):
            rows = [trainings.rows(side.training, seed) for side in (claim.better, claim.worse)]
            if rows[0] is None or rows[1] is None:
                continue
            both = score(rows[0], claim.better.candidate), score(rows[1], claim.worse.candidate)
            if both[0] is not None and both[1] is not None:
                pairs.append((both[0], both[1]))
        if pairs:
            yield evidence(claim, pairs)
    if failures:
        raise SystemExit(f"{len(failures)} trainings failed; the first: {failures[0]}")


def main() -> None:
    """Print a Markdown row for each claim, and progress to stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg", default="trashbags", help="configuration with labelled test data")
    parser.add_argument("--weights", type=Path, help="file of pretrained weights")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", help="topics, separated by commas")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--small", action="store_true", help="small crops and few epochs")
    parser.add_argument("--cache", type=Path, default=Path("runs/claims"))
    parser.add_argument("--scores", type=Path, help="file that keeps the scores of finished runs")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin none after these")
    parser.add_argument("--json", action="store_true", help="print one line of JSON per claim")
    options = parser.parse_args()
    topics = options.only.split(",") if options.only else {claim.topic for claim in CLAIMS}
    claims = [claim for claim in CLAIMS if claim.topic in topics]
    settings = [*(SMALL if options.small else ()), *options.set]
    settings += [f"model.weights={options.weights}"] if options.weights else []
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    trainings = Trainings(options.cfg, settings, options.cache, threads, options.scores)
    if not options.json:
        print("| claim | effect on mean IoU, 95 % interval | seeds | mean IoU | verdict |")
        print("| --- | --- | --- | --- | --- |")
    for row in measure(claims, trainings, options.seeds, options.jobs, options.minutes):
        if options.json:
            print(json.dumps(asdict(row)), flush=True)
        else:
            print(
                f"| {row.claim} | {row.effect:+.4f} [{row.low:+.4f}, {row.high:+.4f}] "
                f"| {len(row.differences)} | {row.better:.3f}, {row.worse:.3f} | {row.verdict} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
