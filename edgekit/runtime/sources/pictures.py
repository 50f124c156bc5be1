"""Still pictures: one file, a folder or a glob pattern."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgekit.errors import MissingExtraError, UsageError
from edgekit.optional import load_cv2, quiet
from edgekit.runtime.frames import Frame
from edgekit.runtime.sources.base import Source, check_size, printable
from edgekit.runtime.sources.header import SUFFIXES, HeaderError, read_header

_MAX_BYTES = 1 << 29


def read_picture(path: str | Path) -> np.ndarray:
    """Decode a picture file to uint8 BGR [height, width, 3].

    EXIF orientation is applied; grey is repeated over the channels; 16-bit is scaled to 8 (value
    / 256); an alpha channel is dropped, not blended; CMYK is converted; of a file with several
    pages the first is read. The kind is told by content, not by suffix.

    Raises: UsageError for a file that is missing, empty, truncated, no picture or too large
    (16384 pixels a side, 200 megapixels, 512 MiB; checked before decoding). Damage inside a JPEG
    that keeps its structure cannot be seen: the format has no checksum.
    """
    path, name = Path(path), printable(path)
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"picture {name}: not a regular file. Give a picture file")
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"picture {name}: larger than {_MAX_BYTES >> 20} MiB. Give a smaller file")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"picture {name}: {reason}. Check the path") from None
    try:
        return decode_picture(data)
    except ValueError as error:
        raise UsageError(f"picture {name}: {error}. Replace the file") from None


def decode_picture(data: bytes) -> np.ndarray:
    """As `read_picture`, from the bytes of a file. Raises: ValueError, its text is the reason."""
    if not data:
        raise HeaderError("the file is empty")
    header = read_header(data)
    problem = check_size(header.width, header.height)
    if problem:
        raise HeaderError(problem)
    if not header.whole:
        raise HeaderError(f"truncated: the end of the {header.kind} data is missing")
    cv2 = load_cv2("read pictures")
    with quiet(cv2):
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error:  # a header that the decoder refuses, or no memory
            image = None
    if image is None:
        raise HeaderError(f"damaged or unsupported {header.kind} data")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise HeaderError(f"decodes to {image.dtype} {list(image.shape)}, expected 8-bit colour")
    return np.asarray(image)


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

    def _read(self) -> Frame | None:
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
            return Frame(image, seq, 0, time.monotonic_ns(), str(path))
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

    def _read(self) -> Frame | None:
        image, self._image = self._image, None
        return None if image is None else Frame(image, 0, 0, time.monotonic_ns(), str(self._paths[0]))


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
