"""Shapes made of flat quads in metres: x forward along the street, y to the left, z up.

A `Mesh` is drawn quad by quad in its own order; faces turned away from the camera are skipped, so a
convex part needs no sorting. Decals (windows, lamps, plates) follow the face they lie on and share
its plane, hence its visibility.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Color = tuple[float, float, float]
"""Blue, green, red in 0..255."""
Point = tuple[float, float, float]


@dataclass(frozen=True)
class Mesh:
    """Quads as arrays, float32.

    corners: [n, 4, 3] m.  normals: [n, 3], outward, any length.  colors: [n, 3] BGR.  glow: [n]
    bool, shines by itself.  lamps: [k, 8], points with a halo at night: x, y, z, radius in m, b, g,
    r, facing (sign of x it shines to; 0: all around).  footprint: x0, x1, y0, y1 of all corners.
    """

    corners: Array
    normals: Array
    colors: Array
    glow: Array
    lamps: Array
    footprint: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def __len__(self) -> int:
        return len(self.corners)


def _across(axis: int, at: float, a: float, b: float) -> Point:
    """The point whose coordinate `axis` is `at` and whose others are a, b in the order of x, y, z."""
    return ((at, a, b), (a, at, b), (a, b, at))[axis]


class MeshBuilder:
    """Collects quads; `group` numbers convex parts so that a turned mesh can be re-ordered far to near."""

    def __init__(self) -> None:
        self._corners: list[list[Point]] = []
        self._normals: list[Point] = []
        self._colors: list[Color] = []
        self._glow: list[bool] = []
        self._groups: list[int] = []
        self._lamps: list[tuple[float, ...]] = []
        self.group = 0

    def quad(self, corners: list[Point], normal: Point, color: Color, glow: bool = False) -> None:
        """One face; `normal` is the side it is seen from."""
        self._corners.append(corners if len(corners) == 4 else [*corners, corners[-1]])
        self._normals.append(normal)
        self._colors.append(color)
        self._glow.append(glow)
        self._groups.append(self.group)

    def rect(
        self,
        axis: int,
        at: float,
        low: tuple[float, float],
        high: tuple[float, float],
        color: Color,
        side: float = -1.0,
        glow: bool = False,
    ) -> None:
        """Rectangle from `low` to `high` in the plane across `axis` at coordinate `at`, seen from `side`."""
        (a0, b0), (a1, b1) = low, high
        ring = [(a0, b0), (a1, b0), (a1, b1), (a0, b1)]
        normal = [0.0, 0.0, 0.0]
        normal[axis] = side
        self.quad([_across(axis, at, a, b) for a, b in ring], (normal[0], normal[1], normal[2]), color, glow)

    def disc(
        self,
        axis: int,
        at: float,
        centre: tuple[float, float],
        radius: float | tuple[float, float],
        color: Color,
        side: float = -1.0,
        glow: bool = False,
        turn: float = 22.5,
    ) -> None:
        """Octagon (three quads) across `axis`; `radius` may be (first axis, second axis)."""
        ra, rb = radius if isinstance(radius, tuple) else (radius, radius)
        angles = [math.radians(turn + 45 * i) for i in range(8)]
        ring = [(centre[0] + ra * math.cos(t), centre[1] + rb * math.sin(t)) for t in angles]
        normal = [0.0, 0.0, 0.0]
        normal[axis] = side
        for a, b, c, d in ((0, 1, 2, 3), (0, 3, 4, 7), (4, 5, 6, 7)):
            corners = [_across(axis, at, *ring[i]) for i in (a, b, c, d)]
            self.quad(corners, (normal[0], normal[1], normal[2]), color, glow)

    def frustum(
        self,
        base: tuple[float, float, float, float, float],
        top: tuple[float, float, float, float, float],
        sides: Color,
        roof: Color,
        ends: Color | None = None,
    ) -> None:
        """Box whose top may be smaller: base and top are (x0, x1, y0, y1, z). No floor."""
        bx0, bx1, by0, by1, bz = base
        tx0, tx1, ty0, ty1, tz = top
        b = [(bx0, by0, bz), (bx1, by0, bz), (bx1, by1, bz), (bx0, by1, bz)]
        t = [(tx0, ty0, tz), (tx1, ty0, tz), (tx1, ty1, tz), (tx0, ty1, tz)]
        rise = tz - bz
        ends = sides if ends is None else ends
        self.quad(t, (0, 0, 1), roof)
        self.quad([b[0], b[1], t[1], t[0]], (0, -rise, ty0 - by0), sides)
        self.quad([b[2], b[3], t[3], t[2]], (0, rise, by1 - ty1), sides)
        self.quad([b[1], b[2], t[2], t[1]], (rise, 0, bx1 - tx1), ends)
        self.quad([b[3], b[0], t[0], t[3]], (-rise, 0, tx0 - bx0), ends)

    def lamp(self, at: Point, radius: float, color: Color, facing: float = 0.0) -> None:
        """A point that glows at night; `facing` is the sign of x it shines to (0: all around)."""
        self._lamps.append((*at, radius, *color, facing))

    def build(self, heading: int = 0) -> Mesh:
        """The mesh turned by heading * 90 degrees to the left, its parts ordered far to near along x."""
        corners = np.array(self._corners, np.float32).reshape(-1, 4, 3)
        normals = np.array(self._normals, np.float32).reshape(-1, 3)
        lamps = np.array(self._lamps, np.float32).reshape(-1, 8)
        cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[heading % 4]
        turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], np.float32)
        corners, normals = corners @ turn, normals @ turn
        lamps[:, :3] = lamps[:, :3] @ turn
        lamps[:, 7] *= cos
        groups = np.array(self._groups)
        order = np.arange(len(corners))
        if groups.max(initial=0) > 0:
            middle = np.array([corners[groups == g, :, 0].mean() for g in range(int(groups.max()) + 1)])
            order = np.argsort(-middle[groups], kind="stable")
        colors = np.array(self._colors, np.float32).reshape(-1, 3)
        x, y = corners[..., 0], corners[..., 1]
        footprint = (float(x.min()), float(x.max()), float(y.min()), float(y.max()))
        glow = np.array(self._glow, bool)[order]
        return Mesh(corners[order], normals[order], colors[order], glow, lamps, footprint)
