"""Frames of the program around us: any Python iterable, or pictures pushed from a callback.

edgekit.stream(bundle, IteratorSource(my_generator(), fps=30))

camera = PushSource("front")                       # ROS, a vendor's SDK: their thread calls us
node.create_subscription(Image, "/front", lambda m: camera.push(to_array(m), since_boot(stamp_ns(m))), 1)
edgekit.stream(bundle, camera)
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import numpy as np

from edgekit.errors import UsageError, did_you_mean, printable
from edgekit.pixels import FORMATS, PACKED_BYTES, Format, PixelLayout, Pixels
from edgekit.runtime.frames import Clock, Frame, Hop
from edgekit.runtime.sources.base import Source

_PICTURES = "a uint8 array, Pixels, a Frame, or (picture, timestamp in ns)"


def since_boot(wall_ns: int) -> int:
    """A wall-clock timestamp (`time.time_ns()`, ROS) on `time.monotonic_ns()`, as the clocks stand now.

    Right to the microsecond for stamps of this machine that are seconds old; a step of the wall clock since
    the stamp shifts it, as does another machine's clock.
    """
    return wall_ns - time.time_ns() + time.monotonic_ns()


class _Maker:
    """Turns what a program hands over into frames."""

    def __init__(self, name: str, format: Format, clock: Clock, fps: float | None) -> None:
        self.name = name
        if format not in FORMATS:
            raise UsageError(
                f"source {name}: unknown format {format!r}. {did_you_mean(str(format), FORMATS)}"
            )
        if fps is not None and not (isinstance(fps, (int, float)) and 0 < fps <= 1000):
            raise UsageError(f"source {name}: fps {fps!r} is not usable, expected above 0 up to 1000")
        self.format, self.clock, self.fps = format, clock, fps

    def frame(self, item: Any, seq: int, now_ns: int) -> Frame:
        """Raises: UsageError that says which item is wrong and how."""
        if isinstance(item, Frame):
            return item
        picture, stamp = item, None
        if isinstance(item, tuple):
            if len(item) != 2:
                raise UsageError(
                    f"source {self.name}, item {seq}: a tuple of {len(item)}, expected {_PICTURES}"
                )
            picture, stamp = item
        if isinstance(picture, Frame):
            raise UsageError(
                f"source {self.name}, item {seq}: a Frame has a timestamp of its own. Pass it alone"
            )
        if stamp is not None and (isinstance(stamp, bool) or not isinstance(stamp, (int, np.integer))):
            raise UsageError(
                f"source {self.name}, item {seq}: timestamp {stamp!r}, expected whole nanoseconds. "
                "Seconds times 1e9 as int"
            )
        pixels, hops = self._pixels(picture, seq)
        if stamp is not None:
            return Frame(pixels, seq, int(stamp), now_ns, self.name, clock=self.clock, hops=hops)
        if self.fps is not None and self.clock == "media":
            return Frame(
                pixels, seq, round(seq * 1e9 / self.fps), now_ns, self.name, clock="media", hops=hops
            )
        return Frame(pixels, seq, 0, now_ns, self.name, hops=hops)

    def _pixels(self, picture: Any, seq: int) -> tuple[Pixels, tuple[Hop, ...]]:
        """The picture without a copy where its rows allow it; else the copy is in the ledger."""
        if isinstance(picture, Pixels):
            return picture, ()
        where = f"source {self.name}, item {seq}"
        if not isinstance(picture, np.ndarray):
            raise UsageError(f"{where}: {type(picture).__name__}, expected {_PICTURES}")
        if self.format in PACKED_BYTES:
            try:
                pixels = Pixels.bgr(picture, self.format)
            except UsageError as error:
                raise UsageError(f"{where}: {error}") from None
            same = np.may_share_memory(pixels.planes[0], picture)
            return pixels, () if same else (Hop("rows made adjacent", "CPU", copied=picture.nbytes),)
        # luma and chroma under one another, as OpenCV has them
        rows = picture.shape[0] if picture.ndim == 2 else 0
        if picture.dtype != np.uint8 or not rows or rows % 3 or picture.shape[1] % 2 or not picture.shape[1]:
            raise UsageError(
                f"{where}: expected uint8 [height * 3 / 2, width] for {self.format}, both sides even, "
                f"got {picture.dtype} {list(picture.shape)}. Pass Pixels.view(...) for other layouts"
            )
        layout = PixelLayout(self.format, picture.shape[1], rows // 3 * 2)
        if picture.flags.c_contiguous:
            return Pixels.view(picture.reshape(-1), layout), ()
        flat = np.ascontiguousarray(picture).reshape(-1)
        return Pixels.view(flat, layout), (Hop("rows made adjacent", "CPU", copied=picture.nbytes),)


class IteratorSource(Source):
    """Frames of any iterable. Its items: uint8 arrays of `format`, `Pixels`, `Frame`s, or (picture, timestamp_ns).

    Arrays: [H, W, channels] for packed formats, [H * 3/2, W] for `nv12 nv21 i420`; they are not copied, so
    an item must not be overwritten while its frame is in use. Frames are handed on as they are.
    live: whether frames pass by unread, as a camera's do; then timestamps are on `time.monotonic_ns()`
        (`since_boot` converts wall-clock ones), else from the start of the recording. Without timestamps a
        recording counts `fps`, a live source has none: a frame's age then starts when it is handed over.
    The iterator takes the time it takes (it is asked by the reading thread; `PushSource` waits with a
    timeout). What it raises comes out of `read`; `close` closes a generator.
    Raises: UsageError, at once for arguments, at the item for pictures.
    """

    def __init__(
        self,
        iterable: Iterable[Any],
        name: str = "iterator",
        live: bool = False,
        fps: float | None = None,
        format: Format = "bgr",
        *,
        limit: int | None = None,
    ) -> None:
        super().__init__(printable(name), limit)
        self._maker = _Maker(self.uri, format, "monotonic" if live else "media", fps)
        self.live = live
        self.fps = fps
        try:
            self._items: Iterator[Any] = iter(iterable)
        except TypeError:
            raise UsageError(
                f"source {self.uri}: {type(iterable).__name__} cannot be iterated, expected an iterable of "
                f"pictures. Call the generator function"
            ) from None
        self._expect(len(iterable) if isinstance(iterable, Sized) else None)
        self._seq = 0

    def _read(self, timeout_s: float | None) -> Frame | None:
        try:
            item = next(self._items)
        except StopIteration:
            return None
        seq = self._seq
        self._seq += 1
        return self._maker.frame(item, seq, time.monotonic_ns())

    def close(self) -> None:
        if not self._closed:
            super().close()
            close = getattr(self._items, "close", None)
            if callable(close):
                close()


class PushSource(Source):
    """A live source that another thread feeds: `push` in a callback, `read` in the stream.

    maxlen: pictures that wait for the reader; when a newer one comes the oldest is dropped and counted in
    `overwritten` (`seq` counts every push, so the reader sees the gap). Pushed arrays are not copied.
    format: of pushed arrays; `Pixels` and `Frame`s say their own. Raises: UsageError.
    """

    live = True

    def __init__(
        self,
        name: str = "push",
        maxlen: int = 1,
        *,
        fps: float | None = None,
        format: Format = "bgr",
        limit: int | None = None,
    ) -> None:
        super().__init__(printable(name), limit)
        if not isinstance(maxlen, int) or not 1 <= maxlen <= 1000:
            raise UsageError(f"source {self.uri}: maxlen {maxlen!r} is not usable, expected 1 to 1000")
        self._maker = _Maker(self.uri, format, "monotonic", fps)
        self.fps = fps
        self.overwritten = 0
        """Pictures that a newer one replaced before they were read."""
        self._maxlen = maxlen
        self._waiting: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._pushed = 0
        self._ended = False

    def push(self, image: Any, pts_ns: int | None = None) -> bool:
        """Hand over a picture: a uint8 array, `Pixels` or a `Frame`. From any thread; never waits for the reader.

        pts_ns: when it was taken, on `time.monotonic_ns()`; None: its age counts from now.
        Returns False, and takes nothing, after `end` or `close`. Raises: UsageError for what is no picture.
        """
        now_ns = time.monotonic_ns()
        dropped: Frame | None = None
        with self._changed:
            if self._ended or self._closed:
                return False
            frame = self._maker.frame(image if pts_ns is None else (image, pts_ns), self._pushed, now_ns)
            self._pushed += 1
            if len(self._waiting) == self._maxlen:
                dropped = self._waiting.popleft()
                self.overwritten += 1
            self._waiting.append(frame)
            self._changed.notify()
        if dropped is not None:
            dropped.release()
        return True

    def end(self) -> None:
        """No more pictures: the reader gets those that wait, then the end. From any thread."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _read(self, timeout_s: float | None) -> Frame | None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting or self._ended or self._closed, timeout_s):
                raise TimeoutError(f"source {self.uri}: no frame within {timeout_s:g} s")
            return self._waiting.popleft() if self._waiting else None

    def close(self) -> None:
        with self._changed:
            super().close()
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for frame in left:
            frame.release()
