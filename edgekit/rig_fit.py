"""How well labelled boxes sit on what the sensors saw: figures beside the sanity picture (`tasks.fusion.draw`).

For every box in every picture, the rectangle around it as it is projected (`rig.outlines`), and the overlap (IoU) with

- the rectangle around the LiDAR points in the box, projected as well: it says that labels and points agree, in place,
  size, heading and time. It stays below 1 where all is right, since a LiDAR sees two sides at most, and rings lie apart.
- the rectangle that the labels have for this picture, where they have one. KITTI's were drawn on the pictures by people:
  they say that calibration and picture agree. nuScenes' were made by its own code from the same calibration: they say
  that ours projects as theirs does.

`turned` is the control: boxes are projected by a camera that looks some degrees further to the right than the rig says,
points and labels are not. A measure that does not become clearly worse by it says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.rig import RigFrame, in_picture, inside, outlines, project

Array = np.ndarray

LEAST_POINTS = 5
"""Points in a picture that a box needs to count in medians."""
CONTROL = 2.0
"""Degrees by which the control turns cameras."""


@dataclass(frozen=True)
class BoxFit:
    """One box in one picture.

    box: its number in the frame's labels.  outline: x1 y1 x2 y2 in pixels, cut at the picture's edges.
    points: LiDAR points in the box that fall into the picture.  on_points, on_label: IoU of the outline with the
    rectangle around them, and with the labels' own; None where there is none.
    """

    frame: int
    camera: str
    box: int
    label: str
    outline: tuple[float, float, float, float]
    points: int
    on_points: float | None
    on_label: float | None


@dataclass(frozen=True)
class Summary:
    """Medians over the boxes that count, None where there are none; boxes, labels: how many those are."""

    boxes: int
    on_points: float | None
    labels: int
    on_label: float | None


def fit(frame: RigFrame, turned: float = 0.0) -> list[BoxFit]:
    """Every labelled box in every picture in which something of it lies, cameras and boxes in their order.

    turned: degrees to the right by which cameras are turned for boxes alone.
    """
    if frame.truth is None:
        return []
    angle = math.radians(turned)
    cos, sin = math.cos(angle), math.sin(angle)
    # a camera that looks further to the right sees everything further to the left
    turn = np.array([[cos, 0, -sin, 0], [0, 1, 0, 0], [sin, 0, cos, 0], [0, 0, 0, 1]])
    truth, found = frame.truth, []
    held = [None if frame.points is None else frame.points[inside(frame.points, box)] for box in truth.boxes]
    for name, camera in frame.rig.cameras.items():
        matrix = frame.lidar_to_camera(name)
        around = outlines(camera, turn @ matrix, truth.boxes)
        straight = outlines(camera, matrix, truth.boxes)
        labels = truth.rectangles.get(name)
        for i, outline in enumerate(around):
            if np.isnan(straight[i]).all():
                continue
            count, on_points, points = 0, None, held[i]
            if points is not None and len(points):
                uv, depth = project(camera, matrix, points)
                uv = uv[in_picture(camera, uv, depth)]
                count = len(uv)
                if count:
                    on_points = _iou(outline, np.concatenate([uv.min(0), uv.max(0)]))
            on_label = None if labels is None or np.isnan(labels[i]).any() else _iou(outline, labels[i])
            x1, y1, x2, y2 = (float(v) for v in outline)
            found.append(
                BoxFit(
                    frame.index,
                    name,
                    i,
                    truth.names[truth.classes[i]],
                    (x1, y1, x2, y2),
                    count,
                    on_points,
                    on_label,
                )
            )
    return found


def summary(fits: Iterable[BoxFit], least: int = LEAST_POINTS) -> Summary:
    """Medians: of `on_points` over boxes with `least` points or more in a picture, of `on_label` over all that have one."""
    fits = list(fits)
    points = [each.on_points for each in fits if each.on_points is not None and each.points >= least]
    labels = [each.on_label for each in fits if each.on_label is not None]
    return Summary(len(points), _median(points), len(labels), _median(labels))


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _iou(a: Array, b: Array) -> float:
    """Of two rectangles x1 y1 x2 y2; 0 where one is nothing."""
    if np.isnan(a).any():
        return 0.0
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    both = float(np.prod(np.maximum(sides, 0.0)))
    every = float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - both
    return both / every if every > 0 else 0.0
