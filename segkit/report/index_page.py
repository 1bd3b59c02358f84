"""Runs beside each other: their scores, settings, curves and classes on one page."""

import json
import time
from collections.abc import Mapping, Sequence

from segkit.core.files import fits
from segkit.report.blocks import cell, chart, document, duration, escape, facts, table
from segkit.report.log import RunLog
from segkit.training.metrics import FEW_IMAGES

DIFFERENT = "differs"


def index_page(logs: Sequence[RunLog], *, title: str, links: Mapping[str, str]) -> str:
    """The page that compares runs.

    Args:
        logs: The runs, the ones started last first.
        title: Of the page.
        links: Address of each run's own page by its name, where it has one.
    """
    scored = [(log.score[0], log.name) for log in logs if log.score]
    value, name = max(scored, default=(0.0, ""))
    best = f"{value:.3f}<small>{escape(name)}</small>" if scored else "–"
    header = [
        ("Runs", str(len(logs))),
        ("Best validation mean IoU", best),
        ("Time in training", duration(sum(log.seconds for log in logs))),
    ]
    return document(
        title,
        {
            "Runs": _runs(logs, links),
            "Curves": _curves(logs),
            "Settings that differ": _settings(logs),
            "Classes": _classes(logs),
        },
        header=facts(header),
    )


def _runs(logs: Sequence[RunLog], links: Mapping[str, str]) -> str:
    rows = []
    for log in logs:
        terms = [t["name"] for t in log.setting("loss.terms", []) if fits(t, {"name": str})]
        name = escape(log.name)
        if log.name in links:
            name = f'<a href="{escape(links[log.name])}">{name}</a>'
        started = [one["time"] for fold in log.folds.values() for one in [fold.start] if one]
        rows.append([
            name,
            cell(escape(log.setting("model.decoder.name", "–")), style="text"),
            cell(escape(log.setting("model.backbone.name", "–")), style="text"),
            cell(escape(" + ".join(terms)), style="text"),
            _state(log),
            cell(str(len(log.folds)), len(log.folds)),
            *_score(log.score, few=log.few_images is not None),
            *_test(log),
            cell(duration(log.seconds), log.seconds),
            cell(f"{log.parameters / 1e6:.1f} M" if log.parameters else "–", log.parameters or 0),
            cell(_day(started), min(started, default=0.0)),
        ])  # fmt: skip
    head = [
        "run", "decoder", "backbone", "loss", "state", "folds", "validation mIoU", "95 % interval",
        "test mIoU", "95 % interval", "time", "parameters", "started",
    ]  # fmt: skip
    caption = (
        "Validation: the folds' best epochs, which were chosen on the same images. Test: what "
        "infer.py wrote last, where labels are known."
    )
    return table(head, rows, caption=caption, sortable=True, text=(1, 2, 3, 4))


def _state(log: RunLog) -> str:
    """Whether the run is done, running, stopped or failed, and why it failed."""
    state, sentence = log.run.state()
    return cell(escape(state) + (f"<br>{escape(sentence)}" if sentence else ""), style="text")


def _day(times: Sequence[float]) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(min(times))) if times else "–"


def _score(score: tuple[float, float, float] | None, *, few: bool = False) -> list[str]:
    if score is None:
        return [cell("–", -1), cell("–", -1)]
    value, low, high = score
    interval = f"[{low:.3f}, {high:.3f}]" + "<small> few images</small>" * few
    return [cell(f"<strong>{value:.3f}</strong>", value), cell(interval, low)]


def _test(log: RunLog) -> list[str]:
    titles, rows = log.combined
    if "test" not in titles:
        return _score(None)
    found = rows[-1]["test"]
    return _score((found["miou"], *found["interval"]), few=found["images"] < FEW_IMAGES)


def _curves(logs: Sequence[RunLog]) -> str:
    """The curves of all folds; those of a run have one color."""
    loss, miou = [], []
    for color, log in enumerate(logs):
        for fold in log.folds.values():
            name = log.name if len(log.folds) == 1 else f"{log.name} fold {fold.number}"
            loss.append({**fold.curve("loss"), "name": name, "color": color})
            miou.append({**fold.curve("miou"), "name": name, "color": color})
    charts = chart("Loss", loss, smooth=True) + chart("Mean IoU, validation", miou, kind="dots")
    return f'<div class="grid">{charts}</div>' if charts else ""


def _settings(logs: Sequence[RunLog]) -> str:
    settings = [log.settings() for log in logs]
    keys = sorted({key for one in settings for key in one} - {"note"})
    rows = []
    for key in keys:
        values = [json.dumps(one[key]) if key in one else "–" for one in settings]
        if len(set(values)) == 1:
            continue
        common = max(values, key=values.count)
        cells = [
            cell(f"<code>{escape(v)}</code>", style="text" if v == common else f"text {DIFFERENT}")
            for v in values
        ]
        rows.append([f"<code>{escape(key)}</code>", *cells])
    if not rows:
        return "" if len(logs) < 2 else "<p>All runs have the same settings.</p>"
    caption = "Marked is what differs from the value that most runs have."
    columns = range(1, len(logs) + 1)
    return table(["setting", *(log.name for log in logs)], rows, caption=caption, text=columns)


def _classes(logs: Sequence[RunLog]) -> str:
    scored = [log for log in logs if log.score]
    names = list(dict.fromkeys(name for log in scored for name in log.classes))
    known = [dict(zip(log.classes, log.class_iou, strict=True)) for log in scored]
    rows: list[list[str]] = []
    for name in names:
        values = [one.get(name) for one in known]
        best = max((v for v in values if v is not None), default=None)
        cells = [
            cell("–", -1)
            if v is None
            else cell(f"<strong>{v:.3f}</strong>" if v == best else f"{v:.3f}", v, heat=v)
            for v in values
        ]
        rows.append([escape(name), *cells])
    caption = "IoU at the folds' best epochs, their mean; the best run of each class is bold."
    return table(["class", *(log.name for log in scored)], rows, caption=caption, sortable=True)
