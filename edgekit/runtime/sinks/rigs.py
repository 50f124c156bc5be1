"""What sinks show of a rig: which moment a result belongs to, and its boxes as lines in pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.rig import RigFrame, corners, moved, outlines, wires

if TYPE_CHECKING:
    from edgekit.runtime.results import StreamResult

Array = np.ndarray

LOW_M, HIGH_M = -0.3, 3.5
"""Heights above ground between which points change their colour."""
_RAMP = np.array([(54, 60, 140), (38, 140, 142), (110, 205, 88), (250, 230, 40)], np.float64)
FASTEST = 340.0
"""Metres per second: what is faster has no velocity worth an arrow."""
_FARTHEST = 1e4


def rig_of(item: StreamResult) -> RigFrame | None:
    """The moment that a result with boxes in space was made of; None where it has none, or another kind of result."""
    if item.result.task != "fusion":
        return None
    found: RigFrame | None = item.frame.rig or getattr(item.result, "moment", None)
    return found


@dataclass(frozen=True)
class Shown:
    """One box that can be shown: its number in the result is `index`. box: float32 [9], `rig.BOX_FIELDS`."""

    index: int
    box: Array
    score: float
    cls: int
    label: str

    @property
    def velocity(self) -> Array | None:
        """vx, vy, or None where it is unknown, next to nothing, or no speed."""
        speed = float(np.hypot(*self.box[7:9]))
        return self.box[7:9] if 0.2 < speed < FASTEST else None


def shown(result: Any) -> list[Shown]:
    """The boxes of a `Boxes3D` that are somewhere: numbers that are not finite, or kilometres away, are left out."""
    return [
        Shown(i, box, score, cls, label)
        for i, (box, score, cls, label) in enumerate(result)
        if (np.abs(box[:7]) < _FARTHEST).all()
    ]


def height_colors(rig: RigFrame) -> Array:
    """uint8 [n, 3] RGB of the points of a moment by their height above ground: dark low, bright high."""
    assert rig.points is not None
    row = rig.rig.lidar.to_ego[2]
    height = rig.points[:, :3] @ row[:3].astype(np.float32) + np.float32(row[3])
    at = np.clip((height - LOW_M) / (HIGH_M - LOW_M), 0, 1)
    stops = np.linspace(0, 1, len(_RAMP))
    colors: Array = np.stack([np.interp(at, stops, _RAMP[:, i]) for i in range(3)], 1).astype(np.uint8)
    return colors


def camera_to_ego(rig: RigFrame, name: str) -> Array:
    """float64 [4, 4]: from a camera when it took its picture to the ego frame at the moment's time."""
    result: Array = rig.rig.lidar.to_ego @ np.linalg.inv(rig.lidar_to_camera(name))
    return result


def lines_in(rig: RigFrame, name: str, box: Array) -> Array:
    """The edges of a box in a camera's picture, cut at the picture's edges: float64 [n, 4], x1 y1 x2 y2 in its pixels.

    A box that moves is shown where it was when the picture was taken.
    """
    camera = rig.rig.cameras[name]
    found = wires(camera, rig.lidar_to_camera(name), _when(box, rig, name))
    return clipped(found, camera.width, camera.height)


def outline_in(rig: RigFrame, name: str, box: Array) -> Array:
    """The rectangle around a box in a camera's picture, as `rig.outlines`: float64 [4]."""
    found: Array = outlines(rig.rig.cameras[name], rig.lidar_to_camera(name), _when(box, rig, name)[None])[0]
    return found


def _when(box: Array, rig: RigFrame, name: str) -> Array:
    """The box where it was when a camera took its picture."""
    shot = rig.shots.get(name)
    if shot is None:
        return box
    late = (shot.taken_ns - rig.taken_ns) / 1e9
    speed = box[7:9]
    if not (np.abs(speed) < FASTEST).all():  # false where it is unknown
        return box
    box = box.copy()
    box[:2] += np.float32(late) * speed
    return box


def lines_above(rig: RigFrame, box: Array) -> Array:
    """A box from above: its sides and its heading, float64 [5, 4], x1 y1 x2 y2 in metres of the ego frame."""
    turned = moved(box[None], rig.rig.lidar.to_ego)
    ring = corners(turned)[0, :4, :2]
    ahead = (ring[0] + ring[3]) / 2
    sides = [np.concatenate([ring[i], ring[(i + 1) % 4]]) for i in range(4)]
    return np.stack([*sides, np.concatenate([turned[0, :2].astype(np.float64), ahead])])


def clipped(lines: Array, width: float, height: float) -> Array:
    """The parts of lines [n, 4] that lie in 0..width, 0..height (Liang and Barsky 1984): float64 [m, 4]."""
    start, way = lines[:, :2], lines[:, 2:] - lines[:, :2]
    first, last = np.zeros(len(lines)), np.ones(len(lines))
    inside = np.isfinite(lines).all(1)
    for axis, most in ((0, width), (1, height)):
        for step, room in ((-way[:, axis], start[:, axis]), (way[:, axis], most - start[:, axis])):
            with np.errstate(divide="ignore", invalid="ignore"):
                at = room / step
            inside &= ~((step == 0) & (room < 0))
            first = np.where(step < 0, np.maximum(first, at), first)
            last = np.where(step > 0, np.minimum(last, at), last)
    inside &= first < last
    start, way = start[inside], way[inside]
    return np.concatenate([start + first[inside, None] * way, start + last[inside, None] * way], 1)
