"""One picture in the camera's own bytes: planes that view the driver's buffer, and what they mean.

Everything that takes a picture takes a `Pixels`; a uint8 [H, W, 3] BGR array, as OpenCV gives it, stands
for `Pixels.bgr(array)`. Nothing here copies: conversion belongs to the kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgekit.errors import UsageError, did_you_mean

Format = Literal["bgr", "rgb", "bgra", "rgba", "grey", "yuyv", "uyvy", "nv12", "nv21", "i420"]
Matrix = Literal["bt601", "bt709"]
Range = Literal["full", "limited"]

PACKED_BYTES = {"bgr": 3, "rgb": 3, "bgra": 4, "rgba": 4, "grey": 1, "yuyv": 2, "uyvy": 2}
"""Bytes per pixel of the formats that lie in one plane, [H, W, bytes]."""
SEMI_PLANAR, PLANAR = ("nv12", "nv21"), ("i420",)
FORMATS = (*PACKED_BYTES, *SEMI_PLANAR, *PLANAR)
YUV = ("yuyv", "uyvy", "nv12", "nv21", "i420")


@dataclass(frozen=True)
class PixelLayout:
    """What the bytes of a picture mean; hashable, so tables are cached by it.

    format: `bgr rgb bgra rgba grey` one plane, [H, W, channels]; `yuyv uyvy` one plane [H, W, 2] whose
        second (first) bytes are luma and whose others are U and V in turn, W even; `nv12 nv21` luma [H, W]
        and interleaved chroma [ceil(H/2), ceil(W/2), 2], U V or V U; `i420` luma [H, W], U and V [ceil(H/2), ceil(W/2)].
    matrix, range: of YUV formats (ITU-R BT.601, BT.709; limited: luma 16..235, chroma 16..240); without
        meaning for others.
    """

    format: Format
    width: int
    height: int
    matrix: Matrix = "bt601"
    range: Range = "limited"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"pixel format {self.format!r}: unknown. {did_you_mean(self.format, FORMATS)}")
        if self.width < 1 or self.height < 1:
            raise UsageError(f"picture {self.width}x{self.height}: expected at least one pixel")
        if self.format in ("yuyv", "uyvy") and self.width % 2:
            raise UsageError(f"picture {self.width}x{self.height}: {self.format} needs an even width")

    @property
    def plane_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each plane."""
        h, w = self.height, self.width
        half = ((h + 1) // 2, (w + 1) // 2)
        if self.format in SEMI_PLANAR:
            return (h, w), (*half, 2)
        if self.format in PLANAR:
            return (h, w), half, half
        return ((h, w, PACKED_BYTES[self.format]),)

    @property
    def nbytes(self) -> int:
        """Bytes of the picture without padding of rows."""
        return sum(int(np.prod(shape)) for shape in self.plane_shapes)


@dataclass(frozen=True, eq=False)
class Pixels:
    """A picture: uint8 planes shaped as `layout.plane_shapes`, views of someone's buffer.

    Rows may lie any distance apart (a negative one: upside down); the bytes of a row are adjacent.
    """

    planes: tuple[np.ndarray, ...]
    layout: PixelLayout

    @staticmethod
    def bgr(image: np.ndarray, format: Format = "bgr") -> Pixels:
        """An array, uint8 [H, W, channels of `format`], as pixels; [H, W] for `grey`. Raises: UsageError."""
        shape = getattr(image, "shape", None)
        channels = PACKED_BYTES.get(format, 0)
        flat = shape is not None and len(shape) == 2 and format == "grey"
        if (
            not isinstance(image, np.ndarray)
            or image.dtype != np.uint8
            or not (flat or (image.ndim == 3 and image.shape[2] == channels))
            or 0 in image.shape
        ):
            found = (
                f"{getattr(image, 'dtype', type(image).__name__)} {list(shape) if shape is not None else ''}"
            )
            raise UsageError(
                f"image: expected uint8 [height, width, {channels}] in {format.upper()} order, got {found.strip()}"
            )
        plane = image[:, :, None] if flat else image
        if plane.strides[2] != 1 or (plane.strides[1] != channels and plane.shape[1] > 1):
            plane = np.ascontiguousarray(plane)  # a mirrored or channel-swapped view
        return Pixels((plane,), PixelLayout(format, plane.shape[1], plane.shape[0]))

    @staticmethod
    def view(
        buffer: np.ndarray, layout: PixelLayout, strides: Sequence[int] = (), offsets: Sequence[int] = ()
    ) -> Pixels:
        """A driver's buffer, uint8 [bytes], seen as a picture; nothing is copied.

        strides: bytes from row to row, one per plane (default: rows without padding).
        offsets: where each plane begins (default: one after the other).
        Raises: UsageError when the buffer is too short for that.
        """
        planes, at = [], 0
        for i, shape in enumerate(layout.plane_shapes):
            row = int(np.prod(shape[1:]))
            stride = strides[i] if strides else row
            start = offsets[i] if offsets else at
            at = start + stride * shape[0]
            if stride < row or start < 0 or start + stride * (shape[0] - 1) + row > buffer.size:
                raise UsageError(
                    f"frame buffer: too short for {layout.width}x{layout.height} {layout.format} with rows "
                    f"{stride} bytes apart, got {buffer.size} bytes"
                )
            inner = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(1, len(shape)))
            planes.append(np.lib.stride_tricks.as_strided(buffer[start:], shape, (stride, *inner)))
        return Pixels(tuple(planes), layout)

    def region(self, x: int, y: int, width: int, height: int) -> Pixels:
        """A part of the picture as a picture of its own: views of the same bytes, nothing is copied.

        Results on it are in its pixels: add (x, y). Formats that share chroma between pixels are cut where a
        pair (`yuyv uyvy`: x and width) or a square (`nv12 nv21 i420`: x and y) begins.
        Raises: UsageError for a part that lies outside or begins within a pair.
        """
        layout = self.layout
        if not (x >= 0 and y >= 0 and 1 <= width <= layout.width - x and 1 <= height <= layout.height - y):
            raise UsageError(
                f"region {width}x{height} at ({x}, {y}): outside, expected a part of {layout.width}x{layout.height}"
            )
        square = layout.format in SEMI_PLANAR or layout.format in PLANAR
        packed = layout.format in ("yuyv", "uyvy")
        if ((square or packed) and x % 2) or (square and y % 2) or (packed and width % 2):
            raise UsageError(
                f"region {width}x{height} at ({x}, {y}): {layout.format} shares chroma between pixels, "
                f"expected even numbers"
            )
        part = dataclasses.replace(layout, width=width, height=height)
        corners = [(y, x), (y // 2, x // 2), (y // 2, x // 2)]
        planes = tuple(
            plane[top : top + shape[0], left : left + shape[1]]
            for plane, shape, (top, left) in zip(self.planes, part.plane_shapes, corners, strict=False)
        )
        return Pixels(planes, part)

    @property
    def width(self) -> int:
        return self.layout.width

    @property
    def height(self) -> int:
        return self.layout.height

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where each plane begins in memory: what a copy would change."""
        return tuple(int(plane.__array_interface__["data"][0]) for plane in self.planes)

    def copy(self) -> Pixels:
        """The same picture in memory of its own."""
        return Pixels(tuple(plane.copy() for plane in self.planes), self.layout)


class ReleasedPixels(Pixels):
    """What a frame shows once its buffer was given back: the layout, and an error for whoever looks at the bytes."""

    def __init__(self, layout: PixelLayout) -> None:
        object.__setattr__(self, "layout", layout)

    @property
    def planes(self) -> tuple[np.ndarray, ...]:
        raise UsageError(
            "frame: was released, its buffer is the camera's again. Call frame.share() or frame.detach() before that"
        )


def as_pixels(image: np.ndarray | Pixels) -> Pixels:
    """`image` itself, or a uint8 [H, W, 3] BGR array as pixels. Raises: UsageError for anything else."""
    return image if isinstance(image, Pixels) else Pixels.bgr(image)
