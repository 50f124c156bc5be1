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

Color = tuple[float, float, float, float]
"""Red, green, blue, opacity, each 0..1."""

# types of descriptor.proto
_DOUBLE, _INT64, _INT32, _FIXED32, _STRING, _MESSAGE, _BYTES, _ENUM = 1, 3, 5, 7, 9, 11, 12, 14
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
_LINE_LOOP = 2
_POINTS_TYPES = ("UNKNOWN", "POINTS", "LINE_LOOP", "LINE_STRIP", "LINE_LIST")
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
) -> bytes:
    """A `foxglove.ImageAnnotations`: (x1 y1 x2 y2, colour, ink, label) per box, and lines of text at the top left."""
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


def descriptor_set() -> bytes:
    """A `google.protobuf.FileDescriptorSet` of all messages here: what an MCAP schema record holds."""
    stamp = (("seconds", 1, _INT64, "", False), ("nanos", 2, _INT32, "", False))
    time_file = (
        _text(1, "google/protobuf/timestamp.proto")
        + _text(2, "google.protobuf")
        + _descriptor("Timestamp", stamp)
        + _text(12, "proto3")
    )
    file = _text(1, "foxglove/pictures.proto") + _text(2, "foxglove")
    file += _text(3, "google/protobuf/timestamp.proto")
    file += b"".join(_descriptor(name, table) for name, table in _SCHEMA.items())
    return _block(1, time_file) + _block(1, file + _text(12, "proto3"))


def _descriptor(name: str, table: tuple[tuple[str, int, int, str, bool], ...]) -> bytes:
    out = _text(1, name)
    for field, number, kind, type_name, repeated in table:
        entry = _text(1, field) + _int(3, number) + _int(4, 3 if repeated else 1) + _int(5, kind)
        out += _block(2, entry + (_text(6, type_name) if type_name else b""))
    if name == "PointsAnnotation":
        values = b"".join(_block(2, _text(1, v) + _int(2, i)) for i, v in enumerate(_POINTS_TYPES))
        out += _block(4, _text(1, "Type") + values)
    return _block(4, out)
