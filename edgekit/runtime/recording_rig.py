"""A moment of a rig in a recording: what ties its points and pictures together, so that a replay is the same moment.

`edgekit.Moment` (JSON) is written before the points and pictures of its moment, which have its `sequence`: the calibration as it is,
times, how the vehicle moved up to each picture, and its pose; numbers are those of the moment to the last bit. Labels are
not kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.rig import POINT_FIELDS, Rig, RigFrame, Shot
from edgekit.runtime import foxglove
from edgekit.schema import SchemaError, from_json, to_json

MOMENT = "edgekit.Moment"
MAX_CAMERAS = 64
_COLUMNS = len(POINT_FIELDS)


def moment_json(rig: RigFrame) -> dict[str, Any]:
    """All of a moment but points and pictures."""
    return {
        "rig": to_json(rig.rig),
        "taken_ns": rig.taken_ns,
        "index": rig.index,
        "pose": None if rig.pose is None else np.asarray(rig.pose, np.float64).tolist(),
        "points": None if rig.points is None else len(rig.points),
        "shots": {
            name: {"taken_ns": shot.taken_ns, "motion": np.asarray(shot.motion, np.float64).tolist()}
            for name, shot in rig.shots.items()
        },
    }


@dataclass(frozen=True)
class Moment:
    """What such a message says. shots: by camera, when it took its picture and the vehicle's motion until then."""

    rig: Rig
    taken_ns: int
    index: int
    pose: np.ndarray | None
    points: int | None
    shots: dict[str, tuple[int, np.ndarray]]

    @staticmethod
    def from_json(data: bytes | memoryview) -> Moment:
        """Raises: ValueError, its text is the reason."""
        try:
            values = json.loads(bytes(data))
            if not isinstance(values, dict) or not isinstance(values.get("shots"), dict):
                raise ValueError("a moment without its sensors")
            rig = from_json(Rig, values.get("rig"), "rig")
            if len(rig.cameras) > MAX_CAMERAS:
                raise ValueError(f"a rig of {len(rig.cameras)} cameras, expected at most {MAX_CAMERAS}")
            shots = {}
            for name, shot in values["shots"].items():
                if name not in rig.cameras or not isinstance(shot, dict):
                    raise ValueError(f"a picture of {str(name)[:60]!r}, which the rig does not have")
                shots[name] = _whole(shot, "taken_ns"), _matrix(shot.get("motion"))
            return Moment(
                rig,
                _whole(values, "taken_ns"),
                _whole(values, "index"),
                None if values.get("pose") is None else _matrix(values["pose"]),
                None if values.get("points") is None else _whole(values, "points"),
                shots,
            )
        except SchemaError as error:
            raise ValueError(str(error)) from None
        except RecursionError:
            raise ValueError("a moment is nested too deep") from None

    def frame(
        self, points: np.ndarray | None, images: Mapping[str, np.ndarray], rings: np.ndarray | None = None
    ) -> RigFrame:
        """With what was measured. Raises: ValueError for parts that are missing."""
        if (points is None) != (self.points is None) or (points is not None and len(points) != self.points):
            raise ValueError(f"expected {self.points} points, got {None if points is None else len(points)}")
        lost = [name for name in self.shots if name not in images]
        if lost:
            raise ValueError(f"its picture of {lost[0]} is missing")
        shots = {name: Shot(images[name], at, motion) for name, (at, motion) in self.shots.items()}
        return RigFrame(self.rig, self.taken_ns, points, shots, rings, pose=self.pose, index=self.index)


def read_points(data: memoryview) -> tuple[np.ndarray, np.ndarray | None]:
    """The points of a `foxglove.PointCloud` of ours, float32 [n, 5], and their rings, int16 [n], where it has them; copies.

    Raises: ValueError for another one.
    """
    values = dict(foxglove.fields(data))
    body, stride = values.get(6, memoryview(b"")), values.get(4)
    if (
        not isinstance(body, memoryview)
        or stride not in (4 * _COLUMNS, 4 * _COLUMNS + 4)
        or len(body) % stride
    ):
        raise ValueError("points are damaged")
    table = np.frombuffer(body, "<f4").reshape(-1, stride // 4)
    points = np.array(table[:, :_COLUMNS], np.float32, order="C")
    if stride == 4 * _COLUMNS:
        return points, None
    rings = table[:, _COLUMNS]
    if not (np.abs(rings) < 1 << 15).all():
        raise ValueError("rings of points are damaged")
    return points, rings.astype(np.int16)


def _whole(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**62:
        raise ValueError(f"{key} of a moment is not a whole number")
    return value


def _matrix(rows: Any) -> np.ndarray:
    """float64 [4, 4]. Raises: ValueError."""
    four = isinstance(rows, list) and len(rows) == 4
    if not four or not all(isinstance(row, list) and len(row) == 4 for row in rows):
        raise ValueError("a matrix that is not 4 x 4")
    for value in (v for row in rows for v in row):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError("a matrix of something else than numbers")
    return np.array(rows, np.float64)
