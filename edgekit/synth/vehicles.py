"""Cars, trucks and buses as meshes; local x is their length, front at the positive end.

Every function draws its choices from the `random.Random` it is given. `heading` counts quarter
turns to the left: 0 drives away from the camera, 2 towards it.
"""

from __future__ import annotations

from random import Random

from edgekit.synth.mesh import Color, Mesh, MeshBuilder, Point
from edgekit.synth.objects import PAINTS, jitter, scaled

GLASS: Color = (72, 58, 46)
TYRE: Color = (26, 25, 25)


def _wheels(m: MeshBuilder, positions: list[float], width: float, radius: float) -> None:
    for at in positions:
        for side in (-1.0, 1.0):
            m.disc(1, side * width / 2, (at, radius), radius, TYRE, side)
            m.disc(1, side * width / 2, (at, radius), radius * 0.55, (128, 128, 130), side)


def _ends(m: MeshBuilder, length: float, width: float, low: float, high: float, braking: bool) -> None:
    """Head and tail lamps, plate, bumper and the tyres seen from behind, on the end faces of a body."""
    half, edge = length / 2, width / 2
    mid = low + (high - low) * 0.68
    for side in (-1.0, 1.0):
        inner, outer = sorted((side * edge * 0.62, side * edge * 0.96))
        m.rect(0, half, (inner, mid - 0.09), (outer, mid + 0.09), (238, 246, 250), 1.0, True)
        m.rect(
            0, -half, (inner, mid - 0.11), (outer, mid + 0.11), (40, 34, 235 if braking else 165), -1.0, True
        )
        m.rect(0, -half, (inner * 0.98, 0.01), (outer * 0.98, low), TYRE, -1.0)
        m.rect(0, half, (inner * 0.98, 0.01), (outer * 0.98, low), TYRE, 1.0)
        m.lamp((half, side * edge * 0.8, mid), 0.75, (215, 235, 250), 1.0)
        m.lamp((-half, side * edge * 0.8, mid), 0.5 if braking else 0.32, (30, 26, 235), -1.0)
    m.rect(0, -half, (-0.27, low + 0.16), (0.27, low + 0.28), (214, 222, 226), -1.0)
    m.rect(0, half, (-0.25, low + 0.08), (0.25, low + 0.18), (214, 222, 226), 1.0)
    m.rect(0, half, (-edge * 0.5, mid - 0.12), (edge * 0.5, mid + 0.04), (30, 30, 32), 1.0)


def car(rng: Random, heading: int, braking: bool = False) -> Mesh:
    """Saloon, hatchback, off-roader or van; 3.7 to 5 m long, 1.4 to 2.1 m high."""
    kind = rng.choices(("saloon", "hatch", "suv", "van"), (4, 4, 3, 2))[0]
    paint = jitter(rng, rng.choice(PAINTS), 10)
    length, width, height = {
        "saloon": (4.6, 1.8, 1.44),
        "hatch": (3.95, 1.74, 1.5),
        "suv": (4.5, 1.9, 1.72),
        "van": (4.9, 1.95, 2.05),
    }[kind]
    length, height = length * rng.uniform(0.95, 1.06), height * rng.uniform(0.96, 1.05)
    low, waist = 0.27, height * (0.58 if kind != "van" else 0.52)
    half, edge = length / 2, width / 2
    rear0, rear1, front1, front0 = {  # cabin along the car: rear base, rear top, front top, front base
        "saloon": (-0.36, -0.22, 0.06, 0.22),
        "hatch": (-0.49, -0.40, 0.08, 0.24),
        "suv": (-0.49, -0.43, 0.10, 0.24),
        "van": (-0.5, -0.485, 0.22, 0.40),
    }[kind]
    m = MeshBuilder()
    m.frustum((-half, half, -edge, edge, low), (-half, half, -edge, edge, waist), paint, scaled(paint, 1.04))
    for side in (-1.0, 1.0):
        m.rect(1, side * edge, (-half, low), (half, low + 0.12), (44, 44, 46), side)
    _wheels(m, [-length * 0.31, length * 0.32], width, 0.32 if kind != "suv" else 0.37)
    m.rect(0, -half, (-edge, low), (edge, low + 0.13), (48, 48, 50), -1.0)
    m.rect(0, half, (-edge, low), (edge, low + 0.13), (48, 48, 50), 1.0)
    _ends(m, length, width, low, waist, braking)

    top = edge * 0.80
    b = (rear0 * length, front0 * length, -edge * 0.97, edge * 0.97, waist)
    t = (rear1 * length, front1 * length, -top, top, height)
    m.frustum(b, t, scaled(paint, 0.96), paint)
    glass = jitter(rng, GLASS, 10)
    rise = height - waist

    def inside(end: float, across: float, up: float) -> Point:
        """A point of the rear (end=0) or front (end=1) window: `across` -1..1, `up` 0..1."""
        x0, x1 = (rear0, rear1) if end == 0 else (front0, front1)
        half_width = edge * 0.97 + (top - edge * 0.97) * up
        return (length * (x0 + (x1 - x0) * up), across * half_width, waist + rise * up)

    for end, sign in ((0.0, -1.0), (1.0, 1.0)):
        if kind == "van" and end == 0.0 and rng.random() < 0.4:
            continue
        lean = (rear1 - rear0) if end == 0 else (front0 - front1)
        ring = [
            inside(end, -0.88, 0.1),
            inside(end, 0.88, 0.1),
            inside(end, 0.86, 0.9),
            inside(end, -0.86, 0.9),
        ]
        m.quad(ring, (sign * rise, 0, lean * length), glass)
    panes = ((0.06, 0.48), (0.53, 0.95)) if kind != "van" else ((0.66, 0.96),)
    for side in (-1.0, 1.0):
        for start, stop in panes:
            ring = []
            for part, up in ((start, 0.12), (stop, 0.12), (stop, 0.86), (start, 0.86)):
                x0 = length * (rear0 + (rear1 - rear0) * up)
                x1 = length * (front0 + (front1 - front0) * up)
                half_width = edge * 0.97 + (top - edge * 0.97) * up
                ring.append((x0 + (x1 - x0) * part, side * half_width, waist + rise * up))
            m.quad(ring, (0, side * rise, edge * 0.97 - top), glass)
    return m.build(heading)


def truck(rng: Random, heading: int, braking: bool = False) -> Mesh:
    """Box truck, lorry or bus; 6.2 to 11 m long, 2.8 to 3.6 m high."""
    bus = rng.random() < 0.3
    paint = jitter(rng, rng.choice(PAINTS), 10)
    half_width = rng.uniform(2.3, 2.5) / 2
    make = _bus if bus else _lorry
    return make(rng, paint, half_width, braking).build(heading)


def _bus(rng: Random, paint: Color, half_width: float, braking: bool) -> MeshBuilder:
    length, height = rng.uniform(9.5, 11.0), rng.uniform(2.9, 3.2)
    half = length / 2
    m = MeshBuilder()
    m.frustum(
        (-half, half, -half_width, half_width, 0.35),
        (-half, half, -half_width, half_width, height),
        paint,
        (225, 225, 225),
    )
    glass = jitter(rng, GLASS, 8)
    for side in (-1.0, 1.0):
        m.rect(1, side * half_width, (-half, 0.35), (half, 0.6), scaled(paint, 0.55), side)
        panes = 7
        for i in range(panes):
            x0 = -half + 0.3 + i * (length - 0.5) / panes
            m.rect(1, side * half_width, (x0, 1.35), (x0 + (length - 0.5) / panes - 0.14, 2.45), glass, side)
    m.rect(0, half, (-half_width * 0.92, 1.15), (half_width * 0.92, 2.5), glass, 1.0)
    m.rect(0, half, (-half_width * 0.7, 2.6), (half_width * 0.7, 2.85), (40, 190, 240), 1.0, True)
    m.rect(0, -half, (-half_width * 0.8, 1.6), (half_width * 0.8, 2.45), glass, -1.0)
    _wheels(m, [-length * 0.3, length * 0.33], 2 * half_width, 0.48)
    _ends(m, length, 2 * half_width, 0.35, 1.2, braking)
    return m


def _lorry(rng: Random, paint: Color, half_width: float, braking: bool) -> MeshBuilder:
    length, height = rng.uniform(6.2, 9.5), rng.uniform(2.8, 3.6)
    half, cab = length / 2, 1.9
    box = jitter(rng, rng.choice(((232, 232, 232), (214, 222, 226), paint, (150, 120, 70), (70, 90, 190))), 8)
    m = MeshBuilder()
    m.group = 0  # cargo
    m.frustum(
        (-half, half - cab - 0.15, -half_width, half_width, 0.95),
        (-half, half - cab - 0.15, -half_width, half_width, height),
        box,
        scaled(box, 1.05),
    )
    m.frustum(
        (-half, half, -half_width * 0.9, half_width * 0.9, 0.5),
        (-half, half, -half_width * 0.9, half_width * 0.9, 0.95),
        (52, 52, 54),
        (60, 60, 60),
    )
    stripe = jitter(rng, rng.choice(PAINTS), 10)
    for side in (-1.0, 1.0):
        m.rect(
            1, side * half_width, (-half + 0.4, height * 0.55), (half - cab - 0.6, height * 0.8), stripe, side
        )
    m.rect(0, -half, (-0.03, 1.0), (0.03, height - 0.1), scaled(box, 0.55), -1.0)
    m.rect(0, -half, (-half_width * 0.98, 0.95), (half_width * 0.98, 1.05), (60, 60, 62), -1.0)
    _wheels(m, [-length * 0.28, -length * 0.12], 2 * half_width, 0.48)
    _ends(m, length, 2 * half_width, 0.5, 0.95, braking)
    m.group = 1  # cab
    cab_top = min(height, rng.uniform(2.4, 2.9))
    m.frustum(
        (half - cab, half, -half_width * 0.96, half_width * 0.96, 0.5),
        (half - cab + 0.1, half - 0.18, -half_width * 0.92, half_width * 0.92, cab_top),
        paint,
        paint,
    )
    glass = jitter(rng, GLASS, 8)
    m.quad(
        [
            (half - 0.10, -half_width * 0.84, 1.55),
            (half - 0.10, half_width * 0.84, 1.55),
            (half - 0.16, half_width * 0.82, cab_top - 0.2),
            (half - 0.16, -half_width * 0.82, cab_top - 0.2),
        ],
        (1, 0, 0.08),
        glass,
    )
    for side in (-1.0, 1.0):
        m.rect(
            1, side * half_width * 0.95, (half - cab * 0.75, 1.5), (half - 0.35, cab_top - 0.3), glass, side
        )
    _wheels(m, [half - cab * 0.55], 2 * half_width * 0.98, 0.46)
    edge = half_width * 0.96
    for side in (-1.0, 1.0):
        inner, outer = sorted((side * edge * 0.6, side * edge * 0.95))
        m.rect(0, half, (inner, 0.75), (outer, 1.0), (238, 246, 250), 1.0, True)
    m.rect(0, half, (-edge * 0.5, 0.7), (edge * 0.5, 1.2), (40, 40, 42), 1.0)
    return m
