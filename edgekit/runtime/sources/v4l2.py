"""Cameras of the Linux kernel, `v4l2:/dev/video0?size=1280x720`: frames are views of the driver's own buffers.

Standard library and numpy only. Follows the kernel's "Video for Linux API" (streaming I/O, single- and multi-planar).
"""

from __future__ import annotations

import ctypes
import re
import select
import time
import urllib.parse
from dataclasses import dataclass, field
from typing import Any, get_args

from edgekit.errors import UsageError, did_you_mean, printable
from edgekit.pixels import Matrix, PixelLayout, Range
from edgekit.runtime.faults import SourceLost
from edgekit.runtime.frames import Frame, Hop
from edgekit.runtime.sources import v4l2_abi as abi
from edgekit.runtime.sources.base import Source, split_uri
from edgekit.runtime.sources.v4l2_buffers import IO, Allocator, BufferLease, BufferPool, pages
from edgekit.runtime.sources.v4l2_cameras import Camera, find_again, identity, in_words, list_cameras
from edgekit.runtime.sources.v4l2_device import Device
from edgekit.runtime.sources.v4l2_modes import RATE_SLACK, choose

__all__ = ["Camera", "Options", "V4l2Source", "list_cameras", "parse_uri"]

BUFFERS = 6
"""Buffers asked for: two for the driver, four for readers."""
MAX_BUFFERS = 32
"""The kernel's own limit (VIDEO_MAX_FRAME)."""
KEYS = ("size", "format", "fps", "io", "buffers", "stride", "matrix", "range", "input")
SYNONYMS = {"yuy2": "yuyv", "yu12": "i420", "yuv420": "i420", "rgb3": "rgb", "rgb24": "rgb", "bgr3": "bgr"} | {
    "bgr24": "bgr", "gray": "grey", "y8": "grey", "bgrx": "bgra", "rgbx": "rgba",
}  # fmt: skip
_SLICE_S = 1.0
_TROUBLE = select.POLLERR | select.POLLHUP | select.POLLNVAL


@dataclass(frozen=True)
class Options:
    """What a `v4l2:` URI says. None: as the camera likes it."""

    path: str
    size: tuple[int, int] | None = None
    format: str | None = None
    fps: float | None = None
    io: str = "mmap"
    buffers: int = BUFFERS
    stride: int = 0
    matrix: Matrix | None = None
    range: Range | None = None
    input: int | None = None
    controls: dict[str, int] = field(default_factory=dict)


def parse_uri(uri: str) -> Options:
    """The options of `v4l2:PATH?size=1280x720&format=yuyv&fps=30&io=mmap|dmabuf|userptr&buffers=6`.

    PATH: `/dev/video0`, `0`, or a link such as `/dev/v4l/by-id/...`, which stays the same when devices
    are plugged in another order. `stride`: bytes from row to row, for an importer that wants rows aligned.
    `matrix` (bt601, bt709) and `range` (full, limited) correct a camera that declares its colours
    wrongly. `input`: connector of a grabber. `ctrl.NAME=VALUE` sets a control (ctrl.brightness=10).
    Raises: UsageError.
    """
    parts = split_uri(uri)
    path = urllib.parse.unquote(parts.netloc + parts.path)
    if path.isdigit():
        path = f"/dev/video{path}"
    if not path or parts.fragment or not path.isprintable():
        raise UsageError(
            f"source {printable(uri)}: no device, expected v4l2:/dev/video0 or v4l2:0. {in_words()}"
        )
    values: dict[str, Any] = {"controls": {}}
    for key, text in urllib.parse.parse_qsl(parts.query, keep_blank_values=True):
        if key.startswith("ctrl."):
            values["controls"][key.removeprefix("ctrl.")] = _whole(uri, key, text, -(2**31), 2**31 - 1)
        elif key in KEYS:
            values[key] = _value(uri, path, key, text)
        else:
            raise UsageError(
                f"source {printable(uri)}: unknown option {printable(key)!r}. {did_you_mean(key, (*KEYS, 'ctrl.NAME'))}"
            )
    return Options(path, **values)


def _value(uri: str, path: str, key: str, text: str) -> Any:
    if key == "size":
        size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
        if not size or "0" in size.groups():
            raise _wrong(uri, key, "WIDTHxHEIGHT such as 1280x720", text)
        return int(size[1]), int(size[2])
    if key == "fps":
        if not re.fullmatch(r"\d{1,4}(\.\d{1,6})?", text) or not 0 < float(text) <= 1000:
            raise _wrong(uri, key, "frames per second up to 1000", text)
        return float(text)
    if key == "format":
        known = {c.format for c in abi.PIXEL_CODES.values()}
        if text.upper() in {c.code for c in abi.PIXEL_CODES.values()} and text.lower() not in known:
            return text.upper()  # the kernel's own name: one of several codes with the same bytes
        name = SYNONYMS.get(text.lower(), text.lower())
        if name in ("mjpeg", "mjpg", "jpeg", "h264"):
            raise UsageError(
                f"source {printable(uri)}: {text} is compressed, expected pixels as they are. "
                f"Use usb:{path} (GStreamer), which decodes it"
            )
        if name not in known:
            raise UsageError(
                f"source {printable(uri)}: unknown format {printable(text)!r}. {did_you_mean(name, known)}"
            )
        return name
    words = {"io": tuple(IO), "matrix": get_args(Matrix), "range": get_args(Range)}.get(key)
    if words:
        if text not in words:
            raise _wrong(uri, key, " or ".join(words), text)
        return text
    if key == "buffers":
        return _whole(uri, key, text, 3, MAX_BUFFERS)
    return _whole(uri, key, text, 0, 2**20)


def _whole(uri: str, key: str, text: str, least: int, most: int) -> int:
    if not re.fullmatch(r"-?\d{1,10}", text) or not least <= int(text) <= most:
        raise _wrong(uri, key, f"a whole number from {least} to {most}", text)
    return int(text)


def _wrong(uri: str, key: str, expected: str, got: str) -> UsageError:
    return UsageError(f"source {printable(uri)}: {key}: expected {expected}, got {printable(got)!r}")


def passed(last: int, now: int) -> int:
    """Frames from one of the driver's counts to another: 32 bits that wrap; 1 where it does not count at all."""
    step = (now - last) & 0xFFFFFFFF
    return step if 0 < step < 2**31 else 1


class V4l2Source(Source):
    """Frames of a V4L2 camera; `parse_uri` tells the options.

    Streams from when it is opened; frames that came before the first `read` are passed over, since the
    driver stops when its buffers are full and they may be old by then. A frame's pixels are read-only views
    of the driver's buffer, which it gets back when the frame's last handle is released. A frame that was
    released and is looked at all the same shows a later picture, never memory that is gone. `clock` is
    `monotonic` where the driver stamps its buffers so.

    allocator: for io=userptr, gives the memory: bytes -> uint8 [bytes] that begins on a page (default: plain
        pages). On a Jetson: pinned memory, which the GPU sees without a copy.
    known: what `v4l2_cameras.identity` says of the camera, to find it where it got another number.
    layout, io: what was negotiated. device: name, driver and bus in words.
    Raises: UsageError for what is asked wrongly or not offered, SourceLost where the camera is gone or busy.
    """

    live = True

    def __init__(
        self,
        uri: str,
        limit: int | None,
        *,
        allocator: Allocator = pages,
        known: tuple[str, str, str] | None = None,
    ) -> None:
        super().__init__(uri, limit)
        options = parse_uri(uri)
        self.io = options.io
        device = Device(find_again(options.path, known) if known else options.path)
        try:
            if options.input is not None:
                device.ioctl(
                    abi.S_INPUT, ctypes.c_int32(options.input), f"selecting its input {options.input}"
                )
            mode = choose(
                device.modes(options.size, options.format),
                device.path,
                size=options.size,
                format=options.format,
                fps=options.fps,
            )
            form = device.set_format(mode, options.stride)
            self.fps = device.set_rate(mode.rate(options.fps))
            if options.fps and self.fps is not None and self.fps < options.fps * RATE_SLACK:
                raise UsageError(
                    f"camera {device.path}: agreed to {self.fps:g} frames per second, expected {options.fps:g}. "
                    "Ask for fewer, or a smaller size"
                )
            if options.matrix or options.range:
                form = form.recoloured(options.matrix, options.range)
            for name, value in options.controls.items():
                device.set_control(name, value)
            device.watch_source()
        except BaseException:
            device.close()
            raise
        self.layout: PixelLayout = form.layout
        self.size = (form.layout.width, form.layout.height)
        self.device = f"{device.card} ({device.driver}, {device.bus})"
        self._hops = (Hop("sensor -> driver buffer", device.filled_by, written=form.layout.nbytes),)
        own = device.spare_needed()
        self._pool = BufferPool(device, form, options.io, max(options.buffers, own + 1), allocator)
        self.spare = max(1, self._pool.count - own)
        self._device = device
        known = known or identity(device)
        self.again = lambda: V4l2Source(uri, limit, allocator=allocator, known=known)
        self._reading = False
        self._seq = -1
        self._sequence = 0
        self._expect(None)

    def _read(self, timeout_s: float | None) -> Frame | None:
        began = time.monotonic()
        if not self._reading:
            self._pass_over()
        while True:
            if self._pool.failed:
                raise SourceLost(self._pool.failed)
            left = _SLICE_S if timeout_s is None else began + timeout_s - time.monotonic()
            events = self._device.poll(left)
            if events:
                if events & select.POLLPRI and self._device.source_changed():
                    raise SourceLost(f"camera {self._device.path}: its signal changed. Open it again")
                taken = self._pool.take()
                if taken is not None:
                    return self._frame(*taken)
                if events & _TROUBLE:  # which reading a buffer did not explain
                    raise SourceLost(
                        f"camera {self._device.path}: the driver stopped streaming. Open it again"
                    )
            held = len(self._pool.leased)
            if held == self._pool.count and (timeout_s is None or time.monotonic() - began >= timeout_s):
                raise TimeoutError(
                    f"camera {self._device.path}: readers hold all its {held} buffers. Release frames"
                )
            if timeout_s is not None and time.monotonic() - began >= timeout_s:
                raise TimeoutError(f"camera {self._device.path}: no frame within {timeout_s:g} s")

    def _pass_over(self) -> None:
        """Give back what was filled before anyone read: the driver may have stopped there seconds ago."""
        for _ in range(self._pool.count):  # no more, or a camera faster than this loop would keep us here
            taken = self._pool.take()
            if taken is None:
                break
            self._pool.give_back(taken[0].index)
        self._reading = True

    def _frame(self, buffer: abi.Buffer, pixels: Any, whole: bool) -> Frame:
        captured = time.monotonic_ns()
        self._seq = self._seq + passed(self._sequence, buffer.sequence) if self._seq >= 0 else 0
        self._sequence = buffer.sequence
        stamped = buffer.flags & abi.BUF_FLAG_TIMESTAMP_MASK == abi.BUF_FLAG_TIMESTAMP_MONOTONIC
        start = buffer.flags & abi.BUF_FLAG_TSTAMP_SRC_MASK == abi.BUF_FLAG_TSTAMP_SRC_SOE
        return Frame(
            pixels=pixels,
            seq=self._seq,
            pts_ns=(buffer.timestamp.sec * 10**6 + buffer.timestamp.usec) * 1000 if stamped else 0,
            captured_ns=captured,
            source=self.uri,
            clock="monotonic" if stamped else "none",
            exposure=("start" if start else "end") if stamped else "unknown",
            corrupt=not whole,
            hops=self._hops,
            lease=self._pool.lease(buffer.index),
        )

    def dmabuf_fds(self, frame: Frame) -> tuple[int, ...]:
        """DMABUF descriptors of a leased frame's buffer, one for each memory plane (NV12M has two, else one).

        They belong to the source: importers duplicate them. `layout` and `frame.pixels` tell strides.
        Raises: UsageError unless io=dmabuf, and for a frame that is released or not of this source.
        """
        lease = frame.lease
        if self.io != "dmabuf":
            raise UsageError(
                f"source {self.uri}: buffers are not exported, expected io=dmabuf, got io={self.io}"
            )
        if not isinstance(lease, BufferLease) or lease.pool is not self._pool:
            raise UsageError(f"source {self.uri}: the frame is released or of another source")
        return self._pool.descriptors(lease.index)

    def close(self) -> None:
        super().close()
        self._pool.close()
