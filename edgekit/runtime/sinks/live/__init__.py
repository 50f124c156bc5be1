"""The live page: `view::8080` shows what a stream sees and how it fares, in a browser beside the robot."""

from __future__ import annotations

import time
from importlib import resources
from pathlib import Path

from edgekit.optional import load_cv2
from edgekit.runtime.metrics import Metrics
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks.base import Sink
from edgekit.runtime.sinks.http import Reply, Route, Server
from edgekit.runtime.sinks.live import rig_picture
from edgekit.runtime.sinks.live.hub import Hub
from edgekit.runtime.sinks.live.picture import describe, encode, encode_image
from edgekit.runtime.sinks.prometheus import metrics_reply
from edgekit.runtime.sinks.rigs import rig_of

__all__ = ["LiveSink"]

PICTURES_S = 15.0
"""Pictures per second that are encoded for each view, at most."""
SHARE = 0.2
"""Of one core that encoding may take."""
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/plots.js": ("plots.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


class LiveSink(Sink):
    """Serves the live page at `address` (`:8080` is loopback), its data at `/stream` and `/metrics`.

    Pictures are encoded in `write`, up to `PICTURES_S` of each camera and only while a page is open; it
    holds no frame afterwards. Pages never slow the stream: each has the newest picture waiting, or none.

    url: what to open, with the token that an address other than loopback needs.
    Raises: UsageError for an address that is none; OutputError where it cannot listen;
    MissingExtraError without OpenCV.
    """

    def __init__(self, address: str) -> None:
        load_cv2("show pictures on the live page")
        super().__init__(Path(f"view:{address}"))
        self._hub = Hub()
        self._due: dict[tuple[str, str], float] = {}
        routes: dict[str, Route] = {path: _file(*entry) for path, entry in _FILES.items()}
        routes["/stream"] = self._hub.reply
        routes["/metrics"] = lambda: metrics_reply(self._hub.metrics)
        self._server = Server(f"view:{address}", address, routes)
        self.url = self._server.url

    def start(self, metrics: Metrics) -> None:
        self._hub.metrics = metrics

    def _write(self, item: StreamResult) -> None:
        self._hub.count(item)
        if not self._hub.watched:
            return
        view = (item.camera, item.engine)
        began = time.monotonic()
        due = self._due.get(view, 0.0)
        if began < due:
            return
        rig = rig_of(item)
        if rig is None:
            self._hub.show(item, describe(item), encode(item.frame))
        else:
            place = rig_picture.compose(rig)
            values = rig_picture.describe(item, rig, place)
            self._hub.show(item, values, encode_image(place.canvas, max(place.canvas.shape)))
        # from when it was due, so that the rate is kept between frames that do not divide it
        spent = time.monotonic() - began
        every = max(1 / PICTURES_S, spent * len(self._due or (view,)) / SHARE)
        self._due[view] = max(due + every, began)

    def _finish(self) -> None:
        self._hub.close()
        self._server.close()

    def _drop(self) -> None:
        self._finish()


def _file(name: str, content_type: str) -> Route:
    body = resources.files(__package__ or __name__).joinpath(name).read_bytes()
    return lambda: Reply(body, content_type)
