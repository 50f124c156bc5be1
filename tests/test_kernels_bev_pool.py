from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit import kernels
from edgekit.errors import UsageError
from edgekit.kernels import bev_pool
from edgekit.kernels.bev_pool import BevGrid, BevPool, Frustum, Geometry, Table, build, cached, reference
from edgekit.kernels.bev_pool import cuda as bev_cuda
from edgekit.kernels.bev_pool import table as tables
from tests import cuda_cpu
from tests.cuda_cpu import address
from tests.rigs import nuscenes_geometry, random_geometry
from tests.test_kernels import PATHS, using

Tensors = tuple[np.ndarray, np.ndarray]


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    features = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    first, step, bins = (
        draw(st.sampled_from((0.5, 1.0))),
        draw(st.sampled_from((0.25, 0.7))),
        draw(st.integers(1, 12)),
    )
    frustum = Frustum((40, 64), features, (first, first + step * (bins - 0.5), step))
    # some grids have whole cache lines of cells, most have not
    nx, ny, cell = draw(st.integers(1, 50)), draw(st.integers(1, 40)), draw(st.sampled_from((0.125, 0.5)))
    if draw(st.booleans()):
        nx = 16 * (nx % 4 + 1)
    x, y = -cell * nx * rng.uniform(0, 1), -cell * ny * rng.uniform(0, 1)
    order, rounding = draw(st.sampled_from(("yx", "xy"))), draw(st.sampled_from(("floor", "trunc")))
    grid = BevGrid((x, x + nx * cell, cell), (y, y + ny * cell, cell), (-1.0, 1.5), order, rounding)
    tilt = draw(st.sampled_from((0.0, 0.02, 0.8)))
    return random_geometry(rng, frustum, grid, draw(st.integers(1, 4)), tilt)


def tensors(geometry: Geometry, channels: int, seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    cameras, (height, width) = geometry.cameras, geometry.frustum.features
    depth = rng.random((cameras, geometry.frustum.bins, height, width), np.float32)
    features = rng.standard_normal((cameras, height, width, channels), np.float32)
    return depth, features


def placed(shape: tuple[int, ...], offset: int) -> np.ndarray:
    """Memory of NaN whose first float lies `offset` floats past a cache line."""
    count = int(np.prod(shape))
    memory = np.full(4 * (count + 32), 0xFF, np.uint8)
    start = -address(memory) % 64 + 4 * offset
    return memory[start : start + 4 * count].view(np.float32).reshape(shape)


@settings(deadline=None, max_examples=150)
@given(geometry=geometries(), threads=st.sampled_from((0, 1, 3)))
def test_native_table_is_the_reference(geometry: Geometry, threads: int) -> None:
    with using("numpy"):
        expected = build(geometry)
    with using("native"):
        got = build(geometry, threads)
    assert (got.shape, got.grid) == (expected.shape, expected.grid)
    np.testing.assert_array_equal(got.starts, expected.starts, strict=True)
    np.testing.assert_array_equal(got.runs, expected.runs, strict=True)


@settings(deadline=None, max_examples=150)
@given(
    geometry=geometries(),
    channels=st.one_of(st.integers(1, 40), st.sampled_from((16, 80, 96, 170, 181))),
    layout=st.sampled_from(("NCHW", "NHWC")),
    isa=st.sampled_from(("auto", "avx2", "portable")),
    threads=st.sampled_from((0, 1, 3)),
    offset=st.sampled_from((0, 4, 5)),
    features_offset=st.sampled_from((0, 4)),
    stream=st.booleans(),
    data=st.data(),
)
def test_native_sums_are_the_reference(
    geometry: Geometry,
    channels: int,
    layout: str,
    isa: str,
    threads: int,
    offset: int,
    features_offset: int,
    stream: bool,
    data: st.DataObject,
) -> None:
    depth, features = tensors(geometry, channels, 1)
    cameras = data.draw(
        st.none() | st.lists(st.booleans(), min_size=geometry.cameras, max_size=geometry.cameras)
    )
    with using("numpy"):
        table = build(geometry)
        expected = BevPool(table, channels, layout).run(depth, features, cameras=cameras)
    with using("native"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(bev_pool, "STREAM_BYTES", 0 if stream else 1 << 60)
        pool = BevPool(table, channels, layout, isa)
        out, where = placed(pool.out_shape, offset), placed(features.shape, features_offset)
        where[...] = features
        assert pool.run(depth, where, out, cameras=cameras, threads=threads) is out
    assert out.tobytes() == expected.tobytes()


def cell_by_cell(geometry: Geometry, depth: np.ndarray, features: np.ndarray) -> np.ndarray:
    """The published way, in float64 and point by point: homogeneous matrices, then the lifted features added up."""
    grid, frustum = geometry.grid, geometry.frustum
    (height, width), z = frustum.features, frustum.depths()
    out = np.zeros((*grid.shape, features.shape[-1]))
    for c in range(geometry.cameras):
        for v, row in enumerate(np.linspace(0, frustum.image[0] - 1, height)):
            for u, column in enumerate(np.linspace(0, frustum.image[1] - 1, width)):
                pixel = np.linalg.solve(geometry.augmentation[c], [column, row, 1])
                for d, metres in enumerate(z):
                    camera = np.linalg.solve(geometry.intrinsics[c], pixel * metres)
                    point = geometry.camera_to_ego[c] @ [*camera, 1]
                    x = (point[0] - grid.x[0]) / grid.x[2]
                    y = (point[1] - grid.y[0]) / grid.y[2]
                    h = (point[2] - grid.z[0]) / (grid.z[1] - grid.z[0])
                    if grid.rounding == "trunc":
                        x, y, h = (np.trunc(k) for k in (x, y, h))
                    nx, ny = grid.size
                    if 0 <= x < nx and 0 <= y < ny and 0 <= h < 1:
                        at = (int(y), int(x)) if grid.order == "yx" else (int(x), int(y))
                        out[at] += depth[c, d, v, u] * features[c, v, u].astype(float)
    return out


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=30)
@given(geometry=geometries())
def test_against_points_one_by_one(path: str, geometry: Geometry) -> None:
    depth, features = tensors(geometry, 3, 2)
    with using(path):
        got = BevPool(build(geometry), 3, "NHWC").run(depth, features)[0]
    expected = cell_by_cell(geometry, depth, features)
    # a point on the very edge of a cell may fall on either side of it: none of these does by more than rounding
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def one_camera(frustum: Frustum, grid: BevGrid, forward: tuple[float, float, float] = (0, 0, 0)) -> Geometry:
    """A camera that looks along x with pixels of one radian's tangent."""
    pose = np.eye(4)
    pose[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    pose[:3, 3] = forward
    return Geometry(np.eye(3)[None], pose[None], None, frustum, grid)


@pytest.mark.parametrize("path", PATHS)
def test_floor_and_trunc(path: str) -> None:
    frustum = Frustum((1, 1), (1, 1), (0.5, 8.0, 0.5))  # points at x = z - 3, y = 0, height 0
    floor = BevGrid((0.0, 3.0, 1.0), (-1.0, 1.0, 1.0), (-0.5, 0.5))
    trunc = dataclasses.replace(floor, rounding="trunc")
    depth, features = np.ones((1, 15, 1, 1), np.float32), np.ones((1, 1, 1, 1), np.float32)
    with using(path):
        rows = [
            BevPool(build(one_camera(frustum, grid, (-3, 0, 0))), 1).run(depth, features)[0, 0]
            for grid in (floor, trunc)
        ]
    # two points a metre; x = -0.5 counts as cell 0 where it is cut towards zero; high edges are out, low ones in
    assert rows[0].tolist() == [[0, 0, 0], [2, 2, 2]]
    assert rows[1].tolist() == [[0, 0, 0], [3, 2, 2]]


@pytest.mark.parametrize("path", PATHS)
def test_trunc_reaches_a_whole_cell_below_in_height(path: str) -> None:
    frustum = Frustum((1, 1), (1, 1), (1.0, 1.4, 0.5))
    heights = {}
    with using(path):
        for rounding in ("floor", "trunc"):
            grid = BevGrid((0.0, 2.0, 1.0), (-1.0, 1.0, 1.0), (-10.0, 10.0), "yx", rounding)
            heights[rounding] = [
                build(one_camera(frustum, grid, (0, 0, z))).points for z in (-30.0, -29.9, -10.0, 9.9, 10.0)
            ]
    assert heights == {"floor": [0, 0, 1, 1, 0], "trunc": [0, 1, 1, 1, 0]}


@pytest.mark.parametrize("path", PATHS)
def test_the_last_cell_and_the_last_point_count(path: str) -> None:
    frustum = Frustum((1, 1), (1, 1), (1.0, 4.0, 1.0))  # one point in each of the three cells
    grid = BevGrid((0.5, 3.5, 1.0), (-0.5, 0.5, 1.0), (-1.0, 1.0))
    with using(path):
        table = build(one_camera(frustum, grid))
        assert table.points == 3 and table.starts.tolist() == [0, 1, 2, 3]
        depth = np.array([2, 3, 5], np.float32).reshape(1, 3, 1, 1)
        out = BevPool(table, 1).run(depth, np.full((1, 1, 1, 1), 7, np.float32))
    assert out.reshape(-1).tolist() == [14, 21, 35]


@pytest.mark.parametrize("path", PATHS)
def test_each_camera_has_its_own_augmentation(path: str) -> None:
    frustum, grid = Frustum((1, 1), (1, 1), (1.0, 1.5, 1.0)), BevGrid((0.0, 2.0, 1.0), (-2.0, 2.0, 1.0))
    pose = np.repeat(one_camera(frustum, grid).camera_to_ego, 2, axis=0)
    shift = np.stack([np.eye(3), np.eye(3)])
    shift[1, 0, 2] = -1.5  # the network's pixel 0 is the camera's pixel 1.5, at y = -1.5
    with using(path):
        geometry = Geometry(np.stack([np.eye(3)] * 2), pose, shift, frustum, grid)
        out = BevPool(build(geometry), 1).run(
            np.ones((2, 1, 1, 1), np.float32), np.ones((2, 1, 1, 1), np.float32)
        )
    assert out[0, 0].tolist() == [[0, 1], [0, 0], [0, 1], [0, 0]]


@pytest.mark.parametrize("path", PATHS)
def test_a_missing_camera_is_as_if_it_were_not_there(path: str) -> None:
    rng = np.random.default_rng(5)
    frustum, grid = Frustum((40, 64), (6, 8), (1.0, 9.0, 0.5)), BevGrid((-8.0, 8.0, 0.5), (-8.0, 8.0, 0.5))
    geometry = random_geometry(rng, frustum, grid, 3, 0.05)
    depth, features = tensors(geometry, 5, 3)
    rest = [0, 2]
    parts = (geometry.intrinsics, geometry.camera_to_ego, geometry.augmentation)
    without = Geometry(*(part[rest] for part in parts), frustum, grid)
    with using(path):
        expected = BevPool(build(without), 5).run(depth[rest], features[rest])
        depth[1], features[1] = np.nan, np.inf  # what is not read cannot harm
        got = BevPool(build(geometry), 5).run(depth, features, cameras=[True, False, True])
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("path", PATHS)
def test_half_precision_is_converted_first(path: str) -> None:
    geometry = random_geometry(np.random.default_rng(6), Frustum((40, 64), (6, 8)), BevGrid(), 2, 0.05)
    depth, features = (t.astype(np.float16) for t in tensors(geometry, 4, 4))
    with using(path):
        pool = BevPool(build(geometry), 4)
        got, wide = pool.run(depth, features), pool.run(depth.astype(np.float32), features.astype(np.float32))
    assert got.dtype == np.float32 and got.tobytes() == wide.tobytes()


@pytest.mark.parametrize("path", PATHS)
def test_no_number_spreads_to_other_cells(path: str) -> None:
    frustum, grid = Frustum((1, 1), (1, 1), (1.0, 4.0, 1.0)), BevGrid((0.5, 3.5, 1.0), (-0.5, 0.5, 1.0))
    depth = np.array([1, np.nan, 0], np.float32).reshape(1, 3, 1, 1)
    with using(path):
        out = BevPool(build(one_camera(frustum, grid)), 1).run(
            depth, np.full((1, 1, 1, 1), np.inf, np.float32)
        )
    np.testing.assert_array_equal(out.reshape(-1), [np.inf, np.nan, np.nan])


@pytest.mark.parametrize("path", PATHS)
def test_nothing_in_view(path: str) -> None:
    grid = BevGrid((-9.0, -1.0, 1.0), (-1.0, 1.0, 1.0))  # behind the camera
    with using(path):
        table = build(one_camera(Frustum((1, 1), (1, 1), (1.0, 4.0, 1.0)), grid))
        out = placed((1, 2, 2, 8), 0)
        BevPool(table, 2).run(np.ones((1, 3, 1, 1), np.float32), np.ones((1, 1, 1, 2), np.float32), out)
    assert table.runs.shape == (0, 3) and not out.any()


def test_the_same_bits_for_any_number_of_threads_and_in_every_run() -> None:
    geometry = nuscenes_like()
    depth, features = tensors(geometry, 16, 7)
    with using("native"):
        pool = BevPool(build(geometry), 16)
        results = {pool.run(depth, features, threads=threads).tobytes() for threads in (1, 2, 3, 5, 0, 0, 0)}
    assert len(results) == 1


def nuscenes_like() -> Geometry:
    return random_geometry(
        np.random.default_rng(8), Frustum((64, 176), (8, 22), (1.0, 30.0, 0.5)), BevGrid(), 6, 0.02
    )


def test_threads_share_a_pool() -> None:
    geometry = nuscenes_like()
    depth, features = tensors(geometry, 16, 7)
    with using("native"):
        table = build(geometry)
        expected = [BevPool(table, 16).run(depth, k * features).tobytes() for k in range(4)]
        pool = BevPool(table, 16)  # what it makes at its first run is made once, whoever comes first
        with ThreadPoolExecutor(4) as threads:
            got = list(threads.map(lambda k: pool.run(depth, k % 4 * features).tobytes(), range(40)))
    assert got == expected * 10


@pytest.mark.shared
def test_the_real_rig() -> None:
    geometry = nuscenes_geometry()
    with using("numpy"):
        expected = build(geometry)
    with using("native"):
        table = build(geometry)
    np.testing.assert_array_equal(table.runs, expected.runs)
    assert geometry.points == 6 * 118 * 32 * 88
    assert table.points == np.count_nonzero(reference.cells(geometry) >= 0)
    assert len(table.runs) < table.points / 10  # upright cameras: rows of a column share cells


# --- files --------------------------------------------------------------------------------------


def equal(a: Table, b: Table) -> bool:
    return (
        (a.shape, a.grid) == (b.shape, b.grid)
        and np.array_equal(a.starts, b.starts)
        and np.array_equal(a.runs, b.runs)
    )


def test_a_table_is_kept_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, folder = nuscenes_like(), tmp_path / "new/folder"
    made = cached(geometry, folder)
    assert [p.name for p in folder.iterdir()] == [f"{geometry.key}.table"]
    monkeypatch.setattr(tables, "build", None)  # would fail
    found = cached(geometry, folder)
    assert equal(found, made) and found.runs.base is not None and not found.runs.flags.writeable
    depth, features = tensors(geometry, 4, 9)
    assert BevPool(found, 4).run(depth, features).tobytes() == BevPool(made, 4).run(depth, features).tobytes()


def test_an_empty_table_is_kept(tmp_path: Path) -> None:
    geometry = one_camera(Frustum((1, 1), (1, 1)), BevGrid((-9.0, -1.0, 1.0), (-1.0, 1.0, 1.0)))
    assert equal(cached(geometry, tmp_path), cached(geometry, tmp_path))
    assert len(list(tmp_path.iterdir())) == 1


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_damaged_file_counts_as_none(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    geometry = random_geometry(
        np.random.default_rng(1),
        Frustum((8, 8), (4, 4), (1.0, 3.0, 0.5)),
        BevGrid((-4.0, 4.0, 1.0), (-4.0, 4.0, 1.0)),
        1,
        0,
    )
    folder = tmp_path_factory.mktemp("tables")
    made = cached(geometry, folder)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    content = bytearray(whole)
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="is damaged; building it again"):
        assert equal(cached(geometry, folder), made)
    assert path.read_bytes() == whole


def test_another_tables_file_is_not_taken(tmp_path: Path) -> None:
    one, other = nuscenes_like(), one_camera(Frustum((1, 1), (1, 1)), BevGrid())
    cached(other, tmp_path)
    (tmp_path / f"{other.key}.table").rename(tmp_path / f"{one.key}.table")
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert equal(cached(one, tmp_path), build(one))


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    geometry = nuscenes_like()
    with pytest.warns(RuntimeWarning, match="BEV table: not kept"):
        assert equal(cached(geometry, tmp_path / "file"), build(geometry))
    assert equal(cached(geometry, None), build(geometry))


def test_old_tables_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_FILES", 2)
    geometries = [
        one_camera(Frustum((1, 1), (1, 1), (1.0, 2.0 + k, 1.0)), BevGrid((0.0, 4.0, 1.0), (-1.0, 1.0, 1.0)))
        for k in range(3)
    ]
    for geometry in geometries[:2]:
        cached(geometry, tmp_path)
    cached(geometries[0], tmp_path)  # used again, so the other one is the oldest
    cached(geometries[2], tmp_path)
    assert {p.stem for p in tmp_path.iterdir()} == {geometries[0].key, geometries[2].key}


def test_the_key_is_the_content() -> None:
    frustum, grid = Frustum((40, 64), (4, 4)), BevGrid()
    base = random_geometry(np.random.default_rng(3), frustum, grid, 2, 0.1)
    k, t, a = base.intrinsics, base.camera_to_ego, base.augmentation
    assert Geometry(k.copy(), t.tolist(), a, frustum, grid).key == base.key and len(base.key) == 64
    moved = t.copy()
    moved[1, 0, 3] = np.nextafter(moved[1, 0, 3], 9)
    others = [
        Geometry(k, moved, a, frustum, grid),
        Geometry(k + 1e-9 * (k > 1), t, a, frustum, grid),
        Geometry(k, t, None, frustum, grid),
        Geometry(k[::-1], t, a, frustum, grid),
        Geometry(k[:1], t[:1], a[:1], frustum, grid),
        *(Geometry(k, t, a, frustum, dataclasses.replace(grid, **change)) for change in GRIDS),
        *(Geometry(k, t, a, dataclasses.replace(frustum, **change), grid) for change in FRUSTA),
    ]
    assert len({base.key, *(g.key for g in others)}) == 1 + len(others)


GRIDS: tuple[dict[str, object], ...] = (
    {"x": (-54.0, 54.0, 0.6)}, {"y": (-51.0, 54.0, 0.3)}, {"z": (-5.0, 3.0)}, {"order": "xy"}, {"rounding": "trunc"},
)  # fmt: skip
FRUSTA: tuple[dict[str, object], ...] = (
    {"image": (40, 66)}, {"features": (4, 5)}, {"depth": (1.0, 60.0, 1.0)},
)  # fmt: skip


# --- the CUDA source ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> cuda_cpu.ctypes.CDLL:
    more = "unsigned short half(float f) { return to_half(f); } float single(unsigned short h) { return from_half(h); }"
    library = cuda_cpu.compiled(
        "bev_pool",
        tmp_path_factory.mktemp("cuda"),
        {("BevPool", bev_cuda.Parameters): ("bev_pool",)},
        more=more,
    )
    library.half.argtypes, library.half.restype = [cuda_cpu.ctypes.c_float], cuda_cpu.ctypes.c_ushort
    library.single.argtypes, library.single.restype = [cuda_cpu.ctypes.c_ushort], cuda_cpu.ctypes.c_float
    return library


def test_half_precision_of_the_cuda_source(emulated: cuda_cpu.ctypes.CDLL) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    singles = np.array([emulated.single(int(h)) for h in halves], np.float32)
    np.testing.assert_array_equal(singles, halves.view(np.float16).astype(np.float32))
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 30_000, np.uint32)
    near = np.concatenate(
        [singles, np.nextafter(singles, np.inf, dtype=np.float32), (singles[:-1] + singles[1:]) / 2]
    )
    values = np.concatenate([bits.view(np.float32), near])
    values = values[~np.isnan(values)]
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    got = np.array([emulated.half(float(v)) for v in values], np.uint16).view(np.float16)
    np.testing.assert_array_equal(got.view(np.uint16), expected.view(np.uint16))
    assert np.isnan(np.array([emulated.half(float("nan"))], np.uint16).view(np.float16))


@settings(deadline=None, max_examples=100)
@given(
    geometry=geometries(),
    channels=st.integers(1, 20),
    layout=st.sampled_from(("NCHW", "NHWC")),
    dtypes=st.tuples(*(st.sampled_from(("float32", "float16")),) * 2),
    data=st.data(),
)
def test_the_cuda_source_compiled_for_the_cpu_is_the_reference(
    emulated: cuda_cpu.ctypes.CDLL,
    geometry: Geometry,
    channels: int,
    layout: str,
    dtypes: tuple[str, str],
    data: st.DataObject,
) -> None:
    depth, features = (t.astype(dtypes[0]) for t in tensors(geometry, channels, 11))
    cameras = data.draw(
        st.none() | st.lists(st.booleans(), min_size=geometry.cameras, max_size=geometry.cameras)
    )
    with using("numpy"):
        table = build(geometry)
        expected = BevPool(table, channels, layout).run(depth, features, cameras=cameras).astype(dtypes[1])
    call = bev_cuda.BevPoolCall(table, channels, layout, *dtypes)
    out = np.full(expected.shape, np.nan, dtypes[1])
    arrays = (table.starts, table.runs, depth, features, out)
    p = call.parameters(*(address(array) for array in arrays), cameras)
    cuda_cpu.launch(emulated, "bev_pool", call.grid, bev_cuda.BLOCK, p)
    assert out.tobytes() == expected.tobytes()


# --- wrong arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_wrong_tensors(path: str) -> None:
    geometry = one_camera(
        Frustum((1, 1), (2, 3), (1.0, 4.0, 1.0)), BevGrid((0.0, 4.0, 1.0), (-1.0, 1.0, 1.0))
    )
    depth, features = np.zeros((1, 3, 2, 3), np.float32), np.zeros((1, 2, 3, 5), np.float32)
    with using(path):
        pool = BevPool(build(geometry), 5)
        assert pool.out_shape == (1, 5, 2, 4)
        for arrays, message in (
            (
                (depth[:, :2], features),
                r"argument depth: wrong tensor, expected .* \[1, 3, 2, 3\], got float32 \[1, 2, 2, 3\]",
            ),
            ((depth, features[..., :4]), "argument features: wrong tensor"),
            ((depth.astype(float), features), "got float64"),
            ((depth, features, np.zeros((5, 2, 4), np.float32)), "argument out: wrong tensor"),
            ((depth, features, np.zeros(pool.out_shape)), "argument out: wrong tensor"),
            ((depth, features, np.zeros((1, 5, 2, 8), np.float32)[..., ::2]), "C-contiguous"),
        ):
            with pytest.raises(UsageError, match=message):
                pool.run(*arrays)
        with pytest.raises(UsageError, match="expected 1 flags"):
            pool.run(depth, features, cameras=[True, False])
        for channels, layout in ((0, "NCHW"), (5000, "NCHW"), (4, "CHW")):
            with pytest.raises(UsageError, match="channels and layout"):
                BevPool(build(geometry), channels, layout)
        # not contiguous: a copy is made
        wide = np.zeros((1, 2, 3, 10), np.float32)[..., ::2]
        assert not pool.run(depth, wide).any()


def test_wrong_cuda_arguments() -> None:
    table = build(one_camera(Frustum((1, 1), (1, 1)), BevGrid((0.0, 4.0, 1.0), (-1.0, 1.0, 1.0))))
    with pytest.raises(UsageError, match="dtypes float32 or float16"):
        bev_cuda.BevPoolCall(table, 4, out_dtype="int8")
    with pytest.raises(UsageError, match="expected 1 flags"):
        bev_cuda.BevPoolCall(table, 4).parameters(0, 0, 0, 0, 0, [True, True])


def test_wrong_geometry() -> None:
    eye, pose = np.eye(3)[None], np.eye(4)[None]
    for arrays, message in (
        ((eye, pose[:, :3]), r"camera_to_ego: wrong shape, expected \[1, 4, 4\], got \[1, 3, 4\]"),
        ((eye, pose, eye[0]), "augmentation: wrong shape"),
        ((eye * np.nan, pose), "intrinsics: expected finite numbers"),
        ((eye * [[[1], [0], [1]]], pose), "intrinsics, camera 0: expected an invertible matrix"),
        ((eye * 2, pose), "whose last row is"),
        ((np.repeat(eye, 65, 0), np.repeat(pose, 65, 0)), "expected 1..64 cameras"),
        ((eye[:0], pose[:0]), "expected 1..64 cameras"),
    ):
        with pytest.raises(UsageError, match=message):
            Geometry(*arrays)
    for settings_, message in (
        ({"x": (0.0, 1.0, 0.3)}, "grid x: unusable range, expected low < high with a whole number of steps"),
        ({"y": (1.0, 0.0, 0.1)}, "grid y"),
        ({"z": (1.0, 1.0)}, "grid z"),
        ({"x": (0.0, float("inf"), 1.0)}, "grid x"),
        ({"x": (0.0, 1.0, 0.0)}, "grid x"),
        ({"order": "zx"}, "expected order"),
        ({"rounding": "round"}, "expected order"),
        ({"x": (0.0, 1e6, 0.1)}, "at most 16777216 cells"),
    ):
        with pytest.raises(UsageError, match=message):
            BevGrid(**settings_)
    for sizes in ({"image": (0, 4)}, {"features": (1, 0)}, {"features": (40_000, 1)}, {"depth": (0.0, 1.0, 1.0)},
                  {"depth": (1.0, 1.0, 1.0)}, {"depth": (1.0, 2.0, 0.0)}, {"depth": (1.0, float("nan"), 1.0)}):  # fmt: skip
        with pytest.raises(UsageError, match="frustum: unusable"):
            Frustum(**sizes)
    with pytest.raises(UsageError, match="at most 268435456 points"):
        Geometry(np.repeat(eye, 9, 0), np.repeat(pose, 9, 0), None, Frustum(features=(512, 512)))


def test_a_table_that_leaves_its_tensors_is_refused() -> None:
    table = build(
        one_camera(Frustum((1, 1), (2, 2), (1.0, 4.0, 1.0)), BevGrid((0.0, 4.0, 1.0), (-1.0, 1.0, 1.0)))
    )
    assert len(table.runs)
    for column, value in ((0, 12), (1, 4), (2, 1 << 16 | 1), (2, 3), (2, 0)):
        runs = table.runs.copy()
        runs[-1, column] = value
        with using("native"), pytest.raises(RuntimeError, match="bev_pool table"):
            BevPool(Table(table.shape, table.grid, table.starts.copy(), runs), 1)


def test_native_runs_here_with_the_widest_vectors() -> None:
    module = kernels.native()
    if module is None or module.isa != "avx2":
        pytest.skip("no native module with AVX2")
    table = build(one_camera(Frustum((1, 1), (1, 1)), BevGrid()))
    assert (
        BevPool(table, 8)._kernel.isa in ("avx2", "avx512")
        and BevPool(table, 8, isa="portable")._kernel.isa == "portable"
    )
