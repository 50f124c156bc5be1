"""Whether a camera's mounting looks right, told from what it and the LiDAR see anyway.

Where the distance jumps from one LiDAR point to the next along a ring, something ends, and a picture mostly has an edge
there. `check` projects the points at such jumps and asks how strong the upright edges under them are; then again
with the camera turned a little to the left and to the right. With the right calibration the edges are strongest where
the rig says. After Levinson and Thrun, "Automatic Online Calibration of Cameras and Lasers" (RSS 2013), section III,
reduced to turns about the vertical, which one LiDAR can judge from few frames: it tells a turned camera, exchanged
cameras, and times that are off while the vehicle turns. It does not tell pitch, roll or centimetres.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgekit.rig import Rig, RigFrame, in_picture, project

Array = np.ndarray
Verdict = Literal["fits", "turned", "unclear"]

TURNS = np.arange(-5.0, 5.01, 0.5)
"""Turns of the camera that are tried, degrees, positive to its right."""
TOLERANCE = 1.0
"""A camera whose edges fit best this many degrees from where it is said to look counts as turned."""
MIN_POINTS = 250
"""With fewer points at jumps in its pictures nothing is said of a camera."""
CLEAR = 0.12
"""How much stronger than usual the edges must be where they fit best."""
JUMP_M = 0.4
"""A change of distance between neighbours that is an end of something, metres."""
NEAREST_M = 3.0
APART_M = 1.0
WIDTH = 640
_REACH, _FADE = 5, 0.8
"""Pixels of a picture of WIDTH over which an edge fades, and what is left of it after each: so near it must be met."""


@dataclass(frozen=True)
class CameraCheck:
    """verdict: `fits`, `turned`, or `unclear` where there was too little to see. degrees: how far to the right the camera
    really looks of where the rig says (0 where unclear). points: at jumps, in all pictures. gain: how much stronger
    than usual the edges are at their best."""

    camera: str
    verdict: Verdict
    degrees: float
    points: int
    gain: float

    def __str__(self) -> str:
        if self.verdict == "turned":
            side = "right" if self.degrees > 0 else "left"
            return (
                f"rig: camera {self.camera} seems to look {abs(self.degrees):.1f} degrees further to the {side} than "
                "its calibration says. Check its rotation, and that it is the camera it is taken for"
            )
        return f"rig: camera {self.camera} {self.verdict}"


def check(frames: Iterable[RigFrame]) -> list[CameraCheck]:
    """What frames of one rig say of each of its cameras; ten or more frames, some metres apart, say it well.

    Frames without points and cameras without a picture are passed over, and frames less than a metre after the last one
    (where the pose is known): the same view again is no second witness. numpy only, some tens of milliseconds a picture.
    """
    sums: dict[str, Array] = {}
    last: Array | None = None
    for frame in frames:
        for name in frame.rig.cameras:
            sums.setdefault(name, np.zeros((2, len(TURNS))))
        if frame.points is None:
            continue
        if frame.pose is not None:
            if last is not None and np.linalg.norm(frame.pose[:3, 3] - last) < APART_M:
                continue
            last = frame.pose[:3, 3]
        points, weights = _jumps(frame)
        for name in frame.shots:
            sums[name] += _agreement(frame, name, points, weights)
    return [_judge(name, total) for name, total in sums.items()]


def oddities(rig: Rig, frame: RigFrame | None = None) -> list[str]:
    """A line for everything about a mounting that hardly any rig has: what a wrong unit, a wrong convention or a copied
    table gives. frame: of that rig; its points say whether the LiDAR stands where cameras look."""
    found = []
    up = rig.lidar.to_ego[2, 2]
    if up < math.cos(math.radians(60)):
        found.append(
            f"rig: lidar: its z axis points {math.degrees(math.acos(max(-1.0, up))):.0f} degrees away from up. "
            "Check its rotation (w, x, y, z; sensor to ego)"
        )
    for name, camera in rig.cameras.items():
        if not (0 <= camera.cx <= camera.width and 0 <= camera.cy <= camera.height):
            found.append(
                f"rig: camera {name}: optical axis at pixel ({camera.cx:g}, {camera.cy:g}), outside of its "
                f"{camera.width}x{camera.height} picture. Check cx, cy, width and height"
            )
        wide = math.degrees(2 * math.atan2(camera.width / 2, camera.fx))
        if not 5 <= wide <= 150:
            found.append(
                f"rig: camera {name}: sees {wide:.1f} degrees across, expected 5 to 150. Check that fx is in pixels of "
                "its picture"
            )
        if not 0.7 <= camera.fx / camera.fy <= 1.4:
            found.append(
                f"rig: camera {name}: fx {camera.fx:g} and fy {camera.fy:g} differ much. Check the picture's size"
            )
        if max(map(abs, camera.position)) > 30 or camera.position[2] < -0.5:
            found.append(
                f"rig: camera {name}: stands at {list(camera.position)} m, expected on the vehicle. "
                "Check that positions are metres in the ego frame"
            )
    names = list(rig.cameras)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            turn = rig.cameras[one].to_ego[:3, :3].T @ rig.cameras[other].to_ego[:3, :3]
            apart = math.dist(rig.cameras[one].position, rig.cameras[other].position)
            if (np.trace(turn) - 1) / 2 > math.cos(math.radians(0.5)) and apart < 0.02:
                found.append(
                    f"rig: cameras {one} and {other} have the same mounting. Check that one was not copied"
                )
    if frame is not None and frame.points is not None and len(frame.points):
        for name, camera in rig.cameras.items():
            if not in_picture(camera, *frame.project(name, frame.points)).any():
                found.append(
                    f"rig: camera {name}: not one of {len(frame.points)} LiDAR points falls into its picture. "
                    "Check its rotation (w, x, y, z; sensor to ego, camera z ahead)"
                )
    return found


def alarms(checks: Sequence[CameraCheck]) -> list[str]:
    """A line for every camera that seems to be turned."""
    return [str(each) for each in checks if each.verdict == "turned"]


def _judge(name: str, total: Array) -> CameraCheck:
    points = int(total[1, len(TURNS) // 2])
    curve = total[0] / np.maximum(total[1], 1.0)
    usual = float(np.median(curve))
    best = int(np.argmax(curve))
    gain = float(curve[best] / usual - 1.0) if usual > 0 else 0.0
    if points < MIN_POINTS or gain < CLEAR:
        return CameraCheck(name, "unclear", 0.0, points, gain)
    degrees = float(TURNS[best])
    near = curve[np.abs(TURNS) < TOLERANCE].max()
    turned = abs(degrees) >= TOLERANCE and curve[best] - near > 0.3 * (curve[best] - usual)
    return CameraCheck(name, "turned" if turned else "fits", degrees, points, gain)


def _jumps(frame: RigFrame) -> tuple[Array, Array]:
    """Points [n, 3] behind which the distance jumps away along their ring, and how far: its root, at most 5 m."""
    assert frame.points is not None
    xyz = frame.points[frame.points[:, 4] > -frame.rig.lidar.period_ms / 1e3 - 1e-6, :3].astype(np.float64)
    far = np.linalg.norm(xyz, axis=1)
    azimuth = np.arctan2(xyz[:, 1], xyz[:, 0])
    if frame.rings is not None and len(frame.rings) == len(frame.points):
        ring = frame.rings[frame.points[:, 4] > -frame.rig.lidar.period_ms / 1e3 - 1e-6].astype(np.int64)
    else:  # rings of 0.4 degrees, as those of KITTI's LiDAR
        ring = np.round(np.degrees(np.arcsin(xyz[:, 2] / np.maximum(far, 1e-6))) / 0.4).astype(np.int64)
    order = np.lexsort((azimuth, ring))
    step = np.diff(far[order])
    step[np.diff(ring[order]) != 0] = 0.0
    jump = np.zeros(len(xyz))
    jump[order] = np.maximum(np.append(step, 0.0), np.append(0.0, -step))
    chosen = (jump > JUMP_M) & (far > NEAREST_M)
    return xyz[chosen], np.sqrt(np.minimum(jump[chosen], 5.0))


def _agreement(frame: RigFrame, name: str, points: Array, weights: Array) -> Array:
    """[2, turns]: strength of the edges under the points, in units of the picture's mean, and how many points; summed."""
    edges = _edges(frame.shots[name].image)
    camera = frame.rig.cameras[name].resized(edges.shape[1], edges.shape[0])
    base = frame.lidar_to_camera(name)
    result = np.zeros((2, len(TURNS)))
    weights = weights / max(float(weights.sum()), 1e-9) * len(weights)
    for i, degrees in enumerate(TURNS):
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        # a camera that looks further to the right sees everything further to the left
        turn = np.array([[cos, 0, -sin, 0], [0, 1, 0, 0], [sin, 0, cos, 0], [0, 0, 0, 1]])
        uv, depth = project(camera, turn @ base, points)
        seen = in_picture(camera, uv, depth)
        column, row = uv[seen].astype(np.int64).T
        result[:, i] = (weights[seen] * edges[row, column]).sum(), seen.sum()
    return result


def _edges(image: Array) -> Array:
    """float32 [h, w], about WIDTH wide: strength of the strongest upright edge near each pixel, fading with distance."""
    factor = max(1, image.shape[1] // WIDTH)
    tall, wide = image.shape[0] // factor, image.shape[1] // factor
    grey = image[: tall * factor, : wide * factor].mean(2, dtype=np.float32)
    grey = grey.reshape(tall, factor, wide, factor).mean((1, 3))
    grey = np.pad(grey, 1, mode="edge")
    smooth = grey[:-2] + 2 * grey[1:-1] + grey[2:]
    edge = np.abs(smooth[:, 2:] - smooth[:, :-2])
    edge = np.minimum(edge / (edge.mean() + 1e-3), 8.0)
    result: Array = edge.copy()
    for away in range(1, max(1, round(_REACH * wide / WIDTH)) + 1):
        fade = np.float32(_FADE ** (away * WIDTH / wide))
        np.maximum(result[:, away:], fade * edge[:, :-away], out=result[:, away:])
        np.maximum(result[:, :-away], fade * edge[:, away:], out=result[:, :-away])
    return result
