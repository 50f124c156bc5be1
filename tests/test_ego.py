"""Where the vehicle was between two poses, and how it moved between a sweep and a picture."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.rig import inverse, rigid, rotation_matrix
from edgekit.runtime.ego import Ego, between
from edgekit.synth.street_rig import RigWorld

MS = 1_000_000


def pose(x: float, y: float, yaw: float) -> np.ndarray:
    return rigid(rotation_matrix((math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2))), (x, y, 0.0))


@given(
    x=st.floats(-50, 50), y=st.floats(-50, 50), yaw=st.floats(-3, 3), step=st.floats(-1, 1), part=st.floats(-0.5, 1.5)
)  # fmt: skip
def test_between_two_poses(x, y, yaw, step, part):
    a, b = pose(x, y, yaw), pose(x + 3, y - 2, yaw + step)
    found = between(a, b, part)
    assert np.allclose(found, pose(x + 3 * part, y - 2 * part, yaw + step * part), atol=1e-6)
    assert np.allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-9)


def test_motion_of_a_drive_is_what_the_world_says():
    """Poses at 10 Hz, pictures in between: 5 ms and 3 cm off at most where the street turns."""
    world = RigWorld(3, width=64, height=64)
    ego = Ego()
    frames = [world.frame(i, ("CAM_FRONT", "CAM_BACK")) for i in range(6)]
    for frame in frames:
        ego.add(frame.taken_ns, frame.pose)
    for frame in frames[1:]:
        for shot in frame.shots.values():
            motion = ego.motion(frame.taken_ns, shot.taken_ns)
            assert np.allclose(motion, shot.motion, atol=0.03)
            assert np.linalg.norm(shot.motion[:3, 3]) > 0.01


def test_what_nobody_knows_is_none():
    ego = Ego()
    assert ego.at(0) is None and ego.motion(0, 1) is None
    ego.add(1000 * MS, pose(0, 0, 0))
    assert np.allclose(ego.at(1000 * MS), np.eye(4))
    assert ego.at(1100 * MS) is None, "one pose says nothing of later"
    assert ego.at(900 * MS) is None
    ego.add(1100 * MS, pose(1, 0, 0))
    assert ego.at(1200 * MS)[0, 3] == pytest.approx(2.0)
    assert ego.at(1400 * MS) is None, "too long after"
    ego.add(4000 * MS, pose(2, 0, 0))
    assert ego.at(2000 * MS) is None, "too far apart"


def test_a_pose_that_jumps_is_no_motion():
    ego = Ego()
    ego.add(1000 * MS, pose(0, 0, 0))
    ego.add(1100 * MS, pose(500, 0, 0))
    assert ego.motion(1000 * MS, 1100 * MS) is None
    assert ego.refused == 1


def test_memory_is_bounded_and_order_does_not_matter():
    ego = Ego()
    for i in np.random.default_rng(0).permutation(1000):
        ego.add(int(i) * 10 * MS, pose(i * 0.1, 0, 0))
    assert len(ego._times) == len(ego._poses) <= 128
    assert ego._times == sorted(ego._times)
    assert ego.at(9985 * MS)[0, 3] == pytest.approx(99.85)


def test_a_function_is_asked_instead():
    ego = Ego(lambda at: pose(at / 1e9 * 10, 0, 0) if at < 2e9 else None)
    ego.add(0, pose(7, 7, 7))
    assert np.allclose(ego.motion(1000 * MS, 900 * MS), inverse(pose(-1, 0, 0)), atol=1e-9)
    assert ego.motion(3000 * MS, 900 * MS) is None
