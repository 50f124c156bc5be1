"""edgekit.stream: what it gives, what it keeps, and that it ends clean from every state."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.errors import OutputError, StreamError, UsageError
from edgekit.pixels import Pixels
from edgekit.runtime.engine import Engine
from edgekit.runtime.frames import Frame, Lease
from edgekit.runtime.results import StreamResult
from edgekit.runtime.sinks.base import Sink
from edgekit.runtime.sources.base import Source

pytestmark = [pytest.mark.clock, pytest.mark.usefixtures("_no_thread_stays")]

STREET = "synthetic://street?frames=6"


@pytest.fixture(scope="module")
def engine(host_bundle: str) -> Iterator[Engine]:
    with edgekit.load(host_bundle, threads=1) as loaded:
        yield loaded


class Pool(Source):
    """A camera of `buffers` buffers, reused as a driver does; an overwritten one is filled with the next picture."""

    live = True

    def __init__(
        self, frames: int, buffers: int = 6, period_s: float = 0.0, spare: int | None = None
    ) -> None:
        super().__init__("pool:", None)
        self.total, self.period_s = frames, period_s
        self.fps = 1 / period_s if period_s else None
        self.spare = spare
        self.buffers = [np.zeros((90, 160, 3), np.uint8) for _ in range(buffers)]
        self.free = list(range(buffers))
        self.lock = threading.Lock()
        self.seq = 0
        self.out = 0

    def _read(self, timeout_s: float | None) -> Frame | None:
        if self.seq == self.total:
            return None
        if self.period_s:
            time.sleep(self.period_s)
        with self.lock:
            if not self.free:
                time.sleep(min(timeout_s or 0.01, 0.01))
                raise TimeoutError
            index = self.free.pop(0)
            self.out += 1
        self.buffers[index][:] = self.seq % 251
        now = time.monotonic_ns()
        frame = Frame(
            Pixels.bgr(self.buffers[index]),
            self.seq,
            now,
            now,
            self.uri,
            "monotonic",
            lease=Lease(lambda: self._back(index)),
        )
        self.seq += 1
        return frame

    def _back(self, index: int) -> None:
        with self.lock:
            self.free.append(index)
            self.out -= 1


class Kept(Sink):
    """Keeps (seq, first byte) of each picture; may be slow, or fail at some write."""

    def __init__(self, slow_s: float = 0.0, fail_at: int = -1) -> None:
        super().__init__(Path("kept"))
        self.slow_s, self.fail_at = slow_s, fail_at
        self.seen: list[tuple[int, int]] = []
        self.ended = ""

    def _write(self, item: StreamResult) -> None:
        if len(self.seen) == self.fail_at:
            raise OutputError("sink kept: No space left on device. Free some space")
        before = int(item.frame.image[0, 0, 0])
        time.sleep(self.slow_s)
        assert int(item.frame.image[0, 0, 0]) == before, "overwritten under the sink"
        self.seen.append((item.frame.seq, before))

    def _finish(self) -> None:
        self.ended = "closed"

    def _drop(self) -> None:
        self.ended = "aborted"


def interrupt(stream: edgekit.Stream, error: BaseException) -> None:
    """Two results, then `error` in the caller's own code."""

    def work() -> None:
        with stream:
            next(stream)
            next(stream)
            raise error

    with pytest.raises(type(error)):
        work()


def test_a_file_gives_the_results_of_its_pipeline_and_loses_none(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with edgekit.open_source(STREET) as source:
        alone = [engine.predict(frame.image) for frame in source]
    with edgekit.stream(engine, STREET, sinks=path) as stream:
        got = [(item.frame.seq, item.result, item.camera, item.engine) for item in stream]
    assert [(seq, camera, name) for seq, _, camera, name in got] == [
        (i, "street", "yolo_lite") for i in range(6)
    ]
    for (_, result, _, _), expected in zip(got, alone, strict=True):
        assert np.array_equal(result.boxes, expected.boxes) and np.array_equal(result.scores, expected.scores)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["seq"], line["camera"], line["epoch"]) for line in lines] == [
        (i, "street", 0) for i in range(6)
    ]


def test_stages_add_up_to_the_age(engine: Engine) -> None:
    with edgekit.stream(engine, "synthetic://street?frames=8") as stream:
        items = [(item.age_ns, dict(item.stage_ns), item.unaccounted_ns) for item in stream]
    for age, stages, rest in items:
        assert list(stages) == ["transport", "wait", "preprocess", "engine", "decode"]
        assert all(ns >= 0 for ns in stages.values()) and sum(stages.values()) + rest == age
    # what no stage claims is a few calls of the clock
    assert sorted(rest / age for age, _, rest in items)[len(items) // 2] < 0.2
    snapshot = stream.metrics.snapshot()
    assert snapshot["engines"]["yolo_lite"]["unaccounted"]["count"] == 8
    assert snapshot["cameras"]["street"]["state"] == "ended"
    json.dumps(snapshot)


def test_the_ledger_counts_one_write_and_no_copy(engine: Engine) -> None:
    with edgekit.stream(engine, STREET) as stream:
        hops = next(item.hops for item in stream)
    assert sum(hop.copied for hop in hops) == 0
    wanted = sum(a.nbytes for a in engine.session().inputs.values())
    assert [hop.written for hop in hops if "engine input" in hop.name] == [wanted]


def test_a_slow_reader_of_a_live_source_sees_the_newest_frame_and_the_drops_are_counted(
    engine: Engine,
) -> None:
    source = Pool(40, period_s=0.005)
    seen = []
    with edgekit.stream(engine, source) as stream:
        for item in stream:
            time.sleep(0.03)
            seen.append(item.frame.seq)
    camera = stream.metrics.snapshot()["cameras"]["pool"]
    assert seen == sorted(set(seen)) and seen[-1] == 39 and len(seen) < 30
    assert camera["drops"] == {"superseded": 40 - len(seen)} and camera["frames"] == 40
    assert source.out == 0, "every buffer came back"


def test_block_loses_nothing_of_a_live_source(engine: Engine) -> None:
    source = Pool(12)
    with edgekit.stream(engine, source, policy="block") as stream:
        assert [item.frame.seq for item in stream] == list(range(12))
    assert source.out == 0


def test_a_result_keeps_its_frame_until_the_next_and_detach_keeps_it_for_good(engine: Engine) -> None:
    source = Pool(9, buffers=5)
    kept = []
    with edgekit.stream(engine, source, policy="block") as stream:
        for item in stream:
            assert int(item.frame.image[0, 0, 0]) == item.frame.seq
            kept.append(item.frame.detach())
    assert [int(frame.image[0, 0, 0]) for frame in kept] == list(range(9))
    assert kept[0].hops[-1].copied == 90 * 160 * 3
    assert source.out == 0


def test_several_cameras_and_engines(engine: Engine) -> None:
    sources = {"left": "synthetic://street?frames=4", "right": "synthetic://street?frames=3&seed=1"}
    with edgekit.stream({"a": engine, "b": engine}, sources) as stream:
        counts = Counter((item.engine, item.camera) for item in stream)
    assert counts == {("a", "left"): 4, ("a", "right"): 3, ("b", "left"): 4, ("b", "right"): 3}
    with edgekit.stream(engine, list(sources.values())) as stream:
        assert Counter(item.camera for item in stream) == {"street": 4, "street-2": 3}


def test_a_sink_that_is_slow_misses_results_and_never_starves_the_camera(engine: Engine) -> None:
    source = Pool(60, buffers=6, period_s=0.002, spare=4)
    slow, fast = Kept(slow_s=0.05), Kept()
    seen = 0
    with edgekit.stream(engine, source, sinks=[slow, fast]) as stream:
        for _ in stream:
            seen += 1
    sinks = stream.metrics.snapshot()["sinks"]
    assert len(slow.seen) + sum(s["dropped"] for s in sinks.values()) + len(fast.seen) == 2 * seen
    assert len(slow.seen) < seen and slow.ended == fast.ended == "closed"
    assert source.out == 0
    assert [e["name"] for e in stream.metrics.snapshot()["events"]].count("sink-blocked") >= 1


def test_files_wait_for_a_slow_sink(engine: Engine) -> None:
    slow = Kept(slow_s=0.01)
    with edgekit.stream(engine, STREET, sinks=slow) as stream:
        assert sum(1 for _ in stream) == 6
    assert [seq for seq, _ in slow.seen] == list(range(6)) and slow.ended == "closed"


def test_a_failing_sink_ends_a_file_run_and_leaves_a_live_one_running(engine: Engine) -> None:
    bad, good = Kept(fail_at=2), Kept()
    with (
        pytest.raises(OutputError, match="No space"),
        edgekit.stream(engine, STREET, sinks=[bad, good]) as stream,
    ):
        for _ in stream:
            pass
    assert bad.ended == good.ended == "aborted"
    bad, good = Kept(fail_at=2), Kept()
    source = Pool(20, period_s=0.002)
    with edgekit.stream(engine, source, sinks=[bad, good]) as stream:
        seen = sum(1 for _ in stream)
    assert seen > 3 and good.ended == "closed" and bad.ended == "aborted"
    snapshot = stream.metrics.snapshot()
    assert snapshot["sinks"]["kept"]["state"] == "failed"
    assert "No space" in next(e["text"] for e in snapshot["events"] if e["name"] == "sink-failed")


def test_a_late_sink_error_of_a_file_run_is_raised_too(engine: Engine) -> None:
    bad = Kept(fail_at=5)
    with pytest.raises(OutputError, match="No space"), edgekit.stream(engine, STREET, sinks=bad) as stream:
        for _ in stream:
            pass


def test_an_error_of_the_source_reaches_the_caller(engine: Engine) -> None:
    def frames() -> Iterator[np.ndarray]:
        yield np.zeros((90, 160, 3), np.uint8)
        raise StreamError("source mine: broke. Mend it")

    from edgekit.runtime.sources.iterator import IteratorSource

    sink = Kept()
    with (
        pytest.raises(StreamError, match="broke"),
        edgekit.stream(engine, IteratorSource(frames()), sinks=sink) as stream,
    ):
        for _ in stream:
            pass
    assert sink.ended == "aborted"


def test_an_engine_that_fails_is_raised_and_counted(host_bundle: str) -> None:
    with edgekit.load(host_bundle, threads=1) as engine:
        source = Pool(50, period_s=0.002)
        with edgekit.stream(engine, source) as stream:
            next(stream)
            stream._workers[0].close()  # the session's device is gone
            with pytest.raises(StreamError, match="closed"):
                for _ in stream:
                    pass
    assert source.out == 0
    assert "engine-failed" in [e["name"] for e in stream.metrics.snapshot()["events"]]


def test_stop_from_another_thread_and_twice(engine: Engine) -> None:
    source = Pool(10**6, period_s=0.002)
    with edgekit.stream(engine, source) as stream:
        threading.Timer(0.2, stream.stop).start()
        started = time.monotonic()
        assert sum(1 for _ in stream) > 1
        assert time.monotonic() - started < 3
        stream.stop()
        assert list(stream) == []
    stream.close()
    assert source.out == 0


def test_leaving_early_and_never_starting_end_clean(engine: Engine) -> None:
    source, sink = Pool(10**6, period_s=0.001), Kept()
    with edgekit.stream(engine, source, sinks=sink) as stream:
        next(stream)
    assert source.out == 0 and sink.ended == "closed"
    source, sink = Pool(5), Kept()
    with edgekit.stream(engine, source, sinks=sink):
        pass
    assert source._closed and sink.ended == "closed" and not sink.seen
    sink = Kept()
    interrupt(edgekit.stream(engine, Pool(10**6, period_s=0.002), sinks=sink), ZeroDivisionError())
    assert sink.ended == "aborted"


def test_ctrl_c_keeps_what_was_written(engine: Engine, tmp_path: Path) -> None:
    sink = Kept()
    interrupt(edgekit.stream(engine, STREET, sinks=sink), KeyboardInterrupt())
    assert sink.ended == "closed" and [seq for seq, _ in sink.seen] == [0, 1]


def test_callbacks(engine: Engine) -> None:
    seen: list[int] = []
    edgekit.stream(engine, STREET).run(lambda item: seen.append(item.frame.seq))
    assert seen == list(range(6))
    with pytest.raises(ZeroDivisionError):
        edgekit.stream(engine, STREET).run(lambda item: 1 / 0)


def test_asyncio(engine: Engine) -> None:
    async def work() -> tuple[list[int], int]:
        seen, ticks = [], 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        async with edgekit.stream(engine, STREET) as stream:
            async for item in stream:
                seen.append(item.frame.seq)
        ticking.cancel()
        return seen, ticks

    seen, ticks = asyncio.run(work())
    assert seen == list(range(6)) and ticks > 6, "the event loop went on"


def test_asyncio_a_cancelled_wait_loses_nothing(engine: Engine) -> None:
    async def work() -> list[int]:
        seen: list[int] = []
        async with edgekit.stream(engine, STREET) as stream:
            while True:
                try:
                    item = await asyncio.wait_for(stream.__anext__(), 0.002)
                except asyncio.TimeoutError:
                    continue
                except StopAsyncIteration:
                    return seen
                seen.append(item.frame.seq)

    assert asyncio.run(work()) == list(range(6))


def test_what_cannot_be_opened_is_said_at_once(engine: Engine, host_bundle: str, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"sources": "nowhere.mp4"}, "no such file"),
        ({"sources": []}, "at least one"),
        ({"sinks": "out.xyz"}, "cannot tell"),
        ({"policy": "oldest"}, "policy 'oldest'"),
        ({"on_sink_error": "never"}, "on_sink_error 'never'"),
    ]
    for options, problem in cases:
        with pytest.raises(UsageError, match=problem):
            edgekit.stream(**{"bundles": engine, "sources": STREET, **options})
    unfinished = tmp_path / "a.png"
    with pytest.raises(UsageError):
        edgekit.stream(engine, STREET, sinks=[unfinished, "out.xyz"])
    assert not list(tmp_path.iterdir())
