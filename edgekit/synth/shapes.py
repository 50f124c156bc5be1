"""Small pictures of shapes for comparing methods in minutes: ten classes, five shapes in two textures each.

    images, labels = shapes(seed=0, count=8000)          # uint8 [count, 32, 32, 3] BGR, int64 [count]

Shape, pose, size, colours, texture's phase and direction, light and noise are drawn for each picture; colours tell
nothing of the class. numpy only; a set depends on (seed, count) alone.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
SIDE = 32
SHAPES = ("disc", "square", "triangle", "cross", "ring")
TEXTURES = ("stripes", "checks")
CLASSES = tuple(f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES)
_CHUNK = 500


def shapes(seed: int, count: int) -> tuple[Array, Array]:
    """`count` labelled pictures; label = 2 * shape + texture (CLASSES)."""
    rng = np.random.default_rng([seed, 77])
    labels = rng.permutation(np.arange(count) % len(CLASSES))
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for start in range(0, count, _CHUNK):
        part = slice(start, min(start + _CHUNK, count))
        images[part] = _draw(rng, labels[part])
    return images, labels


def _draw(rng: np.random.Generator, labels: Array) -> Array:
    n = len(labels)

    def uniform(low: float, high: float) -> Array:
        return rng.uniform(low, high, n)[:, None, None]

    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float64) + 0.5
    size = uniform(9.0, 13.0)
    margin = 12.0
    dx, dy = x - uniform(margin, SIDE - margin), y - uniform(margin, SIDE - margin)
    angle = uniform(0, 2 * np.pi)
    u, v = (np.cos(angle) * dx + np.sin(angle) * dy) / size, (-np.sin(angle) * dx + np.cos(angle) * dy) / size
    stretch = uniform(0.85, 1.15)
    u, v = u * stretch, v / stretch
    radius = np.hypot(u, v)
    distances = np.stack(  # below 0 inside, about 1 = the shape's size
        [
            radius - 0.9,
            np.maximum(np.abs(u), np.abs(v)) - 0.8,
            np.maximum(v - 0.55, 0.866 * np.abs(u) - 0.5 * v - 0.55),
            np.minimum(
                np.maximum(np.abs(u) - 0.95, np.abs(v) - 0.33), np.maximum(np.abs(v) - 0.95, np.abs(u) - 0.33)
            ),
            np.abs(radius - 0.68) - 0.27,
        ]
    )
    distance = distances[labels // 2, np.arange(n)] * size
    inside = np.clip(0.5 - distance, 0, 1)[..., None]
    # the texture turns on its own: its direction tells nothing of the shape's
    turn, pitch = uniform(0, 2 * np.pi), uniform(0.9, 1.5)
    p = pitch * (np.cos(turn) * x + np.sin(turn) * y) + uniform(0, 2 * np.pi)
    q = pitch * (-np.sin(turn) * x + np.cos(turn) * y) + uniform(0, 2 * np.pi)
    wave = np.where((labels % 2 == 0)[:, None, None], np.sin(p), np.sin(p) * np.sin(q) * 1.5)
    wave = np.clip(wave * 2, -1, 1)[..., None]
    colours = rng.uniform(0.1, 0.9, (3, n, 1, 1, 3))
    side = np.where(colours[0] > 0.5, -1, 1)  # shape and ground differ by 0.3 or more in every colour
    colours[1] = colours[0] + side * rng.uniform(0.3, 0.5, colours[1].shape)
    depth = rng.uniform(0.15, 0.3, (n, 1, 1, 1))
    ground = colours[0] + 0.2 * (colours[2] - 0.5) * np.sin(
        rng.uniform(0.1, 0.35, (n, 1, 1, 1)) * (x + y)[..., None]
    )
    picture = ground * (1 - inside) + (colours[1] + depth * wave) * inside
    picture = picture * rng.uniform(0.7, 1.2, (n, 1, 1, 1)) + rng.normal(
        0, rng.uniform(0.01, 0.06, (n, 1, 1, 1)), picture.shape
    )
    found: Array = np.clip(np.rint(255 * picture), 0, 255).astype(np.uint8)
    return found
