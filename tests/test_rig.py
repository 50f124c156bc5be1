"""A rig: calibration files, frames of reference, projections, boxes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.rig import (
    Camera,
    Lidar,
    Mount,
    Rig,
    RigFrame,
    Shot,
    corners,
    count_inside,
    in_picture,
    inside,
    inverse,
    mosaic,
    moved,
    project,
    quaternion,
    rigid,
    rotation_matrix,
    unproject,
)
from edgekit.synth.street_rig import street_rig
from tests.helpers import ROOT

angle = st.floats(-math.pi, math.pi)
metre = st.floats(-3, 3)


@st.composite
def mounts(draw):
    """Any place and any direction, also turned upside down."""
    q = np.array(draw(st.tuples(*[st.floats(-1, 1)] * 4)))
    length = float(np.linalg.norm(q))
    q = q / length if length > 0.1 else np.array([1.0, 0, 0, 0])
    return (draw(metre), draw(metre), draw(metre)), tuple(float(v) for v in q)


@st.composite
def cameras(draw):
    position, rotation = draw(mounts())
    width, height = draw(st.integers(16, 2000)), draw(st.integers(16, 2000))
    return Camera(position, rotation, width, height, draw(st.floats(20, 3000)), draw(st.floats(20, 3000)),
                  draw(st.floats(0, width)), draw(st.floats(0, height)), draw(st.floats(-50, 0)))  # fmt: skip


@given(cameras(), mounts(), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_what_is_projected_comes_back(camera, mount, seed):
    rng = np.random.default_rng(seed)
    frame = RigFrame(Rig("r", Lidar(*mount), {"c": camera}), 0, None, {})
    uv = rng.uniform(0, (camera.width, camera.height), (50, 2))
    depth = rng.uniform(0.2, 80, 50)
    to_camera = frame.lidar_to_camera("c")
    points = unproject(camera, to_camera, uv, depth)
    again, far = frame.project("c", points)
    assert np.allclose(again, uv, atol=1e-5)
    assert np.allclose(far, depth, atol=1e-9)
    assert in_picture(camera, again, far).sum() >= 49  # one on the very edge may fall out
    # straight behind the lens nothing is in the picture, wherever the formula would put it
    behind, far = project(camera, to_camera, unproject(camera, to_camera, uv, -depth))
    assert np.isnan(behind).all()
    assert not in_picture(camera, behind, far).any()


@given(mounts())
def test_quaternions_and_matrices_are_the_same_turns(mount):
    position, rotation = mount
    turn = rotation_matrix(rotation)
    assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(turn) == pytest.approx(1)
    assert np.allclose(rotation_matrix(quaternion(turn)), turn, atol=1e-12)
    assert np.allclose(inverse(rigid(turn, position)) @ rigid(turn, position), np.eye(4), atol=1e-12)


def test_a_camera_looks_along_its_axis():
    rig = street_rig()
    for name, heading in (
        ("CAM_FRONT", 0),
        ("CAM_FRONT_LEFT", 55),
        ("CAM_BACK", 180),
        ("CAM_BACK_RIGHT", -110),
    ):
        camera = rig.cameras[name]
        ahead = np.array([math.cos(math.radians(heading)), math.sin(math.radians(heading)), 0.0])
        spot = np.array(
            [np.array(camera.position) + 10 * ahead, np.array(camera.position) + 10 * ahead + (0, 0, 1)]
        )
        uv, depth = project(camera, camera.from_ego, spot)
        assert np.allclose(depth, 10)
        assert np.allclose(uv[0], (camera.cx, camera.cy), atol=1e-6)
        assert np.allclose(
            uv[1], (camera.cx, camera.cy - camera.fy / 10), atol=1e-6
        )  # higher up is further up
    left = rig.cameras["CAM_FRONT"]
    uv, _ = project(left, left.from_ego, np.array([[12.0, 2.0, 1.5]]))
    assert uv[0, 0] < left.cx


def test_the_lidar_is_mounted_as_on_nuscenes():
    rig = street_rig()
    right, ahead = rig.lidar.to_ego[:3, 0], rig.lidar.to_ego[:3, 1]
    assert np.allclose(ahead, (1, 0, 0), atol=1e-9)
    assert np.allclose(right, (0, -1, 0), atol=1e-9)


NAMES = st.text("aZ09_-. é中", min_size=1, max_size=8)


@given(st.dictionaries(NAMES, cameras(), max_size=3), mounts(), NAMES)
@settings(max_examples=40, deadline=None)
def test_a_rig_is_what_its_file_says(tmp_path_factory, cams, mount, name):
    rig = Rig(name, Lidar(*mount, 75.0), cams)
    path = tmp_path_factory.mktemp("rig") / "rig.toml"
    rig.write(path)
    again = Rig.read(path)
    assert again == rig
    assert list(again.cameras) == list(rig.cameras)
    assert again.digest() == rig.digest()


def test_the_digest_is_that_of_the_calibration():
    rig = street_rig()
    assert dataclasses.replace(rig, name="other").digest() == rig.digest()
    moved_lidar = dataclasses.replace(rig.lidar, position=(0.94, 0.0, 1.8400001))
    assert dataclasses.replace(rig, lidar=moved_lidar).digest() != rig.digest()
    turned = dict(reversed(list(rig.cameras.items())))
    assert dataclasses.replace(rig, cameras=turned).digest() != rig.digest()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("period_ms", "period_s", "period_s"),
        ("fx = ", "fx = -", "focal lengths"),
        ("width = 256", "width = 0", "0x144"),
        ("rotation = [", "rotation = [9.0, ", "rotation"),
        ("rotation = [0.7", "rotation = [9.7", "length"),
        ("[lidar]", "[radar]", "radar"),
        ("name = ", "name == ", "not valid TOML"),
        ("CAM_BACK]", "lidar]", "name 'lidar'"),
    ],
)
def test_a_wrong_file_is_one_line_that_says_where(tmp_path, old, new, said):
    path = tmp_path / "car.toml"
    text = street_rig().toml()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError) as caught:
        Rig.read(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith("rig car.toml")
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(UsageError, match=r"rig none.toml: no such file"):
        Rig.read(tmp_path / "none.toml")


@given(st.tuples(metre, metre, metre), st.tuples(*[st.floats(0.2, 9)] * 3), angle, st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_points_in_a_box_are_between_its_corners(centre, size, yaw, seed):
    box = np.array([[*centre, *size, yaw]])
    corner = corners(box)[0]
    weights = np.random.default_rng(seed).dirichlet(np.ones(8), 40)
    points = weights @ corner
    assert inside(points, box[0], 1e-9).all()
    assert count_inside(points, box)[0] >= 39
    outside = box[0, :3] + 1.01 * (corner - box[0, :3])
    assert not inside(outside, box[0]).any()
    assert inside(outside, box[0], 0.02 * max(size)).all()
    # the first and last corner of the bottom are its front, to which yaw points
    front = (corner[0] + corner[3]) / 2 - corner[:4].mean(0)
    assert np.allclose(front[:2], size[0] / 2 * np.array([math.cos(yaw), math.sin(yaw)]), atol=1e-9)
    assert corner[:4, 2].max() < corner[4:, 2].min()


@given(angle, metre, metre, st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_moved_boxes_hold_the_moved_points(yaw, x, y, seed):
    rng = np.random.default_rng(seed)
    boxes = np.column_stack([rng.uniform(-9, 9, (5, 3)), rng.uniform(1, 4, (5, 3)), rng.uniform(-3, 3, 5),
                             rng.uniform(-9, 9, (5, 2))])  # fmt: skip
    turn = rigid(rotation_matrix((math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2))), (x, y, 1.0))
    again = moved(boxes, turn)
    expected = corners(boxes) @ turn[:3, :3].T + turn[:3, 3]
    assert np.allclose(corners(again), expected, atol=1e-4)
    assert np.allclose(again[:, 7:9], boxes[:, 7:9] @ turn[:2, :2].T, atol=1e-4)


def test_parts_come_in_by_time_and_hold_one_sensor_each():
    rig = street_rig(None, 64, 36)
    names = list(rig.cameras)
    shots = {name: Shot(np.full((36, 64, 3), i, np.uint8), 1000 + 10 * i) for i, name in enumerate(names)}
    frame = RigFrame(rig, 1045, np.zeros((3, 5), np.float32), shots, np.zeros(3, np.int16))
    parts = frame.parts()
    assert [name for _, name, _ in parts] == [*names[:5], "lidar", names[5]]
    assert [time for time, _, _ in parts] == [1000, 1010, 1020, 1030, 1040, 1045, 1050]
    for _, name, part in parts:
        assert (part.points is not None) == (name == "lidar")
        assert list(part.shots) == ([] if name == "lidar" else [name])
    later = frame.shifted(7)
    assert (later.taken_ns, later.shots[names[2]].taken_ns) == (1052, 1027)


def test_the_mosaic_puts_left_cameras_on_the_left():
    rig = street_rig(None, 64, 36)
    shots = {name: Shot(np.full((36, 64, 3), i + 1, np.uint8), 0) for i, name in enumerate(rig.cameras)}
    del shots["CAM_BACK"]
    picture = mosaic(RigFrame(rig, 0, None, shots))
    number = {name: i + 1 for i, name in enumerate(rig.cameras)}
    assert picture.shape == (72, 192, 3)
    assert picture[0, ::64, 0].tolist() == [number[f"CAM_FRONT{side}"] for side in ("_LEFT", "", "_RIGHT")]
    assert picture[71, ::64, 0].tolist() == [number["CAM_BACK_LEFT"], 0, number["CAM_BACK_RIGHT"]]


def test_resized_cameras_see_the_same():
    camera = street_rig(3).cameras["CAM_FRONT"]
    small = camera.resized(100, 50)
    spot = np.array([[20.0, 3.0, 1.0]])
    big_uv, _ = project(camera, camera.from_ego, spot)
    small_uv, _ = project(small, small.from_ego, spot)
    assert np.allclose(big_uv / (camera.width, camera.height), small_uv / (100, 50))


def test_a_mount_needs_a_unit_quaternion():
    with pytest.raises(ValueError, match="length 2"):
        Mount((0.0, 0.0, 0.0), (2.0, 0.0, 0.0, 0.0))


def test_the_documented_file_is_the_nominal_rig(tmp_path):
    text = (ROOT / "docs" / "rigs.md").read_text()
    path = tmp_path / "rig.toml"
    path.write_text(text.partition("```toml\n")[2].partition("```")[0])
    read, nominal = Rig.read(path), street_rig()
    assert np.allclose(read.lidar.to_ego, nominal.lidar.to_ego, atol=1e-6)
    front, other = read.cameras["CAM_FRONT"], nominal.cameras["CAM_FRONT"]
    assert np.allclose(front.to_ego, other.to_ego, atol=1e-6)
    assert np.allclose(front.matrix, other.matrix, atol=0.01)
    assert front.offset_ms == pytest.approx(other.offset_ms, abs=0.1)


def test_matrices_of_a_mount_cannot_be_changed_by_their_readers():
    with pytest.raises(ValueError, match="read-only"):
        street_rig().lidar.to_ego[0, 0] = 3
