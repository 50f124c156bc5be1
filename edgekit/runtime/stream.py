"""Sensors -> engines -> results and sinks, until the end, an error or a stop.

Who does what: one thread per source reads frames and keeps the newest (or, for files, waits); one engine
works in the caller's thread, so that a result is never older than the asking; several engines work
in a thread each; every sink has its own. All of them share one stop event, and the first error of any
is raised to the caller.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from edgekit import timebase
from edgekit.bundle import Bundle
from edgekit.errors import EdgekitError, UsageError, printable
from edgekit.runtime.engine import Engine, load
from edgekit.runtime.frames import Frame
from edgekit.runtime.mailbox import POLL_S, Closed, Mailbox
from edgekit.runtime.metrics import Metrics
from edgekit.runtime.names import camera_name, check_kind, engine_name, named, unique
from edgekit.runtime.outlet import Outlet
from edgekit.runtime.results import StreamResult
from edgekit.runtime.rigs import follow, for_sinks, open_worker, read_rig, recalibrate, stamp
from edgekit.runtime.sinks import Sink, open_sink
from edgekit.runtime.sources import Source, open_source
from edgekit.runtime.swap import Pipelines, Swapped, swap_engine
from edgekit.runtime.sync import SyncOptions
from edgekit.runtime.watch import Watch, WatchOptions
from edgekit.runtime.worker import Worker

if TYPE_CHECKING:
    from edgekit.rig import Rig

Policy = Literal["latest", "block"]
AnyEngine = str | Path | Bundle | Engine
AnySource = str | Path | Source
JOIN_S = 5.0
"""How long the end of a stream waits for an engine that hangs."""
_HAND_OVER_S = 2e-4
"""How long a source's thread keeps out of the way once a frame is there: the interpreter's lock is free for the engine's."""
_SPARE = 2
"""Buffers that sinks leave to the mailbox and the engine, but for one: where a device has few, sinks see pictures too."""


class Stream:
    """Runs engines on live sensors or files: an iterator of StreamResult, a context manager and an
    asynchronous iterator; one consumer at a time. `edgekit.stream` is this class.

        with edgekit.stream("m.edge", "v4l2:/dev/video0") as stream:
            for item in stream: ...

    Without `with` a loop that is left early has to be followed by `close()`: sinks are finished and cameras
    let go only then.

    metrics: ages, stage times, drops and faults so far; a result counts when the next one is asked for.
    sources, engines, sinks: by name. Each result's frame is valid until the next result is asked for.
    """

    def __init__(
        self,
        bundles: AnyEngine | Sequence[AnyEngine] | Mapping[str, AnyEngine],
        sources: AnySource | Sequence[AnySource] | Mapping[str, AnySource],
        *,
        sinks: Sink | str | Path | Sequence[Sink | str | Path] = (),
        score_threshold: float | None = None,
        policy: Policy | None = None,
        threads: int = 0,
        variant: str | None = None,
        limit: int | None = None,
        on_sink_error: Literal["raise", "continue"] | None = None,
        watch_options: WatchOptions | None = None,
        stepping: timebase.Policy | None = None,
        rig: Rig | str | Path | None = None,
        sync: SyncOptions | None = None,
        watch_rig: bool = False,
        lidar_budget_ms: float | None = None,
    ) -> None:
        """bundles: bundle(s) to load, or loaded engines, which stay the caller's; a mapping names them.
        sources: what `open_source` takes, or open sources, which the stream closes; a mapping names the cameras.
            Every engine gets every camera's frames.
        sinks: what `open_sink` takes, or sinks; the stream closes all of them.
        policy: `latest` keeps only the newest frame of each camera while the engine is busy; `block` loses
            none. By default `latest` when any source is live.
        threads, variant: as for `load`. limit: frames per source.
        on_sink_error: `raise` ends the stream when a sink fails; `continue` goes on without that sink and
            counts it, so that a full disk does not blind a robot. By default `continue` for live sources.
        watch_options: when a live source counts as failed, and how it is opened again.
        stepping: what networks that keep state do about frames that are missing or early (timebase.stepping): by
            default what their bundles say. Each camera has a state of its own.
        rig: calibration, or its TOML file, for engines that take a rig; by default the one that frames bring. Where
            `sources` is a mapping whose names are the rig's sensors (`lidar` among them), each is a sensor of its own, and a
            result belongs to a moment (docs/streaming.md). watch_rig: use the file anew when it changes.
        sync: how their parts become moments. lidar_budget_ms: what the LiDAR's encoder may take; a sweep that would take
            longer is cropped, then made coarser, which the result's `notes` say (docs/fusion.md).

        Raises: what opening the bundles, sources and sinks raises. While it runs, the first error of
        any thread comes out of the iteration.
        """
        self.metrics = Metrics()
        self.sources: dict[str, Source] = {}
        self.engines: dict[str, Engine] = {}
        self._stop = threading.Event()
        self._stopping = threading.Lock()
        self._stepping = threading.RLock()
        """Held by who works on the next result: nothing is taken from under it."""
        self._error: BaseException | None = None
        self._error_lock = threading.Lock()
        self._watches: dict[str, Watch] = {}
        self._outlets: list[Outlet] = []
        self._readers: dict[str, threading.Thread] = {}
        self._workers: list[Worker] = []
        self._own_engines: list[Engine] = []
        self._threads = threads
        self._policy_of_steps = stepping
        self._swapping = threading.Lock()
        self._rig_file: Path | None = None
        self._follower: threading.Thread | None = None
        self._results: Mailbox[StreamResult] | None = None
        self._previous: StreamResult | None = None
        self._started = False
        self._closed = False
        self._asked: queue.SimpleQueue[concurrent.futures.Future[StreamResult | None] | None] | None = None
        self._pending: concurrent.futures.Future[StreamResult | None] | None = None
        self._wrapped: asyncio.Future[StreamResult | None] | None = None
        opened: list[Sink] = []
        try:
            self._rig_file = Path(rig) if watch_rig and isinstance(rig, (str, Path)) else None
            self._rig_stamp = stamp(self._rig_file) if self._rig_file is not None else None
            given, found = isinstance(sources, Mapping), read_rig(rig)
            for name, source in named("source", sources, camera_name).items():
                if isinstance(source, Source) and limit is not None:
                    _set_limit(source, limit)
                reopen = None if isinstance(source, Source) else partial(open_source, source, limit=limit)
                watch = Watch(
                    reopen,
                    self.metrics,
                    name,
                    stop=self._stop,
                    source=source if isinstance(source, Source) else None,
                    options=watch_options,
                )
                self._watches[name] = watch
                self.sources[name] = watch.open()
            live = any(source.live for source in self.sources.values())
            if policy not in (None, "latest", "block"):
                raise UsageError(f"stream: policy {policy!r} is unknown, expected 'latest' or 'block'")
            if on_sink_error not in (None, "raise", "continue"):
                raise UsageError(
                    f"stream: on_sink_error {on_sink_error!r} is unknown, expected 'raise' or 'continue'"
                )
            self.policy: Policy = policy or ("latest" if live else "block")
            self._sinks_matter = (on_sink_error or ("continue" if live else "raise")) == "raise"
            for name, bundle in named("bundle", bundles, engine_name).items():
                self.engines[name] = engine = (
                    bundle if isinstance(bundle, Engine) else load(bundle, threads=threads, variant=variant)
                )
                if not isinstance(bundle, Engine):
                    self._own_engines.append(engine)
            fps = next((s.fps for s in self.sources.values() if s.fps), None)
            for sink in [sinks] if isinstance(sinks, (Sink, str, Path)) else list(sinks):
                check_kind("sink", sink)
                if isinstance(sink, Sink) and any(
                    sink is other for other in opened
                ):  # two threads would write to it
                    raise UsageError(f"stream: sink {printable(sink.path)}: given twice. Leave one out")
                opened.append(sink if isinstance(sink, Sink) else open_sink(sink, fps=fps))
            self.sinks = tuple(opened)
            if watch_rig and self._rig_file is None:
                raise UsageError("stream: watch_rig needs the rig's file. Give its path as `rig`")
            for name, engine in self.engines.items():
                self._workers.append(
                    open_worker(
                        self,
                        name,
                        Pipelines(engine, stepping),
                        given=given,
                        score=score_threshold,
                        rig=found,
                        sync=sync,
                        lidar_budget_ms=lidar_budget_ms,
                    )
                )
            if len(self._workers) > 1:  # a place for each engine and camera: none hides another's results
                places = [place for worker in self._workers for place in worker.places(self.sources)]
                self._results = Mailbox(places, newest=self.policy == "latest", stop=self._stop)
        except BaseException:
            for sink in opened:
                sink.abort()
            self._release_all()
            raise

    # --- running ---

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StreamResult:
        """The next result. Raises: the first error of any thread; StopIteration at the end or after `stop`."""
        try:
            with self._stepping:
                self._let_go()
                if not self._started:
                    self._start()
                self._previous = item = self._next()
        except BaseException as error:
            self._finish(error)
            raise
        if item is None:
            self._finish(None)
            raise StopIteration
        return item

    def _start(self) -> None:
        if self._closed:
            return
        self._started = True
        names = unique(str(sink.path) for sink in self.sinks)
        for name, sink in zip(names, self.sinks, strict=True):
            sink.start(self.metrics)
            self._outlets.append(
                Outlet(sink, name, self.metrics, wait=self.policy == "block", stop=self._stop)
            )
        for name, engine in self.engines.items():
            self._tell_engine(name, engine)
        for name, watch in self._watches.items():
            self._readers[name] = self._thread(f"edgekit-source-{name}", self._read, name, watch)
        if self._rig_file is not None:
            file = self._rig_file
            self._follower = self._thread(
                "edgekit-rig", follow, file, self._rig_stamp, self._stop, lambda: self.recalibrate(file),
                lambda text: self.metrics.fault("rig", "calibration", text),
            )  # fmt: skip
        if self._results is not None:
            for worker in self._workers:
                worker.thread = self._thread(f"edgekit-engine-{worker.name}", self._work, worker)

    def _tell_engine(self, name: str, engine: Engine) -> None:
        facts: dict[str, object] = {"bundle": engine.bundle.path.name}
        described = engine.describe()
        for step, found in described.items():
            if len(described) == 1:
                facts |= found
            else:  # a line a step; `Engine.describe` has the rest
                threads = found.get("threads")
                many = f"{threads} threads" if isinstance(threads, int) and threads != 1 else threads
                facts[step] = f"{found['variant']}, {'1 thread' if many == 1 else many}"
        self.metrics.engine_facts(name, facts)

    def _thread(self, name: str, target: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
        thread.start()
        return thread

    def _fail(self, error: BaseException) -> None:
        """Keep the first error and wake everyone."""
        with self._error_lock:
            if self._error is None and not self._stop.is_set():
                self._error = error
        self._halt()

    def stop(self) -> None:
        """End the stream from any thread or signal handler: the iteration ends within a fraction of a second."""
        # takes no lock that the interrupted thread may hold, the event's own included; the others look at the event
        if not self._stop.is_set() and self._stopping.acquire(blocking=False):
            try:
                self._stop.set()
            finally:
                self._stopping.release()

    def _halt(self) -> None:
        """Stop, and wake everyone now."""
        self.stop()
        for worker in self._workers:
            for frame in worker.box.close():
                frame.release()
        if self._results is not None:
            for item in self._results.close():
                item.frame.release()

    def _read(self, camera: str, watch: Watch) -> None:
        """A source's thread: frames to every engine's mailbox."""
        boxes = [worker.box for worker in self._workers]
        try:
            for frame in watch.frames():
                for box in boxes[1:]:
                    self._leave(box, camera, frame.share())
                self._leave(boxes[0], camera, frame)
                if self.policy == "latest":
                    time.sleep(_HAND_OVER_S)
        except BaseException as error:  # noqa: BLE001 - raised to the caller
            self._fail(error)  # before the end is told, or the caller would take it for a good one
        finally:
            for box in boxes:
                box.end(camera)

    def _leave(self, box: Mailbox[Frame], camera: str, frame: Frame) -> None:
        replaced = box.put(camera, frame)
        if replaced is not None:
            replaced.release()
            if not self._stop.is_set():
                self.metrics.drop(camera, "superseded")

    def _next(self) -> StreamResult | None:
        while True:
            if self._error is not None:
                raise self._error
            if self._stop.is_set():
                return None
            self._check_sinks()
            try:
                if self._results is None:
                    item = self._step(self._workers[0])
                else:
                    item = self._results.take(POLL_S)
            except Closed:
                if self._error is not None:
                    raise self._error from None
                return None
            if item is not None:
                return item

    def _work(self, worker: Worker) -> None:
        """An engine's thread, where there are several."""
        assert self._results is not None
        try:
            while not self._stop.is_set():
                item = self._step(worker)
                if item is not None:
                    replaced = self._results.put(worker.place(item.camera), item)
                    if replaced is not None:
                        replaced.frame.release()
        except Closed:
            return
        except BaseException as error:  # noqa: BLE001 - raised to the caller
            self._fail(error)
        finally:
            for place in worker.places(self.sources):
                self._results.end(place)

    def _step(self, worker: Worker) -> StreamResult | None:
        """One frame through one engine, and to the sinks. Raises: Closed, StreamError."""
        self._count(worker)
        try:
            item = worker.step(POLL_S)
        except EdgekitError as error:
            self.metrics.fault(worker.name, "engine-failed", str(error))
            raise
        if item is None:
            return None
        try:
            worker.uncounted = item
            self._give(item)
        except BaseException:
            item.frame.release()
            raise
        return item

    def _count(self, worker: Worker) -> None:
        """Count a worker's last result: when the next one is asked for, not while the caller waits for this one."""
        item, worker.uncounted = worker.uncounted, None
        if item is not None:
            self.metrics.result(item)

    def _give(self, item: StreamResult) -> None:
        """To every sink; the camera's buffers only as far as it can spare them."""
        frame = item.frame
        watch = self._watches.get(frame.camera)
        if watch is not None:
            spare = watch.source.spare if watch.source is not None else 0
        else:  # a moment of a rig holds a buffer of each
            most = for_sinks(watch.source for watch in self._watches.values())
            spare = None if most is None else most + _SPARE
        for outlet in self._outlets:
            may_lease = True
            if spare is not None and frame.lease is not None and outlet.sink.needs_pixels:
                held = {lease for o in self._outlets for lease in o.leases(frame.camera)}
                may_lease = frame.lease in held or len(held) < max(1, spare - _SPARE)
            outlet.give(item, may_lease=may_lease)

    def _check_sinks(self) -> None:
        if self._sinks_matter:
            for outlet in self._outlets:
                if outlet.error is not None:
                    raise outlet.error

    def run(self, callback: Callable[[StreamResult], object] | None = None) -> None:
        """Run to the end, with `callback(item)` in this thread for every result."""
        with self:
            for item in self:
                if callback is not None:
                    callback(item)

    def swap(self, bundle: AnyEngine, *, engine: str | None = None, variant: str | None = None) -> Swapped:
        """Go on with another bundle from the next frame, without losing one. From any thread.

        bundle: loaded here beside the running one, with the threads of this stream, or a loaded engine, which
            stays the caller's. An engine that the stream itself had loaded before is closed.
        engine: its name in the stream, where there are several. variant: as for `load`.

        States go on where name, shape and type or scale allow (state.carry_over); the answer says which did.
        Raises: UsageError for an unknown engine, another task or a stream that has ended; what `load` raises.
        Then the old engine goes on as if nothing had been asked.
        """
        return swap_engine(self, bundle, engine, variant)

    def recalibrate(self, rig: Rig | str | Path) -> None:
        """Go on with another calibration (or its file) from the next moment, without losing one. From any thread.

        Returns when the engine has what it needs of it (tables, made beside the running stream), so that no moment waits.
        Raises: UsageError for a file that is none, a rig without a sensor of this stream, or when no engine takes a rig.
        Then the calibration before goes on.
        """
        recalibrate(self, rig)

    # --- asyncio ---

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> StreamResult:
        """As `__next__`, without blocking the event loop. Cancelling the wait loses nothing: the next call gets it."""
        if self._pending is None:
            if self._closed:
                raise StopAsyncIteration
            if self._asked is None:
                self._asked = queue.SimpleQueue()
                self._thread("edgekit-async", self._answer)
            self._pending = concurrent.futures.Future()
            self._asked.put(self._pending)
        try:
            item = await asyncio.shield(self._waiting())
        except asyncio.CancelledError:
            raise
        except BaseException:
            self._pending = self._wrapped = None
            raise
        self._pending = self._wrapped = None
        if item is None:
            raise StopAsyncIteration
        return item

    def _waiting(self) -> asyncio.Future[StreamResult | None]:
        """The pending result for the loop that runs now, which may be another than the one that asked for it."""
        assert self._pending is not None
        loop = asyncio.get_running_loop()
        if self._wrapped is None or self._wrapped.get_loop() is not loop:
            self._wrapped = asyncio.wrap_future(self._pending, loop=loop)
        return self._wrapped

    def _answer(self) -> None:
        """The thread behind `__anext__`; a daemon, so that a silent camera never keeps the process from ending."""
        assert self._asked is not None
        while (future := self._asked.get()) is not None:
            try:
                item = next(self, None)
            except BaseException as error:  # noqa: BLE001 - raised to who waits
                future.set_exception(error)
            else:
                future.set_result(item)
            del future  # holds the frame

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._pending is not None:
            with suppress(BaseException):
                await asyncio.shield(self._waiting())
            self._pending = self._wrapped = None
        await asyncio.get_running_loop().run_in_executor(None, self._finish, error)

    # --- the end ---

    def close(self) -> None:
        """Stop, finish the sinks, give everything back. Calling it again does nothing. Raises: OutputError.

        By the thread that takes the results, or after it: others call `stop()`.
        """
        self._finish(None)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish(error)

    def _let_go(self) -> None:
        previous, self._previous = self._previous, None
        if previous is not None:
            previous.frame.release()

    def _finish(self, error: BaseException | None) -> None:
        """End everything; `error` is on its way to the caller. Raises: a sink's error when there is no other."""
        if self._closed:
            return
        self._closed = True
        # what sinks were given before the end they write, unless the work failed; Ctrl-C, the end of the
        # program or of a task is no failure
        kept = error is None or not isinstance(error, Exception)
        try:
            sink_error = self._end(kept)
        except BaseException:  # an impatient second Ctrl-C: nothing is waited for
            for end in self._ends():
                end.abandon() if isinstance(end, Outlet) else end.abort()
            self._release_all(idle=False)
            raise
        finally:
            if self._asked is not None:
                self._asked.put(None)
        if sink_error is not None and error is None and self._sinks_matter:
            raise sink_error

    def _end(self, kept: bool) -> BaseException | None:
        """Join the threads, finish the sinks or drop what they have, give everything back. Returns a sink's error."""
        self._halt()
        idle = self._stepping.acquire(timeout=JOIN_S)  # not so when another thread is in a call that hangs
        try:
            self._let_go()
            for outlet in self._outlets:
                outlet.stop(drain=kept)
            for worker in self._workers:
                if worker.thread is not None:
                    worker.thread.join(JOIN_S)
            for worker in self._workers:
                self._count(worker)
            for camera, reader in self._readers.items():
                self._watches[camera].join(reader)
            if self._follower is not None:
                self._follower.join(JOIN_S)
            sink_error: BaseException | None = None
            for end in self._ends():
                try:
                    if isinstance(end, Outlet) and end.error is not None:
                        raise end.error
                    if kept:
                        end.close()
                    else:
                        end.abort()
                except BaseException as problem:  # noqa: BLE001 - the other sinks are finished first
                    sink_error = sink_error or problem
            self._release_all(idle)
        finally:
            if idle:
                self._stepping.release()
        return sink_error

    def _ends(self) -> list[Outlet | Sink]:
        """The sinks by their outlets; as they are where the stream did not come so far."""
        begun = [outlet.sink for outlet in self._outlets]
        return [*self._outlets, *(sink for sink in self.sinks if sink not in begun)]

    def _release_all(self, idle: bool = True) -> None:
        for worker in self._workers:
            if idle if worker.thread is None else not worker.thread.is_alive():
                worker.close()  # not under a call that hangs
        for camera, watch in self._watches.items():
            if camera not in self._readers:  # else its thread has done it
                watch.close()
        for engine in tuple(self._own_engines):
            engine.close()


def _set_limit(source: Source, limit: int) -> None:
    """`limit` frames more of an open source. Raises: UsageError."""
    if limit < 1:
        raise UsageError(f"source {source.uri}: limit {limit} gives no frames, expected at least 1")
    most = source._delivered + limit
    source.limit = most if source.limit is None else min(source.limit, most)


stream = Stream
"""What `edgekit.stream(...)` calls."""

__all__ = ["Policy", "Stream", "stream"]
