"""A rig in Rerun: LiDAR points, boxes in space, and cameras with their pictures where they stand.

Entities, below the name of the stream's camera (`camera` where it has none), as transforms hang together:

    <root>                       z up; the ground. With a known pose: the fixed world
    <root>/ego                   the vehicle; rig.py states its axes
    <root>/ego/lidar/points      coloured by height
    <root>/ego/lidar/<engine>boxes, .../<engine>velocities    label and score; the way of one second
    <root>/ego/lidar/labels      the frame's own boxes where it has some, white
    <root>/ego/<camera>          where it was when it took its picture; its pinhole, and below it `image`
    <root>/<engine>result        a line of text: how many boxes, which sensors were missing, what was noted
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from edgekit.rig import RigFrame, arrange
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks.rigs import camera_to_ego, height_colors, rig_of, shown

POINT_RADIUS = -1.2
"""Below zero: in points of the screen, so that near ones do not cover a picture."""
_NEAR_PLANE_M = 2.0
"""How far ahead of a camera its picture stands."""


def log_rig(
    rr: Any, stream: Any, root: str, engine: str, item: StreamResult, picture: Callable[[np.ndarray], Any]
) -> None:
    """Log one result to `stream`. picture: an image as Rerun takes it, or None where pictures are not wanted."""
    rig, result = rig_of(item), item.result
    lidar = f"{root}/ego/lidar"
    if rig is not None:
        _log_moment(rr, stream, root, rig, picture)
    stream.log(f"{lidar}/{engine}boxes", _boxes(rr, result))
    stream.log(f"{lidar}/{engine}velocities", _velocities(rr, result))
    lines = [result.caption(), *getattr(result, "notes", ())]
    level = rr.TextLogLevel.WARN if result.missing else rr.TextLogLevel.INFO
    stream.log(f"{root}/{engine}result", rr.TextLog("; ".join(lines), level=level))


def show_rig(stream: Any, root: str, rig: RigFrame) -> None:
    """How the viewer shows a rig until its user arranges it otherwise: space around the vehicle, beside it every
    camera with what the LiDAR measured in its picture, below times and what was said."""
    from rerun import blueprint as show  # type: ignore[import-untyped,import-not-found,unused-ignore]

    ego = f"{root}/ego"
    space = show.Spatial3DView(origin=ego, contents=f"{root}/**", name="around the vehicle")
    rows = [
        show.Horizontal(
            *(
                show.Spatial2DView(
                    origin=f"{ego}/{name}", contents=[f"{ego}/{name}/**", f"{ego}/lidar/**"], name=name
                )
                for name in row
                if name is not None
            )
        )
        for row in arrange(list(rig.rig.cameras))
    ]
    below = show.Horizontal(
        show.TimeSeriesView(origin=root, contents=f"{root}/**", name="times in ms"),
        show.TextLogView(origin=root, contents=f"{root}/**", name="results"),
    )
    cameras = [show.Vertical(*rows)] if rows else []
    whole = show.Vertical(show.Horizontal(space, *cameras), below, row_shares=[4, 1])
    stream.send_blueprint(show.Blueprint(whole, collapse_panels=True))


def _log_moment(rr: Any, stream: Any, root: str, rig: RigFrame, picture: Callable[[np.ndarray], Any]) -> None:
    stream.log(root, rr.ViewCoordinates.RIGHT_HAND_Z_UP)
    ego, lidar = f"{root}/ego", f"{root}/ego/lidar"
    stream.log(ego, _transform(rr, np.eye(4) if rig.pose is None else rig.pose))
    stream.log(lidar, _transform(rr, rig.rig.lidar.to_ego))
    if rig.points is None:
        stream.log(f"{lidar}/points", rr.Clear(recursive=False))  # else the last ones would seem to hold
    else:
        points = rr.Points3D(rig.points[:, :3], colors=height_colors(rig), radii=POINT_RADIUS)
        stream.log(f"{lidar}/points", points)
    for name, camera in rig.rig.cameras.items():
        entity, shot = f"{ego}/{name}", rig.shots.get(name)
        stream.log(entity, _transform(rr, camera_to_ego(rig, name)))
        stream.log(
            entity,
            rr.Pinhole(
                image_from_camera=camera.matrix, resolution=[camera.width, camera.height],
                image_plane_distance=_NEAR_PLANE_M,
            ),
        )  # fmt: skip
        seen = None if shot is None else picture(shot.image)
        stream.log(f"{entity}/image", rr.Clear(recursive=False) if seen is None else seen)
    if rig.truth is not None:
        known = rig.truth.boxes[np.abs(rig.truth.boxes[:, :7]).max(1, initial=0) < 1e4]
        stream.log(f"{lidar}/labels", _space(rr, known, colors=[(200, 200, 200)] * len(known)))


def _transform(rr: Any, matrix: np.ndarray) -> Any:
    return rr.Transform3D(translation=matrix[:3, 3], mat3x3=matrix[:3, :3])


def _boxes(rr: Any, result: Any) -> Any:
    from edgekit.tasks.detect.draw import class_color

    found = shown(result)
    return _space(
        rr,
        np.array([each.box for each in found], np.float32).reshape(-1, 9),
        colors=[class_color(each.cls)[::-1] for each in found],
        labels=[f"{each.label} {each.score:.2f}" for each in found],
    )


def _space(rr: Any, boxes: np.ndarray, **facts: Any) -> Any:
    half = [yaw / 2 for yaw in boxes[:, 6].tolist()]
    turns = np.array([(0, 0, math.sin(h), math.cos(h)) for h in half], np.float32).reshape(-1, 4)
    return rr.Boxes3D(centers=boxes[:, :3], half_sizes=boxes[:, 3:6] / 2, quaternions=turns, **facts)


def _velocities(rr: Any, result: Any) -> Any:
    moving = [(each.box, way) for each in shown(result) if (way := each.velocity) is not None]
    origins = np.array([box[:3] for box, _ in moving], np.float32).reshape(-1, 3)
    ways = np.array([(*way, 0.0) for _, way in moving], np.float32).reshape(-1, 3)
    return rr.Arrows3D(vectors=ways, origins=origins, colors=[(255, 255, 255)] * len(moving))
