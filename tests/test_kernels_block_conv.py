"""Convolution of pruned weights against its numpy definition and torch, on every instruction set and thread count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.kernels import block_conv
from edgekit.kernels.block_conv import BlockConv, BlockConv8, kept
from tests.test_kernels import PATHS, using

Case = dict


def punched(
    rng: np.random.Generator, weight: np.ndarray, share: float, filters: int, channels: int
) -> np.ndarray:
    """`weight` without about `share` of its blocks."""
    o, c = (-(-n // b) for n, b in zip(weight.shape, (filters, channels), strict=False))
    mask = (rng.random((o, c, *weight.shape[2:])) >= share).repeat(filters, 0).repeat(channels, 1)
    return weight * mask[: weight.shape[0], : weight.shape[1]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kernel = draw(st.sampled_from(((1, 1), (3, 3), (3, 3), (1, 3), (5, 2))))
    sides = tuple(draw(st.integers(0, k - 1)) for k in (*kernel, *kernel))
    low = tuple(max(1, k - a - b) for k, a, b in zip(kernel, sides[:2], sides[2:], strict=True))
    size = tuple(draw(st.integers(n, n + draw(st.sampled_from((2, 13, 30))))) for n in low)
    return {
        "rng": np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        "shape": (draw(st.integers(1, 19)), draw(st.integers(1, 11)), *kernel),
        "how": {
            "size": size, "stride": draw(st.sampled_from(((1, 1), (2, 2), (1, 3)))), "padding": sides,
            "relu": draw(st.booleans()),
        },
        "share": draw(st.sampled_from((0.0, 0.5, 0.9, 1.0))),
        "block": draw(st.sampled_from((8, 1))),
    }  # fmt: skip


@settings(deadline=None, max_examples=120)
@given(case=cases())
def test_native_is_the_reference(case: Case) -> None:
    rng, how, block = case["rng"], case["how"], case["block"]
    weight = punched(rng, rng.normal(size=case["shape"]).astype(np.float32), case["share"], block, 1)
    bias = rng.normal(size=len(weight)).astype(np.float32)
    x = rng.normal(size=(weight.shape[1], *how["size"])).astype(np.float32)
    with using("numpy"):
        want = BlockConv(weight, bias, **how)(x)
        size = BlockConv(np.abs(weight), np.abs(bias), **how)(np.abs(x))
    with using("native"):
        bits = {}
        for isa in block_conv.isas():
            layer = BlockConv(weight, bias, block=block, isa=isa, **how)
            out = np.full_like(want, np.nan)
            assert layer(x, out, threads=1) is out
            for threads in (2, 3):
                assert np.array_equal(layer(x, threads=threads), out)
            assert np.all(np.abs(out - want) <= 1e-5 * size + 1e-30), isa
            bits[isa] = out
        fused = [v for k, v in bits.items() if k != "portable"]
        assert all(np.array_equal(fused[0], v) for v in fused)


@settings(deadline=None, max_examples=120)
@given(case=cases(), zeros=st.tuples(st.integers(0, 255), st.integers(0, 255)))
def test_int8_is_the_reference_to_the_bit(case: Case, zeros: tuple[int, int]) -> None:
    rng, how = case["rng"], case["how"]
    weight = punched(rng, rng.integers(-127, 128, case["shape"]).astype(np.int8), case["share"], 8, 4)
    bias = rng.integers(-20000, 20000, len(weight)).astype(np.int32)
    scale = rng.uniform(1e-4, 1e-2, len(weight)).astype(np.float32)
    x = rng.integers(0, 256, (weight.shape[1], *how["size"])).astype(np.uint8)
    with using("numpy"):
        want = BlockConv8(weight, bias, scale, *zeros, **how)(x)
    with using("native"):
        for isa in block_conv.isas():
            layer = BlockConv8(weight, bias, scale, *zeros, isa=isa, **how)
            for threads in (1, 2, 3):
                assert np.array_equal(layer(x, threads=threads), want), isa


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (2, 0)])
def test_against_torch(path: str, stride: int, padding: int) -> None:
    rng = np.random.default_rng(0)
    weight = punched(rng, rng.normal(size=(16, 8, 3, 3)).astype(np.float32), 0.5, 8, 4)
    bias, x = rng.normal(size=16).astype(np.float32), rng.normal(size=(8, 23, 41)).astype(np.float32)
    want = torch.conv2d(*map(torch.from_numpy, (x[None], weight, bias)), stride=stride, padding=padding)[
        0
    ].relu()
    with using(path):
        layer = BlockConv(
            weight, bias, size=(23, 41), stride=(stride, stride), padding=(padding,) * 4, relu=True
        )
        np.testing.assert_allclose(layer(x), want.numpy(), atol=1e-4, rtol=0)


def test_only_what_is_kept_is_multiplied() -> None:
    rng = np.random.default_rng(1)
    weight = punched(rng, rng.normal(size=(32, 16, 3, 3)).astype(np.float32), 0.75, 8, 4)
    codes = np.clip(weight * 50, -127, 127).astype(np.int8)
    codes[(weight != 0) & (codes == 0)] = 1
    alone = weight.copy()
    alone[0] = 1  # one filter of the first block is dense
    assert kept(weight) == kept(weight, 8, 4) == np.count_nonzero(weight) / weight.size
    assert kept(alone) > kept(weight) and kept(alone, 1) == np.count_nonzero(alone) / alone.size
    with using("native"):
        for values, block in ((weight, 8), (alone, 8), (alone, 1)):
            made = BlockConv(values, size=(9, 9), block=block)._made
            assert made.kept == kept(values, block) * values.size
        scale = np.ones(32, np.float32)
        made = BlockConv8(codes, np.zeros(32, np.int32), scale, 0, 0, size=(9, 9))._made
        assert made.kept == kept(weight, 8, 4) * weight.size


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"padding": (3, 0, 0, 0)}, "padding"),
        ({"size": (2, 2)}, "nothing comes out"),
        ({"stride": (0, 1)}, "out of range"),
        ({"block": 4}, "blocks of 4"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, says: str) -> None:
    weight = np.zeros((8, 4, 3, 3), np.float32)
    with pytest.raises(UsageError, match=says):
        BlockConv(weight, **{"size": (8, 8), **change})
    with pytest.raises(UsageError, match="float32"):
        BlockConv(weight.astype(np.float64), size=(8, 8))
    with pytest.raises(UsageError, match="float32"):
        BlockConv(weight, size=(8, 8))(np.zeros((4, 8, 9), np.float32))
