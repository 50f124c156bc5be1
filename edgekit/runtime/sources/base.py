"""What every source is: an iterator of frames that is closed when done."""

from __future__ import annotations

import abc
import urllib.parse
from collections.abc import Callable
from types import TracebackType

from edgekit.errors import UsageError, printable
from edgekit.runtime.frames import Frame


class Source(abc.ABC):
    """An iterator of frames and a context manager.

    uri: what it was opened with.
    live: True when frames pass by whether or not they are read.
    fps: frames per second as the source declares them; None where unknown or without a clock.
    size: (width, height) of its frames in pixels; None where they differ (folders).
    frames: how many frames are to come at most, `limit` considered; None where unknown.
    skipped: (file, reason) of everything that should have given a frame and could not.
    ignored: files in a folder that are no pictures by their name.
    reopens: whether opening it again can mend it; not so for a recording that is played as if it were live.
    again: opens the same device anew, where that is more than opening the URI once more (None: it is not).
    spare: buffers that readers may hold on to before the device runs dry; None where frames own theirs.

    A source is read by one thread at a time. Only that thread closes it.
    """

    live: bool = False
    spare: int | None = None
    reopens: bool = True
    again: Callable[[], Source] | None = None

    def __init__(self, uri: str, limit: int | None) -> None:
        if limit is not None and limit < 1:
            raise UsageError(f"source {uri}: limit {limit} gives no frames, expected at least 1")
        self.uri = uri
        self.fps: float | None = None
        self.size: tuple[int, int] | None = None
        self.frames: int | None = None
        self.skipped: list[tuple[str, str]] = []
        self.ignored = 0
        self.limit = limit
        self._delivered = 0
        self._closed = False

    def _expect(self, total: int | None) -> None:
        """Set `frames` from what the source holds and the limit."""
        self.frames = min(total, self.limit) if total is not None and self.limit is not None else total

    @abc.abstractmethod
    def _read(self, timeout_s: float | None) -> Frame | None:
        """The next frame, or None at the end.

        A live source waits `timeout_s` at most (None: for good) and then raises TimeoutError; a file
        takes the time it takes. Raises: SourceLost when the device is gone or failed and may come back;
        other EdgekitErrors for what opening it again would not mend.
        """

    def read(self, timeout_s: float | None = None) -> Frame | None:
        """The next frame, or None at the end, when closed, or after `limit` frames.

        timeout_s: how long to wait for a live source; None waits for good.
        Raises: TimeoutError, SourceLost, UsageError.
        """
        if self._closed or self._delivered == self.limit:
            return None
        frame = self._read(timeout_s)
        if frame is not None:
            self._delivered += 1
        return frame

    def __iter__(self) -> Source:
        return self

    def __next__(self) -> Frame:
        frame = self.read()
        if frame is None:
            raise StopIteration
        return frame

    def close(self) -> None:
        """Free files and devices; iteration ends. Calling it again does nothing.

        Frames that are still leased stay readable until they are released.
        """
        self._closed = True

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def split_uri(uri: str) -> urllib.parse.SplitResult:
    """The parts of a URI. Raises: UsageError."""
    try:
        return urllib.parse.urlsplit(uri)
    except ValueError as error:  # a lone bracket is taken for half an IPv6 address
        raise UsageError(f"source {printable(uri)}: not a valid URI: {error}. Check it") from None
