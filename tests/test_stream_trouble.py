"""edgekit.stream where two things go wrong at once: no deadlock, nothing left open, no error lost, no sink starved."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.errors import OutputError, StreamError, UsageError
from edgekit.runtime import outlet
from edgekit.runtime.engine import Engine
from edgekit.runtime.frames import Frame
from edgekit.runtime.mailbox import Mailbox
from edgekit.runtime.metrics import Event, Metrics
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sources.base import Source
from edgekit.runtime.sources.iterator import IteratorSource, PushSource
from tests import gst_tools
from tests.classifiers import tiny_engine
from tests.test_stream import Kept, Pool, interrupt

pytestmark = [pytest.mark.clock, pytest.mark.usefixtures("_no_thread_stays")]

PICTURE = np.zeros((48, 64, 3), np.uint8)
SOON_S = 4.0
"""What separates works from hangs on a busy machine."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with tiny_engine(tmp_path_factory.mktemp("tiny")) as loaded:
        yield loaded


def file(frames: int = 6) -> IteratorSource:
    return IteratorSource([PICTURE] * frames)


class Stuck(Kept):
    """A sink whose writes do not return before `go` is set."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at, self.go, self.reached = at, threading.Event(), threading.Event()

    def _write(self, item: StreamResult) -> None:
        if len(self.seen) >= self.at:
            self.reached.set()
            assert self.go.wait(30)
        super()._write(item)


# --- stop ----------------------------------------------------------------------------------------


def test_stop_within_stop_takes_no_lock_twice(engine: Engine) -> None:
    """A signal handler that calls stop() while the main thread is in it."""
    with edgekit.stream(engine, file()) as stream:
        really, calls = stream._stop.set, []

        def interrupted() -> None:  # as if the signal came while the event's own lock is held
            calls.append(1)
            if len(calls) < 3:
                stream.stop()
            really()

        stream._stop.set = interrupted  # type: ignore[method-assign]
        stream.stop()
        assert calls == [1] and stream._stop.is_set()


def test_stop_from_a_handler_while_a_buffer_is_given_back(engine: Engine) -> None:
    """stop() gives nothing back itself: the interrupted thread may hold the camera's lock."""

    class Interrupted(Pool):
        def _back(self, index: int) -> None:
            assert self.lock.acquire(timeout=1), "a buffer is given back within another's giving back"
            try:
                self.free.append(index)
                self.out -= 1
                if self.seq > 4 and threading.current_thread() is threading.main_thread():
                    stream.stop()  # the handler runs here
            finally:
                self.lock.release()

    source = Interrupted(10**6, period_s=0.001)
    with edgekit.stream(engine, source, policy="block") as stream:
        for _ in stream:
            time.sleep(0.005)  # two wait in the mailbox meanwhile
    assert source.out == 0


def test_stop_ends_a_file_run_whose_sink_hangs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlet, "JOIN_S", 0.3)
    sink = Stuck(at=1)
    stream = edgekit.stream(engine, file(50), sinks=sink)
    began: list[float] = []

    def stop() -> None:
        sink.reached.wait(10)
        time.sleep(0.1)  # the caller now waits for the sink
        began.append(time.monotonic())
        stream.stop()

    threading.Thread(target=stop).start()
    fuse = threading.Timer(10, sink.go.set)  # a failing test ends, too
    fuse.start()
    with pytest.raises(OutputError, match=r"sink kept: its last write did not end within 0\.3 s"), stream:
        for _ in stream:
            pass
    assert time.monotonic() - began[0] < SOON_S
    sink.go.set()
    fuse.cancel()


def test_an_impatient_second_ctrl_c(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while the end waits for a sink that hangs: the others are dropped, nothing stays open."""
    stuck, good = Stuck(), Kept()
    source = Pool(10**6, period_s=0.002)

    def again(self: outlet.Outlet, *, drain: bool) -> bool:
        raise KeyboardInterrupt

    def work() -> None:
        with edgekit.stream(engine, source, sinks=[stuck, good]) as stream:
            next(stream)
            assert stuck.reached.wait(10)
            monkeypatch.setattr(outlet.Outlet, "stop", again)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    stuck.go.set()
    deadline = time.monotonic() + SOON_S
    while (stuck.ended, good.ended, source._closed) != ("aborted", "aborted", True):
        assert time.monotonic() < deadline, (stuck.ended, good.ended, source._closed)
        time.sleep(0.01)
    assert source.out == 0


def test_close_from_another_thread_waits_for_the_result_in_work(engine: Engine) -> None:
    stream = edgekit.stream(engine, Pool(10**6, period_s=0.002))
    worker, inside, closed_within = stream._workers[0], threading.Event(), []
    run, close = worker.run, worker.close

    def slow(frame: Frame) -> StreamResult:
        inside.set()
        time.sleep(0.3)
        closed_within.append(not worker.pipelines[0].session._jobs)
        return run(frame)

    worker.run, worker.close = slow, close  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: inside.wait(10) and stream.close())
    thread.start()
    assert len(list(stream)) <= 1
    thread.join()
    assert closed_within == [False]


# --- errors --------------------------------------------------------------------------------------


def test_a_source_s_error_is_not_taken_for_its_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller may wake up between the two."""
    really = Mailbox.end

    def slowly(self: Mailbox[Any], sender: str) -> None:
        really(self, sender)
        time.sleep(0.2)

    monkeypatch.setattr(Mailbox, "end", slowly)

    def frames() -> Iterator[np.ndarray]:
        yield PICTURE
        raise StreamError("source mine: broke. Mend it")

    for engines in (engine, [engine, engine]):
        with (
            pytest.raises(StreamError, match="broke"),
            edgekit.stream(engines, IteratorSource(frames())) as stream,
        ):
            for _ in stream:
                pass


def test_an_engine_s_error_is_not_taken_for_its_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    really = Mailbox.end

    def slowly(self: Mailbox[Any], sender: str) -> None:
        really(self, sender)
        time.sleep(0.1)

    monkeypatch.setattr(Mailbox, "end", slowly)
    with edgekit.stream({"a": engine, "b": engine}, file(1)) as stream:
        for worker in stream._workers:
            worker.close()
        with pytest.raises(StreamError, match="closed"):
            list(stream)


class BadStart(Kept):
    def start(self, metrics: Metrics) -> None:
        raise OutputError("sink bad: cannot begin. Mend it")


def test_a_sink_that_cannot_start_leaves_nothing_open(engine: Engine) -> None:
    first, bad, last = Kept(), BadStart(), Kept()
    source = Pool(10**6, period_s=0.002)
    with (
        pytest.raises(OutputError, match="cannot begin"),
        edgekit.stream(engine, source, sinks=[first, bad, last]) as stream,
    ):
        next(stream)
    assert (first.ended, bad.ended, last.ended) == ("aborted",) * 3
    assert source._closed


def test_a_sink_that_cannot_finish_leaves_nothing_open(engine: Engine) -> None:
    class BadEnd(Kept):
        def _finish(self) -> None:
            raise OutputError("sink bad: cannot finish. Mend it")

    source, last = file(), Kept()
    with (
        pytest.raises(OutputError, match="cannot finish"),
        edgekit.stream(engine, source, sinks=[BadEnd(), last]),
    ):
        pass  # never started
    assert source._closed and last.ended == "closed"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(0), asyncio.CancelledError()])
def test_the_end_of_the_program_or_task_keeps_what_was_written(engine: Engine, error: BaseException) -> None:
    sink = Kept()
    interrupt(edgekit.stream(engine, file(), sinks=sink), error)
    assert sink.ended == "closed" and len(sink.seen) == 2


def test_an_event_callback_that_raises_does_not_end_perception(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def broken(event: Event) -> None:
        calls.append(event)
        raise BrokenPipeError("their terminal is gone")

    def frames() -> Iterator[Frame]:
        for seq in (0, 5, 40, 41, 90):
            frame = next(iter(IteratorSource([PICTURE])))
            frame.seq = seq
            yield frame

    with edgekit.stream(engine, IteratorSource(frames(), live=True), policy="block") as stream:
        stream.metrics.on_event = broken
        assert [item.frame.seq for item in stream] == [0, 5, 40, 41, 90]
    assert len(calls) == 1 and stream.metrics.on_event is None
    assert "their terminal is gone" in capsys.readouterr().err


def test_metrics_may_be_read_by_a_handler_of_the_thread_that_counts() -> None:
    metrics = Metrics()
    with metrics._lock:  # where the signal came
        assert metrics._lock.acquire(timeout=1)
        metrics._lock.release()
        assert metrics.snapshot()["cameras"] == {}


# --- sinks and the camera's buffers --------------------------------------------------------------


@pytest.mark.parametrize("spare", [1, 2, 3])
def test_a_camera_of_few_buffers_feeds_its_sinks_too(engine: Engine, spare: int) -> None:
    """GStreamer's live sources spare two."""
    sink = Kept()
    with edgekit.stream(engine, Pool(60, period_s=0.004, spare=spare), sinks=sink) as stream:
        seen = sum(1 for _ in stream)
    assert len(sink.seen) > seen / 2


def test_a_live_gstreamer_camera_feeds_its_sinks_too(engine: Engine) -> None:
    gst_tools.need("videotestsrc", "appsink")
    sink, uri = Kept(), "gst:videotestsrc is-live=true num-buffers=20 ! video/x-raw,format=BGR,framerate=50/1"
    with edgekit.stream(engine, uri, sinks=sink) as stream:
        seen = sum(1 for _ in stream)
    assert len(sink.seen) > seen / 2


def test_sinks_share_a_frame_s_buffer(engine: Engine) -> None:
    """One buffer for all of them: the third is not starved by the first two."""
    sinks = [Kept() for _ in range(4)]
    with edgekit.stream(engine, Pool(60, period_s=0.004, spare=4), sinks=sinks) as stream:
        seen = sum(1 for _ in stream)
    assert min(len(sink.seen) for sink in sinks) > seen / 2


def test_a_slow_sink_of_one_camera_does_not_cost_the_other_its_pictures(engine: Engine) -> None:
    class OneSlow(Kept):
        def _write(self, item: StreamResult) -> None:
            self.slow_s = 0.2 if item.camera == "slow" else 0.0
            super()._write(item)

    slow, fast = OneSlow(), Kept()
    sources = {"slow": Pool(50, period_s=0.004, spare=4), "fast": Pool(50, period_s=0.004, spare=4)}
    with edgekit.stream(engine, sources, sinks=[slow, fast]) as stream:
        given = Counter(item.camera for item in stream)
    assert len(fast.seen) > sum(given.values()) / 2


def test_several_engines_never_wait_for_a_live_sink(engine: Engine) -> None:
    """Two engines that give at the same time find one place between them."""
    stuck = Stuck()
    out = outlet.Outlet(stuck, "stuck", Metrics(), wait=False)
    meeting = threading.Barrier(2)

    class Shared(StreamResult):
        def share(self) -> StreamResult:
            with contextlib.suppress(threading.BrokenBarrierError):
                meeting.wait(0.5)
            return super().share()

    def item(kind: Callable[..., StreamResult]) -> StreamResult:
        return kind(next(iter(IteratorSource([PICTURE]))), "result", 1)

    out.give(item(StreamResult))
    assert stuck.reached.wait(10)
    threads = [threading.Thread(target=out.give, args=(item(Shared),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON_S)
    waiting = [thread for thread in threads if thread.is_alive()]
    stuck.go.set()
    assert out.stop(drain=True)
    out.close()
    assert not waiting


# --- several of each -----------------------------------------------------------------------------


def test_no_camera_s_result_hides_another_s(engine: Engine) -> None:
    """The newest of each engine and camera waits for the caller."""
    left, right = PushSource("left"), PushSource("right")
    seen: set[tuple[str, str]] = set()
    with edgekit.stream({"a": engine, "b": engine}, {"left": left, "right": right}) as stream:
        left.push(PICTURE)
        next(stream)

        def results() -> int:
            return sum(e["results"] for e in stream.metrics.snapshot()["engines"].values())

        deadline = time.monotonic() + 10
        for source, total in ((left, 4), (right, 6)):
            while results() < total - 2:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            source.push(PICTURE)
        while results() < 6:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        left.end()
        right.end()
        seen = {(item.engine, item.camera) for item in stream}
    assert seen == {("a", "left"), ("a", "right"), ("b", "left"), ("b", "right")}


def test_limit_counts_for_open_sources_too(engine: Engine) -> None:
    source = file(9)
    assert source.read() is not None
    with edgekit.stream(engine, source, limit=3) as stream:
        assert [item.frame.seq for item in stream] == [1, 2, 3]
    with pytest.raises(UsageError, match="limit 0"):
        edgekit.stream(engine, file(), limit=0)


def test_what_is_given_twice_or_is_no_such_thing_is_said(engine: Engine) -> None:
    sink, source = Kept(), file()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"sinks": [sink, sink]}, "sink kept: given twice"),
        ({"sinks": [3]}, r"sink 3 \(int\): expected"),
        ({"sources": [source, source]}, "source iterator: given twice"),
        ({"sources": {"a": source, "b": source}}, "source iterator: given twice"),
        ({"sources": 0}, r"source 0 \(int\): expected .* A camera is v4l2:/dev/video0"),
        ({"sources": iter([PICTURE])}, "expected .*IteratorSource"),
        ({"bundles": None}, r"bundle None \(NoneType\): expected"),
    ]
    for options, problem in cases:
        with pytest.raises(UsageError, match=problem):
            edgekit.stream(**{"bundles": engine, "sources": file(), **options})


# --- asyncio -------------------------------------------------------------------------------------


def test_asyncio_after_the_end_and_after_close(engine: Engine) -> None:
    async def work() -> int:
        stream = edgekit.stream(engine, file(2))
        async with stream:
            count = len([item async for item in stream])
            with pytest.raises(StopAsyncIteration):
                await stream.__anext__()
        with pytest.raises(StopAsyncIteration):
            await stream.__anext__()
        return count

    assert asyncio.run(work()) == 2


def test_asyncio_another_loop_gets_what_the_first_did_not_wait_for(engine: Engine) -> None:
    camera = PushSource()
    stream = edgekit.stream(engine, camera)

    async def impatient() -> None:
        for _ in range(3):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(stream.__anext__(), 0.02)

    async def patient() -> int:
        async with stream:
            camera.push(PICTURE)
            return (await stream.__anext__()).frame.seq

    asyncio.run(impatient())
    assert asyncio.run(patient()) == 0


def test_asyncio_a_silent_camera_never_keeps_the_process(engine: Engine) -> None:
    """Threads that wait for it are daemons, which the interpreter does not join."""
    stream = edgekit.stream(engine, PushSource())
    before = set(threading.enumerate())

    async def work() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(stream.__anext__(), 0.05)

    asyncio.run(work())
    mine = set(threading.enumerate()) - before
    assert mine and all(thread.daemon for thread in mine)
    stream.close()


def test_asyncio_a_cancelled_task_keeps_what_was_written(engine: Engine) -> None:
    sink = Kept()

    async def work() -> None:
        async with edgekit.stream(engine, file(), sinks=sink) as stream:
            await stream.__anext__()
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(work())
    assert sink.ended == "closed"


def test_asyncio_an_error_is_told_once(engine: Engine) -> None:
    class Broken(Source):
        def _read(self, timeout_s: float | None) -> Frame | None:
            raise StreamError("source mine: broke. Mend it")

    async def work() -> None:
        stream = edgekit.stream(engine, Broken("broken:", None))
        with pytest.raises(StreamError, match="broke"):
            await stream.__anext__()
        with pytest.raises(StopAsyncIteration):
            await stream.__anext__()

    asyncio.run(work())


def test_files_of_a_sink_that_hangs_are_told_in_words(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlet, "JOIN_S", 0.2)
    sink = Stuck(at=1)
    with pytest.raises(OutputError, match="sink kept: its last write did not end"):
        edgekit.stream(engine, file(2), sinks=[sink]).run()
    sink.go.set()


def test_paths_and_names(tmp_path: Path) -> None:
    from edgekit.runtime.names import camera_name, engine_name, unique

    cases = {
        "v4l2:/dev/video0?size=1280x720": "video0",
        "csi:0": "csi0",
        "rtsp://ann:secret@host:554/street?x=1": "street",
        "faulty:unplug@3|v4l2:/dev/video1": "video1",
        "synthetic://street?live=1": "street",
        "drive.mp4": "drive",
        "gst:videotestsrc": "gst",
        "": "camera",
    }
    assert {uri: camera_name(uri) for uri in cases} == cases
    assert engine_name(tmp_path / "m.rpi5.edge") == "m"
    assert unique(["a", "b", "a", "a-2", "a"]) == ["a", "b", "a-2", "a-2-2", "a-3"]
