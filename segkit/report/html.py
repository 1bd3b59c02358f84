"""Building blocks of the HTML pages; a page is one file that loads nothing from the network."""

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

MARK = "<strong>segkit</strong>"
"""Text in every page, by which segkit recognizes the pages that it wrote."""


@cache
def asset(name: str) -> Template:
    """Return a file of ``assets``; in HTML files, ``$key`` is to be substituted by HTML."""
    return Template((Path(__file__).parent / "assets" / name).read_text(encoding="utf-8"))


def document(title: str, sections: Mapping[str, str], *, header: str = "") -> str:
    """Return a page of a title (plain text), a header and sections by heading; omit empty sections.

    Its Content-Security-Policy forbids every request and every script but the page's own, which it
    identifies by a digest: HTML in class or file names would have no effect.
    """
    script, links, body = f"\n{asset('page.js').template}\n", "", ""
    for n, (name, content) in enumerate(sections.items()):
        if content:
            heading = f'<h2 id="part{n}-name">{escape(name)}</h2>'
            links += f'<a href="#part{n}">{escape(name)}</a>'
            body += f'<section id="part{n}" aria-labelledby="part{n}-name">\n{heading}\n'
            body += f"{content}\n</section>\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {"digest": digest, "title": escape(title), "style": asset("page.css").template}
    values |= {"links": MARK + links, "header": header, "body": body, "script": script}
    return asset("page.html").substitute(values)


def data_uri(image: Image.Image, *, format: str = "JPEG") -> str:
    """Return a picture as a ``data:`` address."""
    buffer = io.BytesIO()
    image.save(buffer, format=format, quality=80)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(image: Image.Image, alt: str) -> str:
    """Return a picture that is decoded when it comes into view; ``alt`` is plain text."""
    return (
        f'<img src="{data_uri(image)}" width="{image.width}" height="{image.height}" '
        f'alt="{escape(alt)}" title="{escape(alt)}" loading="lazy" decoding="async">'
    )


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", style: str = ""
) -> str:
    """Return a table that scrolls sideways, from plain-text headings and rows of HTML.

    The first cell of a row is its heading; other cells may be the result of :func:`cell`. In a
    table of the CSS class ``sortable``, a click on a heading sorts the rows.
    """
    heads, body, stacked = "", "", len(columns) > 4  # on a phone, each row is a list
    style += " stack" if stacked else ""
    for n, name in enumerate(columns):
        kind = ' class="text"' if rows and rows[0][n].startswith('<td class="text') else ""
        label = f"<button>{escape(name)}</button>" if "sortable" in style else escape(name)
        heads += f'<th scope="col"{kind}>{label}</th>' if name else "<td></td>"
    for first, *rest in rows:
        cells = ""
        for name, content in zip(columns[1:], rest, strict=True):
            label = f' data-label="{escape(name)}"' if stacked else ""
            cells += f"<td{label}" + (
                content[3:] if content.startswith("<td") else f">{content}</td>"
            )
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>\n'
    head = f"<figcaption>{caption}</figcaption>" if caption else ""
    return (
        f'<figure class="table">{head}<div class="scroll" tabindex="0" role="group" '
        f'aria-label="Table"><table class="{style}"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div></figure>"
    )


def cell(
    content: str, value: float | None = None, *, heat: float | None = None, style: str = ""
) -> str:
    """Return a ``<td>`` of HTML, with CSS classes.

    The column is sorted by ``value``, or by text without it. ``heat`` is the strength of the cell's
    color, 0 to 1.
    """
    attributes = {
        "class": style if heat is None else f"{style} heat".strip(),
        "data-value": "" if value is None else f"{value:.6g}",
        "style": "" if heat is None else f"--heat:{100 * heat:.0f}%",
    }
    marks = "".join(f' {name}="{text}"' for name, text in attributes.items() if text)
    return f"<td{marks}>{content}</td>"


def heat_map(caption: str, names: Sequence[str], shares: Any, **options: Any) -> str:
    """Return a square table of shares, 0 to 1 or ``None``, drawn by ``drawHeatMap`` of page.js."""
    rounded = [[None if share is None else round(share, 5) for share in row] for row in shares]
    return _drawn("heat-map", caption, {"names": names, "shares": rounded, **options})


def chart(
    title: str,
    series: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]],
    **options: Any,
) -> str:
    """Return a chart drawn by ``drawChart`` of page.js, or no HTML if no series has a point.

    Of a mapping, a menu chooses the series that are shown; those without a point are not in it.
    """
    if isinstance(series, Mapping):
        shown = {name: of for name, of in series.items() if any(curve["x"] for curve in of)}
        return _drawn("chart", title, {"choices": shown, **options}) if shown else ""
    content = {"series": list(series), **options}
    return _drawn("chart", title, content) if any(curve["x"] for curve in series) else ""


def _drawn(kind: str, caption: str, content: Mapping[str, Any]) -> str:
    return (
        f'<figure class="{kind}"><figcaption>{escape(caption)}</figcaption>'
        f'<script type="application/json">{json_block(content)}</script></figure>'
    )


def json_block(value: Any) -> str:
    """Return JSON for a ``<script>`` element; no text in it can end the element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def facts(values: Mapping[str, str]) -> str:
    """Return large figures, as HTML, below their names."""
    items = [f"<div><dt>{escape(k)}</dt><dd>{value}</dd></div>" for k, value in values.items()]
    return f'<dl class="facts">{"".join(items)}</dl>'


def class_labels(names: Iterable[str], colors: Sequence[tuple[int, int, int]]) -> list[str]:
    """Return class names as HTML, each after a square of its color; colors repeat."""
    swatch = '<i class="swatch" style="background:rgb{}"></i>'
    return [swatch.format(colors[c % len(colors)]) + escape(name) for c, name in enumerate(names)]


def number(value: float | None, spec: str = ".3f") -> str:
    """Return a formatted number, or a dash for ``None``."""
    return "–" if value is None else format(value, spec)


def percent(share: float) -> str:
    """Return a share, 0 to 1, in percent, as HTML."""
    return f"{100 * share:.1f} %" if share >= 5e-4 or share == 0 else "&lt; 0.1 %"


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
