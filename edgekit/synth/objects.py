"""What stands in the street: people, signs, lights, trees, buildings, as meshes; and the class list.

Every function draws its choices from the `random.Random` it is given, so an object looks the same
whenever it is asked for.
"""

from __future__ import annotations

import math
from random import Random

from edgekit.synth.mesh import Color, Mesh, MeshBuilder

CLASSES: tuple[str, ...] = ("car", "truck", "pedestrian", "traffic light", "traffic sign")
CAR, TRUCK, PEDESTRIAN, LIGHT, SIGN = range(5)

PAINTS: tuple[Color, ...] = (
    (235, 236, 238), (198, 200, 203), (150, 152, 156), (92, 92, 96), (40, 40, 44), (38, 36, 150),
    (44, 40, 196), (150, 92, 30), (176, 120, 58), (96, 52, 24), (84, 110, 40), (40, 84, 44),
    (60, 150, 205), (30, 104, 214), (110, 132, 148), (70, 90, 116),
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
    """A lighter (by > 1) or darker shade."""
    return (min(color[0] * by, 255.0), min(color[1] * by, 255.0), min(color[2] * by, 255.0))


def jitter(rng: Random, color: Color, by: float = 14) -> Color:
    """A shade near `color`, each channel up to `by` levels off."""
    b, g, r = (min(max(c + rng.uniform(-by, by), 6.0), 250.0) for c in color)
    return (b, g, r)


def pedestrian(rng: Random, phase: float, along: bool) -> Mesh:
    """Someone 1.5 to 1.95 m tall, walking along the street or across it.

    `phase`: 0..1 of a double step, below 0 for someone who stands.
    """
    height = rng.uniform(1.5, 1.95)
    coat, trousers = jitter(rng, rng.choice(CLOTHES)), jitter(rng, rng.choice(CLOTHES), 10)
    skin, hair = (
        jitter(rng, rng.choice(SKIN), 8),
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
        m.quad(
            [
                (0, top - thick, hip),
                (0, top + thick, hip),
                (0, foot + thick * 0.7, lift + 0.06),
                (0, foot - thick * 0.7, lift + 0.06),
            ],
            (-1, 0, 0),
            cloth,
        )
        m.rect(0, 0, (foot - thick, lift), (foot + thick, lift + 0.08), (30, 30, 34))
    for sign in (-1.0, 1.0):
        hand = sign * broad * (1.25 if along else 0.6) - (0 if along else step * sign * 0.8)
        m.quad(
            [
                (0, sign * broad * 0.75, shoulder),
                (0, sign * broad * 1.08, shoulder - 0.03),
                (0, hand + 0.045, hip * 0.98),
                (0, hand - 0.045, hip * 0.98),
            ],
            (-1, 0, 0),
            scaled(coat, 0.78),
        )
    hem = hip * (0.62 if long_coat else 0.95)
    m.quad(
        [(0, -broad, shoulder), (0, broad, shoulder), (0, broad * 0.86, hem), (0, -broad * 0.86, hem)],
        (-1, 0, 0),
        coat,
    )
    if bag:
        side = rng.choice((-1.0, 1.0)) * broad
        m.rect(0, 0, (side - 0.13, hip * 0.8), (side + 0.13, hip * 1.25), jitter(rng, rng.choice(CLOTHES)))
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
        m.quad(
            [(0, -0.1 * r, -0.6 * r), (0, 0.1 * r, -0.6 * r), (0, 0.1 * r, 0.2 * r), (0, -0.1 * r, 0.2 * r)],
            (-1, 0, 0),
            white,
        )
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
        m.quad(
            [
                (0, -0.6 * r, 0.5 * r),
                (0, -0.45 * r, 0.65 * r),
                (0, 0.6 * r, -0.5 * r),
                (0, 0.45 * r, -0.65 * r),
            ],
            (-1, 0, 0),
            red,
        )
    return m.build()


def traffic_light(rng: Random, state: str) -> Mesh:
    """Housing with three lamps, 0.4 x 1.05 m, centred at the origin; `state`: red, yellow or green is lit."""
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
    """Post at the origin, with an arm at its top that reaches `arm` metres to the left (< 0: right)."""
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
    leaf = jitter(
        rng, rng.choice(((36, 92, 44), (40, 110, 66), (30, 78, 48), (44, 120, 110), (36, 84, 84))), 10
    )
    m.rect(0, 0, (-0.14, 0), (0.14, height * 0.55), (44, 62, 80))
    if rng.random() < 0.25:
        for i in range(4):
            base, wide = height * (0.2 + 0.19 * i), height * 0.23 * (1 - 0.2 * i)
            m.quad(
                [(0, -wide, base), (0, wide, base), (0, 0, base + height * 0.36)],
                (-1, 0, 0),
                scaled(leaf, 0.72 + 0.1 * i),
            )
        return m.build()
    for i in range(7):
        across, up = rng.uniform(-0.2, 0.2) * height, height * (0.5 + 0.055 * i + rng.uniform(-0.04, 0.04))
        wide = height * rng.uniform(0.13, 0.2)
        m.disc(
            0, 0, (across, up), (wide, wide * 0.85), scaled(leaf, 0.68 + 0.075 * i), turn=rng.uniform(0, 45)
        )
    return m.build()


def building(rng: Random, front: float, depth: float, side: float, night: bool, low_rise: bool) -> Mesh:
    """House from x = 0 to `front` and from y = 0 away from the street (`side` 1: left, -1: right of it)."""
    m = MeshBuilder()
    wall = jitter(rng, rng.choice(WALLS), 14)
    storey = rng.uniform(2.9, 3.5)
    storeys = rng.randint(1, 3) if low_rise else rng.randint(3, 9)
    height = storeys * storey + 0.6
    far = side * depth
    facing = -side
    m.rect(0, 0.0, (min(0.0, far), 0), (max(0.0, far), height), scaled(wall, 0.86))
    m.rect(1, 0.0, (0.0, 0.0), (front, height), wall, facing)
    m.rect(1, 0.0, (0.0, height - 0.45), (front, height), scaled(wall, 0.7), facing)
    shop = not low_rise and rng.random() < 0.6
    glass, frame = jitter(rng, (112, 92, 78), 22), scaled(wall, rng.choice((0.62, 1.25)))
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
            color = jitter(rng, (120, 190, 225), 24) if lit else scaled(glass, rng.uniform(0.8, 1.15))
            m.rect(1, 0.0, (x, z), (x + step * 0.5, z + storey * 0.52), color, facing, lit)
    if shop:
        awning = jitter(rng, rng.choice(PAINTS), 10)
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
        roof = jitter(rng, rng.choice(((48, 56, 120), (60, 62, 70), (70, 84, 110))), 8)
        rise = rng.uniform(1.4, 2.6)
        m.quad(
            [
                (0, 0, height),
                (front, 0, height),
                (front, side * depth / 2, height + rise),
                (0, side * depth / 2, height + rise),
            ],
            (0, facing * rise, depth / 2),
            roof,
        )
        m.quad(
            [(0, 0, height), (0, far, height), (0, side * depth / 2, height + rise)],
            (-1, 0, 0),
            scaled(wall, 0.8),
        )
    return m.build()
