"""What stands and moves in the street: vehicles, people, signs, lights, trees, buildings, as meshes.

Every function draws its choices from the `random.Random` it is given, so an object looks the same
whenever it is asked for.
"""

from __future__ import annotations

import math
from random import Random

from edgekit.synth.mesh import Color, Mesh, MeshBuilder, Point

CLASSES: tuple[str, ...] = ("car", "truck", "pedestrian", "traffic light", "traffic sign")
CAR, TRUCK, PEDESTRIAN, LIGHT, SIGN = range(5)

GLASS: Color = (72, 58, 46)
TYRE: Color = (26, 25, 25)
PAINTS: tuple[Color, ...] = (
    (235, 236, 238), (198, 200, 203), (150, 152, 156), (92, 92, 96), (40, 40, 44), (38, 36, 150), (44, 40, 196),
    (150, 92, 30), (176, 120, 58), (96, 52, 24), (84, 110, 40), (40, 84, 44), (60, 150, 205), (30, 104, 214),
    (110, 132, 148), (70, 90, 116),
)  # fmt: skip
WALLS: tuple[Color, ...] = (
    (108, 128, 160), (84, 98, 142), (150, 166, 186), (182, 196, 206), (142, 148, 152), (110, 112, 116),
    (96, 122, 150), (160, 176, 166), (128, 110, 96), (176, 158, 140), (70, 78, 108), (196, 206, 214),
)  # fmt: skip
CLOTHES: tuple[Color, ...] = (
    (40, 36, 34), (90, 60, 30), (60, 60, 140), (36, 36, 170), (150, 140, 130), (220, 218, 214), (60, 110, 60),
    (40, 130, 190), (120, 80, 120), (30, 90, 200), (160, 110, 60), (80, 80, 84),
)  # fmt: skip
SKIN: tuple[Color, ...] = ((150, 180, 224), (120, 156, 206), (84, 116, 168), (58, 80, 122))


def scaled(color: Color, by: float) -> Color:
    return (min(color[0] * by, 255.0), min(color[1] * by, 255.0), min(color[2] * by, 255.0))


def _jitter(rng: Random, color: Color, by: float = 14) -> Color:
    b, g, r = (min(max(c + rng.uniform(-by, by), 6.0), 250.0) for c in color)
    return (b, g, r)


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
    paint = _jitter(rng, rng.choice(PAINTS), 10)
    length, width, height = {
        "saloon": (4.6, 1.8, 1.44), "hatch": (3.95, 1.74, 1.5), "suv": (4.5, 1.9, 1.72), "van": (4.9, 1.95, 2.05),
    }[kind]  # fmt: skip
    length, height = length * rng.uniform(0.95, 1.06), height * rng.uniform(0.96, 1.05)
    low, waist = 0.27, height * (0.58 if kind != "van" else 0.52)
    half, edge = length / 2, width / 2
    rear0, rear1, front1, front0 = {  # cabin along the car: rear base, rear top, front top, front base
        "saloon": (-0.36, -0.22, 0.06, 0.22), "hatch": (-0.49, -0.40, 0.08, 0.24),
        "suv": (-0.49, -0.43, 0.10, 0.24), "van": (-0.5, -0.485, 0.22, 0.40),
    }[kind]  # fmt: skip
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
    glass = _jitter(rng, GLASS, 10)
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
    """Box truck, lorry or bus; 6.5 to 11 m long, 2.8 to 3.6 m high."""
    bus = rng.random() < 0.3
    paint = _jitter(rng, rng.choice(PAINTS), 10)
    width = rng.uniform(2.3, 2.5)
    half_width = width / 2
    if bus:
        length, height = rng.uniform(9.5, 11.0), rng.uniform(2.9, 3.2)
        half = length / 2
        m = MeshBuilder()
        m.frustum((-half, half, -half_width, half_width, 0.35), (-half, half, -half_width, half_width, height),
                  paint, (225, 225, 225))  # fmt: skip
        glass = _jitter(rng, GLASS, 8)
        for side in (-1.0, 1.0):
            m.rect(1, side * half_width, (-half, 0.35), (half, 0.6), scaled(paint, 0.55), side)
            panes = 7
            for i in range(panes):
                x0 = -half + 0.3 + i * (length - 0.5) / panes
                m.rect(
                    1, side * half_width, (x0, 1.35), (x0 + (length - 0.5) / panes - 0.14, 2.45), glass, side
                )
        m.rect(0, half, (-half_width * 0.92, 1.15), (half_width * 0.92, 2.5), glass, 1.0)
        m.rect(0, half, (-half_width * 0.7, 2.6), (half_width * 0.7, 2.85), (40, 190, 240), 1.0, True)
        m.rect(0, -half, (-half_width * 0.8, 1.6), (half_width * 0.8, 2.45), glass, -1.0)
        _wheels(m, [-length * 0.3, length * 0.33], width, 0.48)
        _ends(m, length, width, 0.35, 1.2, braking)
        return m.build(heading)

    length, height = rng.uniform(6.2, 9.5), rng.uniform(2.8, 3.6)
    half, cab = length / 2, 1.9
    box = _jitter(
        rng, rng.choice(((232, 232, 232), (214, 222, 226), paint, (150, 120, 70), (70, 90, 190))), 8
    )
    m = MeshBuilder()
    m.group = 0  # cargo
    m.frustum((-half, half - cab - 0.15, -half_width, half_width, 0.95),
              (-half, half - cab - 0.15, -half_width, half_width, height), box, scaled(box, 1.05))  # fmt: skip
    m.frustum((-half, half, -half_width * 0.9, half_width * 0.9, 0.5),
              (-half, half, -half_width * 0.9, half_width * 0.9, 0.95), (52, 52, 54), (60, 60, 60))  # fmt: skip
    stripe = _jitter(rng, rng.choice(PAINTS), 10)
    for side in (-1.0, 1.0):
        m.rect(
            1, side * half_width, (-half + 0.4, height * 0.55), (half - cab - 0.6, height * 0.8), stripe, side
        )
    m.rect(0, -half, (-0.03, 1.0), (0.03, height - 0.1), scaled(box, 0.55), -1.0)
    m.rect(0, -half, (-half_width * 0.98, 0.95), (half_width * 0.98, 1.05), (60, 60, 62), -1.0)
    _wheels(m, [-length * 0.28, -length * 0.12], width, 0.48)
    _ends(m, length, width, 0.5, 0.95, braking)
    m.group = 1  # cab
    cab_top = min(height, rng.uniform(2.4, 2.9))
    m.frustum((half - cab, half, -half_width * 0.96, half_width * 0.96, 0.5),
              (half - cab + 0.1, half - 0.18, -half_width * 0.92, half_width * 0.92, cab_top), paint, paint)  # fmt: skip
    glass = _jitter(rng, GLASS, 8)
    m.quad([(half - 0.10, -half_width * 0.84, 1.55), (half - 0.10, half_width * 0.84, 1.55),
            (half - 0.16, half_width * 0.82, cab_top - 0.2), (half - 0.16, -half_width * 0.82, cab_top - 0.2)],
           (1, 0, 0.08), glass)  # fmt: skip
    for side in (-1.0, 1.0):
        m.rect(
            1, side * half_width * 0.95, (half - cab * 0.75, 1.5), (half - 0.35, cab_top - 0.3), glass, side
        )
    _wheels(m, [half - cab * 0.55], width * 0.98, 0.46)
    edge = half_width * 0.96
    for side in (-1.0, 1.0):
        inner, outer = sorted((side * edge * 0.6, side * edge * 0.95))
        m.rect(0, half, (inner, 0.75), (outer, 1.0), (238, 246, 250), 1.0, True)
    m.rect(0, half, (-edge * 0.5, 0.7), (edge * 0.5, 1.2), (40, 40, 42), 1.0)
    return m.build(heading)


def pedestrian(rng: Random, phase: float, along: bool) -> Mesh:
    """Someone 1.5 to 1.95 m tall, facing the camera's way (`along`) or crossing; `phase` 0..1 of a step, < 0 stands."""
    height = rng.uniform(1.5, 1.95)
    coat, trousers = _jitter(rng, rng.choice(CLOTHES)), _jitter(rng, rng.choice(CLOTHES), 10)
    skin, hair = (
        _jitter(rng, rng.choice(SKIN), 8),
        rng.choice(((24, 24, 28), (30, 50, 80), (70, 120, 160), (90, 90, 92))),
    )
    hip, shoulder = height * rng.uniform(0.46, 0.5), height * 0.83
    broad = height * (0.135 if along else 0.10)
    long_coat, bag, hat = rng.random() < 0.25, rng.random() < 0.3, rng.random() < 0.2
    swing = math.sin(2 * math.pi * phase) if phase >= 0 else 0.12
    step = height * (0.05 if along else 0.20) * swing
    apart = height * (0.055 if along else 0.012)
    thick = height * 0.045
    m = MeshBuilder()
    for sign, shade in ((-1.0, 0.8), (1.0, 1.0)):
        foot, top = sign * (apart + step), sign * apart
        lift = max(0.0, sign * swing) * 0.05 if phase >= 0 else 0.0
        cloth = scaled(trousers, shade)
        m.quad([(0, top - thick, hip), (0, top + thick, hip), (0, foot + thick * 0.7, lift + 0.06),
                (0, foot - thick * 0.7, lift + 0.06)], (-1, 0, 0), cloth)  # fmt: skip
        m.rect(0, 0, (foot - thick, lift), (foot + thick, lift + 0.08), (30, 30, 34))
    for sign in (-1.0, 1.0):
        hand = sign * broad * (1.25 if along else 0.6) - (0 if along else step * sign * 0.8)
        m.quad([(0, sign * broad * 0.75, shoulder), (0, sign * broad * 1.08, shoulder - 0.03),
                (0, hand + 0.045, hip * 0.98), (0, hand - 0.045, hip * 0.98)], (-1, 0, 0), scaled(coat, 0.78))  # fmt: skip
    hem = hip * (0.62 if long_coat else 0.95)
    m.quad([(0, -broad, shoulder), (0, broad, shoulder), (0, broad * 0.86, hem), (0, -broad * 0.86, hem)],
           (-1, 0, 0), coat)  # fmt: skip
    if bag:
        side = rng.choice((-1.0, 1.0)) * broad
        m.rect(0, 0, (side - 0.13, hip * 0.8), (side + 0.13, hip * 1.25), _jitter(rng, rng.choice(CLOTHES)))
    head = height * 0.072
    m.rect(0, 0, (-head * 0.4, shoulder - 0.01), (head * 0.4, height - head * 1.6), scaled(skin, 0.85))
    m.disc(0, 0, (0, height - head * 1.1), (head * 0.85, head * 1.1), skin)
    m.rect(0, 0, (-head * 0.8, height - head * (1.0 if hat else 0.75)), (head * 0.8, height), hair)
    return m.build()


def sign(rng: Random) -> Mesh:
    """The plate of a traffic sign facing the camera, 0.6 to 0.95 m, centred at the origin."""
    r = rng.uniform(0.32, 0.46)
    red, white, blue, black, yellow = (
        (36, 30, 200),
        (236, 238, 240),
        (176, 88, 26),
        (30, 30, 30),
        (40, 190, 245),
    )
    kind = rng.choice(("limit", "warning", "stop", "no entry", "way", "priority", "walk", "no parking"))
    m = MeshBuilder()
    if kind == "limit":
        m.disc(0, 0, (0, 0), r, red)
        m.disc(0, 0, (0, 0), r * 0.76, white)
        for left in (-0.42, 0.06):
            m.rect(0, 0, (left * r, -0.34 * r), ((left + 0.34) * r, 0.34 * r), black)
            m.rect(0, 0, ((left + 0.11) * r, -0.2 * r), ((left + 0.23) * r, 0.2 * r), white)
    elif kind == "warning":
        m.quad([(0, -r, -0.75 * r), (0, r, -0.75 * r), (0, 0, r)], (-1, 0, 0), red)
        m.quad([(0, -0.66 * r, -0.56 * r), (0, 0.66 * r, -0.56 * r), (0, 0, 0.62 * r)], (-1, 0, 0), white)
        m.rect(0, 0, (-0.08 * r, -0.3 * r), (0.08 * r, 0.3 * r), black)
    elif kind == "stop":
        m.disc(0, 0, (0, 0), r * 1.05, white)
        m.disc(0, 0, (0, 0), r * 0.97, red)
        for left in (-0.66, -0.3, 0.06, 0.42):
            m.rect(0, 0, (left * r, -0.22 * r), ((left + 0.24) * r, 0.22 * r), white)
    elif kind == "no entry":
        m.disc(0, 0, (0, 0), r, red)
        m.rect(0, 0, (-0.7 * r, -0.16 * r), (0.7 * r, 0.16 * r), white)
    elif kind == "way":
        m.disc(0, 0, (0, 0), r, blue)
        m.quad([(0, -0.1 * r, -0.6 * r), (0, 0.1 * r, -0.6 * r), (0, 0.1 * r, 0.2 * r), (0, -0.1 * r, 0.2 * r)],
               (-1, 0, 0), white)  # fmt: skip
        m.quad([(0, -0.4 * r, 0.15 * r), (0, 0.4 * r, 0.15 * r), (0, 0, 0.65 * r)], (-1, 0, 0), white)
    elif kind == "priority":
        m.quad([(0, 0, -r), (0, r, 0), (0, 0, r), (0, -r, 0)], (-1, 0, 0), white)
        m.quad([(0, 0, -0.72 * r), (0, 0.72 * r, 0), (0, 0, 0.72 * r), (0, -0.72 * r, 0)], (-1, 0, 0), yellow)
    elif kind == "walk":
        m.rect(0, 0, (-0.85 * r, -0.85 * r), (0.85 * r, 0.85 * r), blue)
        m.quad([(0, -0.6 * r, -0.6 * r), (0, 0.6 * r, -0.6 * r), (0, 0, 0.62 * r)], (-1, 0, 0), white)
        m.rect(0, 0, (-0.1 * r, -0.5 * r), (0.1 * r, 0.2 * r), black)
    else:
        m.disc(0, 0, (0, 0), r, red)
        m.disc(0, 0, (0, 0), r * 0.78, blue)
        m.quad([(0, -0.6 * r, 0.5 * r), (0, -0.45 * r, 0.65 * r), (0, 0.6 * r, -0.5 * r), (0, 0.45 * r, -0.65 * r)],
               (-1, 0, 0), red)  # fmt: skip
    return m.build()


def traffic_light(rng: Random, state: str) -> Mesh:
    """Housing with three lamps facing the camera, 0.4 x 1.05 m, centred at the origin; state: red, yellow, green."""
    m = MeshBuilder()
    case = rng.choice(((34, 36, 36), (40, 60, 44), (30, 150, 200)))
    m.rect(0, 0, (-0.2, -0.52), (0.2, 0.52), case)
    m.rect(0, 0, (-0.17, -0.49), (0.17, 0.49), (24, 24, 24))
    for name, z, on, off in (
        ("red", 0.32, (48, 40, 255), (16, 14, 66)),
        ("yellow", 0.0, (50, 200, 255), (14, 44, 60)),
        ("green", -0.32, (130, 250, 60), (34, 54, 16)),
    ):
        lit = name == state
        m.disc(0, 0, (0, z), 0.135, on if lit else off, glow=lit)
        if lit:
            m.lamp((0, 0, z), 0.9, on, -1.0)
    return m.build()


def pole(height: float, thick: float = 0.04, arm: float = 0.0) -> Mesh:
    """Post at the origin with an optional arm at its top reaching `arm` metres to the left (negative: right)."""
    m = MeshBuilder()
    m.rect(0, 0, (-thick, 0), (thick, height), (112, 112, 114))
    if arm:
        m.rect(0, 0, (min(arm, 0.0), height - 0.12), (max(arm, 0.0), height), (104, 104, 106))
    return m.build()


def street_lamp(reach: float) -> Mesh:
    """Lamp post 7 m high whose head hangs `reach` metres to the left."""
    m = MeshBuilder()
    m.rect(0, 0, (-0.07, 0), (0.07, 7.0), (98, 98, 100))
    m.rect(0, 0, (min(reach, 0.0), 6.9), (max(reach, 0.0), 7.0), (98, 98, 100))
    m.rect(0, 0, (reach - 0.3, 6.82), (reach + 0.3, 6.98), (190, 225, 245), glow=True)
    m.lamp((0, reach, 6.85), 1.5, (120, 190, 240), 0.0)
    return m.build()


def tree(rng: Random) -> Mesh:
    """Broad-leaved tree or conifer, 4 to 9 m high."""
    m = MeshBuilder()
    height = rng.uniform(4.2, 9.0)
    leaf = _jitter(
        rng, rng.choice(((36, 92, 44), (40, 110, 66), (30, 78, 48), (44, 120, 110), (36, 84, 84))), 10
    )
    m.rect(0, 0, (-0.14, 0), (0.14, height * 0.55), (44, 62, 80))
    if rng.random() < 0.25:
        for i in range(4):
            base, wide = height * (0.2 + 0.19 * i), height * 0.23 * (1 - 0.2 * i)
            m.quad([(0, -wide, base), (0, wide, base), (0, 0, base + height * 0.36)], (-1, 0, 0),
                   scaled(leaf, 0.72 + 0.1 * i))  # fmt: skip
        return m.build()
    for i in range(7):
        across, up = rng.uniform(-0.2, 0.2) * height, height * (0.5 + 0.055 * i + rng.uniform(-0.04, 0.04))
        wide = height * rng.uniform(0.13, 0.2)
        m.disc(
            0, 0, (across, up), (wide, wide * 0.85), scaled(leaf, 0.68 + 0.075 * i), turn=rng.uniform(0, 45)
        )
    return m.build()


def building(rng: Random, front: float, depth: float, side: float, night: bool, low_rise: bool) -> Mesh:
    """House along x in 0..front, from y=0 away from the street (`side` +1: left of it), windows on two faces."""
    m = MeshBuilder()
    wall = _jitter(rng, rng.choice(WALLS), 14)
    storey = rng.uniform(2.9, 3.5)
    storeys = rng.randint(1, 3) if low_rise else rng.randint(3, 9)
    height = storeys * storey + 0.6
    far = side * depth
    facing = -side
    m.rect(0, 0.0, (min(0.0, far), 0), (max(0.0, far), height), scaled(wall, 0.86))
    m.rect(1, 0.0, (0.0, 0.0), (front, height), wall, facing)
    m.rect(1, 0.0, (0.0, height - 0.45), (front, height), scaled(wall, 0.7), facing)
    shop = not low_rise and rng.random() < 0.6
    glass, frame = _jitter(rng, (112, 92, 78), 22), scaled(wall, rng.choice((0.62, 1.25)))
    step = rng.uniform(2.4, 3.6)
    columns = max(1, int((front - 0.8) / step))
    rows = min(storeys, 6)
    for row in range(1 if shop else 0, rows):
        z = 0.9 + row * storey
        if rng.random() < 0.3:
            m.rect(1, 0.0, (0.0, z - 0.55), (front, z - 0.4), frame, facing)
        for column in range(columns):
            x = 0.8 + column * (front - 0.8) / columns
            lit = night and rng.random() < 0.35
            color = _jitter(rng, (120, 190, 225), 24) if lit else scaled(glass, rng.uniform(0.8, 1.15))
            m.rect(1, 0.0, (x, z), (x + step * 0.5, z + storey * 0.52), color, facing, lit)
    if shop:
        awning = _jitter(rng, rng.choice(PAINTS), 10)
        lit = night and rng.random() < 0.6
        m.rect(
            1,
            0.0,
            (0.4, 0.3),
            (front - 0.4, 2.5),
            (150, 195, 215) if lit else scaled(glass, 0.8),
            facing,
            lit,
        )
        m.rect(1, 0.0, (0.2, 2.5), (front - 0.2, 3.1), awning, facing, night and rng.random() < 0.4)
        for i in range(1, max(2, int(front / 3))):
            m.rect(1, 0.0, (i * 3.0 - 0.12, 0.0), (i * 3.0 + 0.12, 2.5), wall, facing)
    for row in range(rows):
        for column in range(max(1, min(4, int(depth / 3.2)))):
            a = side * (1.0 + column * 3.2)
            lit = night and rng.random() < 0.3
            color = (110, 180, 215) if lit else scaled(glass, 0.85)
            low, high = sorted((a, a + side * 1.3))
            m.rect(0, 0.0, (low, 0.9 + row * storey), (high, 0.9 + row * storey + 1.4), color, glow=lit)
    if low_rise:
        roof = _jitter(rng, rng.choice(((48, 56, 120), (60, 62, 70), (70, 84, 110))), 8)
        rise = rng.uniform(1.4, 2.6)
        m.quad([(0, 0, height), (front, 0, height), (front, side * depth / 2, height + rise),
                (0, side * depth / 2, height + rise)], (0, facing * rise, depth / 2), roof)  # fmt: skip
        m.quad(
            [(0, 0, height), (0, far, height), (0, side * depth / 2, height + rise)],
            (-1, 0, 0),
            scaled(wall, 0.8),
        )
    return m.build()
