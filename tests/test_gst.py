"""GStreamer for real: planes, strides, addresses, clocks, leases, errors, leaks. See gst_tools.need."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekit import kernels
from edgekit.errors import EdgekitError, UsageError
from edgekit.kernels.letterbox import plan
from edgekit.pixels import Format, Pixels
from edgekit.runtime.faults import SourceLost
from edgekit.runtime.frames import Frame
from edgekit.runtime.sources import Source, gst, gst_native, gst_pipelines, open_source
from edgekit.synth.formats import convert
from edgekit.tasks.preprocess import ImagePreprocess
from tests import gst_tools
from tests.helpers import ROOT

TEST = "gst:videotestsrc num-buffers={} ! video/x-raw,format={},width={},height={}"


@pytest.fixture(autouse=True)
def _gstreamer() -> None:
    gst_tools.need("videotestsrc", "appsink", "rawvideoparse")


def noise(format: Format, width: int, height: int) -> Pixels:
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    return convert(image, format)


def read(source: Source) -> Frame:
    frame = source.read(20)
    assert frame is not None
    return frame


def drain(source: Source) -> None:
    """Read to the end, or to what is raised."""
    while (frame := source.read(20)) is not None:
        frame.release()


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether something becomes true; the deadline only tells a hang."""
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


# --- pictures ---


@pytest.mark.parametrize(("theirs", "ours"), gst_pipelines.FORMATS.items())
@pytest.mark.parametrize("padding", [0, 40])
def test_planes_are_where_gstreamer_says(tmp_path: Path, theirs: str, ours: Format, padding: int) -> None:
    """Known bytes with padded rows and a gap between planes come out as the picture they were."""
    width, height = (34, 18) if ours != "grey" else (33, 17)
    pixels = noise(ours, width, height)
    data, offsets, strides = bytearray(), [], []
    for plane in pixels.planes:
        rows = plane.reshape(plane.shape[0], -1)
        # what GStreamer takes for unpadded: rows of whole 4 bytes
        strides.append(-(-rows.shape[1] // 4) * 4 + padding)
        offsets.append(len(data))
        wide = np.full((rows.shape[0], strides[-1]), 77, np.uint8)
        wide[:, : rows.shape[1]] = rows
        data += wide.tobytes() + b"\xee" * padding
    (tmp_path / "raw").write_bytes(data * 3)
    listed = {"plane-strides": strides, "plane-offsets": offsets}
    layout = " ".join(f"{k}=<{','.join(map(str, v))}>" for k, v in listed.items())
    uri = (
        f"gst:filesrc location={tmp_path}/raw ! rawvideoparse format={theirs.lower()} width={width} "
        f"height={height} frame-size={len(data)} framerate=25/1 {layout}"
    )
    with open_source(uri) as source:
        assert (source.live, source.fps, source.size) == (False, 25, (width, height))
        frames = list(source)
        assert [f.seq for f in frames] == [0, 1, 2]
        assert [f.pts_ns for f in frames] == [0, 40_000_000, 80_000_000]
        for frame in frames:
            assert frame.pixels.layout.format == ours and frame.clock == "media"
            assert [p.strides[0] for p in frame.pixels.planes] == strides
            for plane, expected in zip(frame.pixels.planes, pixels.planes, strict=True):
                assert np.array_equal(plane, expected)
            frame.release()


@pytest.mark.parametrize(
    ("colorimetry", "height", "expected"),
    [
        ("bt601", 64, ("bt601", "limited")),
        ("bt709", 64, ("bt709", "limited")),
        ("1:4:0:0", 64, ("bt601", "full")),  # JPEG
        ("1:3:5:1", 64, ("bt709", "full")),
        ("", 64, ("bt601", "limited")),
        ("", 720, ("bt709", "limited")),
    ],
)
def test_colours_come_from_the_caps(colorimetry: str, height: int, expected: tuple[str, str]) -> None:
    caps = f",colorimetry={colorimetry}" if colorimetry else ""
    with open_source(TEST.format(1, "NV12", 64, height) + caps) as source, read(source) as frame:
        assert (frame.pixels.layout.matrix, frame.pixels.layout.range) == expected


def test_the_picture_is_the_test_pattern() -> None:
    uri = "gst:videotestsrc num-buffers=1 pattern=red ! video/x-raw,format=BGR"
    with open_source(uri) as source, read(source) as frame:
        assert (frame.image == [0, 0, 255]).all()
        with pytest.raises(ValueError, match="read-only"):
            frame.image[0, 0] = 1  # other elements may hold the same buffer


# --- addresses: nothing is copied ---


def test_planes_lie_in_the_buffers_of_the_pool() -> None:
    """GstMapInfo of the buffer's memory, asked again apart from our mapping, holds every plane; and the pool's few
    buffers come round, where copies would come from everywhere."""
    core, _, _ = gst_tools.calls()
    seen = set()
    with open_source(TEST.format(100, "NV12", 640, 360)) as source:
        for frame in source:
            mapped = frame.lease._give_back.__self__  # type: ignore[union-attr, attr-defined]
            buffer = source._lib.gst_sample_get_buffer(mapped._sample)  # type: ignore[attr-defined]
            memory = source._lib.gst_buffer_peek_memory(buffer, 0)  # type: ignore[attr-defined]
            info = gst_native.MapInfo()
            assert core.gst_memory_map(memory, ctypes.byref(info), gst_native.MAP_READ)
            luma, chroma = frame.pixels.addresses
            assert luma == info.data and chroma == info.data + 640 * 360
            assert chroma + 640 * 180 <= info.data + info.size
            core.gst_memory_unmap(memory, ctypes.byref(info))
            seen.add(luma)
            assert [hop.copied for hop in frame.hops] == [0]
            assert frame.hops[0].written == 640 * 360 * 3 // 2 and "SystemMemory" in frame.hops[0].name
            frame.release()
    assert len(seen) <= 8


@pytest.mark.parametrize("format", ["YUY2", "NV12", "I420", "BGR"])
def test_the_fused_kernel_reads_the_pool_and_writes_the_input(format: str) -> None:
    """By the kernel's own report of what it was given."""
    spec = ImagePreprocess(160, 160)
    given = np.zeros((1, 3, 160, 160), np.float32)
    assert kernels.native() is not None, "the native kernels are not built"
    with open_source(TEST.format(20, format, 322, 242)) as source:
        seen = set()
        for frame in source:
            mapped = frame.lease._give_back.__self__  # type: ignore[union-attr, attr-defined]
            first, size = mapped._frame.map[0].data, mapped._frame.map[0].size
            fused = plan(spec, frame.pixels.layout)
            fused.run(frame.pixels, given)
            picture, written = fused.addresses(frame.pixels, given)
            assert all(first <= at < first + size for at in picture)
            assert written == given.__array_interface__["data"][0]
            seen.add(picture)
            frame.release()
    assert given.std() > 10 and len(seen) <= 8


def test_two_memories_are_not_merged() -> None:
    """NV12 with luma and chroma in buffers of their own, as multi-planar drivers give it."""
    pixels = noise("nv12", 32, 16)
    buffer, places = gst_tools.memories([p.tobytes() for p in pixels.planes])
    gst_tools.describe(buffer, "NV12", (32, 16), [0, 512], [32, 32])
    uri = "gst:appsrc name=in format=time caps=video/x-raw,format=NV12,width=32,height=16,framerate=25/1"
    with gst_tools.Pushed(uri, [buffer]) as source, read(source) as frame:
        assert list(frame.pixels.addresses) == places
        assert all(np.array_equal(a, b) for a, b in zip(frame.pixels.planes, pixels.planes, strict=True))
        assert sum(hop.copied for hop in frame.hops) == 0


def test_a_copy_that_gstreamer_makes_is_in_the_ledger() -> None:
    """The same without a GstVideoMeta: GStreamer puts the parts together, which we can only tell."""
    pixels = noise("nv12", 32, 16)
    buffer, places = gst_tools.memories([p.tobytes() for p in pixels.planes])
    uri = "gst:appsrc name=in format=time caps=video/x-raw,format=NV12,width=32,height=16,framerate=25/1"
    with gst_tools.Pushed(uri, [buffer]) as source, read(source) as frame:
        assert frame.pixels.addresses[0] not in places
        assert all(np.array_equal(a, b) for a, b in zip(frame.pixels.planes, pixels.planes, strict=True))
        assert frame.hops[-1].copied == pixels.layout.nbytes and frame.hops[-1].by == "CPU"


def test_other_memory_than_the_driver_s_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the driver's buffers should reach us and system memory does, an element copied."""
    camera = gst_pipelines.Pipeline("usb:0", "videotestsrc ! video/x-raw,format=BGR ! appsink", direct=True)
    monkeypatch.setattr(gst_pipelines, "pipeline", lambda uri, has: camera)
    with open_source("usb:0") as source, read(source) as frame:
        assert [hop.copied for hop in frame.hops] == [frame.pixels.layout.nbytes]


def test_padded_rows_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that pads its rows hands over its own buffers; without our answer to ALLOCATION it copies."""
    gst_tools.need("x264enc", "avdec_h264")
    uri = (
        "gst:videotestsrc num-buffers=3 ! video/x-raw,format=I420,width=130,height=66 ! "
        "x264enc tune=zerolatency ! avdec_h264"
    )
    with open_source(uri) as source, read(source) as frame:
        own = frame.pixels.planes[0]
        assert own.shape == (66, 130) and own.strides[0] > 132
        picture = own.copy()
    monkeypatch.setattr(gst_native.Library, "accept_padded_rows", lambda self, pad: None)
    with open_source(uri) as source, read(source) as frame:
        assert frame.pixels.planes[0].strides[0] == 132  # packed, which took a copy
        assert np.array_equal(frame.pixels.planes[0], picture)


def test_damaged_buffers_are_marked() -> None:
    buffer, _ = gst_tools.memories([noise("bgr", 32, 16).planes[0].tobytes()])
    uri = "gst:appsrc name=in format=time caps=video/x-raw,format=BGR,width=32,height=16,framerate=25/1"
    with gst_tools.Pushed(uri, [buffer], gst_native.CORRUPTED) as source, read(source) as frame:
        assert frame.corrupt


def test_a_short_buffer_is_lost_not_read() -> None:
    buffer, _ = gst_tools.memories([b"x" * 100])
    uri = "gst:appsrc name=in format=time caps=video/x-raw,format=BGR,width=32,height=16,framerate=25/1"
    with gst_tools.Pushed(uri, [buffer]) as source, pytest.raises(SourceLost, match="cannot be mapped"):
        source.read(20)


# --- leases ---


def test_a_leased_frame_stays_as_it_was() -> None:
    """While others pass, after the source is closed, and without a word when it is dropped."""
    uri = "gst:videotestsrc num-buffers=60 pattern=snow ! video/x-raw,format=GRAY8,width=64,height=64"
    source = open_source(uri)
    kept = [read(source) for _ in range(6)]
    before = [f.pixels.copy().planes[0] for f in kept]
    assert len({f.pixels.addresses for f in kept}) == 6
    for frame in source:
        frame.release()
    source.close()
    assert all(np.array_equal(f.pixels.planes[0], b) for f, b in zip(kept, before, strict=True))
    for frame in kept:
        frame.release()
        frame.release()


def test_a_dropped_frame_goes_back_when_nobody_sees_it() -> None:
    with open_source(TEST.format(-1, "GRAY8", 64, 64)) as source:
        image = read(source).pixels.planes[0]  # the frame is gone, its picture is not
        assert image.base is not None
        copy = image.copy()
        addresses = set()
        for _ in range(50):
            addresses |= set(read(source).pixels.addresses)
        assert image.__array_interface__["data"][0] not in addresses
        assert np.array_equal(image, copy)
        assert len(addresses) <= 8  # the pool did not grow by 50


def test_frames_may_be_released_by_another_thread() -> None:
    with open_source(TEST.format(50, "GRAY8", 64, 64)) as source:
        frames = [read(source) for _ in range(5)]
        thread = threading.Thread(target=lambda: [f.release() for f in frames])
        thread.start()
        thread.join(20)
        assert len(list(source)) == 45


# --- live ---


def test_a_live_pipeline_keeps_time() -> None:
    before = time.monotonic_ns()
    with open_source(
        "gst:videotestsrc is-live=true ! video/x-raw,format=GRAY8,width=64,height=64,framerate=100/1"
    ) as source:
        assert (source.live, source.fps, source.spare) == (True, 100, 4)
        frames = [read(source) for _ in range(10)]
    for frame in frames:
        assert frame.clock == "monotonic" and frame.taken_ns == frame.pts_ns
        assert before <= frame.pts_ns <= frame.captured_ns + 1_000_000
        frame.release()
    assert all(
        b.pts_ns - a.pts_ns == pytest.approx((b.seq - a.seq) * 1e7, abs=2)
        for a, b in itertools.pairwise(frames)
    )


@pytest.mark.parametrize("counter", [True, False])
def test_a_slow_reader_loses_frames(counter: bool) -> None:
    """By the source's own counter, or by the timestamps where an element hides it."""
    hide = "" if counter else " ! videoconvert ! video/x-raw,format=BGR ! jpegenc ! jpegdec"
    uri = f"gst:videotestsrc is-live=true ! video/x-raw,format=I420,width=64,height=64,framerate=200/1{hide}"
    with open_source(uri) as source:
        first = read(source)
        first.release()
        time.sleep(0.3)
        seqs = []
        for _ in range(4):
            with read(source) as frame:
                seqs.append((frame.seq, frame.captured_ns))
                last = frame
    assert seqs[-1][0] - first.seq >= 55  # 60 periods went by
    expected = (last.pts_ns - first.pts_ns) / 5e6
    assert seqs[-1][0] - first.seq == pytest.approx(expected, abs=1)


def test_waiting_ends() -> None:
    uri = "gst:videotestsrc is-live=true ! video/x-raw,format=GRAY8,width=64,height=64,framerate=1/1"
    with open_source(uri) as source:
        read(source).release()
        for timeout in (0.0, 0.02):
            with pytest.raises(TimeoutError, match="no frame within"):
                source.read(timeout)


def test_the_end_of_a_live_pipeline_is_an_end() -> None:
    with open_source(TEST.format(3, "GRAY8", 64, 64).replace("src ", "src is-live=true ")) as source:
        assert 1 <= len(list(source)) <= 3
        assert source.read(1) is None


def test_the_end_of_a_camera_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    camera = gst_pipelines.Pipeline("usb:0", "videotestsrc is-live=true num-buffers=2 ! appsink", camera=True)
    monkeypatch.setattr(gst_pipelines, "pipeline", lambda uri, has: camera)
    with open_source("usb:0") as source:
        with pytest.raises(SourceLost, match="usb:0: the stream ended"):
            drain(source)
        with pytest.raises(SourceLost):
            source.read(1)


# --- options and limits ---


def test_the_appsink_is_set_up_and_the_user_wins() -> None:
    core = ctypes.CDLL("libgobject-2.0.so.0")

    def bound(source: object) -> int:
        value = ctypes.c_uint()
        core.g_object_get(ctypes.c_void_p(source._sink), b"max-buffers", ctypes.byref(value), None)  # type: ignore[attr-defined]
        return value.value

    for text, expected in (("", 4), (" ! appsink", 4), (" ! appsink max-buffers=9 name=x", 9)):
        with open_source(TEST.format(5, "GRAY8", 64, 64) + text) as source:
            assert bound(source) == expected
            assert len(list(source)) == 5
    with open_source(TEST.format(5, "GRAY8", 64, 64).replace("src", "src is-live=true")) as source:
        assert bound(source) == 2


def test_a_file_waits_for_its_reader() -> None:
    with open_source(TEST.format(30, "GRAY8", 64, 64), limit=20) as source:
        time.sleep(0.1)
        frames = list(source)
    assert [f.seq for f in frames] == list(range(20))


def test_several_pipelines_at_once() -> None:
    sources = [open_source(TEST.format(20, f, 64, 64)) for f in ("NV12", "YUY2", "BGR")]
    for _ in range(20):
        for source in sources:
            read(source).release()
    for source in sources:
        assert source.read(5) is None
        source.close()


# --- errors ---


@pytest.mark.parametrize(
    ("uri", "kind", "says"),
    [
        ("gst:videotestsrc ! vidoconvert", UsageError, "no element vidoconvert"),
        ("gst:avdec_nope ! x ! appsink", UsageError, "avdec_nope, x. Run: apt install gstreamer1.0-libav"),
        ("gst:videotestsrc ! ! appsink", UsageError, "syntax error"),
        ("gst:videotestsrc ! fakesink", UsageError, "could not link"),
        ("gst:appsink", UsageError, "no pipeline"),
        ("gst:videotestsrc nonsense=1", UsageError, "no property"),
        ("gst:videotestsrc ! video/x-raw,format=Y42B", UsageError, "put 'videoconvert' before the appsink"),
        ("gst:filesrc location=/nope.mp4 ! decodebin", UsageError, 'No such file "/nope.mp4"'),
        ("gst:videotestsrc num-buffers=0", UsageError, "ends without a picture"),
        ("gst:audiotestsrc ! appsink", UsageError, "videoconvert"),
        ("gst:videotestsrc ! jpegenc ! appsink caps=image/jpeg", UsageError, "expected raw video"),
        ("usb:/dev/video99", SourceLost, "/dev/video99"),
        ("usb:/dev/null", UsageError, "/dev/null"),
        ("gst:v4l2src device=/dev/video99", SourceLost, "/dev/video99"),
        ("csi:0", UsageError, "nvidia-l4t-gstreamer"),
    ],
)
def test_what_cannot_be_opened_says_why(uri: str, kind: type[EdgekitError], says: str) -> None:
    gst_tools.need("v4l2src", "jpegenc", "audiotestsrc")
    with pytest.raises(kind) as caught:
        open_source(uri).close()
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert type(caught.value) is kind


def test_nvmm_is_refused_with_the_way_out() -> None:
    buffer, _ = gst_tools.memories([b"x" * 768])
    uri = (
        "gst:appsrc name=in format=time caps=video/x-raw(memory:NVMM),format=NV12,width=32,height=16,framerate=25/1"
        " ! appsink caps=video/x-raw(memory:NVMM)"
    )
    with pytest.raises(UsageError, match=r"NVMM.*nvvidconv ! video/x-raw,format=NV12"):
        gst_tools.Pushed(uri, [buffer])
    buffer, _ = gst_tools.memories([b"x" * 768])
    with pytest.raises(UsageError, match=r"NVMM.*nvvidconv ! video/x-raw,format=NV12"):
        gst_tools.Pushed(uri.partition(" ! ")[0], [buffer])


def test_an_error_comes_after_the_frames_before_it(tmp_path: Path) -> None:
    """A file that breaks off: what could be read is given, then the element that failed is named."""
    with open_source("gst:videotestsrc num-buffers=6 ! identity error-after=4") as source:
        frames = [read(source) for _ in range(3)]
        assert [f.seq for f in frames] == [0, 1, 2]
        with pytest.raises(EdgekitError, match="identity") as caught:
            source.read(20)
    assert not isinstance(caught.value, (UsageError, SourceLost))


def test_an_error_of_a_live_pipeline_is_a_loss() -> None:
    uri = "gst:videotestsrc is-live=true ! video/x-raw,framerate=100/1 ! identity error-after=5"
    with open_source(uri) as source, pytest.raises(SourceLost, match="identity"):
        drain(source)


def test_no_picture_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gst, "OPEN_S", 0.3)
    with pytest.raises(SourceLost, match=r"no picture within 0\.3 s"):
        open_source("gst:appsrc is-live=true caps=video/x-raw,format=BGR,width=8,height=8,framerate=1/1")


# --- nothing is left behind ---

CYCLES = """
import ctypes, gc, os, sys, time
from edgekit.errors import EdgekitError
from edgekit.runtime.sources import open_source
from edgekit.runtime.sources.gst_native import library

def counts():
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

def rss():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")

for i in range(200):
    live = "is-live=true" if i % 2 else ""
    source = open_source(f"gst:videotestsrc {live} ! video/x-raw,format=NV12,width=320,height=240,framerate=500/1")
    a, b = source.read(20), source.read(20)
    a.release()
    if i % 3 == 0:  # closed while a frame is out
        source.close()
        b.release()
    elif i % 3 == 1:
        b.release()
        source.close()
    del source, a, b  # or neither closed nor released
    for bad in ("nonsense", "video/x-raw,format=Y42B"):
        try:
            open_source("gst:videotestsrc ! " + bad)
        except EdgekitError:
            pass
    if i == 40:
        before, first = rss(), counts()
end = time.monotonic() + 20
while counts()[1] > first[1] + 2 and time.monotonic() < end:  # GLib keeps up to two idle ones
    time.sleep(0.05)
print(counts()[0] - first[0], counts()[1] - first[1], rss() - before)
if len(sys.argv) > 1:
    library().parse("videotestsrc ! appsink")  # a reference that nobody gives back
gc.collect()
ctypes.CDLL("libgstreamer-1.0.so.0").gst_deinit()
"""


@pytest.mark.parametrize("leak", [False, True])
def test_200_cycles_leave_nothing(tmp_path: Path, leak: bool) -> None:
    """By GStreamer's own tracer of living objects, descriptors, threads and memory; and the tracer does see a leak."""
    log = tmp_path / "log"
    tracer = {"GST_TRACERS": "leaks", "GST_DEBUG": "GST_TRACER:7", "GST_DEBUG_FILE": str(log)}
    done = subprocess.run(
        [sys.executable, "-c", CYCLES, *(["leak"] if leak else [])],
        env={**os.environ, **tracer, "GST_DEBUG_NO_COLOR": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    alive = re.findall(r":: object-alive, type-name=\(string\)(\w+)", log.read_text())
    assert ("GstPipeline" in alive) if leak else alive == []
    descriptors, threads, grown = map(int, done.stdout.split())
    assert descriptors == 0 and threads <= 2 and grown < 4 * 2**20


def test_the_interpreter_may_end_with_an_open_pipeline() -> None:
    code = (
        "from edgekit.runtime.sources import open_source\n"
        "source = open_source('gst:videotestsrc is-live=true')\n"
        "frame = source.read(20)\n"
        "print(frame.width)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "320", "")


def test_threads_end_with_the_source() -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    open_source(TEST.format(2, "BGR", 64, 64)).close()  # GLib keeps a pool of idle ones
    before = threads()
    for _ in range(20):
        source = open_source("gst:videotestsrc is-live=true ! queue ! videoconvert ! queue")
        read(source).release()
        source.close()
    gc.collect()
    assert eventually(lambda: threads() <= before + 2)
