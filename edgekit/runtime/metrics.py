"""What a stream measures of itself: ages, stage times, drops by reason, faults. Bounded memory, any thread."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from array import array
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.errors import printable
from edgekit.pixels import PixelLayout
from edgekit.runtime.faults import FAULTS
from edgekit.runtime.frames import Frame
from edgekit.runtime.results import StreamResult

WINDOW = 2048
"""Newest values that percentiles are taken of."""
BUCKETS_MS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000, 2000, 5000)
"""Upper bounds of the histogram over the whole run, milliseconds; one more counts what is above."""
_EVENTS = 200


class Series:
    """Durations in nanoseconds: exact percentiles of the newest `WINDOW`, a histogram of all."""

    __slots__ = ("_next", "_ring", "buckets", "count", "largest", "total_ns")

    def __init__(self) -> None:
        self.count = 0
        self.total_ns = 0
        self.largest = 0
        self.buckets = [0] * (len(BUCKETS_MS) + 1)
        self._ring = array("q")
        self._next = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.total_ns += ns
        self.largest = max(self.largest, ns)
        self.buckets[bisect_left(BUCKETS_MS, ns / 1e6)] += 1
        if len(self._ring) < WINDOW:
            self._ring.append(ns)
        else:
            self._ring[self._next] = ns
            self._next = (self._next + 1) % WINDOW

    def summary(self) -> dict[str, float]:
        """count, and in milliseconds sum, mean and max (of all), p50, p95, p99 (of the newest)."""
        if not self.count:
            return {"count": 0}
        last = len(self._ring) - 1
        ranks = {q: round(last * q / 100) for q in (50, 95, 99)}
        # not sorted: the threads that count wait for the lock meanwhile
        placed = np.partition(np.array(self._ring, np.int64), list(ranks.values()))
        at = {f"p{q}_ms": int(placed[rank]) / 1e6 for q, rank in ranks.items()}
        mean = self.total_ns / self.count / 1e6
        total = {"count": self.count, "sum_ms": self.total_ns / 1e6, "mean_ms": mean}
        return {**total, **at, "max_ms": self.largest / 1e6}


class CameraMetrics:
    """Of one source. state: `opening`, `running`, `lost` (waiting to reopen it), `ended`."""

    def __init__(self) -> None:
        self.state = "opening"
        self.frames = 0
        self.drops: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.restarts = 0
        self.layout = ""
        self.interval = Series()
        self._last_ns = 0
        self._layout: PixelLayout | None = None


class EngineMetrics:
    """Of one engine: `age` from the sensor to the result, stage times, and what no stage explains; where it keeps
    state: resets by camera, frames that came before their step was due, and steps that were not run; of a rig: results
    without a sensor, by sensor and why, ages of the parts, and what the synchroniser says of the clocks."""

    def __init__(self) -> None:
        self.facts: dict[str, str] = {}
        self.results = 0
        self.resets: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.skipped = 0
        self.missed = 0
        self.copied = 0
        self.written = 0
        self.age = Series()
        self.stages: dict[str, Series] = {}
        self.unaccounted = Series()
        self.partial = 0
        self.missing: dict[str, Counter[str]] = {}
        self.sensor_ages: dict[str, Series] = {}
        self.oldest = Series()
        self.sync: dict[str, dict[str, Any]] = {}
        self.processed: dict[str, int] = {}
        self.cut: dict[str, int] = {}
        self.ego_refused = 0


class SinkMetrics:
    """Of one sink. state: `running`, `failed`, `closed`."""

    def __init__(self) -> None:
        self.state = "running"
        self.written = 0
        self.dropped = 0
        self.time = Series()


@dataclass(frozen=True)
class Event:
    """Something happened to `where` (a camera, sink or engine): a fault's name, `restarted`, `swapped`, `recalibrated`."""

    seconds: float
    """Since the stream began."""
    where: str
    name: str
    text: str


class Metrics:
    """One stream's. Written by its threads, read by anyone through `snapshot()`."""

    def __init__(self) -> None:
        self.on_event: Callable[[Event], None] | None = None
        """Called for every event, in the thread where it happened; must return at once. One that raises is
        told on stderr and called no more: a camera's thread does not end by a broken pipe of its messages."""
        self._lock = threading.RLock()
        """Again by its own thread: a signal handler may want a snapshot while the main thread counts."""
        self._started_ns = time.monotonic_ns()
        self._cameras: dict[str, CameraMetrics] = {}
        self._engines: dict[str, EngineMetrics] = {}
        self._sinks: dict[str, SinkMetrics] = {}
        self._events: deque[Event] = deque(maxlen=_EVENTS)
        self._event_count = 0

    def seconds(self) -> float:
        """Since the stream began."""
        return (time.monotonic_ns() - self._started_ns) / 1e9

    def camera_state(self, camera: str, state: str) -> None:
        with self._lock:
            self._camera(camera).state = state

    def frame(self, camera: str, frame: Frame) -> None:
        """A frame arrived."""
        with self._lock:
            m = self._camera(camera)
            m.state = "running"
            m.frames += 1
            layout = frame.pixels.layout
            if m._last_ns:
                m.interval.add(max(0, frame.captured_ns - m._last_ns))
            m._last_ns = frame.captured_ns
            if layout is not m._layout:
                m._layout, m.layout = layout, f"{layout.width}x{layout.height} {layout.format}"

    def drop(self, camera: str, reason: str, count: int = 1) -> None:
        """Frames of `camera` that an engine will not see: `superseded` (of several engines: each its own),
        `driver`, `corrupt`, `stale`; of a rig's sensors those of `sync.DROPS` too."""
        with self._lock:
            self._camera(camera).drops[reason] += count

    def fault(self, where: str, name: str, text: str = "") -> None:
        """A fault of a camera, sink or engine; `name` is one of `faults.FAULTS`."""
        assert name in FAULTS, name
        with self._lock:
            if where in self._cameras:
                self._cameras[where].faults[name] += 1
            elif where in self._engines:
                self._engines[where].faults[name] += 1
        self._event(where, name, text)

    def restarted(self, camera: str, text: str = "") -> None:
        with self._lock:
            self._camera(camera).restarts += 1
        self._event(camera, "restarted", text)

    def sees_again(self, engine: str, text: str = "") -> None:
        """A sensor of an engine's rig is there again after none was."""
        self._event(engine, "restarted", text)

    def recalibrated(self, engine: str, text: str = "") -> None:
        """Another calibration of the rig is in use."""
        self._event(engine, "recalibrated", text)

    def sync(
        self,
        engine: str,
        facts: dict[str, dict[str, Any]],
        processed: Mapping[str, int],
        cut: Mapping[str, int],
        ego_refused: int,
    ) -> None:
        """What the synchroniser knows of each sensor (`Synchroniser.facts`); pictures that went through the network of
        their camera, by camera; sweeps that were cut down to hold a budget, by what was done; motions that no vehicle makes."""
        with self._lock:
            m = self._engine(engine)
            m.sync, m.processed, m.cut, m.ego_refused = facts, dict(processed), dict(cut), ego_refused

    def swapped(self, engine: str, text: str = "") -> None:
        """Another bundle took an engine's place."""
        self._event(engine, "swapped", text)

    def engine_facts(self, engine: str, facts: Mapping[str, object]) -> None:
        """What to know about an engine (bundle, library, precision, ...), shown as it is."""
        with self._lock:
            m = self._engine(engine)
            m.facts = {name: printable(fact) for name, fact in facts.items()}

    def result(self, item: StreamResult) -> None:
        """A result is there."""
        with self._lock:
            m = self._engine(item.engine)
            m.results += 1
            steps = getattr(item.result, "steps", None)
            if steps is not None:
                m.skipped += steps == 0
                m.missed += item.result.missed
                if item.result.reset:
                    m.resets[item.camera] += 1
            m.age.add(item.age_ns)
            m.unaccounted.add(max(0, item.unaccounted_ns))
            for stage, ns in item.stage_ns.items():
                series = m.stages.get(stage)
                if series is None:
                    series = m.stages[stage] = Series()
                series.add(ns)
            if item.ages:
                m.oldest.add(item.oldest_ns)
                for sensor, ns in item.ages.items():
                    m.sensor_ages.setdefault(sensor, Series()).add(ns)
            m.partial += bool(item.missing)
            for sensor, why in item.missing.items():
                m.missing.setdefault(sensor, Counter())[why] += 1
            for hop in item.hops:
                m.copied += hop.copied
                m.written += hop.written

    def sink_wrote(self, sink: str, ns: int) -> None:
        with self._lock:
            m = self._sink(sink)
            m.written += 1
            m.time.add(ns)

    def sink_dropped(self, sink: str) -> None:
        with self._lock:
            self._sink(sink).dropped += 1

    def sink_state(self, sink: str, state: str) -> None:
        with self._lock:
            self._sink(sink).state = state

    def snapshot(self) -> dict[str, Any]:
        """Everything as JSON values: `seconds`, `cameras`, `engines`, `sinks` by name, `events` (the newest)."""
        with self._lock:
            return {
                "seconds": (time.monotonic_ns() - self._started_ns) / 1e9,
                "cameras": {
                    name: {
                        "state": m.state,
                        "layout": m.layout,
                        "frames": m.frames,
                        "drops": dict(m.drops),
                        "faults": dict(m.faults),
                        "restarts": m.restarts,
                        "interval": m.interval.summary(),
                    }
                    for name, m in self._cameras.items()
                },
                "engines": {
                    name: {
                        "facts": dict(m.facts),
                        "results": m.results,
                        "resets": dict(m.resets),
                        "faults": dict(m.faults),
                        "early_frames": m.skipped,
                        "missed_steps": m.missed,
                        "age": {**m.age.summary(), "buckets": list(m.age.buckets)},
                        "stages": {stage: series.summary() for stage, series in m.stages.items()},
                        "unaccounted": m.unaccounted.summary(),
                        "copied_bytes": m.copied,
                        "written_bytes": m.written,
                        **({"rig": _rig(m)} if m.sensor_ages or m.missing else {}),
                    }
                    for name, m in self._engines.items()
                },
                "sinks": {
                    name: {
                        "state": m.state,
                        "written": m.written,
                        "dropped": m.dropped,
                        "time": m.time.summary(),
                    }
                    for name, m in self._sinks.items()
                },
                "events": [vars(event) for event in self._events],
                "event_count": self._event_count,
            }

    def _camera(self, name: str) -> CameraMetrics:
        found = self._cameras.get(name)
        if found is None:
            found = self._cameras[name] = CameraMetrics()
        return found

    def _engine(self, name: str) -> EngineMetrics:
        found = self._engines.get(name)
        if found is None:
            found = self._engines[name] = EngineMetrics()
        return found

    def _sink(self, name: str) -> SinkMetrics:
        found = self._sinks.get(name)
        if found is None:
            found = self._sinks[name] = SinkMetrics()
        return found

    def _event(self, where: str, name: str, text: str) -> None:
        event = Event(self.seconds(), where, name, printable(text))
        with self._lock:
            self._event_count += 1
            self._events.append(event)
        callback = self.on_event
        if callback is not None:
            try:
                callback(event)
            except Exception:  # noqa: BLE001 - the program's own
                self.on_event = None
                with contextlib.suppress(OSError, ValueError):  # stderr may be what broke
                    traceback.print_exc()


def _rig(m: EngineMetrics) -> dict[str, Any]:
    """Of an engine that takes a rig: `partial` results; `missing` by sensor and why; `oldest`, the age of the oldest part
    of a result, and `ages` by sensor; `sync`, what the synchroniser says of each sensor; `processed` pictures by camera;
    `cut` sweeps by what was done to them; `ego_refused` motions."""
    return {
        "partial": m.partial,
        "missing": {sensor: dict(why) for sensor, why in m.missing.items()},
        "oldest": m.oldest.summary(),
        "ages": {sensor: series.summary() for sensor, series in m.sensor_ages.items()},
        "sync": {sensor: dict(facts) for sensor, facts in m.sync.items()},
        "processed": dict(m.processed),
        "cut": dict(m.cut),
        "ego_refused": m.ego_refused,
    }
