"""Faults of single sensors of a rig while it streams: noticed, counted, named in the results, and over when they end."""

from __future__ import annotations

import time

import pytest

import edgekit
from edgekit.runtime.metrics import Metrics
from edgekit.runtime.sinks.prometheus import exposition
from edgekit.runtime.watch import WatchOptions
from tests.rig_doubles import DoubleEngine, sensors
from tests.test_prometheus import read

pytestmark = [pytest.mark.clock, pytest.mark.usefixtures("_no_thread_stays")]
NAMES = ("CAM_FRONT", "CAM_BACK", "lidar")
FPS = 40.0
"""Faster than cameras of rigs are: faults are over sooner."""
QUICK = WatchOptions(stall_s=0.4, retry_first_s=0.2, retry_s=0.1, frozen_s=0.4, window=10)


def run(plans, over, *, loop=3, most_s=20.0):
    """Results until the fault was counted and `over(items)`; the metrics' snapshot then."""
    engine = DoubleEngine()
    items = []
    ends = time.monotonic() + most_s
    with edgekit.stream(
        engine, sensors(NAMES, plans=plans, loop=loop, fps=FPS), watch_options=QUICK
    ) as stream:
        for item in stream:
            items.append(item)
            cameras = stream.metrics.snapshot()["cameras"]
            if all(cameras[name]["faults"] for name in plans) and over(items):
                break
            assert time.monotonic() < ends, (items[-1].missing, cameras)
        found = stream.metrics.snapshot()
        facts = stream._workers[0]._sync.facts()
    times = [item.frame.rig.taken_ns for item in items]
    assert times == sorted(set(times))
    return items, found, facts


def healthy(items, count=6):
    return len(items) > count and all(not item.missing for item in items[-count:])


@pytest.mark.parametrize("who", ["CAM_FRONT", "lidar"])
@pytest.mark.parametrize(
    ("plan", "fault", "reasons"),
    [
        ("unplug@12,0.6", "lost", {"lost", "late"}),
        ("stall@12,2", "stalled", {"lost", "late"}),
        ("freeze@12,3", "frozen", {"frozen"}),
        ("corrupt@12,4", "corrupt", {"late"}),
        ("drop@12,4", "dropped", {"late", "unmatched"}),
    ],
)
def test_a_fault_of_one_sensor(who, plan, fault, reasons):

    def over(items):
        return any(who in item.missing for item in items[6:]) and healthy(items)

    items, found, _ = run({who: plan}, over)
    assert found["cameras"][who]["faults"][fault] == 1
    seen = {item.missing[who] for item in items[6:] if who in item.missing}
    assert seen and seen <= reasons | {
        "late",
        "unmatched",
    }  # the last: as it returns, a later picture is there
    assert (fault not in ("lost", "stalled")) or "lost" in seen
    assert (fault != "frozen") or "frozen" in seen
    others = [item for item in items[6:] if set(item.missing) - {who}]
    assert len(others) <= 0.2 * len(items), "the others go on"
    assert found["engines"]["fusion"]["rig"]["missing"][who]


def test_pictures_of_another_shape_than_the_rig_says_are_not_fused():
    """`format` cuts the lower half off: scaled to them, the calibration would be wrong."""
    plan = "format@12,0.3;format@30,0.3"
    items, found, _ = run({"CAM_FRONT": plan}, lambda items: len(items) > 60 and healthy(items))
    unfit = [item for item in items if item.missing.get("CAM_FRONT") == "unfit"]
    assert len(unfit) >= 8
    assert found["cameras"]["CAM_FRONT"]["drops"]["unfit"] >= len(unfit) - 2
    assert sorted(item.stage_ns["match"] for item in unfit)[len(unfit) // 2] < 5e6, "nobody waits for them"
    assert all(
        shot.image.shape == (64, 64, 3) for item in items[-3:] for shot in item.frame.rig.shots.values()
    )


def test_a_camera_that_slows_down_is_in_as_many_moments_as_it_has_pictures():
    items, found, _ = run(
        {"CAM_FRONT": "slow@25,2"}, lambda items: len(items) > 120 and healthy(items), loop=4
    )
    assert found["cameras"]["CAM_FRONT"]["faults"]["slow"] == 1
    without = sum("CAM_FRONT" in item.missing for item in items)
    assert 30 <= without <= 80
    waited = [item.stage_ns["match"] for item in items if "CAM_FRONT" in item.missing]
    assert sorted(waited)[len(waited) // 2] < 40e6, "its rate is known: what cannot come is not waited for"


@pytest.mark.parametrize("who", ["CAM_FRONT", "lidar"])
@pytest.mark.parametrize("by", ["-0.5", "5", "-5"])
def test_a_clock_that_jumps_costs_few_moments(who, by):
    """Half a second back is within what a late delivery may be: it is put right by arrivals. Further off, or ahead of
    ours, the watchdog takes the arrival for the time."""
    items, found, facts = run({who: f"jump@15,{by}"}, lambda items: len(items) > 40 and healthy(items))
    assert found["cameras"][who]["faults"]["clock-jump"] == 1
    missed = sum(who in item.missing for item in items[15:])
    assert missed <= 10
    assert facts[who]["clock_steps"] == (1 if by == "-0.5" else 0)
    if by == "-0.5":
        assert facts[who]["clock_ms"] == pytest.approx(-500, abs=20)
    last = items[-1].frame.rig
    for name, shot in last.shots.items():
        off = (shot.taken_ns - last.taken_ns) / 1e6 - last.rig.cameras[name].offset_ms
        assert abs(off) < 25


def test_prometheus_tells_what_was_missing():
    metrics = Metrics()
    assert "partial_results" not in exposition(metrics.snapshot())
    engine = DoubleEngine()
    plans = {"CAM_FRONT": "unplug@8,5"}
    with edgekit.stream(engine, sensors(NAMES, plans=plans), watch_options=QUICK) as stream:
        for number, _ in enumerate(stream):
            if number == 35:
                break
        samples = read(exposition(stream.metrics.snapshot()))

    def value(name, **labels):
        return samples[f"edgekit_{name}", frozenset(labels.items())]

    lost = value("missing_sensors_total", engine="fusion", sensor="CAM_FRONT", reason="lost")
    assert 5 <= lost <= value("partial_results_total", engine="fusion")
    assert value("sensor_age_seconds_count", engine="fusion", sensor="lidar") >= 30
    assert 0 <= value("oldest_seconds", engine="fusion", quantile="0.5") < 1
    assert 0 <= value("sensor_arrival_seconds", engine="fusion", sensor="lidar") < 0.1
    assert abs(value("sensor_phase_seconds", engine="fusion", sensor="CAM_BACK")) < 0.01
