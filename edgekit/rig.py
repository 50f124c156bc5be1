"""A rig: one LiDAR and cameras on a vehicle, how they are mounted, and what they see at one moment.

**Frames of reference**, all right-handed, metres (written down here and nowhere else):

| frame | axes | origin |
|---|---|---|
| ego | x forward, y left, z up | on the ground below the middle of the rear axle |
| lidar | z up; x and y as the sensor is mounted: `Lidar.rotation` says | the sensor |
| camera | x right, y down, z along the optical axis | the lens |

A nuScenes roof LiDAR looks along its own y (x points to the right), a KITTI one along x. Points and boxes are
given in the **lidar frame at `RigFrame.taken_ns`**. A box is x, y, z of its **centre**, length, width, height,
yaw, and velocity vx, vy over ground: yaw is counter-clockwise seen from above, from the lidar's +x to the
direction of the length (where the object is heading).

Column c of a picture spans u from c to c + 1, row r spans v from r to r + 1. Pictures are rectified (no lens
distortion). A 4x4 matrix `a_to_b` takes column vectors (x, y, z, 1) in frame a to frame b.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from edgekit.files import read_toml
from edgekit.schema import to_json

Array = np.ndarray
Vector = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]

POINT_FIELDS = ("x", "y", "z", "intensity", "dt")
"""Columns of `RigFrame.points`: metres, 0..1, seconds from `taken_ns` to the measurement (0 or less)."""
BOX_FIELDS = ("x", "y", "z", "l", "w", "h", "yaw", "vx", "vy")
"""Columns of `Truth.boxes`: metres, radians, metres per second; NaN where a velocity is unknown."""
_NAME = re.compile(r"[\w. -]{1,64}")
MIN_DEPTH = 0.1
"""Nothing nearer than this to a lens (metres along its axis) counts as in the picture."""


@dataclass(frozen=True)
class Mount:
    """Where a sensor sits on the vehicle.

    position: of the sensor in the ego frame, metres.  rotation: unit quaternion w, x, y, z that turns vectors
    of the sensor's frame into the ego frame. Raises ValueError for a quaternion that is not of length 1.
    """

    position: Vector
    rotation: Quaternion

    def __post_init__(self) -> None:
        length = math.sqrt(sum(v * v for v in self.rotation))
        if abs(length - 1.0) > 1e-3:
            raise ValueError(f"rotation is a quaternion of length {length:.4g}, expected 1")

    @cached_property
    def to_ego(self) -> Array:
        """float64 [4, 4], sensor_to_ego."""
        return _fixed(rigid(rotation_matrix(self.rotation), self.position))

    @cached_property
    def from_ego(self) -> Array:
        """float64 [4, 4], ego_to_sensor."""
        return _fixed(inverse(self.to_ego))


@dataclass(frozen=True)
class Lidar(Mount):
    """period_ms: duration of a sweep; its points were measured in the period that ends at `taken_ns`."""

    period_ms: float = 50.0


@dataclass(frozen=True)
class Camera(Mount):
    """A pinhole: u = fx x / z + cx, v = fy y / z + cy.

    width, height: pixels.  offset_ms: when it is expected to take its picture, from the frame's `taken_ns`.
    """

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    offset_ms: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1 or self.height < 1:
            raise ValueError(f"a picture of {self.width}x{self.height} pixels, expected at least 1x1")
        if not (self.fx > 0 and self.fy > 0):
            raise ValueError(f"focal lengths fx {self.fx:g}, fy {self.fy:g}, expected above 0")

    @cached_property
    def matrix(self) -> Array:
        """float64 [3, 3], the intrinsic matrix."""
        return _fixed(np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1]], np.float64))

    def resized(self, width: int, height: int) -> Camera:
        """The same camera giving pictures of another size (scaled, not cropped)."""
        x, y = width / self.width, height / self.height
        return dataclasses.replace(
            self, width=width, height=height, fx=self.fx * x, cx=self.cx * x, fy=self.fy * y, cy=self.cy * y
        )


@dataclass(frozen=True)
class Rig:
    """Named sensors and how they are mounted: all of a TOML file (`read`, `write`).

    cameras: in the order in which networks take them; `lidar` is no name for one.
    """

    name: str
    lidar: Lidar
    cameras: dict[str, Camera] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (self.name, *self.cameras):
            if not _NAME.fullmatch(name) or name == "lidar":
                raise ValueError(f"name {name!r}, expected up to 64 letters, digits, '_', '-', '.', ' '")

    @staticmethod
    def read(path: str | Path) -> Rig:
        """Raises: UsageError for a file that cannot be read or says something else, naming the key."""
        path = Path(path)
        return read_toml(Rig, path, f"rig {path.name}")

    def toml(self) -> str:
        """The text of its file; `read` gives an equal rig."""
        lines = [f'name = "{self.name}"']
        tables = {"lidar": self.lidar, **{f"cameras.{_key(k)}": camera for k, camera in self.cameras.items()}}
        for title, mount in tables.items():
            lines += ["", f"[{title}]"]
            lines += [f"{key} = {_toml(value)}" for key, value in dataclasses.asdict(mount).items()]
        return "\n".join(lines) + "\n"

    def write(self, path: str | Path) -> None:
        Path(path).write_text(self.toml(), encoding="utf-8")

    def digest(self) -> str:
        """SHA-256 of the calibration, for tables that are cached by it. The rig's name does not enter."""
        facts = to_json(dataclasses.replace(self, name="rig"))
        # the order of cameras is part of it: tables number them
        facts["cameras"] = list(facts["cameras"].items())
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Truth:
    """Labelled boxes.

    boxes: float32 [n, 9], `BOX_FIELDS`.  classes: int32 [n] into `names`.  points: int32 [n], LiDAR points inside.
    pixels: int32 [n], pixels of all pictures in which it is seen; -1 where nobody counted.
    rectangles: by camera, float32 [n, 4]: x1 y1 x2 y2 around it in the picture as the labels have it, pixels; NaN
        where they have none.
    """

    boxes: Array
    classes: Array
    names: tuple[str, ...]
    points: Array
    pixels: Array
    rectangles: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, which: Array) -> Truth:
        """The boxes that a mask or index array picks."""
        rectangles = {name: found[which] for name, found in self.rectangles.items()}
        return Truth(
            self.boxes[which], self.classes[which], self.names, self.points[which], self.pixels[which],
            rectangles,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Shot:
    """One camera's picture.

    image: uint8 [H, W, 3] BGR.  taken_ns: when.  motion: float64 [4, 4], from the ego frame at the rig frame's
    `taken_ns` to the ego frame when this picture was taken (identity where nobody knows).
    """

    image: Array
    taken_ns: int
    motion: Array = field(default_factory=lambda: np.eye(4))


@dataclass(frozen=True, eq=False)
class RigFrame:
    """What a rig saw at one moment; sensors may be missing.

    taken_ns: the moment that points and boxes are given for.  points: float32 [n, 5], `POINT_FIELDS`, in the
    lidar frame, the vehicle's own motion during the sweep taken out; None without LiDAR.  rings: int16 [n], 0 is
    the lowest; None where unknown.  shots: by camera name.  truth: None without labels.
    pose: float64 [4, 4], ego to a fixed world; None where unknown.
    """

    rig: Rig
    taken_ns: int
    points: Array | None
    shots: Mapping[str, Shot]
    rings: Array | None = None
    truth: Truth | None = None
    pose: Array | None = None
    index: int = 0

    def lidar_to_camera(self, name: str) -> Array:
        """float64 [4, 4]: from the lidar frame at `taken_ns` to the camera when it took its picture."""
        motion = self.shots[name].motion if name in self.shots else np.eye(4)
        result: Array = self.rig.cameras[name].from_ego @ motion @ self.rig.lidar.to_ego
        return result

    def project(self, name: str, points: Array) -> tuple[Array, Array]:
        """Points [n, >=3] of the lidar frame in a picture: uv float64 [n, 2] in pixels, depth float64 [n] in m.

        A point at depth `MIN_DEPTH` or less has uv NaN. Points outside the picture are projected too.
        """
        return project(self.rig.cameras[name], self.lidar_to_camera(name), points)

    def parts(self) -> list[tuple[int, str, RigFrame]]:
        """Its sensors one by one as they come in: (time ns, sensor, a frame with that sensor alone), by time.

        The LiDAR, named `lidar`, comes when its sweep is complete. Labels and pose are with every part.
        """
        parts = [
            (shot.taken_ns, name, dataclasses.replace(self, points=None, rings=None, shots={name: shot}))
            for name, shot in self.shots.items()
        ]
        if self.points is not None:
            parts.append((self.taken_ns, "lidar", dataclasses.replace(self, shots={})))
        return sorted(parts, key=lambda part: part[0])

    def shifted(self, by_ns: int) -> RigFrame:
        """The same frame `by_ns` later on the clock."""
        shots = {
            name: dataclasses.replace(shot, taken_ns=shot.taken_ns + by_ns)
            for name, shot in self.shots.items()
        }
        return dataclasses.replace(self, taken_ns=self.taken_ns + by_ns, shots=shots)


def arrange(names: Sequence[str]) -> list[list[str | None]]:
    """Where cameras go in a picture of all, by row: ahead over back with their lefts and rights, others in threes."""
    order = ("FRONT_LEFT", "FRONT", "FRONT_RIGHT", "BACK_LEFT", "BACK", "BACK_RIGHT")
    known: dict[str, str | None] = {name.upper().removeprefix("CAM_"): name for name in names}
    if len(names) > 3 and len(known) == len(names) and set(known) <= set(order):
        return [[known.get(key) for key in order[:3]], [known.get(key) for key in order[3:]]]
    wide = min(max(len(names), 1), 3)
    return [list(names[i : i + wide]) for i in range(0, len(names), wide)]


def mosaic(frame: RigFrame) -> Array:
    """All pictures of a frame in one, uint8 [H, W, 3] BGR, as `arrange` has them; black where one is missing."""
    cameras = frame.rig.cameras
    grid = arrange(list(cameras))
    wide, tall = max(c.width for c in cameras.values()), max(c.height for c in cameras.values())
    canvas = np.zeros((tall * len(grid), wide * max(map(len, grid)), 3), np.uint8)
    for row, names in enumerate(grid):
        for column, name in enumerate(names):
            if name is not None and name in frame.shots:
                image = frame.shots[name].image
                y, x = row * tall, column * wide
                canvas[y : y + image.shape[0], x : x + image.shape[1]] = image
    return canvas


def project(camera: Camera, to_camera: Array, points: Array) -> tuple[Array, Array]:
    """Points [n, >=3] of the frame that `to_camera` [4, 4] starts from, in the picture. As `RigFrame.project`."""
    xyz = np.asarray(points[:, :3], np.float64) @ to_camera[:3, :3].T + to_camera[:3, 3]
    depth = xyz[:, 2]
    safe = np.where(depth > MIN_DEPTH, depth, np.nan)
    uv = np.stack([camera.fx * xyz[:, 0] / safe + camera.cx, camera.fy * xyz[:, 1] / safe + camera.cy], 1)
    return uv, depth


def unproject(camera: Camera, to_camera: Array, uv: Array, depth: Array) -> Array:
    """The inverse of `project`: float64 [n, 3] in the frame that `to_camera` starts from."""
    x = (uv[:, 0] - camera.cx) / camera.fx * depth
    y = (uv[:, 1] - camera.cy) / camera.fy * depth
    back = inverse(to_camera)
    result: Array = np.stack([x, y, depth], 1) @ back[:3, :3].T + back[:3, 3]
    return result


def in_picture(camera: Camera, uv: Array, depth: Array) -> Array:
    """bool [n]: which projected points fall into the picture, in front of the lens."""
    with np.errstate(invalid="ignore"):
        inside: Array = (
            (depth > MIN_DEPTH)
            & (uv[:, 0] >= 0) & (uv[:, 0] < camera.width) & (uv[:, 1] >= 0) & (uv[:, 1] < camera.height)
        )  # fmt: skip
    return inside


def corners(boxes: Array) -> Array:
    """Corners of boxes [n, >=7]: float64 [n, 8, 3]. 0-3 the bottom from front left counter-clockwise, 4-7 above."""
    box = np.asarray(boxes, np.float64)
    x = np.array([1, -1, -1, 1, 1, -1, -1, 1]) / 2 * box[:, 3:4]
    y = np.array([1, 1, -1, -1, 1, 1, -1, -1]) / 2 * box[:, 4:5]
    z = np.array([-1, -1, -1, -1, 1, 1, 1, 1]) / 2 * box[:, 5:6]
    cos, sin = np.cos(box[:, 6:7]), np.sin(box[:, 6:7])
    return np.stack([cos * x - sin * y, sin * x + cos * y, z], -1) + box[:, None, :3]


_EDGES = np.array(
    [(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7)]
)
_FRONT = np.array([(0, 7), (3, 4)])
"""The front face crossed."""


def wires(camera: Camera, to_camera: Array, box: Array, front: bool = True) -> Array:
    """The edges of one box [>=7] as lines in a picture: float64 [n, 4], x1 y1 x2 y2 in pixels, not cut at its edges.

    to_camera: [4, 4], from the frame of the box. What is behind the lens is left out. front: the front face is crossed.
    """
    corner = corners(box[None])[0] @ to_camera[:3, :3].T + to_camera[:3, 3]
    pairs = np.concatenate([_EDGES, _FRONT]) if front else _EDGES
    start, end = corner[pairs[:, 0]], corner[pairs[:, 1]]
    near = MIN_DEPTH * 1.001
    keep = np.maximum(start[:, 2], end[:, 2]) > near
    start, end = start[keep], end[keep]
    cut = start.copy()  # where an edge passes the lens
    passes = (start[:, 2] < near) != (end[:, 2] < near)
    way = (end - start)[passes]
    cut[passes] += ((near - start[passes, 2]) / way[:, 2])[:, None] * way
    start, end = (np.where(part[:, 2:] < near, cut, part) for part in (start, end))
    ends = [project(camera, np.eye(4), part)[0] for part in (start, end)]
    return np.concatenate(ends, 1)


def outlines(camera: Camera, to_camera: Array, boxes: Array) -> Array:
    """Rectangles around boxes [n, >=7] in a picture, cut at its edges: float64 [n, 4], x1 y1 x2 y2 in pixels.

    to_camera: [4, 4], from the frame of the boxes. What of a box is behind the lens does not count; NaN where nothing
    of it is in the picture.
    """
    result = np.full((len(boxes), 4), np.nan)
    size = np.array([camera.width, camera.height])
    for row, box in zip(result, boxes, strict=True):
        uv = wires(camera, to_camera, box, front=False).reshape(-1, 2)
        if len(uv):
            low, high = np.clip(uv.min(0), 0, size), np.clip(uv.max(0), 0, size)
            if (high > low).all():
                row[:] = *low, *high
    return result


def inside(points: Array, box: Array, margin: float = 0.0) -> Array:
    """bool [n]: which points [n, >=3] lie in one box [>=7], grown by `margin` metres on every side."""
    x, y, z, length, width, height, yaw = (float(v) for v in box[:7])
    dx, dy, dz = (points[:, i].astype(np.float64) - v for i, v in enumerate((x, y, z)))
    along, across = math.cos(yaw) * dx + math.sin(yaw) * dy, math.cos(yaw) * dy - math.sin(yaw) * dx
    found: Array = (
        (np.abs(along) <= length / 2 + margin)
        & (np.abs(across) <= width / 2 + margin)
        & (np.abs(dz) <= height / 2 + margin)
    )
    return found


def count_inside(points: Array, boxes: Array) -> Array:
    """int32 [n]: how many points [m, >=3] lie in each box [n, >=7]."""
    return np.array([np.count_nonzero(inside(points, box)) for box in boxes], np.int32)


def moved(boxes: Array, a_to_b: Array) -> Array:
    """Boxes [n, 7 or 9] of frame a in frame b, which may differ by a turn about z (a tilt is not in a box)."""
    result = np.array(boxes, np.float32)
    xyz = np.asarray(boxes[:, :3], np.float64) @ a_to_b[:3, :3].T + a_to_b[:3, 3]
    result[:, :3] = xyz
    along = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1) @ a_to_b[:2, :2].T.astype(np.float64)
    result[:, 6] = np.arctan2(along[:, 1], along[:, 0])
    if boxes.shape[1] > 7:
        result[:, 7:9] = boxes[:, 7:9].astype(np.float64) @ a_to_b[:2, :2].T
    return result


def rotation_matrix(rotation: Quaternion) -> Array:
    """float64 [3, 3] of a quaternion w, x, y, z, brought to length 1."""
    length = math.sqrt(sum(v * v for v in rotation))
    w, x, y, z = (v / length for v in rotation)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def quaternion(matrix: Array) -> Quaternion:
    """Unit quaternion w, x, y, z (w >= 0) of the rotation nearest to a matrix [3, 3] (Shepperd's method)."""
    left, _, right = np.linalg.svd(np.asarray(matrix, np.float64))
    m = left @ right
    four = np.array([
        1 + m[0, 0] + m[1, 1] + m[2, 2], 1 + m[0, 0] - m[1, 1] - m[2, 2],
        1 - m[0, 0] + m[1, 1] - m[2, 2], 1 - m[0, 0] - m[1, 1] + m[2, 2],
    ])  # fmt: skip
    a, b, c = m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]
    d, e, f = m[0, 1] + m[1, 0], m[0, 2] + m[2, 0], m[1, 2] + m[2, 1]
    rows = ((four[0], a, b, c), (a, four[1], d, e), (b, d, four[2], f), (c, e, f, four[3]))
    q = np.array(rows[int(np.argmax(four))], np.float64)  # the largest: no loss by cancellation
    q /= np.linalg.norm(q) * (1.0 if q[0] >= 0 else -1.0)
    return float(q[0]), float(q[1]), float(q[2]), float(q[3])


def rigid(rotation: Array, position: Vector | Array) -> Array:
    """float64 [4, 4] of a rotation [3, 3] followed by a shift."""
    result = np.eye(4)
    result[:3, :3] = rotation
    result[:3, 3] = position
    return result


def inverse(matrix: Array) -> Array:
    """The inverse of a rigid motion [4, 4]."""
    turn = np.asarray(matrix[:3, :3], np.float64).T
    return rigid(turn, -turn @ matrix[:3, 3])


def _fixed(matrix: Array) -> Array:
    matrix.flags.writeable = False  # it is handed out again and again
    return matrix


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{name}"'


def _toml(value: object) -> str:
    return "[" + ", ".join(map(_toml, value)) + "]" if isinstance(value, tuple) else repr(value)
