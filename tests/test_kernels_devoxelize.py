"""Devoxelization: native against numpy bit for bit, both against torch's grid_sample where all voxels exist."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.kernels import sparse_conv as sparse
from edgekit.kernels.devoxelize import devoxelize, neighbours
from tests.test_kernels import PATHS, using
from tests.test_kernels_sparse_conv import SHAPES, Triple, random_sites
from tests.test_kernels_voxelize import clouds

LOW, SIZE = (-1.0, -2.0, 0.0), (0.05, 0.5, 0.4)


@settings(deadline=None, max_examples=100)
@given(
    points=clouds(),
    shape=st.sampled_from(SHAPES),
    density=st.sampled_from((0.0, 0.1, 0.7, 1.0)),
    center=st.sampled_from((0.0, 0.5)),
    threads=st.sampled_from((1, 2, 3)),
)
def test_native_is_the_reference(
    points: np.ndarray, shape: Triple, density: float, center: float, threads: int
) -> None:
    coordinates = random_sites(np.random.default_rng(0), shape, 2, density)
    results = []
    for path in PATHS:
        with using(path):
            at = sparse.sites(coordinates, shape, 2)
            found = neighbours(points, at, LOW, SIZE, center=center, batch=1, threads=threads)
            features = np.random.default_rng(1).normal(size=(len(at), 7)).astype(np.float32)
            results.append((found.index, found.weight, devoxelize(features, found, threads=threads)))
            assert np.all((at.coordinates[found.index][..., 0] == 1) | (found.index < 0)) if len(at) else True
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("path", PATHS)
def test_against_grid_sample(path: str) -> None:
    rng, shape = np.random.default_rng(2), (4, 5, 6)
    size = (0.3, 0.2, 0.5)
    with using(path):
        at = sparse.sites(np.argwhere(np.ones((1, *shape))).astype(np.int32), shape)
        features = rng.normal(size=(len(at), 3)).astype(np.float32)
        extent = np.array(shape[::-1]) * size
        # between the middles of the outer voxels, so that all eight neighbours exist
        points = (rng.random((50, 3)) * (extent - size) + np.array(size) / 2 + LOW).astype(np.float32)
        got = devoxelize(features, neighbours(points, at, LOW, size))
        grid = torch.from_numpy(sparse.to_dense(features, at))
    places = torch.from_numpy((points - np.array(LOW)) / extent * 2 - 1).float().reshape(1, 50, 1, 1, 3)
    expected = torch.nn.functional.grid_sample(grid, places, align_corners=False).reshape(3, 50).T.numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_missing_neighbours(path: str) -> None:
    size = (1.0, 1.0, 1.0)
    with using(path):
        at = sparse.sites(np.array([[0, 0, 0, 0], [0, 0, 0, 1]], np.int32), (3, 3, 3))
        features = np.array([[1.0], [5.0]], np.float32)
        points = np.array([[0.75, 0.5, 0.5], [0.5, 1.25, 0.5], [2.9, 2.9, 2.9], [np.nan, 0, 0]], np.float32)
        found = neighbours(points, at, (0.0, 0.0, 0.0), size)
        # a quarter of the way; what is missing above does not pull to zero; nothing near; not a point
        assert devoxelize(features, found)[:, 0].tolist() == [2.0, 1.0, 0.0, 0.0]
        # SPVNAS's rule puts the value at the voxel's lower corner
        found = neighbours(points, at, (0.0, 0.0, 0.0), size, center=0.0)
        assert devoxelize(features, found)[0, 0] == 4.0


def test_wrong_arguments() -> None:
    at = sparse.sites(np.zeros((1, 4), np.int32), (3, 3, 3))
    points = np.zeros((2, 3), np.float32)
    for call in (
        lambda: neighbours(points[:, :2], at, LOW, SIZE),
        lambda: neighbours(points, at, LOW, (0.0, 1.0, 1.0)),
        lambda: neighbours(points, at, LOW, SIZE, batch=1),
        lambda: devoxelize(np.zeros((2, 3), np.float32), neighbours(points, at, LOW, SIZE)),
    ):
        with pytest.raises(UsageError):
            call()
