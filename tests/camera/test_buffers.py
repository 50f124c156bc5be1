"""No copy, no leak: frames are the driver's buffers, lent and given back."""

from __future__ import annotations

import mmap
import os
import threading

import numpy as np
import pytest

from edgekit.errors import UsageError
from edgekit.runtime.sources import open_source
from edgekit.runtime.sources.v4l2 import V4l2Source
from edgekit.runtime.sources.v4l2_buffers import pages
from tests.camera.conftest import BOARD, USB, driver_mappings, mappings, open_files

SMALL = "size=320x180&format=yuyv"


def inside(frame, ranges: list[range]) -> bool:
    """Whether every plane, first byte to last, lies in one of those mappings."""
    ends = [
        (at, at + p.strides[0] * (p.shape[0] - 1) + p.shape[1] * int(np.prod(p.shape[2:])) - 1)
        for at, p in zip(frame.pixels.addresses, frame.pixels.planes, strict=True)
    ]
    return all(any(first in r and last in r for r in ranges) for first, last in ends)


@pytest.mark.parametrize("format", ["yuyv", "nv12", "i420", "bgr"])
@pytest.mark.parametrize(("io", "name"), [("mmap", "/dev/video0"), ("dmabuf", "/dmabuf")])
def test_pixels_are_the_driver_s_mapping(io, name, format):
    with open_source(f"v4l2:{USB}?size=320x180&format={format}&io={io}") as source:
        seen = set()
        for _ in range(12):
            with source.read(10) as frame:
                assert inside(frame, mappings(name))
                assert sum(hop.copied for hop in frame.hops) == 0
                seen.add(frame.pixels.addresses[0])
        assert 2 <= len(seen) <= source._pool.count == len(mappings(name))


def test_userptr_is_the_allocator_s_memory():
    blocks = []

    def allocate(nbytes: int) -> np.ndarray:
        blocks.append(pages(nbytes))
        return blocks[-1]

    with V4l2Source(f"v4l2:{USB}?{SMALL}&io=userptr", None, allocator=allocate) as source:
        ranges = [range(b.ctypes.data, b.ctypes.data + b.size) for b in blocks]
        for _ in range(8):
            with source.read(10) as frame:
                assert inside(frame, ranges)
                assert len(np.unique(frame.pixels.planes[0])) > 4
    assert driver_mappings() == []


def test_allocator_off_a_page_is_refused():
    with pytest.raises(UsageError, match="begins on a page"):
        V4l2Source(f"v4l2:{USB}?{SMALL}&io=userptr", None, allocator=lambda n: pages(n + 4096)[64 : n + 64])


def test_userptr_where_the_driver_has_none():
    with pytest.raises(UsageError, match=r"driver vivid has no io=userptr. Use io=mmap"):
        V4l2Source(f"v4l2:{BOARD}?{SMALL}&io=userptr", None)


@pytest.mark.parametrize("path", [USB, BOARD])
def test_exported_descriptors_are_the_same_memory(path):
    with V4l2Source(f"v4l2:{path}?{SMALL}&io=dmabuf", None) as source:
        frame = source.read(10)
        (fd,) = source.dmabuf_fds(frame)
        with mmap.mmap(fd, 320 * 180 * 2, mmap.MAP_SHARED, mmap.PROT_READ) as other:
            assert bytes(other) == frame.pixels.planes[0].tobytes()
        other_fds = set()
        for _ in range(8):
            with source.read(10) as more:
                other_fds.add(source.dmabuf_fds(more))
        assert (fd,) not in other_fds  # it is leased
        frame.release()
        with pytest.raises(UsageError, match="released"):
            source.dmabuf_fds(frame)
    with V4l2Source(f"v4l2:{path}?{SMALL}", None) as source:
        frame = source.read(10)
        with pytest.raises(UsageError, match="expected io=dmabuf"):
            source.dmabuf_fds(frame)
        frame.release()


def test_a_leased_buffer_is_not_written():
    with V4l2Source(f"v4l2:{USB}?{SMALL}&buffers=4", None) as source:
        kept = source.read(10)
        before = kept.pixels.copy()
        times = set()
        for _ in range(12):  # the picture shows a running clock: others change
            with source.read(10) as frame:
                assert frame.pixels.addresses != kept.pixels.addresses
                times.add(frame.pixels.planes[0].tobytes())
        assert len(times) > 1
        assert np.array_equal(before.planes[0], kept.pixels.planes[0])
        kept.release()


@pytest.mark.parametrize("io", ["mmap", "dmabuf", "userptr"])
def test_frames_cannot_be_drawn_into(io):
    with V4l2Source(f"v4l2:{USB}?{SMALL}&io={io}", None) as source:
        frame = source.read(10)
        with pytest.raises(ValueError, match="read-only"):
            frame.pixels.planes[0][0, 0, 0] = 1
        frame.release()


@pytest.mark.parametrize("timeout", [0.3, None])
def test_all_buffers_leased_times_out_and_goes_on(timeout):
    with V4l2Source(f"v4l2:{USB}?{SMALL}&buffers=4", None) as source:
        held = [source.read(10) for _ in range(4)]
        with pytest.raises(TimeoutError, match="readers hold all its 4 buffers"):
            source.read(timeout)
        held.pop().release()
        with source.read(10) as frame:
            assert frame.seq > 3  # the driver had nowhere to put what came meanwhile
        for frame in held:
            frame.release()


def test_spare_readers_never_starve_the_driver():
    with V4l2Source(f"v4l2:{USB}?{SMALL}", None) as source:
        held = [source.read(10) for _ in range(source.spare)]
        for _ in range(4):
            source.read(10).release()
        for frame in held:
            frame.release()


@pytest.mark.parametrize("io", ["mmap", "dmabuf", "userptr"])
def test_frames_stay_after_close_and_the_camera_is_free(io):
    source = V4l2Source(f"v4l2:{USB}?{SMALL}&io={io}", None)
    kept = source.read(10)
    before = kept.pixels.copy()
    source.close()
    source.close()
    assert source.read(1) is None
    with V4l2Source(f"v4l2:{USB}?size=640x360&format=rgb", None) as other:  # another format, while it is held
        other.read(10).release()
    assert np.array_equal(before.planes[0], kept.pixels.planes[0])
    if io == "dmabuf":
        assert len([f for f in open_files() if "dmabuf" in f]) >= 1
    kept.release()


def test_released_on_other_threads():
    with V4l2Source(f"v4l2:{USB}?{SMALL}", None) as source:
        sums, threads = [], []
        for _ in range(20):
            frame = source.read(10)
            handles = [frame.share() for _ in range(3)]
            frame.release()

            def read(handle):
                with handle:
                    sums.append(int(handle.pixels.planes[0].sum()))

            threads = [threading.Thread(target=read, args=(h,)) for h in handles]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(10)
        assert len(sums) == 60
        assert source._pool.leased == set()


def test_two_cameras_at_once():
    with V4l2Source(f"v4l2:{USB}?{SMALL}", None) as a, V4l2Source(f"v4l2:{BOARD}?{SMALL}", None) as b:
        for _ in range(5):
            with a.read(10) as left, b.read(10) as right:
                assert inside(left, mappings(USB))
                assert inside(right, mappings(BOARD))


def test_opening_and_closing_leaks_nothing():
    cycles = int(os.environ.get("EDGEKIT_CAMERA_CYCLES", "1000"))
    before = open_files()
    for i in range(cycles):
        io = ("mmap", "dmabuf", "userptr")[i % 3]
        with V4l2Source(f"v4l2:{USB}?{SMALL}&io={io}&buffers=3", None) as source:
            if i % 10 == 0:
                source.read(10).release()
    assert open_files() == before
    assert driver_mappings() == []
