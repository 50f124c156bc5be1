"""Live sources without a device: the synthetic camera, Python iterators, frames that are pushed."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.pixels import FORMATS, Format, Matrix, Pixels, Range
from edgekit.runtime.frames import Frame, Lease
from edgekit.runtime.sources import open_source
from edgekit.runtime.sources.iterator import IteratorSource, PushSource, since_boot
from edgekit.synth.formats import convert
from edgekit.synth.street import StreetWorld

SMALL = "synthetic://street?seed=3&size=64x64"


def smooth(height: int = 64, width: int = 96) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)]
    return np.stack(channels, -1).astype(np.uint8)


# --- formats ---


@pytest.mark.parametrize(
    ("format", "code"),
    [
        ("yuyv", cv2.COLOR_YUV2BGR_YUYV),
        ("uyvy", cv2.COLOR_YUV2BGR_UYVY),
        ("nv12", cv2.COLOR_YUV2BGR_NV12),
        ("nv21", cv2.COLOR_YUV2BGR_NV21),
        ("i420", cv2.COLOR_YUV2BGR_I420),
    ],
)
def test_opencv_reads_our_yuv(format: Format, code: int) -> None:
    image = smooth()
    pixels = convert(image, format)
    packed = format in ("yuyv", "uyvy")
    flat = pixels.planes[0] if packed else np.concatenate([p.reshape(-1) for p in pixels.planes])
    back = cv2.cvtColor(flat if packed else flat.reshape(96, 96), code)
    assert np.abs(back.astype(int) - image).max() <= 6  # neighbours share their chroma
    assert np.abs(back.astype(int) - image).mean() < 1.2


@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
@pytest.mark.parametrize("range", ["limited", "full"])
def test_colours_of_the_standards(matrix: Matrix, range: Range) -> None:
    """Grey has no chroma; primaries lie where BT.601/709 put them."""
    low, high, swing = (16, 235, 112) if range == "limited" else (0, 255, 127)
    for level, luma in ((0, low), (255, high)):
        planes = convert(np.full((2, 2, 3), level, np.uint8), "i420", matrix, range).planes
        assert planes[0][0, 0] == luma and planes[1][0, 0] == planes[2][0, 0] == 128
    blue = convert(np.full((2, 2, 3), (255, 0, 0), np.uint8), "i420", matrix, range).planes
    weight = {"bt601": 0.114, "bt709": 0.0722}[matrix]
    assert abs(int(blue[0][0, 0]) - (low + weight * (high - low))) <= 0.5
    assert blue[1][0, 0] - 128 == swing or (range == "full" and blue[1][0, 0] == 255)


@given(width=st.integers(1, 9), height=st.integers(1, 9), format=st.sampled_from(FORMATS))
@settings(max_examples=60, deadline=None)
def test_every_format_has_its_shape(width: int, height: int, format: Format) -> None:
    image = np.random.default_rng(width * 10 + height).integers(0, 256, (height, width, 3), np.uint8)
    if format in ("yuyv", "uyvy") and width % 2:
        with pytest.raises(UsageError, match="even width"):
            convert(image, format)
        return
    pixels = convert(image, format)
    assert tuple(p.shape for p in pixels.planes) == pixels.layout.plane_shapes
    assert all(p.dtype == np.uint8 and p.flags.c_contiguous for p in pixels.planes)
    if format in ("rgb", "rgba"):
        assert np.array_equal(pixels.planes[0][:, :, 2::-1], image)


# --- the synthetic camera ---


def test_a_loop_repeats_its_frames_without_work() -> None:
    with open_source(SMALL + "&frames=7&loop=3") as source:
        frames = list(source)
    assert [f.seq for f in frames] == list(range(7))
    places = [f.pixels.addresses for f in frames]
    assert len(set(places)) == 3 and places[:3] == places[3:6]
    world = StreetWorld(3, 64, 64)
    for i, frame in enumerate(frames):
        assert np.array_equal(frame.image, world.frame(i % 3).image)
        assert frame.pts_ns == round(i * 1e9 / 30) and frame.clock == "media"
    with pytest.raises(ValueError, match="read-only"):
        frames[0].image[0, 0] = 1


@pytest.mark.parametrize("format", FORMATS)
def test_the_camera_gives_any_format(format: Format) -> None:
    with open_source(f"{SMALL}&frames=1&format={format}") as source:
        (frame,) = source
    expected: Pixels = convert(StreetWorld(3, 64, 64).frame(0).image, format)
    assert frame.pixels.layout == expected.layout
    assert all(np.array_equal(a, b) for a, b in zip(frame.pixels.planes, expected.planes, strict=True))


def test_no_end() -> None:
    for uri in (SMALL + "&frames=0&loop=2", SMALL + "&frames=0&live=1&fps=1000"):
        with open_source(uri) as source:
            assert source.frames is None
            assert len(list(itertools.islice(source, 400))) == 400
    assert len(list(open_source(SMALL + "&frames=0&loop=2", limit=5))) == 5


def test_a_live_camera_keeps_time() -> None:
    before = time.monotonic_ns()
    with open_source(SMALL + "&frames=20&loop=2&live=1&fps=200") as source:
        assert (source.live, source.fps, source.frames) == (True, 200, 20)
        frames = list(source)
    for frame in frames:
        assert frame.clock == "monotonic"
        assert frame.captured_ns >= frame.pts_ns > before  # never before it was taken
        assert frame.taken_ns == frame.pts_ns
        assert frame.pts_ns - frames[0].pts_ns == pytest.approx((frame.seq - frames[0].seq) * 5e6, abs=2)
    assert frames[-1].seq == 19
    assert frames[-1].captured_ns - frames[0].pts_ns >= (19 - frames[0].seq) * 5e6 - 2


def test_a_slow_reader_loses_frames() -> None:
    with open_source(SMALL + "&frames=1000&loop=2&live=1&fps=500") as source:
        first = source.read()
        time.sleep(0.1)
        second = source.read()
        third = source.read()
    assert first is not None and second is not None and third is not None
    assert second.seq - first.seq >= 45  # 50 periods went by
    assert second.captured_ns - second.pts_ns >= 0
    assert third.seq > second.seq


def test_the_last_frame_waits_for_its_reader() -> None:
    with open_source(SMALL + "&frames=5&loop=2&live=1&fps=1000") as source:
        time.sleep(0.05)
        assert [f.seq for f in source] == [4]
        assert source.read(0.01) is None


def test_a_live_camera_times_out() -> None:
    with open_source(SMALL + "&frames=3&live=1&fps=5") as source:
        first = source.read(5)
        assert first is not None
        for _ in range(3):
            with pytest.raises(TimeoutError, match=r"no frame within 0\.001 s"):
                source.read(0.001)
        frame = source.read(5)
        assert frame is not None and frame.seq >= 1
        assert np.array_equal(frame.image, StreetWorld(3, 64, 64).frame(frame.seq).image)
    assert source.read(0.001) is None


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("&live=2", "live out of range"),
        ("&loop=4000", "loop out of range"),
        ("&loop=-1", "loop out of range"),
        ("&format=yuv", "Did you mean"),
        ("&format=yuy2", "Did you mean 'yuyv'"),
        ("&frames=0", "frames out of range"),
        ("&frames=0&live=0", "frames out of range"),
    ],
)
def test_the_new_keys_are_checked(query: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        open_source(SMALL + query)
    assert "\n" not in str(caught.value)


def test_sizes_that_cannot_be_kept() -> None:
    with pytest.raises(UsageError, match="even width"):
        open_source("synthetic://street?size=65x64&format=yuyv")
    with pytest.raises(UsageError, match="loop=1000 takes 2636 MiB, expected at most 1024 MiB"):
        open_source("synthetic://street?size=1280x720&loop=1000")


# --- iterators ---


def test_an_iterator_of_arrays() -> None:
    images = [smooth() + np.uint8(i) for i in range(4)]
    with IteratorSource(images, "mine", fps=20) as source:
        assert (source.uri, source.live, source.fps, source.frames) == ("mine", False, 20, 4)
        frames = list(source)
        assert source.read() is None
    assert [f.seq for f in frames] == [0, 1, 2, 3]
    assert [f.pts_ns for f in frames] == [0, 50_000_000, 100_000_000, 150_000_000]
    for frame, image in zip(frames, images, strict=True):
        assert frame.image is frame.pixels.planes[0]
        assert frame.pixels.addresses == (image.__array_interface__["data"][0],)  # nothing was copied
        assert frame.hops == () and frame.source == "mine" and frame.clock == "media"


def test_what_an_iterator_may_give() -> None:
    released: list[int] = []
    own = Frame(Pixels.bgr(smooth()), 70, 5, 0, "theirs", lease=Lease(lambda: released.append(1)))
    pixels = convert(smooth(), "nv12")
    items: list[Any] = [pixels, own, (smooth(), 123), (pixels, np.int64(7)), smooth()[:, ::-1]]
    a, b, c, d, e = IteratorSource(items, live=True)
    assert a.pixels is pixels and (a.clock, a.pts_ns) == ("none", 0)
    assert b is own and b.seq == 70
    b.release()
    assert released == [1]
    assert (c.pts_ns, c.clock, c.taken_ns) == (123, "monotonic", 123)
    assert (d.pts_ns, d.pixels) == (7, pixels)
    assert e.hops[0].copied == smooth().nbytes  # mirrored: had to be laid out anew


@pytest.mark.parametrize("format", FORMATS)
def test_arrays_of_every_format(format: Format) -> None:
    pixels = convert(smooth(), format)
    array = pixels.planes[0]
    if len(pixels.planes) > 1:
        array = np.concatenate([p.reshape(-1) for p in pixels.planes]).reshape(96, 96)
    (frame,) = IteratorSource([array], format=format)
    assert frame.pixels.layout == pixels.layout
    assert all(np.array_equal(x, y) for x, y in zip(frame.pixels.planes, pixels.planes, strict=True))
    assert frame.pixels.addresses[0] == array.__array_interface__["data"][0]


def test_a_generator_is_closed_and_its_errors_pass() -> None:
    closed: list[bool] = []

    def pictures(fail: bool) -> Iterator[np.ndarray]:
        try:
            yield smooth()
            if fail:
                raise OSError("the arm fell off")
            yield smooth()
        finally:
            closed.append(True)

    with IteratorSource(pictures(False)) as source:
        assert source.read() is not None and closed == []
    assert closed == [True] and source.read() is None
    source.close()
    with IteratorSource(pictures(True)) as source:
        assert source.read() is not None
        with pytest.raises(OSError, match="the arm fell off"):
            source.read()
        assert source.read() is None
    assert len(list(IteratorSource(itertools.repeat(smooth()), limit=3))) == 3


@pytest.mark.parametrize(
    ("items", "format", "says"),
    [
        ([5], "bgr", "item 0: int, expected a uint8 array"),
        ([smooth().astype(np.float32)], "bgr", "item 0: image: expected uint8"),
        ([smooth(), smooth()[:, :, 0]], "bgr", "item 1: image: expected uint8"),
        ([smooth()[:, :, 0]], "yuyv", r"expected uint8 \[height, width, 2\]"),
        ([smooth()], "nv12", r"expected uint8 \[height \* 3 / 2, width\]"),
        ([np.zeros((10, 8), np.uint8)], "nv12", "both sides even"),
        ([(smooth(), 1, 2)], "bgr", "a tuple of 3"),
        ([(smooth(), 1.5)], "bgr", "whole nanoseconds"),
        ([(smooth(), True)], "bgr", "whole nanoseconds"),
        ([None], "bgr", "NoneType"),
        (3, "bgr", "int cannot be iterated"),
        ([], "yuv", "unknown format 'yuv'"),
    ],
)
def test_wrong_items_are_named(items: Any, format: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        list(IteratorSource(items, "mine", format=format))
    assert "source mine" in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_rates_are_refused() -> None:
    for fps in (0, -1, float("nan"), 5000, "30"):
        with pytest.raises(UsageError, match="fps"):
            IteratorSource([], fps=fps)  # type: ignore[arg-type]


def test_wall_clock_stamps() -> None:
    now = time.monotonic_ns()
    assert abs(since_boot(time.time_ns()) - now) < 10**9
    assert since_boot(time.time_ns() - 10**12) < now - 9 * 10**11


# --- pushed frames ---


def test_only_the_newest_picture_waits() -> None:
    released: list[int] = []

    def leased(i: int) -> Frame:
        return Frame(Pixels.bgr(smooth()), i, i, 0, "x", lease=Lease(lambda: released.append(i)))

    source = PushSource("front")
    assert source.live and source.uri == "front"
    for i in range(5):
        assert source.push(smooth(), 1000 + i)
    frame = source.read(0)
    assert frame is not None
    assert (frame.seq, frame.pts_ns, frame.clock) == (4, 1004, "monotonic")
    assert source.overwritten == 4
    with pytest.raises(TimeoutError, match="front"):
        source.read(0.01)
    source.push(leased(1))
    source.push(leased(2))
    assert released == [1]
    source.close()
    assert released == [1, 2] and source.read() is None and not source.push(smooth())


def test_several_may_wait_and_the_end_comes_last() -> None:
    source = PushSource(maxlen=3)
    for _ in range(4):
        source.push(smooth())
    source.end()
    assert not source.push(smooth())
    assert [f.seq for f in source] == [1, 2, 3]
    assert source.overwritten == 1 and source.read() is None


def test_a_push_wakes_the_reader() -> None:
    source = PushSource()
    got: list[Frame | None] = []

    def reader() -> None:
        got.extend([source.read(20), source.read(20)])

    thread = threading.Thread(target=reader)
    thread.start()
    source.push(smooth(), 5)
    while not got and thread.is_alive() and source._waiting:
        time.sleep(0.001)
    source.end()
    thread.join(20)
    assert not thread.is_alive()
    assert got[0] is not None and got[0].pts_ns == 5 and got[1] is None


def test_many_threads_push() -> None:
    source = PushSource()
    threads = [threading.Thread(target=lambda: [source.push(smooth()) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    seen = []
    while any(t.is_alive() for t in threads) or source._waiting:
        try:
            frame = source.read(0.05)
        except TimeoutError:
            continue
        assert frame is not None
        seen.append(frame.seq)
    for thread in threads:
        thread.join()
    assert seen == sorted(set(seen)) and seen[-1] == 799
    assert len(seen) + source.overwritten == 800


def test_wrong_pushes_are_the_pushers_error() -> None:
    source = PushSource("front")
    with pytest.raises(UsageError, match="front, item 0"):
        source.push("picture")
    with pytest.raises(UsageError, match="timestamp of its own"):
        source.push(Frame(Pixels.bgr(smooth()), 0, 0, 0, "x"), 5)
    for wrong in (0, -1, 2.5):
        with pytest.raises(UsageError, match="maxlen"):
            PushSource(maxlen=wrong)  # type: ignore[arg-type]
