"""A camera in memory that treats its buffers as a V4L2 driver does: for soak runs, tests and trying out code."""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import time

import numpy as np

from edgekit.pixels import PixelLayout, Pixels
from edgekit.runtime.faults import SourceLost
from edgekit.runtime.frames import Frame, Hop, Lease
from edgekit.runtime.sources.base import Source

POISON = 0xA5
"""What a buffer is filled with when it is given back: whoever still reads it sees that."""
_SCENES = 16
STAMP = 8
"""Bytes at the start of a picture that hold its sequence number, little-endian."""


class PooledSource(Source):
    """Pictures in `buffers` mapped buffers, which go round: a buffer is filled again only after its release.

    layout: pictures of that layout, noise that differs from frame to frame, rows `padding` bytes apart.
    fps: the rate; None: as fast as they are read (`declared` may then name a rate to be agreed on).
    At a rate, frames are taken by the clock: who reads late finds at most as many frames as there are free
    buffers, and a gap in `seq`.
    """

    live = True

    def __init__(
        self,
        layout: PixelLayout,
        *,
        buffers: int = 4,
        fps: float | None = None,
        declared: float | None = None,
        padding: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__(f"pooled:{layout.width}x{layout.height}", limit)
        assert buffers >= 2
        self.fps = fps or declared
        self.size = (layout.width, layout.height)
        self.spare = buffers - 1
        self.buffers = buffers
        self.layout = layout
        self._paced = fps is not None
        strides = [int(np.prod(shape[1:])) + padding for shape in layout.plane_shapes]
        nbytes = sum(stride * shape[0] for stride, shape in zip(strides, layout.plane_shapes, strict=True))
        offsets = np.cumsum([0, *(s * p[0] for s, p in zip(strides, layout.plane_shapes, strict=True))])
        page = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self._fd = os.memfd_create("edgekit-pooled")
        except OSError as error:  # out of descriptors: a camera that cannot be opened now
            raise SourceLost(f"source {self.uri}: {error.strerror}. Close what is not needed") from None
        os.ftruncate(self._fd, page * buffers)
        memory = np.frombuffer(mmap.mmap(self._fd, page * buffers), np.uint8)
        self._raw = [memory[i * page : i * page + nbytes] for i in range(buffers)]
        self._pixels = [Pixels.view(raw, layout, strides, offsets[:-1].tolist()) for raw in self._raw]
        noise = np.random.default_rng(0)
        self._scenes = [noise.integers(0, 256, nbytes, dtype=np.uint8) for _ in range(_SCENES)]
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(buffers):
            self._free.put(i)
        self._seq = 0
        self._begin_ns = time.monotonic_ns()

    @property
    def leased(self) -> int:
        """Buffers that readers hold."""
        return self.buffers - self._free.qsize()

    def _read(self, timeout_s: float | None) -> Frame | None:
        until = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            index = self._free.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None
        try:
            taken_ns = self._take(until)
        except TimeoutError:
            self._free.put(index)
            raise
        raw = self._raw[index]
        raw[:] = self._scenes[self._seq % _SCENES]
        raw[:STAMP] = np.frombuffer(self._seq.to_bytes(STAMP, "little"), np.uint8)
        frame = Frame(
            self._pixels[index],
            self._seq,
            taken_ns,
            time.monotonic_ns(),
            self.uri,
            clock="monotonic",
            exposure="end",
            hops=(Hop("camera", "driver", written=self.layout.nbytes),),
            lease=Lease(lambda: self._give_back(index, raw)),
        )
        self._seq += 1
        return frame

    def _take(self, until: float | None) -> int:
        """Wait for the next frame's time, in ns; steps over frames that no buffer was free for."""
        if not self._paced or self.fps is None:
            return time.monotonic_ns()
        interval = 1e9 / self.fps
        oldest = int((time.monotonic_ns() - self._begin_ns) / interval) - self._free.qsize()
        self._seq = max(self._seq, oldest)
        due_ns = self._begin_ns + round((self._seq + 1) * interval)
        wait = (due_ns - time.monotonic_ns()) / 1e9
        if wait > 0:
            left = wait if until is None else min(wait, until - time.monotonic())
            time.sleep(max(0.0, left))
            if left < wait:
                raise TimeoutError
        return due_ns

    def _give_back(self, index: int, raw: np.ndarray) -> None:
        raw[:] = POISON
        self._free.put(index)

    def close(self) -> None:
        if not self._closed:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._raw, self._pixels = [], []  # unmapped with the last frame
        super().close()


def stamp(pixels: Pixels) -> int:
    """The sequence number that a picture of a PooledSource carries."""
    row = pixels.planes[0][0].reshape(-1)
    return int.from_bytes(row[:STAMP].tobytes(), "little")
