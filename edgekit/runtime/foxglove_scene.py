"""Foxglove's messages for what stands in space: point clouds, calibrations, transforms, boxes. As foxglove.py, which has
their schema, written by hand. Source: docs.foxglove.dev/docs/sdk/schemas.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence

import numpy as np

from edgekit.rig import Camera, quaternion
from edgekit.runtime.foxglove import Color, _block, _doubles, _fixed32, _int, _text, _timestamp, _varint

_FLOAT32 = 7
TEXT_SIZE = 14.0
"""Pixels of the screen."""


def point_cloud_head(ns: int, frame_id: str, columns: Sequence[str], count: int) -> bytes:
    """A `foxglove.PointCloud` of `count` rows of float32 `columns`, up to its data, which the caller appends."""
    stride = 4 * len(columns)
    fields = b"".join(
        _block(5, _text(1, name) + _fixed32(2, 4 * i) + _int(3, _FLOAT32)) for i, name in enumerate(columns)
    )
    head = (
        _block(1, _timestamp(ns))
        + _text(2, frame_id)
        + _block(3, _pose((0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0)))
    )
    return head + _fixed32(4, stride) + fields + _varint(6 << 3 | 2) + _varint(count * stride)


def camera_calibration(ns: int, frame_id: str, camera: Camera) -> bytes:
    """A `foxglove.CameraCalibration` of a rectified pinhole."""
    k = camera.matrix
    projection = np.concatenate([k, np.zeros((3, 1))], 1)
    out = _block(1, _timestamp(ns)) + _text(9, frame_id)
    out += _fixed32(2, camera.width) + _fixed32(3, camera.height)
    for number, matrix in ((6, k), (7, np.eye(3)), (8, projection)):
        out += _block(number, np.ascontiguousarray(matrix, "<f8").tobytes())
    return out


def frame_transforms(ns: int, transforms: Iterable[tuple[str, str, np.ndarray]]) -> bytes:
    """A `foxglove.FrameTransforms` of (parent, child, child_to_parent [4, 4])."""
    out = b""
    for parent, child, matrix in transforms:
        w, x, y, z = quaternion(matrix[:3, :3])
        out += _block(
            1,
            _block(1, _timestamp(ns))
            + _text(2, parent)
            + _text(3, child)
            + _block(4, _doubles(*(float(v) for v in matrix[:3, 3])))
            + _block(5, _doubles(x, y, z, w)),
        )
    return out


def scene_update(
    ns: int, frame_id: str, entity: str,
    boxes: Iterable[tuple[np.ndarray, Color, str]], arrows: Iterable[tuple[np.ndarray, np.ndarray]] = (),
) -> bytes:  # fmt: skip
    """A `foxglove.SceneUpdate` that puts boxes in the place of those that the entity had before.

    boxes: (box [>= 7] as `rig.BOX_FIELDS`, colour, label).  arrows: (origin [3], way [2] in metres along x and y).
    """
    out = _block(1, _timestamp(ns)) + _text(2, frame_id) + _text(3, entity)
    for origin, way in arrows:
        length = math.hypot(*way.tolist())
        turn = math.atan2(float(way[1]), float(way[0])) / 2
        sizes = (max(0.0, length - 0.4), 0.08, min(0.4, length), 0.25)
        out += _block(
            7,
            _block(1, _pose(origin.tolist(), (0.0, 0.0, math.sin(turn), math.cos(turn))))
            + b"".join(struct.pack("<Bd", i << 3 | 1, v) for i, v in enumerate(sizes, 2))
            + _block(6, _doubles(1.0, 1.0, 1.0, 1.0)),
        )
    texts = b""
    for box, color, text in boxes:
        x, y, z, length, width, height, yaw = (float(v) for v in box[:7])
        pose = _pose((x, y, z), (0.0, 0.0, math.sin(yaw / 2), math.cos(yaw / 2)))
        glass = (*color[:3], 0.35)
        out += _block(
            8, _block(1, pose) + _block(2, _doubles(length, width, height)) + _block(3, _doubles(*glass))
        )
        above = _pose((x, y, z + height / 2 + 0.4), (0.0, 0.0, 0.0, 1.0))
        texts += _block(
            13,
            _block(1, above)
            + _int(2, 1)
            + struct.pack("<Bd", 3 << 3 | 1, TEXT_SIZE)
            + _int(4, 1)
            + _block(5, _doubles(*color))
            + _text(6, text),
        )
    return _block(2, out + texts)


def _pose(position: Sequence[float], orientation: Sequence[float]) -> bytes:
    """position x, y, z; orientation x, y, z, w."""
    return _block(1, _doubles(*position)) + _block(2, _doubles(*orientation))
