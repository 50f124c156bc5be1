"""BEVFusion's parts in torch against the kernels, and against what they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from edgekit.errors import UsageError
from edgekit.kernels import sparse_conv
from edgekit.kernels.bev_pool import BevPool
from edgekit.kernels.sparse_conv import encoder
from edgekit.models.bevfusion import lidar, pool
from edgekit.models.bevfusion.camera import LSS, Backbone, CameraNet
from edgekit.models.bevfusion.config import FULL, LITE, BevConfig, CameraConfig, Config
from edgekit.models.bevfusion.inputs import geometry, prepare, rule, turned_boxes, turning
from edgekit.rig import count_inside
from edgekit.tasks.fusion.calibration import fit
from tests import bevfusion_nets as nets

WINDOWS = [
    pytest.param(None, id="submanifold"),
    pytest.param(((3, 3, 3), (2, 2, 2), (1, 1, 1)), id="strided"),
    pytest.param(((3, 3, 3), (2, 2, 2), (0, 1, 1)), id="padding"),
    pytest.param(((3, 1, 1), (2, 1, 1), (0, 0, 0)), id="squeeze"),
]


def scattered(seed: int, shape: tuple[int, int, int], batch: int, count: int) -> np.ndarray:
    """Distinct voxels, int32 [count, 4]."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(batch * int(np.prod(shape)), count, replace=False)
    return np.stack(np.unravel_index(chosen, (batch, *shape)), 1).astype(np.int32)


@pytest.mark.parametrize("where", WINDOWS)
def test_sparse_convolution_is_the_dense_one_at_its_sites_and_so_are_its_gradients(where) -> None:
    torch.manual_seed(0)
    at = sparse_conv.sites(scattered(1, (5, 9, 8), 2, 90), (5, 9, 8), 2)
    book = at.submanifold((3, 3, 3)) if where is None else at.strided(*where)
    kernel, stride, padding = where or ((3, 3, 3), (1, 1, 1), (1, 1, 1))
    x = torch.randn(len(at), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(*kernel, 3, 4, dtype=torch.float64, requires_grad=True)
    out = lidar._Convolve.apply(x, weight.flatten(0, 2), lidar.window(book))

    def places(sites: sparse_conv.Sites) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(sites.coordinates[:, k].astype(np.int64)) for k in range(4))

    grid = torch.zeros(2, 5, 9, 8, 3, dtype=torch.float64).index_put(places(at), x).permute(0, 4, 1, 2, 3)
    dense = functional.conv3d(grid, weight.permute(4, 3, 0, 1, 2), None, stride, padding)
    wanted = dense.permute(0, 2, 3, 4, 1)[places(book.outputs)]
    assert out.shape == wanted.shape and torch.allclose(out, wanted, atol=1e-12)

    given = torch.randn_like(out)
    mine = torch.autograd.grad((out * given).sum(), (x, weight))
    theirs = torch.autograd.grad((wanted * given).sum(), (x, weight))
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-11)


@pytest.mark.parametrize("threads", [1, 2])
def test_encoder_equals_the_kernels_and_gives_the_same_bits_again(threads: int) -> None:
    spec = nets.TINY.lidar.encoder
    model = nets.network(nets.TINY).encoder
    rng = np.random.default_rng(0)
    parts = []
    for seed, count in ((1, 500), (2, 0), (3, 900)):  # the middle one saw nothing
        at = scattered(seed, spec.shape, 1, count)
        parts.append((at, rng.standard_normal((count, spec.inputs)).astype(np.float32)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.no_grad():
            found = model(lidar.cloud(spec, parts)).numpy()
            again = model(lidar.cloud(spec, parts)).numpy()
    finally:
        torch.set_num_threads(before)
    assert found.tobytes() == again.tobytes()
    ready = encoder.prepare(lidar.weights(model), spec)
    for mine, (at, values) in zip(found, parts, strict=True):
        if len(at):
            assert nets.difference(mine, encoder.encode(ready, at, values)[0]) < 1e-5
        else:
            assert not mine.any()


def test_a_single_voxel_can_be_trained_on() -> None:
    model = lidar.SparseEncoder(nets.TINY.lidar.encoder).train()
    one = [(np.array([[0, 4, 40, 40]], np.int32), np.ones((1, 6), np.float32))]
    model(lidar.cloud(model.spec, one)).sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_pooling_equals_the_kernel_on_the_lite_geometry_with_and_without_a_camera() -> None:
    table = nets.sample(LITE).table
    rng = np.random.default_rng(0)
    depth = rng.random(table.shape, np.float32)
    cameras, _, height, width = table.shape
    features = rng.standard_normal((cameras, height, width, 32)).astype(np.float32)
    points = pool.points_of(table)
    assert len(points.cell) == table.points > 10_000
    for lost in (None, 2):
        there = np.ones(cameras, bool)
        if lost is not None:
            there[lost] = False
        mask = torch.from_numpy(there.astype(np.float32)).reshape(-1, 1, 1, 1)
        image = torch.from_numpy(features).permute(0, 3, 1, 2)
        mine = pool.pool(torch.from_numpy(depth) * mask, image, points, table.grid).numpy()
        wanted = BevPool(table, 32).run(depth, features, cameras=there.tolist())
        assert mine.shape == wanted.shape and nets.difference(mine, wanted) < 1e-5
        if lost is None:
            assert np.abs(mine).max() > 1  # the grid is hit
            again = pool.pool(torch.from_numpy(depth), image, points, table.grid).numpy()
            assert mine.tobytes() == again.tobytes()


def test_gradients_of_pooling_are_those_of_the_lifted_tensor() -> None:
    torch.manual_seed(0)
    table = nets.sample(nets.TINY).table
    points = pool.stacked([pool.points_of(table)] * 2)
    cameras, bins, height, width = table.shape
    depth = torch.rand(2 * cameras, bins, height, width, requires_grad=True)
    features = torch.randn(2 * cameras, 3, height, width, requires_grad=True)
    mine = pool.pool(depth, features, points, table.grid)
    lifted = (depth[:, :, None] * features[:, None]).permute(0, 1, 3, 4, 2).reshape(-1, 3)
    flat = torch.zeros(points.cells, 3).index_add(0, points.cell, lifted[points.depth])
    theirs = flat.reshape(2, *table.grid, 3).permute(0, 3, 1, 2)
    assert torch.allclose(mine, theirs, atol=1e-5)
    given = torch.randn_like(mine)
    ours = torch.autograd.grad((mine * given).sum(), (depth, features))
    wanted = torch.autograd.grad((theirs * given).sum(), (depth, features))
    for a, b in zip(ours, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_pictures_are_fitted_as_the_published_network_does() -> None:
    matrix = fit(rule(FULL.camera), 1600, 900)
    assert np.allclose(matrix, [[0.48, 0, -32], [0, 0.48, -176], [0, 0, 1]])
    assert np.array_equal(fit(rule(LITE.camera), 256, 144), np.eye(3))


def test_local_values_say_where_in_its_voxel_a_point_is() -> None:
    config, grid = LITE.lidar, LITE.lidar.grid
    point = np.array([[1.25, -3.02, 0.7, 0.5, -0.02]], np.float32)
    sample = prepare(_with_points(point), LITE)
    ((_, z, y, x),) = sample.coordinates
    middle = np.array(grid.low) + (np.array([x, y, z]) + 0.5) * grid.size
    wanted = [(1.25 - middle[0]) / 0.2, (-3.02 - middle[1]) / 0.2, 0.35, 0.5, -0.2, np.log(2) / 2]
    assert len(lidar.VALUES) == config.encoder.inputs == sample.values.shape[1]
    assert np.allclose(sample.values, [wanted], atol=1e-4) and abs(sample.values[0, :2]).max() <= 0.5


def _with_points(points: np.ndarray):
    import dataclasses

    return dataclasses.replace(nets.frame(1, 256, 144), points=points, shots={})


def test_turning_keeps_points_boxes_and_cells_together() -> None:
    frame = nets.frame(1)
    turned = turning(0.3, 1.04, True, False)
    points = frame.points[:, :3] @ turned[:3, :3].T
    boxes = turned_boxes(frame.truth.boxes, turned)
    before = count_inside(frame.points, frame.truth.boxes * np.array([1] * 3 + [0.99] * 3 + [1] * 3))
    after = count_inside(points, boxes)
    assert (after >= before).all() and after.sum() <= before.sum() * 1.2 and before.sum() > 100
    speed = np.hypot(*frame.truth.boxes[:, 7:9].T)
    assert np.allclose(np.hypot(*boxes[:, 7:9].T), speed * 1.04, atol=1e-3)
    # a camera's ray lands where its points do
    plain, moved = (geometry(frame.rig, nets.TINY, t).rays() for t in (None, turned))
    assert np.allclose(plain[0] @ turned[:3, :3].T, moved[0], atol=1e-9)
    assert np.allclose(plain[1] @ turned[:3, :3].T, moved[1], atol=1e-9)


def test_full_has_the_published_geometry() -> None:
    assert FULL.camera.frustum.features == (32, 88) and FULL.camera.frustum.bins == 118
    assert FULL.bev.pool.shape == (360, 360) and FULL.shape == (180, 180) and FULL.cell == (0.6, 0.6)
    assert FULL.lidar.encoder.shape[1:] == (1440, 1440) and FULL.lidar.channels == 256
    assert len(FULL.head.labels) == 10
    with torch.device("meta"):  # sizes alone
        net = CameraNet(FULL.camera)
        depth, features = net(torch.zeros(6, 3, 256, 704), torch.zeros(6, 1, 256, 704))
    assert net.backbone.channels == (512, 1024, 2048)
    assert depth.shape == (6, 118, 32, 88) and features.shape == (6, 80, 32, 88)


def test_configurations_that_do_not_meet_and_backbones_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pooled into \(180, 180\) cells"):
        Config("wrong", LITE.camera, LITE.lidar, BevConfig(), LITE.head)
    with pytest.raises(UsageError, match="unknown"):
        Backbone("mobilenet_v9", 1.0)


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", (128, 256, 512)), ("resnet50", (512, 1024, 2048)), ("mobilenet_v2", (32, 96, 320))],
)
def test_backbones_give_features_at_strides_8_16_and_32(name: str, channels: tuple[int, ...]) -> None:
    with torch.device("meta"):
        net = Backbone(name, 1.0)
        found = net(torch.zeros(1, 3, 64, 96))
    assert net.channels == channels
    assert [tuple(x.shape) for x in found] == [
        (1, c, 64 // s, 96 // s) for c, s in zip(channels, (8, 16, 32), strict=True)
    ]


def test_lss_needs_no_lidar_and_depthlss_uses_it() -> None:
    torch.manual_seed(0)
    images, depth = torch.randn(2, 3, 40, 64), torch.rand(2, 1, 40, 64) * 20
    blind = CameraNet(nets.OTHER.camera).eval()
    assert isinstance(blind.lift, LSS)
    with torch.no_grad():
        assert torch.equal(blind(images)[0], blind(images, depth)[0])
        seeing = CameraNet(CameraConfig(**{**vars(nets.OTHER.camera), "lidar_depth": True})).eval()
        assert not torch.equal(seeing(images, depth)[0], seeing(images, depth * 0)[0])
