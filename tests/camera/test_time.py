"""Timestamps and frame numbers as the driver gives them."""

from __future__ import annotations

import itertools
import time

import pytest

from edgekit.runtime.sources.v4l2 import V4l2Source
from tests.camera.conftest import USB

SMALL = f"v4l2:{USB}?size=320x180&format=yuyv"


def frames(source: V4l2Source, count: int) -> list:
    got = []
    for _ in range(count):
        with source.read(10) as frame:
            got.append(frame)
    return got


@pytest.mark.parametrize(("menu", "moment"), [("End of Frame", "end"), ("Start of Exposure", "start")])
def test_timestamps_are_this_machine_s_clock(vivid, menu, moment):
    vivid(USB).set("timestamp_source", menu)
    before = time.monotonic_ns()
    with V4l2Source(f"{SMALL}&fps=30", None) as source:
        got = frames(source, 10)
        frame_ns = 1e9 / source.fps
    assert {f.exposure for f in got} == {moment}
    assert {f.clock for f in got} == {"monotonic"}
    times = [f.pts_ns for f in got]
    assert times == sorted(set(times))
    assert times[0] > before
    for f in got:
        # vivid draws a picture when its exposure would begin: it may say that it ends one frame later
        assert f.pts_ns <= f.captured_ns + (frame_ns if moment == "end" else 0)
        assert f.captured_ns <= time.monotonic_ns()
    assert abs((times[-1] - times[0]) / (got[-1].seq - got[0].seq) - frame_ns) < 0.5 * frame_ns


def test_dropped_buffers_are_gaps(vivid):
    with V4l2Source(f"{SMALL}&fps=60", None) as source:
        frames(source, 2)
        vivid(USB).set("percentage_of_dropped_buffers", 60)
        got = [f.seq for f in frames(source, 12)]
        assert got == sorted(set(got))
        assert got[-1] - got[0] > 12


def test_frame_numbers_go_on_when_the_driver_s_wrap(vivid):
    vivid(USB).set("wrap_sequence_number", 1)
    with V4l2Source(f"{SMALL}&fps=60", None) as source:
        got, raw = [], []
        while len(got) < 600 and (not raw or raw[-1] > 2**31):
            with source.read(10) as frame:
                got.append(frame.seq)
                raw.append(source._sequence)
    assert raw[0] > 2**31 > raw[-1]
    assert got[0] == 0
    assert [b - a for a, b in itertools.pairwise(got)] == [
        (b - a) % 2**32 for a, b in itertools.pairwise(raw)
    ]


def test_the_first_frame_is_not_an_old_one():
    with V4l2Source(f"{SMALL}&fps=30&buffers=4", None) as source:
        time.sleep(2.0)  # an engine is loaded meanwhile: the driver has filled its buffers and waits
        first, second = frames(source, 2)
        assert first.seq == 0 < second.seq
        assert first.captured_ns - first.pts_ns < 1e9


def test_no_frame_in_time():
    with V4l2Source(f"v4l2:{USB}?size=3840x2160&format=nv12&fps=1&buffers=3", None) as source:
        source.read(20).release()
        source.read(20).release()
        with pytest.raises(TimeoutError, match="no frame within"):
            source.read(0.001)
