"""What a recording holds: topics, schemas, and every fact of a frame, so that a replay is the same frame.

Per camera, `<camera>` being its short name (`camera` where it has none):

    /<camera>/frame            edgekit.Frame (JSON)      every fact of a frame; before its picture, of equal `sequence`
    /<camera>/image            foxglove.RawImage         the camera's own bytes, or foxglove.CompressedImage (JPEG)
    /<camera>/[engine/]result  edgekit.Result (JSON)     the result, its age and stages
    /<camera>/[engine/]annotations  foxglove.ImageAnnotations
    /metrics                   edgekit.Metrics (JSON)    once a second
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np

from edgekit.errors import UsageError
from edgekit.picture import check_size
from edgekit.pixels import FORMATS, Format, Matrix, PixelLayout, Pixels, Range
from edgekit.runtime.frames import Clock, Exposure, Frame

FRAME, RESULT, METRICS = "edgekit.Frame", "edgekit.Result", "edgekit.Metrics"
CAMERA_KEY = "edgekit.camera"
"""Key in a channel's metadata that holds the camera's name; a channel without it is someone else's."""

Images = Literal["raw", "jpeg", "none"]

_ENCODINGS: dict[str, Format] = {
    "yuyv": "yuyv",
    "yuv422_yuy2": "yuyv",
    "uyvy": "uyvy",
    "yuv422": "uyvy",
    "nv12": "nv12",
    "nv21": "nv21",
    "i420": "i420",
    "mono8": "grey",
    "8UC1": "grey",
    "bgr8": "bgr",
    "8UC3": "bgr",
    "rgb8": "rgb",
    "bgra8": "bgra",
    "8UC4": "bgra",
    "rgba8": "rgba",
}
"""Encoding of a RawImage or a ROS Image -> our format. The first of each format that Foxglove knows is written."""
_WRITTEN = {"yuyv": "yuyv", "uyvy": "uyvy", "nv12": "nv12", "nv21": "nv12", "i420": "nv12", "grey": "mono8",
            "bgr": "bgr8", "rgb": "rgb8", "bgra": "bgra8", "rgba": "rgba8"}  # fmt: skip
_SUBSAMPLED = ("nv12", "nv21", "i420")
_NAMES = 4096


@dataclass(frozen=True)
class Facts:
    """Everything of a frame but its pixels. picture: how these were recorded."""

    seq: int
    pts_ns: int
    captured_ns: int
    clock: Clock
    exposure: Exposure
    epoch: int
    corrupt: bool
    camera: str
    source: str
    layout: PixelLayout
    picture: Images

    @staticmethod
    def of(frame: Frame, picture: Images) -> Facts:
        return Facts(
            frame.seq,
            frame.pts_ns,
            frame.captured_ns,
            frame.clock,
            frame.exposure,
            frame.epoch,
            frame.corrupt,
            frame.camera,
            frame.source,
            frame.pixels.layout,
            picture,
        )

    def to_json(self) -> dict[str, Any]:
        values = {**vars(self), "layout": {**vars(self.layout)}}
        return values

    @staticmethod
    def from_json(data: bytes | memoryview) -> Facts:
        """Raises: ValueError, its text is the reason."""
        try:
            values = json.loads(bytes(data))
            if not isinstance(values, dict) or not isinstance(values.get("layout"), dict):
                raise ValueError("facts of a frame are missing")
            layout = values["layout"]
            return Facts(
                _whole(values, "seq"),
                _whole(values, "pts_ns"),
                _whole(values, "captured_ns"),
                cast("Clock", _one_of(values, "clock", get_args(Clock))),
                cast("Exposure", _one_of(values, "exposure", get_args(Exposure))),
                _whole(values, "epoch"),
                values.get("corrupt") is True,
                str(values.get("camera", ""))[:_NAMES],
                str(values.get("source", ""))[:_NAMES],
                checked_layout(
                    _one_of(layout, "format", FORMATS),
                    _whole(layout, "width"),
                    _whole(layout, "height"),
                    cast("Matrix", _one_of(layout, "matrix", get_args(Matrix))),
                    cast("Range", _one_of(layout, "range", get_args(Range))),
                ),
                cast("Images", _one_of(values, "picture", get_args(Images))),
            )
        except RecursionError:
            raise ValueError("facts of a frame are nested too deep") from None


def _whole(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**63:
        raise ValueError(f"{key} of a frame is not a whole number")
    return value


def _one_of(values: Mapping[str, Any], key: str, known: tuple[str, ...]) -> str:
    value = values.get(key)
    if value not in known:
        raise ValueError(f"{key} of a frame is not one of {', '.join(known)}")
    return str(value)


def checked_layout(
    format: str, width: int, height: int, matrix: Matrix = "bt601", range: Range = "limited"
) -> PixelLayout:
    """Raises: ValueError for a size that no picture has, before anything is made of it."""
    problem = check_size(width, height)
    if problem:
        raise ValueError(problem)
    try:
        return PixelLayout(cast("Format", format), width, height, matrix, range)
    except UsageError as error:
        raise ValueError(str(error)) from None


def dumps(values: Mapping[str, Any]) -> bytes:
    """As a JSON message. Raises: ValueError for a number that is not finite."""
    return json.dumps(values, allow_nan=False, separators=(",", ":")).encode()


def to_raw(pixels: Pixels) -> tuple[str, int, list[memoryview], int]:
    """A picture as (encoding, step, its bytes in pieces, bytes that were copied for it) of a `foxglove.RawImage`.

    The pieces view the planes. Copied are rows that lie apart, and the chroma of `i420` and `nv21`, which
    Foxglove does not know and which are stored as `nv12`. A 4:2:0 picture with an odd side, which it does not know
    either, is stored under our own name of its format. `from_raw` gives the same picture back, bit for bit.
    """
    layout, planes = pixels.layout, pixels.planes
    even = layout.width % 2 == 0 and layout.height % 2 == 0
    encoding = _WRITTEN[layout.format] if even or layout.format not in _SUBSAMPLED else layout.format
    copied = 0
    if encoding == "nv12" and layout.format != "nv12":
        u, v = planes[1:] if layout.format == "i420" else (planes[1][..., 1], planes[1][..., 0])
        chroma = np.stack((u, v), axis=-1)
        planes = (planes[0], chroma)
        copied += chroma.nbytes
    pieces = []
    for made, plane in enumerate(planes):
        flat = np.ascontiguousarray(plane).reshape(-1)
        if not (plane.flags.c_contiguous or (made and copied)):
            copied += flat.nbytes
        pieces.append(flat.data)
    step = layout.plane_shapes[0][1] * (1 if layout.format in _SUBSAMPLED else layout.plane_shapes[0][2])
    return encoding, step, pieces, copied


def from_raw(
    data: memoryview, encoding: str, step: int, width: int, height: int, layout: PixelLayout | None
) -> Pixels:
    """The picture of a `foxglove.RawImage` or a ROS Image: a view of `data`, but for `i420` and `nv21` (see `to_raw`).

    layout: as recorded; None for someone else's file.
    Raises: ValueError, its text is the reason.
    """
    format = _ENCODINGS.get(encoding)
    if format is None:
        raise ValueError(f"encoding {encoding[:40]!r} is not taken, expected one of {', '.join(_ENCODINGS)}")
    stored = checked_layout(
        format, width, height, layout.matrix if layout else "bt601", layout.range if layout else "limited"
    )
    if layout is not None and (layout.width, layout.height) != (width, height):
        raise ValueError(f"picture is {width}x{height}, its facts say {layout.width}x{layout.height}")
    rows = stored.plane_shapes
    natural = [int(np.prod(shape[1:])) for shape in rows]
    # both planes of a 4:2:0 picture have the same step, which for an even width is the natural one too
    if format in _SUBSAMPLED and step != natural[0]:
        strides = [max(step, natural[0])] * 2 if format != "i420" else [step, step // 2, step // 2]
    else:
        strides = [step or natural[0], *natural[1:]]
    try:
        pixels = Pixels.view(np.frombuffer(data, np.uint8), stored, strides)
    except UsageError as error:
        raise ValueError(str(error)) from None
    if layout is None or layout.format == format:
        return pixels
    if format != "nv12" or layout.format not in ("nv21", "i420"):
        raise ValueError(f"picture is {format}, its facts say {layout.format}")
    luma, chroma = pixels.planes
    if layout.format == "nv21":
        return Pixels((luma, np.ascontiguousarray(chroma[..., ::-1])), layout)
    return Pixels((luma, np.ascontiguousarray(chroma[..., 0]), np.ascontiguousarray(chroma[..., 1])), layout)
