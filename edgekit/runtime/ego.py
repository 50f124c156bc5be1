"""How the vehicle moved between the sweep and each picture: the ego-motion term of a rig's moment."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from typing import Any

import numpy as np

from edgekit.rig import Array, inverse, quaternion, rigid, rotation_matrix

_KEPT = 128
_APART_NS = 1_000_000
_GAP_NS = 1_000_000_000
_BEYOND_NS = 200_000_000
"""Poses further apart say nothing of between; nothing is said of so long after the last."""
_FASTEST = 70.0
"""Metres per second: what moves faster is a jump of the pose, not of the vehicle."""


class Ego:
    """Poses of the vehicle (float64 [4, 4], ego to a fixed world) by time in ns; the newest 128 are kept.

    pose: asked instead, where given: time in ns -> pose, or None where it knows none.
    refused: motions that no vehicle makes, for which none was taken.
    """

    def __init__(self, pose: Callable[[int], Any] | None = None) -> None:
        self._ask = pose
        self._times: list[int] = []
        self._poses: list[Array] = []
        self.refused = 0

    def add(self, at_ns: int, pose: Array) -> None:
        place = bisect(self._times, at_ns)
        near = self._times[max(0, place - 1) : place + 1]
        if any(abs(at_ns - time) < _APART_NS for time in near):
            return
        self._times.insert(place, at_ns)
        self._poses.insert(place, np.asarray(pose, np.float64))
        if len(self._times) > _KEPT:
            del self._times[0], self._poses[0]

    def at(self, at_ns: int) -> Array | None:
        """The pose then: between two known ones, or a little beyond the last; None where nobody knows."""
        if self._ask is not None:
            pose = self._ask(at_ns)
            return None if pose is None else np.asarray(pose, np.float64)
        times = self._times
        if not times or at_ns < times[0] - _APART_NS or at_ns > times[-1] + _BEYOND_NS:
            return None
        right = min(bisect(times, at_ns), len(times) - 1)
        left = max(0, right - 1)
        if abs(at_ns - times[left]) < _APART_NS:
            return self._poses[left]
        if abs(at_ns - times[right]) < _APART_NS:
            return self._poses[right]
        if left == right or times[right] - times[left] > _GAP_NS:
            return None
        return between(
            self._poses[left], self._poses[right], (at_ns - times[left]) / (times[right] - times[left])
        )

    def motion(
        self, ref_ns: int, shot_ns: int, ref: Array | None = None, shot: Array | None = None
    ) -> Array | None:
        """float64 [4, 4]: from the ego frame at `ref_ns` to that at `shot_ns`; None where nobody knows.

        ref, shot: the poses then, where they are known already.
        """
        ref = self.at(ref_ns) if ref is None else ref
        shot = self.at(shot_ns) if shot is None else shot
        if ref is None or shot is None:
            return None
        found: Array = inverse(shot) @ ref
        if np.linalg.norm(found[:3, 3]) > 0.5 + _FASTEST * abs(ref_ns - shot_ns) / 1e9:
            self.refused += 1
            return None
        return found


def between(a: Array, b: Array, part: float) -> Array:
    """The pose `part` of the way from a (0) to b (1), or beyond: the place in a line, the turn at an even rate."""
    step = inverse(a) @ b
    w, x, y, z = quaternion(step[:3, :3])
    sine = float(np.linalg.norm((x, y, z)))
    if sine < 1e-9:
        turn = np.eye(3)
    else:
        half = float(np.arctan2(sine, w)) * part
        s = float(np.sin(half)) / sine
        turn = rotation_matrix((float(np.cos(half)), x * s, y * s, z * s))
    found: Array = rigid(a[:3, :3] @ turn, a[:3, 3] + part * (b[:3, 3] - a[:3, 3]))
    return found
