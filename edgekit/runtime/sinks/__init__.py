"""Where results go: JSON lines, annotated pictures and videos, recordings, metrics, a live page."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from pathlib import Path

from edgekit.errors import OutputError, UsageError, did_you_mean, printable
from edgekit.runtime.sinks import pictures
from edgekit.runtime.sinks.base import Sink
from edgekit.runtime.sinks.jsonl import JsonLinesSink
from edgekit.runtime.sinks.video import VideoSink

__all__ = ["Sink", "open_sink"]

SCHEMES = {
    "view": "live.LiveSink",
    "prometheus": "prometheus.PrometheusSink",
    "rerun": "rerun.RerunSink",
}
"""Scheme -> class in this folder, made with the text behind the colon (an address, a file)."""
SUFFIX_SINKS = {".mcap": "mcap.McapSink"}
"""Suffix -> class in this folder, made with the path."""


def _load(place: str) -> Callable[..., Sink]:
    module, _, name = place.partition(".")
    found: Callable[..., Sink] = getattr(importlib.import_module(f"edgekit.runtime.sinks.{module}"), name)
    return found


def open_sink(path: str | Path, *, fps: float | None = None) -> Sink:
    """A sink chosen by its name.

    `.jsonl`: one line per frame. `.png .jpg .jpeg .webp .bmp`: annotated picture (numbered when
    there are several). `.mp4`: annotated video at `fps` (10 if None). A folder (named with a
    trailing slash, or existing): one annotated picture per frame; missing folders are made.
    `.mcap`, `.mcap?images=jpeg`: a recording (frames, results, metrics) that `replay:` plays. `view:[HOST]:PORT`: a live page.
    `prometheus:[HOST]:PORT`: metrics over HTTP. `rerun:FILE.rrd` or `rerun:`: the Rerun viewer.

    Raises: UsageError for an unknown suffix; OutputError where nothing can be written;
    MissingExtraError without OpenCV (at the first frame; never for `.jsonl`).
    """
    text, path = str(path), Path(path)
    name = printable(text)
    if not text or "\0" in text:
        raise UsageError(f"sink '{name}': no usable path. Give a file or a folder")
    if fps is not None and not (math.isfinite(fps) and 0 < fps <= 1000):
        raise UsageError(f"sink {name}: fps {fps} is not usable, expected above 0 up to 1000")
    scheme, colon, rest = text.partition(":")
    if colon and scheme in SCHEMES:
        return _load(SCHEMES[scheme])(rest)
    if ".mcap?" in text.lower():  # options of a recording
        return _load("mcap.open_recording")(text)
    suffix = path.suffix.lower()
    known = (".jsonl", ".mp4", *SUFFIX_SINKS, *pictures.SUFFIXES)
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
    if suffix in SUFFIX_SINKS:
        return _load(SUFFIX_SINKS[suffix])(path)
    if suffix in pictures.SUFFIXES:
        return pictures.PictureSink(path)
    shown = repr(path.suffix) if path.suffix else "no suffix"
    raise UsageError(
        f"sink {name}: cannot tell what to write from {shown}. {did_you_mean(suffix, known)} "
        "End a folder's name with '/'"
    )
