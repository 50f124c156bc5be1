"""What every sink is, and how files are written so that none is ever half there."""

from __future__ import annotations

import abc
import contextlib
import errno
import itertools
import os
from pathlib import Path
from types import TracebackType

from edgekit.errors import OutputError, printable
from edgekit.runtime.frames import Frame
from edgekit.runtime.metrics import Metrics
from edgekit.runtime.results import StreamResult

_counter = itertools.count()


class Sink(abc.ABC):
    """Takes the result of each frame. `close()` finishes the file, `abort()` drops what is unfinished.

    As a context manager it closes at the end, also when interrupted (Ctrl-C, a cancelled task: what was
    written is kept); any other exception aborts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        """The file, or what else it was opened with."""
        self.written = 0
        """Frames written."""
        self._closed = False

    needs_pixels = True
    """Whether it looks at the picture; one that does not never holds a camera's buffer."""

    def start(self, metrics: Metrics) -> None:
        """Called once by a stream before its first result; sinks that show how it goes keep `metrics`."""
        return

    def write(self, item: StreamResult) -> None:
        """Take one result. The item's frame is the caller's: `item.share()` holds on to it.

        Raises: OutputError; ValueError after `close` or `abort`.
        """
        if self._closed:
            raise ValueError(f"sink {printable(self.path)} is closed")
        self._write(item)
        self.written += 1

    def close(self) -> None:
        """Finish. Calling it again does nothing. Raises: OutputError."""
        if not self._closed:
            self._closed = True
            self._finish()

    def abort(self) -> None:
        """Leave nothing unfinished behind; what is whole already stays. Calling it again does nothing."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(OSError):  # an error is on its way already
                self._drop()

    @abc.abstractmethod
    def _write(self, item: StreamResult) -> None:
        """What `write` does; `written` is the number of frames before this one."""

    def _finish(self) -> None:
        """Make the file whole. Raises: OutputError."""
        return

    def _drop(self) -> None:
        """Remove what is unfinished. Raises: OSError."""
        return

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception):  # none, or an interrupt of any kind
            self.close()
        else:
            self.abort()


def failure(path: Path, error: OSError) -> OutputError:
    """The one-line error for a file that the system refused to write."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    step = "Free some space or write elsewhere" if error.errno in full else "Choose another path"
    return OutputError(f"sink {printable(path)}: {error.strerror or error}. {step}")


def make_parent(path: Path) -> None:
    """Make the folder of `path` before the work, not after it. Raises: OutputError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise failure(path, error) from None


def temporary(path: Path) -> Path:
    """A free hidden name beside `path`, of the same suffix: same file system, so a rename is atomic."""
    return path.parent / f".edgekit-{os.getpid()}-{next(_counter)}{path.suffix}"


def write_whole(path: Path, data: bytes, shown: Path | None = None) -> None:
    """Write a file that appears complete or not at all. Raises: OutputError that names `shown` (or `path`)."""
    unfinished = temporary(path)
    try:
        try:
            unfinished.write_bytes(data)
            os.replace(unfinished, path)
        except BaseException:  # Ctrl-C too
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
    except OSError as error:
        raise failure(shown or path, error) from None


def refuse_overwriting(path: Path, frame: Frame) -> None:
    """Raises: OutputError when `path` is the very file that `frame` came from."""
    try:
        same = path.samefile(frame.source)
    except (OSError, ValueError):  # either does not exist, or the source is no file
        return
    if same:
        raise OutputError(f"sink {printable(path)}: is the source itself. Write to another path")
