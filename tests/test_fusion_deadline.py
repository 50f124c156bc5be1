"""tasks/fusion/deadline.py: predicting the encoder's time, and cutting a sweep down to a budget."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.kernels.voxelize import voxelize
from edgekit.models.bevfusion.head import pipeline as spec_of
from edgekit.tasks.fusion.deadline import CROPS, LEAST, WINDOW, Deadline, Fit
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
    found, slope, extra = fit.line()
    at = found + slope * 7000
    assert at == pytest.approx(a + b * 7000, rel=0.02 + 2 * noise + 0.03 * late)
    assert extra >= 0 and fit.predict(7000) == pytest.approx(at + extra)
    if not late and not noise:
        assert slope == pytest.approx(b, rel=1e-6) and extra == pytest.approx(0, abs=1e-6)


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


def test_the_range_is_cropped_first_then_voxels_are_coarser_then_both() -> None:
    points, deadline = nets.frame(1).points, taught()
    seen = []
    for budget in np.geomspace(0.01 * count(points) * 1.05, 0.5, 40):
        cut = deadline.fit(points, float(budget))
        assert "over" in cut.done or 0.01 * cut.voxels <= budget * 1.0001
        seen.append((cut.done, cut.voxels))
        if cut.done == ("cropped",):
            (note,) = cut.notes
            reach = float(note.removeprefix("lidar: range cropped to ").removesuffix(" m"))
            assert any(reach == pytest.approx(share * 16, rel=0.01) for share in CROPS)
            assert (np.abs(cut.points[:, :2]) < reach + 0.01).all() and cut.voxels == count(cut.points)
        if "coarser" in cut.done:
            assert "lidar: voxels of 0.8 x 0.8 x 1.2 m" in cut.notes
            assert count(cut.points) <= cut.voxels < 0.8 * count(points)
            assert cut.points.dtype == np.float32 and cut.points.flags.c_contiguous
    kinds = list(dict.fromkeys(done for done, _ in seen))
    order = [(), ("cropped",), ("coarser",), ("coarser", "cropped"), ("coarser", "cropped", "over")]
    assert kinds == [kind for kind in order if kind in kinds] and len(kinds) >= 4
    assert "over" in seen[-1][0]
    cropped = [voxels for done, voxels in seen if done == ("cropped",)]
    assert cropped == sorted(cropped, reverse=True) and len(set(cropped)) > 1


def test_coarse_points_are_the_means_of_their_cells() -> None:
    points = np.array(
        [[0.1, 0.1, 0.0, 0.2, -0.01], [0.7, 0.3, 0.2, 0.4, -0.03], [1.0, 0.1, 0.0, 0.9, 0.0]], np.float32
    )
    deadline = Deadline(VoxelCells((0, 0, -1), (8, 8, 1), (0.4, 0.4, 0.5)))
    for voxels in (1, 2, 4, 8, 16):
        deadline.observe(voxels, float(voxels))
    coarse = deadline.fit(points, 2.0)  # all of it is near: no crop helps
    assert coarse.done == ("coarser",) and coarse.voxels == 2
    assert np.allclose(np.sort(coarse.points, 0), np.sort([points[:2].mean(0), points[2]], 0))


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
    assert any("lidar: range cropped to" in note for note in found.notes)
    assert look.counts["cropped"] == 1 and found.missing == ()
    assert int(look.session.inputs["point_count"][0]) < len(frame.points)
    look.lidar_budget_ms = None
    again = look(frame, score_threshold=0.02)
    assert again.notes == () and np.array_equal(again.boxes, whole.boxes, equal_nan=True)


def test_a_budget_that_cannot_be_is_refused() -> None:
    look = rigs.tiny()
    with pytest.raises(UsageError, match="lidar_budget_ms 0: expected above 0"):
        look.lidar_budget_ms = 0
    bare = type(look)(dataclasses.replace(spec_of(nets.TINY), voxels=None), look.session)
    with pytest.raises(UsageError, match="does not say what its voxels are"):
        bare.lidar_budget_ms = 5.0
    assert CELLS.double().shape == (4, 40, 40)
    assert VoxelCells((0, 0, 0), (3, 3, 3), (1, 1, 1)).double().high == (4, 4, 4)
    with pytest.raises(ValueError, match="whole number of voxels"):
        VoxelCells((0, 0, 0), (1, 1, 1), (0.3, 0.5, 0.5))
