"""Reads a source until it ends or the stream stops."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from edgekit.runtime.frames import Frame
from edgekit.runtime.metrics import Metrics
from edgekit.runtime.sources import Source


class Watch:
    """Iterates over the frames of `source`, looking at `stop` ten times a second."""

    def __init__(self, source: Source, metrics: Metrics, camera: str, stop: threading.Event) -> None:
        self._source = source
        self._stop = stop

    def __iter__(self) -> Iterator[Frame]:
        while not self._stop.is_set():
            try:
                frame = self._source.read(0.1)
            except TimeoutError:
                continue
            if frame is None:
                return
            yield frame

    def close(self) -> None:
        self._source.close()
