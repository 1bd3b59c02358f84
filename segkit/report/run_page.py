"""Page of a run, ``report.html``: curves, pictures, classes, confusions, results, settings."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from segkit.core.files import matches_schema, write_text
from segkit.core.run import Run
from segkit.inference.outputs import ERROR, PALETTES, SAFE, Color
from segkit.report import html
from segkit.report.html import cell, escape, number, percent
from segkit.report.log import DETAILS, Event, RunLog, average
from segkit.training.metrics import FEW_IMAGES

LONG_NOTE = 120  # a longer note is folded
MAX_PICTURES = 100  # a page stays below 5 MB
MAX_CONFUSIONS, MAX_NOTES = 12, 50


def write_run_page(run: Run) -> RunLog:
    """Write ``report.html`` to the folder of a run, and return the run's log."""
    log = RunLog(run)
    write_text(run.folder / "report.html", run_page(log))
    return log


def run_page(log: RunLog) -> str:
    """Return the page of a run."""
    colors = PALETTES.get(log.setting("infer.palette", "safe"), SAFE)
    labels = html.class_labels(log.classes, colors)
    evaluations = log.evaluations()
    sections = {
        "Curves": _curves(log),
        "Pictures": _pictures(log.classes, colors, evaluations),
        "Classes": _classes(log, labels),
        "Confusions": _confusions(log.classes, [e["matrix"] for e in evaluations.values()]),
        "Models combined": _combined(*log.combined) + _details(*log.combined, labels),
        "Folds": _shares(log.classes, log.shares()),
        "Notes": _notes(log.notes),
        "Settings": _settings("Configuration, resolved", log.settings)
        + _settings("Environment", log.run.read_or_default("environment.json", {})),
    }
    return html.document(log.name, sections, header=_header(log))


def _header(log: RunLog) -> str:
    decoder, backbone = (log.setting(f"model.{p}.name", "–") for p in ("decoder", "backbone"))
    names, note = f"{decoder} on {backbone}", log.setting("note", "")
    if len(note) <= LONG_NOTE:
        intro = f"<p>{escape(f'{names} · {note}' if note else names)}</p>"
    else:  # such as the reasons of a plan
        begin = f"{note[:LONG_NOTE].rpartition(' ')[0]} …"
        intro = (
            f"<p>{escape(names)}</p><details><summary>{escape(begin)}</summary>"
            f"<p>{escape(note)}</p></details>"
        )
    steps = [step for fold in log.folds.values() for step in fold.steps]
    state, sentence = (escape(text) for text in log.state)
    if steps and state != "done":
        last = max(reversed(steps), key=lambda step: step["time"])
        epochs, now = log.setting("train.epochs", 0), time.strftime("%Y-%m-%d %H:%M")
        state += (
            f"<small>fold {last['fold']}, {last['epoch']} of {epochs} epochs done at {now}</small>"
        )
    state += f"<small>{sentence}</small>" if sentence else ""
    score = "–"
    if log.score is not None:
        value, low, high = log.score
        folds = f"mean of {len(log.best)} folds" if len(log.best) > 1 else "one fold"
        few = f", few images ({log.few_images})" if log.few_images else ""
        score = f"{value:.3f}<small>[{low:.3f}, {high:.3f}], {folds}, best epochs{few}</small>"
    facts = {
        "Mean IoU, validation": score,
        "State": state,
        "Time in training": html.duration(log.seconds),
        "Images per second": number(average(step["images_per_s"] for step in steps), ".1f"),
        "Parameters": f"{log.parameters / 1e6:.1f} M" if log.parameters else "–",
    }
    return f"{intro}\n{html.facts(facts)}"


def _curves(log: RunLog) -> str:
    folds = log.folds.values()

    def chart(title: str, key: str, **options: Any) -> str:
        return html.chart(title, [fold.curve(key) for fold in folds], **options)

    of_classes = {"mean of the classes": [fold.curve("miou") for fold in folds]}
    for c, name in enumerate(log.classes):
        of_classes[name] = [fold.class_curve(c) for fold in folds]
    charts = (
        chart("Loss", "loss", kind="log", smooth=True, value="loss")
        + html.chart("Validation IoU", of_classes, kind="dots", value="IoU")
        + chart("Learning rate", "lr", value="learning rate")
        + chart("Images per second", "images_per_s", smooth=True, value="images per second")
    )
    return f'<div class="grid">{charts}</div>' if charts else ""


def _classes(log: RunLog, labels: Sequence[str]) -> str:
    if not log.best:
        return ""
    rows = []
    for c, (label, iou) in enumerate(zip(labels, log.class_iou, strict=True)):
        if iou is None:
            rows.append([label, cell("in no validation image", -1), cell("–", -1), cell("", 0)])
            continue
        of_folds = [e["iou"][c] for e in log.best.values()] if len(log.best) > 1 else []
        marks = "".join(f'<i style="left:{100 * v:.1f}%"></i>' for v in of_folds if v is not None)
        bar = f'<span class="bar"><b style="width:{100 * iou:.1f}%"></b>{marks}</span>'
        change = _change(log.class_change(c))
        rows.append([label, cell(bar, iou, style="wide"), cell(number(iou), iou), change])
    caption = (
        "IoU of the best epochs on their own validation images, and the change since the best "
        f"epoch before{'; marks are the folds' if len(log.best) > 1 else ''}."
    )
    head = ["class", "", "IoU", "change"]
    return html.table(head, rows, caption=caption, style="panel classes sortable")


def _change(value: float | None) -> str:
    if value is None or abs(value) < 5e-4:
        kind, text = "muted", "–" if value is None else "±0.000"
    else:
        kind, text = ("good", f"▲ {value:.3f}") if value > 0 else ("bad", f"▼ {-value:.3f}")
    return cell(f'<span class="{kind}">{text}</span>', value or 0)


def _confusions(classes: Sequence[str], matrices: Sequence[list[list[int]]]) -> str:
    if not matrices:
        return ""
    size = range(len(classes))
    matrix = [[sum(m[i][j] for m in matrices) for j in size] for i in size]
    shares = [[count / sum(row) if sum(row) else None for count in row] for row in matrix]
    wrong = [(matrix[i][j], i, j) for i in size for j in size if i != j and matrix[i][j]]
    total = sum(count for count, _, _ in wrong)
    rows = []
    for count, i, j in sorted(wrong, reverse=True)[:MAX_CONFUSIONS]:
        predicted, of_class = cell(escape(classes[j]), style="text"), count / sum(matrix[i])
        row = [escape(classes[i]), predicted, cell(f"{count:,}", count)]
        rows.append([*row, cell(percent(of_class), of_class), cell(percent(count / total), count)])
    head = ["truth", "predicted", "pixels", "of the class", "of all errors"]
    common = html.table(head, rows, caption="The most common confusions.", style="sortable")
    caption = (
        "Predicted classes of the pixels of each true class (rows), in percent; blue is right, red "
        "is wrong. The best epochs of all folds together."
    )
    corner = "truth ↓ predicted →"
    pairs = html.heat_map(caption, classes, shares, corner=corner, diagonal=True)
    return f'<div class="beside">{pairs}{common}</div>'


def _combined(titles: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    if not titles:
        return ""
    intervals = [row[title]["interval"] for row in rows for title in titles]
    start, end = min(i[0] for i in intervals), max(i[1] for i in intervals)
    head = ["mean IoU"]
    for title in titles:
        images = rows[0][title]["images"]
        few = ", few" if images < FEW_IMAGES else ""
        head += [f"{title} ({images} images{few})", "95 % interval", ""]
    body = []
    for row in rows:
        name = escape(row["name"])
        body.append([f"<strong>{name}</strong> (written)" if row is rows[-1] else name])
        for title in titles:
            miou, (low, high) = row[title]["miou"], row[title]["interval"]
            at, left, right = (100 * (x - start) / (end - start or 1) for x in (miou, low, high))
            line = f'<s style="left:{left:.1f}%;width:{right - left:.1f}%"></s>'
            bar = f'<span class="bar interval">{line}<u style="left:{at:.1f}%"></u></span>'
            interval = cell(f"[{low:.3f}, {high:.3f}]", low)
            body[-1] += [cell(number(miou), miou), interval, cell(bar, miou)]
    caption = (
        "Folds, soups, votes and views, each scored on labels it did not train on; intervals by "
        f"bootstrap over images, drawn from {start:.2f} to {end:.2f}."
    )
    return html.table(head, body, caption=caption, style="sortable")


def _details(
    titles: Sequence[str], rows: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> str:
    """Return tables of further scores on the last image set: by candidate, and by class."""
    details = [row[title].get("details") for title in titles[-1:] for row in rows]
    if not details or not all(matches_schema(each, DETAILS) for each in details):
        return ""
    keys = [key for key in details[-1] if all(key in each for each in details)]
    written = [details[-1][key] for key in keys]
    sizes = {len(each[key]) for each in written for key in ("per_class", "per_class_intervals")}
    if sizes != {len(labels)}:
        return ""
    head = [key.replace("_", " ") for key in keys]
    caption = f"Other scores on the {titles[-1]} images, with 95 % intervals: "
    body, classes = [], []
    for row, each in zip(rows, details, strict=True):
        means = [_interval(each[key]["mean"], each[key]["interval"]) for key in keys]
        body.append([escape(row["name"]), *means])
    for c, label in enumerate(labels):
        pairs = [(each["per_class"][c], each["per_class_intervals"][c]) for each in written]
        classes.append([label, *(_interval(*pair) for pair in pairs)])
    return html.table(
        ["candidate", *head], body, caption=caption + "means over classes.", style="sortable"
    ) + html.table(
        ["class", *head], classes, caption=caption + "the written candidate.", style="sortable"
    )


def _interval(value: float | None, interval: Sequence[float] | None) -> str:
    """Return a cell of a value and its interval."""
    if value is None or interval is None:
        return cell("–")
    return cell("{:.3f} <small>[{:.3f}, {:.3f}]</small>".format(value, *interval), value)


def _pictures(
    classes: Sequence[str], colors: Sequence[Color], evaluations: Mapping[int, Mapping[str, Any]]
) -> str:
    pictures = [{**p, "fold": n} for n, e in evaluations.items() for p in e["pictures"]]
    pictures = [p for p in pictures if math.isfinite(sum(p["iou"].values(), p["miou"]))]
    if not pictures:
        return ""
    pictures.sort(key=lambda picture: picture["miou"])
    left_out = len(pictures) - MAX_PICTURES
    content = {
        "classes": classes,
        "colors": [colors[c % len(colors)] for c in range(len(classes))],
        "error": ERROR,
        "pictures": pictures[:MAX_PICTURES],
    }
    more = f" {left_out} more are left out." if left_out > 0 else ""
    values = {"content": html.json_block(content), "left_out": more}
    return html.asset("gallery.html").substitute(values)


def _shares(classes: Sequence[str], parts: Sequence[Mapping[str, Any]]) -> str:
    if not parts:
        return ""
    rows = []
    for c, name in enumerate(classes):
        rows.append([escape(name)])
        largest = max(part["of_pixels"][c] for part in parts) or 1
        for part in parts:
            images, pixels = part["with_class"][c], part["of_pixels"][c]
            text = f'{percent(pixels)} <span class="muted">in {100 * images:.0f} %</span>'
            rows[-1].append(cell(text, pixels, heat=pixels / largest / 2))
    head = ["class", *(f"{part['title']} ({part['images']} images)" for part in parts)]
    caption = "The share of the pixels of each class, and the share of images it is in."
    return html.table(head, rows, caption=caption, style="sortable")


def _notes(events: Sequence[Event]) -> str:
    if not events:
        return ""
    items, more = "", len(events) - MAX_NOTES
    for event in events[:MAX_NOTES]:
        text = f"Left out: {event.get('sentence')}"
        if event["event"] == "non-finite":
            images = ", ".join(event["images"][:4])
            step = f"Fold {event['fold']}, step {event['step']}"
            text = f"{step}: loss or gradient was not finite, on {images}"
        items += f"<li>{escape(text)}</li>"
    return f"<ul>{items}</ul>" + (f"<p>and {more} more, in log.jsonl</p>" if more > 0 else "")


def _settings(title: str, values: Mapping[str, Any]) -> str:
    rows = []
    for key, value in values.items():
        shown = cell(f"<code>{escape(str(value))}</code>", style="text")
        rows.append([f"<code>{escape(key)}</code>", shown])
    return f"<details><summary>{title}</summary>{html.table(['key', 'value'], rows)}</details>"
