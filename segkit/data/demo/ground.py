"""What litter lies on, and the clutter that belongs there."""

import numpy as np

from segkit.data.demo.shapes import Array, Noise, Surface, Thing, blob, mix, pick, profile, step


def asphalt(rng: np.random.Generator, noise: Noise) -> Surface:
    """Gray, of grains."""
    gray = pick(rng, "5c5c5e", "6e6c6a", "48494c")
    grain = noise(0.012)
    return Surface(gray * (0.75 + 0.5 * grain + 0.2 * noise(0.3))[..., None], 0.02 * grain)


def concrete(rng: np.random.Generator, noise: Noise) -> Surface:
    """Pale, stained and cracked."""
    gray = pick(rng, "a09c94", "8c8a86", "b0aaa0")
    stains = noise(0.25) * 0.3 + noise(0.06) * 0.2 + noise(0.015) * 0.12
    crack = np.abs(noise(0.4) - 0.5) < 0.012
    return Surface(gray * (0.7 + stains - 0.25 * crack)[..., None], 0.008 * noise(0.015))


def sand(rng: np.random.Generator, noise: Noise) -> Surface:
    """Beige or brown, in low waves."""
    beige = pick(rng, "b89c70", "a88c64", "8a6c4a", "c0a880")
    waves = noise(0.1) + 0.5 * noise(0.04)
    return Surface(beige * (0.7 + 0.25 * noise(0.01) + 0.15 * waves)[..., None], 0.05 * waves)


def grass(rng: np.random.Generator, noise: Noise) -> Surface:
    """Blades, and straw between them."""
    green, straw = pick(rng, "4a7030", "5a7838", "3a5c2c"), pick(rng, "8a8848", "6a5c38")
    blades = noise(0.05, 0.01) * noise(0.015, 0.008) * 2
    color = mix(green, straw, 1.4 * noise(0.2) - 0.5) * (0.4 + 1.0 * blades[..., None])
    return Surface(color, 0.03 * blades)


def tiles(rng: np.random.Generator, noise: Noise) -> Surface:
    """Paving in rows, each moved by half a stone."""
    stone, joint = pick(rng, "9a6a58", "8c8c8c", "a89880", "788490"), pick(rng, "5c5650", "b0aca4")
    dirt = noise(0.2)
    y, x = np.indices(dirt.shape, np.float32) / len(dirt)
    turn, size = rng.uniform(0, np.pi), rng.uniform(0.14, 0.3)
    row = (x * np.cos(turn) + y * np.sin(turn)) / size
    along = (y * np.cos(turn) - x * np.sin(turn)) / size / rng.choice((1, 2))
    along = along + 0.5 * (np.round(row) % 2)
    middle = np.maximum(np.abs(row - np.round(row)), np.abs(along - np.round(along)))
    gap = step(middle - 0.46)
    color = stone * (0.8 + 0.3 * noise(0.02) + 0.15 * dirt)[..., None]
    return Surface(mix(color, joint, gap), -0.02 * gap)


def planks(rng: np.random.Generator, noise: Noise) -> Surface:
    """Wood, its grain along the boards."""
    wood = pick(rng, "8a6240", "a07c54", "6c4c34", "9c9084")
    grain = noise(0.012, 0.4) * 0.35 + noise(0.04, 0.6) * 0.3
    y = np.indices(grain.shape, np.float32)[0] / len(grain) / rng.uniform(0.1, 0.2)
    gap = step(np.abs(y - np.round(y)) - 0.47)
    tone = (0.65 + grain) * (1 + 0.15 * np.sin(np.round(y) * 12.9)) * (1 - 0.5 * gap)
    return Surface(wood * tone[..., None], -0.02 * gap)


GROUNDS = (asphalt, concrete, sand, grass, tiles, planks)


def leaf(rng: np.random.Generator) -> Thing:
    """Clutter that belongs to the ground."""
    color = pick(rng, "7a5a2a", "8a4a20", "5a6a2a", "9a7a30")
    outline = profile((-1, 0.02), (-0.5, 0.28), (0, 0.4), (0.5, 0.26), (1, 0.02))

    def surface(x: Array, y: Array, noise: Noise) -> Surface:
        vein = step(0.05 - np.abs(y), 0.05)
        return Surface(mix(color, color * 0.7, vein), 0.2 * noise(0.4) + 0.15 * np.abs(y))

    return Thing([outline], surface)


def pebble(rng: np.random.Generator) -> Thing:
    """Clutter that belongs to the ground."""
    color = pick(rng, "8c8a88", "6a6460", "a89c90")

    def surface(x: Array, y: Array, noise: Noise) -> Surface:
        dome = np.sqrt(np.clip(1.3 - x**2 - y**2 * 1.6, 0.02, 2))
        return Surface(color * (0.8 + 0.4 * noise(0.3)[..., None]), 0.6 * dome)

    return Thing([blob(rng, 0.12, 0.75)], surface)
