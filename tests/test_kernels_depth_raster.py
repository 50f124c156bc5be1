from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit import kernels
from edgekit.errors import UsageError
from edgekit.kernels.depth_raster import cuda as raster_cuda
from edgekit.kernels.depth_raster import depth_raster, projections
from tests import cuda_cpu
from tests.cuda_cpu import address
from tests.helpers import shared_data
from tests.rigs import nuscenes_frame, nuscenes_matrices
from tests.test_kernels import PATHS, using

Case = tuple[np.ndarray, np.ndarray, tuple[int, int], float, float]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.one_of(st.integers(0, 9), st.integers(500, 1100)))
    points = rng.normal(0, 5, (n, draw(st.integers(3, 6)))).astype(np.float32)
    if draw(st.booleans()):  # whole numbers: points on edges of pixels and equal depths
        points = np.rint(points)
    if draw(st.booleans()) and n:
        special = np.array([np.nan, np.inf, -np.inf, 3e38, 1e-40, -0.0], np.float32)
        points = np.where(rng.random(points.shape) < 0.1, rng.choice(special, points.shape), points)
    cameras = draw(st.integers(0, 4))
    matrices = rng.normal(0, 3, (cameras, 3, 4)).astype(np.float32)
    if draw(st.booleans()):
        matrices = np.rint(matrices)
    size = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    near, far = draw(st.sampled_from(((1e-5, 1e5), (0.0, 3.0), (2.0, 1e30))))
    return points, matrices, size, near, far


@settings(deadline=None, max_examples=300)
@given(case=cases(), threads=st.sampled_from((0, 1, 3)))
def test_native_is_the_reference(case: Case, threads: int) -> None:
    points, matrices, size, near, far = case
    with using("numpy"):
        expected = depth_raster(points, matrices, size, near=near, far=far)
    with using("native"):
        got = depth_raster(points, matrices, size, near=near, far=far, threads=threads)
    assert got.tobytes() == expected.tobytes()


@settings(deadline=None, max_examples=100)
@given(case=cases())
def test_narrow_vectors_give_the_same(case: Case) -> None:
    points, matrices, size, near, far = case
    with using("native"):
        module = kernels.native()
        assert module is not None
        images = [np.full((len(matrices), *size), 7, np.float32) for _ in range(2)]
        for image, isa in zip(images, ("auto", "portable"), strict=True):
            module.depth_raster(points, matrices, image, near, far, 1, isa)
    assert images[0].tobytes() == images[1].tobytes()


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=60)
@given(case=cases(), seed=st.integers(0, 99))
def test_no_order_of_points_matters(path: str, case: Case, seed: int) -> None:
    points, matrices, size, near, far = case
    with using(path):
        images = [
            depth_raster(p, matrices, size, near=near, far=far)
            for p in (points, points[::-1], np.random.default_rng(seed).permutation(points))
        ]
    assert len({image.tobytes() for image in images}) == 1


@pytest.mark.parametrize("path", PATHS)
def test_rule(path: str) -> None:
    pinhole = np.array([[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]], np.float32)  # u = x / z, v = y / z
    points = np.array(
        [
            [0, 0, 4], [2, 2, 4],  # pixel (0, 0), twice at the same depth
            [3.9, 0, 2],  # (1, 0): 1.95 is cut, not rounded
            [2, 0, 2], [3, 0, 3], [7, 0, 5],  # (1, 0) at 2, 3, 5: the nearest stays
            [-0.001, 0, 1], [3, 0, 1], [0, -1, 1], [0, 2, 1],  # outside: left, right, above, below
            [0, 1, -1], [0, 0, 0], [0, 100, 100],  # behind, at the centre, beyond `far`
            [-0.0, 1.5, 1],  # (0, 1): -0 is inside
            [5, 2, 2.5],  # (2, 0): u = 2 is the first of pixel 2
            [np.nan, 0, 1], [0, 0, np.nan], [np.inf, 0, 1], [0, 0, np.inf],
        ],
        np.float32,
    )  # fmt: skip
    with using(path):
        image = depth_raster(points, pinhole, (2, 3), far=50.0)
        assert image.tolist() == [[[4, 2, 2.5], [1, 0, 0]]]
        # a point at `near` does not count, one at `far` does
        assert depth_raster(points[:1], pinhole, (2, 3), near=4.0)[0].max() == 0
        assert depth_raster(points[:1], pinhole, (2, 3), near=3.0, far=4.0)[0].max() == 4


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_against_the_published_steps(path: str, seed: int) -> None:
    """Projection, division and augmentation one after the other in float64, as published, with the nearest depth kept."""
    rng = np.random.default_rng(seed)
    points = rng.normal(0, 10, (400, 4)).astype(np.float32)
    intrinsics = np.array([[50.0, 0, 30], [0, 45, 20], [0, 0, 1]])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = np.linalg.qr(rng.normal(size=(3, 3)))[0], rng.normal(size=3)
    augmentation = np.array([[0.7, 0.1, -3], [-0.1, 0.8, 2], [0, 0, 1]])
    camera = points[:, :3].astype(float) @ pose[:3, :3].T + pose[:3, 3]
    with np.errstate(all="ignore"):
        pixel = camera @ intrinsics.T
        pixel = (pixel / pixel[:, 2:]) @ augmentation.T
    expected = np.zeros((40, 60))
    for (u, v, _), z in sorted(zip(pixel.tolist(), camera[:, 2].tolist(), strict=True), key=lambda p: -p[1]):
        if z > 1e-5 and 0 <= u < 60 and 0 <= v < 40:
            expected[int(v), int(u)] = z
    with using(path):
        image = depth_raster(points, projections(intrinsics[None], pose[None], augmentation[None]), (40, 60))[
            0
        ]
    # in float32 a point within rounding of a pixel's edge may fall on its other side
    edge = np.abs(pixel[:, :2] - np.rint(pixel[:, :2])).min(axis=1) < 1e-3
    if not edge[camera[:, 2] > 0].any():
        np.testing.assert_allclose(image, expected, rtol=1e-5, atol=1e-4)
    else:
        assert np.count_nonzero(~np.isclose(image, expected, rtol=1e-5, atol=1e-4)) <= 2 * np.count_nonzero(
            edge
        )


@pytest.mark.parametrize("path", PATHS)
def test_out_is_written_whole(path: str) -> None:
    out = np.full((1, 2, 2), np.nan, np.float32)
    with using(path):
        assert depth_raster(np.zeros((0, 3), np.float32), np.zeros((1, 3, 4), np.float32), (2, 2), out) is out
    assert not out.any()


@pytest.mark.shared
def test_the_real_sweep() -> None:
    sweep = shared_data() / "nuscenes_sample" / nuscenes_frame()["lidar_points"]["lidar_path"].split("/")[-1]
    points = np.fromfile(sweep, np.float32).reshape(-1, 5)
    intrinsics, lidar_to_camera, augmentation = nuscenes_matrices()
    matrices = projections(intrinsics, lidar_to_camera, augmentation)
    with using("numpy"):
        expected = depth_raster(points, matrices, (256, 704))
    with using("native"):
        image = depth_raster(points, matrices, (256, 704))
    assert image.tobytes() == expected.tobytes()
    assert (np.count_nonzero(image, axis=(1, 2)) > 2000).all()  # every camera sees part of the sweep
    # a street seen from above it: the lower a pixel, the nearer the road
    front = image[0]
    assert np.median(front[240:][front[240:] > 0]) < np.median(front[80:120][front[80:120] > 0])


@pytest.mark.parametrize("path", PATHS)
def test_wrong_arguments(path: str) -> None:
    points, matrices = np.zeros((4, 3), np.float32), np.zeros((2, 3, 4), np.float32)
    with using(path):
        for arguments, message in (
            ((points[:, :2], matrices, (2, 2)), r"points: wrong array, expected float32 \[n, 3 or more\]"),
            ((points.astype(float), matrices, (2, 2)), "got float64"),
            ((points, matrices[0], (2, 2)), "matrices: wrong array"),
            ((points, matrices.astype(float), (2, 2)), "matrices: wrong array"),
            ((points, matrices, (0, 2)), r"sides of 1\.\.16384"),
            ((points, matrices, (2, 20_000)), "sides of"),
            ((points, matrices, (2, 2), np.zeros((2, 2, 3), np.float32)), "out: wrong tensor"),
            ((points, matrices, (2, 2), np.zeros((2, 2, 4), np.float32)[..., ::2]), "out: wrong tensor"),
        ):
            with pytest.raises(UsageError, match=message):
                depth_raster(*arguments)
        with pytest.raises(UsageError, match="0 <= near < far"):
            depth_raster(points, matrices, (2, 2), near=3.0, far=3.0)
    with pytest.raises(UsageError, match="projections: wrong shapes"):
        projections(np.eye(3)[None], np.eye(3)[None])


# --- the CUDA source ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    functions = ("depth_raster_clear", "depth_raster", "depth_raster_finish")
    struct = ("DepthRaster", raster_cuda.Parameters)
    return cuda_cpu.compiled("depth_raster", tmp_path_factory.mktemp("cuda"), {struct: functions})


@settings(deadline=None, max_examples=100)
@given(case=cases())
def test_the_cuda_source_compiled_for_the_cpu_is_the_reference(emulated: ctypes.CDLL, case: Case) -> None:
    points, matrices, size, near, far = case
    with using("numpy"):
        expected = depth_raster(points, matrices, size, near=near, far=far)
    out = np.full(expected.shape, np.nan, np.float32)
    addresses = (address(points), address(matrices), address(out))
    p = raster_cuda.Parameters(*addresses, *points.shape, len(matrices), *size, near, far)
    for function, grid in raster_cuda.launches(p):
        cuda_cpu.launch(emulated, function, grid, (raster_cuda.BLOCK,), p)
    assert out.tobytes() == expected.tobytes()


def test_wrong_cuda_arguments() -> None:
    with pytest.raises(UsageError, match="matrices: wrong array"):
        raster_cuda.CudaDepthRaster(np.zeros((3, 4), np.float32), (2, 2))
