"""Where frames come from: cameras, network streams, recordings, videos, pictures and the synthetic world."""

from __future__ import annotations

import difflib
import glob
import importlib
import itertools
import re
import urllib.parse
from pathlib import Path

from edgekit import picture
from edgekit.errors import UsageError, did_you_mean, printable
from edgekit.picture import read_picture
from edgekit.runtime.sources import pictures, video
from edgekit.runtime.sources.base import Source, split_uri

__all__ = ["Source", "open_source", "read_picture"]

SCHEMES = {
    "file": "",
    "synthetic": "synthetic.SyntheticSource",
    "v4l2": "v4l2.V4l2Source",
    "gst": "gst.GstSource",
    "csi": "gst.GstSource",
    "usb": "gst.GstSource",
    "rtsp": "gst.GstSource",
    "rtsps": "gst.GstSource",
    "replay": "replay.ReplaySource",
    "faulty": "faulty.FaultySource",
}
"""Scheme -> class in this folder, made with (uri, limit)."""
_MAX_NAMES = 2000
"""Names in a folder that are compared with a mistyped one."""


def open_source(uri: str | Path, *, limit: int | None = None) -> Source:
    """Open frames by path or URI; `limit` ends the source after so many frames.

    A picture file (one frame), a folder of pictures (sorted naturally, subfolders not searched),
    a glob pattern of pictures (quote it from the shell), a video file, `file:///...`, or
    `synthetic://street?seed=0&frames=300&size=640x360&fps=30`, `v4l2:/dev/video0?size=&format=&fps=&io=`,
    `gst:PIPELINE`, `csi:0`, `usb:0`, `rtsp://...`, `replay:FILE.mcap`,
    `faulty:PLAN|SOURCE` (a source with faults put in on purpose).

    Raises: UsageError for what is missing, unreadable or unknown; MissingExtraError without OpenCV.
    """
    text = printable(uri)
    # one letter before a colon is a drive, and a plain path may hold a colon: only `://` makes an unknown scheme
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(//)?", text) if isinstance(uri, str) else None
    scheme = found[1].lower() if found else ""
    if scheme not in SCHEMES and found and found[2]:
        raise UsageError(
            f"source {text}: unknown scheme {scheme!r}. {did_you_mean(scheme, SCHEMES)} "
            "A path to a picture, folder or video works too"
        )
    if SCHEMES.get(scheme) and not (scheme == "synthetic" and found and not found[2]):
        module, _, name = SCHEMES[scheme].partition(".")
        source: Source = getattr(importlib.import_module(f"edgekit.runtime.sources.{module}"), name)(
            text, limit
        )
        return source
    return _open_path(_file_path(str(uri)) if found and found[2] else Path(uri), text, limit)


def _file_path(uri: str) -> Path:
    parts = split_uri(uri)
    if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
        raise UsageError(
            f"source {printable(uri)}: not a local file, expected file:///path. Give the plain path"
        )
    return Path(urllib.parse.unquote(parts.path))


def _open_path(path: Path, uri: str, limit: int | None) -> Source:
    try:
        if path.is_dir():
            return pictures.open_folder(path, uri, limit)
        if path.is_file():
            return _open_file(path, uri, limit)
        if path.exists():
            raise UsageError(f"source {uri}: neither a file nor a folder. Give a picture, folder or video")
        if glob.has_magic(str(path)):
            return pictures.open_pattern([Path(p) for p in glob.glob(str(path), recursive=True)], uri, limit)
    except (OSError, ValueError) as error:  # a name too long, with a NUL, in a folder we may not enter
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"source {uri}: {reason}. Check the path") from None
    raise UsageError(f"source {uri}: no such file or folder. {_near(path) or 'Check the path'}")


def _near(path: Path) -> str:
    """A file of nearly that name beside `path`."""
    try:
        names = [p.name for p in itertools.islice(path.parent.iterdir(), _MAX_NAMES)]
    except (OSError, ValueError):  # no folder, or one that we may not list
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"Did you mean {close[0]!r}?" if close else ""


def _open_file(path: Path, uri: str, limit: int | None) -> Source:
    if path.suffix.lower() in video.SUFFIXES:
        return video.VideoSource(uri, path, limit)
    if path.suffix.lower() in picture.SUFFIXES:
        return pictures.OnePicture(uri, path, limit)
    with path.open("rb") as file:  # no telling suffix: let the content decide
        still = picture.kind_of(file.read(16))
    return pictures.OnePicture(uri, path, limit) if still else video.VideoSource(uri, path, limit)
