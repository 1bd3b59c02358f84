"""Page of a data set: classes, objects, suspicious labels, near-duplicates, colors and sizes."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from segkit.core.config import Config
from segkit.data.images import as_rgb
from segkit.data.source import background
from segkit.inference.outputs import PALETTES, Color, overlay
from segkit.report import html
from segkit.report.html import cell, escape, percent
from segkit.report.survey import KINDS, Box, Findings, Part, color_statistics

CROPS, CROP_SIDE = 400, 112  # example objects of all classes together, and their longer side
MAX_SHOWN, SHOWN_SIDE = 24, 352  # pictures of a kind of finding, and their longer side


def data_page(
    cfg: Config, parts: Sequence[Part], findings: Findings, *, title: str, contradicted: str = ""
) -> str:
    """Return the page of a data set, of which the first part is labelled, and is trained on.

    ``contradicted`` is the section of labels that a run's models contradict, as HTML.
    """
    train, colors = parts[0], PALETTES[cfg.infer.palette]
    labels = html.class_labels(train.source.classes, colors)
    separated = sum(map(findings.separated, findings.pairs))
    others = "".join(f"<small>{len(part.photos):,} {part.title}</small>" for part in parts[1:])
    facts = {
        "Training images": f"{len(train.photos):,}{others}",
        "Classes": str(len(labels)),
        "Objects": f"{sum(len(photo.instances) for photo in train.photos):,}",
        "Near-duplicates": f"{len(findings.pairs):,}<small>{separated:,} in two parts</small>",
        "Suspicious labels": f"{len(findings.suspects):,}",
    }
    sections = {
        "Classes": f'<div class="beside">{_classes(train, labels)}{_together(train)}</div>',
        "Examples": _examples(train, labels, colors),
        "Contradicted labels": contradicted,
        "Suspicious labels": _suspects(train, findings, colors),
        "Near-duplicates": _pairs(parts, findings),
        "Colors": _colors(train.histogram),
        "Sizes": _sizes(parts),
    }
    header = f"<p>{escape(cfg.note)}</p>\n{html.facts(facts)}"
    return html.document(title, sections, header=header)


def _classes(part: Part, labels: Sequence[str]) -> str:
    rows = []
    for c, label in enumerate(labels):
        images = int((part.pixels[:, c] > 0).sum())
        pixels = part.pixels[:, c].sum() / max(1, part.pixels.sum())
        sizes = [instance.area / np.prod(part.photos[i].size) for i, instance in part.objects(c)]
        median = float(np.median(sizes)) if sizes else 0.0
        rows.append([
            label,
            cell(f"{images:,}", images),
            cell(percent(images / len(part.photos)), images),
            cell("–" if c == background(part.source) else f"{len(sizes):,}", len(sizes)),
            cell(percent(pixels), pixels),
            cell(percent(median) if sizes else "–", median),
            cell(_histogram(sizes) if sizes else "", median),
            cell(_positions(part, c)),
        ])  # fmt: skip
    head = ["class", "images", "", "objects", "pixels", "median size", "sizes", "positions"]
    caption = (
        "Size is an object's share of its image; its histogram is logarithmic, from 1/100,000 to "
        "the whole image. Positions are the places of the class in the image, over all images."
    )
    return html.table(head, rows, caption=caption, style="objects sortable")


def _histogram(shares: Sequence[float]) -> str:
    """Return an SVG with a bar for each half power of ten."""
    counts, _ = np.histogram(np.log10(np.maximum(shares, 1e-5)), bins=10, range=(-5, 0))
    text, bars = ", ".join(map(str, counts)), ""
    for n, height in enumerate(32 * counts / counts.max()):
        bars += f'<rect x="{12 * n}" y="{32 - height:.1f}" width="10" height="{height:.1f}"/>'
    return (
        f'<svg class="sizes" viewBox="0 0 120 33" role="img" aria-label="objects by size: {text}">'
        f'{bars}<path d="M0 32.5H120"/></svg>'
    )


def _positions(part: Part, c: int) -> str:
    """Return a small image of the frequency of class ``c`` by position."""
    heat = np.mean([photo.grid == c for photo in part.photos], 0)
    pixels = np.zeros((*heat.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = (30, 125, 220), (255 * heat / max(heat.max(), 1e-9)).round()
    source = html.data_uri(Image.fromarray(pixels), format="PNG")
    return f'<img class="place" src="{source}" alt="places of {escape(part.source.classes[c])}">'


def _together(part: Part) -> str:
    present = (part.pixels > 0).astype(np.int64)
    both = present.T @ present
    shares = [[float(n / row[i]) if row[i] else None for n in row] for i, row in enumerate(both)]
    caption = "Percentage of the images with the row's class that also have the column's class."
    return html.heat_map(caption, part.source.classes, shares, corner="with ↓ also →")


def _examples(part: Part, labels: Sequence[str], colors: Sequence[Color]) -> str:
    count, strips = max(3, min(12, CROPS // len(labels))), ""
    for c, label in enumerate(labels):
        objects = sorted(part.objects(c), key=lambda pair: pair[1].area)
        if objects and c != background(part.source):
            places = np.linspace(len(objects) // 4, len(objects) - 1, count).astype(int)
            chosen = [objects[place] for place in np.unique(places)[::-1]]
            crops = [_picture(part, i, CROP_SIDE, colors, instance.box) for i, instance in chosen]
            strips += f'<h3>{label}</h3><div class="strip">{"".join(crops)}</div>\n'
    return strips


def _suspects(part: Part, findings: Findings, colors: Sequence[Color]) -> str:
    blocks = ""
    for kind, title in KINDS.items():
        suspects = [(i, suspect) for i, suspect in findings.suspects if suspect.kind == kind]
        figures = []
        for i, suspect in suspects[:MAX_SHOWN]:
            box = None if kind in ("differs", "unlabelled") else suspect.box
            key = "" if suspect.annotation is None else f"annotation {suspect.annotation}: "
            figures.append(
                f"<figure>{_picture(part, i, SHOWN_SIDE, colors, box)}<figcaption><b>"
                f"{escape(part.photos[i].name)}</b><br>{escape(key + suspect.reason)}</figcaption>"
                "</figure>"
            )
        if suspects:
            blocks += f'<h3>{title} <span class="muted">{len(suspects):,}</span></h3>'
            blocks += _tiles(figures, len(suspects))
    return blocks


def _pairs(parts: Sequence[Part], findings: Findings) -> str:
    if not findings.pairs:
        return "<p>There are no near-duplicates.</p>"
    images = [(part, i) for part in parts for i in range(len(part.photos))]
    figures = []
    for pair in sorted(findings.pairs, key=findings.separated, reverse=True)[:MAX_SHOWN]:
        pictures, names, flip = "", "", f", {pair.flip}" if pair.flip else ""
        for k in pair[:2]:
            pictures += _picture(*images[k], SHOWN_SIDE)
            names += f"<b>{escape(findings.names[k])}</b> ({findings.places[k]})<br>"
        figures.append(
            f'<figure class="pair"><div>{pictures}</div><figcaption>{names}'
            f"correlation {pair.correlation:.3f}{flip}</figcaption></figure>"
        )
    intro = (
        "<p>Images of the same content, also mirrored or rotated. Pairs that the split puts into "
        "different parts come first: they make scores too high. Name them as groups (data.groups) "
        "to keep them in the same part.</p>"
    )
    return intro + _tiles(figures, len(findings.pairs))


def _tiles(figures: Sequence[str], total: int) -> str:
    more = total - len(figures)
    left_out = f"<p>and {more:,} more, listed by --json</p>" if more else ""
    return f'<div class="tiles">{"".join(figures)}</div>{left_out}'


def _colors(histogram: np.ndarray) -> str:
    mean, std = color_statistics(histogram)
    shares = (100 * histogram / histogram.sum(1, keepdims=True)).round(4)
    bands, x = [("red", 4), ("green", 2), ("blue", 0)], list(range(256))
    if len(histogram) != 3:
        bands = [(f"band {n + 1}", n % 6) for n in range(len(histogram))]
    named = zip(bands, shares.tolist(), strict=True)
    series = [{"name": name, "x": x, "y": y, "color": color} for (name, color), y in named]
    title, text = "Percent of the pixels at each level", f'"mean": {mean}, "std": {std}'
    entries = f"<p>For normalization, as entries of <code>data</code>: <code>{text}</code></p>"
    return entries + html.chart(title, series, unit="level", kind="area", value="percent")


def _sizes(parts: Sequence[Part]) -> str:
    sizes = Counter(photo.size for part in parts for photo in part.photos)
    rows = []
    for (height, width), n in sizes.most_common(20):
        share = percent(n / sizes.total())
        rows.append([f"{width} × {height}", cell(f"{n:,}", n), cell(share, n)])
    more = f"; {len(sizes) - len(rows):,} more sizes are rarer" if len(sizes) > len(rows) else ""
    caption = f"Width × height of the images{more}."
    return html.table(["size", "images", ""], rows, caption=caption)


def _picture(
    part: Part, i: int, side: int, colors: Sequence[Color] | None = None, box: Box | None = None
) -> str:
    """Return a small image ``i``, or its crop around ``box``; with ``colors`` also its labels."""
    pixels = as_rgb(part.source.image(i))
    left, top, right, bottom = box or (0, 0, pixels.shape[2], pixels.shape[1])
    margin = max(8, round(0.15 * max(right - left, bottom - top))) if box else 0
    rows = slice(max(0, top - margin), bottom + margin)
    columns = slice(max(0, left - margin), right + margin)
    pixels = pixels[:, rows, columns]
    if colors is None:
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    else:
        image = overlay(
            pixels, part.source.mask(i)[rows, columns], classes=part.source.classes,
            colors=colors, opacity=0.25, background=background(part.source), legend=False,
        )  # fmt: skip
    scale = side / max(image.size)
    image = image.resize((max(1, round(scale * image.width)), max(1, round(scale * image.height))))
    return html.picture(image, part.photos[i].name)
