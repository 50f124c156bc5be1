"""Sensors of a rig, one by one, through a real plan: networks and kernels with random weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import edgekit
from edgekit.errors import UsageError
from edgekit.rig import Rig
from edgekit.runtime.engine import Engine
from edgekit.synth.street_rig import street_rig
from tests import bevfusion_nets as nets
from tests import fusion_plans as plans

pytestmark = pytest.mark.usefixtures("_no_thread_stays")

NAMES = nets.TINY.camera.names
SIZE = "64x64"
LOW = 0.02


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plans.write(tmp_path_factory.mktemp("rig") / "tiny.host.edge", tolerance=1e-3)


@pytest.fixture
def engine(bundle: Path) -> Iterator[Engine]:
    with edgekit.load(bundle, threads=1, self_test=False) as loaded:
        yield loaded


def whole(frames: int) -> str:
    return f"synthetic://street-rig?seed=3&size={SIZE}&frames={frames}"


def apart(frames: int, names: tuple[str, ...] = (*NAMES, "lidar"), more: str = "") -> dict[str, str]:
    return {name: f"{whole(frames)}&sensor={name}{more}" for name in names}


def boxes(item: edgekit.runtime.results.StreamResult) -> tuple[np.ndarray, np.ndarray]:
    return item.result.boxes, item.result.scores


def test_sensors_one_by_one_give_what_the_whole_gives(engine: Engine) -> None:
    """To the bit but for the motion of the vehicle, which comes from poses here and from the world there."""
    with edgekit.stream(engine, whole(4), score_threshold=LOW) as stream:
        expected = [boxes(item) for item in stream]
    with edgekit.stream(engine, apart(4), score_threshold=LOW) as stream:
        items = list(stream)
        found = [boxes(item) for item in items]
    assert len(found) == len(expected) == 4
    assert all(item.result.missing == () and not item.missing for item in items)
    for (mine, scores), (theirs, others) in zip(found, expected, strict=True):
        assert len(mine) > 5
        same = min(len(scores), len(others), 10)
        assert np.allclose(np.sort(scores)[-same:], np.sort(others)[-same:], atol=2e-2)
        assert np.median(np.abs(mine[:same, :2] - theirs[:same, :2])) < 0.5


def test_a_sensor_that_is_not_there_is_missing_in_the_result(engine: Engine) -> None:
    some = (*NAMES[:2], "lidar")
    with edgekit.stream(engine, apart(2, some), score_threshold=LOW) as stream:
        items = list(stream)
    assert [item.result.missing for item in items] == [tuple(NAMES[2:])] * 2
    with edgekit.stream(engine, apart(3, ("lidar",)), score_threshold=LOW) as stream:
        assert [item.result.missing for item in stream] == [tuple(NAMES)] * 3
    with edgekit.stream(engine, apart(3, NAMES[:1]), score_threshold=LOW) as stream:
        assert [item.result.missing for item in stream] == [(*NAMES[1:], "lidar")] * 3


def test_bundles_and_calibrations_change_under_a_stream(engine: Engine, bundle: Path, tmp_path: Path) -> None:
    """Sixteen moments: none is lost, none raises; the calibration is the new one from some moment on."""
    turned = street_rig(9, 64, 64)
    other = Rig("turned", turned.lidar, turned.cameras)
    done = []

    def change() -> None:
        done.append(stream.swap(bundle))
        stream.recalibrate(other)

    with edgekit.stream(engine, apart(16), score_threshold=LOW) as stream:
        rigs = []
        for item in stream:
            rigs.append(item.frame.rig.rig.name)
            if len(rigs) == 3:
                thread = threading.Thread(target=change)
                thread.start()
            if len(rigs) == 12:
                thread.join(60)
    assert len(rigs) == 16 and len(done) == 1
    assert rigs[:3] == ["street-rig"] * 3 and rigs[-3:] == ["turned"] * 3


def test_a_budget_of_the_lidar_is_held_by_cutting_sweeps(engine: Engine) -> None:
    with edgekit.stream(engine, apart(12), lidar_budget_ms=0.001) as stream:
        notes = [item.result.notes for item in stream]
        cut = stream.metrics.snapshot()["engines"]["tiny"]["rig"]["cut"]
    assert all(any("lidar" in note for note in each) for each in notes[7:])
    assert set(cut) <= {"cropped", "coarser", "over", "thinned"}
    with pytest.raises(UsageError, match="above 0"):
        edgekit.stream(engine, apart(2), lidar_budget_ms=-1)


@pytest.mark.clock
def test_live_sensors_on_a_real_plan(bundle: Path) -> None:
    with edgekit.stream(bundle, apart(0, more="&live=1&loop=3&fps=5"), threads=1) as stream:
        items = []
        for item in stream:
            items.append(item)
            if len(items) == 12:
                break
    whole_ones = [item for item in items[2:] if not item.missing]
    assert len(whole_ones) >= 5
    for item in items:
        assert sum(item.stage_ns.values()) <= item.age_ns
        assert item.unaccounted_ns < 0.3 * item.age_ns + 5_000_000


def test_a_plan_is_told_in_a_line_a_step(engine: Engine) -> None:
    with edgekit.stream(engine, whole(1)) as stream:
        next(stream)
        (facts,) = (found["facts"] for found in stream.metrics.snapshot()["engines"].values())
    assert list(facts) == ["bundle", *(step.name for step in engine.manifest.plan)]
    assert facts["pool"].startswith("bev_pool, ") and "thread" in facts["pool"]
