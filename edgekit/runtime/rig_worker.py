"""An engine that gets every sensor of a rig on its own: pictures at once, moments when they are complete.

In the engine's thread: what arrives goes to the synchroniser; a picture that a moment is likely to take goes through
the camera's own network at once; a moment that is decided goes through the rest. Between these, moments come first.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from edgekit.errors import UsageError, did_you_mean
from edgekit.runtime.ego import Ego
from edgekit.runtime.frames import Frame
from edgekit.runtime.mailbox import Closed, Mailbox
from edgekit.runtime.metrics import Metrics
from edgekit.runtime.moments import CAMERA, Builder, check_sensor, fits
from edgekit.runtime.results import StreamResult
from edgekit.runtime.swap import Pipelines
from edgekit.runtime.sync import LIDAR, Moment, Part, State, Synchroniser, SyncOptions
from edgekit.runtime.worker import Worker

if TYPE_CHECKING:
    from edgekit.rig import Rig

_FACTS_NS = 500_000_000
BOX = 3
"""Newest frames of a live sensor that wait while the engine is busy: a camera may send some for each sweep."""


@dataclass(eq=False)
class _Held:
    """A part's frame, and what the camera's network made of it (of which pipeline)."""

    frame: Frame
    seen: Any = None
    by: object = None


class RigWorker(Worker):
    """See Worker. Each sender of its mailbox is a sensor.

    rig: the calibration; None: that of the first frame which brings one. live: sensors send when they measure; else
    they are files. latest: of moments that wait, only the newest counts. condition: what a sensor's watchdog says.
    spare: how many buffers of a sensor may be held at most, where a driver has few.
    """

    def __init__(
        self,
        name: str,
        pipelines: Pipelines,
        box: Mailbox[Frame],
        score: float | None,
        *,
        sensors: Iterable[str],
        rig: Rig | None,
        options: SyncOptions | None,
        live: bool,
        latest: bool,
        metrics: Metrics,
        condition: Callable[[str], State],
        spare: Mapping[str, int],
        lidar_budget_ms: float | None = None,
    ) -> None:
        super().__init__(name, pipelines, box, score, frozenset(), None, lidar_budget_ms)
        self._sensors = tuple(sensors)
        self._options = options or SyncOptions()
        self._live, self._latest = live, latest
        self._metrics = metrics
        self._condition = condition
        self._spare = spare
        self._ego = Ego(self._options.pose)
        self._sync: Synchroniser | None = None
        self._builder: Builder | None = None
        self._worked: deque[tuple[int, int]] = deque(maxlen=64)
        """When cameras' networks ran."""
        self._processed: Counter[str] = Counter()
        self._blind_since: float | None = None
        self._some = True  # a sensor runs
        self._said_ns = 0
        self._new: Rig | None = None
        if rig is not None:
            self._begin(rig)

    def places(self, cameras: Iterable[str]) -> list[str]:
        return [self.place(CAMERA)]

    def check(self, rig: Rig) -> None:
        check_rig(rig, self._sensors)
        for name, size in (self._builder.sizes if self._builder is not None else {}).items():
            camera = rig.cameras[name]
            if not fits(camera, size):
                raise UsageError(
                    f"rig {rig.name}: camera {name} is {camera.width}x{camera.height}, but its pictures are "
                    f"{size[0]}x{size[1]}. Give the rig that takes them"
                )

    def recalibrate(self, rig: Rig) -> None:
        self._new = rig

    def prepare(self, pipelines: Pipelines, rig: Rig | None = None) -> list[Future[Any]]:
        builder = self._builder
        if builder is None:
            return []
        return super().prepare(pipelines, builder.fitted(rig or builder.rig))

    def step(self, wait_s: float) -> StreamResult | None:
        until = time.monotonic() + wait_s
        while True:
            self._collect()
            sync = self._sync
            if sync is not None:
                self._ask_watchdogs(sync)
                self._say(sync)
                moment = self._pick(sync)
                if moment is not None:
                    return self._finish(sync, moment)
                worked = self._work(sync)
            else:
                worked = False
            now = time.monotonic()
            if now >= until:
                return None
            if not worked:
                self._wait(until - now)

    def close(self) -> None:
        super().close()
        if self._sync is not None:
            self._sync.flush()

    # --- what arrives ---

    def _begin(self, rig: Rig) -> None:
        check_rig(rig, self._sensors)
        network = getattr(getattr(self.pipelines[0], "spec", None), "cameras", None)
        unknown = [s for s in self._sensors if network is not None and s != LIDAR and s not in network]
        if unknown:
            raise UsageError(
                f"stream: sensor {unknown[0]!r}: the network knows no such camera. {did_you_mean(unknown[0], network or ())}"
            )
        self._builder = Builder(rig, self._ego)
        offsets = {name: camera.offset_ms for name, camera in rig.cameras.items() if name in self._sensors}
        self._sync = Synchroniser(
            offsets, lidar=LIDAR in self._sensors, options=self._options, timed=self._live, dropped=self._drop,
            depths=self._spare,
        )  # fmt: skip
        self.prepare(self.holder.current)  # done, with luck, when the first sweep is there

    def _may_take(self, sensor: str) -> bool:
        return self._live or self._sync is None or not self._sync.full(sensor)

    def _collect(self) -> None:
        """All that lies in the mailbox. Closed is for later: what waits goes out before."""
        try:
            while (frame := self.box.take(0.0, only=self._may_take)) is not None:
                self._add(frame)
        except Closed:
            pass

    def _wait(self, most_s: float) -> None:
        """Until a frame comes, a moment is due, or so long. Raises: Closed when there is nothing to wait for."""
        if self._sync is not None and self._live:
            now = time.monotonic_ns()
            due = self._sync.due_ns(now)
            if due is not None:
                most_s = min(most_s, max(0.0, (due - now) / 1e9))
        frame = self.box.take(most_s, only=self._may_take)
        if frame is not None:
            self._add(frame)

    def _add(self, frame: Frame) -> None:
        if self._sync is None:
            if frame.rig is None:
                frame.release()
                raise UsageError(
                    f"source {frame.source}: its frames bring no calibration. Say rig='rig.toml' (edgekit run: --rig)"
                )
            self._begin(frame.rig.rig)
        assert self._sync is not None and self._builder is not None
        try:
            check_sensor(frame.camera, frame)
        except BaseException:
            frame.release()
            raise
        if frame.camera != LIDAR and not fits(
            self._builder.rig.cameras[frame.camera], (frame.width, frame.height)
        ):
            self._sync.tell(frame.camera, "unfit")
            self._metrics.drop(frame.camera, "unfit")
            frame.release()
            return
        at = frame.pts_ns if not self._live and frame.clock == "media" else frame.taken_ns
        part = Part(frame.camera, at, frame.captured_ns, _Held(frame), frame.epoch)
        self._sync.add(part)
        self._builder.learn(part)

    def _drop(self, part: Part, reason: str) -> None:
        self._metrics.drop(part.sensor, reason)
        part.item.frame.release()

    def _ask_watchdogs(self, sync: Synchroniser) -> None:
        some = ended = False
        for name in self._sensors:
            over = self.box.over(name)
            ended |= over
            state = "lost" if over else self._condition(name)
            if state != "running":
                sync.tell(name, cast("State", state))
            some |= state == "running"
        self._some = some
        if self._live and not some and not ended and self._blind_since is None:
            self._blind_since = time.monotonic()
            self._metrics.fault(self.name, "blind", "no sensor of the rig is there")

    def _say(self, sync: Synchroniser) -> None:
        """To the metrics, now and then."""
        now = time.monotonic_ns()
        if now - self._said_ns > _FACTS_NS:
            self._said_ns = now
            cut = getattr(self.pipelines[0], "counts", {})
            self._metrics.sync(self.name, sync.facts(), self._processed, cut, self._ego.refused)

    # --- what goes out ---

    def _pick(self, sync: Synchroniser) -> Moment | None:
        """The next moment; the newest of those that are decided, where only that counts."""
        now = time.monotonic_ns()
        moment = sync.poll(now)
        while moment is not None and self._latest and (newer := sync.poll(now)) is not None:
            for part in moment.parts.values():
                self._drop(part, "superseded")
            moment = newer
        return moment

    def _work(self, sync: Synchroniser) -> bool:
        """One picture that a moment will likely want, through its camera's network. False when there is none."""
        for part in sync.pictures():
            held: _Held = part.item
            if held.by is None and sync.wanted(part):
                with self.holder.frame() as pipelines:
                    self._see(pipelines.of(CAMERA), part)
                return True
        return False

    def _see(self, pipeline: Any, part: Part) -> None:
        begun = time.monotonic_ns()
        held: _Held = part.item
        held.by = pipeline
        held.seen = pipeline.camera(part.sensor, held.frame.pixels)
        self._processed[part.sensor] += 1
        self._worked.append((begun, time.monotonic_ns()))

    def _finish(self, sync: Synchroniser, moment: Moment) -> StreamResult:
        builder = self._builder
        assert builder is not None
        try:
            new, self._new = self._new, None
            if new is not None:
                builder.rig = new
                sync.replace_offsets({name: camera.offset_ms for name, camera in new.cameras.items()})
                self._metrics.recalibrated(self.name, f"{new.name}, {new.digest()[:12]}")
            picked = time.monotonic_ns()
            rig = builder.rig_frame(moment)
            with self.holder.frame() as pipelines:
                pipeline: Any = self.set_up(pipelines.of(CAMERA))
                for name, part in moment.parts.items():
                    if name != LIDAR and part.item.by is not pipeline:  # not yet, or a swap came between
                        self._see(pipeline, part)
                seen = {name: part.item.seen for name, part in moment.parts.items() if name != LIDAR}
                result = pipeline.finish(rig, seen, score_threshold=self.score)
                preprocess, engine, decode = pipeline.stage_ns
        except BaseException:
            for part in moment.parts.values():
                part.item.frame.release()
            raise
        now = time.monotonic_ns()
        anchor, ready = moment.anchor, moment.ready_ns
        base = anchor.at_ns if self._live else anchor.arrived_ns
        worked = sum(max(0, min(end, now) - max(begun, ready)) for begun, end in self._worked)
        late = sum(end - begun for begun, end in self._worked if begun >= picked)
        stages = {
            "transport": anchor.arrived_ns - base,
            "match": ready - anchor.arrived_ns,
            "wait": picked - ready - (worked - late),
            "cameras": worked,
            "preprocess": preprocess,
            "engine": engine,
            "decode": decode,
        }
        frame = builder.frame(moment, rig, timed=self._live)
        ages = {
            name: now - (part.at_ns if self._live else part.arrived_ns) for name, part in moment.parts.items()
        }
        # A moment of parts from before the loss is no return: only with a sensor that runs does a rig see again.
        if self._blind_since is not None and self._some:
            self._metrics.sees_again(self.name, f"after {time.monotonic() - self._blind_since:.2f} s")
            self._blind_since = None
        return StreamResult(
            frame, result, now - base, stages, self.name, frame.hops + pipelines.hops, ages, dict(moment.missing)
        )  # fmt: skip


def check_rig(rig: Rig, sensors: Iterable[str]) -> None:
    """Raises: UsageError for a sensor that the rig does not have."""
    for name in sensors:
        if name != LIDAR and name not in rig.cameras:
            raise UsageError(
                f"rig {rig.name}: no camera {name!r}. {did_you_mean(name, [*rig.cameras, LIDAR])}"
            )


__all__ = ["BOX", "RigWorker", "check_rig"]
