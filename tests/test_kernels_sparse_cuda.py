"""The sources of voxelize, sparse_conv and devoxelize (kernel.cu) without a GPU: compiled as C++ for this CPU, a loop over the threads in
place of a launch (in a shuffled order, which must not matter), against the native kernels and the references. What that
does not show is a launch on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.kernels import devoxelize as devoxel
from edgekit.kernels import sparse_conv as sparse
from edgekit.kernels import voxelize as voxel
from edgekit.kernels.devoxelize import cuda as devoxel_cuda
from edgekit.kernels.sparse_conv import Weights, Weights8
from edgekit.kernels.sparse_conv import cuda as conv_cuda
from edgekit.kernels.voxelize import cuda as voxel_cuda
from tests import cuda_cpu
from tests.cuda_cpu import address, compiled
from tests.test_kernels import using
from tests.test_kernels_sparse_conv import Case, book_of, cases
from tests.test_kernels_voxelize import GRID, clouds, same

STEPS = st.sampled_from((1, 7, 2**31 + 11))


def launch(
    library: ctypes.CDLL, name: str, p: ctypes.Structure, grid: tuple[int, int], step: int, more: int = 0
) -> None:
    cuda_cpu.launch(library, name, grid, (conv_cuda.BLOCK,), p, more, step=step)


@pytest.fixture(scope="module")
def voxelizer(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    names = ("clear", "count", "scan", "number", "link", "mean")
    functions = {("Voxelize", voxel_cuda.Parameters): ("voxelize", *(f"voxelize_{n}" for n in names))}
    return compiled("voxelize", tmp_path_factory.mktemp("cuda"), functions)


@settings(deadline=None, max_examples=100)
@given(clouds(), st.sampled_from((0, 1, 3)), st.sampled_from((0, 1, 7)), STEPS)
def test_voxelize(
    voxelizer: ctypes.CDLL, points: np.ndarray, max_points: int, max_voxels: int, step: int
) -> None:
    with using("numpy"):
        expected = voxel.voxelize(points, GRID, max_points=max_points, max_voxels=max_voxels, batch=2)
    n, channels = points.shape
    most, table = max_voxels or max(n, 1), voxel_cuda.table_size(n)
    ints = {
        "keys": table, "first": table, "number": table, "place": n, "partial": n + 1, "head": most, "next": n,
    }  # fmt: skip
    held = {name: np.full(size, 7, np.int32) for name, size in ints.items()}
    coordinates, features = np.full((most, 4), 7, np.int32), np.full((most, channels), 7, np.float32)
    counts, total = np.full(most, 7, np.int32), np.full(1, 7, np.int32)
    voxels, slot = np.full(n, 7, np.int32), np.full(n, 7, np.int32)
    pointers = [points, *held.values(), coordinates, features, counts, voxels, slot, total]
    p = voxel_cuda.Parameters(
        *map(address, pointers),
        (ctypes.c_float * 3)(*GRID.low), (ctypes.c_float * 3)(*GRID.size), (ctypes.c_int * 3)(*GRID.shape[::-1]),
        n, channels, table, most, max_points, 2,
    )  # fmt: skip
    for function, grid in voxel_cuda.launches(p):
        launch(voxelizer, function, p, grid, step)
    m = int(total[0])
    assert (coordinates[m:] == 7).all() and (counts[m:] == 7).all()
    same(voxel.Voxels(coordinates[:m], features[:m], counts[:m], voxels, slot), expected)


@pytest.fixture(scope="module")
def convolver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    names = ("clear", "mark", "mark_strided", "count", "scan", "scan_shares", "rank", "emit")
    functions: dict[cuda_cpu.Struct, Sequence[str]] = {
        ("SparseGrid", conv_cuda.Grid): [f"sparse_{n}" for n in names],
        ("SparseBook", conv_cuda.Book): ["sparse_neighbours"],
        ("SparseConv", conv_cuda.Convolution): ["sparse_conv", "sparse_conv8"],
    }
    return compiled("sparse_conv", tmp_path_factory.mktemp("cuda"), functions, with_int=("sparse_scan",))


Triple = tuple[int, int, int]


def marked(
    library: ctypes.CDLL,
    source: np.ndarray,
    batch: int,
    shape: Triple,
    window: tuple[Triple, Triple, Triple] | None,
    step: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bits, before, coordinates) of the sites."""
    words, all_words = conv_cuda.words_of(batch, *shape)
    pieces, most = -(-all_words // conv_cuda.PIECE), batch * int(np.prod(shape))
    bits, before = np.full(all_words, 7, np.uint32), np.full(all_words, 7, np.int32)
    partial, total = np.full(pieces + conv_cuda.SHARES, 7, np.int32), np.zeros(1, np.int32)
    found = np.full((most, 4), 7, np.int32)
    sides = [(ctypes.c_int * 3)(*side) for side in window or ((1, 1, 1), (1, 1, 1), (0, 0, 0))]
    pointers = (bits, before, partial, found, total, source)
    p = conv_cuda.Grid(*map(address, pointers), len(source), most, batch, *shape, words, pieces, *sides)
    for function, grid, more in conv_cuda.site_launches(p, window is not None):
        launch(library, function, p, grid, step, *more)
    return bits, before, found[: int(total[0])].copy()


@settings(deadline=None, max_examples=60)
@given(case=cases(), outputs=st.sampled_from((1, 6, 16)), step=STEPS, residual=st.booleans())
def test_convolution(convolver: ctypes.CDLL, case: Case, outputs: int, step: int, residual: bool) -> None:
    rng, coordinates, shape, batch, window = case
    with using("native"):
        at = sparse.sites(coordinates, shape, batch)
        book = book_of(at, window)
        strided = not isinstance(window[0], int)
        sides = window if strided else (window, (1, 1, 1), tuple(k // 2 for k in window))
        bits, before, found = marked(convolver, coordinates, batch, shape, None, step)
        assert np.array_equal(found, at.coordinates)
        out_sites = found
        if strided:
            _, _, out_sites = marked(convolver, found, batch, book.outputs.shape, sides, step)
        assert np.array_equal(out_sites, book.outputs.coordinates)
        volume, m, channels = int(np.prod(book.kernel)), len(out_sites), 8
        neighbours = np.full((m, volume), 7, np.int32)
        words = conv_cuda.words_of(batch, *shape)[0]
        p = conv_cuda.Book(
            *map(address, (bits, before, out_sites, neighbours)), m, *shape, words,
            *((ctypes.c_int * 3)(*side) for side in sides),
        )  # fmt: skip
        function, grid, _ = conv_cuda.book_launch(p)
        launch(convolver, function, p, grid, step)
        position, source, target = book.pairs()
        expected = np.full((m, volume), -1, np.int32)
        expected[target, position] = source
        assert np.array_equal(neighbours, expected)

        features = rng.normal(size=(len(at), channels)).astype(np.float32)
        weight = rng.normal(size=(*book.kernel, channels, outputs)).astype(np.float32)
        bias = rng.normal(size=outputs).astype(np.float32)
        more = rng.normal(size=(m, outputs)).astype(np.float32) if residual else None
        exact = sparse.convolve(features, book, Weights(weight, bias), residual=more, relu=True)
        out = np.full((m, outputs), 7, np.float32)
        arrays = (neighbours, features, weight, None, bias, more, None, out, None)
        sizes = (m, volume, channels, outputs, 1)
        q = conv_cuda.Convolution(*map(address, arrays), 1.0, 1.0, *sizes)
        function, grid, _ = conv_cuda.convolution_launch(q, False)
        launch(convolver, function, q, grid, step)
        if sparse.isas()[0] != "portable":  # fused multiply-add on both
            assert np.array_equal(out, exact)
        np.testing.assert_allclose(out, exact, atol=1e-3, rtol=0)

        small = sparse.quantize(features, 0.03)
        weights = Weights8.quantize(weight, bias)
        more8 = rng.integers(-127, 128, (m, outputs)).astype(np.int8) if residual else None
        options = {"residual": more8, "residual_scale": 0.1, "out_scale": 0.5}
        exact8 = sparse.convolve8(small, 0.03, book, weights, **options)
        packed = weights._weight.reshape(volume, channels // 4, 4, outputs).transpose(0, 1, 3, 2).copy()
        out8 = np.full((m, outputs), 7, np.int8)
        scale = weights.scale * np.float32(0.03)
        arrays = (neighbours, small, packed, scale, bias, None, more8, None, out8)
        q = conv_cuda.Convolution(*map(address, arrays), 0.1, 0.5, *sizes[:4], 0)
        function, grid, _ = conv_cuda.convolution_launch(q, True)
        launch(convolver, function, q, grid, step)
        assert np.array_equal(out8, exact8)


@pytest.fixture(scope="module")
def devoxelizer(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    functions = {("Devoxelize", devoxel_cuda.Parameters): ("devoxelize_neighbours", "devoxelize")}
    return compiled("devoxelize", tmp_path_factory.mktemp("cuda"), functions)


@settings(deadline=None, max_examples=60)
@given(points=clouds(), case=cases(), center=st.sampled_from((0.0, 0.5)), step=STEPS)
def test_devoxelize(
    convolver: ctypes.CDLL, devoxelizer: ctypes.CDLL, points: np.ndarray, case: Case, center: float, step: int
) -> None:
    rng, coordinates, shape, batch, _ = case
    low, size, channels = (-1.0, -2.0, 0.0), (0.05, 0.5, 0.4), 5
    with using("numpy"):
        at = sparse.sites(coordinates, shape, batch)
        features = rng.normal(size=(len(at), channels)).astype(np.float32)
        around = devoxel.neighbours(points, at, low, size, center=center, batch=batch - 1)
        expected = devoxel.devoxelize(features, around)
    bits, before, _ = marked(convolver, coordinates, batch, shape, None, step)
    n = len(points)
    index, weight = np.full((n, 8), 7, np.int32), np.full((n, 8), 7, np.float32)
    out = np.full((n, channels), 7, np.float32)
    p = devoxel_cuda.Parameters(
        *map(address, (points, bits, before, index, weight, features, out)),
        (ctypes.c_float * 3)(*low), (ctypes.c_float * 3)(*size), center,
        n, points.shape[1], batch - 1, *shape, conv_cuda.words_of(batch, *shape)[0], channels,
    )  # fmt: skip
    for function, grid in devoxel_cuda.launches(p):
        launch(devoxelizer, function, p, grid, step)
    assert np.array_equal(index, around.index) and weight.tobytes() == around.weight.tobytes()
    assert out.tobytes() == expected.tobytes()
