"""Which pictures belong to which sweep: moments of a rig out of the parts that its sensors send one by one.

No thread, no clock: times are passed in (nanoseconds of `time.monotonic_ns()`, or of a file). A design like
Autoware's (a phase offset for each camera, a window around it, a timeout after the sweep, and moments that go out
without what is missing), with these rules:

- A moment is a sweep, and of each camera the picture nearest to `sweep + offset`, at most `window_ms` off and
  at most half a sweep's period, so that neighbouring moments do not ask for the same picture.
- `offset` is the rig's (`Camera.offset_ms`), plus what the camera is found to be off for good: the mean angle of its
  newest distances, where they agree (`phase.Phase`), up to `adapt_ms`.
- It goes out when all cameras are decided: matched, or known to give no picture for it any more (a later one is
  there; the next is due too late; the sensor is lost, frozen, or silent). At the latest `timeout_ms` after the sweep.
- No sweep when one is due, plus the timeout: the cameras pace. The first one alive, in the rig's order, gives the time.
- Moments go out in the order of their time, a sensor's parts too, and each part once. What is in no moment is dropped
  with a reason (`DROPS`), so that every part is accounted for. Nothing grows without bound.
- A clock that steps (timestamps from the future, or far back) is put right by arrivals: what is stamped after the
  step is shifted so that the least time from timestamp to arrival stays what it was.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edgekit.errors import UsageError
from edgekit.runtime.phase import Delay, Period, Phase

LIDAR = "lidar"
Why = Literal["lost", "frozen", "late", "unmatched", "unfit"]
"""Why a sensor is not in a moment: not there; shows one picture again and again; not there in time; has no
picture near enough (it is slower than the moments, or dropped one); gives pictures of another shape than its
calibration says."""
State = Literal["running", "lost", "frozen", "unfit"]
DROPS = {
    "late": "its moment had gone out without it",
    "unmatched": "no moment wanted it: a camera faster than the LiDAR, or out of the window",
    "thinned": "a sweep sooner than `period_ms` after the last moment",
    "unfit": "of another shape than the rig says (dropped before it came here)",
    "clock": "waited while its sensor's clock stepped",
}
_MS = 1_000_000
_SETTLE = 8
"""Parts after a step of the clock of which the fastest tells how far it went."""


@dataclass(frozen=True)
class SyncOptions:
    """How parts become moments. Times in milliseconds.

    window_ms: a picture at most so far from where it is expected belongs to a sweep.
    timeout_ms: a moment waits so long after its sweep, or after the last camera should have taken its picture.
    adapt_ms: phase offsets are corrected by what is measured, at most by so much; 0: they stay the rig's.
    period_ms: moments at least so far apart, where every sweep is more than is wanted (a 20 Hz LiDAR, 12 Hz cameras).
    depth: parts of a sensor that wait at most.
    pose: time in ns -> float64 [4, 4], ego to a fixed world, or None; else the poses that come with the parts.
    """

    window_ms: float = 50.0
    timeout_ms: float = 60.0
    adapt_ms: float = 50.0
    period_ms: float = 0.0
    depth: int = 8
    pose: Callable[[int], Any] | None = None

    def __post_init__(self) -> None:
        for name, least, most in (
            ("window_ms", 0.1, 10_000), ("timeout_ms", 0, 60_000), ("adapt_ms", 0, 10_000),
            ("period_ms", 0, 60_000), ("depth", 2, 1000),
        ):  # fmt: skip
            value = getattr(self, name)
            if not least <= value <= most:
                raise UsageError(f"sync: {name} {value!r}: out of range, expected {least:g} to {most:g}")


@dataclass(eq=False)
class Part:
    """What one sensor measured once.

    taken_ns: the sensor's timestamp.  arrived_ns: when we got it.  item: the caller's.
    epoch: counts reconnects and steps of the clock (Frame.epoch).
    at_ns: when it was taken, steps of the clock put right; set by the synchroniser.
    """

    sensor: str
    taken_ns: int
    arrived_ns: int
    item: Any = None
    epoch: int = 0
    at_ns: int = field(default=0, init=False)


@dataclass(frozen=True, eq=False)
class Moment:
    """What belongs together.

    taken_ns: the sweep's time; of a moment without sweep, when it would have ended by the cameras' phases.
    parts: by sensor.  missing: the sensors that it goes without, in the rig's order, the LiDAR last, and why.
    anchor: the part that paces: the sweep, or a camera's.  ready_ns: since when it could go out (the arrival of its
    last part, or when waiting ended).  number: of moments before it.
    """

    taken_ns: int
    parts: Mapping[str, Part]
    missing: Mapping[str, Why]
    anchor: Part
    ready_ns: int
    number: int

    @property
    def complete(self) -> bool:
        return not self.missing


class _Sensor:
    """What is known of one, and its parts that wait, by time."""

    def __init__(self, name: str, offset_ms: float) -> None:
        self.name = name
        self.nominal_ns = round(offset_ms * _MS)
        self.correct_ns = 0
        self.state: State = "running"
        self.parts: list[Part] = []
        self.depth = 8
        self.used_ns: int | None = None
        """Time of the last part that a moment took."""
        self.newest_ns: int | None = None
        self.seen_ns: int | None = None
        """Arrival of the newest."""
        self.period = Period()
        self.phase = Phase()
        self.delay = Delay()
        self.epoch = 0
        self.shift_ns = 0
        self.settling = 0
        self.floor_ns = 0
        self.steps = 0
        self.drops: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()

    @property
    def offset_ns(self) -> int:
        return self.nominal_ns + self.correct_ns

    def stamp(self, part: Part, timed: bool) -> bool:
        """Set `at_ns`. Whether the clock stepped with this part."""
        at = part.taken_ns + self.shift_ns
        stepped = False
        if timed:
            floor = self.delay.floor_ns()
            period = self.period.value() or 100 * _MS
            back = self.newest_ns is not None and at < self.newest_ns - (
                0 if part.epoch != self.epoch else 3 * period
            )
            ahead = at > part.arrived_ns + _MS and not self.settling
            if back or ahead:
                stepped = self.newest_ns is not None
                self.floor_ns = max(0, floor if floor is not None else 0)
                self.shift_ns = part.arrived_ns - part.taken_ns - self.floor_ns
                self.settling = _SETTLE
                self.steps += stepped
                self.phase.forget()
                self.period.forget()
                self.correct_ns = 0
            elif self.settling:  # the fastest of the first parts says how far it was
                self.settling -= 1
                self.shift_ns = min(self.shift_ns, part.arrived_ns - part.taken_ns - self.floor_ns)
            at = min(part.taken_ns + self.shift_ns, part.arrived_ns)
        self.epoch = part.epoch
        part.at_ns = at
        return stepped

    def facts(self) -> dict[str, float | str | int | None]:
        floor, drift, period = self.delay.floor_ns(), self.delay.drift_ppm(), self.period.value()
        return {
            "state": self.state,
            "period_ms": None if period is None else period / _MS,
            "offset_ms": self.offset_ns / _MS,
            "phase_ms": self.phase.value_ns / _MS if self.phase.locked else None,
            "jitter_ms": self.phase.spread_ns / _MS if self.phase.locked else None,
            "arrival_ms": None if floor is None else floor / _MS,
            "drift_ppm": drift,
            "clock_ms": -self.shift_ns / _MS,
            "clock_steps": self.steps,
        }


class Synchroniser:
    """Parts in, moments out: `add` each part, then `poll` until it gives None. For one thread.

    cameras: offset_ms by name, in the rig's order.  lidar: whether there is one.
    timed: parts come when they were taken, and waiting has an end; False for files: a moment waits until the other
        sensors are past it or at their end, and `full` says whose parts are not to be added now.
    dropped: called with every part that goes into no moment, and why (`DROPS`).
    depths: parts of a sensor that wait at most, where that is fewer than `options.depth`: a driver has few buffers.
    """

    def __init__(
        self,
        cameras: Mapping[str, float],
        *,
        lidar: bool = True,
        options: SyncOptions | None = None,
        timed: bool = True,
        dropped: Callable[[Part, str], None] | None = None,
        depths: Mapping[str, int] | None = None,
    ) -> None:
        self.options = options or SyncOptions()
        self._timed = timed
        self._dropped = dropped
        self._cameras = {name: _Sensor(name, offset) for name, offset in cameras.items()}
        self._lidar = _Sensor(LIDAR, 0.0) if lidar else None
        self._sensors = {**self._cameras, **({LIDAR: self._lidar} if self._lidar else {})}
        for name, sensor in self._sensors.items():
            sensor.depth = max(1, min(self.options.depth, (depths or {}).get(name, self.options.depth)))
        self._first_ns: int | None = None
        self._last_ns: int | None = None
        self._last_swept = True
        self.moments = 0
        self._window = round(self.options.window_ms * _MS)
        self._timeout = round(self.options.timeout_ms * _MS)

    # --- parts ---

    def add(self, part: Part) -> None:
        """Take a part. It is the synchroniser's until it is in a moment or dropped."""
        sensor = self._sensors[part.sensor]
        if self._first_ns is None:
            self._first_ns = part.arrived_ns
        stepped = sensor.stamp(part, self._timed)
        if stepped:
            self._restart(sensor)
        sensor.delay.add(part.at_ns, part.arrived_ns)
        sensor.period.add(part.at_ns)
        sensor.newest_ns = part.at_ns if sensor.newest_ns is None else max(sensor.newest_ns, part.at_ns)
        sensor.seen_ns = part.arrived_ns
        sensor.state = "running"
        reason = self._unwelcome(sensor, part)
        if reason:
            self._drop(sensor, part, reason)
            return
        insort(sensor.parts, part, key=lambda p: p.at_ns)
        if sensor is not self._lidar:
            while (
                len(sensor.parts) > sensor.depth
            ):  # where few may wait, rather one that no moment is likely to take
                first = next((i for i, p in enumerate(sensor.parts) if not self.wanted(p)), 0)
                self._drop(sensor, sensor.parts.pop(first), "unmatched")

    def full(self, name: str) -> bool:
        """Of a file: whether its parts that wait are as many as may."""
        return len(self._sensors[name].parts) >= self._sensors[name].depth

    def pictures(self) -> list[Part]:
        """The cameras' parts that wait, oldest first."""
        parts = [part for camera in self._cameras.values() for part in camera.parts]
        return sorted(parts, key=lambda part: part.at_ns)

    def tell(self, name: str, state: State) -> None:
        """What the sensor's watchdog says of it. A part that comes says `running`."""
        self._sensors[name].state = state

    def wanted(self, part: Part) -> bool:
        """Whether a moment is likely to take this camera's picture, so that it is worth working on before."""
        sensor = self._cameras[part.sensor]
        if part not in sensor.parts:
            return False
        at = part.at_ns - sensor.offset_ns
        period = self._period()
        if self._last_ns is None and self._lidar is not None and not self._lidar.parts:
            return True
        refs = [sweep.at_ns for sweep in self._lidar.parts] if self._lidar else []
        last = refs[-1] if refs else self._last_ns
        if last is None or period is None:
            return True
        ahead = max(1, round((at - last) / period))
        refs.append(last + ahead * period)
        off = min(abs(at - ref) for ref in refs)
        own = sensor.period.value()
        return off <= self._reach() and (own is None or off <= 0.55 * own)

    # --- moments ---

    def poll(self, now_ns: int) -> Moment | None:
        """The next moment, if it is decided by now."""
        while (anchor := self._anchor(now_ns)) is not None:
            ref = anchor.at_ns - self._sensors[anchor.sensor].offset_ns
            if self._too_soon(anchor, ref):
                self._drop_part(anchor, "thinned")
                continue
            due = self._due(anchor)
            forced = (self._timed and now_ns >= due) or self._crowded()
            found: dict[str, Part] = {}
            missing: dict[str, Why] = {}
            for camera in self._cameras.values():
                part, why = self._match(camera, ref, now_ns, forced)
                if part is not None:
                    found[camera.name] = part
                elif why is not None:
                    missing[camera.name] = why
                else:
                    return None
            if self._lidar is not None:
                if anchor.sensor == LIDAR:
                    found[LIDAR] = anchor
                else:
                    missing[LIDAR] = self._why_silent(self._lidar)
            return self._finish(anchor, ref, found, missing, min(now_ns, due) if self._timed else now_ns)
        return None

    def due_ns(self, now_ns: int) -> int | None:
        """When `poll` should be asked again though nothing came; None when only a part can change anything."""
        if not self._timed:
            return None
        times: list[int] = []
        anchor = self._anchor(now_ns)
        if anchor is not None:
            times.append(self._due(anchor))
        elif self._lidar is not None and self._lidar.state == "running" and any(
            c.parts for c in self._cameras.values()
        ):  # fmt: skip
            times.append(self._silent_at(self._lidar))
        times += [self._silent_at(c) for c in self._cameras.values() if c.state == "running"]
        later = [time for time in times if time > now_ns]
        return min(later) if later else None

    def flush(self) -> None:
        """The end: drop all that waits."""
        for sensor in self._sensors.values():
            while sensor.parts:
                self._drop(sensor, sensor.parts.pop(), "unmatched")

    def replace_offsets(self, cameras: Mapping[str, float]) -> None:
        """Another calibration: its offsets from now on, what was measured of the old ones forgotten."""
        for name, offset in cameras.items():
            sensor = self._cameras.get(name)
            if sensor is not None and sensor.nominal_ns != round(offset * _MS):
                sensor.nominal_ns = round(offset * _MS)
                sensor.correct_ns = 0
                sensor.phase.forget()

    def facts(self) -> dict[str, dict[str, float | str | int | None]]:
        """By sensor: `state`; `period_ms`; `offset_ms` in use; `phase_ms`, how far from the rig's offset its pictures
        are taken (its clock's error, or the calibration's), and their `jitter_ms`, None where the phases do not agree;
        `arrival_ms`, least time from timestamp to arrival (transport plus clock error), and its `drift_ppm`;
        `clock_ms`, error of its clock that is put right after a step, `clock_steps` so far.
        """
        return {name: sensor.facts() for name, sensor in self._sensors.items()}

    @property
    def missed(self) -> dict[str, dict[str, int]]:
        """Moments without a sensor, by sensor and why."""
        return {name: dict(sensor.missed) for name, sensor in self._sensors.items() if sensor.missed}

    @property
    def drops(self) -> dict[str, dict[str, int]]:
        """Parts in no moment, by sensor and reason."""
        return {name: dict(sensor.drops) for name, sensor in self._sensors.items() if sensor.drops}

    @property
    def waiting(self) -> dict[str, int]:
        """Parts that wait, by sensor."""
        return {name: len(sensor.parts) for name, sensor in self._sensors.items()}

    # --- inside ---

    def _period(self) -> int | None:
        """Time from moment to moment."""
        least = round(self.options.period_ms * _MS)
        own = self._lidar.period.value() if self._lidar is not None else None
        if own is None:
            leader = self._leader(None)
            own = leader.period.value() if leader is not None else None
        return max(own, least) if own is not None else (least or None)

    def _reach(self) -> int:
        period = self._period()
        return self._window if period is None else min(self._window, period // 2)

    def _unwelcome(self, sensor: _Sensor, part: Part) -> str:
        """Why a part is not taken at all; "" when it is."""
        if sensor.used_ns is not None and part.at_ns <= sensor.used_ns:
            return "late"
        if self._last_ns is None:
            return ""
        if sensor is self._lidar:
            period = self._period() or 0
            room = 0 if self._last_swept else period // 2  # it is the one that a moment went out without
            return "late" if part.at_ns <= self._last_ns + room else ""
        return "late" if part.at_ns - sensor.offset_ns < self._last_ns - self._reach() else ""

    def _restart(self, sensor: _Sensor) -> None:
        """Its clock stepped."""
        while sensor.parts:
            self._drop(sensor, sensor.parts.pop(), "clock")
        sensor.used_ns = sensor.newest_ns = None
        if sensor is self._lidar:
            for camera in self._cameras.values():
                camera.phase.forget()
                camera.correct_ns = 0

    def _silent_at(self, sensor: _Sensor) -> int:
        """When one that sends nothing more is not waited for any longer."""
        seen = sensor.seen_ns
        if seen is None:  # not at all so far
            return (self._first_ns or 0) + 2 * self._timeout + 200 * _MS
        period = sensor.period.value() or self._period() or 100 * _MS
        if sensor is self._lidar:
            return seen + max(period, round(self.options.period_ms * _MS)) + self._timeout
        return seen + max(period * 5 // 2, period + self._timeout)

    def _gone(self, sensor: _Sensor, now_ns: int) -> bool:
        return sensor.state != "running" or (self._timed and now_ns >= self._silent_at(sensor))

    def _why_silent(self, sensor: _Sensor) -> Why:
        return "late" if sensor.state == "running" else sensor.state

    def _leader(self, now_ns: int | None) -> _Sensor | None:
        """The camera that paces when there are no sweeps."""
        for camera in self._cameras.values():
            if now_ns is None or not self._gone(camera, now_ns) or (camera.parts and not self._timed):
                return camera
        return None

    def _anchor(self, now_ns: int) -> Part | None:
        """The part that the next moment is about."""
        lidar = self._lidar
        if lidar is not None:
            if lidar.parts:
                return lidar.parts[0]
            if not self._gone(lidar, now_ns):
                return None
        leader = self._leader(now_ns)
        if leader is None:
            left = [c for c in self._cameras.values() if c.parts]  # all are silent; what waits may go out
            leader = left[0] if left else None
        return leader.parts[0] if leader is not None and leader.parts else None

    def _too_soon(self, anchor: Part, ref: int) -> bool:
        if self._last_ns is None:
            return False
        if ref <= self._last_ns:
            return True
        least = round(self.options.period_ms * _MS)
        period = self._sensors[anchor.sensor].period.value() or 0
        if anchor.sensor != LIDAR:
            least = self._period() or least
        return least > 0 and ref <= self._last_ns + least - min(least, period or least) // 2

    def _due(self, anchor: Part) -> int:
        """Until when a moment waits."""
        own = self._sensors[anchor.sensor].offset_ns
        last = max((c.offset_ns for c in self._cameras.values() if c.state == "running"), default=own)
        return anchor.arrived_ns + max(0, last - own) + self._timeout

    def _crowded(self) -> bool:
        """Sweeps wait as many as may: the first one goes."""
        return self._lidar is not None and len(self._lidar.parts) > self._lidar.depth

    def _match(self, camera: _Sensor, ref: int, now_ns: int, forced: bool) -> tuple[Part | None, Why | None]:
        """The camera's picture for a moment, or why there is none; neither while that is open."""
        reach, expected = self._reach(), ref + camera.offset_ns
        period = camera.period.value()
        old = expected - max(reach, period or 0)  # nearer ones still tell the phase
        while camera.parts and camera.parts[0].at_ns < old:
            self._drop(camera, camera.parts.pop(0), "unmatched")
        near = [p for p in camera.parts if abs(p.at_ns - expected) <= reach]
        best = min(near, key=lambda p: abs(p.at_ns - expected), default=None)
        gone = self._gone(camera, now_ns)
        later = bool(camera.parts) and camera.parts[-1].at_ns > expected
        later |= len(camera.parts) >= camera.depth
        if best is not None:
            off = best.at_ns - expected
            settled = later or gone or forced or off >= 0 or (period is not None and off > -period // 2)
            return (best, None) if settled else (None, None)
        if gone:
            return None, self._why_silent(camera)
        if camera.parts and camera.parts[-1].at_ns > expected + reach:
            return None, "unmatched"
        if (
            period is not None
            and camera.newest_ns is not None
            and self._timed
            and camera.newest_ns + period * 4 // 5 > expected + reach
        ):
            return None, "unmatched"
        return None, "late" if forced else None

    def _finish(
        self, anchor: Part, ref: int, found: dict[str, Part], missing: dict[str, Why], due: int
    ) -> Moment:
        swept = anchor.sensor == LIDAR
        for camera in self._cameras.values():
            if swept:
                self._measure(camera, ref)
            part = found.get(camera.name)
            if part is not None:
                camera.used_ns = part.at_ns
        arrived = max(part.arrived_ns for part in found.values())
        self._last_ns, self._last_swept = ref, swept
        for name, part in found.items():
            self._sensors[name].parts.remove(part)
        for sensor in self._sensors.values():
            self._clear(sensor, ref)
        for name, why in missing.items():
            self._sensors[name].missed[why] += 1
        self.moments += 1
        ready = due if self._timed and "late" in missing.values() else arrived
        return Moment(ref, found, missing, anchor, max(arrived, ready), self.moments - 1)

    def _measure(self, camera: _Sensor, ref: int) -> None:
        """Where its picture nearest to the expected time was taken."""
        period = camera.period.value()
        if not self.options.adapt_ms or period is None or not camera.parts:
            return
        expected = ref + camera.nominal_ns
        nearest = min((p.at_ns - expected for p in camera.parts), key=abs)
        if abs(nearest) > 0.6 * period:  # the one that should be nearest was lost
            return
        camera.phase.add(nearest, period)
        most = round(self.options.adapt_ms * _MS)
        camera.correct_ns = max(-most, min(most, camera.phase.value_ns)) if camera.phase.locked else 0

    def _clear(self, sensor: _Sensor, ref: int) -> None:
        """Drop what no later moment can take."""
        while sensor.parts:
            part = sensor.parts[0]
            if sensor is self._lidar:
                old = part.at_ns <= ref
            else:
                used = sensor.used_ns is not None and part.at_ns <= sensor.used_ns
                old = used or part.at_ns - sensor.offset_ns < ref - self._reach()
            if not old:
                return
            self._drop(sensor, sensor.parts.pop(0), "unmatched")

    def _drop_part(self, part: Part, reason: str) -> None:
        sensor = self._sensors[part.sensor]
        sensor.parts.remove(part)
        self._drop(sensor, part, "unmatched" if sensor is not self._lidar else reason)

    def _drop(self, sensor: _Sensor, part: Part, reason: str) -> None:
        sensor.drops[reason] += 1
        if self._dropped is not None:
            self._dropped(part, reason)


__all__ = ["DROPS", "LIDAR", "Moment", "Part", "SyncOptions", "Synchroniser"]
