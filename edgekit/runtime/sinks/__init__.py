"""Where results go: JSON lines, annotated pictures and videos."""

from __future__ import annotations

import math
import os
from pathlib import Path

from edgekit.errors import OutputError, UsageError, did_you_mean, printable
from edgekit.runtime.sinks import pictures
from edgekit.runtime.sinks.base import Sink
from edgekit.runtime.sinks.jsonl import JsonLinesSink
from edgekit.runtime.sinks.video import VideoSink

__all__ = ["Sink", "open_sink"]


def open_sink(path: str | Path, *, fps: float | None = None) -> Sink:
    """A sink chosen by its name.

    `.jsonl`: one line per frame. `.png .jpg .jpeg .webp .bmp`: annotated picture (numbered when
    there are several). `.mp4`: annotated video at `fps` (10 if None). A folder (named with a
    trailing slash, or existing): one annotated picture per frame; missing folders are made.

    Raises: UsageError for an unknown suffix; OutputError where nothing can be written;
    MissingExtraError without OpenCV (at the first frame; never for `.jsonl`).
    """
    text, path = str(path), Path(path)
    name = printable(text)
    if not text or "\0" in text:
        raise UsageError(f"sink '{name}': no usable path. Give a file or a folder")
    if fps is not None and not (math.isfinite(fps) and 0 < fps <= 1000):
        raise UsageError(f"sink {name}: fps {fps} is not usable, expected above 0 up to 1000")
    suffix = path.suffix.lower()
    known = (".jsonl", ".mp4", *pictures.SUFFIXES)
    if text.endswith(("/", "\\")):
        return pictures.FolderSink(path)
    if os.path.isdir(path):
        if suffix in known:  # more likely a mistake than a folder of pictures
            raise OutputError(f"sink {name}: a folder of that name is there. Choose another name, or add '/'")
        return pictures.FolderSink(path)
    if suffix == ".jsonl":
        return JsonLinesSink(path)
    if suffix == ".mp4":
        return VideoSink(path, fps)
    if suffix in pictures.SUFFIXES:
        return pictures.PictureSink(path)
    shown = repr(path.suffix) if path.suffix else "no suffix"
    raise UsageError(
        f"sink {name}: cannot tell what to write from {shown}. {did_you_mean(suffix, known)} "
        "End a folder's name with '/'"
    )
