"""Voxelization: the native kernel against the numpy definition bit for bit, both against the rule in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.kernels.voxelize import NUSCENES, VoxelGrid, Voxels, voxelize
from tests.helpers import shared_data
from tests.test_kernels import using

PATHS = ("numpy", "native")
GRID = VoxelGrid((-1.0, -2.0, 0.0), (1.0, 1.0, 0.8), (0.25, 0.5, 0.4))


@st.composite
def clouds(draw: st.DrawFn) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, channels = draw(st.integers(0, 300)), draw(st.integers(3, 6))
    scale = draw(st.sampled_from((0.3, 1.5, 50.0)))
    points = rng.normal(0, scale, (n, channels)).astype(np.float32)
    if draw(st.booleans()):  # on the faces of cells, where a rounding shows
        points = np.round(points / np.float32(0.125)) * np.float32(0.125)
    if draw(st.booleans()):
        special = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, -0.0, 1e-45], np.float32)
        points = np.where(rng.random(points.shape) < 0.1, rng.choice(special, points.shape), points)
    return np.ascontiguousarray(points, np.float32)


def same(a: Voxels, b: Voxels) -> None:
    for name in ("coordinates", "features", "counts", "voxel", "slot"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and x.shape == y.shape, name
        nan = np.isnan(x)  # a NaN is a NaN: its bits are the CPU's own
        assert np.array_equal(nan, np.isnan(y)), name
        assert np.where(nan, 0, x).tobytes() == np.where(nan, 0, y).tobytes(), name


@settings(deadline=None, max_examples=200)
@given(clouds(), st.sampled_from((0, 1, 3)), st.sampled_from((0, 1, 7)), st.sampled_from((1, 2, 5)))
def test_native_is_the_reference(points: np.ndarray, max_points: int, max_voxels: int, threads: int) -> None:
    limits = {"max_points": max_points, "max_voxels": max_voxels, "batch": 3}
    with using("numpy"):
        expected = voxelize(points, GRID, **limits)
    with using("native"):
        same(voxelize(points, GRID, threads=threads, **limits), expected)


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=60)
@given(clouds(), st.sampled_from((0, 2)), st.sampled_from((0, 5)))
def test_against_plain_python(path: str, points: np.ndarray, max_points: int, max_voxels: int) -> None:
    with using(path):
        got = voxelize(points, GRID, max_points=max_points, max_voxels=max_voxels)
    with np.errstate(invalid="ignore", over="ignore"):
        found: dict[tuple[int, ...], list[int]] = {}
        for i, p in enumerate(points):
            quotients = [(p[a] - np.float32(GRID.low[a])) / np.float32(GRID.size[a]) for a in (2, 1, 0)]
            if not all(0 <= q < n for q, n in zip(quotients, GRID.shape, strict=True)):
                continue
            cell = tuple(math.floor(q) for q in quotients)
            if cell not in found and max_voxels and len(found) >= max_voxels:
                continue
            members = found.setdefault(cell, [])
            if not max_points or len(members) < max_points:
                members.append(i)
    assert [tuple(c) for c in got.coordinates.tolist()] == [(0, *cell) for cell in found]
    assert got.counts.tolist() == [len(m) for m in found.values()]
    for v, members in enumerate(found.values()):
        assert np.flatnonzero(got.voxel == v).tolist() == members
        assert got.slot[members].tolist() == list(range(len(members)))
        with np.errstate(invalid="ignore"):
            mean = points[members].astype(np.float64).mean(axis=0)
        scale = np.abs(points[members].astype(np.float64)).max(axis=0)
        usual = scale < 1e38  # sums of the others may overflow
        assert np.all(np.abs(got.features[v][usual] - mean[usual]) <= 1e-5 * scale[usual] + 1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_edges_of_the_range(path: str) -> None:
    below = np.nextafter(np.float32(-1), np.float32(-2))
    points = np.array(
        [[-1, -2, 0], [below, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0.8], [0.999, 0.99, 0.79], [-1.2, 0, 0]],
        np.float32,
    )
    with using(path):
        got = voxelize(points, GRID)
    assert got.voxel.tolist() == [0, -1, -1, -1, -1, 1, -1]  # -1.2 is in cell 0 for whoever truncates
    assert got.coordinates.tolist() == [[0, 0, 0, 0], [0, 1, 5, 7]]


@pytest.mark.parametrize("path", PATHS)
def test_padded(path: str) -> None:
    points = np.array([[0, 0, 0, 1], [0.5, 0, 0, 2], [0.1, 0, 0, 3], [9, 0, 0, 4]], np.float32)
    with using(path):
        padded = voxelize(points, GRID).padded(points, 2)
    assert padded[..., 3].tolist() == [[1, 3], [2, 0]]


@pytest.mark.shared
def test_real_sweep() -> None:
    path = shared_data() / "nuscenes_sample"
    raw = next(path.rglob("*.bin"))
    points = np.fromfile(raw, np.float32).reshape(-1, 5)
    with using("numpy"):
        expected = voxelize(points, NUSCENES, max_points=10, max_voxels=160_000)
    with using("native"):
        for threads in (1, 2, 3):
            same(voxelize(points, NUSCENES, max_points=10, max_voxels=160_000, threads=threads), expected)
    assert len(expected.counts) > 10_000 and expected.counts.max() == 10


def test_wrong_arguments() -> None:
    points = np.zeros((2, 4), np.float32)
    for wrong in (points.astype(np.float64), points[:, :2], points[0]):
        with pytest.raises(UsageError, match="points: expected float32"):
            voxelize(wrong, GRID)
    with pytest.raises(UsageError, match="at least 0"):
        voxelize(points, GRID, max_points=-1)
    for low, high, size in (
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.3, 0.5, 0.5)),
        ((0.0, 0.0, 0.0), (1.0, 1.0, 0.0), (0.5, 0.5, 0.5)),
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.0, 0.5)),
        ((0.0, 0.0, 0.0), (1.0, 1.0, math.nan), (0.5, 0.5, 0.5)),
        ((0.0, 0.0, 0.0), (9e3, 9e3, 9e3), (0.5, 0.5, 0.5)),
        ((0.0, 0.0, 0.0), (1e308, 1.0, 1.0), (1e-308, 0.5, 0.5)),
        ((-1e308, 0.0, 0.0), (1e308, 1.0, 1.0), (0.5, 0.5, 0.5)),
    ):
        with pytest.raises(UsageError, match="voxel grid"):
            VoxelGrid(low, high, size)
