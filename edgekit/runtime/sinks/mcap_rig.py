"""What a recording holds of a rig, beside the facts of its frames and its results (recording.py). `<rig>` is the frame's
camera name, `camera` where it has none.

    /<rig>/transforms                     foxglove.FrameTransforms    ego to lidar and cameras; with a pose, world to ego
    /<rig>/lidar/points                   foxglove.PointCloud         `rig.POINT_FIELDS`, and `ring` where known; float32
    /<rig>/<sensor>/image                 foxglove.CompressedImage or RawImage (BGR); its own time
    /<rig>/<sensor>/calibration           foxglove.CameraCalibration
    /<rig>/<sensor>/[engine/]annotations  foxglove.ImageAnnotations   boxes as lines in that picture
    /<rig>/moment                         edgekit.Moment (JSON)       what ties these together (recording_rig.py); first of them
    /<rig>/[engine/]boxes                 foxglove.SceneUpdate        boxes in space, and the way of one second

Frames of reference are called `world`, `ego`, `lidar`, and as the cameras.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.rig import POINT_FIELDS, RigFrame, Shot
from edgekit.runtime import foxglove, foxglove_scene
from edgekit.runtime.mcap_writer import Piece
from edgekit.runtime.recording import Images, dumps
from edgekit.runtime.recording_rig import MOMENT, moment_json
from edgekit.runtime.sinks.rigs import camera_to_ego, lines_in, outline_in, shown


@dataclass(frozen=True)
class Made:
    """A message. topic: below that of the rig. ns: when what it says was so, in the wall clock. copied: bytes of
    pictures and points that were copied for it."""

    topic: str
    schema: str
    ns: int
    pieces: list[Piece]
    copied: int = 0
    replays: bool = False
    """Whether it stands for the frame in a replay."""


def moment_messages(
    rig: RigFrame, ns: int, images: Images, jpeg: Callable[[np.ndarray], bytes]
) -> Iterator[Made]:
    """What the sensors saw. ns: of `rig.taken_ns`, in the wall clock. jpeg: encodes a picture, uint8 BGR."""
    if images != "none":
        yield Made("moment", MOMENT, ns, [dumps(moment_json(rig))], replays=True)
    transforms = [("ego", "lidar", rig.rig.lidar.to_ego)]
    transforms += [("ego", name, camera_to_ego(rig, name)) for name in rig.rig.cameras]
    if rig.pose is not None:
        transforms.append(("world", "ego", rig.pose))
    message = foxglove_scene.frame_transforms(ns, transforms)
    yield Made("transforms", foxglove.FRAME_TRANSFORMS, ns, [message])
    if rig.points is not None and images != "none":
        table, columns = np.ascontiguousarray(rig.points, "<f4"), list(POINT_FIELDS)
        if rig.rings is not None:
            table, columns = np.column_stack([table, rig.rings.astype("<f4")]), [*columns, "ring"]
        head = foxglove_scene.point_cloud_head(ns, "lidar", columns, len(table))
        data = table.data.cast("B") if len(table) else b""
        copied = 0 if table is rig.points else len(data)
        yield Made("lidar/points", foxglove.POINT_CLOUD, ns, [head, data], copied)
    for name, camera in rig.rig.cameras.items():
        shot = rig.shots.get(name)
        at = ns if shot is None else ns + shot.taken_ns - rig.taken_ns
        message = foxglove_scene.camera_calibration(at, name, camera)
        yield Made(f"{name}/calibration", foxglove.CAMERA_CALIBRATION, at, [message])
        if shot is not None and images != "none":
            yield _picture(name, shot, at, images, jpeg)


def _picture(name: str, shot: Shot, ns: int, images: Images, jpeg: Callable[[np.ndarray], bytes]) -> Made:
    topic = f"{name}/image"
    if images == "jpeg":
        data = jpeg(shot.image)
        head = foxglove.compressed_image_head(ns, name, "jpeg", len(data))
        return Made(topic, foxglove.COMPRESSED_IMAGE, ns, [head, data])
    pixels = np.ascontiguousarray(shot.image)
    height, width = pixels.shape[:2]
    head = foxglove.raw_image_head(ns, name, width, height, "bgr8", 3 * width, pixels.nbytes)
    copied = 0 if pixels is shot.image else pixels.nbytes
    return Made(topic, foxglove.RAW_IMAGE, ns, [head, pixels.data.cast("B")], copied)


def result_messages(result: Any, rig: RigFrame | None, engine: str, ns: int) -> Iterator[Made]:
    """The boxes of a result, in space and, where the moment is known, in its pictures.

    engine: with a slash behind it, or nothing.
    """
    from edgekit.tasks.detect.draw import class_color, ink_color

    found = shown(result)
    colors = [foxglove.rgba(class_color(each.cls)) for each in found]
    texts = [f"{each.label} {each.score:.2f}" for each in found]
    boxes = [(each.box, color, text) for each, color, text in zip(found, colors, texts, strict=True)]
    arrows = [(each.box[:3], way) for each in found if (way := each.velocity) is not None]
    scene = foxglove_scene.scene_update(ns, "lidar", f"{engine}boxes", boxes, arrows)
    yield Made(f"{engine}boxes", foxglove.SCENE_UPDATE, ns, [scene])
    if rig is None:
        return
    for name, shot in rig.shots.items():
        at = ns + shot.taken_ns - rig.taken_ns
        drawn = []
        for each, color, text in zip(found, colors, texts, strict=True):
            lines = lines_in(rig, name, each.box)
            if len(lines):
                left, top, _, _ = outline_in(rig, name, each.box)
                ink = foxglove.rgba(ink_color(class_color(each.cls)))
                drawn.append((lines.tolist(), color, ink, text, (float(left), float(top))))
        notes = foxglove.image_annotations(at, (), wires=drawn)
        yield Made(f"{name}/{engine}annotations", foxglove.IMAGE_ANNOTATIONS, at, [notes])
