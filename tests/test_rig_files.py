"""Rigs from files: nuScenes-style infos and KITTI against what is stored beside them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgekit.errors import UsageError
from edgekit.rig import corners, count_inside, in_picture, inverse
from edgekit.rig_files import (
    KITTI_CLASSES,
    read_detections,
    read_kitti,
    read_kitti_info,
    read_nuscenes,
    read_points,
)
from tests.helpers import shared_data

NUSCENES, KITTI = "nuscenes_sample/frame.json", "kitti_mini/training"


@pytest.fixture(scope="module")
def nuscenes():
    return read_nuscenes(shared_data() / NUSCENES)


def iou(a, b):
    left, top = np.maximum(a[:2], b[:2])
    right, bottom = np.minimum(a[2:], b[2:])
    both = max(right - left, 0) * max(bottom - top, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def outline(frame, name, box):
    """The rectangle around a box in a picture, cut at its edges; None where a corner is behind the lens."""
    uv, depth = frame.project(name, corners(box[None])[0])
    if (depth < 0.5).any():
        return None
    camera = frame.rig.cameras[name]
    size = np.array([camera.width, camera.height])
    return np.concatenate([np.clip(uv.min(0), 0, size), np.clip(uv.max(0), 0, size)])


def test_nuscenes_is_read_as_it_is_written(nuscenes):
    assert nuscenes.points.shape == (34688, 5)
    assert nuscenes.rings.min() == 0
    assert nuscenes.rings.max() == 31
    assert 0 <= nuscenes.points[:, 3].min() < nuscenes.points[:, 3].max() <= 1
    assert len(nuscenes.truth) == 69
    assert nuscenes.truth.names[0] == "car"
    assert nuscenes.truth.names[9] == "barrier"
    assert len(nuscenes.shots) == 6
    assert nuscenes.taken_ns == 1532402927_647951_000
    assert nuscenes.rig.cameras["CAM_FRONT"].offset_ms == pytest.approx(-35.491, abs=1e-3)
    assert all(shot.image.shape == (900, 1600, 3) for shot in nuscenes.shots.values())
    # rings rise with their number; the lowest meet the car itself
    up = np.arctan2(nuscenes.points[:, 2], np.hypot(nuscenes.points[:, 0], nuscenes.points[:, 1]))
    means = [up[nuscenes.rings == ring].mean() for ring in range(32)]
    assert (np.diff(means[4:]) > 0).all()


def test_nuscenes_without_its_pictures_has_the_same_rig(nuscenes):
    quick = read_nuscenes(shared_data() / NUSCENES, pictures=False)
    assert quick.rig == nuscenes.rig
    assert quick.shots == {}
    with pytest.raises(UsageError, match="has no frame 1"):
        read_nuscenes(shared_data() / NUSCENES, 1)


def test_nuscenes_boxes_hold_as_many_points_as_its_labels_say(nuscenes):
    stored = nuscenes.truth.points
    ours = count_inside(nuscenes.points, nuscenes.truth.boxes)
    assert stored.sum() > 900
    # theirs were counted before the boxes were rounded and turned from the world: points on a face may change sides
    assert (np.abs(ours - stored) <= np.maximum(2, 0.1 * stored)).all()
    assert np.abs(ours - stored).sum() < 0.03 * stored.sum()
    # a box whose length and width are exchanged, or whose z is its bottom, does not
    turned = nuscenes.truth.boxes.copy()
    turned[:, 6] += np.pi / 2
    assert np.abs(count_inside(nuscenes.points, turned) - stored).sum() > 300
    raised = nuscenes.truth.boxes.copy()
    raised[:, 2] += raised[:, 5] / 2
    assert np.abs(count_inside(nuscenes.points, raised) - stored).sum() > 300


def test_nuscenes_projects_as_its_own_matrices_do(nuscenes):
    info = json.loads((shared_data() / NUSCENES).read_text())["data_list"][0]
    for name, image in info["images"].items():
        matrix = np.eye(4)
        matrix[:3, :3] = image["cam2img"]
        matrix = matrix @ np.array(image["lidar2cam"])
        xyz = nuscenes.points[:, :3].astype(float) @ matrix[:3, :3].T + matrix[:3, 3]
        uv, depth = nuscenes.project(name, nuscenes.points)
        seen = in_picture(nuscenes.rig.cameras[name], uv, depth)
        assert seen.sum() > 1500
        assert np.abs(xyz[seen, :2] / xyz[seen, 2:] - uv[seen]).max() < 0.1
        assert np.allclose(xyz[seen, 2], depth[seen], atol=1e-3)


def test_nuscenes_labels_of_pictures_are_our_boxes(nuscenes):
    """The data set's 2-D boxes, made by its own code, against the outline of our 3-D ones."""
    info = json.loads((shared_data() / NUSCENES).read_text())["data_list"][0]
    found = []
    for name, labels in info["cam_instances"].items():
        outlines = [outline(nuscenes, name, box) for box in nuscenes.truth.boxes]
        for label in labels:
            overlaps = [
                iou(np.array(label["bbox"]), o) for o in outlines if o is not None and (o[2:] > o[:2]).all()
            ]
            found.append(max(overlaps, default=0.0))
    assert len(found) > 60
    assert np.mean(np.array(found) > 0.9) > 0.9


def test_nuscenes_knows_how_the_vehicle_moved(nuscenes):
    for shot in nuscenes.shots.values():
        seconds = (nuscenes.taken_ns - shot.taken_ns) / 1e9
        assert shot.motion[0, 3] == pytest.approx(9.2 * seconds, abs=0.02)  # ahead, at one speed
        assert np.abs(shot.motion[1:3, 3]).max() < 0.01
    assert np.linalg.det(nuscenes.pose[:3, :3]) == pytest.approx(1)


@pytest.mark.parametrize("name", ["000000", "000001", "000002"])
def test_kitti_boxes_are_where_its_picture_labels_are(name):
    frame = read_kitti(shared_data() / KITTI, name)
    text = (shared_data() / KITTI / "label_2" / f"{name}.txt").read_text()
    labels = [line.split() for line in text.splitlines() if not line.startswith("DontCare")]
    assert len(labels) == len(frame.truth)
    for words, box, cls, points in zip(
        labels, frame.truth.boxes, frame.truth.classes, frame.truth.points, strict=True
    ):
        assert KITTI_CLASSES[cls] == words[0]
        assert iou(np.array(words[4:8], float), outline(frame, "image_2", box)) > 0.7
        assert points >= 5
        # the observation angle says the same heading by another way
        alpha, centre = float(words[3]), frame.project("image_2", box[None, :3])[0][0]
        camera = frame.rig.cameras["image_2"]
        away = np.arctan2(centre[0] - camera.cx, camera.fx)
        heading = -np.pi / 2 - box[6]  # about the camera's axis down, from its axis to the right
        assert np.cos(heading - away - alpha) > 0.99
    # points lie on what the picture shows: the frame's own calibration has the lidar above the camera, 1.6 m up
    ground = frame.points[(np.hypot(*frame.points[:, :2].T) < 12)][:, 2]
    assert np.percentile(ground, 20) == pytest.approx(-1.73, abs=0.2)


def test_kitti_info_counts_its_points():
    path = shared_data() / "kitti_mini/reduced/000008.json"
    frame = read_kitti_info(path)
    info = json.loads(path.read_text())["data_list"][0]
    labels = [i for i in info["instances"] if i["bbox_label_3d"] >= 0]
    stored = np.array([i["num_lidar_pts"] for i in labels])
    assert frame.truth.names == ("Pedestrian", "Cyclist", "Car")
    assert len(frame.truth) == 6
    assert (np.abs(frame.truth.points - stored) <= np.maximum(2, 0.1 * stored)).all()
    matrix = np.array(info["images"]["CAM2"]["lidar2img"])
    xyz = frame.points[:, :3].astype(float) @ matrix[:3, :3].T + matrix[:3, 3]
    uv, _ = frame.project("image_2", frame.points)
    assert np.abs(xyz[:, :2] / xyz[:, 2:] - uv).max() < 0.3


def test_scans_alone_and_a_teachers_detections():
    folder = shared_data() / "kitti_velo10"
    for name in ("000000", "000003", "000005"):
        frame = read_kitti(folder, name)
        assert frame.points.shape[1] == 5
        assert frame.rig.cameras == {}
        assert frame.truth is None
        boxes, classes, scores = read_detections(folder / "ref_boxes_velo" / f"{name}.txt")
        assert boxes.shape == (len(classes), 9)
        assert np.isnan(boxes[:, 7:]).all()
        assert (scores > 0.1).all()
        assert (count_inside(frame.points, boxes) > 0)[scores > 0.15].all()
    # the same car as in the labels of the whole frame
    labels = read_kitti(shared_data() / KITTI, "000001").truth
    boxes, _, _ = read_detections(folder / "ref_boxes_velo/000001.txt")
    apart = np.linalg.norm(labels.boxes[1, :3] - boxes[0, :3])
    assert apart < 0.3


# --- made-up files, for what needs no data -------------------------------------------------------


def tiny_info(**changes):
    """An info file with a LiDAR of three points and one box."""
    turn = [[0.0, 1, 0, 1], [-1, 0, 0, 0], [0, 0, 1, 2], [0, 0, 0, 1]]
    frame = {
        "timestamp": 12.5,
        "lidar_points": {"lidar_path": "p.bin", "lidar2ego": turn},
        "images": {},
        "instances": [
            {
                "bbox_3d": [1, 2, 3, 4, 2, 1, 0.5],
                "bbox_label_3d": 1,
                "num_lidar_pts": 3,
                "velocity": [float("nan")] * 2,
            },
            {"bbox_3d": [9] * 7, "bbox_label_3d": 1, "num_lidar_pts": 0},
        ],
    }
    frame.update(changes)
    return {"metainfo": {"categories": {"van": 1, "car": 0}}, "data_list": [frame]}


def write(folder, info):
    np.arange(15, dtype=np.float32).tofile(folder / "p.bin")
    path = folder / "i.json"
    path.write_text(info if isinstance(info, str) else json.dumps(info))
    return path


def test_an_info_without_pictures(tmp_path):
    frame = read_nuscenes(write(tmp_path, tiny_info()))
    assert frame.taken_ns == 12_500_000_000
    assert frame.points[1].tolist() == [5, 6, 7, np.float32(8 / 255), 0]
    assert frame.rings.tolist() == [4, 9, 14]
    assert frame.truth.names == ("car", "van")
    assert frame.truth.boxes[0, :7].tolist() == [1, 2, 3, 4, 2, 1, 0.5]
    assert np.isnan(frame.truth.boxes[:, 7:]).all()
    assert frame.pose is None
    assert np.allclose(frame.rig.lidar.to_ego @ inverse(frame.rig.lidar.to_ego), np.eye(4))
    assert frame.rig.lidar.to_ego[:3, :3] @ (0, 1, 0) == pytest.approx((1, 0, 0))  # it looks along its y


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not usable"),
        ({"metainfo": {}}, "'data_list' is missing"),
        ({"metainfo": {}, "data_list": []}, "has no frame 0"),
        (tiny_info(lidar_points={"lidar_path": "p.bin"}), "'lidar2ego' is missing"),
        (tiny_info(lidar_points={"lidar_path": "../p.bin", "lidar2ego": np.eye(4).tolist()}), "plain name"),
        (
            tiny_info(lidar_points={"lidar_path": "q.bin", "lidar2ego": np.eye(4).tolist()}),
            "q.bin: No such file",
        ),
        (tiny_info(lidar_points={"lidar_path": "p.bin", "lidar2ego": [[2, 0], [0, 2]]}), "shape"),
        (tiny_info(lidar_points={"lidar_path": "p.bin", "lidar2ego": (2 * np.eye(4)).tolist()}), "rotation"),
        (tiny_info(timestamp="noon"), "not usable"),
        (tiny_info(instances=[{"bbox_3d": [1, 2], "bbox_label_3d": 1, "num_lidar_pts": 3}]), "not usable"),
        (tiny_info(images={"C": {"cam2img": 3}}), "not usable"),
        (tiny_info(images=[3]), "not usable"),
    ],
)
def test_a_bad_info_is_one_line(tmp_path, info, said):
    with pytest.raises(UsageError) as caught:
        read_nuscenes(write(tmp_path, info))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_points_and_detections(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"\0" * 30)
    with pytest.raises(UsageError, match=r"30 bytes, expected rows of 4 float32"):
        read_points(path, 4)
    np.full(8, np.inf, np.float32).tofile(path)
    with pytest.raises(UsageError, match="not finite"):
        read_points(path, 4)
    text = tmp_path / "x.txt"
    for wrong in ("1 2 3\n", "a b c d e f g h i\n"):
        text.write_text(wrong)
        with pytest.raises(UsageError, match="expected lines of 9 numbers"):
            read_detections(text)
    text.write_text("")
    assert [len(part) for part in read_detections(text)] == [0, 0, 0]


def test_bad_kitti_files(tmp_path):
    (tmp_path / "velodyne").mkdir()
    (tmp_path / "calib").mkdir()
    np.zeros(8, np.float32).tofile(tmp_path / "velodyne/000007.bin")
    assert len(read_kitti(tmp_path, "000007").points) == 2
    (tmp_path / "calib/000007.txt").write_text("P2: 1 2 3\n")
    with pytest.raises(UsageError, match="'Tr_velo_to_cam'"):
        read_kitti(tmp_path, "000007")
    with pytest.raises(UsageError, match="000008"):
        read_kitti(tmp_path, "000008")
