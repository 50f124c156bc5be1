"""What a rig saw as one picture: every camera with LiDAR points and boxes on it, and the same from above.

Where calibration, time stamps or labels are wrong, it shows here first: points leave the things they were measured on,
boxes stand beside theirs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgekit.optional import load_cv2
from edgekit.rig import MIN_DEPTH, RigFrame, arrange, corners, in_picture
from edgekit.tasks.detect.draw import class_color

Array = np.ndarray

NEAR_M, FAR_M = 2.0, 60.0
"""Distances at which colours begin and end: red is near, blue far."""
_BACKGROUND = (28, 26, 24)
_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))


def draw(
    frame: RigFrame, boxes: Array | None = None, classes: Array | None = None, *, width: int = 480,
    points: bool = True, reach_m: float = 55.0,
) -> Array:  # fmt: skip
    """All cameras and the view from above in one picture, uint8 BGR.

    boxes: float32 [n, >=7] in the lidar frame (`rig.BOX_FIELDS`), classes: int [n], for their colours; without them
    the frame's labels. width: of each camera's picture. points: whether LiDAR points are drawn on pictures.
    reach_m: how far the view from above goes. A camera without a picture is left dark and named.

    Raises: MissingExtraError without OpenCV.
    """
    cv2 = load_cv2("draw a rig")
    boxes, classes = _labels(frame, boxes, classes)
    names = list(frame.rig.cameras)
    tiles = [camera_view(frame, name, boxes, classes, width=width, points=points) for name in names]
    grid = arrange(names)
    tall = max(tile.shape[0] for tile in tiles)
    rows = []
    for row in grid:
        cells = [np.full((tall, width, 3), _BACKGROUND, np.uint8) for _ in range(max(map(len, grid)))]
        for cell, name in zip(cells, row, strict=False):
            if name is not None:
                tile = tiles[names.index(name)]
                cell[: tile.shape[0]] = tile
        rows.append(np.concatenate(cells, 1))
    cameras = np.concatenate(rows, 0)
    side = max(cameras.shape[0], min(width, 480))
    top = bird_view(frame, boxes, classes, size=side, reach_m=reach_m)
    if cameras.shape[0] < side:
        fill = np.full((side - cameras.shape[0], cameras.shape[1], 3), _BACKGROUND, np.uint8)
        cameras = np.concatenate([cameras, fill], 0)
    picture: Array = np.concatenate([cameras, cv2.resize(top, (side, side))], 1)
    return picture


def camera_view(
    frame: RigFrame, name: str, boxes: Array | None = None, classes: Array | None = None, *, width: int = 480,
    points: bool = True,
) -> Array:  # fmt: skip
    """One camera's picture with points coloured by depth and boxes as wires, uint8 [height, width, 3] BGR.

    Boxes with a velocity are drawn where they were when the picture was taken.
    """
    cv2 = load_cv2("draw a rig")
    boxes, classes = _labels(frame, boxes, classes)
    camera = frame.rig.cameras[name]
    scaled = camera.resized(width, max(1, round(camera.height * width / camera.width)))
    if name in frame.shots:
        canvas = cv2.resize(
            frame.shots[name].image, (scaled.width, scaled.height), interpolation=cv2.INTER_AREA
        )
    else:
        canvas = np.full((scaled.height, scaled.width, 3), _BACKGROUND, np.uint8)
        name += ": no picture"
    scale = np.array([scaled.width / camera.width, scaled.height / camera.height])
    shot = name.partition(":")[0]
    if points and frame.points is not None and shot in frame.shots:
        uv, depth = frame.project(shot, frame.points)
        uv *= scale
        shown = in_picture(scaled, uv, depth)
        order = np.argsort(-depth[shown])
        places, colors = uv[shown][order], _depth_colors(depth[shown][order])
        radius = 1 if width >= 400 else 0
        for (u, v), color in zip(places.astype(int).tolist(), colors.tolist(), strict=True):
            cv2.circle(canvas, (u, v), radius, color, -1)
    matrix = frame.lidar_to_camera(shot)
    if shot in frame.shots and boxes.shape[1] >= 9:
        # things go on moving between the picture and the moment that boxes are given for
        late = (frame.shots[shot].taken_ns - frame.taken_ns) / 1e9
        boxes = boxes.copy()
        boxes[:, :2] += np.float32(late) * np.nan_to_num(boxes[:, 7:9])
    order = np.argsort(-np.hypot(boxes[:, 0], boxes[:, 1]))
    for box, cls in zip(boxes[order], classes[order].tolist(), strict=True):
        _wires(cv2, canvas, _in_camera(corners(box[None])[0], matrix), scaled, class_color(cls))
    _write(cv2, canvas, name, (6, 16))
    return np.asarray(canvas)


def bird_view(
    frame: RigFrame, boxes: Array | None = None, classes: Array | None = None, *, size: int = 540,
    reach_m: float = 55.0,
) -> Array:  # fmt: skip
    """From above, the vehicle in the middle heading up: points by height, boxes with heading and velocity (the way of
    one second); uint8 [size, size, 3] BGR."""
    cv2 = load_cv2("draw a rig")
    boxes, classes = _labels(frame, boxes, classes)
    canvas = np.full((size, size, 3), _BACKGROUND, np.uint8)
    to_ego = frame.rig.lidar.to_ego
    scale = size / (2 * reach_m)

    def place(xyz: Array) -> Array:
        """Lidar frame to pixels: the ego's x is up, its y left."""
        ego = xyz @ to_ego[:3, :3].T + to_ego[:3, 3]
        return np.stack([size / 2 - ego[:, 1] * scale, size / 2 - ego[:, 0] * scale], 1)

    for radius in range(10, int(reach_m) + 1, 10):
        cv2.circle(canvas, (size // 2, size // 2), round(radius * scale), (52, 50, 48), 1, cv2.LINE_AA)
    if frame.points is not None:
        xyz = frame.points[:, :3].astype(np.float64)
        spots = place(xyz)
        height = (xyz @ to_ego[:3, :3].T + to_ego[:3, 3])[:, 2]
        inside = (spots >= 0).all(1) & (spots < size).all(1)
        column, row = spots[inside].astype(int).T
        level = np.clip((height[inside] + 0.3) / 2.8, 0, 1)
        order = np.argsort(level)
        tone = np.stack([90 + 110 * level, 90 + 130 * level, 90 + 60 * level], 1).astype(np.uint8)
        canvas[row[order], column[order]] = tone[order]
    front = place(np.linalg.inv(to_ego)[None, :3, 3] + 0.0)[0]
    cv2.drawMarker(canvas, (round(front[0]), round(front[1])), (255, 255, 255), cv2.MARKER_TRIANGLE_UP, 10, 1)
    for box, cls in zip(boxes, classes.tolist(), strict=True):
        ring = place(corners(box[None])[0, :4])
        color = class_color(cls)
        cv2.polylines(canvas, [np.round(ring * 8).astype(np.int32)], True, color, 1, cv2.LINE_AA, 3)
        centre = place(box[None, :3].astype(np.float64))[0]
        _line(cv2, canvas, centre, (ring[0] + ring[3]) / 2, color)
        if box.shape[0] >= 9 and np.isfinite(box[7:9]).all() and math.hypot(box[7], box[8]) > 0.2:
            ahead = box[:3].astype(np.float64) + np.array([box[7], box[8], 0.0])
            _line(cv2, canvas, centre, place(ahead[None])[0], (255, 255, 255))
    _write(cv2, canvas, f"{2 * reach_m:.0f} m", (6, 16))
    return canvas


def _labels(frame: RigFrame, boxes: Array | None, classes: Array | None) -> tuple[Array, Array]:
    if boxes is None:
        if frame.truth is None:
            return np.zeros((0, 9), np.float32), np.zeros(0, np.int32)
        return frame.truth.boxes, frame.truth.classes
    return boxes, np.zeros(len(boxes), np.int32) if classes is None else np.asarray(classes)


def _depth_colors(depth: Array) -> Array:
    """int [n, 3] BGR: red, yellow, green, blue from near to far."""
    at = np.clip((np.log(np.maximum(depth, 0.1)) - math.log(NEAR_M)) / math.log(FAR_M / NEAR_M), 0, 1)
    stops = np.array([0.0, 0.33, 0.66, 1.0])
    ramp = np.array([(40, 40, 255), (0, 220, 255), (90, 230, 60), (255, 110, 40)])
    colors: Array = np.stack([np.interp(at, stops, ramp[:, i]) for i in range(3)], 1).astype(int)
    return colors


def _in_camera(xyz: Array, matrix: Array) -> Array:
    result: Array = xyz @ matrix[:3, :3].T + matrix[:3, 3]
    return result


def _wires(cv2: Any, canvas: Array, corner: Array, camera: Any, color: tuple[int, int, int]) -> None:
    """The edges of a box in the camera frame, cut where they pass the lens; the front face crossed."""
    if (corner[:, 2] <= MIN_DEPTH).all():
        return
    lines = [(corner[a], corner[b]) for a, b in _EDGES]
    lines += [(corner[0], corner[7]), (corner[3], corner[4])]
    for a, b in lines:
        if a[2] < b[2]:
            a, b = b, a
        if a[2] <= MIN_DEPTH:
            continue
        if b[2] < MIN_DEPTH:
            b = a + (b - a) * (a[2] - MIN_DEPTH) / (a[2] - b[2])
        ends = [
            np.array([camera.fx * p[0] / p[2] + camera.cx, camera.fy * p[1] / p[2] + camera.cy])
            for p in (a, b)
        ]
        # a line from just beside the lens may end a million pixels away, more than OpenCV's integers hold
        if max(np.abs(end).max() for end in ends) < 1e5:
            _line(cv2, canvas, ends[0], ends[1], color)


def _line(cv2: Any, canvas: Array, a: Array, b: Array, color: tuple[int, int, int]) -> None:
    ends = [tuple(round(float(v) * 8) for v in end) for end in (a, b)]
    cv2.line(canvas, ends[0], ends[1], color, 1, cv2.LINE_AA, 3)


def _write(cv2: Any, canvas: Array, text: str, at: tuple[int, int]) -> None:
    for color, weight in (((20, 20, 20), 3), ((240, 240, 240), 1)):
        cv2.putText(canvas, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.45, color, weight, cv2.LINE_AA)
