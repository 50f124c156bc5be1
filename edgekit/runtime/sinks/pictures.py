"""Annotated pictures: one file, numbered files, or a folder of them."""

from __future__ import annotations

import os
from pathlib import Path

from edgekit.errors import OutputError
from edgekit.optional import load_cv2, quiet
from edgekit.runtime.frames import Frame
from edgekit.runtime.sinks.base import Sink, failure, make_parent, refuse_overwriting, write_whole
from edgekit.runtime.sources.pictures import is_picture
from edgekit.tasks.detect.detections import Detections
from edgekit.tasks.detect.draw import draw

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def _write_picture(path: Path, frame: Frame, detections: Detections) -> None:
    cv2 = load_cv2("write pictures")
    refuse_overwriting(path, frame)
    image = draw(frame.image, detections)
    with quiet(cv2):
        try:
            ok, data = cv2.imencode(path.suffix.lower(), image)
        except cv2.error:
            ok = False
    if not ok:
        raise OutputError(
            f"sink {path}: {frame.width}x{frame.height} pixels cannot be stored as {path.suffix}. Write .png"
        )
    write_whole(path, data.tobytes())


class PictureSink(Sink):
    """The annotated frame at exactly `path`. When more follow, all are numbered: name_000001.png and on."""

    def __init__(self, path: Path, labels: tuple[str, ...] = ()) -> None:
        super().__init__(path, labels)
        make_parent(path)

    def _write(self, frame: Frame, detections: Detections, age_ms: float) -> None:
        if self.written == 0:
            _write_picture(self.path, frame, detections)
        else:
            if self.written == 1:
                try:
                    os.replace(self.path, self._numbered(1))
                except OSError as error:
                    raise failure(self.path, error) from None
            _write_picture(self._numbered(self.written + 1), frame, detections)

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.stem}_{number:06d}{self.path.suffix}")

    def close(self) -> None:
        """Every picture is whole already."""


class FolderSink(Sink):
    """One annotated picture per frame in a folder, named as its source.

    A picture file keeps its name (.png where its kind cannot be written); frames of a video or a
    world become `<stem>_<seq>.png`; a second file of one name gets `_2`, `_3` and on.
    """

    def __init__(self, path: Path, labels: tuple[str, ...] = ()) -> None:
        super().__init__(path, labels)
        make_parent(path / "any")
        self._used: set[str] = set()

    def _write(self, frame: Frame, detections: Detections, age_ms: float) -> None:
        _write_picture(self.path / self._name(frame), frame, detections)

    def _name(self, frame: Frame) -> str:
        source = Path(frame.source.partition("?")[0]) if "://" in frame.source else Path(frame.source)
        suffix = ".png"
        stem = source.stem or "frame"
        if is_picture(source) and "://" not in frame.source:
            suffix = source.suffix if source.suffix.lower() in SUFFIXES else suffix
        else:
            stem = f"{stem}_{frame.seq:06d}"
        name, number = stem + suffix, 1
        while name.casefold() in self._used:
            number += 1
            name = f"{stem}_{number}{suffix}"
        self._used.add(name.casefold())
        return name

    def close(self) -> None:
        """Every picture is whole already."""
