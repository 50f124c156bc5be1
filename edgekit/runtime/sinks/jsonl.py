"""Results as JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from edgekit.errors import StreamError, printable
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks.base import Sink, failure, make_parent, refuse_overwriting


class JsonLinesSink(Sink):
    """One line per frame, readable while it runs; an older file of the name is replaced.

    `{"source", "seq", "pts_ns", "age_ms", "boxes": [[x1, y1, x2, y2], ...], "scores", "classes",
    "labels"}`, boxes in pixels of the original frame; from a stream also `camera`, `engine`, `epoch`. Each
    line is written by one call, and one that does not fit is taken back: the file holds whole lines at
    any time.
    """

    needs_pixels = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = -1
        make_parent(path)

    def _write(self, item: StreamResult) -> None:
        frame, result = item.frame, item.result
        head: dict[str, object] = {
            "source": frame.source,
            "seq": frame.seq,
            "pts_ns": frame.pts_ns,
            "age_ms": round(item.age_ms, 3),
        }
        if item.engine:  # from a stream, which may have several of each
            head |= {"camera": item.camera, "engine": item.engine, "epoch": frame.epoch}
        try:
            line = json.dumps({**head, **result.to_json()}, allow_nan=False).encode() + b"\n"
        except ValueError:
            raise StreamError(
                f"sink {printable(self.path)}: frame {frame.seq} has a box or score that is not a finite number. "
                "Check the engine with 'edgekit verify'"
            ) from None
        if self._file < 0:
            refuse_overwriting(self.path, frame)
            self._open()
        try:
            self._append(line)
        except OSError as error:
            raise failure(self.path, error) from None

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
        try:
            self._file = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise failure(self.path, error) from None

    def _append(self, line: bytes) -> None:
        done = 0
        try:
            while done < len(line):  # a full disk takes a part first and refuses the rest
                done += os.write(self._file, line[done:])
        except OSError:
            if done:
                with contextlib.suppress(OSError):  # a pipe keeps what it has
                    end = os.lseek(self._file, -done, os.SEEK_CUR)
                    os.ftruncate(self._file, end)
            raise

    def _finish(self) -> None:
        try:
            if self._file < 0:
                self._open()  # no frame came: an empty file says so
            self._drop()
        except OSError as error:  # a network file system may tell of a full disk only now
            raise failure(self.path, error) from None

    def _drop(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)
