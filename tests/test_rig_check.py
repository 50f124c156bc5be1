"""Telling a camera that is turned from one that is where the rig says."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from edgekit.rig import Shot, quaternion, rotation_matrix
from edgekit.rig_check import alarms, check
from edgekit.rig_files import read_kitti, read_nuscenes
from edgekit.synth.street_rig import RigWorld
from tests.helpers import shared_data


def said_to_look(frame, degrees, names=None):
    """The frame with a calibration in which cameras look that much further to the right than they do."""
    turn = math.radians(degrees)
    about_down = np.array(
        [[math.cos(turn), 0, math.sin(turn)], [0, 1, 0], [-math.sin(turn), 0, math.cos(turn)]]
    )
    cameras = {
        name: dataclasses.replace(camera, rotation=quaternion(rotation_matrix(camera.rotation) @ about_down))
        if names is None or name in names
        else camera
        for name, camera in frame.rig.cameras.items()
    }
    return dataclasses.replace(frame, rig=dataclasses.replace(frame.rig, cameras=cameras))


@pytest.fixture(scope="module")
def drives():
    worlds = [RigWorld(seed) for seed in (1001, 1002, 1003)]
    return [[world.frame(15 * i) for i in range(7)] for world in worlds]


def test_a_right_calibration_raises_no_alarm(drives):
    for frames in drives:
        found = check(frames)
        assert [each.camera for each in found] == list(frames[0].rig.cameras)
        assert alarms(found) == []
        assert sum(each.verdict == "fits" for each in found) >= 4
        assert all(abs(each.degrees) <= 0.5 for each in found)


@pytest.mark.parametrize("degrees", [2.0, -3.0])
def test_turned_cameras_are_told_by_how_much(drives, degrees):
    turned = 0
    for frames in drives:
        for each in check([said_to_look(frame, degrees) for frame in frames]):
            assert each.verdict != "fits", each
            if each.verdict == "turned":
                turned += 1
                assert each.degrees == pytest.approx(-degrees, abs=0.75)
    assert turned >= 14  # of 18


def test_one_turned_camera_is_named(drives):
    frames = [said_to_look(frame, 2.5, ("CAM_FRONT",)) for frame in drives[0]]
    lines = alarms(check(frames))
    assert len(lines) == 1
    assert "CAM_FRONT " in lines[0]
    assert "2.5 degrees further to the left" in lines[0]


def test_exchanged_cameras_do_not_fit(drives):
    frames = []
    for frame in drives[1]:
        a, b = frame.shots["CAM_FRONT_LEFT"], frame.shots["CAM_BACK_RIGHT"]
        swapped = {
            "CAM_FRONT_LEFT": Shot(b.image, a.taken_ns, a.motion),
            "CAM_BACK_RIGHT": Shot(a.image, b.taken_ns, b.motion),
        }
        frames.append(dataclasses.replace(frame, shots={**frame.shots, **swapped}))
    found = {each.camera: each for each in check(frames)}
    assert found["CAM_FRONT_LEFT"].verdict != "fits"
    assert found["CAM_BACK_RIGHT"].verdict != "fits"


def test_where_nothing_is_to_be_seen_nothing_is_said(drives):
    frame = drives[0][0]
    dark = {name: Shot(np.zeros_like(shot.image), shot.taken_ns) for name, shot in frame.shots.items()}
    for odd in (
        dataclasses.replace(frame, shots=dark),
        dataclasses.replace(frame, shots={}),
        dataclasses.replace(frame, points=None, rings=None),
        dataclasses.replace(frame, points=frame.points[:0], rings=frame.rings[:0]),
        dataclasses.replace(frame, points=frame.points[:3], rings=None),
    ):
        assert {each.verdict for each in check([odd])} == {"unclear"}
    assert check([]) == []


def test_the_real_rigs_fit_and_are_told_when_they_do_not():
    data = shared_data()
    frame = read_nuscenes(data / "nuscenes_sample/frame.json")
    found = check([frame])
    assert alarms(found) == []
    assert sum(each.verdict == "fits" for each in found) >= 5
    turned = check([said_to_look(frame, 2.0)])
    assert sum(each.verdict == "turned" for each in turned) >= 5
    assert all(each.degrees == pytest.approx(-2, abs=0.75) for each in turned if each.verdict == "turned")
    kitti = [read_kitti(data / "kitti_mini/training", name) for name in ("000000", "000002")]
    assert [each.verdict for each in check(kitti)] == ["fits"]
    assert [each.verdict for each in check([said_to_look(frame, -2.0) for frame in kitti])] == ["turned"]
