"""Scores of a run as tables of at most 80 columns, for the terminal."""

from collections.abc import Sequence

from segkit.report.html import number
from segkit.report.log import RunLog, average


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
