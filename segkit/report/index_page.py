"""Comparison of runs, ``index.html``: their scores, curves, settings and classes."""

import json
import time
from collections.abc import Sequence
from urllib.parse import quote

from segkit.core.files import matches_schema
from segkit.report import html
from segkit.report.html import cell, escape, number
from segkit.report.log import RunLog
from segkit.training.metrics import FEW_IMAGES


def index_page(logs: Sequence[RunLog], *, title: str) -> str:
    """Return the page that compares runs; its place is the folder that holds theirs."""
    groups: dict[str, list[RunLog]] = {}
    for log in logs:
        groups.setdefault(log.data[1], []).append(log)
    facts = {"Runs": str(len(logs))}
    if len(groups) == 1:
        best = max(((log.score[0], log.name) for log in logs if log.score), default=None)
        score = "–" if best is None else f"{best[0]:.3f}<small>{escape(best[1])}</small>"
        facts["Best validation mean IoU"] = score
    else:
        facts["Data sets"] = f"{len(groups)}<small>scores compare only within a data set</small>"
    facts["Time in training"] = html.duration(sum(log.seconds for log in logs))
    sections: dict[str, str] = {}
    for n, group in enumerate(groups.values(), 1):
        suffix = f" – {group[0].data[0]} ({n} of {len(groups)})" if len(groups) > 1 else ""
        sections |= {
            f"Runs{suffix}": _runs(group),
            f"Curves{suffix}": _curves(group),
            f"Settings that differ{suffix}": _settings(group),
            f"Classes{suffix}": _classes([log for log in group if log.score]),
        }
    return html.document(title, sections, header=html.facts(facts))


def _runs(logs: Sequence[RunLog]) -> str:
    rows = []
    for log in logs:
        link = escape(f"{quote(log.run.folder.name)}/report.html")
        terms = [
            t["name"] for t in log.setting("loss.terms", []) if matches_schema(t, {"name": str})
        ]
        decoder, backbone = (
            escape(log.setting(f"model.{part}.name", "–")) for part in ("decoder", "backbone")
        )
        state, sentence = map(escape, log.state)
        started = min((f.start["time"] for f in log.folds.values() if f.start), default=0.0)
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(started)) if started else "–"
        rows.append([
            f'<a href="{link}">{escape(log.name)}</a>',
            cell(f"{decoder}<small>{backbone}</small>", style="text"),
            cell(escape(" + ".join(terms)), style="text"),
            cell(f"{state}<small>{sentence}</small>" if sentence else state, style="text"),
            cell(str(len(log.folds)), len(log.folds)),
            _score(log.score, few=log.few_images is not None),
            _test_score(log),
            cell(html.duration(log.seconds), log.seconds),
            cell(f"{log.parameters / 1e6:.1f} M" if log.parameters else "–", log.parameters),
            cell(day, started),
        ])  # fmt: skip
    head = [
        "run", "model", "loss", "state", "folds", "validation mIoU", "test mIoU", "time",
        "parameters", "started",
    ]  # fmt: skip
    caption = (
        "Mean IoU with its 95 % interval. Validation: the best epochs of the folds, chosen on the "
        "same images. Test: the latest results of infer, if the test images are labelled."
    )
    return html.table(head, rows, caption=caption, style="sortable")


def _score(score: tuple[float, float, float] | None, *, few: bool = False) -> str:
    if score is None:
        return cell("–", -1)
    value, low, high = score
    interval = f"[{low:.3f}, {high:.3f}]" + ", few images" * few
    return cell(f"<strong>{value:.3f}</strong><small>{interval}</small>", value)


def _test_score(log: RunLog) -> str:
    titles, rows = log.combined
    if "test" not in titles:
        return _score(None)
    score = rows[-1]["test"]
    return _score((score["miou"], *score["interval"]), few=score["images"] < FEW_IMAGES)


def _curves(logs: Sequence[RunLog]) -> str:
    """Return the curves of all folds; each run has its own color."""
    loss, miou = [], []
    for color, log in enumerate(logs):
        for fold in log.folds.values():
            name = log.name if len(log.folds) == 1 else f"{log.name} fold {fold.number}"
            loss.append({**fold.curve("loss"), "name": name, "color": color})
            miou.append({**fold.curve("miou"), "name": name, "color": color})
    charts = html.chart("Loss", loss, kind="log", smooth=True, value="loss")
    charts += html.chart("Mean IoU, validation", miou, kind="dots", value="mean IoU")
    return f'<div class="grid">{charts}</div>' if charts else ""


def _settings(logs: Sequence[RunLog]) -> str:
    rows = []
    for key in sorted({key for log in logs for key in log.settings} - {"note"}):
        values = [json.dumps(log.settings[key]) if key in log.settings else "–" for log in logs]
        most_common = max(values, key=values.count)
        if len(set(values)) > 1:
            rows.append([f"<code>{escape(key)}</code>"])
            for value in values:
                style = "text" if value == most_common else "text differs"
                rows[-1].append(cell(f"<code>{escape(value)}</code>", style=style))
    if not rows:
        return "" if len(logs) < 2 else "<p>All runs have the same settings.</p>"
    caption = "Values that differ from the most common value are marked."
    return html.table(["setting", *(log.name for log in logs)], rows, caption=caption)


def _classes(logs: Sequence[RunLog]) -> str:
    known = [dict(zip(log.classes, log.class_iou, strict=True)) for log in logs]
    rows = []
    for name in dict.fromkeys(name for log in logs for name in log.classes):
        values = [of_run.get(name) for of_run in known]
        best = max((v for v in values if v is not None), default=-1.0)
        rows.append([escape(name)])
        for v in values:
            text = f"<strong>{number(v)}</strong>" if v == best else number(v)
            rows[-1].append(cell(text, -1 if v is None else v, heat=v))
    caption = "IoU at the folds' best epochs, averaged; the best run of each class is bold."
    head = ["class", *(log.name for log in logs)]
    return html.table(head, rows, caption=caption, style="sortable")
