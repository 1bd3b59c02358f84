"""A run's page, ``report.html``: its curves, classes, confusions, folds and pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

from segkit.core import distributed
from segkit.core.files import write_json, write_text
from segkit.core.run import Run
from segkit.inference.outputs import ERROR, PALETTES, SAFE, Color
from segkit.report.blocks import (
    cell,
    chart,
    details,
    document,
    duration,
    escape,
    facts,
    heat_map,
    percent,
    swatch,
    table,
)
from segkit.report.gallery import Gallery
from segkit.report.log import Fold, RunLog
from segkit.training.evaluate import Evaluation
from segkit.training.metrics import FEW_IMAGES

STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
SCRIPT = Path(__file__).with_name("report.js").read_text(encoding="utf-8")

MAX_PICTURES = 100
"""Of all folds together: the page stays below 5 MB."""

MAX_SHEETS = 6
"""Pictures that trackers are shown of an evaluation: each of them encodes every one anew."""

MAX_CONFUSIONS = 12
MAX_CHIPS = 4


def record(
    run: Run, fold: int, step: int, evaluation: Evaluation, gallery: Gallery
) -> Iterator[tuple[str, Image.Image]]:
    """Keep what the page shows of a fold's best evaluation in its ``evaluation.json``.

    Called by all ranks.

    Returns:
        Sheets of the worst pictures with their names, made as they are asked for, on rank 0 only.
    """
    pictures = gallery.pictures()
    colors = PALETTES[run.read("config.json")["infer"]["palette"]]
    if distributed.is_main():
        content = {
            "step": step,
            "matrix": evaluation.matrix.tolist(),
            "pictures": gallery.to_json(pictures, colors),
        }
        write_json(run.fold(fold) / "evaluation.json", content)
    return ((one.name, gallery.sheet(one, colors)) for one in pictures[:MAX_SHEETS])


def write_run_page(run: Run) -> RunLog:
    """Write ``report.html`` into the run's folder, from what lies there, and return that."""
    log = RunLog(run)
    write_text(run.folder / "report.html", run_page(log))
    return log


def run_page(log: RunLog) -> str:
    """The page of a run."""
    colors = PALETTES.get(log.setting("infer.palette", "safe"), SAFE)
    evaluations = log.evaluations()
    return document(
        log.name,
        {
            "Curves": _curves(log),
            "Pictures": _gallery(log, evaluations, colors),
            "Classes": _classes(log, colors),
            "Confusions": _confusions(log, evaluations),
            "Models combined": _combined(*log.combined),
            "Folds": _shares(log),
            "Notes": _notes(log),
            "Settings": _settings(log),
        },
        header=_header(log),
        style=STYLE,
        script=SCRIPT,
    )


def _header(log: RunLog) -> str:
    decoder, backbone = (log.setting(f"model.{p}.name", "–") for p in ("decoder", "backbone"))
    names = f"{decoder} on {backbone}"
    note = f" · {text}" if (text := log.setting("note", "")) else ""
    done = log.run.optional("summary.json", {})
    total = log.setting("train.epochs", 0)
    current = [one for fold in log.folds.values() for one in fold.steps[-1:]]
    state = "finished" if done else "starting"
    if not done and current:
        last = max(current, key=lambda one: one["time"])
        state = f"fold {last['fold']}<small>{last['epoch']} of {total} epochs done</small>"
    rates = [one["images_per_s"] for fold in log.folds.values() for one in fold.steps]
    pairs = [
        ("Mean IoU, validation", _score(log)),
        ("State", state),
        ("Time in training", duration(log.seconds)),
        ("Images a second", f"{mean(rates):.1f}" if rates else "–"),
        ("Parameters", f"{log.parameters / 1e6:.1f} M" if log.parameters else "–"),
    ]
    return f"<p>{escape(names + note)}</p>\n{facts(pairs)}"


def _score(log: RunLog) -> str:
    if log.score is None:
        return "–"
    folds = sum(fold.best is not None for fold in log.folds.values())
    of = f"mean of {folds} folds" if folds > 1 else "one fold"
    value, low, high = log.score
    few = f", few images ({log.few_images})" if log.few_images else ""
    return f"{value:.3f}<small>[{low:.3f}, {high:.3f}], {of}, best epochs{few}</small>"


def _curves(log: RunLog) -> str:
    folds = log.folds.values()
    charts = [
        chart("Loss", [one.curve("loss") for one in folds], smooth=True, log=_positive(folds)),
        chart("Mean IoU on the validation images", [f.curve("miou") for f in folds], kind="dots"),
        chart("Learning rate", [one.curve("lr") for one in folds]),
        chart("Images a second", [one.curve("images_per_s") for one in folds], smooth=True),
    ]
    return f'<div class="grid">{"".join(charts)}</div>' if any(charts) else ""


def _positive(folds: Any) -> bool:
    """Whether the losses span an order of magnitude above zero, so that a logarithm shows more."""
    values = [value for fold in folds for value in fold.curve("loss")["y"]]
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def _classes(log: RunLog, colors: Sequence[Color]) -> str:
    folds = [fold for fold in log.folds.values() if fold.best is not None]
    if not folds:
        return ""
    rows = []
    for c, name in enumerate(log.classes):
        value = log.class_iou[c]
        each = [fold.best["iou"][c] for fold in folds if fold.best]
        marks = [f'<i style="left:{100 * v:.1f}%"></i>' for v in each if v is not None]
        label = swatch(colors[c % len(colors)]) + escape(name)
        if value is None:
            rows.append([label, cell("in no validation image", -1), cell("–", -1), cell("", 0)])
            continue
        marks = marks if len(folds) > 1 else []
        bar = f'<span class="bar"><b style="width:{100 * value:.1f}%"></b>{"".join(marks)}</span>'
        changes = list(_changes(folds, c))
        change = mean(changes) if changes else None
        rows.append(
            [
                label,
                cell(bar, value, style="wide"),
                cell(f"{value:.3f}", value),
                _change(change),
            ]
        )
    marks_text = "; marks are the folds" if len(folds) > 1 else ""
    caption = (
        "IoU of the best epochs on their own validation images, and the change since the best "
        f"epoch before{marks_text}."
    )
    head = ["class", "", "IoU", "change"]
    return table(head, rows, caption=caption, sortable=True, style="panel classes")


def _changes(folds: Sequence[Fold], c: int) -> Iterator[float]:
    for fold in folds:
        best, before = fold.best, fold.best_before
        if best and before and best["iou"][c] is not None and before["iou"][c] is not None:
            yield best["iou"][c] - before["iou"][c]


def _change(value: float | None) -> str:
    if value is None:
        return cell('<span class="muted">–</span>', 0)
    if abs(value) < 5e-4:
        return cell('<span class="muted">±0.000</span>', value)
    kind, arrow = ("good", "▲") if value > 0 else ("bad", "▼")
    return cell(f'<span class="{kind}">{arrow} {abs(value):.3f}</span>', value)


def _confusions(log: RunLog, evaluations: dict[int, Any]) -> str:
    if not evaluations:
        return ""
    matrices = [one["matrix"] for one in evaluations.values()]
    size = len(log.classes)
    matrix = [[sum(m[i][j] for m in matrices) for j in range(size)] for i in range(size)]
    caption = (
        "Where the pixels of each class (rows) were predicted, in percent; "
        "blue is right, red is wrong. All folds' best epochs together."
    )
    wrong = sorted(
        ((matrix[i][j], i, j) for i in range(size) for j in range(size) if i != j and matrix[i][j]),
        reverse=True,
    )
    total = sum(count for count, _, _ in wrong) or 1
    shares = [[one / sum(row) if sum(row) else None for one in row] for row in matrix]
    rows = [
        [
            escape(log.classes[i]),
            cell(escape(log.classes[j]), style="text"),
            cell(f"{count:,}", count),
            cell(percent(count / sum(matrix[i])), count / sum(matrix[i])),
            cell(percent(count / total), count),
        ]
        for count, i, j in wrong[:MAX_CONFUSIONS]
    ]
    head = ["truth", "predicted", "pixels", "of the class", "of all errors"]
    common = table(head, rows, caption="The most common confusions.", sortable=True, text=[1])
    corner = "truth ↓ predicted →"
    return (
        f'<div class="beside">'
        f"{heat_map(log.classes, shares, caption=caption, corner=corner, diagonal=True)}"
        f"{common}</div>"
    )


def _combined(titles: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    if not titles:
        return ""
    values = [row[title]["interval"] for row in rows for title in titles]
    low, high = min(v[0] for v in values), max(v[1] for v in values)
    head = ["mean IoU"]
    for title in titles:
        images = rows[0][title]["images"]
        few = ", few" if images < FEW_IMAGES else ""
        head += [f"{title} ({images} images{few})", "95 % interval", ""]
    lines = []
    for number, row in enumerate(rows):
        name = escape(row["name"])
        line = [f"<strong>{name}</strong> (written)" if number == len(rows) - 1 else name]
        for title in titles:
            found = row[title]
            a, b = found["interval"]
            at, left, right = (100 * (v - low) / ((high - low) or 1) for v in (found["miou"], a, b))
            bar = (
                f'<span class="bar interval"><s style="left:{left:.1f}%;width:{right - left:.1f}%">'
                f'</s><u style="left:{at:.1f}%"></u></span>'
            )
            line.append(cell(f"{found['miou']:.3f}", found["miou"]))
            line.append(cell(f"[{a:.3f}, {b:.3f}]", a))
            line.append(cell(bar, found["miou"]))
        lines.append(line)
    caption = (
        "Folds, soups, votes and views, each scored on labels it did not train on; intervals by "
        f"bootstrap over images, drawn from {low:.2f} to {high:.2f}."
    )
    return table(head, lines, caption=caption, sortable=True)


def _gallery(log: RunLog, evaluations: dict[int, Any], colors: Sequence[Color]) -> str:
    pictures = [(fold, one) for fold, found in evaluations.items() for one in found["pictures"]]
    pictures.sort(key=lambda pair: pair[1]["miou"])
    left_out = max(0, len(pictures) - MAX_PICTURES)
    pictures = pictures[:MAX_PICTURES]
    if not pictures:
        return ""
    options = "".join(
        f'<option value="{c}">{escape(name)}</option>' for c, name in enumerate(log.classes)
    )
    views = {
        "compare": "Truth | prediction", "photograph": "Photograph", "truth": "Truth",
        "predicted": "Prediction", "errors": "Errors", "all": "Side by side",
    }  # fmt: skip
    radios = "".join(
        f'<label><input type="radio" name="view" value="{key}"'
        f"{' checked' if key == 'compare' else ''}><span>{text}</span></label>"
        for key, text in views.items()
    )
    key = (
        "".join(
            f"<li>{swatch(colors[c % len(colors)])}{escape(name)}</li>"
            for c, name in enumerate(log.classes)
        )
        + f"<li>{swatch(ERROR)}an error</li>"
    )
    cards = "\n".join(_card(fold, one, log.classes, colors) for fold, one in pictures)
    more = f" {left_out} more are left out." if left_out else ""
    return f"""<p>Validation images at each fold's best epoch: the ones the model is most wrong
about, and others, evenly spread, to compare. Drag across a picture to uncover the truth or the
prediction.{more}</p>
<div class="controls">
<div class="choice" role="radiogroup" aria-label="What the pictures show">{radios}</div>
<label>Class <select id="of-class"><option value="">all</option>{options}</select></label>
<label>Order <select id="order"><option value="worst">worst IoU first</option>
<option value="best">best IoU first</option><option value="name">name</option></select></label>
<label>Opacity of the colors <input id="strength" type="range" min="0" max="100" value="75"></label>
<output id="count" aria-live="polite"></output>
</div>
{details("Key to the colors", f'<ul class="key">{key}</ul>')}
<div id="gallery" data-view="compare">
{cards}
</div>
<button class="plain" id="more" hidden></button>"""


def _card(fold: int, one: dict[str, Any], classes: Sequence[str], colors: Sequence[Color]) -> str:
    width, height = one["size"]
    name = escape(one["name"])
    layers = "".join(
        f'<img class="{layer}" src="{one[layer]}" alt="" loading="lazy" decoding="async">'
        for layer in ("photograph", "truth", "predicted", "errors")
    )
    ranked = sorted(one["iou"].items(), key=lambda pair: pair[1])
    chips = "".join(
        f"<li>{swatch(colors[int(c) % len(colors)])}{escape(classes[int(c)])} "
        f"<b>{value:.2f}</b></li>"
        for c, value in ranked[:MAX_CHIPS]
    )
    iou = " ".join(f"{c}:{value}" for c, value in one["iou"].items())
    more = f"<li>and {len(ranked) - MAX_CHIPS} more</li>" if len(ranked) > MAX_CHIPS else ""
    mark = '<span class="mark">most wrong</span>' if one["worst"] else ""
    return (
        f'<figure class="card" data-miou="{one["miou"]}" data-name="{name}" data-iou="{iou}">'
        f'<div class="panels"><div class="stage" style="aspect-ratio:{width}/{height}">{layers}'
        f'<input type="range" min="0" max="100" value="50" '
        f'aria-label="{name}: truth to the left, prediction to the right"></div></div>'
        f'<figcaption><b class="score">{one["miou"]:.3f}</b> {name} '
        f'<span class="muted">fold {fold}</span> {mark}'
        f'<ul class="chips">{chips}{more}</ul></figcaption></figure>'
    )


def _shares(log: RunLog) -> str:
    parts = log.shares()
    if not parts:
        return ""
    head = ["class", *(f"{part['title']} ({part['images']} images)" for part in parts)]
    rows = []
    for c, name in enumerate(log.classes):
        top = max(part["of_pixels"][c] for part in parts) or 1
        line = [escape(name)]
        for part in parts:
            images, pixels = part["with_class"][c], part["of_pixels"][c]
            text = f'{percent(pixels)} <span class="muted">in {100 * images:.0f} %</span>'
            line.append(cell(text, pixels, heat=pixels / top / 2))
        rows.append(line)
    caption = "Each class's share of the pixels, and the share of images it is in."
    return table(head, rows, caption=caption, sortable=True)


def _notes(log: RunLog) -> str:
    if not log.events:
        return ""
    lines = [
        f"Left out: {one['sentence']}"
        if one["event"] == "fault"
        else f"Fold {one['fold']}, step {one['step']}: loss or gradient was not finite, on "
        + ", ".join(one["images"][:4])
        for one in log.events
    ]
    items = "".join(f"<li>{escape(text)}</li>" for text in lines[:50])
    more = f"<p>and {len(lines) - 50} more, in log.jsonl</p>" if len(lines) > 50 else ""
    return f"<ul>{items}</ul>{more}"


def _settings(log: RunLog) -> str:
    def rows(values: dict[str, Any]) -> list[list[str]]:
        return [
            [
                f"<code>{escape(key)}</code>",
                f'<td class="text"><code>{escape(_shown(value))}</code></td>',
            ]
            for key, value in values.items()
        ]

    environment = log.run.optional("environment.json", {})
    return details(
        "Configuration, resolved", table(["key", "value"], rows(log.settings()))
    ) + details("Environment", table(["", ""], rows(environment)))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else str(value)
