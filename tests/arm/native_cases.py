"""Operators of the native engine in many shapes, the same here and on the boards: only numpy's generator is drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from edgekit.backends.native.factors import sums, with_same_steps
from edgekit.backends.native.format import Act, Op, OpType
from tests.native_nets import Picture, blank, one_op

Case = tuple[str, bytes, list[Picture | None], Picture]

CONVS: tuple[dict[str, Any], ...] = (
    {"size": (7, 9), "c": (64, 48), "kernel": 1},
    {"size": (5, 5), "c": (24, 58), "kernel": 1},
    {"size": (13, 13), "c": (20, 7), "kernel": 1, "more": 24},
    {"size": (9, 8), "c": (33, 40), "kernel": 1, "stride": 2},
    {"size": (1, 1), "c": (200, 70), "kernel": 1},
    {"size": (16, 14), "c": (3, 16), "kernel": 6, "stride": 2, "pad": 2},
    {"size": (11, 12), "c": (16, 36), "kernel": 3, "pad": 1},
    {"size": (9, 9), "c": (12, 24), "kernel": 3, "pad": 2, "dilation": 2, "group": 3},
    {"size": (13, 11), "c": (48, 48), "kernel": 3, "pad": 1, "group": 48},
    {"size": (14, 13), "c": (72, 72), "kernel": 3, "stride": 2, "pad": 1, "group": 72},
    {"size": (10, 9), "c": (29, 29), "kernel": 3, "pad": 1, "group": 29},
    {"size": (12, 9), "c": (24, 24), "kernel": 5, "pad": 2, "group": 24},
    {"size": (7, 11), "c": (8, 20), "kernel": 1},
    {"size": (4, 5), "c": (40, 4), "kernel": 1},
    {"size": (2, 4), "c": (130, 32), "kernel": 1},
    {"size": (3, 2), "c": (16, 16), "kernel": 3, "pad": 1, "group": 16},
    {"size": (6, 8), "c": (40, 40), "kernel": 3, "pad": 2, "group": 40},
    {"size": (5, 7), "c": (8, 8), "kernel": 3, "group": 8},
    {"size": (9, 12), "c": (24, 24), "kernel": 3, "stride": 2, "group": 24},
    {"size": (3, 4), "c": (16, 16), "kernel": 3, "stride": 2, "pad": 2, "group": 16},
)
ENDS = (
    "codes",
    "table",
    "free codes",
    "free table",
    "curve",
    "residual",
    "plain residual",
    "curve residual",
    "floats",
    "silu",
)


def cases() -> Iterator[Case]:
    """Name, payload, inputs and output of each."""
    rng = np.random.default_rng(8)
    for number, shape in enumerate(CONVS):
        for end in ENDS:
            for wild in (False, True):
                yield _conv(rng, f"conv {number} {end}{' wild' * wild}", end, wild, **shape)
    for kernel in (1, 3):
        yield _near_ties(rng, kernel)
    for kind in (
        OpType.add,
        OpType.mul,
        OpType.table,
        OpType.max_pool,
        OpType.nearest,
        OpType.bilinear,
        OpType.gather,
        OpType.dequantize,
    ):
        for c in (16, 37, 100):
            yield _other(rng, kind, c)
    for c in (16, 37):
        for act in (Act.none, *(a for a in Act if a >= Act.relu)):
            yield _real(rng, OpType.unary_f32 if act != Act.none else OpType.quantize, act, c)
        for kind in (
            OpType.conv_f32,
            OpType.softmax_f32,
            OpType.add_f32,
            OpType.mul_f32,
            OpType.max_pool_f32,
            OpType.avg_pool_f32,
        ):
            for group in (1, c) if kind == OpType.conv_f32 else (1,):
                yield _real(rng, kind, Act.none, c, group)
                if kind == OpType.conv_f32:
                    yield _real(rng, kind, Act.silu, c, group, codes=True)


def _codes(rng: np.random.Generator, *shape: int) -> Picture:
    before, after, lead = (int(v) for v in rng.integers(0, 9, 3) * rng.integers(0, 2))
    values = rng.integers(0, 256, shape).astype(np.uint8)
    return Picture(values, 0.1, int(rng.integers(0, 256)), before, after, lead)


def _table(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, 256).astype(np.uint8)


def _conv(
    rng: np.random.Generator,
    name: str,
    end: str,
    wild: bool,
    size: tuple[int, int],
    c: tuple[int, int],
    kernel: int,
    stride: int = 1,
    pad: int = 0,
    dilation: int = 1,
    group: int = 1,
    more: int = 0,
) -> Case:
    """wild: weights of -128 and 127 only, and results far outside of the codes. free: multipliers that no factor stands for."""
    out_size = [(s + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for s in size]
    each = kernel * kernel * c[0] // group + more
    weights = rng.choice([-128, 127], (c[1], each)) if wild else rng.integers(-127, 128, (c[1], each))
    scales = (
        np.exp2(rng.uniform(0, 4 if wild else 1, c[1])) * (4 if end.startswith("curve") else 0.02) / each**0.5
    )
    x = _codes(rng, 1, *size, c[0])
    inputs: list[Picture | None] = [x, None, None]
    if more:
        inputs[2] = _codes(rng, 1, *size, more)
        inputs[2].zero = x.zero
    act, last = Act.none, None
    out = blank(
        (1, *out_size, c[1]),
        np.float32 if end in ("floats", "silu") else np.uint8,
        zero=int(rng.integers(0, 256)),
    )
    bias = rng.integers(-3000, 3000, c[1]).astype(np.int32)
    constants: list[np.ndarray | None] = [
        weights.astype(np.int8),
        bias,
        scales.astype(np.float32),
    ]
    ints = [int(rng.integers(0, 256)), int(rng.integers(0, 256)), int(more > 0)]
    if end in ("table", "residual", "free table"):
        act, last = Act.table, _table(rng)
    if end.startswith("curve"):
        ints[0] = int(rng.integers(-9000, 9000))
        low, high = (-32768, 32768) if wild else (-9000, 16000)
        act, last = Act.curve, rng.integers(low, high, 128).astype(np.int16)
    if end == "silu":
        act = Act.silu
    if end.endswith("residual"):
        inputs[1] = _codes(rng, 1, *out_size, c[1])
    if end in ("codes", "table", "residual", "plain residual"):
        zero = ints[0] if act == Act.table else ints[1] if inputs[1] else out.zero
        constants[2] = with_same_steps(scales.astype(np.float32), zero, *sums(weights, bias, x.zero))
    constants.append(last)
    op = Op(
        OpType.conv, (), 0, act=act, kernel=(kernel, kernel), stride=(stride, stride), dilation=(dilation, dilation),
        pad=(pad,) * 4, group=group, ints=tuple(ints), scalars=(0.6, 0.8), constants=tuple(constants),
    )  # fmt: skip
    while inputs[-1] is None:
        inputs.pop()
    return name, one_op(op, inputs, out), inputs, out


def _near_ties(rng: np.random.Generator, kernel: int) -> Case:
    """A picture without content, biases that sqrdmulh by the multiplier * 2^31 would round to another code."""
    c, every = 40, np.arange(-100_000, 100_000)
    bias, scales = np.zeros(c, np.int32), np.zeros(c, np.float32)
    for i in range(c):
        differ = every[:0]
        while not len(differ):
            scales[i] = rng.uniform(0.0005, 0.001)
            factor = int(np.rint(np.float64(scales[i]) * 2**31))
            differ = every[np.rint(every.astype(np.float32) * scales[i]) != (every * factor + 2**30) >> 31]
        bias[i] = rng.choice(differ)
    x = _codes(rng, 1, 7, 8, c)
    x.values[...] = x.zero
    group = c if kernel == 3 else 1
    weights = rng.integers(-127, 128, (c, kernel * kernel * c // group)).astype(np.int8)
    op = Op(
        OpType.conv, (), 0, kernel=(kernel, kernel), pad=(kernel // 2,) * 4, group=group, ints=(0, 0, 0),
        constants=(weights, bias, scales),
    )  # fmt: skip
    out = blank((1, 7, 8, c), zero=128)
    return f"near ties {kernel}", one_op(op, [x], out), [x], out


def _other(rng: np.random.Generator, kind: OpType, c: int) -> Case:
    x = _codes(rng, 1, 9, 8, c)
    inputs: list[Picture | None] = [x]
    zero = int(rng.integers(0, 256))
    more: dict[str, Any] = {"constants": (_table(rng),)}
    out = blank((1, 9, 8, c), zero=zero)
    if kind in (OpType.add, OpType.mul):
        inputs.append(_codes(rng, 1, 9, 8, c))
        more["scalars"] = (0.7, 0.9) if kind == OpType.add else (0.01,)
    if kind == OpType.max_pool:
        more |= {"kernel": (5, 5), "pad": (2, 2, 2, 2)}
        out = blank((1, 9, 8, c), zero=x.zero, scale=x.scale)
    if kind == OpType.nearest:
        more["constants"] = tuple(np.arange(n, dtype=np.int32) // 2 for n in (18, 16))
        out = blank((1, 18, 16, c), zero=x.zero, scale=x.scale)
    if kind == OpType.bilinear:
        found: list[np.ndarray] = []
        for size, into in ((9, 17), (8, 15)):
            place = rng.uniform(0, size - 1, into)
            low = place.astype(np.int32)
            found += [np.stack([low, np.minimum(low + 1, size - 1)], 1), (place - low).astype(np.float32)]
        more["constants"], more["scalars"] = tuple(found), (0.8,)
        out = blank((1, 17, 15, c), zero=zero)
    if kind == OpType.gather:  # even channels, those of two halves in turn, any
        picked = (
            np.arange(0, c, 2),
            np.arange(c).reshape(-1, 2, order="F").ravel() if c % 2 == 0 else np.arange(c)[::-1],
            rng.integers(0, c, 70),
        )
        indices = np.concatenate(picked).astype(np.int32)
        more["constants"] = (indices, _table(rng) if c == 37 else None)
        out = blank((1, 9, 8, len(indices)), zero=x.zero, scale=x.scale)
    if kind == OpType.dequantize:
        more["constants"] = (rng.normal(0, 3, 256).astype(np.float32),)
        out = blank((1, 9, 8, c), np.float32)
    return f"{kind.name} {c}", one_op(Op(kind, (), 0, **more), inputs, out), inputs, out


def _real(
    rng: np.random.Generator, kind: OpType, act: Act, c: int, group: int = 1, codes: bool = False
) -> Case:
    """An operator of real numbers: some lie far out, some are odd ones."""

    def picture() -> Picture:
        values = rng.normal(0, 4, (1, 9, 8, c)).astype(np.float32)
        if kind in (OpType.unary_f32, OpType.quantize):
            values[0, 0, 0, :8] = [1e30, -1e30, 90, -90, 0.5, -0.0, 2.5, -1.5]  # nothing that becomes a NaN
        return Picture(values, after=int(rng.integers(0, 5)))

    inputs: list[Picture | None] = [picture()]
    more: dict[str, Any] = {"scalars": (7.5, 0.0, 0.2, 0.5), "act": act}
    if kind in (OpType.add_f32, OpType.mul_f32):
        inputs.append(picture())
    if kind in (OpType.conv_f32, OpType.max_pool_f32, OpType.avg_pool_f32):
        more |= {"kernel": (3, 3), "pad": (1, 1, 1, 1), "group": group}
    if kind == OpType.conv_f32:
        weights = rng.normal(0, 0.3, (c, 3, 3, c // group)).astype(np.float32)
        more["constants"] = (weights, rng.normal(0, 1, c).astype(np.float32))
    kept = np.uint8 if codes or kind == OpType.quantize else np.float32
    out = blank((1, 9, 8, c), kept, zero=int(rng.integers(0, 256)))
    name = f"{kind.name} {act.name} {c} {group}{' codes' * codes}"
    return name, one_op(Op(kind, (), 0, **more), inputs, out), inputs, out
