"""What a camera of the rig sees in a scene: pictures, depth and whose every pixel is. Colours after `optics.Look`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from edgekit.rig import Camera
from edgekit.synth import cast, solids
from edgekit.synth.cast import GROUND, SKY, Hits, Scene
from edgekit.synth.optics import Look

Array = np.ndarray

NEAR = 0.3
"""Nothing nearer to the lens (metres along its axis) is drawn."""


@dataclass(frozen=True, eq=False)
class View:
    """image: uint8 [H, W, 3] BGR.  depth: float32 [H, W], metres along the optical axis, inf for the sky.
    owner: int32 [H, W], object number; cast.GROUND, cast.SKY.
    """

    image: Array
    depth: Array
    owner: Array


@lru_cache(maxsize=64)
def _rays(camera: Camera) -> Array:
    """float32 [3, H * W]: direction of each pixel's middle in the ego frame, 1 m along the optical axis."""
    u = (np.arange(camera.width) + 0.5 - camera.cx) / camera.fx
    v = (np.arange(camera.height) + 0.5 - camera.cy) / camera.fy
    grid = np.stack(np.broadcast_arrays(u[None, :], v[:, None], 1.0), -1)
    rays: Array = np.ascontiguousarray((grid.reshape(-1, 3) @ camera.to_ego[:3, :3].T).T.astype(np.float32))
    return rays


def look_at(camera: Camera, scene: Scene) -> tuple[Scene, Hits]:
    """First hit of every pixel. scene: in the ego frame when the picture is taken; returned are its parts in view."""
    corner = scene.bounds() @ camera.from_ego[:3, :3].T + camera.from_ego[:3, 3]
    windows = _windows(camera, corner)
    seen = (windows[:, 1] > windows[:, 0]) & (windows[:, 3] > windows[:, 2])
    scene, windows = scene.keep(seen), windows[seen]
    part, ray = cast.pairs(windows, camera.width)
    rays = _rays(camera)
    cos, sin = np.cos(scene.yaw), np.sin(scene.yaw)
    px, py, pz = (float(v) for v in camera.position)
    dx, dy = px - scene.x, py - scene.y
    table = np.stack([cos * dx + sin * dy, cos * dy - sin * dx, cos, sin]).astype(np.float32)
    ox, oy, c, s = (row[part] for row in table)
    x, y, z = (row[ray] for row in rays)
    down = rays[2]
    ground = np.where(down < -1e-5, -np.float32(pz) / np.minimum(down, -1e-5), np.float32(np.inf)).astype(
        np.float32
    )
    origin = (ox, oy, np.full(len(part), pz, np.float32))
    return scene, cast.nearest(scene, part, ray, origin, (c * x + s * y, c * y - s * x, z), ground, NEAR)


_EDGES = np.array(
    [(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7)]
)


def _windows(camera: Camera, corner: Array) -> Array:
    """int64 [n, 4] for `cast.pairs` of bounding boxes [n, 8, 3] in the camera frame, cut at the near plane."""
    a, b = corner[:, _EDGES[:, 0]], corner[:, _EDGES[:, 1]]
    drop = a[..., 2] - b[..., 2]
    share = (a[..., 2] - NEAR) / np.where(np.abs(drop) < 1e-9, 1e-9, drop)
    crossing = (a[..., 2] > NEAR) != (b[..., 2] > NEAR)
    cut = a + np.where(crossing, share, 0)[..., None] * (b - a)
    points = np.concatenate([corner, cut], 1)
    valid = np.concatenate([corner[..., 2] > NEAR, crossing], 1)
    depth = np.where(valid, np.maximum(points[..., 2], NEAR * 0.99), 1.0)
    u = camera.fx * points[..., 0] / depth + camera.cx
    v = camera.fy * points[..., 1] / depth + camera.cy
    windows = np.empty((len(corner), 4), np.int64)
    for column, value, size in ((0, v, camera.height), (2, u, camera.width)):
        low, high = np.where(valid, value, np.inf).min(1), np.where(valid, value, -np.inf).max(1)
        windows[:, column] = np.clip(np.floor(np.clip(low, -1, size + 1) - 0.5), 0, size)
        windows[:, column + 1] = np.clip(np.ceil(np.clip(high, -1, size + 1) + 0.5), 0, size)
    return windows


def view(
    camera: Camera, scene: Scene, look: Look, ground: Callable[[Array, Array], Array], heading: float, grain: Array,
) -> View:  # fmt: skip
    """scene: in the ego frame when the picture is taken. ground(x, y): kind of ground there, index of `look.ground`.
    heading: of the vehicle in the world, radians. grain: int16 [H, W, 3], the sensor's noise.
    """
    scene, hits = look_at(camera, scene)
    rays = _rays(camera)
    count = len(hits.t)
    level = np.empty((count, 3), np.float32)
    sky = hits.part == SKY
    if sky.any():
        steep = rays[2, sky] / np.sqrt((rays[:, sky] ** 2).sum(0))
        rise = np.clip(steep / 0.6, 0, 1)[:, None] ** 0.7
        level[sky] = look.horizon * (1 - rise) + look.zenith * rise
    hit = np.flatnonzero(~sky)
    t, who = hits.t[hit], hits.part[hit]
    spot = rays[:, hit].T * t[:, None] + np.array(camera.position, np.float32)
    color, normal, shine = _paint(scene, who, hits.face[hit], spot, look, ground)
    sun = _turn(look.sun_from, -heading)
    light = look.ambient + look.sun * np.maximum(normal @ sun, 0.0)[:, None]
    if look.lamps_lit:
        # headlamps: ahead of the vehicle, on what faces it
        far = np.hypot(spot[:, 0], spot[:, 1])
        ahead = np.maximum(spot[:, 0] / np.maximum(far, 1e-3), 0) ** 4
        beam = (0.95 if look.night else 0.4) * np.exp(-far / 26.0) * ahead
        # street lamps light the ground and what stands on it everywhere
        light = light + (beam * (0.45 + 0.55 * np.maximum(-normal[:, 0], 0)) + 0.12)[:, None] * np.array(
            [0.86, 0.97, 1.0], np.float32
        )
    lit = np.where(shine[:, None], color, color * light)
    through = np.exp(-t * look.haze)[:, None]
    level[hit] = lit * through + look.haze_color * (1 - through)
    level = (level * look.gain - 110.0) * look.contrast + 110.0
    level += grain.reshape(-1, 3)
    image = np.clip(level, 0, 255).astype(np.uint8).reshape(camera.height, camera.width, 3)
    owner = np.where(
        hits.part >= 0, scene.owner[np.maximum(hits.part, 0)] if len(scene.owner) else 0, hits.part
    )
    ghost = hits.part >= 0
    ghost[ghost] = scene.parts[hits.part[ghost], cast.GHOST] > 0
    owner[ghost] = GROUND
    shape = (camera.height, camera.width)
    return View(image, hits.t.reshape(shape), owner.reshape(shape).astype(np.int32))


def _turn(vector: Array, angle: float) -> Array:
    cos, sin = math.cos(angle), math.sin(angle)
    x, y, z = (float(v) for v in vector)
    return np.array([cos * x - sin * y, sin * x + cos * y, z], np.float32)


def _paint(
    scene: Scene, who: Array, face: Array, spot: Array, look: Look, ground: Callable[[Array, Array], Array]
) -> tuple[Array, Array, Array]:
    """Colour 0..255 float32 [n, 3], normal float32 [n, 3] and whether it shines by itself, of every hit."""
    count = len(who)
    color = np.empty((count, 3), np.float32)
    normal = np.empty((count, 3), np.float32)
    shine = np.zeros(count, bool)
    on = np.flatnonzero(who >= 0)
    kind = np.full(count, -1, np.int8)
    kind[on] = scene.parts[who[on], cast.KIND].astype(np.int8)
    flat = np.flatnonzero((who == GROUND) | (kind == solids.SHADOW))
    color[flat] = look.ground[ground(spot[flat, 0], spot[flat, 1])]
    normal[flat] = (0.0, 0.0, 1.0)
    color[kind == solids.SHADOW] *= 0.45
    on = on[kind[on] != solids.SHADOW]
    if len(on) == 0:
        return color, normal, shine
    part, side = who[on], face[on]
    local, normal[on] = cast.surface(scene, part, side, spot[on])
    paint = np.ascontiguousarray(scene.parts[:, cast.B : cast.R + 1])[part]
    glows = np.zeros(len(on), bool)
    kinds = kind[on]
    for code, pattern in _PATTERNS.items():
        mine = np.flatnonzero(kinds == code)
        if len(mine):
            rows = scene.parts[part[mine]]
            paint[mine], glows[mine] = pattern(rows, local[mine], side[mine], paint[mine], look.night)
    color[on], shine[on] = paint, glows
    return color, normal, shine


def _fill(paint: Array, *layers: tuple[Array, tuple[float, float, float]]) -> Array:
    for where, color in layers:
        paint[where] = color
    return paint


def _car_body(rows: Array, at: Array, face: Array, paint: Array, night: bool) -> tuple[Array, Array]:
    x, y, z = at.T
    half, edge = rows[:, cast.X1], rows[:, cast.Y1]
    flank = (face == 2) | (face == 3)
    wheel = np.zeros(len(at), bool)
    for place in (-0.62, 0.64):
        wheel |= flank & ((x - place * half) ** 2 + (z - 0.33) ** 2 < 0.36**2)
    middle = rows[:, cast.Z0] + 0.68 * (rows[:, cast.Z1] - rows[:, cast.Z0])
    lamp = (np.abs(y) > 0.6 * edge) & (np.abs(z - middle) < 0.1)
    low = z < rows[:, cast.Z0] + 0.12
    plate = (np.abs(y) < 0.27) & (np.abs(z - rows[:, cast.Z0] - 0.22) < 0.07)
    front, back = face == 1, face == 0
    grille = front & (np.abs(y) < 0.5 * edge) & (np.abs(z - middle) < 0.1)
    paint = _fill(paint, (low, (46, 46, 48)), (wheel, solids.TYRE), (grille, (30, 30, 32)),
                  (plate & (front | back), (214, 222, 226)), (lamp & front, (238, 246, 250)),
                  (lamp & back, (40, 34, 190)))  # fmt: skip
    return paint, lamp & (front | back)


def _cabin(rows: Array, at: Array, face: Array, paint: Array, night: bool) -> tuple[Array, Array]:
    up = (at[:, 2] - rows[:, cast.Z0]) / (rows[:, cast.Z1] - rows[:, cast.Z0])
    middle = (rows[:, cast.X0] + rows[:, cast.X1]) / 2
    pillar = ((face == 2) | (face == 3)) & (np.abs(at[:, 0] - middle) < 0.06)
    pane = (face < 4) & (up > 0.1) & (up < 0.88) & ~pillar
    return _fill(paint, (pane, solids.GLASS)), np.zeros(len(at), bool)


def _coach(rows: Array, at: Array, face: Array, paint: Array, night: bool) -> tuple[Array, Array]:
    x, y, z = at.T
    tall, edge = rows[:, cast.Z1], rows[:, cast.Y1]
    flank, front, back = (face == 2) | (face == 3), face == 1, face == 0
    pane = flank & (z > 1.3) & (z < 0.82 * tall) & (np.mod(x, 1.45) > 0.16)
    pane |= front & (z > 1.1) & (z < 0.84 * tall) & (np.abs(y) < 0.92 * edge)
    pane |= back & (z > 1.6) & (z < 0.82 * tall) & (np.abs(y) < 0.8 * edge)
    board = front & (z > 0.87 * tall) & (z < 0.95 * tall) & (np.abs(y) < 0.7 * edge)
    lamp = (np.abs(np.abs(y) - 0.8 * edge) < 0.16 * edge) & (np.abs(z - 0.85) < 0.14)
    paint[flank & (z < 0.6)] *= 0.55
    shine = board | (lamp & (front | back))
    paint = _fill(paint, (pane, (110, 150, 175) if night else solids.GLASS), (face == 5, (205, 205, 205)),
                  (board, (40, 190, 240)), (lamp & front, (238, 246, 250)), (lamp & back, (40, 34, 190)))  # fmt: skip
    return paint, shine | (pane & night)


def _cargo(rows: Array, at: Array, face: Array, paint: Array, night: bool) -> tuple[Array, Array]:
    up = at[:, 2] / rows[:, cast.Z1]
    stripe = ((face == 2) | (face == 3)) & (up > 0.6) & (up < 0.75)
    paint[stripe] = 0.6 * paint[stripe][:, [2, 0, 1]]
    back = face == 0
    lamp = back & (at[:, 2] < rows[:, cast.Z0] + 0.2) & (np.abs(at[:, 1]) > 0.7 * rows[:, cast.Y1])
    paint[back & (np.abs(at[:, 1]) < 0.05)] *= 0.5
    return _fill(paint, (lamp, (40, 34, 190))), lamp


def _cab(rows: Array, at: Array, face: Array, paint: Array, night: bool) -> tuple[Array, Array]:
    x, y, z = at.T
    edge = rows[:, cast.Y1]
    pane = (z > 1.45) & (z < rows[:, cast.Z1] - 0.2) & ((face == 1) & (np.abs(y) < 0.88 * edge))
    middle = (rows[:, cast.X0] + rows[:, cast.X1]) / 2
    pane |= (
        (z > 1.45) & (z < rows[:, cast.Z1] - 0.25) & ((face == 2) | (face == 3)) & (np.abs(x - middle) < 0.5)
    )
    lamp = (face == 1) & (np.abs(y) > 0.6 * edge) & (np.abs(z - 0.85) < 0.13)
    grille = (face == 1) & (np.abs(y) < 0.5 * edge) & (np.abs(z - 0.95) < 0.25)
    return _fill(paint, (pane, solids.GLASS), (grille, (40, 40, 42)), (lamp, (238, 246, 250))), lamp


def _wall(rows: Array, at: Array, face: Array, paint: Array, night: bool) -> tuple[Array, Array]:
    along = np.where((face == 2) | (face == 3), at[:, 0], at[:, 1])
    across, up = np.mod(along, 3.1), np.mod(at[:, 2] - 0.9, 3.1)
    window = (face < 4) & (across > 0.7) & (across < 2.2) & (up < 1.6) & (at[:, 2] < rows[:, cast.Z1] - 0.6)
    frame = (face < 4) & (at[:, 2] > rows[:, cast.Z1] - 0.45)
    paint[frame] *= 0.7
    number = np.floor(along / 3.1) * 7 + np.floor(at[:, 2] / 3.1) * 13 + np.floor(rows[:, cast.B])
    lit = window & night & (np.mod(number * 0.618, 1.0) < 0.35)
    tone = (0.8 + 0.4 * np.mod(number * 0.382, 1.0)).astype(np.float32)[:, None]
    paint[window] = (np.array((112, 92, 78), np.float32) * tone)[window]
    return _fill(paint, (lit, (120, 190, 225))), lit


def _leaf(rows: Array, at: Array, face: Array, paint: Array, night: bool) -> tuple[Array, Array]:
    clump = np.sin(at[:, 0] * 9.1 + at[:, 2] * 7.3) + np.sin(at[:, 1] * 8.3 - at[:, 2] * 11.0)
    paint *= (0.95 + 0.14 * clump)[:, None].astype(np.float32)
    return paint, np.zeros(len(at), bool)


def _plate(rows: Array, at: Array, face: Array, paint: Array, night: bool) -> tuple[Array, Array]:
    """Signs: coloured in front with a light middle, grey behind. Lit ones are as they are."""
    wide = rows[:, cast.Y1] - rows[:, cast.Y0] > 0.5
    middle = (rows[:, cast.Z0] + rows[:, cast.Z1]) / 2
    radius = np.hypot(at[:, 1], at[:, 2] - middle) / np.maximum(rows[:, cast.Y1], 1e-3)
    paint = _fill(paint, (wide & (radius < 0.55), (228, 230, 232)), (wide & (face != 0), (120, 122, 124)))
    return paint, ~wide


_PATTERNS = {
    solids.CAR_BODY: _car_body,
    solids.CABIN: _cabin,
    solids.COACH: _coach,
    solids.CARGO: _cargo,
    solids.CAB: _cab,
    solids.WALL: _wall,
    solids.LEAF: _leaf,
    solids.PLATE: _plate,
}
