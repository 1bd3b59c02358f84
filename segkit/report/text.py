"""Scores of a run as tables of at most 80 columns, for the terminal."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from segkit.inference.trained_run import Images
from segkit.report.html import number
from segkit.report.log import RunLog, average
from segkit.training.metrics import FEW_IMAGES
from segkit.training.objects import SIZES

SHORT = {
    "boundary_iou": "bIoU",
    "boundary_f": "bF",
    **{f"recall_{size}": size for size in SIZES},
    "ece": "ECE",
}
"""Headings of the second table, by key of ``details`` in ``scores.json``."""


def score_table(log: RunLog) -> str:
    """Return each fold's best epoch with its 95 % interval, and the mean of the folds."""
    line = "{:<8}{:>10}{:>20}{:>10}{:>10}{:>12}"
    lines = [line.format("fold", "mean IoU", "95 % interval", "epoch", "steps", "images/s")]
    for n, best in log.best.items():
        fold, interval = log.folds[n], "[{:.3f}, {:.3f}]".format(*best["interval"])
        rate = number(average(step["images_per_s"] for step in fold.steps), ".1f")
        steps = fold.evaluations[-1]["step"]
        lines.append(line.format(n, number(best["miou"]), interval, best["epoch"], steps, rate))
    if log.score is not None and len(log.best) > 1:
        value, low, high = log.score
        mean = line.format("mean", number(value), f"[{low:.3f}, {high:.3f}]", "", "", "")
        lines += ["-" * 70, mean.rstrip()]
    if log.few_images:
        lines.append(f"few images (a fold validates on {log.few_images}): the intervals are rough")
    return "\n".join(lines)


def class_table(classes: Sequence[str], iou: Sequence[float | None]) -> str:
    """Return the IoU of each class, three classes per line."""
    cells = [f"{c:<18.18}{number(value):>6}" for c, value in zip(classes, iou, strict=True)]
    return "\n".join("   ".join(cells[i : i + 3]) for i in range(0, len(cells), 3))


def candidate_table(rows: Sequence[dict[str, Any]], eval_sets: Sequence[Images]) -> str:
    """Return the candidates' mean IoU with 95 % intervals as a table of 80 columns.

    A sign says whether a line is significantly better or worse than the last one on the same images
    (paired bootstrap: difficult images affect both).
    """
    titles = [f"{images.title} ({len(images.indices)} images)  " for images in eval_sets]
    lines = ["mean IoU".ljust(28) + "".join(title.rjust(26) for title in titles)]
    for row in rows:
        cells = []
        for images in eval_sets:
            score = row[images.title]
            low, high = score["interval"]
            cells.append(f"{score['miou']:.3f} [{low:.3f}, {high:.3f}] {_sign(score)}".rjust(26))
        lines.append(_fit(row["name"], 28).ljust(28) + "".join(cells))
    notes = ["> better, < worse, = not significantly different from the last (paired bootstrap)"]
    for images in eval_sets:
        if (count := len(images.indices)) < FEW_IMAGES:
            notes.append(f"few {images.title} images ({count}): its intervals are rough")
        if trained := max(row[images.title]["trained_on"] for row in rows):
            notes.append(f"up to {trained} of the {images.title} images were trained on")
    width = len(lines[0].rstrip())
    return "\n".join(
        [*lines[:-1], "-" * width, bold(lines[-1]), *(notes if rows[1:] else notes[1:])]
    )


def details_table(rows: Sequence[dict[str, Any]], title: str) -> str:
    """Return the candidates' other scores on a set of images as a table of 80 columns."""
    keys = [key for key in SHORT if key in rows[-1][title]["details"]]
    if not keys:
        return ""
    lines = [f"on {title}".ljust(28) + "".join(f"{SHORT[key]:>9}" for key in keys)]
    for row in rows:
        means = [row[title]["details"].get(key, {}).get("mean") for key in keys]
        cells = ["-" if mean is None else f"{mean:.3f}" for mean in means]
        lines.append(_fit(row["name"], 28).ljust(28) + "".join(f"{cell:>9}" for cell in cells))
    note = "bIoU, bF: boundary IoU and F-score; small to large: share of objects recognized"
    return "\n".join([*lines, note])


def _fit(name: str, width: int) -> str:
    """Return a name, without its middle if it is too long; the end says what the candidate is."""
    return name if len(name) <= width else f"{name[: width - 19]}…{name[-18:]}"


def _sign(score: dict[str, Any]) -> str:
    if "final_minus_this" not in score:
        return " "
    low, high = score["final_minus_this"]["interval"]
    return "<" if low > 0 else ">" if high < 0 else "="


def bold(text: str) -> str:
    """Return text in bold on a terminal, unless NO_COLOR is set (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or not sys.stdout.isatty()
    return text if plain else f"\033[1m{text}\033[0m"
