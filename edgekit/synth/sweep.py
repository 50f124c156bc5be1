"""One turn of a spinning LiDAR through a scene: rings, intensity, noise, lost returns, motion during the turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgekit.rig import Lidar
from edgekit.synth import cast, solids
from edgekit.synth.cast import GROUND, SKY, Scene

Array = np.ndarray


@dataclass(frozen=True)
class Spinner:
    """A LiDAR whose rings turn clockwise (seen from above), all firing at once at every azimuth.

    rings, azimuths: rays per turn.  low, high: elevation of the lowest and highest ring, degrees.  start: heading in
    the ego frame at which a turn begins and ends, degrees.  reach: metres.  noise: of a range, metres (standard
    deviation).  lost: share of returns that never come; far, dark, glass and grazed surfaces lose more.
    """

    rings: int = 32
    azimuths: int = 720
    low: float = -30.67
    high: float = 10.67
    start: float = 105.0
    reach: float = 90.0
    noise: float = 0.02
    lost: float = 0.03

    def delay_ms(self, heading: float, period_ms: float) -> float:
        """When the beam passes `heading` (degrees in the ego frame), from the end of the turn: -period_ms..0."""
        return period_ms * (((self.start - heading) % 360.0) / 360.0 - 1.0)


@dataclass(frozen=True, eq=False)
class Sweep:
    """points: float32 [n, 5], `rig.POINT_FIELDS`, lidar frame at the end of the turn, the vehicle's motion taken out.
    rings: int16 [n].  owner: int32 [n], object number of the scene, cast.GROUND for the ground.
    """

    points: Array
    rings: Array
    owner: Array


def sweep(
    spinner: Spinner, lidar: Lidar, scene: Scene, motion: Callable[[float], tuple[float, float, float]],
    ground: Callable[[Array, Array], Array], rng: np.random.Generator, rain: float = 0.0,
) -> Sweep:  # fmt: skip
    """scene: in the ego frame at the end of the turn, as it is then. motion(dt): x, y, yaw of the vehicle in that
    frame, dt <= 0 s from the end. ground(x, y): reflectance, float32, of the ground at points of that frame. rng:
    used the same number of times whatever is seen.
    """
    rings, columns = spinner.rings, spinner.azimuths
    scene = scene.keep(scene.parts[:, cast.GHOST] == 0)
    turn = (np.arange(columns) + 0.5) / columns
    dt = (turn - 1.0) * lidar.period_ms / 1e3
    heading = math.radians(spinner.start) - 2 * math.pi * turn
    elevation = np.radians(np.linspace(spinner.low, spinner.high, rings))
    # the vehicle's pose at every column: a straight line between a few exact ones
    knots = np.linspace(-lidar.period_ms / 1e3, 0.0, 5)
    poses = np.array([motion(float(k)) for k in knots])
    ego_x, ego_y, ego_yaw = (np.interp(dt, knots, poses[:, i]) for i in range(3))

    mount = lidar.to_ego
    yaw = math.atan2(mount[1, 0], mount[0, 0])
    azimuth = heading - yaw
    rays = np.empty((rings, columns, 3))
    rays[..., 0] = np.cos(elevation)[:, None] * np.cos(azimuth)
    rays[..., 1] = np.cos(elevation)[:, None] * np.sin(azimuth)
    rays[..., 2] = np.sin(elevation)[:, None]
    rays = rays @ mount[:3, :3].T
    cos, sin = np.cos(ego_yaw), np.sin(ego_yaw)
    rays[..., 0], rays[..., 1] = (
        cos * rays[..., 0] - sin * rays[..., 1],
        sin * rays[..., 0] + cos * rays[..., 1],
    )
    start_x = cos * mount[0, 3] - sin * mount[1, 3] + ego_x
    start_y = sin * mount[0, 3] + cos * mount[1, 3] + ego_y
    height = float(mount[2, 3])

    windows = _windows(spinner, scene, mount, elevation, zip(knots[::2], poses[::2], strict=True))
    part, ray = cast.pairs(windows, columns)
    column = ray % np.int32(columns)
    direction = [a.reshape(-1).astype(np.float32) for a in np.moveaxis(rays, 2, 0)]
    # the beam's start in the frame of every part, when the column fires
    ox, oy = start_x[column] - scene.x[part], start_y[column] - scene.y[part]
    moving = (scene.vx != 0) | (scene.vy != 0)
    if moving.any():
        ox -= scene.vx[part] * dt[column]
        oy -= scene.vy[part] * dt[column]
    c, s = np.cos(scene.yaw)[part], np.sin(scene.yaw)[part]
    origin = ((c * ox + s * oy).astype(np.float32), (c * oy - s * ox).astype(np.float32),
              np.full(len(part), height, np.float32))  # fmt: skip
    c, s = c.astype(np.float32), s.astype(np.float32)
    dx, dy, dz = (a[ray] for a in direction)
    flat = direction[2]
    below = np.where(flat < -1e-4, -height / np.minimum(flat, -1e-4), np.inf).astype(np.float32)
    hits = cast.nearest(scene, part, ray, origin, (c * dx + s * dy, c * dy - s * dx, dz), below, 0.3)

    noise = rng.standard_normal((2, rings * columns), dtype=np.float32)
    luck = rng.random(rings * columns, dtype=np.float32)
    seen = np.flatnonzero((hits.part != SKY) & (hits.t < spinner.reach))
    t, who, col = hits.t[seen], hits.part[seen], seen % columns
    aim = np.stack([a[seen] for a in direction], 1)
    start = np.stack([start_x[col], start_y[col], np.full(len(seen), height)], 1)
    spot = start + t[:, None] * aim
    reflect, facing = np.empty(len(seen), np.float32), np.empty(len(seen), np.float32)
    on_ground = who == GROUND
    reflect[on_ground] = ground(spot[on_ground, 0], spot[on_ground, 1])
    facing[on_ground] = -aim[on_ground, 2]
    solid = np.flatnonzero(~on_ground)
    if len(solid):
        still = spot[solid].astype(
            np.float32
        )  # where it would be hit if things stood as at the end of the turn
        still[:, 0] -= (scene.vx[who[solid]] * dt[col[solid]]).astype(np.float32)
        still[:, 1] -= (scene.vy[who[solid]] * dt[col[solid]]).astype(np.float32)
        local, normal = cast.surface(scene, who[solid], hits.face[seen[solid]], still)
        reflect[solid] = scene.parts[who[solid], cast.REFLECT] * _glass(scene, who[solid], local)
        facing[solid] = np.abs(np.einsum("ij,ij->i", normal, aim[solid]))
    intensity = np.clip(reflect * (0.35 + 0.65 * facing) * (1 + 0.1 * noise[1, seen]), 0.0, 1.0)
    # what comes back falls with the square of the range; a return is lost where too little is left
    strength = reflect * np.maximum(facing, 0.02) * (spinner.reach / np.maximum(t, 1.0)) ** 2
    chance = (1 - spinner.lost) * np.exp(-rain * t / 60) * np.clip(strength / 0.25, 0.0, 1.0)
    back = luck[seen] < chance
    seen, t, aim, start = seen[back], t[back], aim[back], start[back]
    spot = start + (t + spinner.noise * noise[0, seen])[:, None] * aim
    points = np.empty((len(seen), 5), np.float32)
    points[:, :3] = spot @ lidar.from_ego[:3, :3].T + lidar.from_ego[:3, 3]
    points[:, 3], points[:, 4] = intensity[back], dt[col[back]]
    who = who[back]
    owner = np.where(who == GROUND, GROUND, scene.owner[np.maximum(who, 0)] if len(scene.owner) else GROUND)
    return Sweep(points, (seen // columns).astype(np.int16), owner.astype(np.int32))


def _windows(
    spinner: Spinner, scene: Scene, mount: Array, elevation: Array, when: zip[tuple[float, Array]]
) -> Array:
    """int64 [n, 4] for `cast.pairs`: the rings and columns that can meet each part at any time of the turn."""
    count = len(scene.parts)
    p = scene.parts
    tilt = math.acos(min(1.0, float(mount[2, 2]))) + 1e-3
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    left, right = np.full(count, np.inf), np.full(count, -np.inf)
    around = np.zeros(count, bool)
    middle = np.zeros(count)
    for number, (dt, (x, y, yaw)) in enumerate(when):
        view = scene.after(dt).seen_from(x, y, yaw)
        corner = view.bounds() - mount[:3, 3]
        angle = np.arctan2(corner[..., 1], corner[..., 0])
        if number == 0:
            middle = np.arctan2(corner[..., 1].mean(1), corner[..., 0].mean(1))
        turned = (angle - middle[:, None] + math.pi) % (2 * math.pi) - math.pi
        left, right = np.minimum(left, turned.min(1)), np.maximum(right, turned.max(1))
        # nearest and farthest distance of its ground plan
        cos, sin = np.cos(view.yaw), np.sin(view.yaw)
        sx, sy = mount[0, 3] - view.x, mount[1, 3] - view.y
        lx, ly = cos * sx + sin * sy, cos * sy - sin * sx
        x0, x1 = np.minimum(p[:, cast.X0], p[:, cast.TX0]), np.maximum(p[:, cast.X1], p[:, cast.TX1])
        y0, y1 = np.minimum(p[:, cast.Y0], p[:, cast.TY0]), np.maximum(p[:, cast.Y1], p[:, cast.TY1])
        near = np.hypot(
            np.maximum(np.maximum(x0 - lx, lx - x1), 0), np.maximum(np.maximum(y0 - ly, ly - y1), 0)
        )
        far = np.hypot(corner[..., 0], corner[..., 1]).max(1)
        around |= near < 0.3
        top, bottom = corner[:, 4, 2], corner[:, 0, 2]
        high = np.maximum(high, np.arctan2(top, np.where(top > 0, near, far)))
        low = np.minimum(low, np.arctan2(bottom, np.where(bottom < 0, near, far)))
    around |= right - left > 0.9 * math.pi
    pitch = 2 * math.pi / spinner.azimuths
    first = (
        math.radians(spinner.start) - middle - right - tilt * np.tan(np.abs(np.clip(high, -1.2, 1.2)))
    ) / pitch
    last = (
        math.radians(spinner.start) - middle - left + tilt * np.tan(np.abs(np.clip(high, -1.2, 1.2)))
    ) / pitch
    windows = np.empty((count, 4), np.int64)
    windows[:, 0] = np.searchsorted(elevation, low - tilt)
    windows[:, 1] = np.searchsorted(elevation, high + tilt)
    begin, end = np.floor(first).astype(np.int64) - 2, np.ceil(last).astype(np.int64) + 2
    whole = around | (end - begin >= spinner.azimuths)
    windows[:, 2], windows[:, 3] = np.where(whole, 0, begin), np.where(whole, spinner.azimuths, end)
    windows[around, 0], windows[around, 1] = 0, spinner.rings
    nearest = np.hypot(scene.x, scene.y) - 25.0  # no part is larger
    windows[nearest > spinner.reach, 1] = 0
    windows[:, 1] = np.maximum(windows[:, 1], windows[:, 0])
    return windows


def _glass(scene: Scene, part: Array, local: Array) -> Array:
    """How much less a window sends back: float32 [n]."""
    kind = scene.parts[part, cast.KIND]
    z0, z1 = scene.parts[part, cast.Z0], scene.parts[part, cast.Z1]
    up = (local[:, 2] - z0) / np.maximum(z1 - z0, 1e-3)
    pane = (kind == solids.CABIN) & (up > 0.12) & (up < 0.88)
    pane |= (kind == solids.COACH) & (up > 0.35) & (up < 0.8)
    return np.where(pane, np.float32(0.25), np.float32(1.0))
