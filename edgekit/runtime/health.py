"""What a live sensor's frames tell about its health: gaps, clock, pace, and pictures that stay the same.

Each class watches one thing over the frames of one connection, keeps a few numbers and touches no device.
"""

from __future__ import annotations

import zlib
from collections import deque

import numpy as np

from edgekit.pixels import Pixels
from edgekit.runtime.frames import Frame

SECOND = 1_000_000_000
_COUNTER = 1 << 32
"""V4L2 and GigE Vision number their frames with 32 bits."""
_GRID = 22
"""Rows and columns of picture elements that a sparse look takes."""


class Sequence:
    """Frames that the driver numbered and did not deliver."""

    def __init__(self) -> None:
        self._last: int | None = None

    def missing(self, seq: int) -> int:
        """How many frames lie between the last one and `seq`. A counter that starts anew counts none."""
        last, self._last = self._last, seq
        if last is None:
            return 0
        step = seq - last
        if step < 0:  # after 2^32 frames it wraps; a wrap over half of that is a restart
            step += _COUNTER
            if not 0 < step < _COUNTER // 2:
                return 0
        return max(0, step - 1)


class Burst:
    """Joins what happens again and again to one episode, which ends after `quiet` frames without it."""

    def __init__(self, quiet: int) -> None:
        self._quiet = quiet
        self._left = 0

    def begins(self, happened: bool) -> bool:
        """Once per frame: whether an episode begins with it."""
        begins = happened and self._left == 0
        self._left = self._quiet if happened else max(0, self._left - 1)
        return begins


class Clock:
    """Whether timestamps can be believed.

    A jump is a timestamp before the last one, or one that runs ahead of the arrivals by more than 1 s. A late
    delivery is none: its timestamps are old and right.
    """

    def __init__(self) -> None:
        self._kind = "none"
        self._last = 0
        self._base = 0
        """The least time from a timestamp to its arrival: where the frames came fastest."""
        self._believed = True

    def jumped(self, frame: Frame) -> bool:
        """Whether its clock jumped with this frame. One whose timestamp cannot be right gets clock `none`,
        so that its age counts from its arrival: in the future; and from a jump or the start on, until they
        lie within 1 s before the arrival again."""
        if frame.clock == "none":
            self._kind = "none"
            return False
        ours = frame.clock == "monotonic"
        offset = frame.captured_ns - frame.pts_ns
        begins = frame.clock != self._kind
        if begins:
            self._kind = frame.clock
            self._base = 0 if ours else offset  # ours: the first frame may have waited for its reader
        jumped = (not begins and frame.pts_ns < self._last) or offset < self._base - SECOND
        self._last = frame.pts_ns
        if begins or jumped or not self._believed:
            self._believed = not ours or 0 <= offset <= SECOND
        if jumped:  # a clock that went seconds back and comes right again jumps once more
            self._base = min(0, offset) if ours and self._believed else offset
        self._base = min(self._base, offset)
        if not self._believed or (ours and offset < 0):
            frame.clock = "none"
        return jumped


class Pace:
    """How fast frames come, over the newest `window` intervals."""

    def __init__(self, fps: float | None, window: int) -> None:
        self._agreed_ns = SECOND / fps if fps else None
        self._times: deque[tuple[int, int]] = deque(maxlen=window + 1)
        self._slow = False

    def add(self, frame: Frame) -> bool:
        """Whether with this frame an episode begins of less than half the agreed rate.

        Frames that the driver dropped are no matter of pace: the intervals are those of its counter. An
        episode is over when the rate is back at two thirds.
        """
        times = self._times
        if times and not times[-1][1] < frame.seq:
            times.clear()
        times.append((frame.taken_ns if frame.clock == "monotonic" else frame.captured_ns, frame.seq))
        if self._agreed_ns is None or len(times) < (times.maxlen or 0):
            return False
        interval = self.interval_s() * SECOND
        was = self._slow
        self._slow = interval > self._agreed_ns * (1.5 if was else 2.0)
        return self._slow and not was

    def interval_s(self) -> float:
        """Mean time between frames; 0 where fewer than two are known."""
        if len(self._times) < 2:
            return 0.0
        (first, a), (last, b) = self._times[0], self._times[-1]
        return max(0, last - first) / SECOND / (b - a)

    def expected_s(self) -> float | None:
        """How long the next frame may well take: as agreed or as measured, whichever is longer; None when
        neither is known."""
        measured = self.interval_s()
        if self._agreed_ns is not None:
            return max(self._agreed_ns / SECOND, measured)
        return measured or None


class Freeze:
    """Tells a sensor that repeats one picture from one that sees: a true one always has noise.

    Every so often it looks at a grid of some 500 picture elements (about one in 4,096 bytes at 1920x1080).
    Only when these have not changed for half of `seconds` are whole pictures compared, by checksum, twice.
    A picture that is still the same after the source was opened again is perhaps a still one: each further
    verdict on it takes twice as long, up to 32 times.
    """

    def __init__(self, seconds: float) -> None:
        self._least_ns = self._limit_ns = round(seconds * SECOND)
        self._sample = b""
        self._since_ns: int | None = None
        self._checksum: int | None = None
        self._look_ns = 0

    def restart(self) -> None:
        """The source was opened again."""
        self._since_ns = None
        self._checksum = None
        self._look_ns = 0

    def accept(self) -> None:
        """Say no more of this picture, until it changes."""
        self._limit_ns = 1 << 62

    def seen(self, frame: Frame) -> bool:
        """Whether the picture has been the same for too long."""
        now = frame.captured_ns
        if self._limit_ns == 0 or now < self._look_ns:
            return False
        sample = sparse(frame.pixels)
        if sample != self._sample:
            self._sample = sample
            self._limit_ns = self._least_ns
            self._anew(now)
            self._look_ns = now + self._limit_ns // 20
            return False
        self._look_ns = 0  # now every frame counts
        if self._since_ns is None:
            self._anew(now)
        assert self._since_ns is not None
        age = now - self._since_ns
        if age < self._limit_ns // 2:
            return False
        if self._checksum is None:
            self._checksum = checksum(frame.pixels)
            return False
        if age < self._limit_ns:
            return False
        if checksum(frame.pixels) != self._checksum:  # it changes beside the grid
            self._anew(now)
            return False
        self._limit_ns = min(2 * self._limit_ns, 32 * self._least_ns)
        return True

    def _anew(self, now: int) -> None:
        self._since_ns = now
        self._checksum = None


def sparse(pixels: Pixels) -> bytes:
    """The first plane's bytes (BGR, or luma; packed YUV: both) at a grid of about 22 x 22 places."""
    plane = pixels.planes[0]
    rows, columns = max(1, plane.shape[0] // _GRID), max(1, plane.shape[1] // _GRID)
    return plane[rows // 2 :: rows, columns // 2 :: columns].tobytes()


def checksum(pixels: Pixels) -> int:
    """CRC-32 of all planes, without a copy of more than 64 rows where rows are padded."""
    value = 0
    for plane in pixels.planes:
        for row in range(0, plane.shape[0], 64):
            block = plane[row : row + 64]
            value = zlib.crc32(np.ascontiguousarray(block).data, value)
    return value
