"""Hot swap: another bundle takes over a running stream between two frames, and a bundle that cannot does not."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import edgekit
from edgekit.backends.litert.lower import lower
from edgekit.bundle import Bundle, write_bundle
from edgekit.errors import BundleError, EdgekitError, SelfTestError, StreamError, UsageError
from edgekit.passes.lanes import lanes
from edgekit.pixels import Pixels
from edgekit.runtime import swap as swapping
from edgekit.runtime.frames import Frame
from edgekit.runtime.sources.base import Source
from edgekit.runtime.state import carry_over
from edgekit.tasks.video.spec import EventRule, Smoothing
from edgekit.timebase import StateClock
from tests import state_bundles, video_bundles
from tests.litert_graphs import HOST

pytestmark = pytest.mark.usefixtures("_no_thread_stays")

STEP_NS = 100_000_000
WAIT_S = 20.0
"""Beyond it something hangs."""


class Clip(Source):
    """Frames of noise, one nominal step apart; `gate`: how many frames may come."""

    def __init__(self, count: int, seed: int = 0, gate: threading.Semaphore | None = None) -> None:
        super().__init__("clip:", None)
        self.count, self.seed, self.gate = count, seed, gate
        self.live = gate is not None
        self.fps = 10.0
        self.at = 0

    def _read(self, timeout_s: float | None) -> Frame | None:
        if self.at == self.count:
            return None
        if self.gate is not None and not self.gate.acquire(timeout=timeout_s):
            raise TimeoutError
        picture = picture_of(self.seed, self.at)
        self.at += 1
        now = time.monotonic_ns()
        return Frame(Pixels.bgr(picture), self.at - 1, (self.at - 1) * STEP_NS, now, self.uri, "media")


def picture_of(seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, number]).integers(0, 256, (12, 12, 3), np.uint8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A bundle of task video, the same for equal arguments."""
    folder = tmp_path_factory.mktemp("swap")
    known: dict[str, Path] = {}

    def make(name: str = "a", **fields: Any) -> Path:
        key = f"{name} {fields}"
        if key not in known:
            plain = video_bundles.write(folder / f"{name}-{len(known)}-plain.edge", **fields)
            known[key] = rewritten(plain, folder / f"{name}-{len(known)}.edge")
        return known[key]

    return make


def rewritten(
    path: Path,
    to: Path,
    edit: Callable[[dict[str, bytes]], object] = lambda files: None,
    **fields: Any,
) -> Path:
    """The bundle with other fields of the manifest and edited files, large enough to be mapped instead of read."""
    with Bundle.open(path) as opened:
        manifest = opened.manifest
        files = {name: bytes(opened.read(name)) for name in manifest.files}
    files["evidence/blank.bin"] = bytes(1 << 17)
    edit(files)
    write_bundle(to, dataclasses.replace(manifest, **fields, files={}), files, {})
    return to


def load(path: Path, **options: Any) -> edgekit.Engine:
    return edgekit.load(path, threads=1, **options)


def alone(path: Path, count: int, seed: int = 0) -> list[np.ndarray]:
    """Logits of every frame by one engine."""
    with edgekit.stream(path, Clip(count, seed), threads=1) as stream:
        return [item.result.logits for item in stream]


def rest_of(path: Path, states: dict[str, np.ndarray], numbers: range, seed: int = 0) -> list[np.ndarray]:
    """Logits of frames from a state on."""
    with load(path) as engine:
        pipeline: Any = engine.pipeline()
        pipeline.session.restore(states)
        found = [pipeline(picture_of(seed, i), taken_ns=i * STEP_NS, epoch=0).logits.copy() for i in numbers]
        pipeline.session.close()
    return found


def pipeline_of(stream: edgekit.Stream, worker: int = 0) -> Any:
    return stream._workers[worker].pipelines[0]


# --- what goes on ------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 5])
def test_the_same_network_goes_on_as_if_nothing_had_happened(bundle: Callable[..., Path], at: int) -> None:
    """States, windows of answers, events, time and history: equal to the stream that was never swapped."""
    rule: dict[str, Any] = {
        "smoothing": Smoothing(window=3, votes=True),
        "events": EventRule(on=0.0, off=0.0, min_on=1),
    }
    first, second = bundle("a", **rule), bundle("b", **rule)
    with edgekit.stream(first, Clip(12), threads=1) as stream:
        want = [item.result for item in stream]
    assert any(r.event for r in want)
    with edgekit.stream(first, Clip(12), threads=1) as stream:
        got = []
        for number in range(12):
            if number == at:
                done = stream.swap(second)
                names = ("state_0", "state_1") if at else ()  # before the first frame there is no state
                assert (done.kept, dict(done.reset)) == (names, {})
                assert done.engine in stream.engines
            got.append(next(stream).result)
        assert next(stream, None) is None
        facts = stream.metrics.snapshot()["engines"][done.engine]["facts"]
        assert facts["bundle"] == second.name
        events = [(e["name"], e["text"]) for e in stream.metrics.snapshot()["events"]]
        assert ("swapped", f"{first.name} -> {second.name}") in events
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a.logits, b.logits)
        np.testing.assert_array_equal(a.all_scores, b.all_scores)
        assert (a.answer, a.steps, a.missed, a.reset, a.edges, a.event, a.taken_ns, a.history) == (
            b.answer, b.steps, b.missed, b.reset, b.edges, b.event, b.taken_ns, b.history,
        )  # fmt: skip


def test_another_network_goes_on_from_the_state_of_the_first(bundle: Callable[..., Path]) -> None:
    first, second = bundle("a"), bundle("b", seed=1)
    plain = [alone(path, 8) for path in (first, second)]
    with edgekit.stream(first, Clip(8), threads=1) as stream:
        got = [next(stream).result.logits for _ in range(4)]
        states = pipeline_of(stream).session.snapshot()
        assert stream.swap(second).kept == ("state_0", "state_1")
        got += [item.result.logits for item in stream]
    np.testing.assert_array_equal(got[:4], plain[0][:4])
    np.testing.assert_array_equal(got[4:], rest_of(second, states, range(4, 8)))
    assert not np.array_equal(got[4], plain[1][4])  # it does not begin anew


def test_states_that_do_not_fit_begin_anew_and_are_named(bundle: Callable[..., Path], tmp_path: Path) -> None:
    """A bundle of another state: what fits goes on, what does not is told."""
    first = bundle("a")
    other = renamed(bundle("b", seed=1), tmp_path / "c.edge", "state_1", "memory")
    with edgekit.stream(first, Clip(6), threads=1) as stream:
        for _ in range(3):
            next(stream)
        states = pipeline_of(stream).session.snapshot()
        done = stream.swap(other)
        assert done.kept == ("state_0",)
        assert dict(done.reset) == {"memory": "state memory: not in the snapshot"}
        want = {"state_0": states["state_0"], "memory": np.zeros_like(states["state_1"])}
        got = [item.result.logits for item in stream]
    np.testing.assert_array_equal(got, rest_of(other, want, range(3, 6)))


def renamed(path: Path, to: Path, old: str, new: str) -> Path:
    """The bundle with a state called otherwise; the tensors keep their names."""
    with Bundle.open(path) as opened:
        states = opened.manifest.states
    named = tuple(dataclasses.replace(s, name=new if s.name == old else s.name) for s in states)
    return rewritten(path, to, states=named)


def test_other_labels_begin_their_own_answers_and_end_the_open_event(bundle: Callable[..., Path]) -> None:
    rule = {"events": EventRule(on=0.0, off=0.0, min_on=1, min_off=1), "background": ""}
    labels = ("rest", "pull", "lift", "roll", "tap")
    with edgekit.stream(bundle("a", **rule), Clip(8), threads=1) as stream:
        before = [next(stream).result for _ in range(4)]
        assert before[-1].event is not None
        assert stream.swap(bundle("b", labels=labels, **rule)).kept == ("state_0", "state_1")
        after = [item.result for item in stream]
    assert after[0].labels == labels
    end, start = after[0].edges
    assert (end.kind, end.label, end.number) == ("end", before[-1].event.label, before[-1].event.number)
    assert end.reason == "another bundle took over"
    assert (start.kind, start.number, start.label in labels) == ("start", end.number + 1, True)


def test_time_goes_on_over_a_swap(bundle: Callable[..., Path]) -> None:
    """A gap that ends state does so too when the swap is in it, and frames are due on the same grid."""
    first, second = bundle("a"), bundle("b")

    class Gap(Clip):
        def _read(self, timeout_s: float | None) -> Frame | None:
            frame = super()._read(timeout_s)
            if frame is not None and frame.seq >= 3:
                frame.pts_ns += 10 * STEP_NS
            return frame

    with edgekit.stream(first, Gap(6), threads=1) as stream:
        for _ in range(3):
            next(stream)
        stream.swap(second)
        results = [item.result for item in stream]
    assert "a gap of 1.100 s" in results[0].reset
    assert [r.reset for r in results[1:]] == ["", ""]


def test_a_clock_follows_another() -> None:
    old, new, slower = StateClock(0.1, 0.5), StateClock(0.1, 0.5), StateClock(0.2, 0.5)
    for i in range(3):
        old.advance(i * STEP_NS + i * 20_000_000)  # 0, 0.12, 0.24: the next is due at 0.3
    new.follow(old)
    slower.follow(old)
    for taken in (260_000_000, 340_000_000, 450_000_000):
        assert new.advance(taken) == old.advance(taken)
    assert slower.advance(340_000_000).steps == 1  # 0.1 after the last frame: half a step of its own
    assert new.advance(460_000_000, epoch=1).action == "reset"


def test_variants_of_one_bundle_are_swapped(bundle: Callable[..., Path], tmp_path: Path) -> None:
    model = state_bundles.shifted()
    plain = tmp_path / "plain.edge"
    payloads = {"onnxruntime": state_bundles.onnx_payload(model), "litert": lower(model, HOST, "float32")[0]}
    state_bundles.write(plain, payloads, model)
    with Bundle.open(bundle("a")) as video:
        pipeline = video.manifest.pipeline
    path = rewritten(plain, tmp_path / "both.edge", task="video", pipeline=pipeline)
    with edgekit.stream(path, Clip(8), threads=1, variant="onnxruntime") as stream:
        got = [next(stream).result.logits for _ in range(4)]
        assert stream.swap(path, variant="litert").kept == ("state_0", "state_1")
        (engine,) = stream.engines.values()
        assert [v.name for v in engine.variants.values()] == ["litert"]
        got += [item.result.logits for item in stream]
    np.testing.assert_allclose(got, alone(bundle("a"), 8), atol=1e-5)


def test_every_camera_keeps_its_own_state(bundle: Callable[..., Path]) -> None:
    first, second = bundle("a"), bundle("b")
    sources = {"left": Clip(10, seed=1), "right": Clip(10, seed=2)}
    want = {name: alone(first, 10, source.seed) for name, source in sources.items()}
    got: dict[str, list[np.ndarray]] = {name: [] for name in sources}
    with edgekit.stream(first, sources, threads=1) as stream:
        for number, item in enumerate(stream):
            got[item.camera].append(item.result.logits)
            if number in (4, 9):
                stream.swap(second)
    for name, logits in want.items():
        np.testing.assert_array_equal(got[name], logits)


def test_an_engine_of_the_caller_stays_open(bundle: Callable[..., Path]) -> None:
    with load(bundle("a")) as first, load(bundle("b")) as second:
        want = alone(bundle("a"), 6)
        with edgekit.stream(first, Clip(6), threads=1) as stream:
            got = [next(stream).result.logits for _ in range(2)]
            stream.swap(second)
            got += [next(stream).result.logits for _ in range(2)]
            stream.swap(bundle("a"))
            got += [item.result.logits for item in stream]
        np.testing.assert_array_equal(got, want)
        for engine in (first, second):
            engine.session().close()


def test_detectors_are_swapped_too(host_bundle: str) -> None:
    with edgekit.stream(host_bundle, "synthetic://street?frames=4", threads=1) as stream:
        want = [item.result for item in stream]
    with edgekit.stream(host_bundle, "synthetic://street?frames=4", threads=1) as stream:
        got = [next(stream).result]
        done = stream.swap(host_bundle)
        assert (done.kept, dict(done.reset)) == ((), {})
        got += [item.result for item in stream]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a.boxes, b.boxes)


# --- what cannot take over ---------------------------------------------------------------------


def damaged(path: Path, to: Path) -> Path:
    to.write_bytes(path.read_bytes()[:-100])
    return to


def wrong(path: Path, to: Path) -> Path:
    """A bundle whose network computes something else than its golden values."""

    def shift(files: dict[str, bytes]) -> None:
        name = next(n for n in files if n.startswith("golden/output"))
        files[name] = (np.frombuffer(files[name], np.float32) + 1).tobytes()

    return rewritten(path, to, shift)


def of_no_task(path: Path, to: Path) -> Path:
    model = state_bundles.shifted()
    return state_bundles.write(to, {"v": state_bundles.onnx_payload(model)}, model)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda path, to: to, BundleError, "no such file|cannot be read|not found|does not exist"),
        (damaged, BundleError, "damaged"),
        (wrong, SelfTestError, "self-test output logits"),
        (of_no_task, UsageError, "swap: bundle .*: task 'none', expected 'video' as before"),
    ],
    ids=["missing", "damaged", "wrong", "other-task"],
)
def test_a_bundle_that_cannot_leaves_the_old_one_running(
    bundle: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Any,
    kind: type[EdgekitError],
    message: str,
) -> None:
    path = make(bundle("a"), tmp_path / "bad.edge")
    want = alone(bundle("a"), 6)
    with edgekit.stream(bundle("a"), Clip(6), threads=1) as stream:
        engines = dict(stream.engines)
        got = [next(stream).result.logits for _ in range(3)]
        loaded: list[edgekit.Engine] = []

        def watched(*arguments: Any, **options: Any) -> edgekit.Engine:
            loaded.append(edgekit.load(*arguments, **options))
            return loaded[-1]

        monkeypatch.setattr(swapping, "load", watched)
        with pytest.raises(kind, match=message) as caught:
            stream.swap(path)
        assert len(loaded) == (kind is UsageError)  # the others do not load at all
        for engine in loaded:
            with pytest.raises(UsageError, match="is closed"):
                engine.session()
        assert "\n" not in str(caught.value)
        del caught
        assert stream.engines == engines
        assert stream._own_engines == list(engines.values())
        got += [item.result.logits for item in stream]
    np.testing.assert_array_equal(got, want)
    gc.collect()
    assert not mapped(path)


def test_state_that_cannot_be_handed_over_leaves_the_old_one_running(
    bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one camera handed over already: what the second one fails at changes nothing for the first."""
    first, second = bundle("a"), bundle("b", seed=1)
    sources = {"left": Clip(8, seed=1), "right": Clip(8, seed=2)}
    want = {name: alone(first, 8, source.seed) for name, source in sources.items()}
    got: dict[str, list[np.ndarray]] = {name: [] for name in sources}
    calls = 0

    def fail(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise StreamError("engine: made to fail")
        return carry_over(*arguments)

    with edgekit.stream(first, sources, threads=1) as stream:
        for number, item in enumerate(stream):
            got[item.camera].append(item.result.logits)
            if number == 5:
                monkeypatch.setattr(swapping, "carry_over", fail)
                with pytest.raises(StreamError, match="made to fail"):
                    stream.swap(second)
                assert calls == 2
    for name, logits in want.items():
        np.testing.assert_array_equal(got[name], logits)
    gc.collect()
    assert not mapped(second)


def test_what_is_asked_wrongly_is_told(bundle: Callable[..., Path]) -> None:
    with edgekit.stream({"one": bundle("a"), "two": bundle("b")}, Clip(2), threads=1) as stream:
        with pytest.raises(UsageError, match=r"swap: which engine\? Expected one of one, two"):
            stream.swap(bundle("a"))
        with pytest.raises(UsageError, match=r"swap: engine 'tow': not in this stream.*two"):
            stream.swap(bundle("a"), engine="tow")
        with pytest.raises(UsageError, match="variant 'x': not in this bundle"):
            stream.swap(bundle("a"), engine="two", variant="x")
        stream.run()
    with pytest.raises(UsageError, match="swap: the stream has ended"):
        stream.swap(bundle("a"), engine="one")


# --- threads -----------------------------------------------------------------------------------


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


@pytest.mark.parametrize("engines", [1, 2])
def test_under_load_no_frame_is_lost_or_out_of_order(bundle: Callable[..., Path], engines: int) -> None:
    """Threads that swap all the time, against the frames of three cameras at full speed."""
    count = 150
    names = [f"e{i}" for i in range(engines)]
    sources = {f"c{i}": Clip(count, seed=i) for i in range(3)}
    want = {name: alone(bundle("a"), count, source.seed) for name, source in sources.items()}
    got: dict[tuple[str, str], list[tuple[int, np.ndarray]]] = {(e, c): [] for e in names for c in sources}
    ended = threading.Event()
    with edgekit.stream({name: bundle("a") for name in names}, sources, threads=1) as stream:

        def keep_swapping(name: str) -> int:
            done = 0
            while not ended.is_set():
                try:
                    swapped = stream.swap(bundle("b" if done % 2 == 0 else "a"), engine=name)
                except UsageError:  # the stream has ended
                    break
                assert not swapped.reset
                done += 1
            return done

        threads = [in_thread(lambda name=name: keep_swapping(name)) for name in (*names, names[0])]  # type: ignore[misc]
        for item in stream:
            got[item.engine, item.camera].append((item.frame.seq, item.result.logits))
        ended.set()
        for thread, _ in threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        assert all(isinstance(found[0], int) for _, found in threads), threads
        assert sum(found[0] for _, found in threads) >= 3
    for (_, camera), items in got.items():
        assert [seq for seq, _ in items] == list(range(count))
        np.testing.assert_array_equal([logits for _, logits in items], want[camera])


def test_swapping_does_not_wait_for_a_frame_that_does_not_come(bundle: Callable[..., Path]) -> None:
    """The consumer sits in `next`, its camera is silent: another thread swaps all the same."""
    gate = threading.Semaphore(1)
    with edgekit.stream(bundle("a"), Clip(2, gate=gate), threads=1, policy="block") as stream:
        first = next(stream).result.logits
        thread, found = in_thread(lambda: next(stream).result.logits)
        time.sleep(0.05)  # most likely it waits now; if not, the test is passed all the same
        done = stream.swap(bundle("b"))
        assert thread.is_alive()
        gate.release()
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert done.kept == ("state_0", "state_1")
        np.testing.assert_array_equal([first, found[0]], alone(bundle("a"), 2))


def test_a_stream_that_ends_meanwhile_gives_the_new_engine_back(bundle: Callable[..., Path]) -> None:
    path = bundle("c", seed=3)
    with edgekit.stream(bundle("a"), Clip(20), threads=1) as stream:
        next(stream)
        holder = stream._workers[0].holder
        with holder.frame():  # a frame is in the engine, for long
            thread, found = in_thread(lambda: stream.swap(path))
            deadline = time.monotonic() + WAIT_S
            while holder._offer is None and time.monotonic() < deadline:
                time.sleep(0.005)
            assert holder._offer is not None
            stream.stop()
            thread.join(WAIT_S)
            assert not thread.is_alive()
    assert isinstance(found[0], UsageError)
    assert "the stream has ended" in str(found[0])
    found.clear()
    gc.collect()
    assert not mapped(path)


def mapped(path: Path) -> bool:
    """Whether this process has the file mapped or open."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    links = [link for link in Path("/proc/self/fd").iterdir() if link.exists()]
    return str(path) in maps or any(link.resolve() == path for link in links)


def test_what_was_swapped_out_is_gone(bundle: Callable[..., Path], tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.edge" for i in range(6)]
    for path in paths:
        path.write_bytes(bundle("a").read_bytes())
    with edgekit.stream(paths[0], Clip(20), threads=1) as stream:
        next(stream)
        for old, new in itertools.pairwise(paths):
            held = weakref.ref(next(iter(stream.engines.values())))
            session = weakref.ref(pipeline_of(stream).session)
            assert mapped(old)
            stream.swap(new)
            next(stream)
            gc.collect()
            assert not mapped(old)
            assert held() is None
            assert session() is None
            assert len(stream._own_engines) == 1
    gc.collect()
    assert not mapped(paths[-1])


def test_what_was_swapped_out_is_closed_at_once(bundle: Callable[..., Path]) -> None:
    """Not when the last name of it goes: a device's memory is wanted now."""
    with edgekit.stream(bundle("a"), Clip(4), threads=1) as stream:
        next(stream)
        (engine,), session = stream.engines.values(), pipeline_of(stream).session
        stream.swap(bundle("b"))
        with pytest.raises(UsageError, match="is closed"):
            engine.session()
        with pytest.raises(StreamError, match="closed"):
            session.run()


def test_nothing_takes_the_place_of_what_was_closed(bundle: Callable[..., Path]) -> None:
    with load(bundle("a")) as engine:
        holder = swapping.Holder(swapping.Pipelines(engine))
        holder.close()
        new = swapping.Pipelines(engine)
        with pytest.raises(UsageError, match="the stream has ended"):
            holder.exchange(new, lambda: False)
        new.close()


# --- many streams ------------------------------------------------------------------------------


def test_many_streams_move_to_a_bundle_of_more_lanes(tmp_path: Path) -> None:
    """From single runs to batches and back, each stream with its state."""
    model: ir.Model = state_bundles.shifted()
    paths = []
    for count in (1, 4):
        states = tuple(dataclasses.replace(s, shape=(count, *s.shape[1:])) for s in state_bundles.STATES)
        many = lanes(model, count)
        payload = {"v": state_bundles.onnx_payload(many)}
        paths.append(state_bundles.write(tmp_path / f"{count}.edge", payload, many, states=states))
    frames = {key: state_bundles.pictures(6, seed=key) for key in range(6)}
    with load(paths[0]) as single, load(paths[1]) as batched:
        with single.streams() as streams:
            want = [
                {k: streams.step(k, {"image": f[i]})["logits"].copy() for k, f in frames.items()}
                for i in range(6)
            ]
        step = 0
        old = single.streams()
        for engine in (single, batched, single):
            new = engine.streams()
            for key in old:
                carried = carry_over(old.snapshot(key), old.state_specs, new.state_specs)
                assert carried.kept == ("state_0", "state_1")
                new.restore(key, carried.values)
            old.close()
            old = new
            for _ in range(2):
                results = new.step_many({key: {"image": f[step]} for key, f in frames.items()})
                for key, found in results.items():
                    np.testing.assert_array_equal(found["logits"], want[step][key])
                step += 1
        old.close()
