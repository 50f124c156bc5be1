"""Foxglove's picture messages in protobuf, so that Foxglove Studio and Rerun show a recording as it is.

A few fields of a few messages, written and read by hand: the bytes of a picture are never copied into a
message object, and no protobuf library is needed on the device. Sources: docs.foxglove.dev/docs/sdk/schemas
(RawImage, CompressedImage, ImageAnnotations), protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

RAW_IMAGE, COMPRESSED_IMAGE, IMAGE_ANNOTATIONS = (
    "foxglove.RawImage",
    "foxglove.CompressedImage",
    "foxglove.ImageAnnotations",
)
POINT_CLOUD, CAMERA_CALIBRATION, FRAME_TRANSFORMS, SCENE_UPDATE = (
    "foxglove.PointCloud",
    "foxglove.CameraCalibration",
    "foxglove.FrameTransforms",
    "foxglove.SceneUpdate",
)
"""Written by foxglove_scene.py."""

Color = tuple[float, float, float, float]
"""Red, green, blue, opacity, each 0..1."""

# types of descriptor.proto
_DOUBLE, _INT64, _INT32, _FIXED32, _BOOL, _STRING, _MESSAGE, _BYTES, _ENUM = 1, 3, 5, 7, 8, 9, 11, 12, 14
_TIME = ".google.protobuf.Timestamp"
_SCHEMA: dict[str, tuple[tuple[str, int, int, str, bool], ...]] = {
    # (field, number, type, type name, repeated)
    "RawImage": (
        ("timestamp", 1, _MESSAGE, _TIME, False),
        ("width", 2, _FIXED32, "", False),
        ("height", 3, _FIXED32, "", False),
        ("encoding", 4, _STRING, "", False),
        ("step", 5, _FIXED32, "", False),
        ("data", 6, _BYTES, "", False),
        ("frame_id", 7, _STRING, "", False),
    ),
    "CompressedImage": (
        ("timestamp", 1, _MESSAGE, _TIME, False),
        ("data", 2, _BYTES, "", False),
        ("format", 3, _STRING, "", False),
        ("frame_id", 4, _STRING, "", False),
    ),
    "Color": tuple((name, i + 1, _DOUBLE, "", False) for i, name in enumerate("rgba")),
    "Point2": (("x", 1, _DOUBLE, "", False), ("y", 2, _DOUBLE, "", False)),
    "PointsAnnotation": (
        ("timestamp", 1, _MESSAGE, _TIME, False),
        ("type", 2, _ENUM, ".foxglove.PointsAnnotation.Type", False),
        ("points", 3, _MESSAGE, ".foxglove.Point2", True),
        ("outline_color", 4, _MESSAGE, ".foxglove.Color", False),
        ("thickness", 7, _DOUBLE, "", False),
    ),
    "TextAnnotation": (
        ("timestamp", 1, _MESSAGE, _TIME, False),
        ("position", 2, _MESSAGE, ".foxglove.Point2", False),
        ("text", 3, _STRING, "", False),
        ("font_size", 4, _DOUBLE, "", False),
        ("text_color", 5, _MESSAGE, ".foxglove.Color", False),
        ("background_color", 6, _MESSAGE, ".foxglove.Color", False),
    ),
    "ImageAnnotations": (
        ("points", 2, _MESSAGE, ".foxglove.PointsAnnotation", True),
        ("texts", 3, _MESSAGE, ".foxglove.TextAnnotation", True),
        ("timestamp", 5, _MESSAGE, _TIME, False),
    ),
}
_VECTOR = tuple((name, i + 1, _DOUBLE, "", False) for i, name in enumerate("xyz"))
_SCENE: dict[str, tuple[tuple[str, int, int, str, bool], ...]] = {
    "Color": _SCHEMA["Color"],
    "Vector3": _VECTOR,
    "Quaternion": (*_VECTOR, ("w", 4, _DOUBLE, "", False)),
    "Pose": (
        ("position", 1, _MESSAGE, ".foxglove.Vector3", False),
        ("orientation", 2, _MESSAGE, ".foxglove.Quaternion", False),
    ),
    "FrameTransform": (
        ("timestamp", 1, _MESSAGE, _TIME, False),
        ("parent_frame_id", 2, _STRING, "", False),
        ("child_frame_id", 3, _STRING, "", False),
        ("translation", 4, _MESSAGE, ".foxglove.Vector3", False),
        ("rotation", 5, _MESSAGE, ".foxglove.Quaternion", False),
    ),
    "FrameTransforms": (("transforms", 1, _MESSAGE, ".foxglove.FrameTransform", True),),
    "PackedElementField": (
        ("name", 1, _STRING, "", False),
        ("offset", 2, _FIXED32, "", False),
        ("type", 3, _ENUM, ".foxglove.PackedElementField.NumericType", False),
    ),
    "PointCloud": (
        ("timestamp", 1, _MESSAGE, _TIME, False),
        ("frame_id", 2, _STRING, "", False),
        ("pose", 3, _MESSAGE, ".foxglove.Pose", False),
        ("point_stride", 4, _FIXED32, "", False),
        ("fields", 5, _MESSAGE, ".foxglove.PackedElementField", True),
        ("data", 6, _BYTES, "", False),
    ),
    "CameraCalibration": (
        ("timestamp", 1, _MESSAGE, _TIME, False),
        ("width", 2, _FIXED32, "", False),
        ("height", 3, _FIXED32, "", False),
        ("distortion_model", 4, _STRING, "", False),
        ("D", 5, _DOUBLE, "", True),
        ("K", 6, _DOUBLE, "", True),
        ("R", 7, _DOUBLE, "", True),
        ("P", 8, _DOUBLE, "", True),
        ("frame_id", 9, _STRING, "", False),
    ),
    "CubePrimitive": (
        ("pose", 1, _MESSAGE, ".foxglove.Pose", False),
        ("size", 2, _MESSAGE, ".foxglove.Vector3", False),
        ("color", 3, _MESSAGE, ".foxglove.Color", False),
    ),
    "ArrowPrimitive": (
        ("pose", 1, _MESSAGE, ".foxglove.Pose", False),
        ("shaft_length", 2, _DOUBLE, "", False),
        ("shaft_diameter", 3, _DOUBLE, "", False),
        ("head_length", 4, _DOUBLE, "", False),
        ("head_diameter", 5, _DOUBLE, "", False),
        ("color", 6, _MESSAGE, ".foxglove.Color", False),
    ),
    "TextPrimitive": (
        ("pose", 1, _MESSAGE, ".foxglove.Pose", False),
        ("billboard", 2, _BOOL, "", False),
        ("font_size", 3, _DOUBLE, "", False),
        ("scale_invariant", 4, _BOOL, "", False),
        ("color", 5, _MESSAGE, ".foxglove.Color", False),
        ("text", 6, _STRING, "", False),
    ),
    "SceneEntity": (
        ("timestamp", 1, _MESSAGE, _TIME, False),
        ("frame_id", 2, _STRING, "", False),
        ("id", 3, _STRING, "", False),
        ("frame_locked", 5, _BOOL, "", False),
        ("arrows", 7, _MESSAGE, ".foxglove.ArrowPrimitive", True),
        ("cubes", 8, _MESSAGE, ".foxglove.CubePrimitive", True),
        ("texts", 13, _MESSAGE, ".foxglove.TextPrimitive", True),
    ),
    "SceneUpdate": (("entities", 2, _MESSAGE, ".foxglove.SceneEntity", True),),
}
_LINE_LOOP, _LINE_LIST = 2, 4
_NUMBERS = ("UNKNOWN", "UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "FLOAT32", "FLOAT64")
_ENUMS = {
    "PointsAnnotation": ("Type", ("UNKNOWN", "POINTS", "LINE_LOOP", "LINE_STRIP", "LINE_LIST")),
    "PackedElementField": ("NumericType", _NUMBERS),
}
"""Message -> its enum's name and values, numbered from 0."""
_MAX_FIELDS = 10_000
"""Fields of one message that are looked at: a picture has seven."""


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _int(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value & (1 << 64) - 1)


def _block(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _text(number: int, text: str) -> bytes:
    return _block(number, text.encode(errors="replace"))


def _fixed32(number: int, value: int) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<I", value)


def _doubles(*values: float) -> bytes:
    """A message whose fields 1, 2, ... are doubles: Color, Point2."""
    return b"".join(struct.pack("<Bd", i << 3 | 1, value) for i, value in enumerate(values, 1))


def rgba(bgr: tuple[int, int, int]) -> Color:
    b, g, r = bgr
    return r / 255, g / 255, b / 255, 1.0


def _timestamp(ns: int) -> bytes:
    return _int(1, ns // 10**9) + _int(2, ns % 10**9)


def raw_image_head(
    ns: int, frame_id: str, width: int, height: int, encoding: str, step: int, nbytes: int
) -> bytes:
    """A `foxglove.RawImage` up to its data, which is its last field: the caller appends the `nbytes` bytes."""
    return (
        _block(1, _timestamp(ns))
        + _text(7, frame_id)
        + _fixed32(2, width)
        + _fixed32(3, height)
        + _text(4, encoding)
        + _fixed32(5, step)
        + _varint(6 << 3 | 2)
        + _varint(nbytes)
    )


def compressed_image_head(ns: int, frame_id: str, format: str, nbytes: int) -> bytes:
    """A `foxglove.CompressedImage` (format `jpeg`, `png`, ...) up to its data, which the caller appends."""
    head = _block(1, _timestamp(ns)) + _text(4, frame_id) + _text(3, format)
    return head + _varint(2 << 3 | 2) + _varint(nbytes)


def image_annotations(
    ns: int,
    boxes: Iterable[tuple[tuple[float, float, float, float], Color, Color, str]],
    texts: Iterable[str] = (),
    wires: Iterable[
        tuple[Iterable[tuple[float, float, float, float]], Color, Color, str, tuple[float, float]]
    ] = (),
) -> bytes:
    """A `foxglove.ImageAnnotations`: (x1 y1 x2 y2, colour, ink, label) per box, and lines of text at the top left.

    wires: things of several lines: (their x1 y1 x2 y2, colour, ink, label, where the label goes).
    """
    time = _block(1, _timestamp(ns))
    out = [_block(5, _timestamp(ns))]

    def label(x: float, y: float, text: str, ink: Color, ground: Color) -> bytes:
        return _block(
            3,
            time
            + _block(2, _doubles(x, y))
            + _text(3, text)
            + struct.pack("<Bd", 4 << 3 | 1, 14.0)
            + _block(5, _doubles(*ink))
            + _block(6, _doubles(*ground)),
        )

    for (x1, y1, x2, y2), color, ink, text in boxes:
        corners = b"".join(_block(3, _doubles(*p)) for p in ((x1, y1), (x2, y1), (x2, y2), (x1, y2)))
        line = _block(4, _doubles(*color)) + struct.pack("<Bd", 7 << 3 | 1, 2.0)
        out.append(_block(2, time + _int(2, _LINE_LOOP) + corners + line))
        if text:
            out.append(label(x1, y1, text, ink, color))
    for lines, color, ink, text, (x, y) in wires:
        ends = b"".join(_block(3, _doubles(*p)) for x1, y1, x2, y2 in lines for p in ((x1, y1), (x2, y2)))
        style = _block(4, _doubles(*color)) + struct.pack("<Bd", 7 << 3 | 1, 2.0)
        out.append(_block(2, time + _int(2, _LINE_LIST) + ends + style))
        if text:
            out.append(label(x, y, text, ink, color))
    for i, text in enumerate(texts):
        out.append(label(4.0, 20.0 * (i + 1), text, (1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.6)))
    return b"".join(out)


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of every field of a message: an integer, or a view of `data`.

    Raises: ValueError for bytes that are no protobuf message.
    """
    at, end = 0, len(data)

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                raise ValueError("message is cut short")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("message has a damaged number")

    for _ in range(_MAX_FIELDS):
        if at == end:
            return
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
            continue
        length = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            length = varint()
        if length is None or length > end - at:
            raise ValueError("message is cut short or damaged")
        value = data[at : at + length]
        at += length
        yield number, value if kind == 2 else int.from_bytes(value, "little")
    raise ValueError(f"message has more than {_MAX_FIELDS} fields")


def descriptor_set(schema: str = RAW_IMAGE) -> bytes:
    """A `google.protobuf.FileDescriptorSet` with a message and those beside it: what an MCAP schema record holds."""
    scene = schema.removeprefix("foxglove.") in _SCENE
    stamp = (("seconds", 1, _INT64, "", False), ("nanos", 2, _INT32, "", False))
    time_file = (
        _text(1, "google/protobuf/timestamp.proto")
        + _text(2, "google.protobuf")
        + _descriptor("Timestamp", stamp)
        + _text(12, "proto3")
    )
    file = _text(1, "foxglove/scene.proto" if scene else "foxglove/pictures.proto") + _text(2, "foxglove")
    file += _text(3, "google/protobuf/timestamp.proto")
    file += b"".join(_descriptor(name, table) for name, table in (_SCENE if scene else _SCHEMA).items())
    return _block(1, time_file) + _block(1, file + _text(12, "proto3"))


def _descriptor(name: str, table: tuple[tuple[str, int, int, str, bool], ...]) -> bytes:
    out = _text(1, name)
    for field, number, kind, type_name, repeated in table:
        entry = _text(1, field) + _int(3, number) + _int(4, 3 if repeated else 1) + _int(5, kind)
        out += _block(2, entry + (_text(6, type_name) if type_name else b""))
    if name in _ENUMS:
        title, values = _ENUMS[name]
        out += _block(
            4, _text(1, title) + b"".join(_block(2, _text(1, v) + _int(2, i)) for i, v in enumerate(values))
        )
    return _block(4, out)
