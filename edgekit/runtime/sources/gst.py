"""GStreamer pipelines, and by them CSI, USB and network cameras. Frames are views of the pipeline's own buffers."""

from __future__ import annotations

import ctypes
import re
import threading
import time
import weakref
from functools import partial
from typing import Any, get_args

import numpy as np

from edgekit.errors import EdgekitError, StreamError, UsageError
from edgekit.pixels import Format, Matrix, PixelLayout, Pixels, Range
from edgekit.runtime.faults import SourceLost
from edgekit.runtime.frames import Frame, Hop, Lease
from edgekit.runtime.sources import gst_native as native
from edgekit.runtime.sources import gst_pipelines as pipelines
from edgekit.runtime.sources.base import Source

OPEN_S = 10.0
"""How long a pipeline may take to give its first picture."""
_SLICE_NS = 100_000_000
"""Errors are looked for this often while waiting."""
_LIVE_QUEUE, _FILE_QUEUE = 2, 4
_OURS: dict[str, Format] = {
    theirs: f for theirs, ours in pipelines.FORMATS.items() for f in get_args(Format) if f == ours
}
_MATRICES: dict[int, Matrix] = {3: "bt709", 4: "bt601"}
_RANGES: dict[int, Range] = {1: "full", 2: "limited"}
_NOT_AUTHORIZED, _RESOURCE_SETTINGS = 15, 13
_MISSING_PLUGIN = 12  # of core errors
_WRONG_TYPE, _CODEC_NOT_FOUND = 5, 6  # of stream errors


class GstSource(Source):
    """A GStreamer pipeline that ends in an appsink.

    `gst:PIPELINE` as gst-launch-1.0 takes it; an appsink is added where there is none.
    `usb:0?size=1280x720&fps=30&format=mjpeg` or `usb:/dev/video0`: v4l2src; `format` one of `pixels.FORMATS` or
        `mjpeg`; what is left out, the camera chooses among what the kernels read.
    `rtsp://[USER:PASSWORD@]HOST/PATH[?latency=100&protocols=tcp|udp]`, `rtsps:`: rtspsrc and the decoder that is
        installed. latency: of the jitter buffer, ms. Other keys are the camera's. Passwords are never shown.
    `csi:0?size=1280x720&fps=30`: nvarguscamerasrc, converted to system memory by nvvidconv. Needs a Jetson.

    A frame's planes are the GstBuffer's memory, mapped for reading: strides and offsets from GstVideoMeta, the
    sample held by the lease. The ledger says which memory it was, and counts the copy where GStreamer had to make
    one. A live pipeline (one that gives nothing while paused) keeps the newest two pictures and drops older ones;
    others wait for the reader. `sync=false`: pictures come when they are there, not when they would be shown.

    Timestamps: live pipelines run on the system's monotonic clock; `pts_ns` = running time + base time, which
    for v4l2src is the driver's timestamp, for rtspsrc the arrival (smoothed by its jitter buffer). Others count
    from the start of the media. `seq` is the driver's own counter where the element passes it on (v4l2src,
    videotestsrc), else frames missing from the timestamps at the declared rate are counted.

    usb, csi and rtsp never end: their end is `SourceLost`, and so is every error of a live pipeline that may
    pass. Raises: UsageError for a pipeline that cannot work; MissingExtraError without GStreamer.
    """

    def __init__(self, uri: str, limit: int | None = None) -> None:
        lib = native.library()
        self._plan = pipelines.pipeline(uri, lib.has)
        super().__init__(self._plan.uri, limit)
        self.again = partial(GstSource, uri, limit)  # `self.uri` shows no password
        self._lib: Any = lib  # its functions are made from a table
        self._seq = -1
        self._last_pts_ns: int | None = None
        self._error: tuple[Any, ...] | None = None
        self._warning: tuple[Any, ...] | None = None
        self._caps: int | None = None
        self._hops: dict[tuple[int, bool], tuple[Hop, ...]] = {}
        pipeline, problem, missing = lib.parse(self._plan.launch)
        if pipeline is None:
            raise self._unparsed(problem, missing)
        self._held = _Held(lib)
        self._pipeline = self._held.object(pipeline)
        # also when the source is dropped without close(), and before the interpreter ends
        self._finalizer = weakref.finalize(self, self._held.let_go)
        try:
            self._prepare()
            self._start()
        except BaseException:
            self._finalizer()
            raise

    # --- opening ---

    def _unparsed(self, problem: str, missing: list[str]) -> UsageError:
        where = f"source {self.uri}: "
        if missing:
            names = ", ".join(dict.fromkeys(missing))
            return UsageError(f"{where}GStreamer has no element {names}. {pipelines.package_of(missing[0])}")
        return UsageError(f"{where}{self._plan.hide(problem)}. Try it with gst-launch-1.0")

    def _prepare(self) -> None:
        lib, pipeline = self._lib, self._pipeline
        sinks = lib.is_pipeline(pipeline) and [e for e, kind in lib.elements(pipeline) if kind == "appsink"]
        if not sinks:
            raise UsageError(f"source {self.uri}: no pipeline with an appsink. Give SOURCE ! ... ! appsink")
        self._sink = sinks[0]
        for element, name, value in self._plan.arguments:
            found = lib.gst_bin_get_by_name(pipeline, element.encode())
            lib.gst_util_set_object_arg(found, name.encode(), value.encode())
            lib.gst_object_unref(found)
        written = re.split(r"\bappsink\b", self._plan.launch)[-1]
        self._user_set = set(re.findall(r"\b(caps|sync|drop|max-buffers)\s*=", written))
        # without these it queues without bound and holds on to the last picture
        self._set_sink("enable-last-sample", "false")
        self._set_sink("emit-signals", "false")
        self._set_sink("sync", "false")
        self._set_sink("caps", pipelines.SINK_CAPS)
        self._set_sink("max-buffers", str(_FILE_QUEUE))
        self._bus = self._held.object(lib.gst_element_get_bus(pipeline))
        self._pad = self._held.object(lib.gst_element_get_static_pad(self._sink, b"sink"))
        lib.accept_padded_rows(self._pad)
        clock = self._held.object(lib.gst_system_clock_obtain())
        lib.gst_pipeline_use_clock(pipeline, clock)
        before, theirs, after = time.monotonic_ns(), lib.gst_clock_get_time(clock), time.monotonic_ns()
        # on Linux both are CLOCK_MONOTONIC
        self._clock_offset = 0 if before <= theirs <= after else (before + after) // 2 - theirs

    def _set_sink(self, name: str, value: str) -> None:
        if name not in self._user_set:
            self._lib.gst_util_set_object_arg(self._sink, name.encode(), value.encode())

    def _start(self) -> None:
        deadline_ns = time.monotonic_ns() + round(OPEN_S * 1e9)
        state = self._reach(native.PAUSED, deadline_ns)
        self.live = state == native.NO_PREROLL
        if self.live:
            self.spare = native.HELD - _LIVE_QUEUE
            self._set_sink("max-buffers", str(_LIVE_QUEUE))
            self._set_sink("drop", "true")
            self._reach(native.PLAYING, deadline_ns)
        else:
            self._lib.gst_element_set_state(self._pipeline, native.PLAYING)
        self._held.watch_pools(self._pipeline)
        caps = self._lib.gst_pad_get_current_caps(self._pad)
        if not caps or self._lib.gst_app_sink_is_eos(self._sink):
            if caps:
                self._lib.gst_mini_object_unref(caps)
            self._drain()
            if self._error:
                raise self._failure(opening=True)
            raise UsageError(f"source {self.uri}: ends without a picture. Try it with gst-launch-1.0")
        try:
            self._agree(caps)
        finally:
            self._lib.gst_mini_object_unref(caps)
        self.size = (self._layout.width, self._layout.height)
        if self._info.fps_n > 0 and self._info.fps_d > 0:
            self.fps = self._info.fps_n / self._info.fps_d

    def _reach(self, state: int, deadline_ns: int) -> int:
        """Change to `state` and wait until it is reached: with a picture in the appsink, unless paused and live."""
        lib = self._lib
        found = lib.gst_element_set_state(self._pipeline, state)
        while True:
            self._drain()
            if self._error or found == native.FAILURE:
                raise self._failure(opening=True)
            if found == native.SUCCESS or (found == native.NO_PREROLL and state == native.PAUSED):
                return int(found)
            if time.monotonic_ns() > deadline_ns:
                raise SourceLost(
                    f"source {self.uri}: no picture within {OPEN_S:g} s of opening. Check the camera and its address"
                )
            found = lib.gst_element_get_state(self._pipeline, None, None, _SLICE_NS)

    def _agree(self, caps: int) -> None:
        """Take over a format. Raises: UsageError for what cannot be read."""
        lib = self._lib
        info = native.VideoInfo()
        text = lib.take_text(lib.gst_caps_to_string(caps))
        if "memory:NVMM" in text:
            raise UsageError(
                f"source {self.uri}: frames lie in NVMM, which cannot be mapped. "
                f"Put '{pipelines.JETSON_COPY}' before the appsink"
            )
        known = lib.gst_video_info_from_caps(ctypes.byref(info), caps)
        name = lib.gst_video_format_to_string(info.finfo[0]).decode() if known else ""
        if name not in _OURS:
            raise UsageError(
                f"source {self.uri}: gives {text[:120]}, expected raw video of {', '.join(_OURS)}. "
                "Put 'videoconvert' or a decoder before the appsink"
            )
        default: Matrix = "bt709" if info.height > 576 else "bt601"
        self._layout = PixelLayout(
            _OURS[name],
            info.width,
            info.height,
            _MATRICES.get(info.matrix, default),
            _RANGES.get(info.range, "limited"),
        )
        self._info = info
        lib.gst_mini_object_ref(caps)  # or another might come to lie at its address
        if self._caps:
            lib.gst_mini_object_unref(self._caps)
        self._caps = self._held.caps = caps

    # --- reading ---

    def _read(self, timeout_s: float | None) -> Frame | None:
        lib = self._lib
        deadline_ns = None if timeout_s is None else time.monotonic_ns() + max(0, round(timeout_s * 1e9))
        while True:
            self._drain()
            left_ns = _SLICE_NS if deadline_ns is None else deadline_ns - time.monotonic_ns()
            # after an error what waits in the queue is still good
            wait_ns = 0 if self._error else min(max(left_ns, 0), _SLICE_NS)
            sample = lib.gst_app_sink_try_pull_sample(self._sink, wait_ns)
            if sample:
                return self._frame(sample)
            self._drain()
            if self._error:
                raise self._failure(opening=False)
            if lib.gst_app_sink_is_eos(self._sink):
                self._ended()
                return None
            if deadline_ns is not None and time.monotonic_ns() >= deadline_ns:
                raise TimeoutError(f"source {self.uri}: no frame within {timeout_s:g} s")

    def _frame(self, sample: int) -> Frame:
        """Takes over the sample, also when it fails."""
        lib, now_ns = self._lib, time.monotonic_ns()
        mapped = _Mapped(self._held, sample)
        caps = lib.gst_sample_get_caps(sample)
        if caps != self._caps:
            self._agree(caps)
        address = lib.gst_sample_get_buffer(sample)
        buffer = native.Buffer.from_address(address)
        if not mapped.map(address, self._info):
            raise SourceLost(f"source {self.uri}: a buffer cannot be mapped. Its memory may be the GPU's")
        planes = mapped.planes(self._layout, self.uri)
        running = lib.gst_segment_to_running_time(
            lib.gst_sample_get_segment(sample), native.FORMAT_TIME, buffer.pts
        )
        known = buffer.pts != native.NONE and running != native.NONE
        pts_ns = int(running) if known else 0
        self._count(buffer.offset, pts_ns if known else None)
        if known and self.live:
            pts_ns += lib.gst_element_get_base_time(self._pipeline) + self._clock_offset
        return Frame(
            Pixels(planes, self._layout),
            self._seq,
            pts_ns,
            now_ns,
            self.uri,
            clock="none" if not known else "monotonic" if self.live else "media",
            corrupt=bool(buffer.mini_object.flags & native.CORRUPTED),
            hops=self._ledger(address, bool(mapped.has_meta)),
            lease=Lease(mapped.release),
        )

    def _count(self, offset: int, pts_ns: int | None) -> None:
        """The next `seq`: a live source's gaps show in it."""
        step = 1
        if self.live and offset != native.NONE and self._seq < offset < self._seq + 2**31:
            step = offset - self._seq if self._seq >= 0 else 1 + offset
        elif self.live and self.fps and pts_ns is not None and self._last_pts_ns is not None:
            step = max(1, round((pts_ns - self._last_pts_ns) / 1e9 * self.fps))
        self._seq += step
        self._last_pts_ns = pts_ns

    def _ledger(self, buffer: int, has_meta: bool) -> tuple[Hop, ...]:
        """What is known of a buffer's way: the kind of its memory, and whether parts had to be put together."""
        lib = self._lib
        first = native.Memory.from_address(lib.gst_buffer_peek_memory(buffer, 0))
        merged = not has_meta and lib.gst_buffer_n_memory(buffer) > 1
        key = (int(first.allocator or 0), merged)
        hops = self._hops.get(key)
        if hops is None:
            kind = (
                (native.Allocator.from_address(first.allocator).mem_type or b"").decode() if key[0] else "?"
            )
            size = self._layout.nbytes
            device = "v4l2" in kind.lower() or "dmabuf" in kind.lower()
            if device:  # it wrote into its driver's buffer
                way = Hop(f"gstreamer {kind}", "driver")
            elif self._plan.direct:  # v4l2src copies when too few buffers are left to the driver
                way = Hop(f"gstreamer {kind}, by v4l2src", "CPU", copied=size)
            else:  # written by an element
                way = Hop(f"gstreamer {kind}", "CPU", written=size)
            hops = (*self._plan.hops, way)
            if merged:
                hops = (*hops, Hop("gstreamer merged memories", "CPU", copied=size))
            self._hops[key] = hops
        return hops

    def _ended(self) -> None:
        """The frames ended. Raises: SourceLost where only a loss ends them."""
        if self._plan.camera or (self.live and self._warning):
            reason = self._describe(self._warning) if self._warning else "the stream ended"
            raise SourceLost(f"source {self.uri}: {reason}. Check the camera and its connection")

    # --- errors ---

    def _drain(self, wait_ns: int = 0) -> None:
        """Empty the bus. The first error counts: those after it are its consequences."""
        while (found := self._lib.message(self._bus, 0 if self._error else wait_ns)) is not None:
            if found[0]:
                self._error = self._error or found
            elif found[3] == self._lib.gst_resource_error_quark():
                self._warning = found

    def _describe(self, found: tuple[Any, ...]) -> str:
        _, name, kind, _, _, text, details = found
        where = f"{kind} {name}" if kind and not name.startswith(kind) else name
        more = " ".join(details.partition("\n")[2].split())
        reason = text.rstrip(". ")
        if more and more.rstrip(". ") not in reason:
            reason += f" ({more.rstrip('. ')[:300]})"
        return str(self._plan.hide(" ".join(f"{where}: {reason}".split())))

    def _failure(self, opening: bool) -> EdgekitError:
        """The exception for the error on the bus. What opening again may mend is SourceLost."""
        if self._error is None:
            self._drain(_SLICE_NS)  # the state fails first, its reason follows
        lib, found = self._lib, self._error
        if found is None:
            return SourceLost(f"source {self.uri}: the pipeline stopped without a reason. Try gst-launch-1.0")
        _, _, kind, domain, code, _, details = found
        text = f"source {self.uri}: {self._describe(found)}"
        resource, stream = domain == lib.gst_resource_error_quark(), domain == lib.gst_stream_error_quark()
        if (domain == lib.gst_core_error_quark() and code == _MISSING_PLUGIN) or (
            stream and code in (_CODEC_NOT_FOUND, _WRONG_TYPE)
        ):
            step = "gstreamer1.0-libav has most decoders" if "H.26" in details else "Install its plug-in"
            return UsageError(f"{text}. {step}")
        if "not-negotiated" in details or "not negotiated" in details:
            if not self._plan.camera:
                return UsageError(f"{text}. {self._format_advice()}")
            if opening:
                return UsageError(f"{text}. The camera has no such size, rate or format")
        if resource and code == _NOT_AUTHORIZED:
            return UsageError(f"{text}. Give rtsp://USER:PASSWORD@HOST/PATH")
        if resource and code == _RESOURCE_SETTINGS and opening:
            return UsageError(f"{text}. Check the device, and the size, rate and format asked for")
        files = kind.endswith("filesrc") or kind in ("filesink", "pngdec", "uridecodebin")
        if self._plan.camera or self.live or (resource and not files):
            return SourceLost(f"{text}. Check the camera and its connection")
        return (UsageError if opening else StreamError)(f"{text}. Try it with gst-launch-1.0")

    def _format_advice(self) -> str:
        if "NVMM" in self._plan.launch:
            return f"Frames in NVMM cannot be mapped: put '{pipelines.JETSON_COPY}' before the appsink"
        return "The formats do not fit: put 'videoconvert' before the appsink, or ask for one that both sides have"

    def close(self) -> None:
        if not self._closed:
            super().close()
            self._finalizer()


class _Held:
    """References of a source that are given back together; apart from it, so that it can be collected."""

    def __init__(self, lib: Any) -> None:
        self.lib = lib
        self.caps: int | None = None
        self.leases: weakref.WeakSet[_Mapped] = weakref.WeakSet()
        self._objects: list[int] = []
        self._pools: list[int] = []

    def object(self, address: int) -> int:
        self._objects.append(address)
        return address

    def watch_pools(self, pipeline: int) -> None:
        """Keep the driver's buffers of v4l2src in sight.

        Up to 1.24 at least it loses a reference to them each time it is stopped, and with it the descriptor of
        /dev/video0. While one is open an unplugged camera comes back under another name.
        """
        for element, kind in self.lib.elements(pipeline):
            pool = self.lib.gst_base_src_get_buffer_pool(element) if kind == "v4l2src" else None
            if pool:
                self._pools.append(pool)

    def let_go(self) -> None:
        """Stop the pipeline, which is the first of the objects, and wait for its threads."""
        lib = self.lib
        lib.gst_element_set_state(self._objects[0], native.NULL)
        for address in reversed(self._objects):
            lib.gst_object_unref(address)
        if self.caps:
            lib.gst_mini_object_unref(self.caps)
        for pool in self._pools:
            # ours, and one of each buffer that is out: whatever else is left belongs to nobody
            buffers = sum(lease.pool() == pool for lease in list(self.leases))
            for _ in range(max(1, lib.references(pool) - buffers)):
                lib.gst_object_unref(pool)
        self._objects, self._pools, self.caps = [], [], None


class _Mapped:
    """A sample and the mapping of its buffer; ends both once, at the latest when nobody sees the planes."""

    __slots__ = ("__weakref__", "_frame", "_lib", "_lock", "_mapped", "_sample")

    def __init__(self, held: _Held, sample: int) -> None:
        self._lib = held.lib
        self._sample: int | None = sample
        self._lock = threading.Lock()
        self._frame = native.VideoFrame()
        self._mapped = False
        held.leases.add(self)

    def map(self, buffer: int, info: native.VideoInfo) -> bool:
        self._mapped = bool(
            self._lib.gst_video_frame_map(
                ctypes.byref(self._frame), ctypes.byref(info), buffer, native.MAP_READ
            )
        )
        return self._mapped

    @property
    def has_meta(self) -> bool:
        """Whether the buffer says itself where its planes lie."""
        return bool(self._frame.meta)

    def planes(self, layout: PixelLayout, uri: str) -> tuple[np.ndarray, ...]:
        """Views of the mapped memory, read-only: other elements may hold the same buffer."""
        planes = []
        for i, shape in enumerate(layout.plane_shapes):
            stride = self._frame.info.stride[i]
            row = shape[1] * (shape[2] if len(shape) == 3 else 1)
            if stride < row:
                raise StreamError(
                    f"source {uri}: rows of plane {i} are {stride} bytes apart, expected at least {row}. "
                    "Put 'videoconvert' before the appsink"
                )
            span = stride * (shape[0] - 1) + row
            memory = (ctypes.c_uint8 * span).from_address(self._frame.data[i])
            memory.owner = self  # lives as long as any view of it
            inner = (stride, shape[2], 1) if len(shape) == 3 else (stride, 1)
            plane = np.ndarray(shape, np.uint8, buffer=memory, strides=inner)
            plane.flags.writeable = False
            planes.append(plane)
        return tuple(planes)

    def pool(self) -> int | None:
        """That its buffer belongs to, while it holds it."""
        with self._lock:
            if self._sample is None:
                return None
            pool: int | None = native.Buffer.from_address(self._lib.gst_sample_get_buffer(self._sample)).pool
            return pool

    def release(self) -> None:
        with self._lock:
            sample, self._sample = self._sample, None
            if sample is not None:
                if self._mapped:
                    self._lib.gst_video_frame_unmap(ctypes.byref(self._frame))
                self._lib.gst_mini_object_unref(sample)

    __del__ = release
