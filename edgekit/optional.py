"""OpenCV, which is optional: imported on first use, so that the runtime starts without it."""

from __future__ import annotations

import contextlib
import os
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
