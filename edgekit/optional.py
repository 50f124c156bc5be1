"""OpenCV, which is optional: imported on first use, so that the runtime starts without it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from edgekit.errors import MissingExtraError


def load_cv2(purpose: str) -> Any:
    """The module `cv2`. Raises: MissingExtraError ("needed to <purpose>") when it is not installed."""
    # read by OpenCV when it first opens a video: FFmpeg's own notes about damaged files would
    # come between our one-line errors (-8 is AV_LOG_QUIET); the user's setting wins
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError:
        raise MissingExtraError("opencv-python-headless", "camera", purpose) from None
    return cv2


@contextlib.contextmanager
def quiet(cv2: Any) -> Iterator[None]:
    """OpenCV writes nothing to stderr meanwhile: the caller turns its failures into one line."""
    log = cv2.utils.logging
    level = log.getLogLevel()
    log.setLogLevel(log.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        log.setLogLevel(level)


_stderr = threading.Lock()


@contextlib.contextmanager
def native_messages(starts: tuple[str, ...]) -> Iterator[list[str]]:
    """Collect what C libraries write to the process's stderr, past Python and past their caller.

    The list is filled at the end with the lines that begin with one of `starts`; other lines (of
    another thread) are passed on. libjpeg and libpng tell about damage in no other way. One thread
    at a time; where the process has no stderr nothing is collected.
    """
    lines: list[str] = []
    file: Any = None
    with _stderr, contextlib.ExitStack() as stack:
        try:
            saved = os.dup(2)
            stack.callback(os.close, saved)
            file = stack.enter_context(tempfile.TemporaryFile())
            os.dup2(file.fileno(), 2)
        except OSError:  # closed by a daemon, or no room for a temporary file
            file = None
        try:
            yield lines
        finally:
            if file is not None:
                os.dup2(saved, 2)
                file.seek(0)
                for line in file.read().splitlines(keepends=True):
                    text = line.decode(errors="replace")
                    if text.startswith(starts):
                        lines.append(text.strip())
                    else:
                        os.write(2, line)
