"""Things to move: small cut-out pictures and backdrops, procedural or from real pictures. numpy only.

A sprite is float32 [SIDE, SIDE, 4], BGR in 0..255 times the mask, then the mask in 0..1; nothing touches its
border, where it is empty. Every function draws its choices from the generator it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np

from edgekit.errors import UsageError
from edgekit.synth import objects, vehicles
from edgekit.synth.mesh import Mesh
from edgekit.synth.raster import paint, spans

Array = np.ndarray
SIDE = 64
"""Width and height of a sprite, texels. It is drawn smaller through its halves (`mipmap`)."""


def load_pictures(folder: str | Path, limit: int = 2000) -> list[Array]:
    """Pictures of a folder, uint8 [h, w, 3] BGR: picture files, and arrays [n, h, w, 3] RGB in `.npz` files.

    In the order of the file names, at most `limit`.
    Raises: UsageError for a folder without pictures or an unreadable file.
    """
    from edgekit.picture import SUFFIXES, read_picture

    folder, found = Path(folder), []
    if not folder.is_dir():
        raise UsageError(f"pictures {folder}: not a folder. Give a folder of pictures")
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            found.append(read_picture(path))
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                for name in arrays.files:
                    if (
                        arrays[name].ndim == 4
                        and arrays[name].shape[-1] == 3
                        and arrays[name].dtype == np.uint8
                    ):
                        found.extend(arrays[name][: limit - len(found), :, :, ::-1])
        if len(found) >= limit:
            break
    if not found:
        raise UsageError(
            f"pictures {folder}: no pictures in it, expected files as .jpg or .png. Check the path"
        )
    return found[:limit]


def enlarged(picture: Array, height: int, width: int) -> Array:
    """Bilinear resize of [h, w, c] to float32 [height, width, c], corner to corner."""
    y, x = (
        np.linspace(0, n - 1, m, dtype=np.float32)
        for n, m in zip(picture.shape, (height, width), strict=False)
    )
    y0, x0 = np.minimum(y.astype(int), picture.shape[0] - 2), np.minimum(x.astype(int), picture.shape[1] - 2)
    fy, fx = (y - y0)[:, None, None], (x - x0)[None, :, None]
    rows = picture[y0] * (1 - fy) + picture[y0 + 1] * fy
    out: Array = rows[:, x0] * (1 - fx) + rows[:, x0 + 1] * fx
    return out


def mipmap(sprite: Array) -> list[Array]:
    """The sprite and its halves down to 8 texels, each the mean of 2 x 2 texels of the one before, in a
    frame of one empty texel: [n + 2, n + 2, 4]."""
    levels = [sprite]
    while levels[-1].shape[0] > 8:
        n = levels[-1].shape[0] // 2
        levels.append(levels[-1].reshape(n, 2, n, 2, 4).mean((1, 3), dtype=np.float32))
    return [np.pad(level, ((1, 1), (1, 1), (0, 0))) for level in levels]


def _color(rng: np.random.Generator) -> Array:
    color: Array = rng.uniform(10, 245, 3).astype(np.float32)
    return color


def field(rng: np.random.Generator, side: int) -> Array:
    """A pattern in 0..1, float32 [side, side]: stripes, checks, dots, patches or smooth noise."""
    y, x = np.meshgrid(*[np.linspace(-1, 1, side, dtype=np.float32)] * 2, indexing="ij")
    angle, phase, waves = rng.uniform(0, math.pi), rng.uniform(0, 1, 2), rng.uniform(1.2, 3.5)
    u = math.cos(angle) * x + math.sin(angle) * y
    v = math.cos(angle) * y - math.sin(angle) * x
    kind = int(rng.integers(5))
    if kind == 0:
        out = 0.5 + 0.5 * np.sin(math.pi * waves * u + 6 * phase[0])
    elif kind == 1:
        out = 0.5 + 0.5 * np.tanh(
            4 * np.sin(math.pi * waves * u + 6 * phase[0]) * np.sin(math.pi * waves * v + 6 * phase[1])
        )
    elif kind == 2:
        a, b = np.sin(math.pi * waves * u + 6 * phase[0]), np.sin(math.pi * waves * v + 6 * phase[1])
        out = 0.5 + 0.5 * np.tanh(5 * (a * a + b * b - 0.8))
    elif kind == 3:
        seeds = rng.uniform(-1, 1, (int(rng.integers(4, 9)), 2))
        near = ((x[..., None] - seeds[:, 0]) ** 2 + (y[..., None] - seeds[:, 1]) ** 2).argmin(-1)
        out = rng.uniform(0, 1, len(seeds))[near]
    else:
        coarse = rng.uniform(0, 1, (int(rng.integers(4, 7)), int(rng.integers(4, 7)), 1))
        out = enlarged(coarse, side, side)[..., 0]
    return np.asarray(out, np.float32)


def texture(rng: np.random.Generator, side: int) -> Array:
    """Colours blended by two patterns, float32 [side, side, 3]."""
    a, b = field(rng, side)[..., None], 0.6 * field(rng, side)[..., None]
    blend: Array = (_color(rng) * (1 - a) + _color(rng) * a) * (1 - b) + _color(rng) * b
    return blend


def mask(rng: np.random.Generator) -> Array:
    """An outline, float32 [SIDE, SIDE] in 0..1: ellipse, polygon, star, blob or box."""
    y, x = np.meshgrid(*[np.linspace(-1, 1, SIDE, dtype=np.float32)] * 2, indexing="ij")
    r, turn = np.hypot(x, y), np.arctan2(y, x) + rng.uniform(0, 2 * math.pi)
    kind = int(rng.integers(5))
    if kind == 0:
        edge = 0.9 / np.sqrt(np.cos(turn) ** 2 + (rng.uniform(1, 1.8) * np.sin(turn)) ** 2)
    elif kind == 1:
        step = 2 * math.pi / int(rng.integers(3, 7))
        edge = 0.9 * math.cos(step / 2) / np.cos(np.mod(turn, step) - step / 2)
    elif kind == 2:
        edge = 0.68 + 0.2 * np.cos(int(rng.integers(3, 7)) * turn)
    elif kind == 3:
        wobble = np.stack(
            [0.2 / k * np.sin(k * turn + rng.uniform(0, 6.3)) * rng.uniform(0.2, 1) for k in (2, 3, 5)]
        )
        edge = np.minimum(0.68 + wobble.sum(0), 0.92)
    else:
        wide = rng.uniform(0.5, 1)
        edge = 0.64 / np.maximum(np.abs(np.cos(turn)), np.abs(np.sin(turn)) / wide)
    inside = np.clip((edge - r) * SIDE / 4, 0, 1)
    inside[[0, -1]] = inside[:, [0, -1]] = 0
    return np.asarray(inside, np.float32)


def street_object(rng: np.random.Generator) -> Array:
    """A car, sign, walker, tree or light of the street world as a sprite, seen from straight ahead."""
    dice, kind = Random(int(rng.integers(2**31))), int(rng.integers(5))
    mesh: Mesh
    if kind == 0:
        mesh = vehicles.car(dice, dice.randrange(4))
    elif kind == 1:
        mesh = objects.sign(dice)
    elif kind == 2:
        mesh = objects.pedestrian(dice, dice.random(), dice.random() < 0.5)
    elif kind == 3:
        mesh = objects.tree(dice)
    else:
        mesh = objects.traffic_light(dice, dice.choice(("red", "yellow", "green")))
    seen = mesh.normals[:, 0] < 0
    flat = -mesh.corners[seen][:, :, 1:]
    low, high = flat.min((0, 1)), flat.max((0, 1))
    fine = SIDE * 2
    scale = 0.9 * fine / max(float(np.hypot(*(high - low))), 1e-6)  # fits at any angle
    corners = (flat - (low + high) / 2) * scale + fine / 2
    buffer = np.zeros((fine, fine), np.uint16)
    quad, row, start, stop = spans(corners.astype(np.float32), fine, fine)
    paint(buffer, row, start, stop, quad + 1)
    shade = 0.6 + 0.4 * np.abs(mesh.normals[seen][:, :1]) / np.linalg.norm(
        mesh.normals[seen], axis=1, keepdims=True
    )
    colors = np.concatenate(
        [np.zeros((1, 3)), np.minimum(mesh.colors[seen] * shade * rng.uniform(0.8, 1.2), 255)]
    )
    pixels = np.concatenate([colors[buffer], (buffer > 0)[..., None]], -1).astype(np.float32)
    small: Array = pixels.reshape(SIDE, 2, SIDE, 2, 4).mean((1, 3), dtype=np.float32)
    return small


def _crop(rng: np.random.Generator, picture: Array, height: int, width: int) -> Array:
    """A random window of the shape height : width, 60 to 100 % of what fits, resized."""
    h, w = picture.shape[:2]
    fit = min(h / height, w / width) * rng.uniform(0.6, 1.0)
    ch, cw = max(2, int(height * fit)), max(2, int(width * fit))
    y, x = int(rng.integers(h - ch + 1)), int(rng.integers(w - cw + 1))
    window = picture[y : y + ch, x : x + cw]
    step = max(1, min(ch // height, cw // width))  # means of blocks first, so that fine detail does not alias
    if step > 1:
        ch, cw = ch // step, cw // step
        window = (
            window[: ch * step, : cw * step].reshape(ch, step, cw, step, 3).mean((1, 3), dtype=np.float32)
        )
    return enlarged(window, height, width)


def sprite(rng: np.random.Generator, pictures: Sequence[Array] = ()) -> Array:
    """A sprite: half of them from `pictures` if there are any, else cut from textures or the street."""
    if len(pictures) and rng.random() < 0.5:
        surface = _crop(rng, pictures[int(rng.integers(len(pictures)))], SIDE, SIDE)
    elif rng.random() < 0.3:
        return street_object(rng)
    else:
        surface = texture(rng, SIDE)
    inside = mask(rng)[..., None]
    return np.concatenate([surface * inside, inside], -1).astype(np.float32)


def backdrop(rng: np.random.Generator, height: int, width: int, pictures: Sequence[Array] = ()) -> Array:
    """What does not move, float32 [height, width, 3]: a coarse texture of low contrast, or part of a picture."""
    if len(pictures) and rng.random() < 0.5:
        flat = _crop(rng, pictures[int(rng.integers(len(pictures)))], height, width)
    else:
        flat = enlarged(texture(rng, 48), height, width)
    out: Array = _color(rng) * 0.5 + flat * 0.5
    return out


def apart(sprite: Array, ground: Array) -> float:
    """How far the mean colours of a sprite and a backdrop are apart, levels of the channel that differs most."""
    color = sprite[..., :3].sum((0, 1)) / max(float(sprite[..., 3].sum()), 1.0)
    return float(np.abs(color - ground.mean((0, 1))).max())
