"""Still pictures: one file, a folder or a glob pattern."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgekit.errors import MissingExtraError, UsageError
from edgekit.picture import SUFFIXES, read_picture
from edgekit.pixels import Pixels
from edgekit.runtime.frames import Frame
from edgekit.runtime.sources.base import Source


def natural_key(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key under which `frame2.png` comes before `frame10.png`, whole paths compared."""
    parts = re.split(r"([0-9]+)", str(path).casefold())
    return [(1, int(p), "") if p.isdigit() and p.isascii() else (0, 0, p) for p in parts], str(path)


def is_picture(path: Path) -> bool:
    """By its suffix; hidden files are none (`._a.jpg`, which macOS leaves behind)."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


class PictureSource(Source):
    """Pictures in the given order, `pts_ns` 0. An unreadable one goes to `skipped`; its `seq` is left out."""

    def __init__(self, uri: str, paths: Sequence[Path], limit: int | None = None, ignored: int = 0) -> None:
        super().__init__(uri, limit)
        self._paths = paths
        self._next = 0
        self.ignored = ignored
        self._expect(len(paths))

    def _read(self, timeout_s: float | None) -> Frame | None:
        while self._next < len(self._paths):
            seq, path = self._next, self._paths[self._next]
            self._next += 1
            try:
                image = read_picture(path)
            except MissingExtraError:
                raise
            except UsageError as error:
                if len(self._paths) == 1:
                    raise
                self.skipped.append((str(path), str(error)))
                continue
            return Frame(Pixels.bgr(image), seq, 0, time.monotonic_ns(), str(path))
        if not self._delivered:
            count, first = len(self._paths), self.skipped[0][1]
            raise UsageError(f"source {self.uri}: none of its {count} pictures can be read; first {first}")
        return None


class OnePicture(PictureSource):
    """A single file, decoded when opened so that a bad one is refused at once."""

    def __init__(self, uri: str, path: Path, limit: int | None = None) -> None:
        super().__init__(uri, [path], limit)
        self._image: np.ndarray | None = read_picture(path)
        self.size = (self._image.shape[1], self._image.shape[0])

    def _read(self, timeout_s: float | None) -> Frame | None:
        image, self._image = self._image, None
        if image is None:
            return None
        return Frame(Pixels.bgr(image), 0, 0, time.monotonic_ns(), str(self._paths[0]))


def open_folder(folder: Path, uri: str, limit: int | None = None) -> PictureSource:
    """The pictures directly inside `folder`, sorted naturally. Raises: UsageError when there are none."""
    try:
        files = [p for p in folder.iterdir() if p.is_file()]
    except OSError as error:
        raise UsageError(f"source {uri}: {error.strerror}. Check the folder") from None
    return _from_files(files, uri, limit, "in this folder (subfolders are not searched)")


def open_pattern(files: list[Path], uri: str, limit: int | None = None) -> PictureSource:
    """The pictures among `files`, which a glob pattern found."""
    return _from_files([p for p in files if p.is_file()], uri, limit, "that the pattern matches")


def _from_files(files: list[Path], uri: str, limit: int | None, where: str) -> PictureSource:
    pictures = sorted(filter(is_picture, files), key=natural_key)
    if not pictures:
        raise UsageError(
            f"source {uri}: no picture {where}, expected {' '.join(SUFFIXES)}, got {len(files)} other files. "
            "Give one video file or a folder of pictures"
        )
    return PictureSource(uri, pictures, limit, ignored=len(files) - len(pictures))
