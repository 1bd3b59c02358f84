"""Web pages in one file: they ask the network for nothing, and run no script but their own."""

import base64
import hashlib
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

_HERE = Path(__file__).parent
STYLE = (_HERE / "page.css").read_text(encoding="utf-8")
"""The look that all pages share; its colors have the contrast WCAG AA asks for, light and dark."""

SCRIPT = (_HERE / "page.js").read_text(encoding="utf-8")
"""What all pages can do: charts, tables that sort."""

MARK = "<strong>segkit</strong>"
"""Stands in every page, by which segkit knows its own."""

escape = html.escape
"""Text as HTML shows it, in an element or in a quoted attribute."""


def document(
    title: str,
    sections: Mapping[str, str],
    *,
    header: str = "",
    style: str = "",
    script: str = "",
) -> str:
    """A whole page, with a bar of links to its sections.

    Its Content-Security-Policy forbids every request, and every script but its own, which it knows
    by its hash: text of the data that were HTML could not act.

    Args:
        title: Plain text.
        sections: HTML by heading, a plain text; an empty one is left out.
        header: HTML below the title.
        style: CSS added to :data:`STYLE`.
        script: JavaScript added to :data:`SCRIPT`.
    """
    script = f"\n{SCRIPT}{script}\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    shown = {name: (f"part{n}", text) for n, (name, text) in enumerate(sections.items()) if text}
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for name, (key, _) in shown.items())
    body = "\n".join(
        f'<section id="{key}" aria-labelledby="{key}-name">\n'
        f'<h2 id="{key}-name">{escape(name)}</h2>\n{text}\n</section>'
        for name, (key, text) in shown.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{STYLE}{style}</style>
</head>
<body>
<nav aria-label="Sections">{MARK}{links}</nav>
<main>
<header><h1>{escape(title)}</h1>
{header}</header>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def data_uri(image: Image.Image, *, format: str = "JPEG", quality: int = 80) -> str:
    """A picture as an address that holds it; ``quality`` is that of a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, format=format, quality=quality)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- parts of pages, as HTML


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    sortable: bool = False,
    style: str = "",
    text: Sequence[int] = (),
) -> str:
    """A table that scrolls sideways where it is too wide; the first cell of a row is its heading.

    Args:
        columns: Plain texts; an empty one heads nothing, and does not sort.
        rows: Cells as HTML; one that begins with ``<td`` or ``<th`` is the whole cell.
        caption: HTML.
        sortable: Whether a click on a heading sorts the rows.
        style: Names of CSS classes.
        text: The columns, by number, that hold text and not figures.
    """
    heads = ""
    for number, name in enumerate(columns):
        inside = f"<button>{escape(name)}</button>" if sortable else escape(name)
        kind = ' class="text"' if number in text else ""
        heads += f'<th scope="col"{kind}>{inside}</th>' if name else "<td></td>"
    lines = []
    for row in rows:
        first, *rest = row
        cells = [first if first.startswith("<t") else f'<th scope="row">{first}</th>']
        cells += [one if one.startswith("<td") else f"<td>{one}</td>" for one in rest]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    name = f"{style} sortable".strip() if sortable else style
    head = f"<figcaption>{caption}</figcaption>" if caption else ""
    return (
        f'<figure class="table">{head}<div class="scroll" tabindex="0" role="group" '
        f'aria-label="Table"><table class="{name}"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>{chr(10).join(lines)}</tbody></table></div></figure>"
    )


def cell(
    text: str,
    value: float | None = None,
    *,
    heat: float | None = None,
    style: str = "",
    title: str = "",
) -> str:
    """A ``<td>``.

    Args:
        text: HTML.
        value: What the column sorts by, where that is not the text.
        heat: Strength of its color, 0 to 1.
        style: Names of CSS classes.
        title: Plain text, shown under the pointer.
    """
    attributes = {
        "class": f"{style} heat".strip() if heat is not None else style,
        "data-value": "" if value is None else f"{value:.6g}",
        "style": "" if heat is None else f"--heat:{100 * heat:.0f}%",
        "title": title,
    }
    marked = "".join(f' {name}="{escape(one)}"' for name, one in attributes.items() if one)
    return f"<td{marked}>{text}</td>"


def chart(
    title: str,
    series: Sequence[Mapping[str, Any]],
    *,
    x: str = "step",
    kind: str = "line",
    log: bool = False,
    smooth: bool = False,
) -> str:
    """A chart that the page's script draws; nothing where no series has a point.

    Args:
        title: Plain text.
        series: ``{"name": text, "x": numbers, "y": numbers}``, each a curve; ``"color"`` is the
            number of its color, by default its own.
        x: What the horizontal axis counts.
        kind: ``"line"``, ``"dots"`` (a line with its points) or ``"area"``.
        log: Whether the vertical axis is logarithmic.
        smooth: Whether to draw a moving average over the points.
    """
    if not any(one["x"] for one in series):
        return ""
    content = {"x": x, "kind": kind, "log": log, "smooth": smooth, "series": list(series)}
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<script type="application/json">{json_block(content)}</script></figure>'
    )


def json_block(value: Any) -> str:
    """JSON for a ``<script>`` element, which no text inside can end."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def details(summary: str, text: str) -> str:
    """HTML that opens by a click; ``summary`` is a plain text."""
    return f"<details><summary>{escape(summary)}</summary>{text}</details>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Large figures with their names: (name, HTML of the value)."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{items}</dl>'


def swatch(color: tuple[int, int, int]) -> str:
    """A small square of a class's color."""
    return f'<i class="swatch" style="background:rgb{color}"></i>'


MATRIX_TEXT = 20
"""A heat map of more classes shows colors alone; a pointer, or a reader aloud, finds the values."""


def heat_map(
    names: Sequence[str],
    shares: Sequence[Sequence[float | None]],
    *,
    corner: str,
    caption: str,
    diagonal: bool = False,
) -> str:
    """A square table of shares of 1, each as strong in color as it is large.

    Args:
        names: Of rows and columns.
        shares: Rows; nothing where a row has none.
        corner: What rows and columns are.
        caption: HTML.
        diagonal: Whether what is off the diagonal is wrong.
    """
    rows = []
    for name, line in zip(names, shares, strict=True):
        cells = [escape(name)]
        for other, value in zip(names, line, strict=True):
            if value is None:
                cells.append("<td></td>")
                continue
            text = f"{100 * value:.0f}" if value >= 0.005 else ""
            if len(names) > MATRIX_TEXT:
                text = f'<span class="unseen">{text}</span>' if text else ""
            style = "wrong" if diagonal and name != other else ""
            title = f"{name} → {other}: {100 * value:.2f} %"
            # The root of a share: rare confusions are what one looks for.
            cells.append(cell(text, heat=value**0.5, title=title, style=style))
        rows.append(cells)
    small = "matrix dense" if len(names) > MATRIX_TEXT else "matrix"
    return table([corner, *names], rows, caption=caption, style=small)


def percent(share: float) -> str:
    """A share of 1, as HTML."""
    value = 100 * share
    return f"{value:.1f} %" if value >= 0.05 or value == 0 else "&lt; 0.1 %"


def duration(seconds: float) -> str:
    """A time as people say it."""
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
