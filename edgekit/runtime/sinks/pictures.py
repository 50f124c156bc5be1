"""Annotated pictures: one file, numbered files, or a folder of them."""

from __future__ import annotations

import os
from pathlib import Path

from edgekit.errors import OutputError, printable
from edgekit.optional import load_cv2, quiet
from edgekit.runtime.frames import Frame
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks.base import (
    Sink,
    failure,
    make_parent,
    refuse_overwriting,
    temporary,
    write_whole,
)
from edgekit.runtime.sources.pictures import is_picture
from edgekit.tasks import Result

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def _encode(path: Path, frame: Frame, result: Result) -> bytes:
    """The annotated frame in the format of `path`. Raises: OutputError."""
    cv2 = load_cv2("write pictures")
    image = result.draw(frame.image)
    with quiet(cv2):
        try:
            ok, data = cv2.imencode(path.suffix.lower(), image)
        except cv2.error:
            ok = False
    if not ok:
        raise OutputError(
            f"sink {printable(path)}: {frame.width}x{frame.height} pixels cannot be stored as "
            f"{path.suffix}. Write .png"
        )
    return bytes(data.tobytes())


def _refuse_among_sources(path: Path, frame: Frame) -> None:
    """Raises: OutputError for a file that is there already, in the folder the pictures come from:
    it is a source of an earlier or later frame, or an output that the next run would read."""
    source = Path(frame.source)
    try:
        taken = is_picture(source) and path.exists() and path.parent.samefile(source.parent)
    except (OSError, ValueError):
        return
    if taken:
        raise OutputError(
            f"sink {printable(path)}: is there already, among the source's pictures. Write to another folder"
        )


class PictureSink(Sink):
    """The annotated frame at exactly `path`, when closed. When more follow, all are numbered as they
    come: name_000001.png and on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._only = temporary(path)
        """Where the first frame waits: whether it is the only one is known at the end."""
        make_parent(path)

    def _write(self, item: StreamResult) -> None:
        frame, result = item.frame, item.result
        if self.written == 0:
            refuse_overwriting(self.path, frame)
            write_whole(self._only, _encode(self.path, frame, result), self.path)
            return
        number = self.written + 1
        for path in [self._numbered(n) for n in ((1, 2) if number == 2 else (number,))]:
            refuse_overwriting(path, frame)
            _refuse_among_sources(path, frame)
        if number == 2:
            self._rename(self._numbered(1))
        write_whole(self._numbered(number), _encode(self.path, frame, result))

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.stem}_{number:06d}{self.path.suffix}")

    def _rename(self, path: Path) -> None:
        try:
            os.replace(self._only, path)
        except OSError as error:
            self._drop()
            raise failure(path, error) from None

    def _finish(self) -> None:
        if self.written == 1:
            self._rename(self.path)

    def _drop(self) -> None:
        self._only.unlink(missing_ok=True)


class FolderSink(Sink):
    """One annotated picture per frame in a folder, named as its source.

    A picture file keeps its name (.png where its kind cannot be written); frames of a video or a
    world become `<stem>_<seq>.png`; a second file of one name gets `_2`, `_3` and on.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._used: set[str] = set()
        make_parent(path)
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise failure(path, error) from None

    def _write(self, item: StreamResult) -> None:
        frame, result = item.frame, item.result
        path = self.path / self._name(frame)
        refuse_overwriting(path, frame)
        _refuse_among_sources(path, frame)
        write_whole(path, _encode(path, frame, result))

    def _name(self, frame: Frame) -> str:
        source = Path(frame.source.partition("?")[0]) if "://" in frame.source else Path(frame.source)
        suffix = ".png"
        stem = source.stem or "frame"
        if is_picture(source) and "://" not in frame.source:
            suffix = source.suffix if source.suffix.lower() in SUFFIXES else suffix
        else:
            stem = f"{frame.camera or stem}_{frame.seq:06d}"
            if frame.camera:  # from a stream: unique with the epoch, after which the numbers may begin anew
                return f"{stem}_{frame.epoch}{suffix}" if frame.epoch else stem + suffix
        name, number = stem + suffix, 1
        while name.casefold() in self._used:
            number += 1
            name = f"{stem}_{number}{suffix}"
        self._used.add(name.casefold())
        return name
