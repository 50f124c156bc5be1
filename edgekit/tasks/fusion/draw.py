"""What a rig saw as one picture: every camera with LiDAR points and boxes on it, and the same from above.

Where calibration, time stamps or labels are wrong, it shows here first: points leave the things they were measured on,
boxes stand beside theirs.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from edgekit.optional import load_cv2
from edgekit.rig import MIN_DEPTH, Camera, RigFrame, arrange, corners, in_picture, moved, project
from edgekit.tasks.detect.draw import Color, class_color

Array = np.ndarray

NEAR_M, FAR_M = 2.0, 60.0
"""Distances at which colours begin and end: red is near, blue far."""
_BACKGROUND = (28, 26, 24)
_TRUTH = (225, 225, 225)
_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))


class Drawable(Protocol):
    """Boxes float32 [n, >=7] in the lidar frame (`rig.BOX_FIELDS`) and classes int [n], for their colours."""

    @property
    def boxes(self) -> Array: ...
    @property
    def classes(self) -> Array: ...


def draw(
    frame: RigFrame,
    found: Drawable | None = None,
    *,
    width: int = 480,
    points: bool = True,
    reach_m: float = 55.0,
) -> Array:
    """All cameras and the view from above in one picture, uint8 BGR.

    found: boxes in the colours of their classes over the frame's labels in white; without it the labels have the
    colours. width: of each camera's picture. points: whether LiDAR points are drawn on pictures. reach_m: how far the
    view from above goes. A camera without a picture is left dark and named.

    Raises: MissingExtraError without OpenCV.
    """
    names = list(frame.rig.cameras)
    grid = arrange(names)
    tiles = {name: camera_view(frame, name, found, width=width, points=points) for name in names}
    tall = max((tile.shape[0] for tile in tiles.values()), default=0)
    cameras = np.full((tall * len(grid), width * max(map(len, grid), default=0), 3), _BACKGROUND, np.uint8)
    for row, line in enumerate(grid):
        for column, name in enumerate(line):
            if name is not None:
                tile = tiles[name]
                cameras[row * tall : row * tall + tile.shape[0], column * width : (column + 1) * width] = tile
    top = bird_view(frame, found, size=max(cameras.shape[0], min(width, 480)), reach_m=reach_m)
    canvas = np.full((top.shape[0], cameras.shape[1] + top.shape[1], 3), _BACKGROUND, np.uint8)
    canvas[: cameras.shape[0], : cameras.shape[1]] = cameras
    canvas[:, cameras.shape[1] :] = top
    return canvas


def captioned(image: Array, text: str) -> Array:
    """A copy of a picture, uint8 [H, W, 3] BGR, with a line of text in its corner."""
    canvas = np.array(image, order="C")
    _write(load_cv2("draw a rig"), canvas, text, (6, 16))
    return canvas


def camera_view(
    frame: RigFrame, name: str, found: Drawable | None = None, *, width: int = 480, points: bool = True
) -> Array:
    """One camera's picture with points coloured by depth and boxes as wires, uint8 [height, width, 3] BGR.

    The front of a box is crossed. Boxes with a velocity are drawn where they were when the picture was taken.
    """
    cv2 = load_cv2("draw a rig")
    camera, shot = frame.rig.cameras[name], frame.shots.get(name)
    scaled = camera.resized(width, max(1, round(camera.height * width / camera.width)))
    late = 0.0
    if shot is None:
        canvas = np.full((scaled.height, scaled.width, 3), _BACKGROUND, np.uint8)
    else:
        late = (shot.taken_ns - frame.taken_ns) / 1e9
        canvas = cv2.resize(shot.image, (scaled.width, scaled.height), interpolation=cv2.INTER_AREA)
        if points and frame.points is not None:
            uv, depth = project(scaled, frame.lidar_to_camera(name), frame.points)
            seen = in_picture(scaled, uv, depth)
            order = np.argsort(-depth[seen], kind="stable")
            places, tones = uv[seen][order].astype(int), _depth_colors(depth[seen][order])
            for place, tone in zip(places.tolist(), tones.tolist(), strict=True):
                cv2.circle(canvas, place, 1 if width >= 400 else 0, tone, -1)
    matrix = frame.lidar_to_camera(name)
    for boxes, colors in _layers(frame, found):
        if boxes.shape[1] >= 9:
            boxes = boxes.copy()
            boxes[:, :2] += np.float32(late) * np.nan_to_num(boxes[:, 7:9])
        for i in np.argsort(-np.hypot(boxes[:, 0], boxes[:, 1]), kind="stable"):
            corner = corners(boxes[i : i + 1])[0] @ matrix[:3, :3].T + matrix[:3, 3]
            _wires(cv2, canvas, corner, scaled, colors[i])
    _write(cv2, canvas, name if shot is not None else f"{name}: no picture", (6, 16))
    return np.asarray(canvas)


def bird_view(
    frame: RigFrame, found: Drawable | None = None, *, size: int = 540, reach_m: float = 55.0
) -> Array:
    """From above, the vehicle in the middle heading up: points by height, boxes with heading and velocity (the way of
    one second); uint8 [size, size, 3] BGR. Rings are 10 m apart."""
    cv2 = load_cv2("draw a rig")
    canvas = np.full((size, size, 3), _BACKGROUND, np.uint8)
    to_ego = frame.rig.lidar.to_ego
    scale = size / (2 * reach_m)

    def place(ego: Array) -> Array:
        """The ego's x is up, its y left."""
        return np.stack([size / 2 - ego[:, 1] * scale, size / 2 - ego[:, 0] * scale], 1)

    for radius in range(10, int(reach_m) + 1, 10):
        cv2.circle(canvas, (size // 2, size // 2), round(radius * scale), (52, 50, 48), 1, cv2.LINE_AA)
    if frame.points is not None:
        ego = frame.points[:, :3].astype(np.float64) @ to_ego[:3, :3].T + to_ego[:3, 3]
        spots = place(ego)
        seen = (spots >= 0).all(1) & (spots < size).all(1)
        column, row = spots[seen].astype(int).T
        level = np.clip((ego[seen, 2] + 0.3) / 2.8, 0, 1)
        order = np.argsort(level, kind="stable")
        tone = np.stack([90 + 110 * level, 90 + 130 * level, 90 + 60 * level], 1).astype(np.uint8)
        canvas[row[order], column[order]] = tone[order]
    cv2.drawMarker(canvas, (size // 2, size // 2), (255, 255, 255), cv2.MARKER_TRIANGLE_UP, 10, 1)
    for boxes, colors in _layers(frame, found):
        for box, color in zip(moved(boxes, to_ego), colors, strict=True):
            ring, centre = place(corners(box[None])[0, :4]), place(box[None, :3])[0]
            for a, b in ((0, 1), (1, 2), (2, 3), (3, 0)):
                _line(cv2, canvas, ring[a], ring[b], color)
            _line(cv2, canvas, centre, (ring[0] + ring[3]) / 2, color)
            if len(box) >= 9 and math.hypot(*box[7:9]) > 0.2:  # false where it is unknown
                _line(cv2, canvas, centre, place(box[None, :2] + box[None, 7:9])[0], (255, 255, 255))
    _write(cv2, canvas, "FROM ABOVE", (6, 16))
    return canvas


def _layers(frame: RigFrame, found: Drawable | None) -> list[tuple[Array, list[Color]]]:
    """Boxes with the colour of each, in the order in which they are drawn."""
    layers: list[tuple[Array, list[Color]]] = []
    if frame.truth is not None:
        plain = found is not None
        layers.append(
            (frame.truth.boxes, [_TRUTH if plain else class_color(c) for c in frame.truth.classes.tolist()])
        )
    if found is not None:
        layers.append((found.boxes, [class_color(c) for c in found.classes.tolist()]))
    result = []
    for boxes, colors in layers:
        # what is no place cannot be drawn, and what is faster than sound has no arrow
        keep = np.flatnonzero((np.abs(boxes[:, :7]) < 1e4).all(1))
        boxes = boxes[keep]
        if boxes.shape[1] >= 9:
            boxes[:, 7:9] = np.where(np.abs(boxes[:, 7:9]) < 340, boxes[:, 7:9], np.nan)
        result.append((boxes, [colors[i] for i in keep]))
    return result


def _depth_colors(depth: Array) -> Array:
    """int [n, 3] BGR: red, yellow, green, blue from near to far."""
    at = np.clip((np.log(np.maximum(depth, 0.1)) - math.log(NEAR_M)) / math.log(FAR_M / NEAR_M), 0, 1)
    stops = np.array([0.0, 0.33, 0.66, 1.0])
    ramp = np.array([(40, 40, 255), (0, 220, 255), (90, 230, 60), (255, 110, 40)])
    colors: Array = np.stack([np.interp(at, stops, ramp[:, i]) for i in range(3)], 1).astype(int)
    return colors


def _wires(cv2: Any, canvas: Array, corner: Array, camera: Camera, color: Color) -> None:
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
        _line(cv2, canvas, ends[0], ends[1], color)


def _line(cv2: Any, canvas: Array, a: Array, b: Array, color: Color) -> None:
    ends = np.array([a, b])
    # a line from just beside the lens may end a million pixels away, more than OpenCV's integers hold
    if np.abs(ends).max() < 1e5:
        start, stop = np.round(ends * 8).astype(int).tolist()
        cv2.line(canvas, start, stop, color, 1, cv2.LINE_AA, 3)


def _write(cv2: Any, canvas: Array, text: str, at: tuple[int, int]) -> None:
    around = [
        (x, y) for y in (-1, 0, 1) for x in (-1, 0, 1) if x or y
    ]  # OpenCV 5 sets bold letters wider apart
    for (x, y), color in [*((step, (20, 20, 20)) for step in around), ((0, 0), (240, 240, 240))]:
        place = at[0] + x, at[1] + y
        cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, color, 1, cv2.LINE_AA)
