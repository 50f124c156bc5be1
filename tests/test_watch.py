"""The watchdog and what it looks at, with a camera in memory and faults put in on purpose."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import MissingExtraError, StreamError, UsageError
from edgekit.pixels import FORMATS, PixelLayout, Pixels
from edgekit.runtime.faults import SourceLost
from edgekit.runtime.frames import Frame
from edgekit.runtime.health import SECOND, Burst, Clock, Freeze, Pace, Sequence, checksum, sparse
from edgekit.runtime.metrics import Metrics
from edgekit.runtime.sources import open_source
from edgekit.runtime.sources.base import Source
from edgekit.runtime.sources.faulty import FaultySource, Injector, Planned, parse, random_faults
from edgekit.runtime.sources.pooled import POISON, PooledSource, stamp
from edgekit.runtime.watch import Watch, WatchOptions

pytestmark = pytest.mark.clock

LAYOUT = PixelLayout("yuyv", 64, 48)
QUICK = WatchOptions(poll_s=0.02, stall_s=0.15, first_s=0.3, frozen_s=0.2)
"""Short times, for tests; all of them far above what a busy machine takes for a frame."""


def blank(seq: int = 0, **changes: Any) -> Frame:
    values: dict[str, Any] = {"pts_ns": 0, "captured_ns": 0, "source": "x"} | changes
    return Frame(Pixels.bgr(np.zeros((2, 2, 3), np.uint8)), seq, **values)


def camera(**options: Any) -> PooledSource:
    return PooledSource(LAYOUT, **({"declared": 500.0, "padding": 16} | options))


class Watched:
    """A watch over a source with a plan of faults, and the metrics it keeps."""

    def __init__(
        self, plan: str, inner: Callable[[], Source] = camera, options: WatchOptions = QUICK
    ) -> None:
        self.device = Injector(inner, parse(f"faulty:{plan}|x")[0])
        self.stop = threading.Event()
        self.metrics = Metrics()
        self.watch = Watch(self.device.open, self.metrics, "cam", stop=self.stop, options=options)

    def take(self, count: int, until: str = "") -> list[Frame]:
        """Frames, released: `count`, and on until a fault called `until` was counted and mended."""
        taken: list[Frame] = []
        deadline = time.monotonic() + 20
        while len(taken) < count or (until and not self.faults.get(until)):
            frame = self.watch.read()
            assert frame is not None and time.monotonic() < deadline
            taken.append(frame)
            frame.release()
        return taken

    @property
    def snapshot(self) -> dict[str, Any]:
        found: dict[str, Any] = self.metrics.snapshot()["cameras"]["cam"]
        return found

    @property
    def faults(self) -> dict[str, int]:
        faults: dict[str, int] = self.snapshot["faults"]
        return faults


@contextmanager
def watched(
    plan: str = "", inner: Callable[[], Source] = camera, options: WatchOptions = QUICK
) -> Iterator[Watched]:
    w = Watched(plan, inner, options)
    try:
        yield w
    finally:
        w.stop.set()
        w.watch.close()


# --- what frames tell ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "missing"),
    [
        ([0, 1, 2], [0, 0, 0]),
        ([7, 8, 12], [0, 0, 3]),
        ([2**32 - 2, 2**32 - 1, 0, 1], [0, 0, 0, 0]),
        ([2**32 - 2, 1], [0, 2]),
        ([2**32 - 1, 2**32, 2**32 + 2], [0, 0, 1]),  # a counter of 64 bits
        ([500, 0, 1], [0, 0, 0]),  # began anew
        ([0, 0, 0], [0, 0, 0]),  # a driver that does not count
    ],
)
def test_gaps_in_the_driver_counter(numbers: list[int], missing: list[int]) -> None:
    sequence = Sequence()
    assert [sequence.missing(n) for n in numbers] == missing


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(0, 2**32 - 1))
def test_every_missing_number_is_counted_once(steps: list[int], start: int) -> None:
    sequence = Sequence()
    numbers = [start, *((start + total) % 2**32 for total in itertools.accumulate(steps))]
    assert sum(sequence.missing(n) for n in numbers) == sum(steps) - len(steps)


def test_a_burst_ends_after_quiet_frames() -> None:
    burst = Burst(3)
    happened = [1, 1, 0, 0, 1, 0, 0, 0, 1, 0]
    assert [burst.begins(bool(h)) for h in happened] == [1, 0, 0, 0, 0, 0, 0, 0, 1, 0]


def clocked(*pairs: tuple[float, float], clock: Any = "monotonic") -> list[tuple[bool, str]]:
    """(jumped, the frame's clock afterwards) for frames of (timestamp, arrival) in seconds."""
    watching, found = Clock(), []
    for pts, arrival in pairs:
        frame = blank(pts_ns=round(pts * SECOND), captured_ns=round(arrival * SECOND), clock=clock)
        found.append((watching.jumped(frame), frame.clock))
    return found


OK, DOUBTED, JUMP, JUMP_OK = (False, "monotonic"), (False, "none"), (True, "none"), (True, "monotonic")


def test_a_sane_clock() -> None:
    assert clocked((9.9, 10), (10.0, 10.03), (10.9, 11)) == [OK, OK, OK]


def test_a_late_delivery_is_no_jump() -> None:
    """Held back for 3 s, then all at once: the timestamps are old and right, and the ages true."""
    assert clocked((10, 10.01), (10.1, 13), (10.2, 13.01), (13.0, 13.02)) == [OK] * 4


def test_a_clock_that_jumps_back_and_recovers() -> None:
    assert clocked((10, 10), (5, 10.1), (5.1, 10.2), (10.3, 10.3)) == [OK, JUMP, DOUBTED, JUMP_OK]
    assert clocked((10, 10), (9.5, 10.1)) == [OK, JUMP_OK]  # half a second off cannot be told from late


def test_a_clock_that_jumps_ahead_and_back() -> None:
    got = clocked((10, 10), (15, 10.1), (15.1, 10.2), (20, 10.3), (10.4, 10.4))
    assert got == [OK, JUMP, DOUBTED, JUMP, JUMP_OK]


def test_a_little_ahead_is_doubted_and_no_jump() -> None:
    assert clocked((10, 10), (10.5, 10.1), (10.6, 10.6)) == [OK, DOUBTED, OK]


def test_another_clock_from_the_start_is_not_believed() -> None:
    assert clocked((1000.0, 10), (1000.1, 10.1)) == [JUMP, DOUBTED]
    assert clocked((1.0, 10), (1.1, 10.1), (10.2, 10.2)) == [DOUBTED, DOUBTED, OK]


def test_a_media_clock_counts_from_its_own_start() -> None:
    got = clocked((0, 100), (0.1, 100.1), (0.2, 103), (0.3, 103.01), (5, 103.1), (4, 103.2), clock="media")
    assert [jumped for jumped, _ in got] == [False, False, False, False, True, True]
    assert {clock for _, clock in got} == {"media"}


def test_no_clock_is_no_fault() -> None:
    assert clocked((0, 10), (0, 11), clock="none") == [(False, "none")] * 2


def paced(fps: float | None, intervals: list[float], step: int = 1) -> tuple[Pace, list[int]]:
    """The frames at which a slow episode begins."""
    pace, found, now = Pace(fps, 30), [], 0.0
    for i, interval in enumerate([0.0, *intervals]):
        now += interval
        if pace.add(blank(i * step, pts_ns=round(now * SECOND), clock="monotonic")):
            found.append(i)
    return pace, found


def test_half_the_rate_is_slow_once() -> None:
    _, found = paced(30, [1 / 30] * 40 + [1 / 10] * 60)
    assert len(found) == 1 and 40 < found[0] <= 70
    assert paced(30, [1 / 10] * 100)[1] == [30]
    assert paced(30, [1 / 16] * 100)[1] == []


def test_slow_again_after_it_was_over() -> None:
    _, found = paced(30, [0.1] * 40 + [1 / 30] * 60 + [0.1] * 40)
    assert len(found) == 2


def test_dropped_frames_are_not_slow() -> None:
    assert paced(30, [0.1] * 100, step=3)[1] == []


def test_without_an_agreed_rate_nothing_is_slow() -> None:
    pace, found = paced(None, [3.0] * 40)
    assert found == [] and pace.expected_s() == pytest.approx(3)
    assert Pace(None, 30).expected_s() is None


def test_the_slower_of_agreed_and_measured_is_expected() -> None:
    assert paced(30, [0.01] * 40)[0].expected_s() == pytest.approx(1 / 30)
    assert paced(30, [0.5] * 40)[0].expected_s() == pytest.approx(0.5)


def frozen_at(pictures: list[np.ndarray], period_s: float = 0.1, limit_s: float = 2.0) -> list[int]:
    freeze, found = Freeze(limit_s), []
    for i, picture in enumerate(pictures):
        frame = Frame(Pixels.bgr(picture), i, 0, round(i * period_s * SECOND), "x")
        if freeze.seen(frame):
            found.append(i)
            freeze.restart()
    return found


def noise(seed: int, shape: tuple[int, int] = (96, 128)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def test_the_same_picture_is_frozen_after_its_time() -> None:
    assert frozen_at([noise(0)] * 25) == [20]
    assert frozen_at([noise(i) for i in range(5)] + [noise(9)] * 25) == [25]
    assert frozen_at([noise(i) for i in range(60)]) == []


def test_one_changed_byte_off_the_grid_is_life() -> None:
    pictures = []
    for i in range(100):
        picture = noise(0)
        picture[1, 1, 0] = i
        pictures.append(picture)
    assert sparse(Pixels.bgr(pictures[0])) == sparse(Pixels.bgr(pictures[1]))
    assert frozen_at(pictures) == []


def test_a_still_picture_is_asked_less_and_less_often() -> None:
    """Opening the source again did not help: the next verdict takes twice as long."""
    found = frozen_at([noise(0)] * 200)
    assert found == [20, 61, 142]
    again = frozen_at([noise(0)] * 65 + [noise(1)] * 25)
    assert again == [20, 61, 85]


def test_freeze_can_be_switched_off() -> None:
    assert frozen_at([noise(0)] * 50, limit_s=0) == []


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=20)
@given(data=st.data())
def test_the_checksum_sees_every_byte_and_no_padding(format: Any, data: st.DataObject) -> None:
    layout = PixelLayout(format, 2 * data.draw(st.integers(1, 12)), data.draw(st.integers(1, 140)))
    rows = [int(np.prod(shape[1:])) for shape in layout.plane_shapes]
    strides = [row + 7 for row in rows]
    buffer = np.zeros(sum(s * p[0] for s, p in zip(strides, layout.plane_shapes, strict=True)), np.uint8)
    pixels = Pixels.view(buffer, layout, strides)
    before = checksum(pixels)
    assert sparse(pixels)
    plane = pixels.planes[data.draw(st.integers(0, len(pixels.planes) - 1))]
    place = tuple(data.draw(st.integers(0, n - 1)) for n in plane.shape)
    plane[place] = 1
    assert checksum(pixels) != before
    plane[place] = 0
    for p, row, stride in zip(layout.plane_shapes, rows, strides, strict=True):
        buffer[: stride * p[0]].reshape(p[0], stride)[:, row:] = 9
        buffer = buffer[stride * p[0] :]
    assert checksum(pixels) == before


# --- the camera in memory ------------------------------------------------------------------------


def test_a_pooled_buffer_comes_back_poisoned_only_after_its_last_release() -> None:
    with camera(buffers=3) as source:
        first = source.read(1)
        assert first is not None and stamp(first.pixels) == first.seq == 0
        other = first.share()
        first.release()
        assert stamp(other.pixels) == 0 and source.leased == 1
        view = other.pixels.planes[0]
        other.release()
        assert source.leased == 0 and (view == POISON).all()
        with pytest.raises(UsageError, match="was released"):
            _ = other.pixels.planes
        held = [source.read(1) for _ in range(3)]
        with pytest.raises(TimeoutError):
            source.read(0.01)
        for frame in held:
            assert frame is not None
            frame.release()


def test_a_paced_camera_loses_what_no_buffer_was_free_for() -> None:
    with camera(fps=100.0, buffers=3) as source:
        with pytest.raises(TimeoutError):
            source.read(0.0)
        first = source.read(1)
        assert first is not None and (first.seq, first.clock) == (0, "monotonic")
        first.release()
        time.sleep(0.2)
        late = source.read(1)
        assert late is not None and late.seq > 5
        late.release()


# --- the watchdog --------------------------------------------------------------------------------


def test_good_frames_pass_untouched() -> None:
    with watched(inner=lambda: camera(declared=5.0)) as w:  # a busy machine is not slow to it
        frames = w.take(200)
        assert [f.seq for f in frames] == list(range(200))
        assert {(f.camera, f.epoch, f.clock) for f in frames} == {("cam", 0, "monotonic")}
        assert w.snapshot["frames"] == 200 and w.faults == {} and w.snapshot["state"] == "running"
    assert w.snapshot["state"] == "ended"


def test_unplugged_and_back() -> None:
    with watched("unplug@50,0.3") as w:
        frames = w.take(100)
        assert w.faults == {"lost": 1} and w.snapshot["restarts"] == 1
        assert [f.epoch for f in frames] == [0] * 50 + [1] * 50
        assert [f.seq for f in frames] == [*range(50), *range(50)]
        (after,) = w.device.replugged
        assert after < 1


def test_a_stall_is_opened_again() -> None:
    with watched("stall@50,60") as w:
        frames = w.take(60)
        assert w.faults == {"stalled": 1} and frames[-1].epoch == 1 and w.snapshot["restarts"] == 1


def test_the_first_frame_may_take_longer() -> None:
    with watched("stall@0,0.25") as w:  # above stall_s, below first_s
        assert w.take(5)[0].epoch == 0 and w.faults == {}
    with watched("stall@0,60") as w:
        assert w.take(5)[0].epoch == 1 and w.faults == {"stalled": 1}


def test_a_frozen_picture_is_opened_again() -> None:
    with watched("freeze@50,60") as w:
        w.take(60, until="frozen")
        (frame,) = w.take(1)
        # a machine that stands still for a moment makes its camera slow as well
        assert w.faults["frozen"] == 1 and set(w.faults) <= {"frozen", "slow"}
        assert frame.epoch == 1 and w.snapshot["restarts"] == 1
        assert w.snapshot["drops"] == {"stale": 1}


def test_a_slow_camera_is_counted_as_an_episode() -> None:
    with watched("slow@50,0.6") as w:
        w.take(100, until="slow")
        w.take(200)
        # once for some forty slow frames; a machine that stands still for a moment makes its camera slow once more
        assert set(w.faults) == {"slow"} and w.faults["slow"] <= 3
        assert w.snapshot["restarts"] == 0 and w.snapshot["drops"] == {}


def test_a_burst_is_no_fault() -> None:
    with watched("burst@50,0.1") as w:
        frames = w.take(200)
        assert w.faults == {}
        assert max(f.captured_ns - f.pts_ns for f in frames) > 50_000_000  # held back, and its age is true
        assert [f.seq for f in frames] == list(range(200))


def test_drops_are_counted_by_the_frame_and_told_once() -> None:
    with watched("drop@50,5;drop@60,2;drop@200,4") as w:
        frames = w.take(300)
        assert w.faults == {"dropped": 2} and w.snapshot["drops"] == {"driver": 11}
        assert {f.epoch for f in frames} == {0}


def test_corrupt_frames_are_never_handed_on() -> None:
    with watched("corrupt@50,3;corrupt@60,2;corrupt@200") as w:
        frames = w.take(300)
        assert not any(f.corrupt for f in frames)
        assert w.faults == {"corrupt": 2} and w.snapshot["drops"] == {"corrupt": 8}
        assert w.snapshot["frames"] == 308


def test_nothing_but_corrupt_frames_is_a_stall() -> None:
    with watched("corrupt@50,999999999") as w:
        w.take(51)
        assert w.faults == {"corrupt": 1, "stalled": 1} and w.snapshot["restarts"] == 1


@pytest.mark.parametrize("seconds", [-5, 5, -0.5])
def test_a_clock_jump_begins_an_epoch(seconds: float) -> None:
    with watched(f"jump@50,{seconds}") as w:
        frames = w.take(60)
        assert w.faults == {"clock-jump": 1}
        assert [f.epoch for f in frames] == [0] * 50 + [1] * 10
        believed = "monotonic" if seconds == -0.5 else "none"
        assert [f.clock for f in frames] == ["monotonic"] * 50 + [believed] * 10
        assert all(0 <= f.captured_ns - f.taken_ns < SECOND for f in frames)


def test_another_format_after_a_reconnect() -> None:
    with watched("format@50,0.1;format@80,0.1") as w:
        frames = w.take(100)
        assert w.faults == {"lost": 2, "format-changed": 2}
        assert [f.height for f in frames] == [48] * 50 + [24] * 30 + [48] * 20
        epochs = [f.epoch for f in frames]
        assert epochs == sorted(epochs) and len({(f.epoch, f.height) for f in frames}) == 3


def test_a_stop_is_seen_while_lost() -> None:
    with watched("unplug@10,1000", options=WatchOptions(retry_first_s=1000)) as w:  # in the middle of a wait
        w.take(10)
        threading.Timer(0.2, w.stop.set).start()
        assert w.watch.read() is None
        assert w.snapshot["state"] == "lost"


def test_a_source_that_stays_lost_is_given_up_when_asked() -> None:
    with watched("unplug@10,1000", options=WatchOptions(give_up_s=0.3)) as w:
        w.take(10)
        with pytest.raises(SourceLost, match=r"source cam: lost for 0\.\d s: .*unplugged on purpose"):
            w.watch.read()


def test_the_waits_grow_when_nothing_helps() -> None:
    tries: list[float] = []
    stop = threading.Event()

    def open_() -> Source:
        tries.append(time.monotonic())
        raise SourceLost("gone")

    options = WatchOptions(retry_s=0.02, patience_s=0.2, retry_most_s=0.1, wait=True, give_up_s=1.0)
    watch = Watch(open_, Metrics(), "cam", stop=stop, options=options)
    with pytest.raises(SourceLost):
        watch.read()
    # 0.2 s by 0.02 s, then at least 0.1 s each but for the few that grow: 10 + 3 + 6, never more
    assert 3 < len(tries) <= 21


def test_a_source_that_was_never_there_raises_at_once() -> None:
    def open_() -> Source:
        raise UsageError("source v4l2:/dev/vido0: no such device. Check the name")

    metrics = Metrics()
    with pytest.raises(UsageError, match="vido0"):
        Watch(open_, metrics, "cam", stop=threading.Event()).read()
    assert metrics.snapshot()["cameras"]["cam"]["faults"] == {}


def test_waiting_for_a_source_that_is_not_there_yet() -> None:
    left = 3

    def open_() -> Source:
        nonlocal left
        left -= 1
        if left:
            raise UsageError("no such device")
        return camera()

    metrics = Metrics()
    watch = Watch(open_, metrics, "cam", stop=threading.Event(), options=WatchOptions(wait=True))
    watch.open()
    with watch.read() as frame:  # type: ignore[union-attr]
        assert frame.seq == 0
    watch.close()
    found = metrics.snapshot()["cameras"]["cam"]
    assert (found["faults"], found["restarts"]) == ({"lost": 1}, 1)


def test_a_missing_package_is_never_waited_for() -> None:
    def open_() -> Source:
        raise MissingExtraError("gi", "camera", "open it")

    with pytest.raises(MissingExtraError):
        Watch(open_, Metrics(), "cam", stop=threading.Event(), options=WatchOptions(wait=True)).open()


def test_stopped_before_it_was_open() -> None:
    stop = threading.Event()
    stop.set()
    watch = Watch(camera, Metrics(), "cam", stop=stop)
    assert watch.read() is None
    with pytest.raises(StreamError, match="stopped before"):
        watch.open()


class Scripted(Source):
    """Gives and raises what a list says."""

    def __init__(self, items: list[Any], live: bool = True, limit: int | None = None) -> None:
        super().__init__("scripted", limit)
        self.items, self.live = items, live
        self.closed = 0

    def _read(self, timeout_s: float | None) -> Frame | None:
        item = self.items.pop(0) if self.items else TimeoutError()
        if isinstance(item, TimeoutError):
            time.sleep(timeout_s or 0)
        if isinstance(item, BaseException):
            raise item
        return item  # type: ignore[no-any-return]

    def close(self) -> None:
        self.closed += 1
        super().close()
        raise OSError(19, "No such device")  # as STREAMOFF on a camera that is gone


def test_a_raw_system_error_is_a_loss_and_closing_may_fail_too() -> None:
    sources = [Scripted([blank(0), OSError(19, "No such device")]), Scripted([blank(0), None])]
    left = list(sources)
    metrics = Metrics()
    watch = Watch(lambda: left.pop(0), metrics, "cam", stop=threading.Event(), options=QUICK)
    assert [f.epoch for f in watch.frames()] == [0, 1]
    assert [s.closed for s in sources] == [1, 1]
    assert metrics.snapshot()["cameras"]["cam"]["faults"] == {"lost": 1}


def test_what_opening_again_would_not_mend_is_raised() -> None:
    source = Scripted([UsageError("source x: a format that nobody reads")])
    with pytest.raises(UsageError, match="nobody reads"):
        list(Watch(None, Metrics(), "cam", stop=threading.Event(), source=source).frames())
    assert source.closed == 1


def test_files_have_no_watchdog() -> None:
    source = Scripted([blank(0), blank(9, corrupt=True), blank(2), SourceLost("a torn file")], live=False)
    metrics = Metrics()
    watch = Watch(lambda: source, metrics, "cam", stop=threading.Event())
    seen: list[int] = []
    with pytest.raises(SourceLost, match="torn"):
        seen.extend(frame.seq for frame in watch.frames())
    assert seen == [0, 9, 2] and source.closed == 1
    assert metrics.snapshot()["cameras"]["cam"]["faults"] == {}


def test_what_cannot_be_opened_again_is_counted_and_left_open() -> None:
    """A program that pushes pictures and pauses: that is one stall, and no end."""
    stop = threading.Event()
    source = Scripted([blank(0), blank(1), *[TimeoutError()] * 40, blank(2), SourceLost("gone")])
    metrics = Metrics()
    watch = Watch(None, metrics, "cam", stop=stop, source=source, options=QUICK)
    found = [watch.read() for _ in range(3)]
    assert [f.seq for f in found if f] == [0, 1, 2] and source.closed == 0
    assert metrics.snapshot()["cameras"]["cam"]["faults"] == {"stalled": 1}
    with pytest.raises(SourceLost, match="cannot be opened again"):
        watch.read()
    assert source.closed == 1


def test_a_recording_played_as_live_is_never_begun_again() -> None:
    source = Scripted([blank(i, captured_ns=i * SECOND) for i in range(6)] + [None])  # one picture, for 5 s
    source.reopens = False
    metrics = Metrics()
    watch = Watch(lambda: pytest.fail("opened again"), metrics, "cam", stop=threading.Event(), source=source)
    assert [f.seq for f in watch.frames()] == list(range(6))
    assert metrics.snapshot()["cameras"]["cam"]["faults"] == {"frozen": 1}


def test_epochs_of_the_source_itself_count() -> None:
    source = Scripted([blank(0, epoch=3), blank(1, epoch=3), blank(2, epoch=4), None])
    watch = Watch(lambda: source, Metrics(), "cam", stop=threading.Event())
    assert [f.epoch for f in watch.frames()] == [0, 0, 1]


def test_frames_that_waited_for_the_first_read_are_stale() -> None:
    """The driver filled its buffers while an engine was loading, then had none: old frames, and a gap."""
    now = time.monotonic_ns()
    old = [blank(i, pts_ns=now - 3 * SECOND + i, captured_ns=now, clock="monotonic") for i in range(3)]
    new = [blank(90 + i, pts_ns=now + i, captured_ns=now + i, clock="monotonic") for i in range(3)]
    metrics = Metrics()
    watch = Watch(None, metrics, "cam", stop=threading.Event(), source=Scripted([*old, *new, None]))
    assert [(f.seq, f.clock) for f in watch.frames()] == [
        (90, "monotonic"),
        (91, "monotonic"),
        (92, "monotonic"),
    ]
    found = metrics.snapshot()["cameras"]["cam"]
    assert found["faults"] == {} and found["drops"] == {"stale": 3}


def test_a_wrong_clock_is_not_taken_for_old_frames_for_long() -> None:
    def frames() -> Iterator[Frame]:
        for i in range(20):
            now = time.monotonic_ns()
            yield blank(i, pts_ns=now - 3600 * SECOND, captured_ns=now, clock="monotonic")
            time.sleep(0.01)

    metrics = Metrics()
    source = Scripted([])
    making = frames()
    source._read = lambda timeout_s: next(making, None)  # type: ignore[method-assign]
    watch = Watch(None, metrics, "cam", stop=threading.Event(), source=source)
    got = [(f.seq, f.clock) for f in watch.frames()]
    assert got[-1] == (19, "none") and len(got) >= 10


def test_a_limit_counts_over_reconnects() -> None:
    device = Injector(camera, parse("faulty:unplug@30,0.05|x")[0])
    first = FaultySource("faulty:", 50, injector=device)
    watch = Watch(None, Metrics(), "cam", stop=threading.Event(), source=first, options=QUICK)
    count = 0
    for frame in watch.frames():
        frame.release()
        count += 1
    assert count == 50


def test_a_hanging_driver_does_not_hold_the_end() -> None:
    let_go = threading.Event()

    class Hangs(PooledSource):
        def close(self) -> None:
            let_go.wait(30)
            super().close()

    stop, metrics, closed = threading.Event(), Metrics(), threading.Event()
    watch = Watch(lambda: Hangs(LAYOUT, declared=500), metrics, "cam", stop=stop, options=QUICK)

    def read() -> None:
        for frame in watch.frames():
            frame.release()
        closed.set()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    stop.set()
    assert watch.join(thread, 0.2) is False
    assert watch.busy()[0] == "close"
    snapshot = metrics.snapshot()
    assert snapshot["cameras"]["cam"]["faults"] == {"hung": 1}
    assert "close() has not returned for" in snapshot["events"][-1]["text"]
    let_go.set()
    thread.join(10)
    assert closed.is_set() and watch.busy() == ("", 0.0)
    assert watch.join(thread) is True


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_thousands_of_restarts_leak_nothing() -> None:
    """2,000 losses: descriptors, buffers and threads are what they were."""
    opened: list[PooledSource] = []

    def open_() -> Source:
        opened.append(PooledSource(PixelLayout("grey", 16, 16), buffers=2, declared=500))
        return opened[-1]

    device = Injector(open_, (Planned(2 * i, "unplug", 0.0001) for i in itertools.count(1)))
    options = WatchOptions(retry_first_s=0, retry_s=0.0002, frozen_s=0)
    metrics = Metrics()
    watch = Watch(device.open, metrics, "cam", stop=threading.Event(), options=options)
    threads = threading.active_count()
    gc.collect()  # what other tests left
    before = 0
    for i, frame in enumerate(watch.frames()):
        frame.release()
        if i == 200:
            before = descriptors()
        if i == 4200:
            assert descriptors() == before
            break
    found = metrics.snapshot()["cameras"]["cam"]
    assert found["restarts"] == found["faults"]["lost"] == 2100
    assert sum(s.leased for s in opened) == 0
    watch.close()
    assert threading.active_count() == threads


# --- faults by URI -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        ("unplugg@5", "Did you mean 'unplug'"),
        ("unplug", "not understood"),
        ("unplug@5,-1", "amount not usable"),
        ("unplug@5,1,2", "amount not usable"),
        ("drop@5,1.5", "amount not usable"),
        ("random@5", "every how many"),
        ("random@5,10", "every how many"),
    ],
)
def test_plans_that_cannot_be_read(plan: str, what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        open_source(f"faulty:{plan}|synthetic://street?live=1")
    assert "\n" not in str(caught.value)


def test_a_plan_without_a_source() -> None:
    with pytest.raises(UsageError, match="after a bar"):
        open_source("faulty:unplug@5")
    with pytest.raises(UsageError, match="unknown world"):
        open_source("faulty:unplug@5|synthetic://strt?live=1")


def test_faults_by_uri_go_on_after_opening_again() -> None:
    uri = "faulty:drop@3,2;unplug@5,0.05;corrupt@8,1|synthetic://street?live=1&loop=4&size=64x64&fps=200&frames=0"
    metrics = Metrics()
    watch = Watch(lambda: open_source(uri), metrics, "cam", stop=threading.Event(), options=QUICK)
    frames = list(itertools.islice(watch.frames(), 12))
    assert [f.epoch for f in frames] == [0] * 5 + [1] * 7
    watch.close()
    found = metrics.snapshot()["cameras"]["cam"]
    assert found["faults"]["lost"] == found["faults"]["corrupt"] == 1 and found["drops"]["driver"] >= 2
    with open_source(uri) as anew:
        assert anew.read(1).epoch == 0  # type: ignore[union-attr]


def test_random_faults_are_the_same_for_a_seed() -> None:
    first = list(itertools.islice(random_faults(3, 300), 50))
    assert first == list(itertools.islice(random_faults(3, 300), 50))
    assert first != list(itertools.islice(random_faults(4, 300), 50))
    assert len({p.kind for p in first}) >= 8
    assert first[-1].frame / 50 == pytest.approx(300, rel=0.3)
    plan, rest, inner = parse("faulty:drop@1;random@100,300,3|x|y")
    assert next(plan) == Planned(1, "drop", 5) and next(plan).frame > 100
    assert rest > 0 and inner == "x|y"
