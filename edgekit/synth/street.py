"""The street as a camera sees it: pictures with exact boxes, any frame at any time.

    world = StreetWorld(seed=7)
    frame = world.frame(120)        # 4 s into the drive, at 30 frames/s
    frame.image                     # uint8 [360, 640, 3] BGR
    frame.boxes, frame.classes      # float32 [n, 4] x1 y1 x2 y2, int32 [n] into CLASSES

numpy only. A frame depends on (seed, size, options, index) alone, not on what was asked before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgekit.errors import UsageError
from edgekit.synth.mesh import Mesh
from edgekit.synth.objects import CLASSES as CLASSES
from edgekit.synth.optics import Look, finish, glow
from edgekit.synth.raster import covered, paint, paint_rising, spans
from edgekit.synth.scene import LANE, REACH, Street, Thing, stream

Array = np.ndarray
Time = Literal["day", "overcast", "dusk", "night"]

FRAMES_PER_SECOND = 30.0
MIN_SHORT_SIDE, MIN_LONG_SIDE = 7.0, 14.0
"""Visible boxes smaller than this, in pixels of a 640 pixel wide picture, are not labelled."""
MIN_SHORT_SIDE_CUT = 14.0
"""The same for the shorter side of things that the picture's edge cuts off."""
MIN_VISIBILITY = 0.25
"""Things of which less is seen (the rest hidden by nearer ones) are not labelled."""
NEAR = 0.6
"""Nothing nearer than this to the camera plane (metres) is drawn."""

_TERRAIN, _ROAD, _PAVEMENT, _MARKING, _KERB, _ROW_PAINTS = range(6)


@dataclass(frozen=True)
class StreetFrame:
    """One picture and what is in it.

    image: uint8 [H, W, 3] BGR.  boxes: float32 [n, 4], x1 y1 x2 y2 in pixels, the tight extent of
    the visible pixels (x2, y2 one past the last pixel).  classes: int32 [n] into CLASSES.
    visibility: float32 [n], share of the object's pixels in this picture that nothing nearer
    hides.  index: frame number.  pts_ns: time of the
    frame, nanoseconds from the start of the drive.
    """

    image: Array
    boxes: Array
    classes: Array
    visibility: Array
    index: int
    pts_ns: int


class StreetWorld:
    """An endless street filmed from a car. Every seed is another street, camera, weather and hour.

    seed: any integer from 0 to 2^63 - 1.  width, height: pixels.  time, rain, fog: fix what the
    seed would choose (`rain`, `fog` from 0 to 1).
    Raises UsageError for values out of range.
    """

    def __init__(
        self, seed: int = 0, width: int = 640, height: int = 360, *, time: Time | None = None,
        rain: float | None = None, fog: float | None = None,
    ) -> None:  # fmt: skip
        if not 0 <= seed < 2**63:
            raise UsageError(
                f"street seed {seed}: out of range, expected 0 to {2**63 - 1}. Choose another seed"
            )
        if not (64 <= width <= 4096 and 36 <= height <= 4096):
            raise UsageError(f"street size {width}x{height}: out of range, expected 64x36 to 4096x4096")
        rng = stream(seed, 0)
        self.seed, self.width, self.height = seed, width, height
        self.look = Look.choose(rng, seed, width, height, time, rain, fog)
        self.street = Street(seed, self.look.night)
        self.camera_height = rng.uniform(1.25, 1.75) if rng.random() < 0.8 else rng.uniform(2.0, 2.8)
        self.focal = width * rng.uniform(0.78, 1.05)
        self.horizon = height * rng.uniform(0.42, 0.54)
        self.sway = rng.uniform(0.2, 1.0)

    def frame(self, index: int) -> StreetFrame:
        """Frame `index` (>= 0) of the drive."""
        if index < 0:
            raise UsageError(f"street frame {index}: out of range, expected 0 or more")
        t = index / FRAMES_PER_SECOND
        here = self.street.position(t)
        moving = 1.0 if self.street.speed else 0.1
        horizon = self.horizon + moving * self.sway * self.height / 360 * (
            1.6 * math.sin(2.1 * t) + 1.1 * math.sin(5.3 * t + 1.0)
        )
        middle = self.width / 2 + moving * self.sway * self.width / 640 * 9.0 * math.sin(0.37 * t)
        offset = 0.25 * moving * math.sin(0.23 * t)

        ground, kinds = self._ground(here, offset)
        things = sorted(self.street.things(t), key=lambda thing: -thing.order)
        quads, colors, owner, lamps = self._project(things, here, offset, horizon, middle)

        buffer = np.repeat(np.arange(self.height, dtype=np.uint16), self.width).reshape(
            self.height, self.width
        )
        flat = self._flat(ground, horizon, middle)
        quad, row, start, stop = spans(flat, self.width, self.height)
        paint(buffer, row, start, stop, kinds[quad] * self.height + row)
        first = _ROW_PAINTS * self.height
        quad, row, start, stop = spans(quads, self.width, self.height)
        paint_rising(buffer, row, start, stop, quad + first)

        rows = self.look.row_colors(self.height, horizon, self.focal, self.camera_height)
        palette = np.concatenate([rows, colors])
        instance = np.concatenate([np.full(first, -1, np.int16), owner.astype(np.int16)])[buffer]

        boxes, classes, visibility = self._label(things, owner, instance, (quad, row, start, stop))
        image = finish(
            self.look, palette, buffer, first, horizon, middle, self.focal, self.camera_height, here, index
        )
        if self.look.lamps_lit:
            glow(self.look, image, instance, lamps, self.focal)
        return StreetFrame(image, boxes, classes, visibility, index, round(t * 1e9))

    def _ground(self, here: float, offset: float) -> tuple[Array, Array]:
        """Rectangles on the ground, later over earlier: x0 x1 y0 y1 [n, 4] from the camera, kind [n]."""
        street = self.street
        far = 600.0
        right, left = street.right, street.left
        rects: list[tuple[float, float, float, float, int]] = []
        if street.pavement:
            rects.append((NEAR, far, right - street.pavement, left + street.pavement, _PAVEMENT))
            rects.append((NEAR, far, right - 0.14, left + 0.14, _KERB))
        rects.append((NEAR, far, right, left, _ROAD))
        if not street.pavement:
            for y in (right + 0.25, left - 0.25):
                rects.append((NEAR, far, y - 0.08, y + 0.08, _MARKING))
        border = LANE / 2
        rects.append((NEAR, far, border - 0.07, border + 0.07, _MARKING))
        lines = [-border - LANE * i for i in range(street.right_lanes)]
        lines += [border + LANE * i for i in range(1, street.left_lanes)]
        dash0 = math.floor((here - 10) / 9.0)
        for number in range(dash0, dash0 + 15):
            x = number * 9.0 - here
            for y in lines:
                rects.append((x, x + 4.0, y - 0.07, y + 0.07, _MARKING))
        block0 = math.floor(here / street.block)
        if street.style != "country":
            for number in range(block0, block0 + 4):
                x = number * street.block - here
                rects.append((x, x + street.crossing, -90.0, 90.0, _ROAD))
                if x < REACH / 2:
                    rects.append((x - 5.6, x - 0.2, right, left, _ROAD))
                    rects.append((x - 5.4, x - 5.0, -border, border, _MARKING))
                    stripe = right + 0.4
                    while stripe < left - 0.5:
                        rects.append((x - 4.4, x - 1.4, stripe, stripe + 0.5, _MARKING))
                        stripe += 1.0
        table = np.array(rects, np.float32)
        table[:, 2:4] -= offset
        table[:, :2] = np.maximum(table[:, :2], NEAR)
        table = table[table[:, 1] > table[:, 0]]
        return table[:, :4], table[:, 4].astype(np.int64)

    def _flat(self, rects: Array, horizon: float, middle: float) -> Array:
        """Ground rectangles to picture quads [n, 4, 2]."""
        x = rects[:, [0, 1, 1, 0]]
        y = rects[:, [2, 2, 3, 3]]
        u = middle - self.focal * y / x
        v = horizon + self.focal * self.camera_height / x
        return np.stack([u, v], -1).astype(np.float32)

    def _project(
        self, things: list[Thing], here: float, offset: float, horizon: float, middle: float
    ) -> tuple[Array, Array, Array, Array]:
        """Quads, far to near: corners [n, 4, 2] px, colors uint8 [n, 3], owner [n]; and lamps [k, 11]."""
        shade: list[Mesh] = []
        where: list[tuple[float, float, float]] = []
        owners: list[int] = []
        lamps: list[Array] = []
        for number, thing in enumerate(things):
            at = (thing.x - here, thing.y - offset, thing.z - self.camera_height)
            if thing.label in (0, 1, 2):
                shade.append(self.look.shadow(thing.mesh, thing.label))
                where.append((at[0], at[1], -self.camera_height))
                owners.append(-1)
            shade.append(thing.mesh)
            where.append(at)
            owners.append(number)
            if self.look.lamps_lit and len(thing.mesh.lamps):
                points = np.concatenate([thing.mesh.lamps, np.full((len(thing.mesh.lamps), 1), number)], 1)
                points[:, :3] += at
                lamps.append(points)
        counts = [len(mesh) for mesh in shade]
        shift = np.repeat(np.array(where, np.float32), counts, axis=0)
        owner = np.repeat(np.array(owners), counts)
        corners = np.concatenate([mesh.corners for mesh in shade])
        normals = np.concatenate([mesh.normals for mesh in shade])
        colors = np.concatenate([mesh.colors for mesh in shade])
        shines = np.concatenate([mesh.glow for mesh in shade])
        corners = corners + shift[:, None, :]
        seen = (np.einsum("ij,ij->i", normals, corners[:, 0]) < 0) & (corners[:, :, 0].max(1) > NEAR)
        corners, normals, colors = corners[seen], normals[seen], colors[seen]
        shines, owner = shines[seen], owner[seen]
        depth = np.maximum(corners[:, :, 0], NEAR)
        u = middle - self.focal * corners[:, :, 1] / depth
        v = horizon - self.focal * corners[:, :, 2] / depth
        lit = self.look.light(colors, normals, depth.mean(1), shines)
        points = np.concatenate(lamps) if lamps else np.zeros((0, 9))
        points = points[points[:, 0] > 2.0]
        spots = np.column_stack(
            [
                middle - self.focal * points[:, 1] / points[:, 0],
                horizon - self.focal * points[:, 2] / points[:, 0],
                points,
            ]
        )
        return np.stack([u, v], -1).astype(np.float32), lit, owner, spots

    def _label(
        self, things: list[Thing], owner: Array, instance: Array, cut: tuple[Array, Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        """Boxes, classes, visibility of what is seen well; `cut`: all spans, `instance`: thing by pixel."""
        quad, row, start, stop = cut
        unit = self.width / 640.0
        who = owner[quad]
        order = np.argsort(who, kind="stable")
        limits = np.searchsorted(who[order], np.arange(len(things) + 1))
        boxes: list[tuple[int, int, int, int]] = []
        classes: list[int] = []
        visibility: list[float] = []
        for number, thing in enumerate(things):
            mine = order[limits[number] : limits[number + 1]]
            if thing.label < 0 or len(mine) == 0:
                continue
            top, bottom = int(row[mine].min()), int(row[mine].max()) + 1
            left, right = int(start[mine].min()), int(stop[mine].max())
            cut_off = left == 0 or top == 0 or right == self.width or bottom == self.height
            shortest = (MIN_SHORT_SIDE_CUT if cut_off else MIN_SHORT_SIDE) * unit
            if min(right - left, bottom - top) < shortest:
                continue
            pixels = instance[top:bottom, left:right] == number
            across, down = np.flatnonzero(pixels.any(0)), np.flatnonzero(pixels.any(1))
            if len(across) == 0:
                continue
            width, height = int(across[-1] - across[0]) + 1, int(down[-1] - down[0]) + 1
            if min(width, height) < shortest or max(width, height) < MIN_LONG_SIDE * unit:
                continue
            shown = np.count_nonzero(pixels) / covered(row[mine], start[mine], stop[mine])
            if shown < MIN_VISIBILITY:
                continue
            x, y = left + int(across[0]), top + int(down[0])
            boxes.append((x, y, x + width, y + height))
            classes.append(thing.label)
            visibility.append(shown)
        return (
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(classes, np.int32),
            np.array(visibility, np.float32),
        )
