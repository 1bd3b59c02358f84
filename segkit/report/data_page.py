"""The page of a data set: its classes, objects, colors, near-duplicates and doubtful labels."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from segkit.core.config import Config
from segkit.data.source import background
from segkit.inference.outputs import PALETTES, Color, overlay
from segkit.report.blocks import (
    cell,
    chart,
    data_uri,
    document,
    escape,
    facts,
    heat_map,
    percent,
    swatch,
    table,
)
from segkit.report.findings import KINDS, Findings, Part
from segkit.report.survey import Photo

STYLE = Path(__file__).with_name("explore.css").read_text(encoding="utf-8")

CROPS, CROP_SIDE = 400, 112
"""Most example objects of all classes together, and their side in pixels."""

MAX_SHOWN, SHOWN_SIDE = 24, 176
"""Most pictures of a kind of doubt, and of near-duplicates, and their longer side."""


def explore_page(cfg: Config, parts: Sequence[Part], found: Findings, *, title: str) -> str:
    """The page.

    Args:
        cfg: Whose data it is; decides folds and colors.
        parts: The first one is labelled, and the one to train on.
        found: Of these parts.
        title: Of the page.
    """
    train, colors = parts[0], PALETTES[cfg.infer.palette]
    divided = sum(map(found.divided, found.pairs))
    sizes = Counter(photo.size for part in parts for photo in part.photos)
    images = "".join(f"<small>{len(one.photos):,} {one.title}</small>" for one in parts[1:])
    header = [
        ("Images to train on", f"{len(train.photos):,}{images}"),
        ("Classes", str(len(train.source.classes))),
        ("Objects", f"{sum(len(photo.items) for photo in train.photos):,}"),
        ("Near-duplicates", f"{len(found.pairs):,}<small>{divided:,} divided by the split</small>"),
        ("Doubtful labels", f"{sum(map(len, found.suspects.values())):,}"),
    ]
    return document(
        title,
        {
            "Classes": f'<div class="beside">{_classes(train, colors)}{_together(train)}</div>',
            "Examples": _examples(train, colors),
            "Doubtful labels": _doubts(train, found, colors),
            "Near-duplicates": _pairs(parts, found),
            "Colors": _colors(train),
            "Sizes": _sizes(sizes),
        },
        header=f"<p>{escape(cfg.note)}</p>\n{facts(header)}",
        style=STYLE,
    )


# ---- classes


def _classes(part: Part, colors: Sequence[Color]) -> str:
    ground, rows = background(part.source), []
    total, labelled = part.pixels.sum(), len(part.photos)
    for c, name in enumerate(part.source.classes):
        images, pixels = int((part.pixels[:, c] > 0).sum()), part.pixels[:, c].sum() / max(1, total)
        found = list(part.objects(c))
        of_image = [item.area / np.prod(part.photos[i].size) for i, item in found]
        label = swatch(colors[c % len(colors)]) + escape(name)
        middle = float(np.median(of_image)) if of_image else 0.0
        objects = "–" if c == ground else f"{len(found):,}"
        rows.append([
            label,
            cell(f"{images:,}", images),
            cell(percent(images / labelled), images),
            cell(objects, len(found)),
            cell(percent(pixels), pixels),
            cell(percent(middle) if of_image else "–", middle),
            cell(_histogram(of_image), middle),
            cell(_positions(part, c, name)),
        ])  # fmt: skip
    head = ["class", "images", "", "objects", "pixels", "median size", "sizes", "positions"]
    caption = (
        "Sizes are an object's share of its image, from a hundred-thousandth to the whole, a bar "
        "half a power of ten; positions are where in the image the class lies."
    )
    return table(head, rows, caption=caption, sortable=True, style="objects")


def _histogram(shares: Sequence[float]) -> str:
    """Bars, as an SVG; half a power of ten each."""
    if not shares:
        return ""
    counts, _ = np.histogram(np.log10(np.maximum(shares, 1e-5)), bins=10, range=(-5, 0))
    bars = "".join(
        f'<rect x="{12 * n}" y="{32 - h:.1f}" width="10" height="{h:.1f}"/>'
        for n, h in enumerate(32 * counts / counts.max())
    )
    text = ", ".join(map(str, counts.tolist()))
    return (
        f'<svg class="sizes" viewBox="0 0 120 33" role="img" aria-label="objects by size: {text}">'
        f'{bars}<path d="M0 32.5H120"/></svg>'
    )


def _positions(part: Part, c: int, name: str) -> str:
    """Where in the image a class lies, all images laid over each other."""
    heat = np.mean([photo.grid == c for photo in part.photos], 0)
    strength = heat / max(heat.max(), 1e-9)
    pixels = np.zeros((*heat.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = (30, 125, 220), (255 * strength).round()
    source = data_uri(Image.fromarray(pixels, "RGBA"), format="PNG")
    return f'<img class="place" src="{source}" alt="where {escape(name)} lies">'


def _together(part: Part) -> str:
    shown = (part.pixels > 0).astype(np.int64)
    both = shown.T @ shown
    shares = [[float(n / row[i]) if row[i] else None for n in row] for i, row in enumerate(both)]
    caption = "Of the images with the class of a row, the percentage that also has the column's."
    return heat_map(part.source.classes, shares, corner="with ↓ also →", caption=caption)


def _examples(part: Part, colors: Sequence[Color]) -> str:
    ground = background(part.source)
    names = list(part.source.classes)
    each = max(3, min(12, CROPS // len(names)))
    lines = []
    for c, name in enumerate(names):
        found = sorted(part.objects(c), key=lambda one: one[1].area)
        if c == ground or not found:
            continue
        chosen = np.unique(np.linspace(len(found) // 4, len(found) - 1, each).astype(int))
        crops = [
            _picture(part, found[k][0], colors, box=found[k][1].box, side=CROP_SIDE)
            for k in chosen[::-1]
        ]
        label = swatch(colors[c % len(colors)]) + escape(name)
        lines.append(f'<h3>{label}</h3><div class="strip">{"".join(crops)}</div>')
    return "\n".join(lines)


# ---- doubts


def _doubts(part: Part, findings: Findings, colors: Sequence[Color]) -> str:
    blocks = []
    for kind, found in findings.suspects.items():
        if not found:
            continue
        figures = []
        for i, one in found[:MAX_SHOWN]:
            near = kind not in ("differs", "unlabelled")
            image = _picture(part, i, colors, box=one.box if near else None, side=SHOWN_SIDE)
            of = "" if one.annotation is None else f"annotation {one.annotation}: "
            figures.append(
                f"<figure>{image}<figcaption><b>{escape(part.photos[i].name)}</b><br>"
                f"{escape(of + one.reason)}</figcaption></figure>"
            )
        more = len(found) - len(figures)
        left = f"<p>and {more:,} more, listed by --json</p>" if more > 0 else ""
        count = f'<span class="muted">{len(found):,}</span>'
        blocks.append(
            f'<h3>{KINDS[kind]} {count}</h3><div class="tiles">{"".join(figures)}</div>{left}'
        )
    return "\n".join(blocks)


# ---- near-duplicates


def _pairs(parts: Sequence[Part], found: Findings) -> str:
    if not found.pairs:
        return "<p>No two images show the same.</p>"
    where = [(part, i) for part in parts for i in range(len(part.photos))]
    ranked = sorted(found.pairs, key=found.divided, reverse=True)
    figures = []
    for pair in ranked[:MAX_SHOWN]:
        images, lines = [], []
        for k in (pair.first, pair.second):
            part, i = where[k]
            images.append(_picture(part, i, None, box=None, side=SHOWN_SIDE))
            lines.append(f"<b>{escape(part.photos[i].name)}</b> ({found.places[k]})")
        how = f", {pair.flip}" if pair.flip else ""
        figures.append(
            f'<figure class="pair"><div>{"".join(images)}</div><figcaption>{"<br>".join(lines)}<br>'
            f"alike to {pair.likeness:.3f}{how}</figcaption></figure>"
        )
    more = len(found.pairs) - len(figures)
    left = f"<p>and {more:,} more, listed by --json</p>" if more > 0 else ""
    intro = (
        "<p>Images that show the same, mirrored and turned ones too, those first that the split "
        "puts into different parts: scores on them flatter. Name them as groups (data.groups) to "
        "keep them together.</p>"
    )
    return f'{intro}<div class="tiles">{"".join(figures)}</div>{left}'


# ---- colors and sizes


def color_statistics(photos: Sequence[Photo]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of R, G, B in 0..1 over all pixels."""
    counts = np.sum([photo.histogram for photo in photos], 0).astype(np.float64)
    levels, total = np.arange(256) / 255, counts.sum(1)
    mean = counts @ levels / total
    variance = counts @ levels**2 / total - mean**2
    return mean.round(4).tolist(), np.sqrt(variance).round(4).tolist()


def _colors(part: Part) -> str:
    mean, std = color_statistics(part.photos)
    counts = np.sum([photo.histogram for photo in part.photos], 0)
    shares = 100 * counts / counts.sum(1, keepdims=True)
    series = [
        {"name": name, "x": list(range(256)), "y": shares[c].round(4).tolist(), "color": color}
        for c, (name, color) in enumerate((("red", 4), ("green", 2), ("blue", 0)))
    ]
    text = f'"mean": {mean}, "std": {std}'
    return (
        f"<p>What to normalize with, as <code>data</code> takes it: <code>{text}</code></p>"
        + chart("Percent of the pixels at each level", series, x="level", kind="area")
    )


def _sizes(sizes: Counter[tuple[int, int]]) -> str:
    total = sum(sizes.values())
    rows = [
        [f"{width} × {height}", cell(f"{n:,}", n), cell(percent(n / total), n)]
        for (height, width), n in sizes.most_common(20)
    ]
    more = len(sizes) - len(rows)
    caption = "Width × height of the images" + (
        f"; {more:,} more sizes are rarer." if more > 0 else "."
    )
    return table(["size", "images", ""], rows, caption=caption)


# ---- pictures


def _picture(
    part: Part,
    i: int,
    colors: Sequence[Color] | None,
    *,
    box: tuple[int, int, int, int] | None,
    side: int,
) -> str:
    """Image ``i``, or what of it lies in and around ``box``, with the outlines of its labels."""
    pixels = part.source.image(i)
    height, width = pixels.shape[1:]
    left, top, right, bottom = box or (0, 0, width, height)
    if box:
        margin = max(8, round(0.15 * max(right - left, bottom - top)))
        left, top = max(0, left - margin), max(0, top - margin)
        right, bottom = min(width, right + margin), min(height, bottom + margin)
    pixels = pixels[:, top:bottom, left:right]
    if colors is None or not part.source.labelled:
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    else:
        image = overlay(
            pixels, part.source.mask(i)[top:bottom, left:right], classes=part.source.classes,
            colors=colors, opacity=0.25, background=background(part.source), legend=False,
        )  # fmt: skip
    scale = side / max(image.size)
    image = image.resize((max(1, round(scale * image.width)), max(1, round(scale * image.height))))
    name = escape(part.photos[i].name)
    return (
        f'<img src="{data_uri(image)}" width="{image.width}" height="{image.height}" '
        f'alt="{name}" title="{name}" loading="lazy" decoding="async">'
    )
