"""One open V4L2 capture device: what it is and offers, its picture format, its controls, its errors in words."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import select
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekit.errors import EdgekitError, StreamError, UsageError, did_you_mean, printable
from edgekit.pixels import Matrix, PixelLayout, Range
from edgekit.runtime.faults import SourceLost
from edgekit.runtime.sources import v4l2_abi as abi
from edgekit.runtime.sources.v4l2_modes import Mode, SizeRange

_GONE = (errno.ENODEV, errno.ENXIO, errno.ENOENT, errno.ESHUTDOWN)
_CPU_DRIVERS = ("uvcvideo", "vivid", "v4l2 loopback", "gspca", "em28xx")
"""Drivers whose pictures are put into the buffer by the kernel's CPU, from USB packets or by drawing."""


@dataclass(frozen=True)
class PictureFormat:
    """What the driver agreed to.

    strides, offsets: of each picture plane: bytes from row to row; where it begins in its memory.
    memory: which of the driver's memory planes each picture plane lies in.
    sizes: bytes of each memory plane.
    """

    code: int
    layout: PixelLayout
    strides: tuple[int, ...]
    offsets: tuple[int, ...]
    memory: tuple[int, ...]
    sizes: tuple[int, ...]

    def recoloured(self, matrix: Matrix | None, levels: Range | None) -> PictureFormat:
        """The same with colours as the user knows them, where the camera declares them wrongly."""
        layout = replace(self.layout, matrix=matrix or self.layout.matrix, range=levels or self.layout.range)
        return replace(self, layout=layout)


class Device:
    """An open `/dev/videoN` that captures.

    path: as given; `real` is the node it names. driver, card, bus: as the kernel reports them.
    Raises: SourceLost where it is not there or busy; UsageError without permission or where it is no camera.
    """

    def __init__(self, path: str) -> None:
        self.path = printable(path)
        self.real = os.path.realpath(path)
        self._file = None
        try:
            mode = os.stat(path).st_mode
            if not stat.S_ISCHR(mode):
                raise UsageError(f"camera {self.path}: not a device. Give a node such as /dev/video0")
            self._file = open(path, "r+b", buffering=0, opener=_opener)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise self.failure(error, "opening") from None
        self.fd = self._file.fileno()
        try:
            self._identify()
        except BaseException:
            self.close()
            raise

    def _identify(self) -> None:
        capability = abi.Capability()
        try:
            abi.ioctl(self.fd, abi.QUERYCAP, capability)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                raise UsageError(
                    f"camera {self.path}: not a video device. Give a node such as /dev/video0"
                ) from None
            raise self.failure(error, "asking what it is") from None
        self.driver = _text(capability.driver)
        self.card = _text(capability.card)
        self.bus = _text(capability.bus_info)
        can = capability.capabilities
        if can & abi.CAP_DEVICE_CAPS:  # of this node, not of the whole device
            can = capability.device_caps
        self.separate = not can & abi.CAP_VIDEO_CAPTURE
        self.type = abi.BUF_TYPE_VIDEO_CAPTURE_MPLANE if self.separate else abi.BUF_TYPE_VIDEO_CAPTURE
        if not can & (abi.CAP_VIDEO_CAPTURE | abi.CAP_VIDEO_CAPTURE_MPLANE):
            raise UsageError(
                f"camera {self.path}: {self.card} does not capture pictures through this node. "
                "`edgekit doctor` lists the cameras"
            )
        if not can & abi.CAP_STREAMING:
            raise UsageError(
                f"camera {self.path}: {self.card} has no streaming interface. Give another camera"
            )

    @property
    def filled_by(self) -> str:
        """Who writes a picture into the driver's buffer, for the copy ledger."""
        by_bus = self.bus.startswith(("platform:", "PCI:"))
        return "DMA" if by_bus and not self.driver.startswith(_CPU_DRIVERS) else "driver"

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def ioctl(self, request: int, argument: Any, doing: str) -> None:
        """Raises: SourceLost, StreamError, UsageError: see `explain`."""
        try:
            abi.ioctl(self.fd, request, argument)
        except OSError as error:
            raise self.failure(error, doing) from None

    def failure(self, error: OSError, doing: str) -> EdgekitError:
        return explain(self.path, error, doing)

    # ---- what it offers

    def _each(self, request: int, make: Any, doing: str) -> Iterator[Any]:
        """Every entry of one of the kernel's lists; none where the driver does not keep it."""
        for index in range(1024):
            entry = make()
            entry.index = index
            try:
                abi.ioctl(self.fd, request, entry)
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.ENOTTY, errno.ENODATA):
                    return
                raise self.failure(error, doing) from None
            yield entry

    def codes(self) -> list[tuple[int, str, bool]]:
        """(fourcc, description, compressed) of every format."""
        found = self._each(abi.ENUM_FMT, lambda: abi.FmtDesc(type=self.type), "listing its formats")
        return [(e.pixelformat, _text(e.description), bool(e.flags & abi.FMT_FLAG_COMPRESSED)) for e in found]

    def modes(self, size: tuple[int, int] | None = None, format: str | None = None) -> list[Mode]:
        """Every format at every size. Where sizes are free: at `size`, else at a usual one in their range.

        Rates are looked up only of what has that `size` and `format`, since some cameras list thousands;
        sizes only of formats that are readable or compressed.
        """
        modes = []
        for code, text, compressed in self.codes():
            known = abi.PIXEL_CODES.get(code)
            name = known.format if known else text if compressed else abi.fourcc_text(code)
            if not known and not compressed:
                modes.append(Mode(name, code, False, False, 0, 0))
                continue
            asked = format is None or format in (name, abi.fourcc_text(code))
            for found in self._sizes(code, size):
                width, height = found.nearest(size) if isinstance(found, SizeRange) else found
                rates: tuple[float, ...] = ()
                any_rate = False
                if asked and (size is None or size == (width, height)):
                    rates, any_rate = self._rates(code, width, height)
                modes.append(Mode(name, code, known is not None, compressed, width, height, rates, any_rate))
        return modes

    def _sizes(self, code: int, wish: tuple[int, int] | None) -> list[tuple[int, int] | SizeRange]:
        sizes: list[tuple[int, int] | SizeRange] = []
        for entry in self._each(
            abi.ENUM_FRAMESIZES, lambda: abi.FrameSize(pixel_format=code), "listing its picture sizes"
        ):
            if entry.type != abi.SIZE_DISCRETE:  # one entry says it all
                return [SizeRange(*entry.values)]
            sizes.append((entry.values[0], entry.values[1]))
        if not sizes:  # the driver keeps no list: what it has now, or makes of our wish
            form = self._current()
            if wish:
                form = self._try(abi.TRY_FMT, code, wish[0], wish[1], 0)
            picture = form.fmt.pix_mp if self.separate else form.fmt.pix
            sizes.append((picture.width, picture.height))
        return sizes

    def _rates(self, code: int, width: int, height: int) -> tuple[tuple[float, ...], bool]:
        """Frames per second, sorted; True where any rate between the two given ones will do."""
        rates = []
        for entry in self._each(
            abi.ENUM_FRAMEINTERVALS,
            lambda: abi.FrameInterval(pixel_format=code, width=width, height=height),
            "listing its frame rates",
        ):
            v = entry.values
            if entry.type != abi.SIZE_DISCRETE:
                return tuple(sorted(v[i + 1] / v[i] for i in (0, 2) if v[i] and v[i + 1])), True
            if v[0] and v[1]:
                rates.append(v[1] / v[0])
        return tuple(sorted(rates)), False

    # ---- setting it up

    def _current(self) -> abi.FormatOf:
        form = abi.FormatOf(type=self.type)
        self.ioctl(abi.G_FMT, form, "reading its format")
        return form

    def _try(self, request: int, code: int, width: int, height: int, stride: int) -> abi.FormatOf:
        form = abi.FormatOf(type=self.type)
        known = abi.PIXEL_CODES.get(code)
        if self.separate:
            mp = form.fmt.pix_mp
            mp.width, mp.height, mp.pixelformat, mp.field = width, height, code, abi.FIELD_NONE
            mp.num_planes = (
                len(PixelLayout(known.format, width, height).plane_shapes) if known and known.separate else 1
            )
            for i in range(mp.num_planes):
                chroma_half = known is not None and known.format == "i420" and i > 0
                mp.plane_fmt[i].bytesperline = stride // 2 if chroma_half else stride
        else:
            pix = form.fmt.pix
            pix.width, pix.height, pix.pixelformat, pix.field = width, height, code, abi.FIELD_NONE
            pix.bytesperline, pix.priv = stride, abi.PIX_FMT_PRIV_MAGIC
        self.ioctl(request, form, "setting its format")
        return form

    def set_format(self, mode: Mode, stride: int = 0) -> PictureFormat:
        """Make it deliver `mode`, rows `stride` bytes apart where it can (0: as it likes). Raises: UsageError, SourceLost."""
        form = self._try(abi.S_FMT, mode.code, mode.width, mode.height, stride)
        if self.separate:
            mp = form.fmt.pix_mp
            strides = tuple(p.bytesperline for p in mp.plane_fmt[: mp.num_planes])
            sizes = tuple(p.sizeimage for p in mp.plane_fmt[: mp.num_planes])
            got, colours = mp, (mp.colorspace, mp.ycbcr_enc, mp.quantization)
        else:
            pix = form.fmt.pix
            strides, sizes = (pix.bytesperline,), (pix.sizeimage,)
            got = pix
            extended = pix.priv == abi.PIX_FMT_PRIV_MAGIC  # else the driver left the newer fields alone
            colours = (pix.colorspace, pix.ycbcr_enc if extended else 0, pix.quantization if extended else 0)
        known = abi.PIXEL_CODES.get(got.pixelformat)
        if (
            known is None
            or got.pixelformat != mode.code
            or (got.width, got.height) != (mode.width, mode.height)
        ):
            raise UsageError(
                f"camera {self.path}: asked for {mode.width}x{mode.height} {mode.name}, got "
                f"{got.width}x{got.height} {abi.fourcc_text(got.pixelformat)}. Ask for another size or format"
            )
        if got.field not in abi.FRAME_FIELDS:
            raise UsageError(
                f"camera {self.path}: delivers single fields (field order {got.field}), expected whole frames. "
                f"Use usb:{self.path}, whose pipeline can deinterlace"
            )
        matrix, levels = abi.colour(*colours)
        layout = PixelLayout(known.format, got.width, got.height, matrix, levels)
        return lay_out(got.pixelformat, layout, strides, sizes)

    def set_rate(self, fps: float | None) -> float | None:
        """Ask for frames per second; returns what it agreed to, None where it has no rate."""
        parameters = abi.StreamParm(type=self.type)
        capture = parameters.parm.capture
        if fps:
            capture.numerator, capture.denominator = 1000, round(fps * 1000)
        try:
            abi.ioctl(self.fd, abi.S_PARM if fps else abi.G_PARM, parameters)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOTTY):
                return None
            raise self.failure(error, "setting its frame rate") from None
        if not capture.numerator or not capture.denominator:
            return None
        return float(capture.denominator / capture.numerator)

    # ---- controls

    def controls(self) -> dict[str, abi.QueryControl]:
        """Integer, boolean, menu and button controls by name (`Exposure, Auto` is `exposure_auto`)."""
        found: dict[str, abi.QueryControl] = {}
        query = abi.QueryControl(id=abi.CTRL_FLAG_NEXT_CTRL)
        for _ in range(1024):
            try:
                abi.ioctl(self.fd, abi.QUERYCTRL, query)
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.ENOTTY):
                    break
                raise self.failure(error, "listing its controls") from None
            kinds = (
                abi.CTRL_INTEGER,
                abi.CTRL_BOOLEAN,
                abi.CTRL_MENU,
                abi.CTRL_BUTTON,
                abi.CTRL_INTEGER_MENU,
                abi.CTRL_BITMASK,
            )
            if query.type in kinds and not query.flags & abi.CTRL_FLAG_DISABLED:
                name = re.sub(r"[^a-z0-9]+", "_", _text(query.name).lower()).strip("_")
                found[name] = query
            query = abi.QueryControl(id=query.id | abi.CTRL_FLAG_NEXT_CTRL)
        return found

    def set_control(self, name: str, value: int) -> None:
        """Raises: UsageError for an unknown name or a value out of range."""
        known = self.controls()
        if name not in known:
            raise UsageError(f"camera {self.path}: no control {name!r}. {did_you_mean(name, known)}")
        control = known[name]
        bounded = control.type not in (abi.CTRL_BUTTON, abi.CTRL_BITMASK)
        if bounded and not control.minimum <= value <= control.maximum:
            raise UsageError(
                f"camera {self.path}: control {name}: expected {control.minimum} to {control.maximum}, got {value}"
            )
        self.ioctl(abi.S_CTRL, abi.Control(id=control.id, value=value), f"setting its control {name}")

    def get_control(self, name: str) -> int:
        control = abi.Control(id=self.controls()[name].id)
        self.ioctl(abi.G_CTRL, control, f"reading its control {name}")
        return int(control.value)

    def spare_needed(self) -> int:
        """Buffers that the driver needs for itself."""
        control = abi.Control(id=abi.CID_MIN_BUFFERS_FOR_CAPTURE)
        try:
            abi.ioctl(self.fd, abi.G_CTRL, control)
        except OSError:  # most drivers do not say: one being filled, one to go on with
            return 2
        return max(2, int(control.value))

    # ---- events

    def watch_source(self) -> None:
        """Ask to be told when the signal at the input changes; drivers without that event are left alone."""
        try:
            abi.ioctl(self.fd, abi.SUBSCRIBE_EVENT, abi.EventSubscription(type=abi.EVENT_SOURCE_CHANGE))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTTY):
                raise self.failure(error, "asking for its events") from None

    def source_changed(self) -> bool:
        """True when the signal changed since the last call."""
        changed, event = False, abi.Event()
        while True:
            try:
                abi.ioctl(self.fd, abi.DQEVENT, event)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINVAL, errno.ENOTTY, errno.EAGAIN):  # no more
                    return changed
                raise self.failure(error, "reading its events") from None
            changed |= event.type == abi.EVENT_SOURCE_CHANGE

    def poll(self, seconds: float) -> int:
        """What `poll` reports within that time; 0 where nothing happened."""
        poller = select.poll()
        poller.register(self.fd, select.POLLIN | select.POLLPRI)
        events = poller.poll(max(0, seconds * 1000))
        return events[0][1] if events else 0


def explain(path: str, error: OSError, doing: str) -> EdgekitError:
    """An errno of the device at `path` in one line; SourceLost where opening it again may mend it."""
    real = os.path.realpath(path)
    number = error.errno or 0
    name = errno.errorcode.get(number, str(number))
    if number in _GONE:
        there = "" if os.path.exists(real) else f" {_others()}"
        what = "no such device" if doing == "opening" else f"unplugged, seen while {doing}"
        return SourceLost(f"camera {path}: {what} ({name}).{there or ' Plug it in again'}")
    if number == errno.EBUSY:
        return SourceLost(f"camera {path}: busy, {_holders(real)}. End that and try again")
    if number in (errno.EACCES, errno.EPERM):
        return UsageError(
            f"camera {path}: no permission ({name}). Add yourself to the group video: "
            "sudo usermod -aG video $USER, and log in again"
        )
    if number == errno.ENOSPC:
        return SourceLost(
            f"camera {path}: not enough USB bandwidth while {doing} ({name}). "
            "Ask for a smaller size or rate, or use another USB port"
        )
    if number == errno.ENOMEM:
        return StreamError(f"camera {path}: no memory for its buffers ({name}). Ask for fewer: buffers=4")
    what = "the driver reports a streaming error" if number in (errno.EIO, errno.EPIPE) else "failed"
    return SourceLost(f"camera {path}: {what} while {doing} ({name}). Open it again")


def lay_out(
    code: int, layout: PixelLayout, strides: tuple[int, ...], sizes: tuple[int, ...]
) -> PictureFormat:
    """Where the picture's planes lie in the driver's memory planes (kernel docs: "YUV Formats").

    strides, sizes: bytesperline and sizeimage of each memory plane. In one memory plane the planes follow
    each other, the rows of I420's chroma half as long as those of luma, NV12's equally long.
    """
    shapes = layout.plane_shapes
    if len(strides) == len(shapes):  # also the packed formats
        return PictureFormat(code, layout, strides, (0,) * len(shapes), tuple(range(len(shapes))), sizes)
    assert len(strides) == 1, (layout, strides)
    rows = (strides[0], *(strides[0] // (2 if layout.format == "i420" else 1) for _ in shapes[1:]))
    offsets = [0]
    for stride, shape in zip(rows[:-1], shapes[:-1], strict=True):
        offsets.append(offsets[-1] + stride * shape[0])
    return PictureFormat(code, layout, rows, tuple(offsets), (0,) * len(shapes), sizes)


def _text(raw: Any) -> str:
    return printable(bytes(raw).split(b"\0")[0].decode("utf-8", "replace").strip())


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _others() -> str:
    nodes = sorted(str(p) for p in Path("/dev").glob("video[0-9]*"))
    return "Here are: " + ", ".join(nodes) if nodes else "No camera is plugged in"


def _holders(node: str) -> str:
    """Which processes have the node open, as far as /proc tells us."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == node:
                pid = int(link.parts[2])
                found.add((pid, Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()))
        except OSError:  # ended meanwhile, or not ours to see
            continue
    others = [f"{printable(name)} (process {pid})" for pid, name in sorted(found) if pid != os.getpid()]
    if others:
        return "in use by " + ", ".join(others)
    return "in use elsewhere in this process" if found else "in use by a process of another user"


def buffer_for(device: Device, memory: int, index: int, planes: Any) -> abi.Buffer:
    """A v4l2_buffer to ask about; `planes` an array of abi.Plane where each plane has memory of its own."""
    buffer = abi.Buffer(index=index, type=device.type, memory=memory)
    if device.separate:
        buffer.m.planes = ctypes.cast(planes, ctypes.POINTER(abi.Plane))
        buffer.length = len(planes)
    return buffer
