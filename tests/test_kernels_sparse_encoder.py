"""The whole sparse encoder against torch's dense convolutions, on crops of a real sweep and on random voxels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekit.errors import UsageError
from edgekit.kernels.sparse_conv import encoder
from edgekit.kernels.sparse_conv.encoder import EncoderSpec, Stage
from edgekit.kernels.voxelize import VoxelGrid, voxelize
from tests.helpers import shared_data
from tests.test_kernels import PATHS, using

SMALL = EncoderSpec(
    shape=(21, 32, 40),
    inputs=4,
    stages=(Stage(8, 1, 16), Stage(16, 2, 24, (0, 1, 1)), Stage(24, 1)),
    outputs=20,
)


def dense_encoder(
    spec: EncoderSpec,
    weights: dict[str, np.ndarray],
    coordinates: np.ndarray,
    features: np.ndarray,
    batch: int,
) -> np.ndarray:
    """As mmdetection3d's SparseEncoder says, on whole grids in float64: submanifold = dense, then cut to the sites."""
    w = {name: torch.from_numpy(value.astype(np.float64)) for name, value in weights.items()}
    grid = torch.zeros((batch, features.shape[1], *spec.shape), dtype=torch.float64)
    there = torch.zeros((batch, 1, *spec.shape), dtype=torch.float64)
    b, z, y, x = torch.from_numpy(coordinates.astype(np.int64)).T
    grid[b, :, z, y, x] = torch.from_numpy(features.astype(np.float64))
    there[b, 0, z, y, x] = 1

    def normed(name: str, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        parts = [w[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias")]
        return torch.nn.functional.batch_norm(value, *parts, eps=spec.eps) * mask

    def kernel(name: str) -> torch.Tensor:
        return w[f"{name}.weight"].permute(4, 3, 0, 1, 2)

    def same(conv: str, norm: str, value: torch.Tensor) -> torch.Tensor:
        return normed(norm, torch.nn.functional.conv3d(value, kernel(conv), padding=1), there)

    def strided(conv: str, norm: str, stride: tuple, padding: tuple) -> torch.Tensor:
        nonlocal there
        size = kernel(conv).shape[2:]
        ones = torch.ones((1, 1, *size), dtype=torch.float64)
        value = torch.nn.functional.conv3d(grid, kernel(conv), stride=stride, padding=padding)
        there = (torch.nn.functional.conv3d(there, ones, stride=stride, padding=padding) > 0).double()
        return normed(norm, value, there).relu()

    grid = same("conv_input.0", "conv_input.1", grid).relu()
    for i, stage in enumerate(spec.stages, 1):
        at = f"encoder_layers.encoder_layer{i}"
        for j in range(stage.blocks):
            first = same(f"{at}.{j}.conv1", f"{at}.{j}.bn1", grid).relu()
            grid = (same(f"{at}.{j}.conv2", f"{at}.{j}.bn2", first) + grid).relu()
        if stage.down:
            grid = strided(f"{at}.{stage.blocks}.0", f"{at}.{stage.blocks}.1", (2, 2, 2), stage.padding)
    grid = strided("conv_out.0", "conv_out.1", (2, 1, 1), (0, 0, 0))
    return grid.flatten(1, 2).numpy()


def random_voxels(spec: EncoderSpec, batch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = np.argwhere(rng.random((batch, *spec.shape)) < 0.03).astype(np.int32)
    rng.shuffle(found)
    return found, rng.normal(size=(len(found), spec.inputs)).astype(np.float32)


def agree(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape and got.dtype == np.float32
    assert np.abs(expected).max() > 0.1  # something comes through
    np.testing.assert_allclose(got, expected, atol=1e-4 * max(1.0, np.abs(expected).max()), rtol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("axes", ["zyx", "xyz"])
def test_against_a_dense_network(path: str, axes: str) -> None:
    weights = encoder.random_weights(SMALL, seed=4)
    coordinates, features = random_voxels(SMALL, 2, 1)
    expected = dense_encoder(SMALL, weights, coordinates, features, 2)
    if axes == "xyz":
        weights = {n: w.transpose(2, 1, 0, 3, 4) if w.ndim == 5 else w for n, w in weights.items()}
    with using(path):
        got = encoder.encode(encoder.prepare(weights, SMALL, axes=axes), coordinates, features, 2)
    agree(got, expected)


@pytest.mark.shared
@pytest.mark.parametrize("cloud", ["nuscenes_sample/*LIDAR_TOP*.bin", "kitti_velo10/000000.bin"])
def test_on_a_crop_of_a_real_sweep(cloud: str) -> None:
    raw = np.fromfile(next(shared_data().glob(cloud)), np.float32)
    points = raw.reshape(-1, 5 if "nuscenes" in cloud else 4)[:, :4].copy()
    # the full network's voxels, height and layers, on some metres of it
    grid = VoxelGrid((6.0, -1.8, -5.0), (9.6, 1.8, 3.0), (0.075, 0.075, 0.2))
    spec = EncoderSpec(shape=(41, *grid.shape[1:]), inputs=4)
    voxels = voxelize(points, grid, max_points=10)
    assert len(voxels.counts) > 150
    weights = encoder.random_weights(spec)
    network = encoder.prepare(weights, spec)
    got = encoder.encode(network, voxels.coordinates, voxels.features)
    agree(got, dense_encoder(spec, weights, voxels.coordinates, voxels.features, 1))
    again = np.full_like(got, np.nan)
    for threads in (1, 2, 3):
        encoder.encode(network, voxels.coordinates, voxels.features, out=again, threads=threads)
        assert again.tobytes() == got.tobytes()


def test_shape_of_bevfusion() -> None:
    assert encoder.BEVFUSION.out_shape == (2, 180, 180)
    layers = encoder.BEVFUSION.layers()
    assert len(layers) == 21 and sum(layer.residual for layer in layers) == 8


@pytest.mark.parametrize("path", PATHS)
def test_int8(path: str) -> None:
    weights = encoder.random_weights(SMALL, seed=4)
    cloud = random_voxels(SMALL, 1, 2)
    with using(path):
        exact = encoder.prepare(weights, SMALL)
        scales = encoder.calibrate(exact, [random_voxels(SMALL, 1, seed) for seed in range(3)])
        network = encoder.prepare(weights, SMALL, scales=scales)
        expected, got = encoder.encode(exact, *cloud), encoder.encode(network, *cloud)
        assert np.square(got - expected).sum() < 0.01 * np.square(expected).sum()
        with pytest.raises(UsageError, match="expected a float encoder"):
            encoder.calibrate(network, [cloud])
        with pytest.raises(UsageError, match="at least one cloud"):
            encoder.calibrate(exact, [])
        del scales["encoder_layers.encoder_layer2.1.conv1"]
        with pytest.raises(UsageError, match=r"encoder_layer2.1.conv1 has none"):
            encoder.prepare(weights, SMALL, scales=scales)


def test_no_voxels() -> None:
    network = encoder.prepare(encoder.random_weights(SMALL), SMALL)
    view = encoder.encode(network, np.zeros((0, 4), np.int32), np.zeros((0, 4), np.float32))
    assert view.shape == (1, 20 * SMALL.out_shape[0], *SMALL.out_shape[1:]) and not view.any()


def test_wrong_weights() -> None:
    weights = encoder.random_weights(SMALL)
    with pytest.raises(UsageError, match="encoder axes"):
        encoder.prepare(weights, SMALL, axes="yxz")
    for name, wrong, message in (
        ("conv_out.0.weight", weights["conv_out.0.weight"].transpose(2, 1, 0, 3, 4), r"expected \[3, 1, 1"),
        ("conv_out.1.bias", np.zeros(3, np.float32), r"expected \[20\]"),
    ):
        with pytest.raises(UsageError, match=message):
            encoder.prepare({**weights, name: wrong}, SMALL)
    del weights["conv_input.1.running_var"]
    with pytest.raises(UsageError, match="is missing"):
        encoder.prepare(weights, SMALL)
    network = encoder.prepare(encoder.random_weights(SMALL), SMALL)
    with pytest.raises(UsageError, match="argument out"):
        encoder.encode(
            network,
            np.zeros((0, 4), np.int32),
            np.zeros((0, 4), np.float32),
            out=np.zeros((1, 2), np.float32),
        )
    with pytest.raises(UsageError, match="one row per voxel"):
        encoder.encode(network, np.zeros((1, 4), np.int32), np.zeros((2, 4), np.float32))
