"""Where the time of a plan goes: tables of steps add up to the wall time."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.runtime.bench import account, measure, step_times
from edgekit.runtime.engine import load
from tests.bevfusion_nets import frame
from tests.fusion_plans import write
from tests.test_plan_crew import Graph, graphs, plan_of

MS = 1_000_000


def spans(*times: tuple[float, float]) -> dict[str, tuple[int, int]]:
    return {f"s{i}": (int(a * MS), int(b * MS)) for i, (a, b) in enumerate(times)}


def test_an_account_by_hand() -> None:
    # two branches, 0 -> 2 and 1, that meet in 3
    manifest = plan_of([[], [], [0], [1, 2]])
    alone = account([spans((1, 3), (3, 9), (9, 10), (10, 14))], [15 * MS], manifest)
    assert alone == {
        "wall_ms": 15.0,
        "sum_ms": 13.0,
        "critical_ms": 10.0,
        "rest_ms": 2.0,
        "critical": ["s1", "s3"],
    }
    beside = account([spans((1, 4), (1, 7), (4, 6), (8, 12))], [13 * MS], manifest)
    assert beside == {
        "wall_ms": 13.0,
        "sum_ms": 15.0,
        "critical_ms": 10.0,
        "rest_ms": 3.0,
        "critical": ["s1", "s3"],
    }
    assert step_times([spans((1, 4), (1, 7), (4, 6), (8, 12))])["span_ms"] == 11.0
    part = account([spans((1, 3), (3, 4), (4, 5))], [5 * MS], manifest)  # a step that did not run
    assert part["critical_ms"] == 3.0 and part["sum_ms"] == 4.0


@given(graphs(8), st.data())
def test_wall_time_lies_between(after: Graph, data: st.DataObject) -> None:
    """Any schedule in which a step begins when those before it have ended."""
    begun: dict[str, tuple[int, int]] = {}
    for i, before in enumerate(after):
        ready = max((begun[f"s{j}"][1] for j in before), default=0)
        start = ready + data.draw(st.integers(0, 5)) * MS
        begun[f"s{i}"] = start, start + data.draw(st.integers(0, 9)) * MS
    wall = max(end for _, end in begun.values()) + data.draw(st.integers(0, 3)) * MS
    found = account([begun], [wall], plan_of(after))
    assert 0 <= found["critical_ms"] <= found["wall_ms"] <= found["sum_ms"] + found["rest_ms"]
    chain = [int(name[1:]) for name in found["critical"]]
    assert all(a in after[b] for a, b in itertools.pairwise(chain))
    assert found["critical_ms"] * MS == sum(begun[f"s{i}"][1] - begun[f"s{i}"][0] for i in chain)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    with load(write(tmp_path / "b.edge"), threads=1) as engine:
        session = engine.session
        if not overlap:

            def alone() -> Any:
                made = session()
                made.overlap = False
                return made

            monkeypatch.setattr(engine, "session", alone)
        (result,) = measure([engine], frame(), warmup=1, runs=1)
        told = result["steps"]
        assert set(told["median_ms"]) == {step.name for step in engine.manifest.plan}
        serial = told["serial"]
        # one run: what adds up does so but for rounding to 0.0001 ms
        assert abs(serial["sum_ms"] + serial["rest_ms"] - serial["wall_ms"]) < 3e-4
        assert serial["rest_ms"] > 0 and serial["critical_ms"] < serial["sum_ms"]
        assert ("overlapped" in told) == overlap
        if overlap:
            beside = told["overlapped"]
            assert beside["critical_ms"] <= beside["wall_ms"] + 1e-4
            assert beside["wall_ms"] <= beside["sum_ms"] + beside["rest_ms"] + 3e-4
            assert told["span_ms"] <= beside["wall_ms"] + 1e-4
        for found in (told[how] for how in ("serial", "overlapped") if how in told):
            assert found["critical"][-1] == "fusion" and found["critical"][0] in (
                "camera",
                "encoder",
                "depth_raster",
            )
        assert result["copies"]["bytes_per_frame"] == 0
        assert result["engine"]["pool"]["kernel"] == "bev_pool"
