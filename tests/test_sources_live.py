"""Live sources without a device: the synthetic camera, Python iterators, frames that are pushed."""

from __future__ import annotations

import itertools
import time

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.pixels import FORMATS, Format, Matrix, Pixels, Range
from edgekit.runtime.sources import open_source
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
