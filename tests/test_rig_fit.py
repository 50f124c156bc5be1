"""Boxes against points and rectangles in the pictures: the figures, and that a turned camera makes them worse."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.rig import MIN_DEPTH, Camera, Rig, RigFrame, Truth, corners, outlines, project
from edgekit.rig_files import read_frames
from edgekit.rig_fit import fit, summary
from edgekit.synth.street_rig import RigWorld, street_rig
from tests.helpers import shared_data

AHEAD = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
"""To a camera that looks along y, x to its right."""
CAMERA = Camera((0, 0, 0), (1, 0, 0, 0), 640, 480, 500.0, 500.0, 320.0, 240.0)


def box(x, y, z, l=4.0, w=2.0, h=1.5, yaw=0.0):  # noqa: E741
    return np.array([[x, y, z, l, w, h, yaw, 0, 0]], np.float32)


def test_outline_of_a_box_ahead():
    found = outlines(CAMERA, AHEAD, box(0, 11, 0, 4, 2, 1))
    # its near face is 10 m away: 4 m across, 1 m high
    assert found[0] == pytest.approx([320 - 100, 240 - 25, 320 + 100, 240 + 25])


def test_outline_is_cut_and_nothing_behind_counts():
    assert np.isnan(outlines(CAMERA, AHEAD, box(0, -10, 0))).all()
    assert np.isnan(outlines(CAMERA, AHEAD, box(40, 10, 0))).all()
    left, top, right, bottom = outlines(CAMERA, AHEAD, box(-6, 8, 0))[0]
    assert left == 0
    assert 0 < top < 240 < bottom < 480
    assert right < 320
    # a box that the lens is in fills what is ahead of it
    assert outlines(CAMERA, AHEAD, box(0, 0, 0, 2, 6, 3))[0] == pytest.approx([0, 0, 640, 480])


@settings(max_examples=60, deadline=None)
@given(st.floats(-8, 8), st.floats(-2, 12), st.floats(-2, 2), st.floats(-3.2, 3.2))
def test_outline_is_that_of_many_points_on_the_faces(x, y, z, yaw):
    one = box(x, y, z, 3.0, 2.0, 2.0, yaw)
    corner = corners(one)[0]
    step = np.linspace(0, 1, 41)
    weights = np.stack(np.meshgrid(step, step, step, indexing="ij"), -1).reshape(-1, 3)
    edge = corner[[3, 1, 4]] - corner[0]
    inner = corner[0] + weights @ np.array([edge[0], corner[1] - corner[0], edge[2]])
    uv, depth = project(CAMERA, AHEAD, inner)
    seen = depth > MIN_DEPTH
    found = outlines(CAMERA, AHEAD, one)[0]
    inside = seen & (uv[:, 0] > 0) & (uv[:, 0] < 640) & (uv[:, 1] > 0) & (uv[:, 1] < 480)
    if inside.any():
        assert (uv[inside].min(0) >= found[:2] - 1e-6).all()
        assert (uv[inside].max(0) <= found[2:] + 1e-6).all()
    if depth.min() > 1.0 and not np.isnan(found).any():
        low, high = np.clip(uv.min(0), 0, (640, 480)), np.clip(uv.max(0), 0, (640, 480))
        assert np.allclose(found, [*low, *high], atol=1e-6)


def test_points_all_over_a_box_fit_it():
    rig = Rig("r", street_rig(None).lidar, {"CAM_FRONT": street_rig(None).cameras["CAM_FRONT"]})
    one = box(0, 15, -1)
    rng = np.random.default_rng(0)
    points = np.zeros((4000, 5), np.float32)
    points[:, :3] = one[0, :3] + rng.uniform(-0.5, 0.5, (4000, 3)) * one[0, 3:6]
    points[::50, :3] += 30  # elsewhere
    none = np.zeros(1, np.int32)
    truth = Truth(one, none, ("car",), none, none, {"CAM_FRONT": np.array([[0, 0, 1, 1]], np.float32)})
    frame = RigFrame(rig, 0, points, {}, truth=truth)
    (found,) = fit(frame)
    assert found.on_points > 0.9
    assert found.on_label == 0.0
    assert found.points == 3920
    assert found.label == "car"
    assert summary([found]).boxes == 1
    assert summary([found], least=5000).on_points is None
    assert fit(frame, 2.0)[0].on_points < 0.8
    assert fit(frame, 40.0)[0].on_points == 0.0
    assert fit(dataclasses.replace(frame, points=None))[0].on_points is None
    assert fit(dataclasses.replace(frame, truth=None)) == []


def test_a_synthetic_street_fits_and_turned_cameras_do_not():
    frames = [RigWorld(7).frame(i) for i in (0, 12, 24)]
    right = summary([each for frame in frames for each in fit(frame)])
    assert right.boxes > 30
    assert right.on_points > 0.5
    for side in (2.0, -2.0):
        wrong = summary([each for frame in frames for each in fit(frame, side)])
        assert wrong.on_points < 0.8 * right.on_points


def test_nuscenes_fits_and_turned_cameras_do_not():
    (frame,) = read_frames(shared_data() / "nuscenes_sample/frame.json", 0, 5)
    right = summary(fit(frame))
    assert right.labels == 84  # every rectangle of the file found its box
    assert right.on_label > 0.9
    assert right.boxes > 25
    assert 0.2 < right.on_points < 1
    for side in (2.0, -2.0):
        wrong = summary(fit(frame, side))
        assert wrong.on_label < 0.2
        assert wrong.on_points < 0.5 * right.on_points


@pytest.mark.parametrize(
    ("place", "boxes"),
    [("training/calib/000000.txt", 1), ("training/velodyne/000001.bin", 3), ("training/label_2/000002.txt", 2),
     ("reduced/000008.json", 6)],
)  # fmt: skip
def test_kitti_fits_rectangles_that_people_drew(place, boxes):
    (frame,) = read_frames(shared_data() / "kitti_mini" / place)
    right = summary(fit(frame))
    assert right.labels == boxes
    assert right.on_label > 0.85
    for side in (2.0, -2.0):
        wrong = summary(fit(frame, side))
        assert wrong.on_label < 0.8 * right.on_label
        assert wrong.on_points < 0.9 * right.on_points
