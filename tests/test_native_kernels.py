"""Every operator of the native engine gives the bits of numpy's version, on every instruction set and with any threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.backends.native import library
from edgekit.backends.native.format import Act, Op, OpType
from tests.native_nets import Picture, blank, isas, one_op, run
from tests.native_reference import REFERENCE, F

pytestmark = pytest.mark.skipif(not library.path().exists(), reason="libedgekit.so was not built")
ISAS = isas() if library.path().exists() else []
EXAMPLES = settings(
    max_examples=int(os.environ.get("EDGEKIT_EXAMPLES", "40")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)
Draw = Callable[..., Any]
FLOATS = [a for a in Act if a >= Act.relu]


@pytest.fixture(autouse=True)
def split_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small steps, too, are split among threads."""
    monkeypatch.setenv("EDGEKIT_NATIVE_SPLIT", "0")


def proves(op: Op, inputs: list[Picture | None], out: Picture, threads: int) -> None:
    """Runs the operator on every instruction set."""
    with np.errstate(invalid="ignore"):
        want = REFERENCE[op.type](op, inputs, out)
    assert want.shape == out.values.shape and want.dtype == out.values.dtype
    payload = one_op(op, inputs, out)
    for isa in ISAS:
        for count in {1, threads}:
            got = run(payload, inputs, out, isa, count)
            if got.tobytes() != want.tobytes():
                wrong = np.argwhere(got.view(f"u{got.itemsize}") != want.view(f"u{got.itemsize}"))
                where = tuple(wrong[0])
                raise AssertionError(
                    f"{isa}, {count} threads: {len(wrong)} of {got.size} differ, first {where}: {got[where]}, not {want[where]}"
                )


def rng_of(draw: Draw) -> np.random.Generator:
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


def place(draw: Draw) -> dict[str, int]:
    """How a picture lies in its buffer."""
    return {"before": draw(st.sampled_from([0, 0, 1, 16, 37])), "after": draw(st.sampled_from([0, 0, 3, 64])),
            "lead": draw(st.sampled_from([0, 0, 5]))}  # fmt: skip


def quant(draw: Draw) -> dict[str, Any]:
    return {
        "scale": draw(st.sampled_from([0.003, 0.1, 2.5])),
        "zero": draw(st.sampled_from([0, 1, 100, 128, 255])),
    }


def codes(draw: Draw, rng: np.random.Generator, shape: tuple[int, ...]) -> Picture:
    """Random codes; sometimes only the largest and the smallest."""
    values = rng.integers(0, 256, shape) if draw(st.integers(0, 3)) else rng.integers(0, 2, shape) * 255
    return Picture(values.astype(np.uint8), **quant(draw), **place(draw))


def reals(draw: Draw, rng: np.random.Generator, shape: tuple[int, ...], spread: float = 3.0) -> Picture:
    return Picture(rng.normal(0, spread, shape).astype(np.float32), **place(draw))


def maybe_table(draw: Draw, rng: np.random.Generator) -> tuple[np.ndarray | None, ...]:
    return (rng.integers(0, 256, 256).astype(np.uint8),) if draw(st.booleans()) else ()


channels = st.one_of(st.integers(1, 20), st.sampled_from([16, 24, 32, 48, 58, 64, 65, 96, 116, 128, 130]))
sizes = st.integers(1, 13)
threads = st.integers(1, 3)
batches = st.sampled_from([1, 1, 1, 2])


def shape_of(draw: Draw) -> tuple[int, int, int, int]:
    return draw(batches), draw(sizes), draw(sizes), draw(channels)


def window(draw: Draw, h: int, w: int, most: int = 7) -> tuple[dict[str, Any], tuple[int, int]] | None:
    """Kernel, stride, dilation, pads and the size of the output; None where no window fits."""
    k = (draw(st.sampled_from([1, 2, 3, 3, 5, most])),) * 2
    if draw(st.integers(0, 4)) == 0:
        k = (k[0], draw(st.sampled_from([1, 3])))
    stride = (draw(st.sampled_from([1, 1, 2, 3])),) * 2
    dilation = (draw(st.sampled_from([1, 1, 1, 2])),) * 2
    extents = [d * (n - 1) + 1 for d, n in zip(dilation, k, strict=True)]
    if draw(st.booleans()):
        pad = [e // 2 for e in extents] * 2
    else:
        pad = [draw(st.integers(0, e - 1)) for e in extents * 2]
    out = [(size + pad[i] + pad[i + 2] - extents[i]) // stride[i] + 1 for i, size in enumerate((h, w))]
    if min(out) < 1 or any(s + pad[i] + pad[i + 2] < extents[i] for i, s in enumerate((h, w))):
        return None
    return {"kernel": k, "stride": stride, "dilation": dilation, "pad": tuple(pad)}, (out[0], out[1])


def curve(rng: np.random.Generator) -> np.ndarray:
    smooth = np.cumsum(rng.integers(-300, 400, 65)).clip(-32768, 32767)
    return np.concatenate([smooth[:-1], np.diff(smooth)]).clip(-32768, 32767).astype(np.int16)


def a_conv(draw: Draw, kind: str, act: Act, f32: bool = False) -> tuple[Op, list[Picture | None], Picture]:
    rng = rng_of(draw)
    n, h, w = draw(batches), draw(sizes), draw(sizes)
    group, each, outs = 1, draw(channels), draw(channels)
    if kind == "depthwise":
        group, each, outs = draw(channels), 1, draw(st.sampled_from([1, 1, 1, 2]))
    elif kind == "grouped":
        group, each, outs = draw(st.integers(2, 5)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    elif kind == "stem":
        each = 3
    elif kind == "wide":  # rows of several tiles, also of the narrow ones
        h, w = draw(st.integers(1, 6)), draw(st.integers(14, 75))
        each, outs = (
            draw(st.sampled_from([1, 2, 3, 3, 4, 6, 8, 16])),
            draw(st.sampled_from([7, 16, 24, 64, 80])),
        )
    found = None if kind == "pointwise" else window(draw, h, w, 6 if kind == "wide" else 7)
    shape, (oh, ow) = found or ({}, (h, w))
    if kind == "pointwise" and draw(st.integers(0, 5)) == 0:
        shape, oh, ow = {"stride": (2, 2)}, (h + 1) // 2, (w + 1) // 2
    x = codes(draw, rng, (n, h, w, group * each))
    inputs: list[Picture | None] = [x]
    ints = [draw(st.integers(0, 255)), 0, 0]
    scalars: tuple[float, ...] = ()
    total_in = each
    kernel = shape.get("kernel", (1, 1))
    if kind == "pointwise" and not shape and draw(st.integers(0, 3)) == 0:
        more = codes(draw, rng, (n, h, w, draw(channels)))
        more.scale, more.zero = x.scale, x.zero
        inputs, ints[2] = [x, None, more], 1
        total_in += more.values.shape[3]
    weights = rng.integers(-128, 128, (group * outs, *kernel, total_in)).astype(np.int8)
    spread = 74 * np.sqrt(total_in * kernel[0] * kernel[1]) * 120
    bias = rng.normal(0, spread / 2, group * outs).astype(np.int32)
    wide = 10000 if act == Act.curve else 60
    m = (rng.uniform(0.5, 2, group * outs) * wide / spread).astype(np.float32)
    constants: list[np.ndarray | None] = [weights, bias, m]
    if act == Act.table:
        constants.append(rng.integers(0, 256, 256).astype(np.uint8))
    if act == Act.curve:
        constants.append(curve(rng))
        ints[0] = draw(st.sampled_from([0, 5000, 16384, 32767, -100]))
    if f32:
        scalars = 0.0, 0.0, draw(st.sampled_from([0.01, 0.25])), 0.5
    elif draw(st.booleans()):
        residual = codes(draw, rng, (n, oh, ow, group * outs))
        inputs[1:2] = [residual]
        ints[1], scalars = draw(st.integers(0, 255)), (draw(st.floats(0.1, 2)), draw(st.floats(0.1, 2)))
        if table := maybe_table(draw, rng):
            constants += [None] * (4 - len(constants)) + [table[0]]
    out = blank((n, oh, ow, group * outs), np.float32 if f32 else np.uint8, **quant(draw), **place(draw))
    return Op(OpType.conv, (), 0, act, group=group, ints=tuple(ints), scalars=tuple(float(F(s)) for s in scalars),
              constants=tuple(constants), **shape), inputs, out  # fmt: skip


@pytest.mark.parametrize("act", [Act.none, Act.table, Act.curve])
@pytest.mark.parametrize("kind", ["pointwise", "dense", "stem", "wide", "depthwise", "grouped"])
@EXAMPLES
@given(data=st.data())
def test_conv(kind: str, act: Act, data: st.DataObject) -> None:
    proves(*a_conv(data.draw, kind, act), data.draw(threads))


@EXAMPLES
@given(data=st.data(), kind=st.sampled_from(["pointwise", "dense", "wide", "depthwise", "grouped"]))
def test_conv_to_reals(data: st.DataObject, kind: str) -> None:
    act = data.draw(st.sampled_from([Act.none, Act.silu, *FLOATS]))
    proves(*a_conv(data.draw, kind, act, f32=True), data.draw(threads))


def two(draw: Draw, make: Any) -> tuple[np.random.Generator, list[Picture | None]]:
    rng, shape = rng_of(draw), shape_of(draw)
    return rng, [make(draw, rng, shape), make(draw, rng, shape)]


@EXAMPLES
@given(data=st.data())
def test_add(data: st.DataObject) -> None:
    draw = data.draw
    rng, inputs = two(draw, codes)
    assert inputs[0] is not None
    scalars = tuple(float(F(draw(st.floats(0.01, 3)))) for _ in range(2))
    out = blank(inputs[0].values.shape, **quant(draw), **place(draw))
    proves(
        Op(OpType.add, (), 0, scalars=scalars, constants=maybe_table(draw, rng)), inputs, out, draw(threads)
    )


@pytest.mark.parametrize("one", [False, True])
@EXAMPLES
@given(data=st.data())
def test_mul(one: bool, data: st.DataObject) -> None:
    draw = data.draw
    rng, inputs = two(draw, codes)
    a, b = inputs
    assert a is not None and b is not None
    if one:
        b.values = b.values[:, :1, :1]
    scalar = float(F(draw(st.floats(1e-4, 0.1))))
    out = blank(a.values.shape, **quant(draw), **place(draw))
    proves(
        Op(OpType.mul, (), 0, scalars=(scalar,), constants=maybe_table(draw, rng)), inputs, out, draw(threads)
    )


@EXAMPLES
@given(data=st.data())
def test_table_and_dequantize(data: st.DataObject) -> None:
    draw = data.draw
    rng, shape = rng_of(draw), shape_of(draw)
    x = codes(draw, rng, shape)
    table = rng.integers(0, 256, 256).astype(np.uint8)
    proves(
        Op(OpType.table, (), 0, constants=(table,)),
        [x],
        blank(shape, **quant(draw), **place(draw)),
        draw(threads),
    )
    floats = rng.normal(0, 1, 256).astype(np.float32)
    proves(
        Op(OpType.dequantize, (), 0, constants=(floats,)),
        [x],
        blank(shape, np.float32, **place(draw)),
        draw(threads),
    )


@EXAMPLES
@given(data=st.data())
def test_quantize(data: st.DataObject) -> None:
    draw = data.draw
    rng, shape = rng_of(draw), shape_of(draw)
    x = reals(draw, rng, shape, draw(st.sampled_from([1.0, 100.0])))
    odd = [np.nan, np.inf, -np.inf, 3e38, -3e38, 0.5, -0.5, 2.5]
    x.values.flat[:: max(1, x.values.size // 8)] = [
        odd[i % 8] for i in range(len(x.values.flat[:: max(1, x.values.size // 8)]))
    ]
    scalar = draw(st.sampled_from([1.0, 127.5, 0.01]))
    out = blank(shape, **quant(draw), **place(draw))
    proves(Op(OpType.quantize, (), 0, scalars=(float(F(scalar)),)), [x], out, draw(threads))


@pytest.mark.parametrize("kind", [OpType.max_pool, OpType.avg_pool, OpType.max_pool_f32, OpType.avg_pool_f32])
@EXAMPLES
@given(data=st.data())
def test_pools(kind: OpType, data: st.DataObject) -> None:
    draw = data.draw
    rng, shape = rng_of(draw), shape_of(draw)
    n, h, w, c = shape
    floats = kind in (OpType.max_pool_f32, OpType.avg_pool_f32)
    found = window(draw, h, w, draw(st.sampled_from([5, 9, 13])))
    if draw(st.integers(0, 4)) == 0 or found is None:
        found = {"kernel": (h, w)}, (1, 1)  # global
    geometry, (oh, ow) = found
    for i, (size, count) in enumerate(((h, oh), (w, ow))):  # no window may lie outside
        k, s, d = (geometry.get(name, (1, 1))[i] for name in ("kernel", "stride", "dilation"))
        start = np.arange(count) * s - geometry.get("pad", (0, 0))[i]
        seen = (start[:, None] + np.arange(k) * d >= 0) & (start[:, None] + np.arange(k) * d < size)
        if not seen.any(axis=1).all():
            return
    x = reals(draw, rng, shape) if floats else codes(draw, rng, shape)
    out = blank((n, oh, ow, c), x.values.dtype, **quant(draw), **place(draw))
    constants = maybe_table(draw, rng) if kind == OpType.max_pool else ()
    ints, scalars = (draw(st.integers(0, 1)),), (float(F(draw(st.floats(0.1, 3)))),)
    proves(
        Op(kind, (), 0, ints=ints, scalars=scalars, constants=constants, **geometry), [x], out, draw(threads)
    )


@pytest.mark.parametrize("floats", [False, True])
@EXAMPLES
@given(data=st.data())
def test_resizing(floats: bool, data: st.DataObject) -> None:
    draw = data.draw
    rng, shape = rng_of(draw), shape_of(draw)
    n, h, w, c = shape
    oh, ow = (2 * h, 2 * w) if draw(st.booleans()) else (draw(sizes), draw(sizes))
    x = reals(draw, rng, shape) if floats else codes(draw, rng, shape)
    out = blank((n, oh, ow, c), x.values.dtype, **quant(draw), **place(draw))
    if draw(st.booleans()):  # as Resize's asymmetric, floor has it
        rows, columns = (np.arange(o) * s // o for o, s in ((oh, h), (ow, w)))
    else:
        rows, columns = rng.integers(0, h, oh), rng.integers(0, w, ow)
    lists: tuple[np.ndarray | None, ...] = (rows.astype(np.int32), columns.astype(np.int32))
    table = () if floats else maybe_table(draw, rng)
    proves(Op(OpType.nearest, (), 0, constants=lists + table), [x], out, draw(threads))
    lists = (
        rng.integers(0, h, (oh, 2)).astype(np.int32),
        rng.uniform(0, 1, oh).astype(np.float32),
        rng.integers(0, w, (ow, 2)).astype(np.int32),
        rng.uniform(0, 1, ow).astype(np.float32),
    )
    scalar = float(F(draw(st.sampled_from([0.25, 1.0, 1.7]))))
    proves(Op(OpType.bilinear, (), 0, scalars=(scalar,), constants=lists), [x], out, draw(threads))


@pytest.mark.parametrize("floats", [False, True])
@EXAMPLES
@given(data=st.data())
def test_gather(floats: bool, data: st.DataObject) -> None:
    draw = data.draw
    rng, shape = rng_of(draw), shape_of(draw)
    x = reals(draw, rng, shape) if floats else codes(draw, rng, shape)
    count = draw(channels)
    out = blank((*shape[:3], count), x.values.dtype, **quant(draw), **place(draw))
    index = rng.integers(0, shape[3], count)
    if draw(st.booleans()):  # a shuffle
        index = np.arange(count) % shape[3]
    table = () if floats else maybe_table(draw, rng)
    proves(Op(OpType.gather, (), 0, constants=(index.astype(np.int32), *table)), [x], out, draw(threads))


@pytest.mark.parametrize("bytes", [False, True])
@settings(EXAMPLES, max_examples=30)
@given(data=st.data())
def test_conv_f32(bytes: bool, data: st.DataObject) -> None:
    draw = data.draw
    rng = rng_of(draw)
    n, h, w = draw(batches), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    found = window(draw, h, w, 3)
    geometry, (oh, ow) = found or ({}, (h, w))
    group, each, outs = draw(
        st.sampled_from([(1, 7, 3), (1, 16, 20), (1, 3, 16), (5, 1, 1), (18, 1, 1), (2, 3, 4)])
    )
    x = reals(draw, rng, (n, h, w, group * each), 1.0)
    kernel = geometry.get("kernel", (1, 1))
    weights = rng.normal(0, 0.3, (group * outs, *kernel, each)).astype(np.float32)
    constants: list[np.ndarray | None] = [weights, rng.normal(0, 1, group * outs).astype(np.float32)]
    if bytes:
        constants[0] = rng.integers(-128, 128, weights.shape).astype(np.int8)
        constants.append(rng.uniform(0.001, 0.01, group * outs).astype(np.float32))
    act = draw(st.sampled_from([Act.none, *FLOATS]))
    scalars = (draw(st.sampled_from([1.0, 17.5, 127.5])), 0.0, 0.25, 0.5)
    op = Op(OpType.conv_f32, (), 0, act, group=group, ints=(int(bytes),), constants=tuple(constants),
            scalars=scalars, **geometry)  # fmt: skip
    kind = draw(st.sampled_from([np.float32, np.uint8]))
    proves(op, [x], blank((n, oh, ow, group * outs), kind, **quant(draw), **place(draw)), draw(threads))


@pytest.mark.parametrize("kind", [OpType.add_f32, OpType.mul_f32])
@EXAMPLES
@given(data=st.data())
def test_pairs_of_reals(kind: OpType, data: st.DataObject) -> None:
    _, inputs = two(data.draw, reals)
    a, b = inputs
    assert a is not None and b is not None
    if kind == OpType.mul_f32 and data.draw(st.booleans()):
        b.values = b.values[:, :1, :1]
    proves(Op(kind, (), 0), inputs, blank(a.values.shape, np.float32, **place(data.draw)), data.draw(threads))


@pytest.mark.parametrize("act", FLOATS)
@settings(EXAMPLES, max_examples=15)
@given(data=st.data())
def test_functions(act: Act, data: st.DataObject) -> None:
    draw = data.draw
    rng, shape = rng_of(draw), shape_of(draw)
    x = reals(draw, rng, shape, draw(st.sampled_from([0.1, 3.0, 60.0])))
    op = Op(
        OpType.unary_f32, (), 0, act, scalars=(0.0, 0.0, float(F(draw(st.sampled_from([0.01, 0.2])))), 0.5)
    )
    proves(op, [x], blank(shape, np.float32, **place(draw)), draw(threads))


@settings(EXAMPLES, max_examples=30)
@given(data=st.data())
def test_softmax_and_copy(data: st.DataObject) -> None:
    draw = data.draw
    rng, shape = rng_of(draw), shape_of(draw)
    x = reals(draw, rng, shape)
    for kind in (OpType.softmax_f32, OpType.copy_f32):
        proves(Op(kind, (), 0), [x], blank(shape, np.float32, **place(draw)), draw(threads))


def test_functions_are_what_they_are_called() -> None:
    """Against float64: exp to 2e-7 of it, the others to 3e-7 of their range."""
    from math import erf

    x = np.linspace(-20, 20, 4001).astype(np.float32)[None, :, None, None]
    wide = x.astype(np.float64)
    true = {
        Act.exp: np.exp(wide),
        Act.sigmoid: 1 / (1 + np.exp(-wide)),
        Act.silu: wide / (1 + np.exp(-wide)),
        Act.tanh: np.tanh(wide),
        Act.gelu: wide * 0.5 * (1 + np.vectorize(erf)(wide / np.sqrt(2))),
    }
    for act, want in true.items():
        op, out = Op(OpType.unary_f32, (), 0, act), blank(x.shape, np.float32)
        got = run(one_op(op, [Picture(x)], out), [Picture(x)], out, "scalar")
        error = np.abs(got - want) / (np.abs(want) if act == Act.exp else np.maximum(1, np.abs(want)))
        assert error.max() < 4e-7, act.name
