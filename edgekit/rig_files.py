"""Frames of rigs from files: nuScenes-style infos and the KITTI object benchmark, as the `rig.RigFrame` of the synthetic rig.

What each data set says is turned into the frames of reference of `edgekit.rig` here, once:

- **nuScenes** (as mmdetection3d writes it): boxes in the lidar frame (x to the right, y ahead), z is the centre, yaw
  from the lidar's x to the length. Pictures are taken up to 45 ms before the sweep ends; how the vehicle moved
  meanwhile follows from `lidar2cam`, which has it, and `cam2ego`, which has not: `Shot.motion`.
- **KITTI**: labels in the rectified camera frame, bottom centre, angle about its y axis, for what camera 2 sees alone;
  points in the velodyne frame (x ahead, y left). Where the rear axle is the files do not say: ego lies on the ground
  below the LiDAR, whose height is given as 1.73 m.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import UsageError, did_you_mean, printable
from edgekit.files import read_text
from edgekit.picture import read_header, read_picture
from edgekit.rig import (
    Camera,
    Lidar,
    Rig,
    RigFrame,
    Shot,
    Truth,
    count_inside,
    inverse,
    quaternion,
    rigid,
)

Array = np.ndarray

KITTI_CLASSES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc")
KITTI_HEIGHT = 1.73
"""Of the LiDAR above the road (Geiger et al., Vision meets Robotics: The KITTI Dataset, 2013, Fig. 3)."""
_MAX_BYTES = 1 << 28
_MAX_POINTS = 5_000_000


def read_frames(path: str | Path, first: int = 0, count: int = 1) -> Iterator[RigFrame]:
    """`count` frames from number `first` on, as many as there are, of what `path` is: an info file (JSON) of nuScenes or
    KITTI, or a file of one KITTI frame (`training/calib/000001.txt`, `training/velodyne/000001.bin`: that frame alone).

    Raises: UsageError for what is missing, damaged or none of these.
    """
    path = Path(path)
    what = f"frame {printable(path.name)}"
    if path.parent.name in ("velodyne", "image_2", "calib", "label_2"):
        yield read_kitti(path.parent.parent, path.stem)
        return
    if path.suffix.lower() != ".json":
        raise UsageError(
            f"{what}: not a recorded rig, expected an info file (*.json) or a file in KITTI's folders calib/, velodyne/, "
            "image_2/, label_2/. Check the path"
        )
    content = _content(path, what)
    for index in range(first, first + count):
        if index > first and index >= _length(content):
            return
        info = _entry(content, what, index)
        kitti = "CAM2" in info["images"] if isinstance(info.get("images"), dict) else False
        yield _kitti_frame(path, what, info) if kitti else _nuscenes_frame(path, what, info, index, True)


def read_nuscenes(path: str | Path, index: int = 0, *, pictures: bool = True) -> RigFrame:
    """Frame `index` of an info file as mmdetection3d 1.x writes it (`data_list`), as JSON.

    Pictures and points are looked for beside the file. Points have dt 0: the files do not say when each was
    measured. `pictures=False` reads no more of them than their size.

    Raises: UsageError for what is missing, damaged or says something impossible.
    """
    path = Path(path)
    what = f"frame {printable(path.name)}"
    return _nuscenes_frame(path, what, _entry(_content(path, what), what, index), index, pictures)


def _nuscenes_frame(path: Path, what: str, info: Mapping[str, Any], index: int, pictures: bool) -> RigFrame:
    try:
        lidar_to_ego = _matrix(info["lidar_points"]["lidar2ego"])
        taken_ns = _nanoseconds(info["timestamp"])
        raw = read_points(path.parent / _name(info["lidar_points"]["lidar_path"], what), 5)
        lidar = Lidar(_position(lidar_to_ego), quaternion(lidar_to_ego[:3, :3]), 50.0)
        cameras, shots = {}, {}
        for name, image in info["images"].items():
            matrix, to_ego = np.array(image["cam2img"], np.float64), _matrix(image["cam2ego"])
            shot_ns = _nanoseconds(image["timestamp"])
            file = path.parent / _name(image["img_path"], what)
            picture = read_picture(file) if pictures else None
            height, width = _size(file) if picture is None else picture.shape[:2]
            cameras[name] = Camera(
                _position(to_ego), quaternion(to_ego[:3, :3]), width, height, float(matrix[0, 0]),
                float(matrix[1, 1]), float(matrix[0, 2]), float(matrix[1, 2]), (shot_ns - taken_ns) / 1e6,
            )  # fmt: skip
            motion = cameras[name].to_ego @ _matrix(image["lidar2cam"]) @ lidar.from_ego
            if picture is not None:
                shots[name] = Shot(picture, shot_ns, motion)
        names = tuple(info["categories"])
        labels = info.get("instances", [])
        boxes = np.zeros((len(labels), 9), np.float32)
        for row, label in zip(boxes, labels, strict=True):
            row[:] = (*label["bbox_3d"], *label.get("velocity", (math.nan, math.nan)))
        truth = Truth(
            boxes, np.array([i["bbox_label_3d"] for i in labels], np.int32), names,
            np.array([i["num_lidar_pts"] for i in labels], np.int32), np.full(len(labels), -1, np.int32),
            {name: _seen(info["images"][name], seen, labels) for name, seen in info.get("cam_instances", {}).items()},
        )  # fmt: skip
        pose = _matrix(info["ego2global"]) if "ego2global" in info else None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise _unusable(what, error) from None
    points = np.zeros((len(raw), 5), np.float32)
    points[:, :3], points[:, 3] = raw[:, :3], np.clip(raw[:, 3] / 255.0, 0, 1)
    rig = Rig("nuscenes", lidar, cameras)
    return RigFrame(rig, taken_ns, points, shots, raw[:, 4].astype(np.int16), truth, pose, index)


def _seen(image: Mapping[str, Any], seen: list[Mapping[str, Any]], labels: list[Mapping[str, Any]]) -> Array:
    """The rectangles of `labels` float32 [n, 4] in a picture, NaN where it has none.

    The file lists boxes of a picture on their own: in the camera's frame, with its rectangle. The same box has the same
    class and size, and lies at the same place once it is brought there.
    """
    found = np.full((len(labels), 4), np.nan, np.float32)
    to_camera = _matrix(image["lidar2cam"])
    for each in seen:
        x, y, z, length, height, width = each["bbox_3d"][:6]
        near = [
            (float(np.linalg.norm(to_camera[:3, :3] @ box[:3] + to_camera[:3, 3] - (x, y, z))), i)
            for i, label in enumerate(labels)
            if label["bbox_label_3d"] == each["bbox_label_3d"]
            and np.allclose(
                (box := np.array(label["bbox_3d"], np.float64))[3:6], (length, width, height), atol=1e-3
            )
        ]
        if (
            near and min(near)[0] < 1.5
        ):  # half a box's height between bottom and centre, and the vehicle's motion
            found[min(near)[1]] = each["bbox"]
    return found


def read_kitti(folder: str | Path, name: str) -> RigFrame:
    """Frame `name` (as `000001`) of the KITTI object benchmark: FOLDER/velodyne/NAME.bin, and image_2/NAME.png,
    calib/NAME.txt, label_2/NAME.txt as far as they are there (a frame needs its calibration for all but points; without a
    picture its camera is taken to have the usual 1242x375 pixels).

    Raises: UsageError for what is missing or damaged.
    """
    folder = Path(folder)
    what = f"KITTI frame {printable(name)}"
    scan = folder / "velodyne" / f"{name}.bin"
    points = _kitti_points(scan if scan.exists() else folder / f"{name}.bin")
    calibration = folder / "calib" / f"{name}.txt"
    if not calibration.exists():
        return RigFrame(Rig("kitti", _KITTI_LIDAR, {}), 0, points, {}, index=_number(name))
    to_rect, projection = _kitti_calibration(calibration, what)
    image = folder / "image_2" / f"{name}.png"
    camera, shots = _kitti_camera(projection, to_rect), {}
    if image.exists():
        picture = read_picture(image)
        camera = _kitti_camera(projection, to_rect, picture.shape[1], picture.shape[0])
        shots["image_2"] = Shot(picture, 0)
    labels = folder / "label_2" / f"{name}.txt"
    truth = _kitti_labels(read_text(labels, what), to_rect, points, what) if labels.exists() else None
    return RigFrame(
        Rig("kitti", _KITTI_LIDAR, {"image_2": camera}), 0, points, shots, truth=truth, index=_number(name)
    )


def read_kitti_info(path: str | Path, index: int = 0) -> RigFrame:
    """Frame `index` of a KITTI info file as mmdetection3d 1.x writes it, as JSON; picture and points beside it.

    Raises: UsageError for what is missing or damaged.
    """
    path = Path(path)
    what = f"KITTI frame {printable(path.name)}"
    return _kitti_frame(path, what, _entry(_content(path, what), what, index))


def _kitti_frame(path: Path, what: str, info: Mapping[str, Any]) -> RigFrame:
    try:
        image = info["images"]["CAM2"]
        points = _kitti_points(path.parent / _name(info["lidar_points"]["lidar_path"], what))
        picture = read_picture(path.parent / _name(image["img_path"], what))
        to_rect, projection = _matrix(image["lidar2cam"]), np.array(image["cam2img"], np.float64)[:3]
        camera = _kitti_camera(projection, to_rect, picture.shape[1], picture.shape[0])
        names = tuple(info["categories"])
        rows, seen = [], []
        for label in info.get("instances", []):
            x, y, z, length, height, width, turn = label["bbox_3d"]
            if label["bbox_label_3d"] >= 0:
                rows.append((label["bbox_label_3d"], (x, y, z), (length, width, height), turn))
                seen.append(label.get("bbox", (math.nan,) * 4))
        truth = _kitti_truth(rows, names, to_rect, points, seen)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise _unusable(what, error) from None
    rig = Rig("kitti", _KITTI_LIDAR, {"image_2": camera})
    return RigFrame(rig, 0, points, {"image_2": Shot(picture, 0)}, truth=truth, index=int(info["sample_id"]))


def read_detections(path: str | Path) -> tuple[Array, Array, Array]:
    """Detections as NVIDIA's PointPillars example writes them, a line each: x y z l w h yaw class score, in the lidar
    frame, z the centre. Returns boxes float32 [n, 9] (velocity NaN), classes int32 [n], scores float32 [n].

    Raises: UsageError for a file that cannot be read or has other lines.
    """
    what = f"detections {printable(Path(path).name)}"
    try:
        rows = np.array(
            [
                [float(v) for v in line.split()]
                for line in read_text(Path(path), what).splitlines()
                if line.strip()
            ]
        )
        rows = rows.reshape(-1, 9)
    except ValueError:
        raise UsageError(
            f"{what}: not usable, expected lines of 9 numbers: x y z l w h yaw class score"
        ) from None
    boxes = np.full((len(rows), 9), np.nan, np.float32)
    boxes[:, :7] = rows[:, :7]
    return boxes, rows[:, 7].astype(np.int32), rows[:, 8].astype(np.float32)


def read_points(path: str | Path, columns: int) -> Array:
    """A file of float32 rows: [n, columns]. Raises: UsageError for a file of another size, or with NaN."""
    path = Path(path)
    what = f"points {printable(path.name)}"
    try:
        size = path.stat().st_size
        if size % (4 * columns) or size > 4 * columns * _MAX_POINTS:
            raise UsageError(
                f"{what}: {size} bytes, expected rows of {columns} float32, at most {_MAX_POINTS}. Check the file"
            )
        points = np.fromfile(path, np.float32).reshape(-1, columns)
    except OSError as error:
        raise UsageError(f"{what}: {error.strerror}. Check the path") from None
    if not np.isfinite(points).all():
        raise UsageError(f"{what}: holds numbers that are not finite. Check the file")
    return points


# --- KITTI ---------------------------------------------------------------------------------------

_KITTI_LIDAR = Lidar((0.0, 0.0, KITTI_HEIGHT), (1.0, 0.0, 0.0, 0.0), 100.0)


def _number(name: str) -> int:
    return int(name) if name.isdecimal() and len(name) < 10 else 0


def _kitti_points(path: Path) -> Array:
    raw = read_points(path, 4)
    points = np.zeros((len(raw), 5), np.float32)
    points[:, :4] = raw
    return points


def _kitti_calibration(path: Path, what: str) -> tuple[Array, Array]:
    """velodyne to rectified camera 0, [4, 4], and the projection of camera 2, [3, 4]."""
    rows: dict[str, list[float]] = {}
    try:
        for line in read_text(path, what).splitlines():
            key, colon, numbers = line.partition(":")
            if colon:
                rows[key] = [float(v) for v in numbers.split()]
        to_camera = np.vstack([np.reshape(rows["Tr_velo_to_cam"], (3, 4)), (0, 0, 0, 1)])
        rectify = rigid(np.reshape(rows["R0_rect"], (3, 3)), (0.0, 0.0, 0.0))
        return rectify @ to_camera, np.reshape(rows["P2"], (3, 4))
    except (KeyError, ValueError) as error:
        raise UsageError(f"{what}: calibration not usable: {error}. Check the file") from None


def _kitti_camera(projection: Array, to_rect: Array, width: int = 1242, height: int = 375) -> Camera:
    """Camera 2: its lens lies where the fourth column of its projection says, in the rectified frame."""
    matrix = projection[:, :3]
    lidar_to_camera = to_rect.copy()
    lidar_to_camera[:3, 3] += np.linalg.solve(matrix, projection[:, 3])
    to_ego = _KITTI_LIDAR.to_ego @ inverse(lidar_to_camera)
    return Camera(
        _position(to_ego), quaternion(to_ego[:3, :3]), width, height, float(matrix[0, 0]), float(matrix[1, 1]),
        float(matrix[0, 2]), float(matrix[1, 2]),
    )  # fmt: skip


def _kitti_labels(text: str, to_rect: Array, points: Array, what: str) -> Truth:
    """Of label_2: type, truncated, occluded, alpha, 4 picture coordinates, h w l, x y z, rotation about y."""
    rows, seen = [], []
    for line in text.splitlines():
        words = line.split()
        if not words or words[0] == "DontCare":
            continue
        if words[0] not in KITTI_CLASSES:
            hint = did_you_mean(words[0], KITTI_CLASSES)
            raise UsageError(f"{what}: unknown type {printable(words[0])!r} in its labels. {hint}")
        try:
            numbers = [float(v) for v in words[1:15]]
            height, width, length, x, y, z, turn = numbers[7:14]
        except ValueError:
            raise UsageError(f"{what}: a label of {len(words)} words is not usable, expected 15") from None
        rows.append((KITTI_CLASSES.index(words[0]), (x, y, z), (length, width, height), turn))
        seen.append(numbers[3:7])
    return _kitti_truth(rows, KITTI_CLASSES, to_rect, points, seen)


def _kitti_truth(
    rows: list[Any], names: tuple[str, ...], to_rect: Array, points: Array, seen: list[Any]
) -> Truth:
    """rows: class, bottom centre in the rectified camera, (l, w, h), angle about the camera's y (down). seen: the
    rectangle of each in the picture."""
    boxes = np.full((len(rows), 9), np.nan, np.float32)
    back = inverse(to_rect)
    for box, (_, (x, y, z), size, turn) in zip(boxes, rows, strict=True):
        box[:3] = back[:3, :3] @ (x, y - size[2] / 2, z) + back[:3, 3]
        box[3:6] = size
        ahead = back[:3, :3] @ (math.cos(turn), 0.0, -math.sin(turn))
        box[6] = math.atan2(ahead[1], ahead[0])
    classes = np.array([row[0] for row in rows], np.int32)
    rectangles = {"image_2": np.array(seen, np.float32).reshape(-1, 4)}
    return Truth(
        boxes, classes, names, count_inside(points, boxes), np.full(len(rows), -1, np.int32), rectangles
    )


# --- info files ----------------------------------------------------------------------------------


def _content(path: Path, what: str) -> Any:
    """The JSON of an info file."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{what}: {error.strerror}. Check the path") from None
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES >> 20} MiB")
        # mmdetection3d writes NaN where a velocity is unknown, which strict JSON is not
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what}: not valid JSON: {printable(str(error))}") from None


def _entry(content: Any, what: str, index: int) -> Mapping[str, Any]:
    """One entry of `data_list`, with the names of its classes as `categories`."""
    try:
        frames = content["data_list"]
        known = content["metainfo"].get("categories", {"Pedestrian": 0, "Cyclist": 1, "Car": 2})
        names = sorted(known, key=lambda key: int(known[key]))
        if not 0 <= index < len(frames):
            raise UsageError(f"{what}: has no frame {index}, expected 0 to {len(frames) - 1}")
        return {**frames[index], "categories": names}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unusable(what, error) from None


def _length(content: Any) -> int:
    return len(content["data_list"])


def _unusable(what: str, error: Exception) -> UsageError:
    reason = f"{error} is missing" if isinstance(error, KeyError) else printable(str(error))
    return UsageError(f"{what}: not usable: {reason}. Check the file")


def _name(name: str, what: str) -> str:
    """A file beside the info file: no way out of its folder."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise UsageError(f"{what}: {printable(name)!r} is not the plain name of a file beside it")
    return name


def _size(path: Path) -> tuple[int, int]:
    """Height and width of a picture, from its header."""
    try:
        header = read_header(path.read_bytes())
    except OSError as error:
        raise UsageError(f"picture {printable(path.name)}: {error.strerror}. Check the path") from None
    return header.height, header.width


def _matrix(rows: Any) -> Array:
    matrix = np.array(rows, np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise ValueError(f"a matrix of shape {list(matrix.shape)}, expected [4, 4] of finite numbers")
    if (
        np.abs(matrix[:3, :3] @ matrix[:3, :3].T - np.eye(3)).max() > 1e-3
        or np.linalg.det(matrix[:3, :3]) < 0
    ):
        raise ValueError("a matrix whose rotation is none")
    return matrix


def _position(matrix: Array) -> tuple[float, float, float]:
    return float(matrix[0, 3]), float(matrix[1, 3]), float(matrix[2, 3])


def _nanoseconds(seconds: float) -> int:
    return round(float(seconds) * 1e6) * 1000
