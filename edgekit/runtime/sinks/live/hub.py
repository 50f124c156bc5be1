"""Between the stream and the pages that watch it: the newest picture of each view, and the last minute.

A page reads one endless reply, `/stream`: messages of two lengths (big-endian uint32), so many bytes of
JSON and so many of JPEG. `kind` in the JSON is `picture` (picture.describe or rig_picture.describe, with `at`: seconds of the
stream), `state` (Metrics.snapshot, with `minute` and `ledger` by engine), twice a second, or `end`.
"""

from __future__ import annotations

import json
import secrets
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from edgekit.runtime.frames import Hop
from edgekit.runtime.metrics import Metrics
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks.http import Reply

CLIENTS = 8
"""Pages at a time."""
STATE_S = 0.5
"""From one `state` to the next, and the width of a bin."""
BINS = 120
"""A minute of them."""
RECENT_BINS = 10
"""Of which the means by stage are taken: 5 s."""

View = tuple[str, str]


class Bin:
    """Results of one engine within half a second; times in nanoseconds."""

    __slots__ = ("count", "largest", "least", "number", "stages", "total")

    def __init__(self, number: int) -> None:
        self.number = number
        self.count = self.total = self.largest = 0
        self.least = -1
        self.stages: dict[str, int] = {}

    def add(self, item: StreamResult) -> None:
        age = item.age_ns
        self.count += 1
        self.total += age
        self.largest = max(self.largest, age)
        self.least = age if self.least < 0 else min(self.least, age)
        for stage, ns in item.stage_ns.items():
            self.stages[stage] = self.stages.get(stage, 0) + ns
        self.stages["unaccounted"] = self.stages.get("unaccounted", 0) + max(0, item.unaccounted_ns)


class Engine:
    """What the pages want of one engine beyond its metrics."""

    def __init__(self) -> None:
        self.bins: deque[Bin] = deque(maxlen=BINS)
        self.hops: tuple[Hop, ...] = ()

    def minute(self, now: int) -> dict[str, Any]:
        """bins: [half seconds ago, least, mean, largest age in ms, results], oldest first; stages: mean
        ms of the last 5 s, in order. `now`: number of the current bin."""
        bins = [
            [now - b.number, *(round(ns / 1e6, 2) for ns in (b.least, b.total / b.count, b.largest)), b.count]
            for b in self.bins
            if now - b.number < BINS
        ]
        recent = [b for b in self.bins if now - b.number <= RECENT_BINS]
        count = sum(b.count for b in recent)
        stages: dict[str, float] = {}
        for b in recent:
            for stage, ns in b.stages.items():
                stages[stage] = stages.get(stage, 0) + ns / 1e6 / count
        last = stages.pop("unaccounted", 0.0)
        return {
            "bins": bins,
            "stages": [[s, round(ms, 3)] for s, ms in [*stages.items(), ("unaccounted", last)]],
        }


class Page:
    """One page that watches: what waits for it, the newest picture of each view only."""

    def __init__(self, waiting: dict[View, bytes]) -> None:
        self.waiting = waiting


class Hub:
    """Written by the sink's thread, read by one thread for each page."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self._changed = threading.Condition()
        self._pages: set[Page] = set()
        self._newest: dict[View, bytes] = {}
        self._engines: dict[str, Engine] = {}
        self._state = (0.0, b"")
        self._state_lock = threading.Lock()
        self._closed = False
        self._run = secrets.token_hex(8)
        """Tells a page that comes back whether this is still the run that it knows."""

    @property
    def watched(self) -> bool:
        """Whether any page is open."""
        return bool(self._pages)

    def count(self, item: StreamResult) -> None:
        """Note a result for the last minute and the ledger."""
        number = int(self.metrics.seconds() / STATE_S)
        with self._changed:
            engine = self._engines.setdefault(item.engine, Engine())
            engine.hops = item.hops
            if not engine.bins or engine.bins[-1].number != number:
                engine.bins.append(Bin(number))
            engine.bins[-1].add(item)

    def show(self, item: StreamResult, values: dict[str, Any], jpeg: bytes) -> None:
        """Give a result, as `picture.describe` has it, with its picture to every page; one that was not taken yet is
        replaced."""
        seconds = round(self.metrics.seconds(), 3)
        message = _message({"kind": "picture", "at": seconds, **values}, jpeg)
        view = (item.camera, item.engine)
        with self._changed:
            self._newest[view] = message
            for page in self._pages:
                page.waiting[view] = message
            self._changed.notify_all()

    def close(self) -> None:
        """Tell the pages that it is over; their replies end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def reply(self) -> Reply:
        """The endless reply for one more page, or 503 when there are enough."""
        with self._changed:
            if len(self._pages) >= CLIENTS:
                text = f"{CLIENTS} pages are open already: close one\n"
                return Reply(text.encode(), status=503, headers={"Retry-After": "2"})
            page = Page(dict(self._newest))
            self._pages.add(page)
        return Reply(self._messages(page), "application/octet-stream", done=lambda: self._leave(page))

    def _leave(self, page: Page) -> None:
        with self._changed:
            self._pages.discard(page)

    def _messages(self, page: Page) -> Iterator[bytes]:
        due = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: page.waiting or self._closed, max(0.0, due - time.monotonic()))
                closed = self._closed
                view = next(iter(page.waiting), None)
                picture = page.waiting.pop(view) if view is not None else b""
            if picture:
                yield picture
            if closed or time.monotonic() >= due:
                due = time.monotonic() + STATE_S
                yield self._state_message()
            if closed:
                yield _message({"kind": "end"})
                return

    def _state_message(self) -> bytes:
        """Made once for all pages: percentiles are sorted for it."""
        with self._state_lock:
            now = time.monotonic()
            if now - self._state[0] > 0.8 * STATE_S or self._closed:
                self._state = (now, _message(self._state_values()))
            return self._state[1]

    def _state_values(self) -> dict[str, Any]:
        values = self.metrics.snapshot()
        number = int(values["seconds"] / STATE_S)
        with self._changed:
            minute = {name: engine.minute(number) for name, engine in self._engines.items()}
            ledger = {name: [vars(hop) for hop in engine.hops] for name, engine in self._engines.items()}
        return {"kind": "state", "run": self._run, **values, "minute": minute, "ledger": ledger}


def _message(values: dict[str, Any], jpeg: bytes = b"") -> bytes:
    text = json.dumps(values, separators=(",", ":")).encode()
    return struct.pack(">II", len(text), len(jpeg)) + text + jpeg
