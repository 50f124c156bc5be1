"""The picture of a rig: boxes and points land where they belong, and nothing upsets it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.rig import Rig, RigFrame, Truth, corners
from edgekit.synth.street_rig import RigWorld, street_rig
from edgekit.tasks.detect.draw import class_color
from edgekit.tasks.fusion.draw import _write, bird_view, camera_view, draw

pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def frame():
    return RigWorld(2, width=128, height=72).frame(3)


def truth(boxes, classes=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 9)
    n = len(boxes)
    classes = np.zeros(n, np.int32) if classes is None else np.array(classes, np.int32)
    return Truth(boxes, classes, ("a", "b"), np.zeros(n, np.int32), np.zeros(n, np.int32))


def bare(boxes=(), **changes):
    """A frame of the nominal rig with nothing but labels."""
    frame = RigFrame(street_rig(None, 128, 72), 0, None, {}, truth=truth(boxes))
    return dataclasses.replace(frame, **changes)


def colored(picture, color, tolerance=60):
    """Rows and columns of pixels near a colour."""
    return np.argwhere(np.abs(picture.astype(int) - color).sum(2) < tolerance)


def test_six_cameras_and_the_view_from_above(frame):
    before = frame.shots["CAM_FRONT"].image.copy()
    picture = draw(frame, width=320)
    assert picture.dtype == np.uint8
    assert picture.shape == (360, 3 * 320 + 360, 3)
    assert np.array_equal(frame.shots["CAM_FRONT"].image, before)
    assert np.array_equal(picture[:180, 320:640], camera_view(frame, "CAM_FRONT", width=320))
    assert np.array_equal(picture[180:, 640:960], camera_view(frame, "CAM_BACK_RIGHT", width=320))
    assert np.array_equal(picture[:, 960:], bird_view(frame, size=360))
    assert np.array_equal(draw(frame, width=320), picture)


def test_a_box_ahead_is_ahead():
    """12 m ahead of the vehicle and 2 m to the left, in the lidar frame of nuScenes: x to the right, y ahead."""
    box = [-2.0, 11.0, -1.0, 4.0, 2.0, 1.6, np.pi / 2, 0, 0]
    plain = bare([box])
    color = class_color(0)
    seen = colored(camera_view(plain, "CAM_FRONT", width=640), color)
    uv, _ = plain.project("CAM_FRONT", corners(np.array([box]))[0])
    uv *= 5
    assert len(seen) > 100
    assert abs(seen[:, 1].min() - uv[:, 0].min()) < 2
    assert abs(seen[:, 1].max() - uv[:, 0].max()) < 2
    assert abs(seen[:, 0].max() - uv[:, 1].max()) < 2
    assert len(colored(camera_view(plain, "CAM_BACK", width=640), color)) == 0
    above = bird_view(plain, size=550, reach_m=55)
    where = colored(above, color).mean(0)
    assert where == pytest.approx((275 - 5 * 11.94, 275 - 5 * 2.0), abs=8)
    # twice as far up as it is wide, since it heads ahead
    spread = np.ptp(colored(above, color), axis=0)
    assert spread[0] == pytest.approx(20, abs=2)
    assert spread[1] == pytest.approx(10, abs=2)


def test_boxes_are_drawn_where_they_were_when_the_picture_was_taken(frame):
    still, moving = [0.0, 15.0, -1.0, 4.0, 2.0, 1.6, 0, 0, 0], [0.0, 15.0, -1.0, 4.0, 2.0, 1.6, 0, 30, 0]
    views = [
        camera_view(dataclasses.replace(frame, truth=truth([box]), points=None), "CAM_FRONT", width=640)
        for box in (still, moving)
    ]
    a, b = (colored(view, class_color(0))[:, 1].mean() for view in views)
    late = (frame.shots["CAM_FRONT"].taken_ns - frame.taken_ns) / 1e9
    focal = frame.rig.cameras["CAM_FRONT"].fx * 5
    assert b - a == pytest.approx(30 * late * focal / 14.5, abs=6)
    assert b < a - 15  # it came from the left


def test_found_boxes_have_colours_and_labels_are_white(frame):
    found = truth([[0, 12, -1, 4, 2, 1.6, 0, 0, 0]], [1])
    labelled = dataclasses.replace(frame, truth=truth([[5, 12, -1, 4, 2, 1.6, 0, 0, 0]], [0]), points=None)
    above = bird_view(labelled, found, size=400)
    assert len(colored(above, class_color(1))) > 20
    assert len(colored(above, class_color(0))) == 0
    assert len(colored(above, (225, 225, 225))) > 20


def test_sensors_may_be_missing(frame):
    shots = {name: shot for name, shot in frame.shots.items() if name != "CAM_BACK"}
    without = dataclasses.replace(frame, shots=shots, points=None, rings=None, truth=None)
    picture = draw(without, width=320)
    assert picture.shape == draw(frame, width=320).shape
    assert (picture[200:340, 330:630] == (28, 26, 24)).all()
    only_lidar = RigFrame(Rig("r", frame.rig.lidar), 0, frame.points, {})
    assert draw(only_lidar, width=320).shape == (320, 320, 3)
    one = RigFrame(
        Rig("r", frame.rig.lidar, {"c": frame.rig.cameras["CAM_BACK"]}),
        0,
        None,
        {"c": frame.shots["CAM_BACK"]},
    )
    assert draw(one, width=320).shape == (320, 640, 3)


@given(
    st.lists(
        st.tuples(*[st.floats(-80, 80)] * 3, *[st.floats(0, 30)] * 3, *[st.floats(allow_nan=True)] * 3),
        max_size=4,
    )
)
@settings(max_examples=40, deadline=None)
def test_no_box_upsets_it(boxes):
    with np.errstate(all="ignore"):
        frame = bare(np.array(boxes, np.float64).astype(np.float32))
    names = ("CAM_FRONT", "CAM_BACK_LEFT")
    few = Rig("r", frame.rig.lidar, {name: frame.rig.cameras[name] for name in names})
    assert draw(dataclasses.replace(frame, rig=few), width=64).shape == (64, 192, 3)


def test_the_outline_of_letters_lies_around_them():
    import cv2

    canvas = np.full((24, 260, 3), 128, np.uint8)
    _write(cv2, canvas, "CAM_FRONT_RIGHT", (6, 15))
    light = np.flatnonzero((canvas[..., 0] > 180).any(axis=0))
    dark = np.flatnonzero((canvas[..., 0] < 70).any(axis=0))
    assert len(light) > 50 and light[0] - 3 <= dark[0] < light[0] and light[-1] < dark[-1] <= light[-1] + 3
