"""A run's scores as tables of 80 columns, for the terminal."""

from collections.abc import Sequence

from segkit.report.log import RunLog

WIDTH = 80


def score_table(log: RunLog) -> str:
    """Each fold's best epoch with its 95 % interval, and the mean of the folds."""
    line = "{:<8}{:>10}{:>20}{:>10}{:>10}{:>12}"
    lines = [line.format("fold", "mean IoU", "95 % interval", "epoch", "steps", "images/s")]
    for fold in log.folds.values():
        if fold.best is None:
            continue
        low, high = fold.best["interval"]
        rates = [one["images_per_s"] for one in fold.steps]
        lines.append(
            line.format(
                fold.number,
                f"{fold.best['miou']:.3f}",
                f"[{low:.3f}, {high:.3f}]",
                fold.best["epoch"],
                fold.evaluations[-1]["step"],
                f"{sum(rates) / len(rates):.1f}" if rates else "–",
            ).rstrip()
        )
    if log.score is not None and len(lines) > 2:
        value, low, high = log.score
        lines += ["-" * 70, line.format("mean", f"{value:.3f}", f"[{low:.3f}, {high:.3f}]", *"   ")]
    if log.few_images:
        lines.append(f"few images (a fold validates on {log.few_images}): the intervals are rough")
    return "\n".join(one.rstrip() for one in lines)


def class_table(classes: Sequence[str], iou: Sequence[float | None]) -> str:
    """IoU of each class, as many beside each other as fit."""
    cells = [
        f"{name:<18.18}{'–' if value is None else format(value, '.3f'):>6}"
        for name, value in zip(classes, iou, strict=True)
    ]
    columns = WIDTH // 27
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    return "\n".join("   ".join(row) for row in rows)
