"""Sparse convolution against torch's dense one, against its numpy definition, and against itself on every
instruction set and thread count."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.kernels import sparse_conv as sparse
from edgekit.kernels.sparse_conv import Rulebook, Sites, Weights, Weights8
from tests.test_kernels import PATHS, using

Triple = tuple[int, int, int]
SHAPES: tuple[Triple, ...] = ((3, 4, 5), (5, 9, 70), (2, 3, 200), (9, 20, 64), (1, 1, 1))


def random_sites(rng: np.random.Generator, shape: Triple, batch: int, density: float) -> np.ndarray:
    """Coordinates in any order."""
    found = np.argwhere(rng.random((batch, *shape)) < density).astype(np.int32)
    rng.shuffle(found)
    return np.ascontiguousarray(found.reshape(-1, 4))


Case = tuple[np.random.Generator, np.ndarray, Triple, int, tuple[Triple, Triple, Triple] | Triple]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape, batch = draw(st.sampled_from(SHAPES)), draw(st.integers(1, 2))
    coordinates = random_sites(rng, shape, batch, draw(st.sampled_from((0.0, 0.02, 0.2, 1.0))))
    if draw(st.booleans()):
        return rng, coordinates, shape, batch, draw(st.sampled_from(((3, 3, 3), (1, 3, 5), (1, 1, 1))))
    sides = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
    kernel, stride, padding = draw(sides), draw(sides), tuple(p - 1 for p in draw(sides))
    if any(n + 2 * p < k for n, p, k in zip(shape, padding, kernel, strict=True)):
        kernel = (1, 1, 1)
    return rng, coordinates, shape, batch, (kernel, stride, padding)


def book_of(at: Sites, window: tuple[Triple, Triple, Triple] | Triple, threads: int = 0) -> Rulebook:
    if isinstance(window[0], int):
        return at.submanifold(window, threads=threads)
    return at.strided(*window, threads=threads)


def close(got: np.ndarray, expected: np.ndarray, magnitude: np.ndarray, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert np.all(np.abs(got - expected) <= tolerance * magnitude + 1e-30)


@settings(deadline=None, max_examples=150)
@given(case=cases(), channels=st.sampled_from((1, 5, 16, 33)), outputs=st.sampled_from((1, 16, 24, 70)))
def test_native_is_the_reference(case: Case, channels: int, outputs: int) -> None:
    rng, coordinates, shape, batch, window = case
    features = rng.normal(size=(len(coordinates), channels)).astype(np.float32)
    results, books = [], []
    for path in PATHS:
        with using(path):
            at = sparse.sites(coordinates, shape, batch)
            book = book_of(at, window)
            rng = np.random.default_rng(1)
            weight = rng.normal(size=(*book.kernel, channels, outputs)).astype(np.float32)
            bias = rng.normal(size=outputs).astype(np.float32)
            residual = rng.normal(size=(len(book.outputs), outputs)).astype(np.float32)
            weights, size = Weights(weight, bias), Weights(np.abs(weight), np.abs(bias))
            mine = features[at.order]
            result = sparse.convolve(mine, book, weights, residual=residual, relu=True)
            books.append((at.order, at.coordinates, book.outputs.coordinates, *book.pairs()))
            magnitude = sparse.convolve(np.abs(mine), book, size, residual=np.abs(residual))
            results.append(result)
            assert len(book) == len(book.pairs()[0])
            back = book.inverse()
            books[-1] += back.pairs()
            dense = np.full((batch, channels, *shape), np.nan, np.float32)
            assert sparse.to_dense(mine, at, out=dense) is dense
            assert np.array_equal(sparse.to_dense(mine, at), dense)
            assert dense.shape == (batch, channels, *shape) and np.count_nonzero(dense) == np.count_nonzero(
                mine
            )
            books[-1] += (dense,)
    for a, b in zip(*books, strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    close(results[1], results[0], magnitude)


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=40)
@given(case=cases())
def test_against_a_dense_convolution(path: str, case: Case) -> None:
    rng, coordinates, shape, batch, window = case
    channels, outputs = 5, 7
    features = rng.normal(size=(len(coordinates), channels)).astype(np.float32)
    with using(path):
        at = sparse.sites(coordinates, shape, batch)
        book = book_of(at, window)
        weight = (rng.normal(size=(*book.kernel, channels, outputs)) / 5).astype(np.float32)
        bias = rng.normal(size=outputs).astype(np.float32)
        mine = features[at.order]
        got = sparse.convolve(mine, book, Weights(weight, bias))
        stride = (1, 1, 1) if isinstance(window[0], int) else window[1]
        padding = tuple(k // 2 for k in window) if isinstance(window[0], int) else window[2]
        kernel = torch.from_numpy(np.ascontiguousarray(weight.transpose(4, 3, 0, 1, 2)))
        grid = torch.from_numpy(sparse.to_dense(mine, at))
        dense = torch.nn.functional.conv3d(grid, kernel, stride=stride, padding=padding).numpy()
        b, z, y, x = book.outputs.coordinates.T
        np.testing.assert_allclose(got, dense[b, :, z, y, x] + bias, atol=1e-4, rtol=0)
        assert book.outputs.shape == dense.shape[2:]
        if not isinstance(window[0], int):  # nothing is left out
            dense[b, :, z, y, x] = 0
            assert not dense.any()
        # the inverse is the transposed convolution, at the sites that were there
        up = (rng.normal(size=(*book.kernel, outputs, channels)) / 5).astype(np.float32)
        back = sparse.convolve(got, book.inverse(), Weights(up))
        coarse = np.zeros_like(dense)
        coarse[b, :, z, y, x] = got
        kernel = torch.from_numpy(np.ascontiguousarray(up.transpose(3, 4, 0, 1, 2)))
        rest = tuple(
            n - ((m - 1) * s - 2 * p + k)
            for n, m, s, p, k in zip(shape, dense.shape[2:], stride, padding, book.kernel, strict=True)
        )
        if all(0 <= r < s for r, s in zip(rest, stride, strict=True)):
            whole = torch.nn.functional.conv_transpose3d(
                torch.from_numpy(coarse), kernel, stride=stride, padding=padding, output_padding=rest
            ).numpy()
            b, z, y, x = at.coordinates.T
            np.testing.assert_allclose(back, whole[b, :, z, y, x], atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=60)
@given(case=cases(), channels=st.sampled_from((3, 16, 32)), outputs=st.sampled_from((16, 20, 64, 130)))
def test_same_bits_everywhere(case: Case, channels: int, outputs: int) -> None:
    rng, coordinates, shape, batch, window = case
    features = rng.normal(size=(len(coordinates), channels)).astype(np.float32)
    with using("native"):
        seen = set()
        for isa in sparse.isas():
            for threads in (1, 2, 5):
                at = sparse.sites(coordinates, shape, batch)
                book = book_of(at, window, threads)
                rng = np.random.default_rng(1)
                weight = rng.normal(size=(*book.kernel, channels, outputs)).astype(np.float32)
                weights = Weights(weight, rng.normal(size=outputs).astype(np.float32), isa=isa)
                result = sparse.convolve(features[at.order], book, weights, threads=threads)
                if isa != "portable":  # the only one without fused multiply-add
                    seen.add(result.tobytes())
                else:
                    portable = result
        if len(sparse.isas()) > 1:
            assert len(seen) == 1
            bound = 1e-4 * max(1.0, np.abs(portable).max(initial=0.0))
            assert np.allclose(
                portable, np.frombuffer(seen.pop(), np.float32).reshape(portable.shape), atol=bound
            )


@settings(deadline=None, max_examples=80)
@given(
    case=cases(),
    channels=st.sampled_from((1, 5, 16, 32)),
    outputs=st.sampled_from((1, 16, 24, 70)),
    residual_kind=st.sampled_from((None, np.int8, np.float32)),
    out_scale=st.sampled_from((None, 0.5, 30.0)),
)
def test_int8_is_the_reference(
    case: Case, channels: int, outputs: int, residual_kind: type | None, out_scale: float | None
) -> None:
    rng, coordinates, shape, batch, window = case
    features = rng.integers(-128, 128, (len(coordinates), channels)).astype(np.int8)
    results = []
    for path in PATHS:
        with using(path):
            for isa in sparse.isas() or ["auto"]:
                at = sparse.sites(coordinates, shape, batch)
                book = book_of(at, window)
                rng = np.random.default_rng(1)
                weight = rng.integers(-127, 128, (*book.kernel, channels, outputs)).astype(np.int8)
                scale = rng.uniform(0.001, 0.01, outputs).astype(np.float32)
                weights = Weights8(weight, scale, rng.normal(size=outputs).astype(np.float32), isa=isa)
                residual = None
                if residual_kind is not None:
                    residual = rng.integers(-127, 128, (len(book.outputs), outputs)).astype(residual_kind)
                results.append(
                    sparse.convolve8(
                        features[at.order], 0.07, book, weights, residual=residual, residual_scale=0.3,
                        relu=bool(outputs % 3), out_scale=out_scale, threads=2,
                    )
                )  # fmt: skip
    assert results[0].dtype == (np.float32 if out_scale is None else np.int8)
    for result in results[1:]:
        assert np.array_equal(result, results[0])


@pytest.mark.parametrize("path", PATHS)
def test_windows_far_outside(path: str) -> None:
    """Padding wider than a word of 64 cells, on both sides of rows that follow each other."""
    shape = (2, 3, 64)
    with using(path):
        at = sparse.sites(np.argwhere(np.ones((1, *shape))).astype(np.int32), shape)
        book = at.strided((1, 1, 2), (1, 1, 1), (0, 0, 150))
        assert book.outputs.shape == (2, 3, 363) and len(book.outputs) == 6 * 65
        position, source, target = book.pairs()
    assert len(position) == 2 * len(at)
    x_in, x_out = at.coordinates[source, 3], book.outputs.coordinates[target, 3]
    assert np.array_equal(x_out - 150 + position, x_in)
    assert np.array_equal(at.coordinates[source, :3], book.outputs.coordinates[target, :3])


def test_int8_is_near_float() -> None:
    rng = np.random.default_rng(3)
    coordinates = random_sites(rng, (9, 20, 64), 1, 0.2)
    at = sparse.sites(coordinates, (9, 20, 64))
    book = at.submanifold((3, 3, 3))
    features = np.abs(rng.normal(size=(len(at), 32))).astype(np.float32)
    weight = (rng.normal(size=(3, 3, 3, 32, 32)) / 20).astype(np.float32)
    exact = sparse.convolve(features, book, Weights(weight))
    scale = float(features.max()) / 127
    got = sparse.convolve8(sparse.quantize(features, scale), scale, book, Weights8.quantize(weight))
    noise = np.square(got - exact).mean() / np.square(exact).mean()
    assert noise < 1e-3


@pytest.mark.parametrize("path", PATHS)
def test_rulebooks_are_kept(path: str) -> None:
    with using(path):
        at = sparse.sites(random_sites(np.random.default_rng(0), (9, 20, 64), 1, 0.1), (9, 20, 64))
        books: list[Rulebook] = []
        threads = [threading.Thread(target=lambda: books.append(at.submanifold((3, 3, 3)))) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(30)
        assert len(books) == 4 and len({id(b._built) for b in books}) == 1
        assert at.submanifold((3, 3, 1))._built is not books[0]._built
        down = at.strided((3, 3, 3), (2, 2, 2), (1, 1, 1))
        assert at.strided((3, 3, 3), (2, 2, 2), (1, 1, 1)).outputs is down.outputs
        assert down.inverse()._built is down.inverse()._built
        assert down.inverse().outputs is at


@pytest.mark.parametrize("path", PATHS)
def test_all_goes_with_its_last_user(path: str) -> None:
    gc.disable()  # megabytes per sweep must not wait for it
    try:
        with using(path):
            at = sparse.sites(np.zeros((1, 4), np.int32), (9, 20, 64))
            book, down = at.submanifold((3, 3, 3)), at.strided((3, 3, 3), (2, 2, 2), (1, 1, 1))
            watched = weakref.ref(at), weakref.ref(down.outputs), weakref.ref(down.inverse()._built)
            del at, book, down
            assert [w() for w in watched] == [None, None, None]
    finally:
        gc.enable()


def test_batch_norm_is_folded() -> None:
    rng = np.random.default_rng(5)
    x = torch.from_numpy(rng.normal(size=(1, 4, 5, 6, 7)).astype(np.float32))
    conv, norm = torch.nn.Conv3d(4, 6, 3, padding=1), torch.nn.BatchNorm3d(6, eps=1e-3)
    norm.running_mean[:] = torch.randn(6)
    norm.running_var[:] = torch.rand(6) + 0.1
    norm.eval()
    with torch.no_grad():
        expected = norm(conv(x)).numpy()
        weight = conv.weight.numpy().transpose(2, 3, 4, 1, 0)
        folded = sparse.fold_batch_norm(
            weight, conv.bias.numpy(), norm.weight.numpy(), norm.bias.numpy(),
            norm.running_mean.numpy(), norm.running_var.numpy(), norm.eps,
        )  # fmt: skip
    at = sparse.sites(np.argwhere(np.ones((1, 5, 6, 7))).astype(np.int32), (5, 6, 7))
    b, z, y, x_ = at.coordinates.T
    rows = np.ascontiguousarray(x.numpy()[b, :, z, y, x_])
    got = sparse.convolve(rows, at.submanifold((3, 3, 3)), Weights(*folded))
    np.testing.assert_allclose(got, expected[b, :, z, y, x_], atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_wrong_arguments(path: str) -> None:
    c = np.array([[0, 0, 0, 1], [0, 0, 0, 0]], np.int32)
    with using(path):
        for wrong, message in (
            (c.astype(np.int64), "expected int32"),
            (c[:, :3], "expected int32"),
            (c[[0, 0]], "row 1 is there twice"),
            (c - 1, "row 0 is outside"),
            (c + np.array((0, 0, 0, 4), np.int32), "row 0 is outside"),
        ):
            with pytest.raises(UsageError, match=message):
                sparse.sites(wrong, (2, 3, 5))
        with pytest.raises(UsageError, match="sparse grid"):
            sparse.sites(c, (0, 3, 5))
        at = sparse.sites(c, (2, 3, 5))
        with pytest.raises(UsageError, match="odd sides"):
            at.submanifold((2, 3, 3))
        for kernel, stride, padding in (
            ((3, 3, 3), (1, 1, 1), (0, 0, 0)),
            ((1, 1, 16), (1, 1, 1), (0, 0, 9)),
            ((1, 1, 1), (0, 1, 1), (0, 0, 0)),
            ((1, 1, 1), (1, 1, 1), (-1, 0, 0)),
        ):
            with pytest.raises(UsageError, match="sparse"):
                at.strided(kernel, stride, padding)
        book, x = at.submanifold((1, 1, 3)), np.zeros((2, 4), np.float32)
        weights = Weights(np.zeros((1, 1, 3, 4, 6), np.float32))
        for call in (
            lambda: sparse.convolve(x[:1], book, weights),
            lambda: sparse.convolve(x.astype(float), book, weights),
            lambda: sparse.convolve(x, at.submanifold((1, 3, 1)), weights),
            lambda: sparse.convolve(x, book, weights, residual=x),
            lambda: sparse.to_dense(x[:1], at),
            lambda: sparse.to_dense(x, at, out=np.empty((1, 4, 2, 3, 4), np.float32)),
            lambda: sparse.to_dense(x, at, out=np.empty((1, 4, 2, 3, 5))),
            lambda: Weights(np.zeros((3, 3, 3, 1, 1))),
            lambda: Weights(np.zeros((3, 3, 3, 1, 1), np.float32), np.zeros(2, np.float32)),
            lambda: Weights8(np.full((1, 1, 3, 4, 6), -128, np.int8), np.ones(6, np.float32)),
            lambda: Weights8(np.zeros((1, 1, 3, 4, 6), np.int8), np.zeros(6, np.float32)),
        ):
            with pytest.raises(UsageError):
                call()
        bytes_ = Weights8(np.zeros((1, 1, 3, 4, 6), np.int8), np.ones(6, np.float32))
        with pytest.raises(UsageError, match="positive scales"):
            sparse.convolve8(x.astype(np.int8), 0.0, book, bytes_)
