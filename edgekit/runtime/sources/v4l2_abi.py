"""The kernel's video-capture interface as numbers and structures: <linux/videodev2.h> on 64-bit Linux.

Names are the header's, without `V4L2_` and `VIDIOC_`. The layout is the same on x86-64 and aarch64.
"""

from __future__ import annotations

import ctypes
import fcntl
from ctypes import Structure, Union, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64
from dataclasses import dataclass
from typing import Any

from edgekit.pixels import Format, Matrix, Range

BUF_TYPE_VIDEO_CAPTURE, BUF_TYPE_VIDEO_CAPTURE_MPLANE = 1, 9
MEMORY_MMAP, MEMORY_USERPTR, MEMORY_DMABUF = 1, 2, 4
FIELD_NONE, FIELD_INTERLACED, FIELD_INTERLACED_TB, FIELD_INTERLACED_BT = 1, 4, 8, 9
FRAME_FIELDS = (FIELD_NONE, FIELD_INTERLACED, FIELD_INTERLACED_TB, FIELD_INTERLACED_BT)
"""Orders in which one buffer holds whole frames."""
PIX_FMT_PRIV_MAGIC = 0xFEEDCAFE

CAP_VIDEO_CAPTURE, CAP_VIDEO_CAPTURE_MPLANE = 0x1, 0x1000
CAP_STREAMING, CAP_DEVICE_CAPS = 0x04000000, 0x80000000
CAP_TIMEPERFRAME = 0x1000
FMT_FLAG_COMPRESSED = 0x1
SIZE_DISCRETE = 1
"""Of frame sizes and of frame intervals."""

BUF_FLAG_ERROR = 0x40
BUF_FLAG_TIMESTAMP_MASK, BUF_FLAG_TIMESTAMP_MONOTONIC = 0xE000, 0x2000
BUF_FLAG_TSTAMP_SRC_MASK, BUF_FLAG_TSTAMP_SRC_SOE = 0x70000, 0x10000

EVENT_SOURCE_CHANGE = 5
CID_MIN_BUFFERS_FOR_CAPTURE = 0x00980927
CTRL_FLAG_DISABLED, CTRL_FLAG_READ_ONLY, CTRL_FLAG_INACTIVE = 0x1, 0x4, 0x10
CTRL_FLAG_NEXT_CTRL = 0x80000000
CTRL_INTEGER, CTRL_BOOLEAN, CTRL_MENU, CTRL_BUTTON, CTRL_INTEGER_MENU, CTRL_BITMASK = 1, 2, 3, 4, 9, 0x101

MAX_PLANES = 8


class Capability(Structure):
    _fields_ = (
        ("driver", c_uint8 * 16),
        ("card", c_uint8 * 32),
        ("bus_info", c_uint8 * 32),
        ("version", c_uint32),
        ("capabilities", c_uint32),
        ("device_caps", c_uint32),
        ("reserved", c_uint32 * 3),
    )


class FmtDesc(Structure):
    _fields_ = (
        ("index", c_uint32),
        ("type", c_uint32),
        ("flags", c_uint32),
        ("description", c_uint8 * 32),
        ("pixelformat", c_uint32),
        ("mbus_code", c_uint32),
        ("reserved", c_uint32 * 3),
    )


class FrameSize(Structure):
    """discrete: values[0:2] = width, height; else min, max, step of the width, then of the height."""

    _fields_ = (
        ("index", c_uint32),
        ("pixel_format", c_uint32),
        ("type", c_uint32),
        ("values", c_uint32 * 6),
        ("reserved", c_uint32 * 2),
    )


class FrameInterval(Structure):
    """Fractions of a second: values[0] / values[1]; where not discrete min, max and step."""

    _fields_ = (
        ("index", c_uint32),
        ("pixel_format", c_uint32),
        ("width", c_uint32),
        ("height", c_uint32),
        ("type", c_uint32),
        ("values", c_uint32 * 6),
        ("reserved", c_uint32 * 2),
    )


class PixFormat(Structure):
    _fields_ = (
        ("width", c_uint32),
        ("height", c_uint32),
        ("pixelformat", c_uint32),
        ("field", c_uint32),
        ("bytesperline", c_uint32),
        ("sizeimage", c_uint32),
        ("colorspace", c_uint32),
        ("priv", c_uint32),
        ("flags", c_uint32),
        ("ycbcr_enc", c_uint32),
        ("quantization", c_uint32),
        ("xfer_func", c_uint32),
    )


class PlanePixFormat(Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("sizeimage", c_uint32), ("bytesperline", c_uint32), ("reserved", c_uint16 * 6))


class PixFormatMplane(Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (
        ("width", c_uint32),
        ("height", c_uint32),
        ("pixelformat", c_uint32),
        ("field", c_uint32),
        ("colorspace", c_uint32),
        ("plane_fmt", PlanePixFormat * MAX_PLANES),
        ("num_planes", c_uint8),
        ("flags", c_uint8),
        ("ycbcr_enc", c_uint8),
        ("quantization", c_uint8),
        ("xfer_func", c_uint8),
        ("reserved", c_uint8 * 7),
    )


class _FormatUnion(Union):
    # aligned to 8, since one of the kernel's alternatives (v4l2_window) holds pointers
    _fields_ = (("pix", PixFormat), ("pix_mp", PixFormatMplane), ("raw", c_uint8 * 200), ("_align", c_uint64))


class FormatOf(Structure):
    """v4l2_format."""

    _fields_ = (("type", c_uint32), ("fmt", _FormatUnion))


class CaptureParm(Structure):
    _fields_ = (
        ("capability", c_uint32),
        ("capturemode", c_uint32),
        ("numerator", c_uint32),
        ("denominator", c_uint32),
        ("extendedmode", c_uint32),
        ("readbuffers", c_uint32),
        ("reserved", c_uint32 * 4),
    )


class _ParmUnion(Union):
    _fields_ = (("capture", CaptureParm), ("raw", c_uint8 * 200))


class StreamParm(Structure):
    _fields_ = (("type", c_uint32), ("parm", _ParmUnion))


class RequestBuffers(Structure):
    _fields_ = (
        ("count", c_uint32),
        ("type", c_uint32),
        ("memory", c_uint32),
        ("capabilities", c_uint32),
        ("flags", c_uint8),
        ("reserved", c_uint8 * 3),
    )


class _PlaneMemory(Union):
    _fields_ = (("mem_offset", c_uint32), ("userptr", c_uint64), ("fd", c_int32))


class Plane(Structure):
    _fields_ = (
        ("bytesused", c_uint32),
        ("length", c_uint32),
        ("m", _PlaneMemory),
        ("data_offset", c_uint32),
        ("reserved", c_uint32 * 11),
    )


class Timeval(Structure):
    _fields_ = (("sec", c_int64), ("usec", c_int64))


class _BufferMemory(Union):
    _fields_ = (
        ("offset", c_uint32),
        ("userptr", c_uint64),
        ("planes", ctypes.POINTER(Plane)),
        ("fd", c_int32),
    )


class Buffer(Structure):
    _fields_ = (
        ("index", c_uint32),
        ("type", c_uint32),
        ("bytesused", c_uint32),
        ("flags", c_uint32),
        ("field", c_uint32),
        ("timestamp", Timeval),
        ("timecode", c_uint32 * 4),
        ("sequence", c_uint32),
        ("memory", c_uint32),
        ("m", _BufferMemory),
        ("length", c_uint32),
        ("reserved2", c_uint32),
        ("request_fd", c_int32),
    )


class ExportBuffer(Structure):
    _fields_ = (
        ("type", c_uint32),
        ("index", c_uint32),
        ("plane", c_uint32),
        ("flags", c_uint32),
        ("fd", c_int32),
        ("reserved", c_uint32 * 11),
    )


class Control(Structure):
    _fields_ = (("id", c_uint32), ("value", c_int32))


class QueryControl(Structure):
    _fields_ = (
        ("id", c_uint32),
        ("type", c_uint32),
        ("name", c_uint8 * 32),
        ("minimum", c_int32),
        ("maximum", c_int32),
        ("step", c_int32),
        ("default", c_int32),
        ("flags", c_uint32),
        ("reserved", c_uint32 * 2),
    )


class EventSubscription(Structure):
    _fields_ = (("type", c_uint32), ("id", c_uint32), ("flags", c_uint32), ("reserved", c_uint32 * 5))


class _EventUnion(Union):
    _fields_ = (("data", c_uint8 * 64), ("changes", c_uint32), ("_align", c_int64))


class Event(Structure):
    _fields_ = (
        ("type", c_uint32),
        ("u", _EventUnion),
        ("pending", c_uint32),
        ("sequence", c_uint32),
        ("sec", c_int64),
        ("nsec", c_int64),
        ("id", c_uint32),
        ("reserved", c_uint32 * 8),
    )


def _request(direction: int, letter: str, number: int, size: int) -> int:
    """_IOC of <asm-generic/ioctl.h>; direction 1 writes to the kernel, 2 reads from it."""
    return direction << 30 | size << 16 | ord(letter) << 8 | number


def _both(number: int, kind: type[Any]) -> int:
    return _request(3, "V", number, ctypes.sizeof(kind))


QUERYCAP = _request(2, "V", 0, ctypes.sizeof(Capability))
ENUM_FMT = _both(2, FmtDesc)
G_FMT = _both(4, FormatOf)
S_FMT = _both(5, FormatOf)
REQBUFS = _both(8, RequestBuffers)
QUERYBUF = _both(9, Buffer)
QBUF = _both(15, Buffer)
EXPBUF = _both(16, ExportBuffer)
DQBUF = _both(17, Buffer)
STREAMON = _request(1, "V", 18, 4)
STREAMOFF = _request(1, "V", 19, 4)
G_PARM = _both(21, StreamParm)
S_PARM = _both(22, StreamParm)
G_CTRL = _both(27, Control)
S_CTRL = _both(28, Control)
QUERYCTRL = _both(36, QueryControl)
S_INPUT = _both(39, c_int32)
TRY_FMT = _both(64, FormatOf)
ENUM_FRAMESIZES = _both(74, FrameSize)
ENUM_FRAMEINTERVALS = _both(75, FrameInterval)
DQEVENT = _request(2, "V", 89, ctypes.sizeof(Event))
SUBSCRIBE_EVENT = _request(1, "V", 90, ctypes.sizeof(EventSubscription))

DMA_BUF_SYNC = _request(1, "b", 0, 8)
"""<linux/dma-buf.h>: tells the exporter when the CPU begins and ends reading, for caches that are not coherent."""
DMA_BUF_SYNC_READ, DMA_BUF_SYNC_END = 1, 4


def ioctl(fd: int, request: int, argument: Any) -> None:
    """One ioctl on a structure, which the kernel may change; repeated when a signal came. Raises: OSError."""
    while True:
        try:
            fcntl.ioctl(fd, request, argument)
            return
        except InterruptedError:
            continue


def fourcc(text: str) -> int:
    return int.from_bytes(text.encode("ascii"), "little")


def fourcc_text(code: int) -> str:
    """`YUYV`, with `-BE` where the top bit marks the big-endian twin."""
    text = (code & 0x7FFFFFFF).to_bytes(4, "little").decode("latin-1").rstrip()
    return text + ("-BE" if code >> 31 else "")


@dataclass(frozen=True)
class PixelCode:
    """A V4L2 format whose bytes we read as they are. separate: each plane lies in memory of its own."""

    code: str
    format: Format
    separate: bool = False


PIXEL_CODES = {
    fourcc(c.code): c
    for c in (
        PixelCode("NV12", "nv12"),
        PixelCode("NM12", "nv12", separate=True),
        PixelCode("YU12", "i420"),
        PixelCode("YM12", "i420", separate=True),
        PixelCode("NV21", "nv21"),
        PixelCode("NM21", "nv21", separate=True),
        PixelCode("YUYV", "yuyv"),
        PixelCode("UYVY", "uyvy"),
        PixelCode("BGR3", "bgr"),
        PixelCode("RGB3", "rgb"),
        PixelCode("XR24", "bgra"),
        PixelCode("AR24", "bgra"),
        PixelCode("BGR4", "bgra"),
        PixelCode("XB24", "rgba"),
        PixelCode("AB24", "rgba"),
        PixelCode("GREY", "grey"),
    )
}
"""In the order in which they are preferred: few bytes per pixel first, colour before grey."""

_COLORSPACE_SMPTE240M, _COLORSPACE_REC709, _COLORSPACE_JPEG = 2, 3, 7
_COLORSPACE_BT2020, _COLORSPACE_DCI_P3 = 10, 12
_YCBCR_709 = (2, 4, 6, 7, 8)
"""709 and xv709; BT.2020 and SMPTE 240M, whose weights are nearer to BT.709's than to BT.601's."""
_QUANTIZATION_FULL = 1


def colour(colorspace: int, ycbcr_enc: int, quantization: int) -> tuple[Matrix, Range]:
    """Matrix and range of YUV, with the kernel's defaults (V4L2_MAP_YCBCR_ENC_DEFAULT, V4L2_MAP_QUANTIZATION_DEFAULT)."""
    by_space = (_COLORSPACE_REC709, _COLORSPACE_DCI_P3, _COLORSPACE_BT2020, _COLORSPACE_SMPTE240M)
    bt709 = ycbcr_enc in _YCBCR_709 if ycbcr_enc else colorspace in by_space
    full = quantization == _QUANTIZATION_FULL if quantization else colorspace == _COLORSPACE_JPEG
    return ("bt709" if bt709 else "bt601"), ("full" if full else "limited")
