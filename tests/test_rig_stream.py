"""Streams whose sources are the sensors of a rig, one by one, and whole rigs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import edgekit
from edgekit.errors import UsageError
from edgekit.pixels import PixelLayout
from edgekit.rig import Rig, mosaic
from edgekit.runtime.sinks.base import Sink
from edgekit.runtime.sources.pooled import POISON, PooledSource
from edgekit.runtime.sync import SyncOptions
from edgekit.runtime.watch import WatchOptions
from edgekit.synth.street_rig import RigWorld
from tests.rig_doubles import CAMERAS, RIG, SENSORS, DoubleEngine, sensor, sensors

pytestmark = [pytest.mark.clock, pytest.mark.usefixtures("_no_thread_stays")]
QUICK = WatchOptions(stall_s=0.4, retry_first_s=0.02, retry_s=0.05, frozen_s=0.3)


def collect(stream, *, until=lambda items: False, most_s=20.0):
    """(result, moment, missing) of every result, until that holds."""
    items = []
    ends = time.monotonic() + most_s
    for item in stream:
        items.append(item)
        if until(items) or time.monotonic() > ends:
            break
    return items


def counted(stream):
    """Frames that arrived, and what became of them, by sensor."""
    snapshot = stream.metrics.snapshot()
    return {name: (m["frames"], dict(m["drops"])) for name, m in snapshot["cameras"].items()}


def test_files_of_every_sensor_make_the_moments_of_the_whole():
    """Sensors read one by one, in whatever order: the pictures, points and motions of the frames they come from."""
    engine = DoubleEngine()
    world = RigWorld(3, width=64, height=64)
    with edgekit.stream(engine, sensors(frames=4, fps=10, live=0)) as stream:
        assert stream.policy == "block"
        items = collect(stream)
        assert [item.frame.seq for item in items] == [0, 1, 2, 3]
    for i, (item, moment) in enumerate(zip(items, engine.opened[0].moments, strict=True)):
        truth = world.frame(i)
        assert item.frame.rig is moment
        assert item.missing == {} and item.result.missing == ()
        assert np.array_equal(moment.points, truth.points) and np.array_equal(moment.rings, truth.rings)
        assert moment.taken_ns == pytest.approx(truth.taken_ns, abs=2)
        assert list(moment.shots) == list(CAMERAS)
        for name, shot in moment.shots.items():
            assert np.array_equal(shot.image, truth.shots[name].image)
            assert np.allclose(shot.motion, truth.shots[name].motion, atol=1e-4)
            assert shot.taken_ns == pytest.approx(truth.shots[name].taken_ns, abs=2)
    assert counted(stream) == {name: (4, {}) for name in SENSORS}


def test_the_frame_of_a_moment_shows_all_pictures_and_is_valid_until_the_next():
    with edgekit.stream(DoubleEngine(), sensors(frames=3, fps=10, live=0)) as stream:
        item = next(stream)
        assert (item.camera, item.frame.width, item.frame.height) == ("rig", 192, 128)
        assert np.array_equal(item.frame.image, mosaic(item.frame.rig))
        kept = item.share()
        assert kept.ages == item.ages
        next(stream)
        with pytest.raises(UsageError, match="was released"):
            _ = item.frame.pixels.planes
        assert kept.frame.image.any()
        kept.frame.release()


def test_live_sensors_are_worked_on_as_they_arrive_and_ages_add_up():
    engine = DoubleEngine(camera_s=0.002, finish_s=0.005)
    with edgekit.stream(engine, sensors(fps=20), sync=SyncOptions(timeout_ms=200)) as stream:
        assert stream.policy == "latest"
        items = collect(stream, until=lambda items: len(items) == 40)
    pipeline = engine.opened[0]
    whole = [item for item in items if not item.missing]
    assert len(whole) >= 0.8 * len(items)
    numbers = [item.frame.seq for item in items]
    times = [item.frame.rig.taken_ns for item in items]
    assert numbers == sorted(set(numbers)) and times == sorted(set(times))
    # a thread may be kept from its core between two looks at the clock, once in a while
    explained = [item.unaccounted_ns < 0.2 * item.age_ns + 3_000_000 for item in items]
    assert sum(explained) >= 0.9 * len(items)
    for item in items:
        assert list(item.stage_ns) == [
            "transport", "match", "wait", "cameras", "preprocess", "engine", "decode",
        ]  # fmt: skip
        assert all(ns >= 0 for ns in item.stage_ns.values())
        assert item.unaccounted_ns >= 0
        assert set(item.ages) | set(item.missing) == set(SENSORS)
        assert item.oldest_ns == max(item.ages.values()) >= item.ages.get("lidar", 0)
        if "lidar" in item.ages:
            assert item.ages["lidar"] == pytest.approx(item.age_ns, abs=5e6)
    # cameras fire up to 45 ms before the sweep ends: their networks ran by then, outside of its age
    waited = sorted(item.stage_ns["cameras"] for item in whole)
    assert waited[len(waited) // 2] < 6 * 2_000_000
    assert pipeline.threads == {threading.get_ident()}
    snapshot = stream.metrics.snapshot()
    rig = snapshot["engines"]["fusion"]["rig"]
    assert rig["partial"] == len(items) - len(whole)
    assert set(rig["ages"]) == set(SENSORS) == set(rig["sync"])
    assert rig["sync"]["lidar"]["period_ms"] == pytest.approx(50, abs=8)
    for name in SENSORS:  # every frame is in a moment or among the drops
        frames, drops = counted(stream)[name]
        used = sum(name in item.ages for item in items)
        assert 0 <= frames - used - sum(drops.values()) <= 8


def test_only_the_newest_moment_counts_when_the_engine_is_slow():
    engine = DoubleEngine(finish_s=0.12)
    names = ("CAM_FRONT", "lidar")
    with edgekit.stream(engine, sensors(names, frames=40, fps=20)) as stream:
        items = collect(stream)
    assert 8 <= len(items) <= 25
    assert Counter(counted(stream)["lidar"][1])["superseded"] >= 10
    assert max(item.age_ms for item in items[1:-1]) < 500


def test_an_engine_with_too_much_to_do_still_gives_moments_and_stops():
    """Cameras' networks take three times what there is: only pictures of the newest moment are worth it."""
    engine = DoubleEngine(camera_s=0.025)
    with edgekit.stream(engine, sensors(fps=20)) as stream:
        items = collect(stream, until=lambda items: len(items) == 8)
        assert np.median([item.age_ms for item in items[2:]]) < 600
        threading.Timer(0.3, stream.stop).start()
        started = time.monotonic()
        for _ in stream:
            pass
        assert time.monotonic() - started < 3


def test_a_lost_lidar_leaves_moments_of_cameras():
    engine = DoubleEngine()
    plans = {"lidar": "unplug@15,1"}
    with edgekit.stream(engine, sensors(plans=plans), watch_options=QUICK) as stream:
        items = collect(stream, until=lambda items: _returned(items, "lidar"))
    blind = [item for item in items if "lidar" in item.missing]
    assert len(blind) >= 10
    assert {item.missing["lidar"] for item in blind} <= {"lost", "late"}
    assert "lost" in {item.missing["lidar"] for item in blind}
    steps = np.diff([item.frame.rig.taken_ns for item in blind]) / 1e6
    assert np.median(steps) == pytest.approx(50, abs=10)
    assert all(item.frame.rig.points is None and len(item.frame.rig.shots) >= 1 for item in blind)
    assert _returned(items, "lidar"), "it came back"
    snapshot = stream.metrics.snapshot()
    assert snapshot["engines"]["fusion"]["rig"]["missing"]["lidar"]["lost"] >= 5
    assert snapshot["cameras"]["lidar"]["restarts"] == 1


def test_all_cameras_lost_leave_the_lidar():
    engine = DoubleEngine()
    names = ("CAM_FRONT", "CAM_BACK", "lidar")
    plans = dict.fromkeys(names[:2], "unplug@15,1")
    with edgekit.stream(engine, sensors(names, plans=plans), watch_options=QUICK) as stream:
        items = collect(stream, until=lambda items: all(_returned(items, name) for name in names[:2]))
    alone = [item for item in items if set(item.ages) == {"lidar"}]
    assert len(alone) >= 10
    lost = [item for item in alone if set(item.missing.values()) == {"lost"}]
    assert len(lost) >= 8
    assert np.median([item.stage_ns["match"] for item in lost]) < 5e6, "nobody is waited for"
    assert _returned(items, "CAM_FRONT") and _returned(items, "CAM_BACK"), "they came back"


def test_everything_lost_is_said_and_goes_on_when_something_returns():
    engine = DoubleEngine()
    names = ("CAM_FRONT", "lidar")
    plans = {"CAM_FRONT": "unplug@10,1.2", "lidar": "unplug@10,0.8"}
    events = []
    with edgekit.stream(engine, sensors(names, plans=plans), watch_options=QUICK) as stream:
        stream.metrics.on_event = lambda event: events.append((event.where, event.name))
        items = collect(stream, until=lambda items: _returned(items, "CAM_FRONT"))
    assert ("fusion", "blind") in events
    assert events.index(("fusion", "restarted")) > events.index(("fusion", "blind"))
    assert events.count(("fusion", "blind")) == 1
    assert stream.metrics.snapshot()["engines"]["fusion"]["faults"] == {"blind": 1}
    assert _returned(items, "CAM_FRONT") and not items[-1].missing
    assert any(set(item.ages) == {"lidar"} for item in items)


def test_a_swap_loses_no_moment_and_no_camera_s_work_is_mixed():
    """`Double` refuses what another pipeline has seen."""
    first, second = DoubleEngine("first", camera_s=0.002), DoubleEngine("second", camera_s=0.002)
    swapped = []
    with edgekit.stream(
        first, sensors(("CAM_FRONT", "CAM_BACK", "lidar"), frames=30, fps=10, live=0)
    ) as stream:
        items = []
        for item in stream:
            items.append(item.frame.seq)
            if len(items) == 8:
                thread = threading.Thread(target=lambda: swapped.append(stream.swap(second)))
                thread.start()
    thread.join(5)
    assert items == list(range(30))
    assert [s.engine for s in swapped] == ["first"]
    before, after = first.opened[0], second.opened[0]
    assert len(before.moments) + len(after.moments) == 30
    assert len(after.moments) >= 10 and before.closed


def test_recalibration_while_running_loses_no_moment(tmp_path):
    other = Rig.read(_written(tmp_path, RIG))
    moved = RIG.cameras["CAM_FRONT"].__class__(
        **{**vars(RIG.cameras["CAM_FRONT"]), "position": (1.0, 0.0, 1.4)}
    )
    other = Rig("moved", RIG.lidar, {**RIG.cameras, "CAM_FRONT": moved})
    path = tmp_path / "moved.toml"
    other.write(path)
    engine = DoubleEngine()
    with edgekit.stream(engine, sensors(frames=12, fps=10, live=0)) as stream:
        digests = []
        for item in stream:
            digests.append(item.frame.rig.rig.digest())
            if len(digests) == 3:
                flat = {name: camera.resized(64, 32) for name, camera in RIG.cameras.items()}
                with pytest.raises(UsageError, match="is 64x32, but its pictures are 64x64"):
                    stream.recalibrate(Rig("flat", RIG.lidar, flat))
            if len(digests) == 5:
                stream.recalibrate(path)
    assert digests == [RIG.digest()] * 5 + [other.digest()] * 7
    assert engine.opened[0].prepared == [RIG.digest(), other.digest()]
    events = [e["name"] for e in stream.metrics.snapshot()["events"]]
    assert events == ["recalibrated"]


def test_a_watched_file_is_used_anew_and_a_broken_one_is_told(tmp_path):
    path = _written(tmp_path, RIG)
    other = Rig("other", RIG.lidar, {n: c.resized(32, 32) for n, c in RIG.cameras.items()})
    seen, events = [], []
    sources = sensors(("CAM_FRONT", "lidar"), fps=20)
    with edgekit.stream(DoubleEngine(), sources, rig=path, watch_rig=True) as stream:
        stream.metrics.on_event = lambda event: events.append(event.name)
        ends = time.monotonic() + 15
        for item in stream:
            seen.append(item.frame.rig.rig.name)
            if len(seen) == 3:
                path.write_text("name = 3\n")
            if "calibration" in events and seen[-1] == RIG.name and "other" not in seen:
                other.write(path)
            if seen[-1] == "other" or time.monotonic() > ends:
                break
    assert seen[-1] == "other"
    assert "calibration" in events and "recalibrated" in events
    # pictures are larger than that calibration's: it is scaled to them
    assert item.frame.rig.rig.cameras["CAM_FRONT"].width == 64


def test_a_calibration_that_changes_before_the_first_result_is_noticed(tmp_path):
    """It was read when the stream was made."""
    path = _written(tmp_path, RIG)
    sources = sensors(("CAM_FRONT", "lidar"), fps=20)
    with edgekit.stream(DoubleEngine(), sources, rig=path, watch_rig=True) as stream:
        Rig("other", RIG.lidar, RIG.cameras).write(path)
        ends = time.monotonic() + 10
        for item in stream:
            name = item.frame.rig.rig.name
            if name == "other" or time.monotonic() > ends:
                break
    assert name == "other"


def test_whole_rigs_are_frames_of_one_source():
    engine = DoubleEngine()
    rig = Rig("mine", RIG.lidar, RIG.cameras)
    with edgekit.stream(engine, "synthetic://street-rig?seed=3&size=64x64&frames=3", rig=rig) as stream:
        items = collect(stream)
    assert engine.opened[0].wholes == 3
    assert all(item.frame.rig.rig.name == "mine" for item in items)
    assert set(items[0].ages) == set(SENSORS) and not items[0].missing
    assert items[0].ages["CAM_FRONT"] > items[0].ages["lidar"]
    with edgekit.stream(engine, "synthetic://street-rig?seed=3&size=64x64&frames=5", rig=rig) as stream:
        names = []
        for item in stream:
            names.append(item.frame.rig.rig.name)
            if len(names) == 1:
                stream.recalibrate(RIG)
    assert names[0] == "mine" and names[-1] == RIG.name


def test_several_engines_each_match_for_themselves():
    a, b = DoubleEngine("a"), DoubleEngine("b", finish_s=0.01)
    with edgekit.stream([a, b], sensors(("CAM_FRONT", "lidar"), frames=10, fps=10, live=0)) as stream:
        got = Counter(item.engine for item in stream)
    assert got == {"a": 10, "b": 10}


def test_what_does_not_fit_is_refused():
    engine = DoubleEngine()
    live = sensors(("CAM_FRONT",), frames=2)
    with pytest.raises(UsageError, match=r"'CAM_FRNT'.*CAM_FRONT"):
        edgekit.stream(engine, {**sensors(("lidar",), frames=2), "CAM_FRNT": live["CAM_FRONT"]})
    with pytest.raises(UsageError, match="is a file while others are live"):
        edgekit.stream(engine, {**live, "lidar": sensor("lidar", 2, live=0)})
    with pytest.raises(UsageError, match="sensors one by one"):
        edgekit.stream(engine, "synthetic://street-rig?frames=2&size=64x64", sync=SyncOptions())
    with pytest.raises(UsageError, match="watch_rig needs the rig's file"):
        edgekit.stream(engine, live, rig=RIG, watch_rig=True)
    with pytest.raises(UsageError, match="no camera 'CAM_FRONT'"):
        edgekit.stream(engine, live, rig=Rig("small", RIG.lidar, {"CAM_BACK": RIG.cameras["CAM_BACK"]}))
    with (
        pytest.raises(UsageError, match="carry no points"),
        edgekit.stream(engine, {"lidar": "synthetic://street?frames=2"}, rig=RIG) as stream,
    ):
        next(stream)
    with (
        pytest.raises(UsageError, match="bring no calibration"),
        edgekit.stream(engine, {"CAM_FRONT": "synthetic://street?frames=2"}) as stream,
    ):
        next(stream)
    with (
        pytest.raises(UsageError, match="are pictures, but engine"),
        edgekit.stream(engine, "synthetic://street?frames=2") as stream,
    ):
        next(stream)
    with edgekit.stream(engine, sensors(("CAM_FRONT",), frames=2, live=0)) as stream:
        with pytest.raises(UsageError, match="no camera 'CAM_FRONT'"):
            stream.recalibrate(Rig("small", RIG.lidar, {}))
        assert len(list(stream)) == 2


def test_cameras_that_bring_no_calibration_take_the_rig_s():
    """Plain cameras of another size than the rig says: the calibration is scaled to their pictures."""
    engine = DoubleEngine()
    rig = Rig("mine", RIG.lidar, {n: c.resized(128, 128) for n, c in RIG.cameras.items()})
    sources = {"CAM_FRONT": "synthetic://street?frames=3&size=64x64&fps=10&format=yuyv"}
    with edgekit.stream(engine, sources, rig=rig) as stream:
        items = collect(stream)
    assert len(items) == 3
    moment = items[0].frame.rig
    camera = moment.rig.cameras["CAM_FRONT"]
    assert (camera.width, camera.fx) == (64, pytest.approx(RIG.cameras["CAM_FRONT"].fx))
    assert moment.points is None and moment.shots["CAM_FRONT"].image.shape == (64, 64, 3)
    assert np.array_equal(moment.shots["CAM_FRONT"].motion, np.eye(4))


def test_a_pose_that_is_asked_for_moves_the_pictures():
    """10 m/s ahead: the vehicle was 0.4 m behind when the front camera took its picture 40 ms before."""

    def pose(at_ns):
        found = np.eye(4)
        found[0, 3] = at_ns / 1e9 * 10.0
        return found

    engine = DoubleEngine()
    options = SyncOptions(pose=pose)
    with edgekit.stream(
        engine, sensors(("CAM_FRONT", "lidar"), frames=3, fps=10, live=0), sync=options
    ) as stream:
        items = collect(stream)
    shot = items[1].frame.rig.shots["CAM_FRONT"]
    ahead = (items[1].frame.rig.taken_ns - shot.taken_ns) / 1e9 * 10.0
    assert ahead > 0.05
    assert shot.motion[:3, 3] == pytest.approx([ahead, 0, 0], abs=1e-6)


class Slow(Sink):
    """Looks at every picture, and takes its time."""

    def __init__(self):
        super().__init__(Path("slow"))
        self.seen = 0

    def _write(self, item):
        for shot in item.frame.rig.shots.values():
            before = shot.image.copy()
            time.sleep(0.02)
            assert np.array_equal(shot.image, before) and not (before == POISON).all(), "overwritten"
        self.seen += 1

    def _finish(self):
        pass

    def _drop(self):
        pass


@pytest.mark.parametrize("buffers", [3, 4, 8])
def test_a_driver_with_few_buffers_keeps_some_and_gets_all_back(buffers):
    """Pictures of a 30 Hz camera wait for the sweep, for the caller and for a sink, in the driver's own memory."""
    layout = PixelLayout("bgr", 64, 64)
    camera = PooledSource(layout, buffers=buffers, fps=30)
    sink = Slow()
    with edgekit.stream(
        DoubleEngine(), {"CAM_FRONT": camera, "lidar": sensor("lidar", fps=10)}, rig=RIG, sinks=sink
    ) as stream:
        items = []
        for item in stream:
            shot = item.frame.rig.shots.get("CAM_FRONT")
            assert shot is None or not (shot.image == POISON).all()
            assert camera.leased <= buffers
            items.append(not item.missing)
            if len(items) == 25:
                break
    assert camera.leased == 0
    assert sum(items) >= 15, stream.metrics.snapshot()["cameras"]
    assert sink.seen >= 3


def _returned(items, sensor):
    """Whether the last results have it again, after some had not."""
    return any(sensor in item.missing for item in items) and all(sensor in item.ages for item in items[-3:])


def _written(tmp_path, rig):
    path = tmp_path / "rig.toml"
    rig.write(path)
    return path
