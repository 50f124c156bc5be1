"""Weights in few bits: published golden values, exact sizes, what is decoded is what was meant, and no bytes hurt."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit import codecs
from edgekit.codecs import Encoded, decode, from_json, pack, unpack
from edgekit.compression.codecs import encode, error, kmeans, quantized, scheme, ternary_threshold
from edgekit.errors import BundleError, UsageError

I = np.arange(1, 65)  # noqa: E741
VECTOR = (np.sin(I) * (1 + 0.1 * (I % 7))).astype(np.float32)
"""The reference's test vector."""
EVERY = (
    "float32", "float16", "int2", "int3", "int4", "int5", "int8", "binary", "ternary", "ternary-2", "abc-2", "abc-5",
    "kmeans-2", "kmeans-5", "kmeans-16", "kmeans-256", "pow2-3", "pow2-5", "2:4+float32", "1:4+int8", "3:8+kmeans-4",
    "sparse+ternary", "sparse+kmeans-16", "blocks+float16", "blocks+binary",
)  # fmt: skip


def scales(packed: Encoded, count: int) -> np.ndarray:
    return np.frombuffer(packed.data, "<f4", count)


@pytest.mark.parametrize(
    ("name", "expected", "wrong"),
    [
        ("binary", [0.8336], 0.4457),
        ("ternary", [1.0671], 0.3118),
        ("abc-2", [0.5795, 0.6317], 0.4813),
        ("abc-3", [0.3418, 0.5200, 0.3494], 0.2497),
        ("int3", [0.5332], 0.1672),
        ("int4", [0.22852], 0.0679),
        ("int8", [0.0126], 0.0040),
        ("pow2-5", [1.5996], 0.2120),
        ("kmeans-4", [-1.1821, -0.5196, 0.3573, 1.1070], 0.2349),
    ],
)
def test_golden_values(name: str, expected: list[float], wrong: float) -> None:
    packed = encode(VECTOR, name)
    np.testing.assert_allclose(scales(packed, len(expected)), expected, atol=1e-3)
    assert error(VECTOR, decode(packed)) == pytest.approx(wrong, abs=1e-3)


def test_golden_details() -> None:
    assert ternary_threshold(VECTOR[None], 1)[0] == pytest.approx(0.5835, abs=1e-3)
    assert np.count_nonzero(quantized(VECTOR, "ternary")) == 44
    assert np.log2(np.abs(quantized(VECTOR, "pow2-5")) / np.abs(VECTOR).max()).min() == -7
    assert encode(VECTOR, "kmeans-4").nbytes == 32  # 16 of indices, 16 of codebook
    two_of_four = quantized(VECTOR.reshape(1, 64), "2:4+float32")
    assert np.abs(two_of_four).sum() / np.abs(VECTOR).sum() == pytest.approx(0.6903, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("binary", 0.603), ("abc-2", 0.518), ("abc-3", 0.345), ("abc-4", 0.299), ("abc-5", 0.279), ("ternary", 0.439),
     ("pow2-4", 0.207), ("int3", 0.321), ("int4", 0.138), ("int8", 0.008), ("kmeans-4", 0.345), ("kmeans-16", 0.101)],
)  # fmt: skip
def test_errors_on_gaussian_weights(name: str, expected: float) -> None:
    """The reference's table. That of absmax depends on how many share a scale: here 1152, a filter of 128 x 3 x 3."""
    weight = np.random.default_rng(0).normal(size=(16, 1152)).astype(np.float32)
    assert error(weight, quantized(weight, name)) == pytest.approx(expected, abs=0.02)


def size_of(name: str, shape: tuple[int, ...], kept: int = 0) -> int:
    """Bytes by the formats' table, written down again."""
    n, rows = math.prod(shape), shape[0] if len(shape) > 1 else 1
    table = {
        "float32": 4 * n, "float16": 2 * n, "int4": 4 * rows + -(-n * 4 // 8), "int8": 4 * rows + n,
        "binary": 4 * rows + -(-n // 8), "ternary": 4 * rows + -(-n // 4), "ternary-2": 8 * rows + -(-n // 4),
        "abc-3": 12 * rows + 3 * -(-n // 8), "kmeans-16": 64 + -(-n // 2), "kmeans-5": 20 + -(-n * 3 // 8),
        "pow2-5": 4 * rows + -(-n * 5 // 8), "2:4+float32": -(-n // 2 * 2 // 8) + 4 * (n // 2),
        "1:4+int8": -(-n // 4 * 2 // 8) + 4 + n // 4, "sparse+kmeans-16": -(-n // 8) + 64 + -(-kept // 2),
    }  # fmt: skip
    return table[name]


@pytest.mark.parametrize(
    "name",
    ["float32", "float16", "int4", "int8", "binary", "ternary", "ternary-2", "abc-3", "kmeans-16", "kmeans-5", "pow2-5",
     "2:4+float32", "1:4+int8", "sparse+kmeans-16"],
)  # fmt: skip
def test_sizes_are_exact(name: str) -> None:
    weight = np.random.default_rng(1).normal(size=(7, 12, 3, 3)).astype(np.float32)
    weight[np.abs(weight) < 0.7] = 0
    packed = encode(weight, name)
    assert packed.nbytes == len(packed.blob()) == size_of(name, weight.shape, np.count_nonzero(weight))


def test_blocks_store_one_bit_for_32_kernels() -> None:
    weight = np.random.default_rng(2).normal(size=(16, 8, 3, 3)).astype(np.float32)
    weight[:8, :4, 0, 0] = 0
    weight[8:, 4:, :, 1] = 0
    packed = encode(weight, "blocks+float32")
    assert len(packed.data) == -(-2 * 2 * 9 // 8) and packed.nbytes == len(packed.data) + 4 * (36 - 4) * 32
    assert np.array_equal(decode(packed), weight)


Weight = tuple[str, np.ndarray]


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    name = draw(st.sampled_from(EVERY))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    across = draw(st.sampled_from((8, 16))) if ":" in name else draw(st.integers(1, 9))
    tail = draw(st.sampled_from(((), (1, 1), (3, 3), (5,))))
    shape = (draw(st.integers(1, 17)), across, *tail)
    weight = rng.normal(size=shape).astype(np.float32) * np.float32(draw(st.sampled_from((1e-4, 1, 300))))
    weight[rng.random(shape) < draw(st.sampled_from((0, 0.5, 0.95, 1)))] = 0
    return name, weight


@settings(deadline=None, max_examples=300)
@given(case=weights(), axis=st.sampled_from((None, 0, 1)))
def test_what_is_decoded_stays(case: Weight, axis: int | None) -> None:
    """Through JSON and bytes; and encoding what was decoded gives the same bits again."""
    name, weight = case
    packed = encode(weight, name, axis)
    found = decode(from_json(json.loads(json.dumps(packed.to_json())), packed.blob()))
    assert found.dtype == np.float32 and found.shape == weight.shape and found.flags.c_contiguous
    assert error(weight, found) <= 1.0 or "pow2" in name
    if not name.startswith("abc"):  # whose signs are fitted anew
        again = decode(encode(found, name, axis))
        assert np.array_equal(again, found)
    if "+" in name and "binary" not in name:
        assert not found[weight == 0].any()


def plain(name: str, weight: np.ndarray) -> np.ndarray:
    """What the papers say, per output channel, without codes."""
    rows = weight.reshape(len(weight), -1)
    size = np.abs(rows)
    if name == "binary":
        found = np.where(rows < 0, -1, 1) * size.mean(axis=1, dtype=np.float64).astype(np.float32)[:, None]
    elif name == "ternary":
        kept = size > 0.7 * size.mean(axis=1, keepdims=True, dtype=np.float64)
        scale = (np.where(kept, size, 0).sum(axis=1, dtype=np.float64) / kept.sum(axis=1)).astype(np.float32)
        found = np.sign(rows) * kept * scale[:, None]
    elif name == "pow2-4":
        scale = size.max(axis=1, keepdims=True)
        shift = np.clip(np.round(np.log2(size.astype(np.float64) / scale)), -7, 0)
        found = np.sign(rows) * scale * np.exp2(shift)
    elif name == "int4":
        scale = size.max(axis=1, keepdims=True) / np.float32(7)
        found = np.round(rows / scale) * scale
    else:
        book = kmeans(weight, 16)
        found = book[np.abs(rows[..., None].astype(np.float64) - book).argmin(-1)]
    return found.astype(np.float32).reshape(weight.shape)


@pytest.mark.parametrize("name", ["binary", "ternary", "pow2-4", "int4", "kmeans-16"])
def test_decoded_is_the_quantized_weight(name: str) -> None:
    for seed in range(5):
        weight = np.random.default_rng(seed).normal(size=(6, 8, 3, 3)).astype(np.float32)
        np.testing.assert_array_equal(decode(encode(weight, name)), plain(name, weight))


def test_kmeans_finds_a_local_optimum() -> None:
    weight = np.random.default_rng(3).normal(size=2000).astype(np.float32)
    book = kmeans(weight, 16)
    at = np.abs(weight[:, None] - book).argmin(1)
    np.testing.assert_allclose(book, [weight[at == i].mean() for i in range(16)], atol=1e-5)
    assert np.array_equal(kmeans(weight, 16, book), book)


def test_zeros_of_a_mask_stay_zero() -> None:
    weight = np.random.default_rng(4).normal(size=(8, 8, 3, 3)).astype(np.float32)
    weight[np.abs(weight) < 1] = 0
    for name in ("kmeans-4", "pow2-4", "int4", "ternary"):
        assert not quantized(weight, name)[weight == 0].any(), name


@pytest.mark.parametrize(
    "name", ["kmeans", "kmeans-1", "kmeans-257", "kmeans-K", "int9", "abc-9", "ternery", "2:4", "4:2+int8", "x+int8", "2:4+2:4+int8", ""]
)  # fmt: skip
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="codec"):
        scheme(name)


def test_of_equal_weights_the_lower_index_is_kept() -> None:
    assert quantized(np.ones((1, 32), np.float32), "4:16+float32").tolist() == [([1.0] * 4 + [0.0] * 12) * 2]


def test_a_trained_value_below_the_threshold_is_kept() -> None:
    weight = np.array([[1, 0, -0.01, 0], [0, -3, 0.02, -3]], np.float32)
    assert np.array_equal(quantized(weight, "ternary-2"), weight)


def test_channels_that_nm_does_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match="no multiple of 4"):
        encode(np.ones((8, 3, 3, 3), np.float32), "2:4+int8")


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=50))
def test_bits_are_packed_from_the_lowest_on(bits: int, values: list[int]) -> None:
    codes = np.array(values, np.uint8) & np.uint8((1 << bits) - 1)
    packed = pack(codes, bits)
    number = sum(int(c) << (bits * i) for i, c in enumerate(codes))
    assert packed == number.to_bytes(codecs.packed_size(len(codes), bits), "little")
    assert np.array_equal(unpack(packed, len(codes), bits), codes)


GOOD = encode(np.random.default_rng(5).normal(size=(4, 8, 1, 1)).astype(np.float32), "kmeans-5")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (replace(GOOD, codec="huffman"), "unknown"),
        (replace(GOOD, data=GOOD.data[:-1]), "expected 32 bytes, got 31"),
        (replace(GOOD, data=GOOD.data + b"\0"), "expected 32 bytes, got 33"),
        (replace(GOOD, data=GOOD.data[:20] + b"\xff" * 12), "indices below 5"),
        (replace(GOOD, data=b"\0\0\x80\x7f" * 5 + b"\0" * 12), "no number"),
        (replace(GOOD, shape=(1 << 30,)), "expected 1 to"),
        (replace(GOOD, shape=()), "expected 1 to"),
        (replace(GOOD, shape=(4, 0)), "expected 1 to"),
        (replace(GOOD, settings={"levels": 1}), "levels"),
        (replace(GOOD, settings={}), "settings"),
        (replace(GOOD, axis=0), "no scales"),
        (replace(GOOD, values=GOOD), "values"),
        (Encoded("nm", (4, 8), b"\0" * 4, None, {"n": 2, "m": 4, "along": 1}, GOOD), "ascending"),
        (Encoded("nm", (4, 6), b"\0" * 4, None, {"n": 2, "m": 4, "along": 1}, GOOD), "does not fit"),
        (Encoded("sparse", (8,), b"\x01", None, {"rows": 1, "columns": 1}, GOOD), "expected 1 values"),
        (Encoded("ternary", (4,), b"\0\0\0\0\xff", None, {"signs": 1}), "got 3"),
        (Encoded("ternary", (3,), b"\0\0\0\0\x40", None, {"signs": 1}), "behind the last"),
        (Encoded("int", (2,), b"\0\0\0\0\x08", None, {"bits": 4}), "got -8"),
    ],
)  # fmt: skip
def test_bad_data_is_refused(bad: Encoded, says: str) -> None:
    with pytest.raises(BundleError, match=says):
        decode(bad)


numbers = st.integers(-2, 40)
trees = st.recursive(
    st.fixed_dictionaries(
        {"codec": st.sampled_from((*codecs.SETTINGS, "x")), "shape": st.lists(numbers, max_size=4), "bytes": numbers},
        optional={
            "axis": st.none() | numbers,
            "settings": st.dictionaries(
                st.sampled_from([k for s in codecs.SETTINGS.values() for k in s]), numbers, max_size=3
            ),
        },
    ),
    lambda inner: st.builds(lambda tree, value: {**tree, "values": value}, inner, inner),
    max_leaves=2,
)  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(tree=trees, data=st.binary(max_size=64), good=st.sampled_from(EVERY), at=st.integers(0, 10_000))
def test_no_bytes_do_harm(tree: dict, data: bytes, good: str, at: int) -> None:
    """Whatever is decoded gives numbers or BundleError: made up, and altered by one byte."""
    weight = np.random.default_rng(at).normal(size=(3, 8, 2)).astype(np.float32)
    packed = encode(weight, good)
    blob = bytearray(packed.blob())
    blob[at % len(blob)] ^= 1 + at % 255
    header = packed.to_json()
    for head, body in (
        (tree, data),
        (header, bytes(blob)),
        (header, data),
        ({**header, **tree}, bytes(blob)),
    ):
        try:
            found = decode(from_json(head, body))
        except BundleError as refused:
            assert len(str(refused).splitlines()) == 1 and len(str(refused)) < 300  # noqa: PT017 - either may happen
        else:
            assert found.shape == tuple(head["shape"]) and np.isfinite(found).all()


def test_the_device_half_needs_numpy_only() -> None:
    import ast
    import inspect

    names = [
        n.module for n in ast.walk(ast.parse(inspect.getsource(codecs))) if isinstance(n, ast.ImportFrom)
    ]
    assert set(names) <= {"__future__", "collections.abc", "dataclasses", "typing", "edgekit.errors"}
