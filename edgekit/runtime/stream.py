"""Sensors -> engines -> results and sinks, until the end, an error or a stop.

Who does what: one thread per source reads frames and keeps the newest (or, for files, waits); one engine
works in the caller's thread, so that a result is never older than the asking; several engines work
in a thread each; every sink has its own. All of them share one stop event, and the first error of any
is raised to the caller.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from edgekit.bundle import Bundle
from edgekit.errors import EdgekitError, StreamError, UsageError
from edgekit.runtime.engine import Engine, load
from edgekit.runtime.frames import Frame, Hop
from edgekit.runtime.mailbox import Closed, Mailbox
from edgekit.runtime.metrics import Metrics
from edgekit.runtime.outlet import Outlet
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks import Sink, open_sink
from edgekit.runtime.sources import Source, open_source
from edgekit.runtime.watch import Watch, WatchOptions

Policy = Literal["latest", "block"]
AnyEngine = str | Path | Bundle | Engine
AnySource = str | Path | Source
POLL_S = 0.1
"""No thread waits longer than this without looking at the stop event."""
JOIN_S = 5.0
"""How long the end of a stream waits for an engine that hangs."""
_HAND_OVER_S = 2e-4
"""How long a source's thread keeps out of the way once a frame is there: the interpreter's lock is free for the engine's."""
_SPARE = 2
"""Buffers that sinks leave to the driver and the engine."""


def stream(
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
) -> Stream:
    """Run engines on live sensors or files: `for item in edgekit.stream("m.edge", "v4l2:/dev/video0"): ...`

    bundles: bundle(s) to load, or loaded engines, which stay the caller's; a mapping names them.
    sources: what `open_source` takes, or open sources; a mapping names the cameras. Every engine gets every
        camera's frames.
    sinks: what `open_sink` takes, or sinks; the stream closes all of them.
    policy: `latest` keeps only the newest frame of each camera while the engine is busy; `block` loses
        none. By default `latest` when any source is live.
    threads, variant: as for `load`. limit: frames per source.
    on_sink_error: `raise` ends the stream when a sink fails; `continue` goes on without that sink and
        counts it, so that a full disk does not blind a robot. By default `continue` for live sources.
    watch_options: when a live source counts as failed, and how it is opened again.

    Raises: what opening the bundles, sources and sinks raises. While it runs, the first error of
    any thread comes out of the iteration.
    """
    return Stream(
        bundles,
        sources,
        sinks=sinks,
        score_threshold=score_threshold,
        policy=policy,
        threads=threads,
        variant=variant,
        limit=limit,
        on_sink_error=on_sink_error,
        watch_options=watch_options,
    )


class Stream:
    """An iterator of StreamResult, a context manager and an asynchronous iterator; one consumer at a time.

    metrics: ages, stage times, drops and faults so far. sources, engines, sinks: by name.
    Each result's frame is valid until the next result is asked for.
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
    ) -> None:
        """As `stream`."""
        self.metrics = Metrics()
        self.sources: dict[str, Source] = {}
        self.engines: dict[str, Engine] = {}
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._error_lock = threading.Lock()
        self._watches: dict[str, Watch] = {}
        self._outlets: list[Outlet] = []
        self._readers: dict[str, threading.Thread] = {}
        self._threads: list[threading.Thread] = []
        self._workers: list[_Worker] = []
        self._own_engines: list[Engine] = []
        self._results: Mailbox[StreamResult] | None = None
        self._previous: StreamResult | None = None
        self._started = False
        self._closed = False
        self._executor: ThreadPoolExecutor | None = None
        self._pending: asyncio.Future[StreamResult | None] | None = None
        opened: list[Sink] = []
        try:
            for name, source in _named(sources, _camera_name).items():
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
            for name, bundle in _named(bundles, _engine_name).items():
                self.engines[name] = engine = (
                    bundle if isinstance(bundle, Engine) else load(bundle, threads=threads, variant=variant)
                )
                if not isinstance(bundle, Engine):
                    self._own_engines.append(engine)
            fps = next((s.fps for s in self.sources.values() if s.fps), None)
            given = [sinks] if isinstance(sinks, (Sink, str, Path)) else list(sinks)
            for sink in given:
                opened.append(sink if isinstance(sink, Sink) else open_sink(sink, fps=fps))
            self.sinks = tuple(opened)
            for name, engine in self.engines.items():
                box: Mailbox[Frame] = Mailbox(self.sources, newest=self.policy == "latest")
                self._workers.append(_Worker(name, engine, box, score_threshold, self._stop))
            if len(self._workers) > 1:
                self._results = Mailbox(self.engines, newest=self.policy == "latest")
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
        self._let_go()
        try:
            if not self._started:
                self._start()
            item = self._next()
        except BaseException as error:
            self._finish(error)
            raise
        if item is None:
            self._finish(None)
            raise StopIteration
        self._previous = item
        return item

    def _start(self) -> None:
        if self._closed:
            return
        self._started = True
        names = _sink_names(self.sinks)
        for name, sink in zip(names, self.sinks, strict=True):
            sink.start(self.metrics)
            self._outlets.append(Outlet(sink, name, self.metrics, wait=self.policy == "block"))
        for name, engine in self.engines.items():
            facts: dict[str, object] = {"bundle": engine.bundle.path.name}
            described = engine.describe()
            for segment, found in described.items():
                prefix = f"{segment} " if len(described) > 1 else ""
                facts |= {f"{prefix}{key}": value for key, value in found.items()}
            self.metrics.engine_facts(name, facts)
        for name, watch in self._watches.items():
            self._readers[name] = self._thread(f"edgekit-source-{name}", self._read, name, watch)
        if self._results is not None:
            for worker in self._workers:
                self._threads.append(self._thread(f"edgekit-engine-{worker.name}", self._work, worker))

    def _thread(self, name: str, target: Callable[..., None], *arguments: Any) -> threading.Thread:
        def run() -> None:
            try:
                target(*arguments)
            except BaseException as error:  # noqa: BLE001 - raised to the caller
                self._fail(error)

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread

    def _fail(self, error: BaseException) -> None:
        """Keep the first error and wake everyone."""
        with self._error_lock:
            if self._error is None and not self._stop.is_set():
                self._error = error
        self.stop()

    def stop(self) -> None:
        """End the stream from any thread or signal handler: the iteration ends within a fraction of a second."""
        self._stop.set()
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

    def _work(self, worker: _Worker) -> None:
        """An engine's thread, where there are several."""
        assert self._results is not None
        try:
            while not self._stop.is_set():
                item = self._step(worker)
                if item is not None:
                    replaced = self._results.put(worker.name, item)
                    if replaced is not None:
                        replaced.frame.release()
        except Closed:
            return
        finally:
            self._results.end(worker.name)

    def _step(self, worker: _Worker) -> StreamResult | None:
        """One frame through one engine, and to the sinks. Raises: Closed, StreamError."""
        frame = worker.box.take(POLL_S)
        if frame is None:
            return None
        try:
            item = worker.run(frame)
        except BaseException as error:
            frame.release()
            if isinstance(error, EdgekitError):
                self.metrics.fault(worker.name, "engine-failed", str(error))
            raise
        self.metrics.result(item)
        source = self._watches[frame.camera].source
        spare = source.spare if source is not None else 0
        for outlet in self._outlets:
            held = sum(o.leases for o in self._outlets)
            outlet.give(item, may_lease=spare is None or frame.lease is None or held < spare - _SPARE)
        return item

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

    # --- asyncio ---

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> StreamResult:
        """As `__next__`, without blocking the event loop. Cancelling the wait loses nothing: the next call gets it."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="edgekit-async")
        if self._pending is None:
            loop = asyncio.get_running_loop()
            self._pending = loop.run_in_executor(self._executor, next, self, None)
        item = await asyncio.shield(self._pending)
        self._pending = None
        if item is None:
            raise StopAsyncIteration
        return item

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._pending is not None:
            with suppress(BaseException):
                await asyncio.shield(self._pending)
            self._pending = None
        await asyncio.get_running_loop().run_in_executor(None, self._finish, error)

    # --- the end ---

    def close(self) -> None:
        """Stop, finish the sinks, give everything back. Calling it again does nothing. Raises: OutputError."""
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
        self._let_go()
        self.stop()
        # what sinks were given before the end they write, unless the work failed
        kept = error is None or isinstance(error, (KeyboardInterrupt, GeneratorExit))
        sink_error: BaseException | None = None
        for outlet in self._outlets:
            outlet.stop(drain=kept)
        for thread in self._threads:
            thread.join(JOIN_S)
        for camera, reader in self._readers.items():
            self._watches[camera].join(reader)
        for outlet in self._outlets:
            try:
                if outlet.error is not None:
                    raise outlet.error
                if kept:
                    outlet.close()
                else:
                    outlet.abort()
            except BaseException as problem:  # noqa: BLE001 - the other sinks are finished first
                sink_error = sink_error or problem
        if not self._started:
            for sink in self.sinks:
                sink.close() if kept else sink.abort()
        self._release_all()
        if self._executor is not None:
            self._executor.shutdown(wait=False)
        if sink_error is not None and error is None and self._sinks_matter:
            raise sink_error

    def _release_all(self) -> None:
        for worker in self._workers:
            worker.close()
        if not self._started:  # else its thread has done it
            for watch in self._watches.values():
                watch.close()
        for engine in self._own_engines:
            engine.close()


class _Worker:
    """One engine's session and the frames that wait for it."""

    def __init__(
        self, name: str, engine: Engine, box: Mailbox[Frame], score: float | None, stop: threading.Event
    ) -> None:
        self.name = name
        self.box = box
        self._score = score
        self._stop = stop
        self._pipeline = engine.pipeline()
        session = self._pipeline.session
        written = sum(array.nbytes for array in session.inputs.values())
        self._hops: tuple[Hop, ...] = (Hop("fused kernel -> engine input", "CPU", written=written),)
        between = getattr(session, "bytes_copied_per_run", 0)
        if between:
            self._hops += (Hop("between plan steps", "CPU", copied=between, written=between),)

    def run(self, frame: Frame) -> StreamResult:
        """One frame through the engine. Raises: StreamError when the inference library fails."""
        picked = time.monotonic_ns()
        result = self._pipeline(frame.pixels, score_threshold=self._score)
        taken = frame.taken_ns
        preprocess, engine, decode = self._pipeline.stage_ns
        stages = {
            "transport": frame.captured_ns - taken,
            "wait": picked - frame.captured_ns,
            "preprocess": preprocess,
            "engine": engine,
            "decode": decode,
        }
        age = time.monotonic_ns() - taken
        return StreamResult(frame, result, age, stages, self.name, frame.hops + self._hops)

    def close(self) -> None:
        close = getattr(self._pipeline.session, "close", None)
        if close is not None:
            close()


def _named(given: Any, name: Callable[[Any], str]) -> dict[str, Any]:
    """One thing, several, or a mapping of them, by unique name."""
    if isinstance(given, Mapping):
        found = {str(key): value for key, value in given.items()}
    else:
        several = given if isinstance(given, (list, tuple)) else [given]
        found = {}
        for thing in several:
            base = text = name(thing)
            number = 1
            while text in found:
                number += 1
                text = f"{base}-{number}"
            found[text] = thing
    if not found:
        raise UsageError("stream: expected at least one bundle and one source, got none")
    return found


def _camera_name(source: Any) -> str:
    """A short name: `video0`, `csi0`, `street`, the file's name without its suffix."""
    uri = source.uri if isinstance(source, Source) else re.sub(r"//[^/@]*@", "//", str(source))  # no password
    scheme, _, rest = uri.partition("?")[0].rpartition(":")
    name = "" if scheme == "gst" else Path(rest).stem
    return (scheme + name if not name or name.isdecimal() else name)[:40] or "camera"


def _engine_name(bundle: Any) -> str:
    """The bundle's file name up to the first dot."""
    if isinstance(bundle, Engine):
        bundle = bundle.bundle
    path = bundle.path if isinstance(bundle, Bundle) else Path(bundle)
    return Path(path).name.partition(".")[0] or "engine"


def _sink_names(sinks: Iterable[Sink]) -> list[str]:
    return list(_named([str(sink.path) for sink in sinks], str)) if sinks else []


__all__ = ["Policy", "Stream", "StreamError", "stream"]
