"""What stands in a street as solids that can be seen from every side: the 3-D counterpart of `vehicles`, `objects`.

Every function draws its choices from the `random.Random` it is given. An object's frame: x the way it heads, y to
its left, z up; origin on the ground below its middle. `Solid.size` is its labelled box, centred on the origin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np

from edgekit.synth.cast import ELLIPSOID, PartsBuilder
from edgekit.synth.mesh import Color
from edgekit.synth.objects import CLOTHES, PAINTS, SKIN, WALLS, jitter, scaled

CLASSES: tuple[str, ...] = ("car", "truck", "bus", "pedestrian", "bicycle")
CAR, TRUCK, BUS, PEDESTRIAN, BICYCLE = range(5)

PLAIN, CAR_BODY, CABIN, COACH, CARGO, CAB, WALL, LEAF, SHADOW, PLATE = range(10)
"""How a camera paints a part: column `cast.KIND`."""
GLASS: Color = (72, 58, 46)
TYRE: Color = (26, 25, 25)
METAL: Color = (110, 110, 112)


@dataclass(frozen=True, eq=False)
class Solid:
    """parts: float32 [n, cast.COLUMNS].  size: length, width, height in m.  label: into CLASSES, -1: not labelled."""

    parts: np.ndarray
    size: tuple[float, float, float]
    label: int = -1


def _finish(m: PartsBuilder, size: tuple[float, float, float], label: int = -1, shadow: bool = True) -> Solid:
    if shadow:
        x, y = size[0] / 2 + 0.1, size[1] / 2 + 0.1
        m.block((-x, x), (-y, y), (0.0, 0.012), (0, 0, 0), SHADOW, ghost=True)
    return Solid(m.build(), size, label)


def _axles(m: PartsBuilder, at: tuple[float, ...], width: float, radius: float) -> None:
    edge = width / 2 - 0.015
    for x in at:
        m.block((x - radius * 0.75, x + radius * 0.75), (-edge, edge), (0.0, radius * 1.4), TYRE,
                top_x=(x - radius, x + radius), reflect=0.06)  # fmt: skip


def car(rng: Random) -> Solid:
    """Saloon, hatchback, off-roader or van; 3.7 to 5.2 m long, 1.4 to 2.1 m high."""
    kind = rng.choices(("saloon", "hatch", "suv", "van"), (4, 4, 3, 2))[0]
    paint = jitter(rng, rng.choice(PAINTS), 10)
    length, width, height = {
        "saloon": (4.6, 1.8, 1.44),
        "hatch": (3.95, 1.74, 1.5),
        "suv": (4.5, 1.9, 1.72),
        "van": (4.9, 1.95, 2.05),
    }[kind]
    length, height = length * rng.uniform(0.95, 1.06), height * rng.uniform(0.96, 1.05)
    width *= rng.uniform(0.97, 1.04)
    low, waist = 0.25, height * (0.58 if kind != "van" else 0.52)
    half, edge = length / 2, width / 2
    rear0, rear1, front1, front0 = {  # cabin along the car: rear base, rear top, front top, front base
        "saloon": (-0.36, -0.22, 0.06, 0.22),
        "hatch": (-0.49, -0.40, 0.08, 0.24),
        "suv": (-0.49, -0.43, 0.10, 0.24),
        "van": (-0.5, -0.485, 0.22, 0.40),
    }[kind]
    shine = rng.uniform(0.1, 0.55)  # dark paint hardly answers a LiDAR
    m = PartsBuilder()
    m.block((-half, half), (-edge, edge), (low, waist), paint, CAR_BODY, top_y=(-edge * 0.97, edge * 0.97),
            reflect=shine)  # fmt: skip
    m.block((rear0 * length, front0 * length), (-edge * 0.95, edge * 0.95), (waist, height), paint, CABIN,
            top_x=(rear1 * length, front1 * length), top_y=(-edge * 0.78, edge * 0.78), reflect=shine)  # fmt: skip
    _axles(m, (-length * 0.31, length * 0.32), width, 0.33)
    return _finish(m, (length, width, height), CAR)


def truck(rng: Random) -> Solid:
    """Lorry with a closed box, 5.8 to 9.8 m long, 2.5 to 3.7 m high."""
    paint = jitter(rng, rng.choice(PAINTS), 10)
    length, height, width = rng.uniform(5.8, 9.8), rng.uniform(2.5, 3.7), rng.uniform(2.15, 2.55)
    half, edge, cab = length / 2, width / 2, rng.uniform(1.6, 2.0)
    box = jitter(rng, rng.choice(((232, 232, 232), (214, 222, 226), paint, (150, 120, 70), (70, 90, 190))), 8)
    cab_top = min(height, rng.uniform(2.2, 3.3))
    m = PartsBuilder()
    m.block(
        (-half, half - cab - 0.15), (-edge, edge), (0.9, height), box, CARGO, reflect=rng.uniform(0.2, 0.6)
    )
    m.block((-half, half - 0.3), (-edge * 0.88, edge * 0.88), (0.5, 0.92), (54, 54, 56), reflect=0.1)
    m.block((half - cab, half), (-edge * 0.97, edge * 0.97), (0.45, cab_top), paint, CAB,
            top_x=(half - cab + 0.1, half - 0.15), top_y=(-edge * 0.93, edge * 0.93), reflect=0.3)  # fmt: skip
    _axles(m, (-length * 0.3, half - cab * 0.55), width, 0.48)
    return _finish(m, (length, width, height), TRUCK)


def bus(rng: Random) -> Solid:
    """City bus, 8.5 to 12 m long, 2.8 to 3.3 m high."""
    paint = jitter(rng, rng.choice(PAINTS[5:]), 10)
    length, height, width = rng.uniform(8.5, 12.0), rng.uniform(2.8, 3.3), rng.uniform(2.4, 2.55)
    half, edge = length / 2, width / 2
    m = PartsBuilder()
    m.block((-half, half), (-edge, edge), (0.32, height), paint, COACH, top_y=(-edge * 0.96, edge * 0.96),
            reflect=rng.uniform(0.2, 0.5))  # fmt: skip
    _axles(m, (-length * 0.3, length * 0.33), width, 0.48)
    return _finish(m, (length, width, height), BUS)


def pedestrian(rng: Random, phase: float) -> Solid:
    """Someone 1.5 to 1.95 m tall. `phase`: 0..1 of a double step, below 0 for someone who stands."""
    tall = rng.uniform(1.5, 1.95)
    coat, trousers = jitter(rng, rng.choice(CLOTHES)), jitter(rng, rng.choice(CLOTHES), 10)
    skin, hair = jitter(rng, rng.choice(SKIN), 8), rng.choice(((24, 24, 28), (30, 50, 80), (70, 120, 160)))
    broad, hip, shoulder = tall * rng.uniform(0.125, 0.15), tall * 0.48, tall * 0.84
    step = tall * 0.15 * math.sin(2 * math.pi * phase) if phase >= 0 else 0.0
    m = PartsBuilder()
    for side, shade in ((-1, 0.85), (1, 1.0)):
        y = side * broad * 0.45
        m.block((side * step - 0.12, side * step + 0.14), (y - 0.07, y + 0.07), (0.0, hip), scaled(trousers, shade),
                top_x=(-0.1, 0.1), reflect=0.2)  # fmt: skip
    m.block((-0.12, 0.12), (-broad * 0.85, broad * 0.85), (hip * 0.92, shoulder), coat, top_x=(-0.11, 0.11),
            top_y=(-broad, broad), reflect=rng.uniform(0.1, 0.5))  # fmt: skip
    m.round(0.02, 0.0, tall * 0.068, (shoulder - 0.02, tall - 0.02), skin, shape=ELLIPSOID, reflect=0.25)
    m.round(-0.015, 0.0, tall * 0.07, (tall * 0.925, tall), hair, shape=ELLIPSOID, reflect=0.1)
    return _finish(m, (0.28 + tall * 0.2, 2 * broad + 0.06, tall), PEDESTRIAN)


def bicycle(rng: Random) -> Solid:
    """A bicycle and its rider, 1.7 m long."""
    tall = rng.uniform(1.55, 1.85)
    coat, trousers, paint = (jitter(rng, rng.choice(c)) for c in (CLOTHES, CLOTHES, PAINTS))
    m = PartsBuilder()
    for x in (-0.52, 0.52):
        m.block(
            (x - 0.2, x + 0.2), (-0.025, 0.025), (0.0, 0.33), TYRE, top_x=(x - 0.33, x + 0.33), reflect=0.1
        )
        m.block(
            (x - 0.33, x + 0.33), (-0.025, 0.025), (0.33, 0.66), TYRE, top_x=(x - 0.2, x + 0.2), reflect=0.1
        )
    m.block((-0.3, 0.4), (-0.03, 0.03), (0.35, 0.85), paint, top_x=(-0.25, 0.45), reflect=0.3)
    m.block((0.38, 0.46), (-0.28, 0.28), (0.92, 0.98), (40, 40, 42), reflect=0.2)
    m.block((-0.15, 0.15), (-0.16, 0.16), (0.3, 0.98), trousers, top_x=(-0.28, 0.05), reflect=0.2)
    m.block((-0.3, 0.02), (-0.19, 0.19), (0.9, tall - 0.24), coat, top_x=(-0.1, 0.18), top_y=(-0.21, 0.21),
            reflect=rng.uniform(0.1, 0.5))  # fmt: skip
    m.round(
        0.1, 0.0, 0.115, (tall - 0.27, tall), jitter(rng, rng.choice(SKIN), 8), shape=ELLIPSOID, reflect=0.25
    )
    return _finish(m, (1.72, 0.58, tall), BICYCLE)


def tree(rng: Random) -> Solid:
    """Broad-leaved tree or conifer, 4 to 9 m high."""
    tall = rng.uniform(4.2, 9.0)
    leaf = jitter(rng, rng.choice(((36, 92, 44), (40, 110, 66), (30, 78, 48), (44, 120, 110))), 10)
    m = PartsBuilder()
    m.round(0, 0, rng.uniform(0.1, 0.22), (0.0, tall * 0.6), (44, 62, 80), reflect=0.25)
    if rng.random() < 0.25:
        m.round(0, 0, tall * 0.2, (tall * 0.15, tall * 1.05), leaf, LEAF, shape=ELLIPSOID, reflect=0.35)
    else:
        for _ in range(2):
            x, y = rng.uniform(-0.1, 0.1) * tall, rng.uniform(-0.1, 0.1) * tall
            middle, wide = tall * rng.uniform(0.6, 0.75), tall * rng.uniform(0.17, 0.26)
            m.round(x, y, wide, (middle - wide * 0.8, middle + wide * 0.9), scaled(leaf, rng.uniform(0.8, 1.15)),
                    LEAF, shape=ELLIPSOID, reflect=0.35)  # fmt: skip
    return _finish(m, (0.6, 0.6, tall))


def bush(rng: Random) -> Solid:
    """Waist high to head high, round."""
    wide, tall = rng.uniform(0.3, 0.9), rng.uniform(0.7, 1.7)
    leaf = jitter(rng, (36, 100, 60), 16)
    m = PartsBuilder()
    m.round(0, 0, wide, (-0.3 * tall, tall), leaf, LEAF, shape=ELLIPSOID, reflect=0.35)
    return _finish(m, (2 * wide, 2 * wide, tall))


def pole(rng: Random, tall: float, thick: float) -> Solid:
    """A grey post."""
    m = PartsBuilder()
    m.round(0, 0, thick, (0.0, tall), jitter(rng, METAL, 8), reflect=0.35)
    return _finish(m, (2 * thick, 2 * thick, tall), shadow=False)


def post(rng: Random) -> Solid:
    """Bollard, letter box, parking meter or advertising pillar: to a LiDAR some are people."""
    kind = rng.choice(("bollard", "box", "meter", "pillar"))
    m = PartsBuilder()
    if kind == "bollard":
        wide, tall = 0.1, rng.uniform(0.7, 1.1)
        m.round(0, 0, wide, (0.0, tall), jitter(rng, (60, 60, 64), 10), reflect=0.3)
    elif kind == "box":
        wide, tall = 0.25, rng.uniform(1.2, 1.75)
        m.block((-0.2, 0.2), (-wide, wide), (0.0, tall), jitter(rng, rng.choice(((40, 190, 245), (36, 30, 190),
                (60, 90, 50), (120, 120, 122)))), reflect=0.35)  # fmt: skip
    elif kind == "meter":
        wide, tall = 0.2, rng.uniform(1.4, 1.8)
        m.round(0, 0, 0.06, (0.0, tall * 0.6), METAL, reflect=0.3)
        m.block((-0.14, 0.14), (-wide, wide), (tall * 0.6, tall), jitter(rng, (90, 80, 70)), reflect=0.3)
    else:
        wide, tall = rng.uniform(0.22, 0.5), rng.uniform(1.6, 2.4)
        m.round(0, 0, wide, (0.0, tall), jitter(rng, rng.choice(WALLS)), reflect=0.4)
    return _finish(m, (2 * wide, 2 * wide, tall))


def container(rng: Random) -> Solid:
    """Skip, kiosk or stack of pallets: as large as a car or a van."""
    length, width, tall = rng.uniform(2.2, 5.2), rng.uniform(1.5, 2.2), rng.uniform(1.2, 2.6)
    m = PartsBuilder()
    slant = rng.choice((0.0, 0.0, 0.25))
    m.block((-length / 2 + slant, length / 2 - slant), (-width / 2, width / 2), (0.05, tall),
            jitter(rng, rng.choice(((60, 90, 50), (40, 130, 190), (120, 110, 100), (90, 120, 160)))),
            top_x=(-length / 2, length / 2), reflect=0.3)  # fmt: skip
    return _finish(m, (length, width, tall))


def sign(rng: Random) -> Solid:
    """A traffic sign on its post; its face looks back along x."""
    tall, r = rng.uniform(2.0, 2.9), rng.uniform(0.3, 0.45)
    color = rng.choice(((36, 30, 200), (176, 88, 26), (236, 238, 240), (40, 190, 245)))
    m = PartsBuilder()
    m.round(0, 0, 0.035, (0.0, tall + r), METAL, reflect=0.35)
    m.block((-0.05, -0.03), (-r, r), (tall - r, tall + r), color, PLATE, reflect=1.0)
    return _finish(m, (0.1, 2 * r, tall + r), shadow=False)


def traffic_light(rng: Random) -> Solid:
    """A signal on its post; it looks back along x."""
    tall = rng.uniform(2.9, 3.6)
    lit = rng.randrange(3)
    m = PartsBuilder()
    m.round(0, 0, 0.05, (0.0, tall), METAL, reflect=0.35)
    m.block((-0.16, 0.0), (-0.17, 0.17), (tall - 1.0, tall), (30, 30, 30), reflect=0.15)
    z = tall - 0.18 - 0.31 * lit
    color = ((48, 40, 255), (50, 200, 255), (130, 250, 60))[lit]
    m.block((-0.175, -0.155), (-0.1, 0.1), (z - 0.1, z + 0.1), color, PLATE, reflect=0.3)
    return _finish(m, (0.2, 0.4, tall), shadow=False)


def street_lamp(rng: Random) -> Solid:
    """A lamp post of 7 m whose arm reaches 1.8 m to its left."""
    m = PartsBuilder()
    m.round(0, 0, 0.08, (0.0, 7.0), METAL, reflect=0.35)
    m.block((-0.06, 0.06), (0.0, 1.8), (6.9, 7.0), METAL, reflect=0.35)
    m.block((-0.2, 0.2), (1.5, 2.1), (6.82, 6.96), (190, 225, 245), PLATE, reflect=0.35)
    return _finish(m, (0.4, 2.0, 7.0), shadow=False)


def building(rng: Random, front: float, depth: float, low_rise: bool) -> Solid:
    """A house, `front` along x and `depth` along y, centred."""
    wall = jitter(rng, rng.choice(WALLS), 14)
    storey = rng.uniform(2.9, 3.5)
    tall = (rng.randint(1, 3) if low_rise else rng.randint(3, 7)) * storey + 0.6
    m = PartsBuilder()
    x, y = front / 2, depth / 2
    m.block((-x, x), (-y, y), (0.0, tall), wall, WALL, reflect=rng.uniform(0.25, 0.55))
    if low_rise:
        roof = jitter(rng, rng.choice(((48, 56, 120), (60, 62, 70), (70, 84, 110))), 8)
        m.block((-x, x), (-y - 0.3, y + 0.3), (tall, tall + rng.uniform(1.4, 2.6)), roof,
                top_y=(-0.2, 0.2), reflect=0.3)  # fmt: skip
    return _finish(m, (front, depth, tall), shadow=False)


@lru_cache(maxsize=1)
def reflect_of_ground() -> np.ndarray:
    """Share of light that terrain, road, pavement, marking, kerb send back to a LiDAR: float32 [5]."""
    return np.array([0.30, 0.14, 0.26, 0.65, 0.3], np.float32)
