"""A BGR picture in the formats that cameras give: the definition, in numpy, of what `PixelLayout` says.

RGB to YUV by ITU-R BT.601-7 (2.5.1) or BT.709-6 (3.2): limited range puts luma at 16..235 and chroma at 16..240,
full range at 0..255. Chroma of a 4:2:2 pair is the mean of its two pixels, of a 4:2:0 block the mean of its four;
an odd last row or column counts twice.
"""

from __future__ import annotations

import numpy as np

from edgekit.errors import UsageError
from edgekit.pixels import FORMATS, YUV, Format, Matrix, PixelLayout, Pixels, Range

_LUMA: dict[str, tuple[float, float]] = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}
"""Weights of red and blue in luma; green is the rest."""
_ORDER = {"bgr": (0, 1, 2), "rgb": (2, 1, 0), "bgra": (0, 1, 2), "rgba": (2, 1, 0)}


def convert(image: np.ndarray, format: Format, matrix: Matrix = "bt601", range: Range = "limited") -> Pixels:
    """uint8 [H, W, 3] BGR as `format`, in memory of its own; BGR is not copied.

    `grey` is BT.601 luma of full range, as OpenCV makes it.
    Raises: UsageError for a format that is unknown or cannot have this size.
    """
    if format == "bgr":
        return Pixels.bgr(image)
    height, width = image.shape[:2]
    layout = PixelLayout(format, width, height, matrix, range)
    if format == "grey":
        return Pixels((_round(_yuv(image, "bt601", "full")[:, :, :1]),), layout)
    if format in YUV:
        return _subsampled(_yuv(image, matrix, range), layout)
    if format not in _ORDER:
        raise UsageError(f"pixel format {format!r}: cannot be made, expected one of {', '.join(FORMATS)}")
    plane = np.full(layout.plane_shapes[0], 255, np.uint8)
    for channel, source in enumerate(_ORDER[format]):
        plane[:, :, channel] = image[:, :, source]
    return Pixels((plane,), layout)


def _yuv(image: np.ndarray, matrix: str, range: str) -> np.ndarray:
    """float32 [H, W, 3] Y U V at full resolution."""
    red, blue = _LUMA[matrix]
    luma = np.array([blue, 1 - red - blue, red])  # of B, G, R
    rows = [luma, (np.array([1, 0, 0]) - luma) / (2 - 2 * blue), (np.array([0, 0, 1]) - luma) / (2 - 2 * red)]
    scale, offset = (219 / 255, 16.0) if range == "limited" else (1.0, 0.0)
    chroma = 224 / 255 if range == "limited" else 1.0
    weights = np.stack([rows[0] * scale, rows[1] * chroma, rows[2] * chroma]).astype(np.float32)
    return image.astype(np.float32) @ weights.T + np.array([offset, 128, 128], np.float32)


def _round(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _subsampled(yuv: np.ndarray, layout: PixelLayout) -> Pixels:
    luma, chroma = _round(yuv[:, :, 0]), yuv[:, :, 1:]
    height, width = luma.shape
    if layout.format in ("yuyv", "uyvy"):
        pairs = _round((chroma[:, 0::2] + chroma[:, 1::2]) / 2)
        plane = np.empty((height, width, 2), np.uint8)
        at = 0 if layout.format == "yuyv" else 1
        plane[:, :, at] = luma
        plane[:, 0::2, 1 - at] = pairs[:, :, 0]
        plane[:, 1::2, 1 - at] = pairs[:, :, 1]
        return Pixels((plane,), layout)
    even = np.pad(chroma, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    blocks = _round((even[0::2, 0::2] + even[0::2, 1::2] + even[1::2, 0::2] + even[1::2, 1::2]) / 4)
    if layout.format == "i420":
        return Pixels((luma, *(np.ascontiguousarray(blocks[:, :, i]) for i in (0, 1))), layout)
    if layout.format == "nv21":
        blocks = np.ascontiguousarray(blocks[:, :, ::-1])
    return Pixels((luma, blocks), layout)
