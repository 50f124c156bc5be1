"""Where results go: JSON lines, annotated pictures and videos."""

from __future__ import annotations

import math
import os
from pathlib import Path

from edgekit.errors import UsageError, did_you_mean
from edgekit.runtime.sinks import pictures
from edgekit.runtime.sinks.base import Sink
from edgekit.runtime.sinks.jsonl import JsonLinesSink
from edgekit.runtime.sinks.video import VideoSink

__all__ = ["Sink", "open_sink"]


def open_sink(path: str | Path, *, fps: float | None = None, labels: tuple[str, ...] = ()) -> Sink:
    """A sink chosen by its name.

    `.jsonl`: one line per frame. `.png .jpg .jpeg .webp .bmp`: annotated picture (numbered when
    there are several). `.mp4`: annotated video at `fps` (10 if None). A folder (existing, or named
    with a trailing slash): one annotated picture per frame. Missing parent folders are made.
    `labels` name the classes of detections that bring no names.

    Raises: UsageError for an unknown suffix; OutputError where nothing can be written;
    MissingExtraError without OpenCV (at the first frame; never for `.jsonl`).
    """
    text, path = str(path), Path(path)
    if "\0" in text:
        raise UsageError("sink: a name with a NUL byte. Check the path")
    if fps is not None and not (math.isfinite(fps) and 0 < fps <= 1000):
        raise UsageError(f"sink {text}: fps {fps} is not usable, expected above 0 up to 1000")
    if text.endswith(("/", "\\")) or os.path.isdir(path):  # a name that cannot exist is no folder
        return pictures.FolderSink(path, labels)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return JsonLinesSink(path, labels)
    if suffix == ".mp4":
        return VideoSink(path, fps, labels)
    if suffix in pictures.SUFFIXES:
        return pictures.PictureSink(path, labels)
    known = (".jsonl", ".mp4", *pictures.SUFFIXES)
    shown = repr(path.suffix) if path.suffix else "no suffix"
    raise UsageError(
        f"sink {text}: cannot tell what to write from {shown}. {did_you_mean(suffix, known)} "
        "End a folder's name with '/'"
    )
