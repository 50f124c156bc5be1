"""Shapes at which the kernels of the native engine take another path: tails of tiles, narrow tensors, first layers."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.backends.native import library
from edgekit.backends.native.format import Act, Op, OpType
from tests.native_nets import Picture, blank
from tests.test_native_kernels import curve, proves

pytestmark = pytest.mark.skipif(not library.path().exists(), reason="libedgekit.so was not built")

ACTS = [Act.none, Act.table, Act.curve]


def conv(
    size: tuple[int, int, int],
    outs: int,
    kernel: int,
    stride: int,
    pad: int,
    *,
    group: int = 1,
    act: Act,
    after: int = 0,
    kind: type = np.uint8,
) -> None:
    """One convolution of codes with random weights, compared on every instruction set."""
    rng = np.random.default_rng(size[0] + 31 * size[1] + outs)
    h, w, c = size
    oh, ow = (h + 2 * pad - kernel) // stride + 1, (w + 2 * pad - kernel) // stride + 1
    count = kernel * kernel * (c // group)
    constants: list[np.ndarray | None] = [
        rng.integers(-128, 128, (outs, kernel, kernel, c // group)).astype(np.int8),
        rng.integers(-5000, 5000, outs).astype(np.int32),
        (rng.uniform(0.5, 1.5, outs) * (60 if act == Act.curve else 1) / (75 * count**0.5)).astype(
            np.float32
        ),
    ]
    if act == Act.table:
        constants.append(rng.integers(0, 256, 256).astype(np.uint8))
    if act == Act.curve:
        constants.append(curve(rng))
    op = Op(
        OpType.conv, (), 0, act, (kernel,) * 2, (stride,) * 2, pad=(pad,) * 4, group=group, ints=(100,), constants=tuple(constants)
    )  # fmt: skip
    x = Picture(rng.integers(0, 256, (1, h, w, c)).astype(np.uint8), scale=0.1, zero=128, after=after)
    proves(op, [x], blank((1, oh, ow, outs), kind, scale=0.1, zero=3, after=after), 2)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("pixels", [1, 3, 4, 5, 7, 15, 17, 31, 191, 197])
def test_pointwise_tails(pixels: int, act: Act) -> None:
    for outs in (8, 16, 19, 24, 40, 64, 80):
        conv((1, pixels, 10), outs, 1, 1, 0, act=act, after=outs % 3)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("width", [6, 31, 32, 41, 76])
def test_first_layers(width: int, act: Act) -> None:
    conv((12, width, 3), 16, 6, 2, 2, act=act)
    conv((9, width, 3), 10, 6, 2, 1, act=act, after=5)
    conv((9, width, 3), 24, 3, 2, 1, act=act)
    conv((9, width, 6), 16, 3, 1, 1, act=act)  # lines of 18 bytes as well


@pytest.mark.parametrize("act", [Act.none, Act.silu])
@pytest.mark.parametrize("width", [3, 6, 31, 32, 41, 76])
def test_sums_that_stay_real(width: int, act: Act) -> None:
    conv((12, width, 3), 16, 6, 2, 2, act=act, kind=np.float32)
    conv((9, width, 3), 10, 6, 2, 2, act=act, kind=np.float32, after=5)
    for outs in (8, 24, 40, 64, 80):
        conv((1, width, 10), outs, 1, 1, 0, act=act, kind=np.float32, after=outs % 3)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("channels", [3, 8, 16, 24, 32, 58, 72, 96, 144])
def test_depthwise(channels: int, act: Act) -> None:
    for kernel, stride, width in (
        (3, 1, 3),
        (3, 1, 10),
        (3, 2, 17),
        (5, 1, 9),
        (5, 2, 12),
        (5, 1, 35),
        (5, 2, 137),
        (7, 1, 8),
    ):
        conv(
            (7, width, channels),
            channels,
            kernel,
            stride,
            kernel // 2,
            group=channels,
            act=act,
            after=channels % 5,
        )


@pytest.mark.parametrize("count", [20, 116, 232])
def test_channel_shuffles(count: int) -> None:
    rng = np.random.default_rng(count)
    order = np.arange(count).reshape(2, -1).T.ravel().astype(np.int32)
    x = Picture(rng.integers(0, 256, (1, 3, 5, count)).astype(np.uint8), scale=0.1, zero=0)
    for index in (order, order[: count // 2], rng.permutation(order)):
        op = Op(OpType.gather, (), 0, constants=(index,))
        proves(op, [x], blank((1, 3, 5, len(index)), scale=0.1, zero=0), 2)
