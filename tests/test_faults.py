"""Every fault that is promised to be handled, put into a running stream: seen in time, acted on, counted.

Sources are cameras in memory (their buffers go round as a driver's do and are poisoned when given back),
sinks write to real full disks and pipes that nobody reads, engines really fail.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import dataclasses
import fcntl
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

import edgekit
from edgekit.errors import OutputError, StreamError
from edgekit.pixels import PixelLayout
from edgekit.runtime import outlet
from edgekit.runtime.engine import Engine
from edgekit.runtime.faults import FAULTS, SourceLost
from edgekit.runtime.frames import Frame
from edgekit.runtime.metrics import Event
from edgekit.runtime.sources.base import Source
from edgekit.runtime.sources.faulty import KINDS, FaultySource, Injector, parse
from edgekit.runtime.sources.pooled import PooledSource, stamp
from edgekit.runtime.watch import WatchOptions
from tests.classifiers import tiny_engine
from tests.helpers import ROOT, load_script
from tests.rig_doubles import RIG, DoubleEngine, sensors

LAYOUT = PixelLayout("bgr", 64, 48)
FPS = 100.0
LATE_S = 4.0
"""What a busy machine may add to a stated time."""
INJECTED: set[str] = set()
Test = TypeVar("Test", bound=Callable[..., None])


def injects(*faults: str) -> Callable[[Test], Test]:
    """Marks a test that really puts in these faults of the table."""
    assert set(faults) <= set(FAULTS)
    INJECTED.update(faults)
    return lambda test: test


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with tiny_engine(tmp_path_factory.mktemp("tiny")) as loaded:
        yield loaded


def descriptors() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(found)


@pytest.fixture(autouse=True)
def _nothing_stays(engine: Engine) -> Iterator[None]:
    """No thread, descriptor or leased buffer is left by any test here."""
    threads, files = set(threading.enumerate()), descriptors()
    CAMERAS.clear()
    yield
    deadline = time.monotonic() + 10
    while (left := set(threading.enumerate()) - threads) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left
    assert sum(c.leased for c in CAMERAS) == 0
    CAMERAS.clear()
    if descriptors() != files:
        gc.collect()  # frames that a traceback holds
    assert descriptors() == files


CAMERAS: list[PooledSource] = []


def camera(**options: Any) -> PooledSource:
    CAMERAS.append(PooledSource(LAYOUT, **({"fps": FPS, "padding": 16, "buffers": 6} | options)))
    return CAMERAS[-1]


class Run:
    """A stream over a camera with planned faults, and when its events came."""

    def __init__(
        self, engine: Engine, plan: str, inner: Callable[[], Source] = camera, **options: Any
    ) -> None:
        self.device = Injector(inner, parse(f"faulty:{plan}|x")[0])
        self.seen: list[tuple[float, Event]] = []
        source = FaultySource("faulty:", options.pop("frames", None), injector=self.device)
        self.stream = edgekit.stream(engine, {"cam": source}, **options)
        self.stream.metrics.on_event = lambda event: self.seen.append((time.monotonic(), event))
        self.results: list[tuple[int, int, str]] = []
        """Epoch, height and clock of each result's frame."""

    def __enter__(self) -> Run:
        self.stream.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stream.__exit__(*error)

    def until(self, done: Callable[[], object], more: int = 40) -> None:
        """Take results until `done()`, and some more; each one's picture must be the one it was taken as."""
        deadline, left = time.monotonic() + 30, more
        for item in self.stream:
            frame = item.frame
            assert not frame.corrupt and item.age_ns >= 0
            self.check(frame)
            self.results.append((frame.epoch, frame.height, frame.clock))
            assert time.monotonic() < deadline, "the stream is alive, the fault was never handled"
            left -= bool(done())
            if left <= 0:
                return
        raise AssertionError("the stream ended")

    def check(self, frame: Frame) -> None:
        """Its picture is the one it was taken as: neither given back nor overwritten."""
        shown = stamp(frame.pixels)
        if self.device.injected["frozen"] or self.device.injected["slow"]:  # these change the numbers
            assert shown < 2**32  # poison is above
        else:
            assert shown == frame.seq

    def count(self, fault: str) -> int:
        return int(self.camera["faults"].get(fault, 0))

    @property
    def camera(self) -> dict[str, Any]:
        found: dict[str, Any] = self.stream.metrics.snapshot()["cameras"]["cam"]
        return found

    def seconds_to(self, name: str) -> float:
        """From the beginning of the first planned fault to the event."""
        began = self.device.began[0][0]
        return next(at for at, event in self.seen if event.name == name and at >= began) - began


# --- sensors -------------------------------------------------------------------------------------

REOPENED = {"restarts": 1, "epochs": 2}
CASES: dict[str, tuple[str, float, float, dict[str, int]]] = {
    # fault: plan, seen not before, seen after at most (seconds), what else must be so
    "lost": ("unplug@40,0.4", 0, 0.1, REOPENED),
    "stalled": ("stall@40,60", 1.0, 1.2, REOPENED),
    "frozen": ("freeze@40,60", 2.0, 2.3, REOPENED | {"stale": 1}),
    "slow": ("slow@40,3", 0, 30 * 3 / FPS, {"restarts": 0, "epochs": 1}),
    "dropped": ("drop@40,7", 0, 0.1, {"restarts": 0, "epochs": 1, "driver": 7}),
    "corrupt": ("corrupt@40,3", 0, 0.1, {"restarts": 0, "epochs": 1, "corrupt": 3}),
    "clock-jump": ("jump@40,-30", 0, 0.1, {"restarts": 0, "epochs": 2}),
    "format-changed": ("format@40,0.2", 0, 0.5, REOPENED),
}


@injects(*CASES)
@pytest.mark.parametrize("fault", CASES)
def test_a_sensor_fault_is_seen_in_time_handled_and_counted(engine: Engine, fault: str) -> None:
    plan, least, most, wanted = CASES[fault]
    # as fast as it is read, and every frame a result: nothing else is dropped, however busy the machine
    with Run(engine, plan, lambda: camera(fps=None, declared=FPS), policy="block") as run:
        run.until(lambda: run.count(fault) and run.camera["restarts"] >= wanted["restarts"])
        found = run.camera
        took = run.seconds_to(fault)
        assert least <= took < most + LATE_S
    lost = {"lost": 1} if fault == "format-changed" else {}
    assert found["faults"] == {fault: 1} | lost
    assert found["restarts"] == wanted["restarts"]
    epochs = [epoch for epoch, _, _ in run.results]
    assert epochs == sorted(epochs) and len(set(epochs)) == wanted["epochs"]
    for reason in ("corrupt", "stale", "driver"):
        assert found["drops"].get(reason, 0) == wanted.get(reason, 0)
    if fault == "clock-jump":
        assert run.results[-1][2] == "none"  # ages count from the arrival now
    if fault == "format-changed":
        assert {height for _, height, _ in run.results} == {48, 24}
    if fault == "lost":
        assert run.device.replugged[0] < 1 + LATE_S


@injects("hung")
def test_a_hanging_driver_is_left_behind_at_the_end(engine: Engine) -> None:
    run = Run(engine, "hang@40,2.8")
    with run:
        run.until(lambda: run.device.frames >= 39, more=1)
        while not run.device.began:
            time.sleep(0.01)
        stopped = time.monotonic()
    ended = time.monotonic() - stopped
    assert ended < 3 + LATE_S
    assert run.count("hung") == 1 and run.seen[-1][0] - stopped >= 2
    assert "read() has not returned" in run.seen[-1][1].text
    # the thread ends, and gives the camera back, when the call returns: `_nothing_stays`


def test_faults_in_a_row_by_uri(engine: Engine) -> None:
    uri = "faulty:drop@20,3;unplug@40,0.2;corrupt@60,2;jump@80,5|synthetic://street?live=1&loop=4&size=64x64&fps=200&frames=0"
    with edgekit.stream(engine, uri) as stream:
        for item in stream:
            if item.frame.epoch == 2:
                break
        (found,) = stream.metrics.snapshot()["cameras"].values()
    assert {"lost", "dropped", "corrupt", "clock-jump"} <= set(found["faults"])
    assert found["restarts"] == 1 and found["drops"]["corrupt"] == 2


def test_a_long_plan_of_faults_is_not_told_again_with_each_of_them() -> None:
    """Its URI names a source in events and errors; the one that is opened again is called the same."""
    plan = ";".join(f"unplug@{frame},1" for frame in range(0, 4000, 2))
    source = FaultySource(f"faulty:{plan}|synthetic://street?live=1&loop=4&size=64x64&fps=200&frames=0")
    said = r"source faulty:unplug@0,1;.{,50}\.\.\.\|synthetic://street\?live=1&loop=4&size=64x64&fps=200&frames=0: unplugged"
    with source, pytest.raises(SourceLost, match=said):
        source.read()
    source._device.gone_until = None
    with source.again() as other:
        assert other.uri == source.uri and len(source.uri) < 200


def test_every_frame_is_accounted_for(engine: Engine) -> None:
    """Whatever is done to them, frames that arrived are results or counted as dropped."""
    plan = "corrupt@50,4;drop@100,9;unplug@150,0.1;jump@200,-9;freeze@250,60;burst@300,0.1;corrupt@350"
    options = WatchOptions(frozen_s=0.3)
    run = Run(engine, plan, lambda: camera(fps=None, declared=500.0), policy="block", watch_options=options)
    with run:
        run.until(lambda: run.count("corrupt") == 2)
        run.stream.stop()
        left = sum(1 for _ in run.stream)
        results = run.stream.metrics.snapshot()["engines"]["tiny"]["results"]
    found = run.camera
    assert left == 0 and results == len(run.results)
    assert found["drops"]["driver"] == 9 and found["drops"]["corrupt"] == 7 and found["drops"]["stale"] == 1
    waiting = found["frames"] - results - found["drops"]["corrupt"] - found["drops"]["stale"]
    assert 0 <= waiting <= 3  # two in the mailbox, one on its way, when it was stopped


@pytest.mark.parametrize("policy", ["latest", "block"])
def test_no_result_is_of_an_overwritten_buffer(engine: Engine, policy: Any) -> None:
    """`Run.until` compares each picture's stamp; here also with a consumer that holds on to some."""
    plan = "drop@40,3;unplug@80,0.05;burst@150,0.1;corrupt@220;jump@300,3;unplug@380,0.05;format@450,0.05"
    run = Run(engine, plan, lambda: camera(fps=None, declared=500.0), policy=policy)
    held: list[Any] = []
    with run:
        for i, item in enumerate(run.stream):
            run.check(item.frame)
            if i % 7 == 0:
                held.append(item.frame.share())
            if len(held) == 3:
                frame = held.pop(0)
                run.check(frame)
                frame.release()
            if i == 600:
                break
        for frame in held:
            frame.release()


# --- sinks ---------------------------------------------------------------------------------------


def events(stream: Any, name: str) -> list[dict[str, Any]]:
    return [e for e in stream.metrics.snapshot()["events"] if e["name"] == name]


def full_disk(folder: Path, how: str) -> Path:
    """A path on a disk without space: the kernel's own full device, or a small file system."""
    if how == "device":
        path = folder / "full.jsonl"
        path.symlink_to("/dev/full")
        return path
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=16k") != 0:
        pytest.skip(f"mounting needs root: {os.strerror(ctypes.get_errno())}")
    return folder / "out.jsonl"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    ctypes.CDLL(None).umount2(os.fsencode(tmp_path), 2)  # MNT_DETACH; of no effect where nothing is mounted


@injects("sink-failed")
@pytest.mark.parametrize("how", ["device", "filesystem"])
def test_a_full_disk_does_not_blind_a_live_stream(engine: Engine, disk: Path, how: str) -> None:
    path, good = full_disk(disk, how), disk.parent / f"good-{how}.jsonl"
    run = Run(engine, "", sinks=[path, good])
    with run:
        run.until(lambda: events(run.stream, "sink-failed"))
    (event,) = events(run.stream, "sink-failed")
    assert event["where"] == str(path) and "No space left on device" in event["text"]
    sinks = run.stream.metrics.snapshot()["sinks"]
    assert sinks[str(path)]["state"] == "failed" and sinks[str(good)]["state"] == "closed"
    lines = good.read_text().splitlines()
    assert len(lines) == sinks[str(good)]["written"] > 0
    if how == "filesystem":  # what fitted is whole lines
        assert path.read_bytes().endswith(b"\n") and path.stat().st_size <= 16384


def test_a_full_disk_ends_a_run_over_files(engine: Engine, tmp_path: Path) -> None:
    path = full_disk(tmp_path, "device")
    with (
        pytest.raises(OutputError, match="No space left on device"),
        edgekit.stream(engine, "synthetic://street?frames=50&size=64x64", sinks=path) as stream,
    ):
        for _ in stream:
            pass
    assert events(stream, "sink-failed")


@injects("sink-blocked")
@pytest.mark.parametrize("then", ["breaks", "is read"])
def test_a_pipe_that_nobody_reads_costs_its_own_results_only(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    monkeypatch.setattr(outlet, "JOIN_S", 0.3)
    path, good = tmp_path / "pipe.jsonl", tmp_path / "good.jsonl"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # there, and never reads
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    try:
        run = Run(engine, "", sinks=[path, good])
        with run:
            run.until(lambda: run.stream.metrics.snapshot()["sinks"][str(path)]["dropped"] >= 40)
        sinks = run.stream.metrics.snapshot()["sinks"]
        assert sinks[str(path)]["state"] == "failed" and sinks[str(path)]["written"] < 50
        assert sinks[str(good)]["state"] == "closed" and sinks[str(good)]["written"] >= 80
        told = [e["text"] for e in events(run.stream, "sink-blocked") if e["where"] == str(path)]
        assert len(told) >= 2 and "in time" in told[0] and "did not end" in told[-1]
        assert len(told) < sinks[str(path)]["dropped"] / 4  # episodes, not results
    finally:  # lets the write that was left behind end: with an error, or well
        while then == "is read" and "edgekit-sink" in str(threading.enumerate()):
            with contextlib.suppress(BlockingIOError):
                os.read(reader, 1 << 16)
        os.close(reader)


# --- engines -------------------------------------------------------------------------------------


@injects("engine-failed")
def test_an_engine_that_fails_reaches_the_caller(engine: Engine) -> None:
    with Run(engine, "") as run:
        run.until(lambda: True, more=10)
        run.stream._workers[0].pipelines[0].session.close()  # as a device that was reset
        with pytest.raises(StreamError, match="closed"):
            run.until(lambda: False)
    (event,) = events(run.stream, "engine-failed")
    assert event["where"] == "tiny"
    assert run.camera["state"] == "ended"


# --- the end, from every state -------------------------------------------------------------------


def waiting(engine: Engine, state: str) -> Run:
    """A stream that is in that state for good."""
    plan, options = {
        "running": ("", {}),
        "lost": ("unplug@5,1000", {}),
        "stalled": ("stall@5,1000", {"watch_options": WatchOptions(stall_s=1000, first_s=1000)}),
        "no buffer": ("", {}),
        "block": ("", {"policy": "block"}),
    }[state]
    return Run(engine, plan, **options)  # type: ignore[arg-type]


STATES = ("running", "lost", "stalled", "no buffer", "block")


def enter(run: Run, state: str) -> list[Any]:
    """Results until the state is reached; what has to be released afterwards."""
    held = []
    for item in run.stream:
        if state == "no buffer":
            held.append(item.frame.share())
        if len(held) == 5 or (state != "no buffer" and run.device.frames >= 5):
            break
    return held


@pytest.mark.parametrize("how", ["stop", "close", "exception", "interrupt"])
@pytest.mark.parametrize("state", STATES)
def test_the_end_is_clean_from_every_state(engine: Engine, state: str, how: str) -> None:
    run = waiting(engine, state)
    held = enter(run, state)
    started = time.monotonic()
    if how == "stop":
        with run.stream:
            threading.Timer(0.03, run.stream.stop).start()
            for _ in run.stream:
                pass
    elif how == "close":
        run.stream.close()
    elif how == "exception":
        with pytest.raises(ZeroDivisionError), run.stream:
            raise ZeroDivisionError
    else:
        threading.Timer(0.03, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            run.stream.run()
    assert time.monotonic() - started < 2 + LATE_S
    assert not run.count("hung")
    for frame in held:
        frame.release()
    assert list(run.stream) == []


def test_ctrl_c_while_waiting_for_a_source_that_is_not_there(engine: Engine) -> None:
    threading.Timer(0.2, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        edgekit.stream(engine, "/nowhere/street.mp4", watch_options=WatchOptions(wait=True))


def test_a_callback_that_raises_ends_the_stream(engine: Engine) -> None:
    def broken(item: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Run(engine, "").stream.run(broken)


def test_a_source_that_is_given_up_is_raised(engine: Engine) -> None:
    run = Run(engine, "unplug@20,1000", watch_options=WatchOptions(give_up_s=0.3))
    with pytest.raises(SourceLost, match="lost for"), run:
        run.until(lambda: False)
    assert run.count("lost") == 1


# --- rigs (more of them: test_rig_faults.py) --------------------------------------------------------


@injects("blind")
def test_a_rig_of_which_nothing_is_left_says_so_and_goes_on() -> None:
    plans = {"CAM_FRONT": "unplug@8,1", "lidar": "unplug@8,1.5"}
    names = tuple(plans)
    events: list[str] = []
    with edgekit.stream(DoubleEngine(), sensors(names, plans=plans)) as stream:
        stream.metrics.on_event = lambda event: events.append(f"{event.where} {event.name}")
        started = time.monotonic()
        for item in stream:
            assert time.monotonic() - started < 20, events
            if "fusion restarted" in events and not item.missing:
                break
    assert events.count("fusion blind") == 1
    assert max(events.index("CAM_FRONT lost"), events.index("lidar lost")) < events.index("fusion blind")
    assert stream.metrics.snapshot()["engines"]["fusion"]["faults"] == {"blind": 1}


@injects("calibration")
def test_a_calibration_that_cannot_be_used_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rig.toml"
    RIG.write(path)
    events: list[Event] = []
    with edgekit.stream(DoubleEngine(), sensors(("CAM_FRONT", "lidar")), rig=path, watch_rig=True) as stream:
        stream.metrics.on_event = events.append
        started, written = time.monotonic(), 0.0
        for number, item in enumerate(stream):
            assert item.frame.rig is not None and item.frame.rig.rig == RIG
            if number == 3:
                path.write_text(RIG.toml() + "\n[cameras.CAM_NEW]\nwidth = 0\n")
                written = time.monotonic()
            assert time.monotonic() - started < 20
            if events:
                break
    assert (events[0].where, events[0].name) == ("rig", "calibration")
    assert "CAM_NEW" in events[0].text
    assert time.monotonic() - written < 1 + LATE_S


# --- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_a_test_that_puts_it_in(fault: str) -> None:
    assert fault in INJECTED


def test_the_documentation_holds_the_table() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    for fault in FAULTS.values():
        assert f"| `{fault.name}` | {fault.what} | {fault.within} | {fault.action} |" in text
    for name, kind in KINDS.items():
        assert f"| `{name}` | {kind.what} | {kind.amount:g} |" in text
    for option in dataclasses.fields(WatchOptions):
        default = f"{option.default:g}" if isinstance(option.default, float) else option.default
        assert f"| `{option.name}` | {default} |" in text


# --- the long run, shortened ---------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["block", "latest"])
def test_a_short_soak(engine: Engine, tmp_path: Path, policy: str) -> None:
    soak = load_script("tools/soak.py")
    verdict = soak.soak(engine, tmp_path, frames=3000, every=400, seed=3, policy=policy)
    assert verdict.frames >= 3000 and sum(verdict.injected.values()) > 4 and len(verdict.rss_mb) > 3
    # memory settles in longer runs only; a busy machine may take its time
    assert [b for b in verdict.broken() if not b.startswith(("memory", "recovery", "stalls"))] == []


def test_a_soak_can_fail() -> None:
    soak = load_script("tools/soak.py")
    good = {"rss_mb": [100.0, 102.9], "descriptors": [7, 7], "threads": [5, 5], "injected": {"lost": 2}}
    assert soak.Verdict(**good, counted={"lost": 2}, recovery_s=[0.9]).broken() == []
    bad = soak.Verdict(
        rss_mb=[100.0, 103.1],
        descriptors=[7, 8],
        threads=[5, 6],
        injected={"lost": 2},
        counted={"lost": 1},
        stalls=1,
        overwritten=1,
        recovery_s=[0.1, 1.1],
    )
    assert [b.partition(":")[0] for b in bad.broken()] == [
        "memory", "descriptors", "threads", "stalls", "errors", "pictures", "recovery",
    ]  # fmt: skip


def test_a_soak_sees_a_leak(tmp_path: Path) -> None:
    soak = load_script("tools/soak.py")
    settled, verdict = soak.Settled(), soak.Verdict()
    while not settled.now(verdict):
        pass
    with (tmp_path / "leaked").open("w"):
        while not settled.now(verdict):
            pass
    assert verdict.descriptors[1] == verdict.descriptors[0] + 1
    assert "descriptors" in verdict.broken()[0]


def test_a_soak_sees_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    soak = load_script("tools/soak.py")
    monkeypatch.setattr(soak, "STALL_S", 0.2)
    device = Injector(camera, [])
    waits = soak.Waits(device)
    waits.start()
    try:
        deadline = time.monotonic() + 10
        while not waits.stalls and time.monotonic() < deadline:
            device.frames += 1  # the camera gives, nothing comes
            time.sleep(0.01)
        assert waits.stalls == 1 and waits.longest > 0.2
    finally:
        waits.ended.set()
        waits.join()
