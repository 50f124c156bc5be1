"""Rays against simple solids: the one geometry that both the cameras and the LiDAR of a synthetic rig see.

A *part* is a block whose top may be smaller than its base, an upright elliptic cylinder, or an ellipsoid.
Parts are rows of a float32 table [n, `COLUMNS`] in the frame of the object they belong to; `Scene` places
them. Rays form a raster (pixels of a picture, or rings by azimuths); a part is only tried on the raster
window that its bounding box covers, all windows of a raster at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

BLOCK, CYLINDER, ELLIPSOID = range(3)
SHAPE, Z0, Z1, X0, X1, Y0, Y1, TX0, TX1, TY0, TY1, KIND, B, G, R, REFLECT, GHOST = range(17)
"""Columns of a part: shape, height from and to, extent of the base and of the top (blocks), `KIND` = how a camera
paints it, colour 0..255, share of the light it sends back to a LiDAR, and 1 where a LiDAR cannot see it."""
COLUMNS = 17

GROUND, SKY = -1, -2
"""Stand for a part in `Hits.part`."""
_SIDES = ((X0, TX0, 0, -1.0), (X1, TX1, 0, 1.0), (Y0, TY0, 1, -1.0), (Y1, TY1, 1, 1.0))
"""Of each upright face of a block: columns of its edge below and above, axis, and where it looks."""
_BITS = np.uint64(32)
_FAR = np.uint64(0xFFFFFFFFFFFFFFFF)


class PartsBuilder:
    """Collects the parts of one object. Its frame: x forward, y left, z up from the ground."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, ...]] = []

    def block(
        self, x: tuple[float, float], y: tuple[float, float], z: tuple[float, float],
        color: tuple[float, float, float], kind: int = 0, *, top_x: tuple[float, float] | None = None,
        top_y: tuple[float, float] | None = None, reflect: float = 0.3, ghost: bool = False, shape: int = BLOCK,
    ) -> None:  # fmt: skip
        """A block over x, y, z; `top_x`, `top_y` where its top differs. Or what `shape` makes of its extent."""
        self._rows.append(
            (shape, *z, *x, *y, *(top_x or x), *(top_y or y), kind, *color, reflect, float(ghost))
        )

    def round(
        self, x: float, y: float, radius: float, z: tuple[float, float], color: tuple[float, float, float],
        kind: int = 0, *, shape: int = CYLINDER, reflect: float = 0.3,
    ) -> None:  # fmt: skip
        """An upright cylinder, or an ellipsoid, around x, y."""
        self.block(
            (x - radius, x + radius), (y - radius, y + radius), z, color, kind, reflect=reflect, shape=shape
        )

    def build(self) -> Array:
        """float32 [n, COLUMNS], blocks first."""
        rows = np.array(self._rows, np.float32).reshape(-1, COLUMNS)
        return rows[np.argsort(rows[:, SHAPE] != BLOCK, kind="stable")]


@dataclass(frozen=True, eq=False)
class Scene:
    """Parts placed in one frame of reference at one moment, blocks first.

    parts: float32 [n, COLUMNS].  x, y, yaw: float64 [n], of the object that a part belongs to.
    vx, vy: float64 [n], how it moves.  owner: int32 [n], its object's number.
    """

    parts: Array
    x: Array
    y: Array
    yaw: Array
    vx: Array
    vy: Array
    owner: Array

    @staticmethod
    def of(templates: list[Array], poses: Array, owners: Array) -> Scene:
        """templates: parts of each object; poses: float64 [k, 5], its x, y, yaw, vx, vy; owners: [k]."""
        counts = [len(template) for template in templates]
        parts = np.concatenate(templates)
        pose, owner = np.repeat(poses, counts, axis=0), np.repeat(owners, counts).astype(np.int32)
        order = np.argsort(parts[:, SHAPE] != BLOCK, kind="stable")
        parts, pose = parts[order], pose[order]
        x, y, yaw, vx, vy = (np.ascontiguousarray(pose[:, i]) for i in range(5))
        return Scene(parts, x, y, yaw, vx, vy, owner[order])

    def after(self, dt: float) -> Scene:
        """Everything `dt` seconds later."""
        return Scene(self.parts, self.x + dt * self.vx, self.y + dt * self.vy, self.yaw, self.vx, self.vy,
                     self.owner)  # fmt: skip

    def seen_from(self, x: float, y: float, yaw: float) -> Scene:
        """The same in the frame of something at x, y that heads for `yaw`."""
        cos, sin = np.cos(yaw), np.sin(yaw)
        dx, dy = self.x - x, self.y - y
        return Scene(
            self.parts, cos * dx + sin * dy, cos * dy - sin * dx, self.yaw - yaw,
            cos * self.vx + sin * self.vy, cos * self.vy - sin * self.vx, self.owner,
        )  # fmt: skip

    def keep(self, which: Array) -> Scene:
        """Some of its parts."""
        return Scene(self.parts[which], self.x[which], self.y[which], self.yaw[which], self.vx[which],
                     self.vy[which], self.owner[which])  # fmt: skip

    def bounds(self) -> Array:
        """Corners of every part's bounding box: float64 [n, 8, 3], order as `rig.corners` from (x1, y1) on."""
        p = self.parts
        x0, x1 = np.minimum(p[:, X0], p[:, TX0]), np.maximum(p[:, X1], p[:, TX1])
        y0, y1 = np.minimum(p[:, Y0], p[:, TY0]), np.maximum(p[:, Y1], p[:, TY1])
        x = np.stack([x1, x0, x0, x1], 1).astype(np.float64)
        y = np.stack([y1, y1, y0, y0], 1).astype(np.float64)
        cos, sin = np.cos(self.yaw)[:, None], np.sin(self.yaw)[:, None]
        flat_x, flat_y = cos * x - sin * y + self.x[:, None], sin * x + cos * y + self.y[:, None]
        result = np.empty((len(p), 8, 3))
        for half, column in ((0, Z0), (4, Z1)):
            result[:, half : half + 4, 0], result[:, half : half + 4, 1] = flat_x, flat_y
            result[:, half : half + 4, 2] = p[:, column, None]
        return result


@dataclass(frozen=True, eq=False)
class Hits:
    """What each ray of a raster meets first, flat in raster order.

    t: float32, in lengths of the ray's direction; inf for the sky.  part: int32, or GROUND, SKY.  face: int8 of
    blocks: 0..5 = -x, +x, -y, +y, bottom, top; 6 of round parts.
    """

    t: Array
    part: Array
    face: Array


def pairs(windows: Array, columns: int) -> tuple[Array, Array]:
    """Part and ray numbers (int32) of all windows; windows: int [n, 4] = first row, row end, first column, column
    end; columns wrap around."""
    rows, wide = windows[:, 1] - windows[:, 0], windows[:, 3] - windows[:, 2]
    count = np.maximum(rows, 0) * np.maximum(wide, 0)
    part = np.repeat(np.arange(len(windows), dtype=np.int32), count)
    # one run of columns per window row, each run counted up from its first ray
    runs = np.repeat(np.where(count > 0, wide, 0), np.where(count > 0, rows, 0))
    run_part = np.repeat(np.arange(len(windows)), np.where(count > 0, rows, 0))
    firsts = np.cumsum(np.where(count > 0, rows, 0)) - np.where(count > 0, rows, 0)
    row = np.arange(len(run_part)) - firsts[run_part] + windows[run_part, 0]
    column = np.arange(len(part), dtype=np.int32)
    column -= np.repeat((np.cumsum(runs) - runs - windows[run_part, 2]).astype(np.int32), runs)
    if len(windows) and (windows[:, 2].min() < 0 or windows[:, 3].max() > columns):
        column %= np.int32(columns)
    return part, column + np.repeat((row * columns).astype(np.int32), runs)


def nearest(
    scene: Scene, part: Array, ray: Array, origin: tuple[Array, Array, Array],
    direction: tuple[Array, Array, Array], ground: Array, near: float,
) -> Hits:  # fmt: skip
    """First hits. part, ray: int [p], pairs to try. origin, direction: of each pair in the part's own frame, float32
    [p] each. ground: float32 [rays], t at which a ray meets the ground (inf: it does not)."""
    split = int(np.searchsorted(part, np.count_nonzero(scene.parts[:, SHAPE] == BLOCK)))
    t = np.empty(len(part), np.float32)
    face = np.full(len(part), 6, np.int8)
    table = np.ascontiguousarray(scene.parts.T)
    first, rest = slice(0, split), slice(split, None)
    t[first], face[first] = _blocks(
        table, part[first], *(tuple(a[first] for a in v) for v in (origin, direction))
    )
    t[rest] = _rounds(table, part[rest], *(tuple(a[rest] for a in v) for v in (origin, direction)))
    hit = np.flatnonzero((t > near) & (t < np.inf))
    # time in the upper half, pair in the lower: one integer minimum finds the nearest, the same every time
    key = (t[hit].view(np.uint32).astype(np.uint64) << _BITS) | hit.astype(np.uint64)
    best = np.full(len(ground), _FAR)
    np.minimum.at(best, ray[hit], key)
    found = best != _FAR
    who = (best & np.uint64(0xFFFFFFFF)).astype(np.int64)
    who[~found] = 0
    reach = np.where(found, (best >> _BITS).astype(np.uint32).view(np.float32), np.float32(np.inf))
    below = ground < reach
    result = np.where(found, part[who] if len(part) else 0, SKY).astype(np.int32)
    result[below] = GROUND
    kind = np.where(found, face[who] if len(part) else 0, 6).astype(np.int8)
    return Hits(np.minimum(reach, ground), result, kind)


def _blocks(
    table: Array, part: Array, origin: tuple[Array, ...], direction: tuple[Array, ...]
) -> tuple[Array, Array]:
    """Entry (t, face) of rays into convex blocks: inf where they miss. Clipping by six half-spaces."""
    z0, z1 = table[Z0], table[Z1]
    rise = np.maximum(z1 - z0, 1e-4)
    low_z, dz = origin[2] - z0[part], direction[2]
    enter = np.full(len(part), -np.inf, np.float32)
    leave = np.full(len(part), np.inf, np.float32)
    face = np.zeros(len(part), np.int8)
    for number, (base, top, axis, sign) in enumerate(_SIDES):
        slope = (table[top] - table[base]) / rise
        sloped = bool(slope.any())
        edge = table[base][part]
        over, speed = origin[axis] - edge, direction[axis]
        if sloped:
            lean = slope[part]
            over, speed = over - lean * low_z, speed - lean * dz
        if sign < 0:
            over, speed = -over, -speed
        _clip(over, speed, number, enter, leave, face)
    _clip(-low_z, -dz, 4, enter, leave, face)
    _clip(low_z - rise[part], dz, 5, enter, leave, face)
    enter[enter > leave] = np.inf
    return enter, face


def _clip(over: Array, speed: Array, number: int, enter: Array, leave: Array, face: Array) -> None:
    """Cut the spans enter..leave to where over + t * speed <= 0."""
    speed = np.where(np.abs(speed) < 1e-9, np.float32(-1e-9), speed)
    at = -over / speed
    entering = speed < 0
    later = entering & (at > enter)
    np.copyto(enter, at, where=later)
    face[later] = number
    np.minimum(leave, at, out=leave, where=~entering)


def _rounds(table: Array, part: Array, origin: tuple[Array, ...], direction: tuple[Array, ...]) -> Array:
    """Entry of rays into ellipsoids and upright cylinders: inf where they miss."""
    rx, ry = (table[X1] - table[X0]) / 2, (table[Y1] - table[Y0]) / 2
    rz = (table[Z1] - table[Z0]) / 2
    ball = table[SHAPE] == ELLIPSOID
    ox = (origin[0] - ((table[X1] + table[X0]) / 2)[part]) / rx[part]
    oy = (origin[1] - ((table[Y1] + table[Y0]) / 2)[part]) / ry[part]
    oz = (origin[2] - ((table[Z1] + table[Z0]) / 2)[part]) / rz[part]
    dx, dy, dz = direction[0] / rx[part], direction[1] / ry[part], direction[2] / rz[part]
    weight = ball.astype(np.float32)[part]
    a = dx * dx + dy * dy + weight * dz * dz
    b = ox * dx + oy * dy + weight * oz * dz
    c = ox * ox + oy * oy + weight * oz * oz - 1
    root = b * b - a * c
    ok = (root > 0) & (a > 1e-12)
    half = np.sqrt(np.maximum(root, 0))
    a = np.where(ok, a, 1)
    enter, leave = (-b - half) / a, (-b + half) / a
    dz = np.where(np.abs(dz) < 1e-9, np.float32(1e-9), dz)
    down, up = (-1 - oz) / dz, (1 - oz) / dz
    cylinder = weight == 0
    np.maximum(enter, np.minimum(down, up), out=enter, where=cylinder)
    np.minimum(leave, np.maximum(down, up), out=leave, where=cylinder)
    result: Array = np.where(ok & (enter <= leave), enter, np.float32(np.inf)).astype(np.float32)
    return result


def surface(scene: Scene, part: Array, face: Array, point: Array) -> tuple[Array, Array]:
    """Where on its object a ray hit: part [n], face [n], point float32 [n, 3] in the scene's frame.

    Returns the point in the object's own frame and the outward unit normal in the scene's: float32 [n, 3] each.
    """
    table = scene.parts.T
    yaw = scene.yaw.astype(np.float32)
    turn = np.stack([np.cos(yaw), np.sin(yaw), scene.x.astype(np.float32), scene.y.astype(np.float32)])
    cos, sin, x, y = (row[part] for row in turn)
    dx, dy = point[:, 0] - x, point[:, 1] - y
    local = np.stack([cos * dx + sin * dy, cos * dy - sin * dx, point[:, 2]], 1)
    # the six faces of every part; the seventh, of round ones, is filled in point by point
    faces = np.zeros((len(scene.parts), 7, 3), np.float32)
    rise = np.maximum(table[Z1] - table[Z0], 1e-4)
    for number, (base, top, axis, sign) in enumerate(_SIDES):
        faces[:, number, axis] = sign
        faces[:, number, 2] = -sign * (table[top] - table[base]) / rise
    faces[:, 4, 2], faces[:, 5, 2] = -1.0, 1.0
    faces /= np.maximum(np.linalg.norm(faces, axis=2, keepdims=True), 1e-9)
    across, along = faces[..., 0].copy(), faces[..., 1].copy()
    faces[..., 0] = turn[0, :, None] * across - turn[1, :, None] * along
    faces[..., 1] = turn[1, :, None] * across + turn[0, :, None] * along
    normal = faces.reshape(-1, 3)[part.astype(np.int64) * 7 + face]
    curved = np.flatnonzero(face == 6)
    if len(curved):
        rows, spot = scene.parts[part[curved]], local[curved]
        out = np.empty_like(spot)
        for axis, (low, high) in enumerate(((X0, X1), (Y0, Y1), (Z0, Z1))):
            half = (rows[:, high] - rows[:, low]) / 2
            out[:, axis] = (spot[:, axis] - (rows[:, high] + rows[:, low]) / 2) / (half * half)
        tube = rows[:, SHAPE] == CYLINDER
        height = out[:, 2] * (rows[:, Z1] - rows[:, Z0]) / 2  # -1 at the bottom, 1 at the top
        out[tube, 2] = 0.0
        lid = tube & (np.abs(height) > 0.9999)
        out[lid, :2], out[lid, 2] = 0.0, np.sign(height[lid])
        out /= np.maximum(np.linalg.norm(out, axis=1), 1e-9)[:, None]
        c, s = cos[curved], sin[curved]
        normal[curved] = np.stack(
            [c * out[:, 0] - s * out[:, 1], s * out[:, 0] + c * out[:, 1], out[:, 2]], 1
        )
    return local, normal
