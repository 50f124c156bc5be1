"""Recordings of a rig, read back with Foxglove's own classes and the format's own reader."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("mcap", reason="needs the package mcap (edgekit[mcap])")
pytest.importorskip(
    "foxglove_schemas_protobuf", reason="needs foxglove-schemas-protobuf, Foxglove's own messages"
)
from foxglove_schemas_protobuf.CameraCalibration_pb2 import CameraCalibration
from foxglove_schemas_protobuf.CompressedImage_pb2 import CompressedImage
from foxglove_schemas_protobuf.FrameTransforms_pb2 import FrameTransforms
from foxglove_schemas_protobuf.ImageAnnotations_pb2 import ImageAnnotations
from foxglove_schemas_protobuf.PointCloud_pb2 import PointCloud
from foxglove_schemas_protobuf.RawImage_pb2 import RawImage
from foxglove_schemas_protobuf.SceneUpdate_pb2 import SceneUpdate

from edgekit.rig import outlines
from edgekit.runtime.sinks.mcap import McapSink
from edgekit.runtime.sinks.rigs import clipped, lines_in, outline_in, shown
from tests.recordings import replay
from tests.rig_items import rig_items
from tests.test_mcap import messages


def of(path: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for topic, _, message in messages(path):
        found.setdefault(topic, []).append(message)
    return found


def write(path: Path, **options: Any) -> dict[str, list[Any]]:
    with McapSink(path, **options) as sink:
        for item in rig_items():
            sink.write(item)
    return of(path)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return write(tmp_path_factory.mktemp("raw") / "a.mcap")


def matrix(transform: Any) -> np.ndarray:
    """child_to_parent [4, 4]."""
    r, t = transform.rotation, transform.translation
    x, y, z, w = r.x, r.y, r.z, r.w
    result = np.eye(4)
    result[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    result[:3, 3] = t.x, t.y, t.z
    return result


def test_points_and_pictures_are_what_was_measured(raw):
    rig = rig_items()[0].frame.rig
    assert len(raw["/rig/lidar/points"]) == 2, "the third moment has none"
    cloud = PointCloud.FromString(raw["/rig/lidar/points"][0].data)
    assert cloud.frame_id == "lidar"
    assert [f.name for f in cloud.fields] == ["x", "y", "z", "intensity", "dt", "ring"]
    assert {f.type for f in cloud.fields} == {7}
    assert [f.offset for f in cloud.fields] == [0, 4, 8, 12, 16, 20]
    points = np.frombuffer(cloud.data, np.float32).reshape(-1, cloud.point_stride // 4)
    assert np.array_equal(points[:, :5], rig.points)
    assert np.array_equal(points[:, 5], rig.rings)
    assert cloud.pose.orientation.w == 1
    assert len(raw["/rig/CAM_FRONT/image"]) == 2
    assert len(raw["/rig/CAM_BACK/image"]) == 3
    image = RawImage.FromString(raw["/rig/CAM_BACK/image"][0].data)
    assert (image.width, image.height, image.encoding, image.step) == (128, 72, "bgr8", 384)
    assert image.data == rig.shots["CAM_BACK"].image.tobytes()
    early = raw["/rig/lidar/points"][0].publish_time - raw["/rig/CAM_BACK/image"][0].publish_time
    assert early == rig.taken_ns - rig.shots["CAM_BACK"].taken_ns > 0
    assert "/rig/image" not in raw, "all cameras in one picture would be a second copy"


def test_a_point_goes_through_what_is_recorded_to_the_pixel_that_the_rig_says(raw):
    rig = rig_items()[0].frame.rig
    tree = {
        t.child_frame_id: t for t in FrameTransforms.FromString(raw["/rig/transforms"][0].data).transforms
    }
    assert tree["lidar"].parent_frame_id == tree["CAM_BACK"].parent_frame_id == "ego"
    assert tree["ego"].parent_frame_id == "world"
    assert np.allclose(matrix(tree["ego"]), rig.pose)
    for name in rig.rig.cameras:
        calibration = CameraCalibration.FromString(raw[f"/rig/{name}/calibration"][0].data)
        assert calibration.frame_id == name
        p = np.array(calibration.P).reshape(3, 4)
        assert np.array_equal(p[:, :3].reshape(-1), calibration.K)
        assert list(calibration.R) == np.eye(3).reshape(-1).tolist()
        way = np.linalg.inv(matrix(tree[name])) @ matrix(tree["lidar"])
        ends = np.concatenate([rig.points[:, :3], np.ones((len(rig.points), 1))], 1) @ way.T @ p.T
        uv, depth = rig.project(name, rig.points)
        ahead = depth > 1
        assert np.allclose(ends[ahead, :2] / ends[ahead, 2:], uv[ahead], atol=0.01)


def test_boxes_stand_in_space(raw):
    item = rig_items()[0]
    scenes = [SceneUpdate.FromString(m.data) for m in raw["/rig/bev/boxes"]]
    assert len(scenes) == 3
    (entity,) = scenes[0].entities
    ours = shown(item.result)
    assert (entity.frame_id, entity.id) == ("lidar", "bev/boxes")
    assert len(entity.cubes) == len(entity.texts) == len(ours) == len(item.result) - 1
    for cube, text, each in zip(entity.cubes, entity.texts, ours, strict=True):
        at, turn = cube.pose.position, cube.pose.orientation
        assert np.allclose((at.x, at.y, at.z, cube.size.x, cube.size.y, cube.size.z), each.box[:6])
        assert math.remainder(2 * math.atan2(turn.z, turn.w) - each.box[6], 2 * math.pi) == pytest.approx(
            0, abs=1e-6
        )
        assert text.text == f"{each.label} {each.score:.2f}"
        assert text.billboard
        assert text.pose.position.z > at.z + cube.size.z / 2
    moving = [each for each in ours if each.velocity is not None]
    assert len(entity.arrows) == len(moving) > 0
    speed = math.hypot(*moving[0].velocity)
    assert entity.arrows[0].shaft_length + entity.arrows[0].head_length == pytest.approx(speed)
    (empty,) = scenes[1].entities
    assert (empty.id, len(empty.cubes)) == ("bev/boxes", 0), "nothing found: the boxes of before are gone"


def test_boxes_lie_on_the_pictures(raw):
    item = rig_items()[0]
    rig = item.frame.rig
    lines = 0
    for name, camera in rig.rig.cameras.items():
        notes = [ImageAnnotations.FromString(m.data) for m in raw[f"/rig/{name}/bev/annotations"]]
        around = outlines(camera, rig.lidar_to_camera(name), item.result.boxes[:-1])
        assert len(notes[0].points) == np.count_nonzero(~np.isnan(around[:, 0]))
        assert len(notes[0].texts) == len(notes[0].points)
        for drawn in notes[0].points:
            assert drawn.type == drawn.LINE_LIST
            assert len(drawn.points) % 2 == 0
            assert all(0 <= p.x <= camera.width and 0 <= p.y <= camera.height for p in drawn.points)
            lines += 1
        assert len(notes[1].points) == 0
    assert lines > 10
    image = raw["/rig/CAM_BACK/image"][0]
    assert raw["/rig/CAM_BACK/bev/annotations"][0].publish_time == image.publish_time, (
        "Foxglove pairs them by it"
    )
    assert len(raw["/rig/CAM_FRONT/bev/annotations"]) == 2, "no picture, nothing to draw on"


def test_results_say_what_was_missing(raw):
    import json

    result = json.loads(raw["/rig/bev/result"][2].data)
    assert result["task"] == "fusion"
    assert result["result"]["missing"] == ["CAM_FRONT", "lidar"]
    assert result["result"]["boxes"][1][7] is None


def test_jpeg_and_none(tmp_path):
    small = write(tmp_path / "j.mcap", images="jpeg")
    image = CompressedImage.FromString(small["/rig/CAM_BACK/image"][0].data)
    picture = cv2.imdecode(np.frombuffer(image.data, np.uint8), cv2.IMREAD_COLOR)
    theirs = rig_items()[0].frame.rig.shots["CAM_BACK"].image
    assert np.abs(picture.astype(int) - theirs).mean() < 12
    bare = write(tmp_path / "n.mcap", images="none")
    assert not any("image" in topic or "points" in topic for topic in bare)
    assert len(bare["/rig/bev/boxes"]) == 3
    assert len(bare["/rig/CAM_BACK/bev/annotations"]) == 3


def test_a_frame_that_was_not_kept_has_its_boxes(tmp_path):
    with McapSink(tmp_path / "a.mcap", images="none") as sink:
        for item in rig_items():
            sink.write(replace(item, frame=item.frame.without_pixels()))
    found = of(tmp_path / "a.mcap")
    assert set(found) == {"/rig/frame", "/rig/bev/result", "/rig/bev/boxes"}


def test_two_engines_share_the_sensors(tmp_path):
    with McapSink(tmp_path / "a.mcap") as sink:
        for item in rig_items():
            sink.write(item)
            sink.write(replace(item, engine="other"))
    found = of(tmp_path / "a.mcap")
    assert len(found["/rig/lidar/points"]) == 2
    assert len(found["/rig/bev/boxes"]) == len(found["/rig/other/boxes"]) == 3


def test_one_camera_of_it_can_be_played(tmp_path):
    write(tmp_path / "a.mcap")
    with replay(tmp_path / "a.mcap", "?camera=/rig/CAM_BACK/image") as source:
        frames = list(source)
    assert len(frames) == 3
    assert np.array_equal(frames[0].image, rig_items()[0].frame.rig.shots["CAM_BACK"].image)
    assert all(frame.rig is None for frame in frames)


def test_lines_are_cut_at_the_edges():
    lines = np.array([
        [-10, 5, 30, 5], [5, 5, 6, 6], [-5, -5, -1, -1], [5, -10, 5, 40], [-5, 15, 15, -5], [3, 3, 3, 3], [np.nan, 1, 2, 3],
        [0, 0, 20, 10], [30, 0, 30, 10],
    ])  # fmt: skip
    found = clipped(lines, 20, 10)
    assert np.allclose(
        found, [[0, 5, 20, 5], [5, 5, 6, 6], [5, 0, 5, 10], [0, 10, 10, 0], [3, 3, 3, 3], [0, 0, 20, 10]]
    )
    rng = np.random.default_rng(0)
    for line in rng.uniform(-30, 50, (200, 4)):
        steps = np.linspace(0, 1, 2001)[:, None]
        spots = line[:2] + steps * (line[2:] - line[:2])
        inside = spots[((spots >= 0) & (spots <= (20, 10))).all(1)]
        (cut,) = clipped(line[None], 20, 10) if len(inside) > 1 else (None,)
        if cut is not None:
            assert np.allclose(cut, [*inside[0], *inside[-1]], atol=0.08)


def test_nothing_of_a_box_behind_a_camera():
    rig = rig_items()[0].frame.rig
    box = np.array([0, -20, 0, 4, 2, 2, 0, 0, 0], np.float32)  # behind: the lidar looks along its y
    assert len(lines_in(rig, "CAM_FRONT", box)) == 0
    assert len(lines_in(rig, "CAM_BACK", box)) > 5


def test_a_box_that_moves_is_drawn_where_it_was_when_the_picture_was_taken():
    rig = rig_items()[0].frame.rig
    camera, shot = rig.rig.cameras["CAM_FRONT"], rig.shots["CAM_FRONT"]
    late = (shot.taken_ns - rig.taken_ns) / 1e9
    assert late < -0.02
    box = np.array([0, 20, -1, 4, 2, 1.5, 0, 15, 0], np.float32)  # across, at 15 m/s
    still = box.copy()
    still[7:9] = 0
    moved = still.copy()
    moved[0] += np.float32(15 * late)
    assert np.allclose(lines_in(rig, "CAM_FRONT", box), lines_in(rig, "CAM_FRONT", moved), atol=1e-3)
    assert np.allclose(outline_in(rig, "CAM_FRONT", box), outline_in(rig, "CAM_FRONT", moved), atol=1e-3)
    assert outline_in(rig, "CAM_FRONT", box)[0] < outline_in(rig, "CAM_FRONT", still)[0] - 1
    unknown = box.copy()
    unknown[7:9] = np.nan
    assert np.array_equal(lines_in(rig, "CAM_FRONT", unknown), lines_in(rig, "CAM_FRONT", still))
    assert camera.width == 128
