"""Video files through OpenCV, with the timestamps of the container."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import UsageError, printable
from edgekit.optional import load_cv2, quiet
from edgekit.picture import VIDEO_SUFFIXES, check_size
from edgekit.pixels import Pixels
from edgekit.runtime.frames import Frame
from edgekit.runtime.sources.base import Source

SUFFIXES = VIDEO_SUFFIXES


class VideoSource(Source):
    """Frames of a video file, rotated as the container asks, `pts_ns` from 0 at its start.

    The first frame is decoded when opened, so that a file without pictures is refused at once.
    A file that ends before its declared length is told in `skipped` after the last whole frame.

    Raises: UsageError when the file cannot be opened, holds no frame or is too large.
    """

    def __init__(self, uri: str, path: Path, limit: int | None = None) -> None:
        super().__init__(uri, limit)
        self._cv2 = load_cv2("read videos")
        self._path = path
        self._name = printable(path)
        self._seq = 0
        self._capture = self._open()
        try:
            self._start()
        except UsageError:
            self._capture.release()
            raise

    def _open(self) -> Any:
        # absolute, so that no name is taken for a protocol ("concat:x"); not CAP_ANY, whose
        # picture-sequence reader takes digits in a name for a pattern
        name = str(self._path.resolve())
        with quiet(self._cv2):
            for api in (self._cv2.CAP_FFMPEG, self._cv2.CAP_GSTREAMER):
                capture = self._cv2.VideoCapture(name, api)
                if capture.isOpened():
                    return capture
                capture.release()
        raise UsageError(
            f"video {self._name}: damaged, truncated or of an unknown format. "
            f"Give a video file ({' '.join(SUFFIXES)}) that other players open"
        )

    def _start(self) -> None:
        cv2 = self._cv2
        width = int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        height = int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        problem = check_size(width, height)
        if problem:
            raise UsageError(f"video {self._name}: {problem}. Give another file")
        fps = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.fps = fps if math.isfinite(fps) and 0 < fps <= 1000 else None
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self._declared = int(count) if math.isfinite(count) and 0 < count < 2**40 else None
        self._expect(self._declared)
        self._pts_ns = -1
        self._pending = self._decode()
        if self._pending is None:
            raise UsageError(f"video {self._name}: no frame can be decoded. Give another file")
        self.size = (self._pending.width, self._pending.height)

    def _decode(self) -> Frame | None:
        with quiet(self._cv2):
            try:
                ok, image = self._capture.read()
            except self._cv2.error:  # a frame that cannot be converted: nothing after it is sound
                ok, image = False, None
        if not ok or image is None:
            return None
        pts_ms = float(self._capture.get(self._cv2.CAP_PROP_POS_MSEC))
        pts_ns = round(pts_ms * 1e6) if math.isfinite(pts_ms) else -1
        if pts_ns <= self._pts_ns:  # a container without usable times: count frames from the last good one
            pts_ns = self._pts_ns + round(1e9 / (self.fps or 1e9)) if self._seq else 0
        self._pts_ns = pts_ns
        pixels = Pixels.bgr(np.asarray(image))
        frame = Frame(pixels, self._seq, pts_ns, time.monotonic_ns(), str(self._path), clock="media")
        self._seq += 1
        return frame

    def _read(self, timeout_s: float | None) -> Frame | None:
        first, self._pending = self._pending, None
        if first is not None:  # its age counts from now, not from when the file was opened
            return dataclasses.replace(first, captured_ns=time.monotonic_ns())
        frame = self._decode()
        if frame is None:
            self._check_end()
        return frame

    def _check_end(self) -> None:
        """Compare times, not counts: many containers only estimate the count from the length."""
        if self._declared is None or self.fps is None or self._seq >= self._declared:
            return
        missing_s = self._declared / self.fps - self._pts_ns / 1e9
        if missing_s > max(3 / self.fps, 0.02 * self._declared / self.fps):
            reason = f"ends {missing_s:.1f} s early, after {self._seq} of about {self._declared} frames"
            self.skipped.append((str(self._path), f"video {self._name}: {reason}"))

    def close(self) -> None:
        super().close()
        self._capture.release()
