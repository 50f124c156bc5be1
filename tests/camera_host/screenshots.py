"""The pictures of docs/live.md: `python -m tests.camera_host.screenshots docs/images`.

The shipped detector on two synthetic streets; one of the cameras is pulled out for the second picture.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from pathlib import Path

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

    def read(self, source: SyntheticSource, timeout_s: float | None) -> Frame | None:
        if self.now and source.uri == self.uri:
            raise SourceLost("VIDIOC_DQBUF: No such device")
        return self._read(source, timeout_s)


def shoot(url: str, path: Path, width: int, height: int, scale: float, dark: bool, wait_s: float) -> None:
    with (
        tempfile.TemporaryDirectory() as profile,
        Chromium(Path(profile), width, height, scale, dark) as browser,
    ):
        browser.open(url)
        browser.wait_for("document.querySelector('#status').textContent === 'Live'")
        browser.value(f"new Promise((resolve) => setTimeout(resolve, {1000 * wait_s}))")
        browser.screenshot(path)
        assert browser.log == [], browser.log


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
                shoot(sink.url, folder / "live-desktop.png", 1200, 780, 1, False, 4)
                shoot(sink.url, folder / "live-phone.png", 390, 844, 1.25, False, 4)
            else:
                unplugged.now = True
                shoot(sink.url, folder / "live-lost.png", 1200, 780, 1, True, 4)
            stream.stop()
            thread.join(20)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
