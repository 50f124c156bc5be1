"""The watchdog of one source: reads it with short waits, sees what fails, opens it again.

What is noticed how soon, and what is done: `edgekit.runtime.faults`. Files have no watchdog: their errors
reach the caller as they are.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edgekit.errors import EdgekitError, MissingExtraError, StreamError
from edgekit.pixels import PixelLayout
from edgekit.runtime.faults import SourceLost
from edgekit.runtime.frames import Frame
from edgekit.runtime.health import Burst, Clock, Freeze, Pace, Sequence
from edgekit.runtime.metrics import Metrics
from edgekit.runtime.sources.base import Source

_AT_ONCE_NS, _OLD_NS = 50_000_000, 200_000_000
"""A frame that comes so soon after the first read, and is so old, had waited for it."""


@dataclass(frozen=True)
class WatchOptions:
    """When a live source counts as failed, and how it is opened again. Times in seconds.

    poll_s: longest single wait, after which a stop is seen.
    stall_s, stall_frames: no usable frame for the larger of `stall_s` and so many frame times is a stall.
    first_s: the same for the first frame after opening (network cameras wait for a key frame).
    frozen_s: the same picture for so long is a fault; 0 switches that off, for sensors of still test pictures.
    window: frames over which the rate is judged.
    quiet: frames without a drop or damage after which the next one is a new fault.
    retry_first_s, retry_s: wait before the first attempt to open it again, and between the next ones.
    patience_s: after so long the waits grow by half each time, up to `retry_most_s`.
    healthy_s: a source that ran for so long starts with the first wait again.
    give_up_s: raise to the caller when it stays lost for so long; None: never.
    wait: wait for a source that is not there at first, instead of raising at once.
    """

    poll_s: float = 0.1
    stall_s: float = 1.0
    stall_frames: float = 10
    first_s: float = 5.0
    frozen_s: float = 2.0
    window: int = 30
    quiet: int = 30
    retry_first_s: float = 0.05
    retry_s: float = 0.1
    patience_s: float = 10.0
    retry_most_s: float = 2.0
    healthy_s: float = 1.0
    give_up_s: float | None = None
    wait: bool = False


class Watch:
    """The frames of one source, for the one thread that reads it; that thread opens and closes it too.

    `read()` (or `frames()`) gives frames that are fit for use, with `camera` and `epoch` filled in, and
    keeps the camera's metrics. `busy()` may be asked from any thread.

    A driver may hang in a call, and nothing in Python ends that. So the reading thread has to be a daemon,
    and the stream waits for it with `join(thread)`, which gives up after a while and counts it.
    """

    def __init__(
        self,
        open_: Callable[[], Source] | None,
        metrics: Metrics,
        camera: str,
        *,
        stop: threading.Event,
        source: Source | None = None,
        options: WatchOptions | None = None,
    ) -> None:
        """open_: opens the source, each time anew; a source that says `again` is asked instead. None when it
        cannot be opened again (or the source says so): then a stall or a frozen picture is counted only, and a loss raised.
        source: one that is open already, which the watch closes. stop: ends reading within `poll_s`."""
        assert open_ is not None or source is not None
        self.source: Source | None = None
        """Open now; None before the first read and while it is lost."""
        self.epoch = 0
        self.trouble = ""
        """The fault for which it gives no frames now; "" while it does, or is being opened first."""
        self.options = options or WatchOptions()
        self._open = open_
        self._metrics = metrics
        self._camera = camera
        self._stop = stop
        self._call: tuple[str, float] | None = None
        self._ended = False
        self._delivered = 0
        self._limit: int | None = None
        self._health = _Health(None, self.options)
        self._freeze = Freeze(self.options.frozen_s)
        self._layout: PixelLayout | None = None
        self._known = False
        """It was open once, or `wait` is set: from now on a failure to open it is a fault."""
        self._gone_at: float | None = None
        """Since when there has been no frame, while lost."""
        self._trouble_at: float | None = None
        """When the trouble began that has not been over for `healthy_s`."""
        self._wait = 0.0
        self._resigned = False
        """A stall was counted that nothing can be done about."""
        self._why = ""
        metrics.camera_state(camera, "opening")
        if source is not None:
            self._connected(source)

    def open(self) -> Source:
        """Open it now rather than at the first `read()`.

        Raises: what opening raises, unless `wait` is set; StreamError when stopped meanwhile.
        """
        while self.source is None and not self._stop.is_set():
            self._connect()
        if self.source is None:
            raise StreamError(f"source {self._camera}: stopped before it was open. Start again")
        return self.source

    def read(self) -> Frame | None:
        """The next usable frame; None at the end of the source and when `stop` is set.

        Raises: what the source raises for good; SourceLost when it cannot be opened again or stayed lost
        for `give_up_s`.
        """
        frame = self._next()
        if frame is not None:
            self._metrics.frame(self._camera, frame)
        return frame

    def _next(self) -> Frame | None:
        """As `read`, the frame not counted yet."""
        since = time.monotonic()
        late = ""
        while not (self._ended or self._stop.is_set()):
            if self.source is None:
                self._connect()
                since = time.monotonic()
                continue
            try:
                frame = self._read(self.source)
            except TimeoutError as error:
                frame, late = None, f": {error}" if str(error) else ""
            except (SourceLost, OSError) as error:
                if not self.source.live:
                    raise
                self._lose("lost", str(error))
                continue
            if frame is not None and (not self.source.live or self._usable(frame)):
                self._delivered += 1
                self._resigned = False
                return frame
            if frame is not None:
                self._metrics.frame(self._camera, frame)
            if self.source is not None and not self._resigned and time.monotonic() - since > self._patience():
                self._lose("stalled", f"no usable frame for {time.monotonic() - since:.1f} s{late}")
                since = time.monotonic()
        return None

    def frames(self) -> Iterator[Frame]:
        """All frames until the end or `stop`; closes the source when the iteration ends, however it does."""
        try:
            while (frame := self._next()) is not None:
                yield frame
                self._metrics.frame(
                    self._camera, frame
                )  # once it is on its way: its numbers outlive its lease
        finally:
            self.close()

    def close(self) -> None:
        """Close the source; by the reading thread. Calling it again does nothing."""
        self._ended = True
        self._shut()
        self._metrics.camera_state(self._camera, "ended")

    def busy(self) -> tuple[str, float]:
        """The call into the source that has not returned (`open`, `read`, `close`, or "") and for how long,
        in seconds. From any thread."""
        call = self._call
        return (call[0], time.monotonic() - call[1]) if call else ("", 0.0)

    def join(self, thread: threading.Thread, timeout_s: float = 2.0) -> bool:
        """After `stop` was set: wait for the reading thread. False when a driver's call holds it: that is
        counted as a fault and the daemon thread is left behind; it closes the source if the call ever returns."""
        thread.join(timeout_s)
        if not thread.is_alive():
            return True
        name, seconds = self.busy()
        text = f"{name}() has not returned for {seconds:.1f} s" if name else "the reader does not end"
        self._metrics.fault(self._camera, "hung", f"{text}, its thread is left behind")
        return False

    def _read(self, source: Source) -> Frame | None:
        """One read; None at the end, which is then noted. Raises: as Source.read."""
        now = time.monotonic()
        self._call = ("read", now)
        if self._health.asked is None:
            self._health.asked = now
        try:
            frame = source.read(self.options.poll_s)
        finally:
            self._call = None
        if frame is None:
            self._ended = True
            return None
        frame.camera = self._camera
        return frame

    def _usable(self, frame: Frame) -> bool:
        """Judge a live source's frame and number its epoch. False when it was released instead."""
        metrics, camera, health = self._metrics, self._camera, self._health
        now = time.monotonic()
        if health.began is None and health.waited(frame):
            metrics.drop(camera, "stale")
            frame.release()
            return False
        if missing := health.sequence.missing(frame.seq):
            metrics.drop(camera, "driver", missing)
        if health.drops.begins(missing > 0):
            metrics.fault(camera, "dropped", f"{missing} before frame {frame.seq}")
        if health.damage.begins(frame.corrupt):
            metrics.fault(camera, "corrupt", f"frame {frame.seq}")
        if frame.corrupt:
            metrics.drop(camera, "corrupt")
            frame.release()
            return False
        if self._gone_at is not None:
            metrics.restarted(camera, f"after {now - self._gone_at:.2f} s")
            self._gone_at = None
            self.trouble = ""
        if health.began is None:
            health.began, health.epoch = now, frame.epoch
        elif self._trouble_at is not None and now - health.began > self.options.healthy_s:
            self._trouble_at = None
        changed = frame.epoch != health.epoch
        health.epoch = frame.epoch
        if health.clock.jumped(frame):
            changed = True
            metrics.fault(camera, "clock-jump", f"timestamp {frame.pts_ns / 1e9:.3f} s at frame {frame.seq}")
        if health.pace.add(frame):
            metrics.fault(camera, "slow", f"{health.pace.interval_s() * 1e3:.0f} ms from frame to frame")
        layout = frame.pixels.layout
        if layout is not self._layout and layout != self._layout:
            if self._layout is not None:
                changed = True
                metrics.fault(camera, "format-changed", f"{layout.width}x{layout.height} {layout.format}")
            self._layout = layout
        self.epoch += changed
        frame.epoch = self.epoch
        if self._freeze.seen(frame):
            if self._lose("frozen", "the same picture again and again"):
                metrics.drop(camera, "stale")
                frame.release()
                return False
            self._freeze.accept()
        return True

    def _patience(self) -> float:
        """Seconds without a usable frame that make a stall."""
        assert self.source is not None
        if not self.source.live:
            return float("inf")
        expected = self._health.pace.expected_s() if self._health.began is not None else None
        if expected is None:
            return self.options.first_s
        return max(self.options.stall_s, self.options.stall_frames * expected)

    def _lose(self, fault: str, text: str) -> bool:
        """Count a fault and close the source, to be opened again. False when that is not to be done."""
        self._metrics.fault(self._camera, fault, text)
        self._why = text
        if self._open is None:
            self._resigned = True
            if fault == "lost":
                self.close()
                raise SourceLost(f"source {self._camera}: {text}. It cannot be opened again from here")
            return False
        self._shut()
        self._down(fault)
        return True

    def _down(self, fault: str) -> None:
        now = time.monotonic()
        self.trouble = fault
        self.epoch += 1
        self._metrics.camera_state(self._camera, "lost")
        if self._gone_at is None:
            self._gone_at = now
        if self._trouble_at is None:
            self._trouble_at, self._wait = now, self.options.retry_first_s

    def _connect(self) -> None:
        """One attempt to open it, after the wait that is due."""
        if self._gone_at is not None:
            for_s = time.monotonic() - self._gone_at
            if self.options.give_up_s is not None and for_s > self.options.give_up_s:
                raise SourceLost(f"source {self._camera}: lost for {for_s:.1f} s: {self._why}")
            if self._stop.wait(self._next_wait()):
                return
        assert self._open is not None
        self._call = ("open", time.monotonic())
        try:
            source = self._open()
        except MissingExtraError:
            raise
        except (EdgekitError, OSError) as error:  # a device that is gone is also "no such file"
            if not (self._known or self.options.wait):
                raise
            self._why = str(error)
            if self._gone_at is None:
                self._metrics.fault(self._camera, "lost", self._why)
                self._down("lost")
            return
        finally:
            self._call = None
        self._connected(source)

    def _next_wait(self) -> float:
        assert self._trouble_at is not None
        options, wait = self.options, self._wait
        patient = time.monotonic() - self._trouble_at > options.patience_s
        self._wait = (
            min(max(wait, options.retry_s) * 1.5, options.retry_most_s) if patient else options.retry_s
        )
        return wait

    def _connected(self, source: Source) -> None:
        if not self._known:
            self._known, self._limit = True, source.limit
        elif self._limit is not None:  # what the first one delivered counts
            source.limit = self._limit - self._delivered
            self._ended = source.limit <= 0
        self.source = source
        self._open = (source.again or self._open) if source.reopens else None
        self._health = _Health(source.fps, self.options)
        self._freeze.restart()

    def _shut(self) -> None:
        source, self.source = self.source, None
        if source is None:
            return
        self._call = ("close", time.monotonic())
        try:
            with contextlib.suppress(EdgekitError, OSError):  # a dead device may well refuse
                source.close()
        finally:
            self._call = None


class _Health:
    """What is known of the frames since the source was opened. asked: when the first was; began: when it came;
    epoch: its own."""

    def __init__(self, fps: float | None, options: WatchOptions) -> None:
        self.asked: float | None = None
        self.began: float | None = None
        self.epoch = 0
        self.sequence = Sequence()
        self.drops = Burst(options.quiet)
        self.damage = Burst(options.quiet)
        self.clock = Clock()
        self.pace = Pace(fps, options.window)

    def waited(self, frame: Frame) -> bool:
        """Whether it lay ready, old, when the first frame was asked for: taken while an engine was loading, and
        what the driver had no buffer for after it is no fault either."""
        assert self.asked is not None
        asked_ns = round(self.asked * 1e9)
        at_once = frame.captured_ns < asked_ns + _AT_ONCE_NS
        return frame.clock == "monotonic" and at_once and frame.pts_ns < asked_ns - _OLD_NS
