"""Which picture belongs to which sweep: whatever order, rate, jitter and clocks the sensors have."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.runtime.sync import LIDAR, Moment, Part, Synchroniser, SyncOptions

MS = 1_000_000


class Sensor:
    """One that measures every `period` ms, with what goes wrong on the way."""

    def __init__(
        self, name, period, phase=0.0, *, jitter=0.0, delay=5.0, delay_jitter=0.0, drop=0.0, drift_ppm=0.0, steps=(),
        gaps=(), seed=0, epochs=False,
    ):  # fmt: skip
        """jitter: of when it measures.  delay: from measurement to arrival.  steps: (ms, by ms) of its clock.
        gaps: (from ms, to ms) without a part.  epochs: a watchdog tells the steps of the clock."""
        self.name, self.period, self.phase, self.jitter = name, period, phase, jitter
        self.delay, self.delay_jitter, self.drop, self.drift = delay, delay_jitter, drop, drift_ppm
        self.steps, self.gaps, self.epochs = steps, gaps, epochs
        self.rng = random.Random(f"{seed} {name}")

    def parts(self, until_ms):
        number = 1
        found = []
        while (at := number * self.period) < until_ms:
            number += 1
            at += self.phase
            at += self.rng.uniform(-self.jitter, self.jitter)
            if self.rng.random() < self.drop or any(a <= at < b for a, b in self.gaps):
                continue
            arrived = at + self.delay + self.rng.uniform(0, self.delay_jitter)
            stamp = at * (1 + self.drift * 1e-6) + sum(by for when, by in self.steps if at >= when)
            epoch = sum(at >= when for when, _ in self.steps) if self.epochs else 0
            found.append(Part(self.name, round(stamp * MS), round(arrived * MS), item=at, epoch=epoch))
        return found


def run(sensors, until_ms=2000, *, options=None, offsets=None, told=(), poll_ms=5):
    """The moments, the synchroniser, the drops. told: (ms, sensor, state) of watchdogs."""
    cameras = {s.name: (offsets or {}).get(s.name, 0.0) for s in sensors if s.name != LIDAR}
    drops = []
    sync = Synchroniser(
        cameras, lidar=any(s.name == LIDAR for s in sensors), options=options,
        dropped=lambda part, why: drops.append((part, why)),
    )  # fmt: skip
    events = [(p.arrived_ns, 1, p) for s in sensors for p in s.parts(until_ms)]
    events += [(ms * MS, 0, (name, state)) for ms, name, state in told]
    events += [(ms * MS, 2, None) for ms in range(0, int(until_ms) + 1000, poll_ms)]
    moments: list[Moment] = []
    for now, kind, what in sorted(events, key=lambda e: (e[0], e[1])):
        if kind == 0:
            sync.tell(*what)
        elif kind == 1:
            sync.add(what)
        while (moment := sync.poll(now)) is not None:
            assert moment.ready_ns <= now
            moments.append(moment)
        due = sync.due_ns(now)
        assert due is None or due > now
        assert all(n <= sync.options.depth + 1 for n in sync.waiting.values())
    return moments, sync, drops


TOTAL: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def _count(monkeypatch):
    TOTAL.clear()
    add = Synchroniser.add

    def counted(self, part):
        TOTAL[part.sensor] += 1
        add(self, part)

    monkeypatch.setattr(Synchroniser, "add", counted)


OFFSETS = {"front": -40.0, "left": -25.0, "back": -5.0}


def rig(period=100.0, camera=None, **rest):
    return [
        Sensor(LIDAR, period, **{**rest, "drop": 0.0}),
        *(Sensor(name, camera or period, off, **rest) for name, off in OFFSETS.items()),
    ]


def test_every_sensor_on_time_is_in_every_moment():
    moments, sync, drops = run(rig(), offsets=OFFSETS)
    assert len(moments) == 19
    assert all(m.complete for m in moments)
    for m in moments:
        for name, off in OFFSETS.items():
            assert m.parts[name].item - m.parts[LIDAR].item == pytest.approx(off)
        assert m.ready_ns == max(p.arrived_ns for p in m.parts.values())
    assert not sync.missed
    assert set(Counter(why for _, why in drops)) <= {"unmatched"}


@given(
    lidar=st.sampled_from([50.0, 100.0]),
    cameras=st.lists(st.floats(33.0, 101.0), min_size=1, max_size=6),
    jitter=st.floats(0, 12),
    delay_jitter=st.floats(0, 120),
    drop=st.floats(0, 0.4),
    drift=st.floats(-400, 400),
    steps=st.lists(st.tuples(st.floats(200, 1500), st.floats(-800, 800)), max_size=2),
    who=st.integers(0, 6),
    window=st.floats(5, 60),
    timeout=st.floats(0, 150),
    seed=st.integers(0, 1000),
)
@settings(max_examples=120, deadline=None)
def test_nothing_is_lost_or_used_twice_whatever_happens(
    lidar, cameras, jitter, delay_jitter, drop, drift, steps, who, window, timeout, seed
):
    """Rates, jitter, drops, deliveries out of order, drifting and stepping clocks, on any sensor."""
    TOTAL.clear()
    offsets = {f"c{i}": -7.0 * i for i in range(len(cameras))}
    common = {"jitter": jitter, "delay_jitter": delay_jitter, "drop": drop, "seed": seed}
    sensors = [Sensor(LIDAR, lidar, steps=steps if who == 0 else (), **common)]
    for i, period in enumerate(cameras):
        sensors.append(
            Sensor(
                f"c{i}", period, offsets[f"c{i}"], drift_ppm=drift, steps=steps if who == i + 1 else (), **common
            )
        )  # fmt: skip
    moments, sync, drops = run(
        sensors, offsets=offsets, options=SyncOptions(window_ms=window, timeout_ms=timeout)
    )
    assert TOTAL[LIDAR] > 0
    taken = [m.taken_ns for m in moments]
    assert taken == sorted(set(taken)), "in order, none twice"
    assert [m.number for m in moments] == list(range(len(moments)))
    used = [id(p) for m in moments for p in m.parts.values()]
    lost = [id(p) for p, _ in drops]
    assert len(set(used + lost)) == len(used + lost), "each part once"
    for name in TOTAL:
        times = [m.parts[name].at_ns for m in moments if name in m.parts]
        assert times == sorted(set(times))
        arrived = len(times) + sum(p.sensor == name for p, _ in drops)
        assert arrived + sync.waiting[name] == TOTAL[name], "every part accounted for"
    for m in moments:
        assert m.parts
        assert [n for n in (*offsets, LIDAR) if n not in m.parts] == list(m.missing)
        assert set(m.missing.values()) <= {"lost", "frozen", "late", "unmatched"}
        if LIDAR in m.parts:  # no picture from elsewhere
            for name in m.parts:
                off = m.parts[name].at_ns - m.taken_ns - offsets.get(name, 0.0) * MS
                assert abs(off) <= (window + 50) * MS + 1
    assert len(moments) >= 0.2 * 2000 / lidar * (1 - drop), "it goes on"


@given(
    lidar=st.sampled_from([50.0, 100.0]),
    camera=st.floats(33.3, 100.0),
    jitter=st.floats(0, 3),
    phase=st.floats(0, 100),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_cameras_of_another_rate_are_matched_as_often_as_can_be(lidar, camera, jitter, phase, seed):
    TOTAL.clear()
    sensors = [
        Sensor(LIDAR, lidar, jitter=jitter, seed=seed),
        Sensor("c", camera, phase, jitter=jitter, seed=seed),
    ]
    moments, *_ = run(sensors, 4000, options=SyncOptions(window_ms=50))
    later = [m for m in moments if m.taken_ns > 500 * MS and LIDAR in m.parts]
    with_it = sum("c" in m.parts for m in later)
    assert with_it >= 0.8 * len(later) * min(1.0, lidar / camera) - 2
    assert all(why == "unmatched" for m in later for why in m.missing.values())
    # what cannot be there is not waited for
    assert all(m.ready_ns - m.anchor.arrived_ns < 60 * MS for m in later)


@given(
    period=st.sampled_from([50.0, 100.0, 200.0]),
    offsets=st.lists(st.floats(-1, 0.2), min_size=1, max_size=8),
    jitter=st.floats(0, 0.1),
    delay=st.floats(0, 150),
    delay_jitter=st.floats(0, 50),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_sensors_that_are_all_there_are_all_in_every_moment(
    period, offsets, jitter, delay, delay_jitter, seed
):
    """Triggered together, late by anything below the timeout: complete, the right pictures, no longer waited for than
    until the last is there."""
    TOTAL.clear()
    named = {f"c{i}": off * period for i, off in enumerate(offsets)}
    common = {"delay": delay, "delay_jitter": delay_jitter, "jitter": jitter * period, "seed": seed}
    sensors = [
        Sensor(LIDAR, period, **common),
        *(Sensor(n, period, off, **common) for n, off in named.items()),
    ]
    options = SyncOptions(window_ms=100, timeout_ms=60 + delay_jitter)
    moments, *_ = run(sensors, 20 * period, offsets=named, options=options)
    settled = [m for m in moments if m.taken_ns > 6.5 * period * MS and m.taken_ns < 18.5 * period * MS]
    assert len(settled) >= 11
    for m in settled:
        assert m.complete, m.missing
        assert m.ready_ns == max(p.arrived_ns for p in m.parts.values())
        for name, off in named.items():
            apart = m.parts[name].item - m.parts[LIDAR].item - off
            assert abs(apart) <= 2 * jitter * period + 1e-3, "of the same turn"


@given(
    timeout=st.floats(0, 200), drop=st.floats(0, 0.9), delay_jitter=st.floats(0, 300), seed=st.integers(0, 1000)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_moment_waits_longer_than_the_timeout(timeout, drop, delay_jitter, seed):
    """Whatever cameras do; but for the time between two looks, here 5 ms."""
    TOTAL.clear()
    common = {"drop": drop, "delay_jitter": delay_jitter, "seed": seed}
    sensors = [Sensor(LIDAR, 100.0), *(Sensor(n, 100.0, off, **common) for n, off in OFFSETS.items())]
    moments, *_ = run(sensors, offsets=OFFSETS, options=SyncOptions(timeout_ms=timeout))
    swept = [m for m in moments if LIDAR in m.parts]
    assert len(swept) == 19, "every sweep"
    assert all(m.ready_ns - m.anchor.arrived_ns <= (timeout + 5) * MS for m in swept)


def test_a_lost_camera_is_named_and_waited_for_only_until_it_is_silent():
    sensors = rig()
    sensors[1].gaps = [(500, 1500)]
    moments, sync, _ = run(sensors, offsets=OFFSETS)
    without = [m for m in moments if not m.complete]
    assert 9 <= len(without) <= 11
    assert all(m.missing == {"front": "late"} for m in without)
    waited = [m.ready_ns - m.anchor.arrived_ns for m in without]
    assert sum(ns > 50 * MS for ns in waited) <= 3
    assert sync.missed == {"front": {"late": len(without)}}
    assert moments[-1].complete


@pytest.mark.parametrize("state", ["lost", "frozen"])
def test_what_the_watchdog_says_is_the_reason_and_ends_the_waiting(state):
    sensors = rig()
    sensors[1].gaps = [(500, 1500)]
    moments, *_ = run(sensors, offsets=OFFSETS, told=[(510, "front", state)])
    without = [m for m in moments if not m.complete]
    assert without and all(m.missing == {"front": state} for m in without)
    assert all(m.ready_ns - m.anchor.arrived_ns < 60 * MS for m in without)


def test_without_lidar_the_cameras_pace_and_it_comes_back():
    sensors = rig()
    sensors[0].gaps = [(500, 1500)]
    moments, *_ = run(sensors, offsets=OFFSETS)
    blind = [m for m in moments if m.missing]
    assert len(blind) == pytest.approx(10, abs=1)
    assert all(m.missing == {LIDAR: "late"} for m in blind)
    assert all(set(m.parts) == set(OFFSETS) for m in blind)
    assert [round(m.taken_ns / MS, -1) for m in moments] == list(range(100, 2000, 100))
    assert LIDAR in moments[-1].parts


@pytest.mark.parametrize("camera", [33.3, 50.0, 80.0])
def test_without_lidar_moments_keep_its_pace_as_far_as_cameras_can(camera):
    sensors = rig(100.0, camera)
    sensors[0].gaps = [(1000, 9000)]
    moments, *_ = run(sensors, 4000, offsets=OFFSETS)
    blind = [m.taken_ns / MS for m in moments if LIDAR in m.missing and m.taken_ns > 1200 * MS]
    steps = [b - a for a, b in itertools.pairwise(blind)]
    assert max(steps) <= 165
    assert sum(steps) / len(steps) == pytest.approx(100.0, rel=0.25)


def test_without_cameras_every_sweep_goes_at_once():
    sensors = rig()
    for sensor in sensors[1:]:
        sensor.gaps = [(500, 9999)]
    moments, *_ = run(sensors, offsets=OFFSETS)
    alone = [m for m in moments if m.taken_ns > 1000 * MS]
    assert len(alone) == 9
    assert all(set(m.parts) == {LIDAR} and m.ready_ns - m.anchor.arrived_ns <= 5 * MS for m in alone)


def test_nothing_for_a_while_then_all_goes_on():
    sensors = rig()
    for sensor in sensors:
        sensor.gaps = [(500, 1300)]
    moments, *_ = run(sensors, offsets=OFFSETS)
    assert not [m for m in moments if 600 * MS < m.taken_ns < 1250 * MS]
    assert all(m.complete for m in moments if m.taken_ns > 1450 * MS)


def test_a_rig_without_lidar():
    sensors = rig()[1:]
    moments, *_ = run(sensors, offsets=OFFSETS)
    assert len(moments) == pytest.approx(19, abs=1)
    assert all(m.complete for m in moments[1:])


def test_a_calibration_that_is_off_is_found_and_the_camera_matched():
    """A camera 42 ms from where the rig says it is: out of the window at first."""
    sensors = rig()
    near = SyncOptions(window_ms=30)
    moments, sync, _ = run(sensors, 4000, offsets={**OFFSETS, "front": 2.0}, options=near)
    facts = sync.facts()["front"]
    assert facts["phase_ms"] == pytest.approx(-42, abs=1)
    assert facts["offset_ms"] == pytest.approx(-40, abs=1)
    assert "front" in moments[2].missing
    assert all(m.complete for m in moments[12:])
    fixed, *_ = run(
        rig(), 4000, offsets={**OFFSETS, "front": 2.0}, options=SyncOptions(window_ms=30, adapt_ms=0)
    )
    assert all("front" in m.missing for m in fixed)


@given(drop=st.floats(0, 0.25), jitter=st.floats(0, 8), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_lost_pictures_do_not_move_period_or_phase(drop, jitter, seed):
    TOTAL.clear()
    sensors = [Sensor(LIDAR, 100.0), Sensor("c", 100.0, -20.0, drop=drop, jitter=jitter, seed=seed)]
    _, sync, _ = run(sensors, 6000, offsets={"c": -20.0})
    facts = sync.facts()["c"]
    assert facts["period_ms"] == pytest.approx(100, abs=2 * jitter + 0.1)
    assert facts["offset_ms"] == pytest.approx(-20, abs=jitter + 0.1)


def test_a_camera_that_drifts_through_its_whole_period_is_followed():
    sensors = [Sensor(LIDAR, 100), Sensor("c", 100.5, 0)]
    moments, *_ = run(sensors, 30_000)
    known = [m for m in moments if m.taken_ns > 1000 * MS]
    assert sum("c" in m.parts for m in known) >= 0.95 * len(known)
    for m in known:
        if "c" in m.parts:
            assert abs(m.parts["c"].item - m.parts[LIDAR].item) < 75


@pytest.mark.parametrize(("by", "told"), [(-700.0, False), (-250.0, True), (400.0, False), (5000.0, True)])
@pytest.mark.parametrize("who", [LIDAR, "front"])
def test_a_clock_that_steps_is_put_right(by, told, who):
    """Back by less than three periods only a watchdog tells it from parts that came in another order."""
    sensors = rig(delay_jitter=4.0, epochs=told)
    sensors[0 if who == LIDAR else 1].steps = [(1000, by)]
    moments, sync, _ = run(sensors, 3000, offsets=OFFSETS)
    later = [m for m in moments if m.taken_ns > 1400 * MS]
    assert len(later) >= 14
    assert all(m.complete for m in later)
    for m in later:
        for name, off in OFFSETS.items():
            assert m.parts[name].item - m.parts[LIDAR].item == pytest.approx(off, abs=1)
    facts = sync.facts()[who]
    assert facts["clock_steps"] == 1
    assert facts["clock_ms"] == pytest.approx(by, abs=5)


def test_a_clock_that_drifts_is_measured():
    sensors = rig(delay_jitter=3.0)
    sensors[1].drift = -300
    _, sync, _ = run(sensors, 60_000, offsets=OFFSETS, poll_ms=20)
    facts = sync.facts()
    assert facts["front"]["drift_ppm"] == pytest.approx(300, abs=40)
    assert abs(facts["back"]["drift_ppm"]) < 40
    assert facts["front"]["phase_ms"] == pytest.approx(-18, abs=1.5)
    assert facts["front"]["arrival_ms"] == pytest.approx(5 + 18, abs=2.5)


def test_moments_as_far_apart_as_asked():
    sensors = rig(50.0, 80.0)
    moments, _, drops = run(sensors, offsets=OFFSETS, options=SyncOptions(period_ms=100))
    steps = [b.taken_ns - a.taken_ns for a, b in itertools.pairwise(moments)]
    assert all(step == pytest.approx(100 * MS, abs=1) for step in steps)
    assert Counter(why for p, why in drops if p.sensor == LIDAR) == {"thinned": pytest.approx(20, abs=2)}


def test_only_pictures_that_a_moment_will_take_are_worth_working_on():
    sync = Synchroniser({"c": 0.0})
    worth = Counter()
    events = sorted(
        [*Sensor(LIDAR, 100.0).parts(3000), *Sensor("c", 100 / 3, 2.0).parts(3000)],
        key=lambda p: p.arrived_ns,
    )
    said: dict[int, bool] = {}
    for part in events:
        sync.add(part)
        if part.sensor == "c":
            said[id(part)] = sync.wanted(part)
        while (moment := sync.poll(part.arrived_ns)) is not None:
            if moment.taken_ns > 600 * MS and "c" in moment.parts:
                worth[said[id(moment.parts["c"])]] += 1
    assert worth == {True: sum(worth.values())}
    assert sum(said.values()) <= len(said) * 0.45


def test_files_wait_for_nobody_s_clock():
    """A file's sensors come in any order; the same moments whatever the order of reading."""
    sensors = rig(jitter=2.0)
    parts = {s.name: s.parts(1000) for s in sensors}
    found = []
    for seed in range(3):
        rng = random.Random(seed)
        sync = Synchroniser(OFFSETS, timed=False)
        queues = {name: list(p) for name, p in parts.items()}
        moments = []
        while any(queues.values()):
            open_ = [name for name, q in queues.items() if q and not sync.full(name)]
            assert open_, "one of them may always be read"
            name = rng.choice(open_)
            sync.add(queues[name].pop(0))
            if not queues[name]:
                sync.tell(name, "lost")
            while (moment := sync.poll(0)) is not None:
                moments.append([(n, p.item) for n, p in sorted(moment.parts.items())])
        found.append(moments)
        assert sync.due_ns(0) is None
    assert len(found[0]) >= 9
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("wrong", [{"window_ms": 0}, {"timeout_ms": -1}, {"depth": 1}, {"period_ms": 1e9}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match=f"sync: {next(iter(wrong))}"):
        SyncOptions(**wrong)
