"""Annotated video."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import OutputError, printable
from edgekit.optional import load_cv2, quiet
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks.base import Sink, failure, make_parent, refuse_overwriting, temporary

DEFAULT_FPS = 10.0
"""For sources without a clock (a folder of pictures)."""
_MIN_SIDE, _MAX_SIDE = 16, 4096
_MIN_FREE_BYTES = 4 << 20
_CHECK_EVERY = 30


class VideoSink(Sink):
    """MP4 (MPEG-4 part 2, which every OpenCV wheel encodes) that appears when closed.

    The first frame fixes the size (made even, 16 to 4096 a side); frames of another size are
    scaled to fit and centred on black. Frames are `1 / fps` apart, whatever their timestamps.
    """

    def __init__(self, path: Path, fps: float | None = None) -> None:
        super().__init__(path)
        self._fps = fps or DEFAULT_FPS
        self._writer: Any = None
        self._unfinished = temporary(path)
        self._size = (0, 0)
        make_parent(path)

    def _write(self, item: StreamResult) -> None:
        frame, result = item.frame, item.result
        cv2 = load_cv2("write videos")
        drawn = result.draw(frame.image)
        if self._writer is None:
            refuse_overwriting(self.path, frame)
            self._start(cv2, drawn.shape[1], drawn.shape[0])  # small pictures are enlarged for their letters
        image = fit(drawn, *self._size)
        with quiet(cv2):
            self._writer.write(image)
        if self.written % _CHECK_EVERY == _CHECK_EVERY - 1:  # the encoder never says that the disk is full
            try:
                free = shutil.disk_usage(self.path.parent).free
            except OSError as error:
                raise failure(self.path, error) from None
            if free < _MIN_FREE_BYTES:
                raise OutputError(
                    f"sink {printable(self.path)}: no space left. Free some space or write elsewhere"
                )

    def _start(self, cv2: Any, width: int, height: int) -> None:
        scale = min(1.0, _MAX_SIDE / max(width, height))
        self._size = (_even(width * scale), _even(height * scale))
        try:
            self._unfinished.touch(exist_ok=False)  # the system's own reason, which OpenCV would hide
        except OSError as error:
            raise failure(self.path, error) from None
        with quiet(cv2):
            code = cv2.VideoWriter_fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(self._unfinished), cv2.CAP_FFMPEG, code, self._fps, self._size)
        if not writer.isOpened():
            self._unfinished.unlink(missing_ok=True)
            raise OutputError(
                f"sink {printable(self.path)}: OpenCV cannot write MP4 at {self._size[0]}x{self._size[1]}, "
                f"{self._fps:g} frames/s (built without FFmpeg, or the disk is full). Write .png or .jsonl"
            )
        self._writer = writer

    def _finish(self) -> None:
        if self._writer is None:
            return
        cv2 = load_cv2("write videos")
        writer, self._writer = self._writer, None
        try:
            with quiet(cv2):
                writer.release()
                # errors of the last writes reach nobody: the file is whole if its index counts every frame
                check = cv2.VideoCapture(str(self._unfinished.resolve()), cv2.CAP_FFMPEG)
                # Ctrl-C may have come after a frame was encoded and before it was counted
                counts = (self.written, self.written + 1)
                whole = check.isOpened() and round(check.get(cv2.CAP_PROP_FRAME_COUNT)) in counts
                check.release()
            if not whole:
                raise OutputError(
                    f"sink {printable(self.path)}: the video could not be finished (disk full?). "
                    "Free some space or write elsewhere"
                )
            os.replace(self._unfinished, self.path)
        except OSError as error:
            raise failure(self.path, error) from None
        finally:
            self._unfinished.unlink(missing_ok=True)

    def _drop(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with quiet(load_cv2("write videos")):
                writer.release()
            self._unfinished.unlink(missing_ok=True)


def _even(side: float) -> int:
    """The 4:2:0 chroma of the encoder halves both sides."""
    return max(_MIN_SIDE, int(side) & ~1)


def fit(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scale a BGR picture into [height, width, 3] keeping its aspect ratio, centred on black."""
    h, w = image.shape[:2]
    if (w, h) == (width, height):
        return image
    cv2 = load_cv2("write videos")
    scale = min(width / w, height / h)
    inner = (min(width, max(1, round(w * scale))), min(height, max(1, round(h * scale))))
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    canvas = np.zeros((height, width, 3), np.uint8)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas[top : top + inner[1], left : left + inner[0]] = cv2.resize(image, inner, interpolation=method)
    return canvas
