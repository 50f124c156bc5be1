"""The pictures of docs/live.md: `python -m tests.camera_host.screenshots docs/images`.

The shipped detector on two synthetic streets; one of the cameras is pulled out for the second picture.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

import edgekit
from edgekit.runtime.faults import SourceLost
from edgekit.runtime.frames import Frame
from edgekit.runtime.sinks.live import LiveSink
from edgekit.runtime.sources.synthetic import SyntheticSource
from tests.camera_host.chromium import Chromium

STREET = "synthetic://street?live=1&frames=0&loop=60&size=1280x720&format=yuyv&fps=15&seed="
SETTLED_S = 65.0
"""After which the plot of a minute is full."""


class Unplugged:
    """Makes the street of one seed fail like a camera without its cable."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.now = False
        self._read = SyntheticSource._read
        SyntheticSource._read = lambda source, timeout_s: self.read(source, timeout_s)  # type: ignore[method-assign]

    def pull(self) -> None:
        self.now = True

    def read(self, source: SyntheticSource, timeout_s: float | None) -> Frame | None:
        if self.now and source.uri == self.uri:
            raise SourceLost("VIDIOC_DQBUF: No such device")
        return self._read(source, timeout_s)


def shoot(
    url: str,
    path: Path,
    width: int,
    height: int,
    scale: float,
    dark: bool,
    then: Callable[[], None] = lambda: None,
) -> None:
    """A page as it looks 4 s after `then` happened to it."""
    with (
        tempfile.TemporaryDirectory() as profile,
        Chromium(Path(profile), width, height, scale, dark) as browser,
    ):
        browser.open(url)
        browser.wait_for("document.querySelector('#status').textContent === 'Live'")
        browser.wait_for(
            "document.querySelectorAll('.view .over[hidden]').length === document.querySelectorAll('.view').length"
        )
        then()
        browser.value("new Promise((resolve) => setTimeout(resolve, 4000))")
        browser.screenshot(path)
        if path.stat().st_size > 280_000:
            shrink(path)
        assert browser.log == [], browser.log


def shrink(path: Path) -> None:
    """Levels in steps of 4, which nobody sees and PNG packs in two thirds of the bytes."""
    picture = cv2.imread(str(path)).astype(np.float32)
    cv2.imwrite(
        str(path),
        np.minimum(4 * np.round(picture / 4), 255).astype(np.uint8),
        [cv2.IMWRITE_PNG_COMPRESSION, 9],
    )


def main(folder: Path) -> None:
    unplugged = Unplugged(STREET + "5")
    bundle = edgekit.app_bundle("detect")

    def run(stream: edgekit.Stream) -> None:
        for _ in stream:
            pass

    for name, cameras in (("one", ["front"]), ("two", ["front", "rear"])):
        sink = LiveSink(":0")
        sources = {camera: STREET + seed for camera, seed in zip(cameras, ("3", "5"), strict=False)}
        with edgekit.stream(bundle, sources, sinks=[sink], score_threshold=0.4, threads=1) as stream:
            thread = threading.Thread(target=run, args=(stream,))
            thread.start()
            time.sleep(SETTLED_S if name == "one" else 20)
            if name == "one":
                shoot(sink.url, folder / "live-desktop.png", 1200, 780, 1, False)
                shoot(sink.url, folder / "live-phone.png", 390, 844, 1.25, False)
            else:
                shoot(sink.url, folder / "live-lost.png", 1200, 780, 1, True, unplugged.pull)
            stream.stop()
            thread.join(20)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
