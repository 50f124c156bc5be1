"""A sink in a thread of its own, so that a slow disk or viewer never holds up perception."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import replace

from edgekit.errors import EdgekitError, OutputError, printable
from edgekit.runtime.frames import Lease
from edgekit.runtime.health import Burst
from edgekit.runtime.mailbox import Closed, Mailbox
from edgekit.runtime.metrics import Metrics
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks.base import Sink

JOIN_S = 5.0
"""How long the end of a stream waits for a sink's last write."""
_QUIET = 30
"""Results taken in time after which the next one that is not is a new fault."""


class Outlet:
    """Feeds one sink. wait: hand every result over (files); otherwise a busy sink misses results, counted.
    stop: ends the waiting.

    error: what the sink raised; it gets nothing more after that.
    """

    def __init__(
        self, sink: Sink, name: str, metrics: Metrics, *, wait: bool, stop: threading.Event | None = None
    ) -> None:
        self.sink = sink
        self.name = name
        self.error: BaseException | None = None
        self._metrics = metrics
        self._wait = wait
        self._box: Mailbox[StreamResult] = Mailbox([name], newest=False, capacity=1, stop=stop)
        self._held: list[StreamResult] = []
        """One in work, one more waiting; files: and those for which there is no place yet."""
        self._blocked = Burst(_QUIET)
        self._over = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"edgekit-sink-{name}", daemon=True)
        metrics.sink_state(name, "running")
        self._thread.start()

    def leases(self, camera: str) -> set[Lease]:
        """The buffers of that camera that it holds."""
        if not self.sink.needs_pixels:
            return set()
        with self._lock:
            frames = [item.frame for item in self._held]
        return {lease for f in frames if f.camera == camera and (lease := f.lease) is not None}

    def give(self, item: StreamResult, *, may_lease: bool = True) -> None:
        """Hand over a result; the item stays the caller's. may_lease: a camera buffer can be spared."""
        if self.error is not None:
            return
        own: StreamResult | None = None
        with self._lock:  # several engines may give at the same time
            if self._wait or (len(self._held) < 2 and (may_lease or not self.sink.needs_pixels)):
                own = self._copy(item)
                self._held.append(own)
            blocked = self._blocked.begins(own is None)
        if blocked:
            self._metrics.fault(self.name, "sink-blocked", "does not take the next result in time")
        if own is None:
            self._metrics.sink_dropped(self.name)
            return
        refused = self._box.put(self.name, own)
        if refused is not None:
            self._let_go(refused)

    def _copy(self, item: StreamResult) -> StreamResult:
        return item.share() if self.sink.needs_pixels else replace(item, frame=item.frame.without_pixels())

    def _let_go(self, item: StreamResult) -> None:
        with self._lock:
            self._held.remove(item)
        item.frame.release()

    def _run(self) -> None:
        try:
            while True:
                item = self._box.take()
                assert item is not None
                try:
                    started = time.monotonic_ns()
                    self.sink.write(item)
                    self._metrics.sink_wrote(self.name, time.monotonic_ns() - started)
                finally:
                    self._let_go(item)
        except Closed:
            with self._lock:
                self._over = True
                abandoned = self.error is not None
            if abandoned:  # nobody waits for us any more
                with suppress(Exception):
                    self.sink.abort()
        except BaseException as error:  # noqa: BLE001 - kept for the stream, which raises or reports it
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self._metrics.sink_state(self.name, "failed")
        text = str(error) if isinstance(error, EdgekitError) else f"{type(error).__name__}: {error}"
        self._metrics.fault(self.name, "sink-failed", printable(text))
        self._discard()
        try:
            self.sink.abort()
        except Exception as second:  # noqa: BLE001 - the first error is the one to tell
            self._metrics.fault(
                self.name, "sink-failed", f"{type(second).__name__} while dropping it: {second}"
            )

    def stop(self, *, drain: bool) -> bool:
        """End the thread, after what waits is written (`drain`) or without it. False: its write still hangs."""
        if drain:
            self._box.end(self.name)
        else:
            self._discard()
        self._thread.join(JOIN_S)
        if not self._thread.is_alive():
            return True
        with self._lock:
            if self._over:
                return True
            text = f"its last write did not end within {JOIN_S:g} s"
            self.error = self.error or OutputError(
                f"sink {printable(self.name)}: {text}. Look at what takes its results"
            )
        self._discard()
        self._metrics.sink_state(self.name, "failed")
        self._metrics.fault(self.name, "sink-blocked", text)
        return False

    def _discard(self) -> None:
        for left in self._box.close():
            self._let_go(left)

    def abandon(self) -> None:
        """Drop what is unfinished without waiting; a write that is under way does that when it returns."""
        with self._lock:
            over = self._over
            self.error = self.error or OutputError(f"sink {printable(self.name)}: interrupted. Run again")
        self._discard()
        if over:
            self.sink.abort()

    def close(self) -> None:
        """Finish the file, once its thread has ended. Raises: what the sink raises."""
        if self.error is None:
            self.sink.close()
            self._metrics.sink_state(self.name, "closed")

    def abort(self) -> None:
        """Drop what is unfinished."""
        if self.error is None:
            self.sink.abort()
            self._metrics.sink_state(self.name, "failed")
