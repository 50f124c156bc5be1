"""`usb:` on a real driver through GStreamer: the driver's own buffers, timestamps and counters; unplugging."""

from __future__ import annotations

import itertools
import os
import time

import numpy as np
import pytest

from edgekit.errors import UsageError
from edgekit.kernels.letterbox import plan
from edgekit.runtime.faults import SourceLost
from edgekit.runtime.sources import open_source
from edgekit.tasks.preprocess import ImagePreprocess
from tests import gst_tools
from tests.camera.conftest import MULTIPLANAR, USB, driver_mappings, mappings

SMALL = f"usb:{USB}?size=640x360&fps=30"


if "VM_OUT" in os.environ:  # before descriptors are counted: GLib keeps one of its own
    gst_tools.need("v4l2src", "jpegdec")
    open_source(SMALL).close()


def read(source):
    frame = source.read(30)
    assert frame is not None
    return frame


def drain(source):
    while True:
        read(source).release()


@pytest.mark.parametrize("format", ["yuyv", "uyvy", "nv12", "i420", "bgr", "grey"])
def test_the_kernel_reads_the_driver_s_buffer(format):
    spec = ImagePreprocess(160, 160)
    given = np.zeros((1, 3, 160, 160), np.float32)
    with open_source(f"{SMALL}&format={format}") as source:
        ranges, places = mappings(USB), set()
        assert ranges
        for _ in range(10):
            with read(source) as frame:
                assert frame.pixels.layout.format == format
                assert [hop.copied for hop in frame.hops] == [0] and frame.hops[0].by == "driver"
                fused = plan(spec, frame.pixels.layout)
                fused.run(frame.pixels, given)
                seen, written = fused.addresses(frame.pixels, given)
                assert all(any(at in r for r in ranges) for at in seen)
                assert written == given.__array_interface__["data"][0]
                assert given.any()
                places.add(seen)
        assert 1 < len(places) <= len(ranges)


def test_held_frames_are_the_driver_s_own():
    """More than `spare` of them: the driver is asked for more buffers, nothing is copied out of the way."""
    with open_source(SMALL) as source:
        assert source.spare == 4
        frames = [read(source) for _ in range(8)]
        ranges = mappings(USB)
        places = [frame.pixels.addresses[0] for frame in frames]
        assert len(set(places)) == 8 and all(any(at in r for r in ranges) for at in places)
        assert all(hop.copied == 0 for frame in frames for hop in frame.hops)
        for frame in frames:
            frame.release()


def test_two_planes_of_a_driver():
    with open_source(f"usb:{MULTIPLANAR}?size=640x360&fps=30&format=nv12") as source, read(source) as frame:
        assert all(any(at in r for r in driver_mappings()) for at in frame.pixels.addresses)


def test_the_driver_s_clock_and_counter():
    with open_source(SMALL) as source:
        assert source.live and source.size == (640, 360) and source.fps == pytest.approx(30)
        frames = []
        for _ in range(12):
            frame = read(source)
            frames.append((frame.seq, frame.pts_ns, frame.captured_ns))
            assert frame.clock == "monotonic"
            frame.release()
        time.sleep(1)
        with read(source) as frame:
            late = frame.seq
    for _, pts, got in frames:
        assert 0 <= got - pts < 5e9  # when it was taken lies before when we got it
    steps = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(frames)]
    assert np.median(steps) == pytest.approx(1e9 / 30, rel=0.3)
    assert late > frames[-1][0] + 5  # what we slept through was counted


def test_without_a_size_it_is_a_sensible_one():
    with open_source(f"usb:{USB}") as source:
        assert source.size == (1280, 720)


def test_what_the_camera_cannot_give():
    with pytest.raises(UsageError, match="no such size, rate or format"):
        open_source(f"usb:{USB}?size=123x77")


@pytest.mark.parametrize("decoded", [False, True])
def test_unplugged_and_plugged_in_again(vivid, decoded):
    """With a descriptor of the camera left open, by us or by GStreamer, it would not come back."""
    uri = f"gst:v4l2src device={USB} ! video/x-raw,width=640,height=360 ! jpegenc ! jpegdec ! videoconvert"
    uri = uri if decoded else SMALL
    camera = vivid(USB)
    for _ in range(2):
        with open_source(uri) as source:
            kept = read(source)
            copy = kept.pixels.planes[0].copy()
            camera.press("disconnect")
            with pytest.raises(SourceLost):
                drain(source)
        assert np.array_equal(kept.pixels.planes[0], copy)
        if not decoded:  # the buffer that is out is the driver's
            with pytest.raises(SourceLost):
                open_source(uri)
        kept.release()
        with open_source(uri) as source:
            read(source).release()
