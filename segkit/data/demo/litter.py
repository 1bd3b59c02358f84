"""The ten classes of litter, each told by its shape, texture and shade together."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from segkit.data.demo.shapes import (
    Array,
    Noise,
    Surface,
    Thing,
    blob,
    mix,
    pick,
    profile,
    rounded,
    step,
)


def cylinder(x: Array, y: Array, outline: Array) -> tuple[Array, Array]:
    """Height of a turned body over its profile, and the place across it in -1..1."""
    half = outline[: len(outline) // 2]
    width = np.interp(x, half[:, 0], half[:, 1]).astype(np.float32)
    across = y / width
    return width * np.sqrt(np.clip(1 - across**2, 0.02, 1)), across


def general_trash(rng: np.random.Generator) -> Thing:
    """Torn scraps of many colors, often in pieces."""
    colors = [
        pick(rng, "6e4a2a", "4a4038", "7a6a4a"),
        pick(rng, "a03a28", "b07a30", "3a3430"),
        pick(rng, "c8b89a", "504030", "787068"),
    ]
    pieces = [blob(rng, 0.3, rng.uniform(0.6, 0.9))]
    if rng.random() < 0.3:
        pieces = [pieces[0] * 0.62 - (0.36, 0.1), blob(rng, 0.3) * 0.36 + (0.64, 0.15)]
    soft = rng.uniform(0.2, 0.32)

    def surface(x: Array, y: Array, noise: Noise) -> Surface:
        patches, grain = noise(soft), noise(0.08)
        color = mix(colors[0], colors[1], step(patches - 0.5, 0.05))
        color = mix(color, colors[2], step(noise(soft) - 0.62, 0.05))
        return Surface(color * (0.8 + 0.4 * grain[..., None]), 0.35 * noise(0.3) + 0.09 * grain)

    return Thing(pieces, surface)


def paper(rng: np.random.Generator) -> Thing:
    """A sheet with lines of print and a fold, or a crumpled one."""
    sheet = pick(rng, "f2f0e8", "e8e0c8", "dcd8cc", "c8a878", "f0e4a8", "d0dce8")
    ink = pick(rng, "303038", "404858", "703030")
    width = rng.uniform(0.6, 0.8)
    crumpled = rng.random() < 0.3
    if crumpled:
        outline = blob(rng, 0.16, 0.85)
    else:
        corners = np.array([(-1, -width), (1, -width), (1, width), (-1, width)], np.float32)
        outline = corners + rng.normal(0, 0.07, (4, 2)).astype(np.float32)
    fold, turn = rng.uniform(-0.4, 0.4), rng.uniform(0, np.pi)
    lines, margin = rng.uniform(0.14, 0.2), rng.uniform(-0.7, 0.2)

    def surface(x: Array, y: Array, noise: Noise) -> Surface:
        crease = np.abs(x * np.cos(turn) + y * np.sin(turn) - fold)
        facets = np.abs(noise(0.4) - 0.5) + np.abs(noise(0.25) - 0.5) * 0.6
        height = 1.1 * facets if crumpled else -0.2 * crease + 0.12 * noise(0.7)
        words = step(np.abs(y / lines - np.round(y / lines)) - 0.27, 0.1)
        words = words * step(noise(0.12) - 0.38, 0.1) * step(0.82 - np.abs(x), 0.05)
        words = words * step(x - margin, 0.05) * step(width * 0.82 - np.abs(y), 0.05)
        return Surface(mix(sheet, ink, words * (0.25 if crumpled else 0.6)), height)

    return Thing([outline], surface)


def paper_pack(rng: np.random.Generator) -> Thing:
    """A drink carton: two faces, a gable, a printed band."""
    white = pick(rng, "f0f0ec", "e8ecf0")
    band = pick(rng, "2a62b8", "2f9a50", "d04048", "e07a20", "d05890", "7048a8")
    width = rng.uniform(0.44, 0.54)
    outline = profile(
        (-1, width), (0.42, width), (0.78, width * 0.7), (0.78, width * 0.86), (1, width * 0.86)
    )
    edge, low, high = width * rng.uniform(0.2, 0.5), rng.uniform(-0.9, -0.5), rng.uniform(-0.1, 0.3)
    edge *= rng.choice((-1, 1))

    def surface(x: Array, y: Array, noise: Noise) -> Surface:
        printed = step(x - low) * step(high - x)
        spot = step(0.24 - np.hypot(x - (low + high) / 2, (y + edge) * 1.1))
        printed = printed * (1 - spot) + step(x - 0.8)
        height = -0.55 * np.abs(y - edge) - 0.5 * np.clip(x - 0.42, 0, 0.36) + 0.04 * noise(0.5)
        return Surface(mix(white, band, printed), height, gloss=0.12)

    return Thing([outline], surface)


def metal(rng: np.random.Generator) -> Thing:
    """A can: bare rims, a printed or bare body, hard highlights, dents."""
    bare = pick(rng, "b4b8bc", "a0a4a8")
    body = pick(rng, "c02028", "1848a0", "209048", "a8acb0", "b0b4b8", "e0a020")
    stripe = pick(rng, "f0f0f0", "181818", "e0c040")
    width = rng.uniform(0.52, 0.62)
    rim = width * 0.84
    outline = profile((-1, rim), (-0.88, width), (0.8, width), (1, rim * 0.95))
    at, slant = rng.uniform(-0.4, 0.3), rng.uniform(-0.6, 0.6)
    dents = rng.uniform(0, 0.3)

    def surface(x: Array, y: Array, noise: Noise) -> Surface:
        height, across = cylinder(x, y, outline)
        color = mix(body, stripe, step(0.16 - np.abs(x - at - slant * y)))
        color = mix(color, bare, step(np.abs(x) - 0.78))
        rings = 0.03 * np.cos(np.clip(np.abs(x) - 0.78, 0, 1) * 60)
        height = height + rings + dents * np.abs(noise(0.5) - 0.5)
        brushed = 0.25 * np.cos(across * 7 + 1)[..., None]
        return Surface(color * (0.85 + brushed), height, gloss=0.9)

    return Thing([outline], surface)


def glass(rng: np.random.Generator) -> Thing:
    """A bottle with a long neck: see-through, dark at the rims, thin highlights."""
    tint = pick(rng, "1e6a34", "6e3c12", "2c7a58", "3a7a2c", "5c3010")
    label = pick(rng, "e8dcc0", "d8c8a0", "c03030")
    width, neck = rng.uniform(0.32, 0.38), rng.uniform(0.12, 0.15)
    shoulder = rng.uniform(0.05, 0.25)
    outline = profile(
        (-1, width * 0.85),
        (-0.94, width),
        (shoulder, width),
        (shoulder + 0.28, neck * 1.15),
        (0.9, neck),
        (0.9, neck * 1.25),
        (1, neck * 1.25),
    )
    labelled = rng.random() < 0.4

    def surface(x: Array, y: Array, noise: Noise) -> Surface:
        height, across = cylinder(x, y, outline)
        opacity = 0.7 + 0.25 * np.abs(across) ** 3
        color: Array = tint * (1.1 - 0.6 * np.abs(across[..., None]) ** 3)
        streak = step(0.07 - np.abs(across - 0.45), 0.1) * 0.7
        color = mix(color, np.ones(3, np.float32), streak)
        opacity = np.maximum(opacity, streak)
        if labelled:
            on = step(x + 0.75) * step(-0.1 - x)
            color, opacity = mix(color, label, on), np.maximum(opacity, 0.95 * on)
        return Surface(color, height * 0.8, opacity, gloss=1.0)

    return Thing([outline], surface)


def plastic(rng: np.random.Generator) -> Thing:
    """A ribbed bottle with a cap and a label, or a cup."""
    if rng.random() < 0.3:
        return plastic_cup(rng)
    body = pick(rng, "c8dce4", "d8e4e8", "a8ccd8", "b8d8c8")
    cap = pick(rng, "2050c0", "e8e8e8", "d03028", "30a050")
    label = pick(rng, "2878c8", "e0483c", "38b070", "f0c030")
    width, neck = rng.uniform(0.33, 0.4), rng.uniform(0.15, 0.18)
    outline = profile(
        (-1, width * 0.85),
        (-0.93, width),
        (0.35, width),
        (0.68, neck),
        (0.8, neck),
        (0.8, neck * 1.25),
        (1, neck * 1.25),
    )
    start, ribs = rng.uniform(-0.5, -0.2), rng.uniform(22, 30)
    labelled = rng.random() < 0.75

    def surface(x: Array, y: Array, noise: Noise) -> Surface:
        height, across = cylinder(x, y, outline)
        wraps = step(x - start) * step(start + 0.5 - x) * labelled
        capped = step(x - 0.8)
        color = mix(mix(body, label, wraps), cap, capped)
        opacity = np.maximum(0.5 + 0.35 * np.abs(across) ** 4, np.maximum(wraps, capped))
        height = height * 0.8 + 0.035 * np.sin(x * ribs) * (1 - wraps) + 0.08 * noise(0.3)
        return Surface(color, height, opacity, gloss=0.7)

    return Thing([outline], surface)


def plastic_cup(rng: np.random.Generator) -> Thing:
    """A thin ribbed cup with a lip, clear or colored."""
    body = pick(rng, "e03830", "3080d0", "d0e0e8", "f0a020")
    outline = profile((-1, 0.48), (0.84, 0.7), (0.84, 0.78), (1, 0.78))
    ribs = rng.uniform(20, 28)

    def surface(x: Array, y: Array, noise: Noise) -> Surface:
        height, across = cylinder(x, y, outline)
        color = mix(body, body * 0.5 + 0.5, step(x - 0.84))
        height = height * 0.7 + 0.04 * np.sin(x * ribs)
        return Surface(color, height, 0.72 + 0.28 * np.abs(across) ** 3, gloss=0.6)

    return Thing([outline], surface)


def styrofoam(rng: np.random.Generator) -> Thing:
    """A white block of beads with a broken side, or a tray."""
    white = pick(rng, "f4f4f2", "eceff2", "f0f0e6", spread=0.02)
    width = rng.uniform(0.5, 0.75)
    tray = rng.random() < 0.4
    if tray:
        outline = rounded(1, width, 6)
    else:
        side = np.linspace(width, -width, 9)
        broken = np.stack([0.85 + rng.normal(0, 0.11, 9), side], 1)
        outline = np.concatenate([[(-1, -width), (-1, width)], broken]).astype(np.float32)

    def surface(x: Array, y: Array, noise: Noise) -> Surface:
        beads = noise(0.075)
        edge = np.maximum(np.abs(x), np.abs(y) / width)
        rim = -0.4 * np.clip(0.82 - edge, 0, 0.16) if tray else -0.5 * np.clip(edge - 0.85, 0, 1)
        return Surface(white * (0.82 + 0.3 * beads[..., None]), rim + 0.05 * beads, gloss=0.03)

    return Thing([outline], surface)


def plastic_bag(rng: np.random.Generator) -> Thing:
    """A thin bag: creases that run to its knot, light through it, broken highlights."""
    film = pick(rng, "f0f0f0", "e4ecf0", "202226", "3a68c0", "f0d040", "e06080", "30a878")
    body = blob(rng, 0.18, rng.uniform(0.75, 0.95)) * (0.8, 1) - (0.2, 0)
    body = np.roll(body, -body[:, 0].argmax(), axis=0)  # begins at the knot
    ears = np.array([(0.6, -0.22), (1, -0.42), (0.98, -0.18), (0.7, 0), (1, 0.2), (0.95, 0.4)])
    outline = np.concatenate([ears, [(0.6, 0.24)], body[7:-7]]).astype(np.float32)
    folds, phase, opacity = rng.uniform(9, 14), rng.uniform(0, 6), rng.uniform(0.7, 0.92)

    def surface(x: Array, y: Array, noise: Noise) -> Surface:
        angle, distance = np.arctan2(y, 0.75 - x), np.hypot(y, 0.75 - x)
        rays = 1 - np.abs(np.sin(folds * angle / 2 + phase + 5 * noise(0.5)))
        crumple = np.abs(noise(0.28) - 0.5)
        height = 0.16 * rays * np.clip(distance, 0.2, 1) + 0.55 * crumple + 0.2 * noise(0.8)
        return Surface(np.broadcast_to(film, (*x.shape, 3)), height, opacity, gloss=0.55)

    return Thing([outline], surface)


def battery(rng: np.random.Generator) -> Thing:
    """A small cell: two colors, a thin ring, the terminal's nub."""
    dark = pick(rng, "181a1c", "202838", "283028", spread=0.02)
    bright = pick(rng, "c87830", "d8a838", "b86840", "c8b060")
    width = rng.uniform(0.4, 0.48)
    outline = profile((-1, width), (0.86, width), (0.86, 0.15), (1, 0.15))
    border = rng.uniform(0.1, 0.35)

    def surface(x: Array, y: Array, noise: Noise) -> Surface:
        height, _ = cylinder(x, np.clip(y, -width, width), profile((-1, width), (1, width)))
        color = mix(dark, bright, step(x - border))
        light = np.full(3, 0.75, np.float32)
        color = mix(color, light, step(0.05 - np.abs(x - border)) + step(x - 0.86))
        return Surface(color, height, gloss=0.6)

    return Thing([outline], surface)


def clothing(rng: np.random.Generator) -> Thing:
    """A shirt, trousers or a sock of woven cloth, plain, striped or checked."""
    main = pick(rng, "28386a", "7a2438", "3a5a48", "50485a", "8a7a9a", "a04860", "304a70")
    second = pick(rng, "c8c0b8", "d8c8a0", "202028", "a8b8c8")
    shirt = [(-1, 0.5), (0.35, 0.5), (0.3, 0.92), (0.68, 0.96), (0.98, 0.45), (0.9, 0.18)]
    trousers = [(-1, -0.5), (0.9, -0.42), (1, 0.42), (-0.95, 0.55), (-1, 0.12), (0.35, 0)]
    sock = [
        (-1, -0.3),
        (0.5, -0.32),
        (0.95, 0.2),
        (0.95, 0.75),
        (0.6, 0.8),
        (0.35, 0.3),
        (-1, 0.28),
    ]
    shapes = [profile(*shirt), np.array(trousers, np.float32), np.array(sock, np.float32)]
    outline = shapes[rng.choice(3, p=(0.5, 0.35, 0.15))]
    across, along = ((0, 0), (1, 0), (1, 1))[rng.integers(3)]
    repeat = rng.uniform(10, 16)

    def surface(x: Array, y: Array, noise: Noise) -> Surface:
        rows, columns = np.sin(repeat * x) > 0.2, np.sin(repeat * y) > 0.2
        pattern = 0.6 * across * rows + 0.4 * along * columns
        weave = np.sin(x * 55) * np.sin(y * 55)
        color = mix(main, second, pattern) * (0.95 + 0.12 * weave[..., None])
        return Surface(color, 0.7 * noise(0.5) + 0.015 * weave)

    return Thing([outline], surface)


class Kind(NamedTuple):
    """A class of litter."""

    name: str
    share: float  # of all objects
    half_length: tuple[float, float]  # from, to; in sides of the image
    draw: Callable[[np.random.Generator], Thing]


# the contest's classes in its order, 1 to 10, about as common and as rare as they are there
LITTER = (
    Kind("General trash", 0.17, (0.17, 0.26), general_trash),
    Kind("Paper", 0.17, (0.17, 0.28), paper),
    Kind("Paper pack", 0.08, (0.19, 0.28), paper_pack),
    Kind("Metal", 0.08, (0.18, 0.26), metal),
    Kind("Glass", 0.08, (0.25, 0.35), glass),
    Kind("Plastic", 0.10, (0.22, 0.31), plastic),
    Kind("Styrofoam", 0.08, (0.17, 0.28), styrofoam),
    Kind("Plastic bag", 0.14, (0.20, 0.31), plastic_bag),
    Kind("Battery", 0.05, (0.17, 0.24), battery),
    Kind("Clothing", 0.05, (0.24, 0.35), clothing),
)
