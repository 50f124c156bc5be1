"""tasks/fusion/deadline.py: predicting the encoder's time, and cutting a sweep down to a budget."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.kernels.voxelize import voxelize
from edgekit.models.bevfusion.head import pipeline as spec_of
from edgekit.tasks.fusion.deadline import COARSE, CROPS, LEAST, WINDOW, Deadline, Fit
from edgekit.tasks.fusion.spec import VoxelCells
from tests import bevfusion_nets as nets
from tests import fusion_rigs as rigs

CELLS = VoxelCells((-16.0, -16.0, -2.6), (16.0, 16.0, 2.2), (0.4, 0.4, 0.6))


@settings(max_examples=60, deadline=None)
@given(
    a=st.floats(0, 20), b=st.floats(1e-4, 0.01), noise=st.floats(0, 0.05), late=st.integers(0, 12),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_a_line_is_found_under_noise_and_runs_that_were_held_up(a, b, noise, late, seed) -> None:
    rng, fit = np.random.default_rng(seed), Fit()
    held = set(rng.choice(40, late, replace=False).tolist())
    for i in range(40):
        voxels = int(rng.integers(2000, 12000))
        ms = (a + b * voxels) * (1 + noise * rng.uniform(-1, 1))
        fit.add(voxels, ms * (6 if i in held else 1))
    found, slope, margin = fit.line()
    at = found + slope * 7000
    assert at == pytest.approx(a + b * 7000, rel=0.02 + 2 * noise + 0.03 * late)
    assert margin >= 1 and fit.predict(7000) == pytest.approx(at * margin)
    if not late:
        assert margin <= 1.01 + 2 * noise
        if not noise:
            assert slope == pytest.approx(b, rel=1e-6)


def test_nothing_is_predicted_before_there_are_runs_and_old_ones_are_forgotten() -> None:
    fit = Fit()
    for _ in range(LEAST - 1):
        fit.add(1000, 5.0)
        assert fit.predict(1000) is None
    fit.add(1010, 5.0)
    assert fit.predict(2000) == pytest.approx(10, rel=0.02)  # one number of voxels: through nothing
    for i in range(WINDOW):
        fit.add(1000 + 100 * i, 1.0)  # the device became faster
    assert fit.predict(5000) == pytest.approx(1.0, rel=1e-6)


def test_what_scatters_more_than_voxels_explain_goes_through_nothing() -> None:
    rng, fit = np.random.default_rng(0), Fit()
    for _ in range(WINDOW):
        fit.add(int(rng.integers(8000, 10000)), float(rng.uniform(10, 30)))  # a busy machine
    a, b, margin = fit.line()
    assert a == 0 and b == pytest.approx(20 / 9000, rel=0.2) and 1.2 < margin < 1.6
    assert fit.predict(2000) < 0.3 * fit.predict(9000)  # so that cutting is tried
    for _ in range(WINDOW):  # and then shows what it is worth
        fit.add(int(rng.integers(2000, 10000)), 8.0 + float(rng.uniform(0, 1)))
    assert fit.line()[0] > 7


def taught(ms_per_voxel: float = 0.01) -> Deadline:
    deadline = Deadline(CELLS)
    for voxels in range(1000, 9000, 500):
        deadline.observe(voxels, ms_per_voxel * voxels)
    return deadline


def count(points: np.ndarray) -> int:
    return len(voxelize(points, CELLS.grid()).counts)


def test_a_sweep_within_the_budget_is_left_alone() -> None:
    points = nets.frame(1).points
    assert Deadline(CELLS).fit(points, 1e-9).points is points  # nothing is known yet
    cut = taught().fit(points, 1e6)
    assert cut.points is points and cut.voxels == count(points) and cut.notes == cut.done == ()


def test_cells_are_coarser_from_near_to_far_then_the_range_is_cropped() -> None:
    points, deadline = nets.frame(1).points, taught()
    total, seen = count(points), []
    ladder = list(deadline.cuts(points, voxelize(points, deadline.grid)))
    for budget in (0.01 * total * 1.05, *(0.01 * cut.voxels * 1.0001 for cut in ladder), 0.5):
        cut = deadline.fit(points, budget)
        assert "over" in cut.done or 0.01 * cut.voxels <= budget * 1.0001
        assert count(np.ascontiguousarray(cut.points)) == cut.voxels
        assert cut.points.dtype == np.float32
        seen.append((cut.done, cut.voxels, cut.notes))
    kinds = list(dict.fromkeys(done for done, _, _ in seen))
    assert kinds == [(), ("coarser",), ("coarser", "cropped"), ("coarser", "cropped", "over")]
    voxels = [voxels for _, voxels, _ in seen]
    assert voxels == sorted(voxels, reverse=True)
    said = list(dict.fromkeys(notes[0] for done, _, notes in seen if done == ("coarser",)))
    every = [f"lidar: voxels of 0.8 x 0.8 x 1.2 m within {share * 16:.3g} m" for share in COARSE[:-1]]
    assert said == [*every, "lidar: voxels of 0.8 x 0.8 x 1.2 m"]
    assert (
        f"lidar: range cropped to {0.4 * 16:.3g} m" in seen[-1][2]
        and seen[-1][2][-1] == "lidar: still over 0.5 ms"
    )


def test_cuts_are_where_they_say() -> None:
    points, deadline = nets.frame(1).points, taught()
    found = list(deadline.cuts(points, voxelize(points, deadline.grid)))
    assert len(found) == len(COARSE) + len(CROPS)
    for cut, share in zip(found, COARSE[:-1], strict=False):
        far = points[(np.abs(points[:, :2]) > share * 16 + 0.8).any(1)]
        rows = {row.tobytes() for row in cut.points}
        assert all(row.tobytes() in rows for row in far)  # untouched
        near = cut.points[(np.abs(cut.points[:, :2]) < share * 16 - 0.8).all(1)]
        inside = near[(near[:, 2] > -2.6) & (near[:, 2] < 2.2)]
        assert len(inside) == len(
            voxelize(np.ascontiguousarray(inside), deadline.double).counts
        )  # one a cell
    for cut, share in zip(found[len(COARSE) :], CROPS, strict=True):
        assert (np.abs(cut.points[:, :2]) < share * 16 + 0.4).all() and len(cut.points) == cut.voxels


def test_coarse_points_are_the_means_of_their_cells() -> None:
    points = np.array(
        [[0.1, 0.1, 0.0, 0.2, -0.01], [0.7, 0.3, 0.2, 0.4, -0.03], [1.0, 0.1, 0.0, 0.9, 0.0]], np.float32
    )
    deadline = Deadline(VoxelCells((0, 0, -1), (8, 8, 1), (0.4, 0.4, 0.5)))
    for voxels in (1, 2, 4, 8, 16):
        deadline.observe(voxels, float(voxels))
    coarse = deadline.fit(points, 2.0)
    assert coarse.done == ("coarser",) and coarse.voxels == 2
    assert np.allclose(np.sort(coarse.points, 0), np.sort([points[:2].mean(0), points[2]], 0))
    assert deadline.fit(points[:0], 1e-6).voxels == 0


def test_a_pipeline_says_and_counts_what_it_cut() -> None:
    look, frame = rigs.tiny(), nets.frame(1)
    whole = look(frame, score_threshold=0.02)
    assert look.lidar_budget_ms is None and whole.notes == () and look._deadline.times.line() is None
    look.lidar_budget_ms = 1e6
    for _ in range(LEAST):
        assert look(frame).notes == ()
    assert look._deadline.times.line() is not None and not look.counts
    voxels = count(frame.points)
    look._deadline = taught(0.001)
    look.lidar_budget_ms = 0.0008 * voxels
    found = look(frame, score_threshold=0.02)
    assert found.notes[0].startswith("lidar: voxels of 0.8 x 0.8 x 1.2 m within")
    assert look.counts == {"coarser": 1} and found.missing == ()
    assert int(look.session.inputs["point_count"][0]) < len(frame.points)
    look.lidar_budget_ms = None
    again = look(frame, score_threshold=0.02)
    assert again.notes == () and np.array_equal(again.boxes, whole.boxes, equal_nan=True)


def test_a_bundle_may_say_its_budget() -> None:
    look = rigs.tiny()
    told = type(look)(dataclasses.replace(look.spec, lidar_budget_ms=7.5), look.session)
    assert told.lidar_budget_ms == 7.5


def test_a_budget_that_cannot_be_is_refused() -> None:
    look = rigs.tiny()
    for wrong in (0, "12"):
        with pytest.raises(UsageError, match=f"lidar_budget_ms {wrong!r}: expected above 0"):
            look.lidar_budget_ms = wrong
    bare = type(look)(dataclasses.replace(spec_of(nets.TINY), voxels=None), look.session)
    with pytest.raises(UsageError, match="does not say what its voxels are"):
        bare.lidar_budget_ms = 5.0
    assert CELLS.double().shape == (4, 40, 40)
    assert VoxelCells((0, 0, 0), (3, 3, 3), (1, 1, 1)).double().high == (4, 4, 4)
    with pytest.raises(ValueError, match="whole number of voxels"):
        VoxelCells((0, 0, 0), (1, 1, 1), (0.3, 0.5, 0.5))


def test_the_benchmark_tells_each_step(capsys) -> None:
    from benchmarks import lidar_budget

    moments = "synthetic://street-rig?frames=1&worlds=1&size=64x40"
    assert lidar_budget.main([str(rigs.folder()), "--moments", moments]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 1 + len(COARSE) + len(CROPS) and lines[0]["cut"] == []
    voxels = [line["voxels"] for line in lines]
    assert voxels == sorted(voxels, reverse=True) and all(line["encoder_ms"] > 0 for line in lines)
