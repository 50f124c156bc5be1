"""numpy's version of the native engine's operators, written from docs/native.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgekit.backends.native.format import Act, Dtype, Op, OpType
from tests.native_nets import Picture

F = np.float32
Inputs = Sequence[Picture | None]


def fma(a: Any, b: Any, c: Any) -> np.ndarray:
    """float32(a * b + c), rounded once: the product is exact in float64, the sum is rounded to odd there."""
    product, c = np.float64(a) * np.float64(b), np.float64(c)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    even = (np.atleast_1d(total).view(np.int64).reshape(np.shape(total)) & 1) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even & np.isfinite(total), odd, total).astype(np.float32)


def rne(x: np.ndarray) -> np.ndarray:
    assert x.dtype == np.float32
    return np.rint(x).astype(np.int64)


def sat8u(x: np.ndarray) -> np.ndarray:
    return np.clip(x, 0, 255).astype(np.uint8)


def sat16(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -32768, 32767)


def exp(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, F(-87), F(88))
    r = fma(x, F(1.44269502), F(12582912)) - F(12582912)
    f = fma(x, F(1.92596299e-8), fma(x, F(1.44269502), -r))
    p: Any = F(1.32695341e-3)
    for term in (9.67129227e-3, 5.55071086e-2, 0.240222469, 0.693147004, 1):
        p = fma(p, f, F(term))
    return p * np.ldexp(F(1), r.astype(np.int32)).astype(np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return F(1) / (F(1) + exp(-x))


def erf(x: np.ndarray) -> np.ndarray:
    a = np.abs(x)
    t = F(1) / fma(F(0.3275911), a, F(1))
    p: Any = F(1.061405429)
    for term in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = fma(p, t, F(term))
    y = F(1) - p * t * exp(-(a * a))
    return np.where(x < 0, -y, y)


def activate(act: Act, a: np.ndarray, p0: float = 0, p1: float = 0) -> np.ndarray:
    p0, p1 = F(p0), F(p1)
    if act == Act.relu:
        return np.maximum(a, F(0))
    if act == Act.clip:
        return np.minimum(np.maximum(a, p0), p1)
    if act == Act.leaky_relu:
        return np.where(a >= 0, a, a * p0)
    if act == Act.sigmoid:
        return sigmoid(a)
    if act == Act.silu:
        return a / (F(1) + exp(-a))
    if act == Act.hard_swish:
        return a * np.minimum(np.maximum(a + F(3), F(0)), F(6)) * F(1 / 6)
    if act == Act.hard_sigmoid:
        return np.minimum(np.maximum(a * p0 + p1, F(0)), F(1))
    if act == Act.tanh:
        return F(1) - F(2) / (exp(a + a) + F(1))
    if act == Act.gelu:
        return F(0.5) * a * (F(1) + erf(a * F(0.70710678)))
    return exp(a) if act == Act.exp else a


def sums(x: np.ndarray, w: np.ndarray, op: Op) -> np.ndarray:
    """Σ x * w of a convolution, [n, h, w, out] int64. x: codes less their zero point; w: [out, kh, kw, in / group]."""
    c = x.shape[3]
    top, left, bottom, right = op.pad
    x = np.pad(x.astype(np.int64), ((0, 0), (top, bottom), (left, right), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(
        x, [op.dilation[i] * (op.kernel[i] - 1) + 1 for i in (0, 1)], (1, 2)
    )[:, :: op.stride[0], :: op.stride[1], :, :: op.dilation[0], :: op.dilation[1]]
    outs, each = w.shape[0] // op.group, c // op.group
    return np.concatenate(
        [
            np.einsum(
                "nyxcij,oijc->nyxo",
                windows[:, :, :, g * each : (g + 1) * each],
                w[g * outs : (g + 1) * outs].astype(np.int64),
            )
            for g in range(op.group)
        ],
        axis=3,
    )


def conv(op: Op, inputs: Inputs, out: Picture) -> np.ndarray:
    first = inputs[0]
    assert first is not None
    x = first.values.astype(np.int64) - first.zero
    if len(inputs) == 3 and inputs[2] is not None:
        x = np.concatenate([x, inputs[2].values.astype(np.int64) - first.zero], axis=3)
    w, bias, m = op.constants[0], op.constants[1], op.constants[2]
    assert w is not None and bias is not None and m is not None
    total = sums(x, w, op) + bias
    assert np.abs(total).max() < 2**31
    value = total.astype(np.int32).astype(np.float32) * m
    if out.dtype == Dtype.f32:
        return activate(op.act, value, *op.scalars[2:4])
    more = op.constants[3] if len(op.constants) > 3 else None
    if op.act == Act.none:
        residual = len(inputs) > 1 and inputs[1] is not None
        q = sat8u(rne(value) + (op.ints[1] if residual else out.zero))
    elif op.act == Act.table:
        assert more is not None
        q = more[sat8u(rne(value) + op.ints[0])]
    else:
        assert more is not None
        base, slope = more[:64].astype(np.int64), more[64:].astype(np.int64)
        u = np.maximum(sat16(sat16(rne(value)) + op.ints[0]), 0)
        i, f = u >> 9, (u & 511) << 6
        y = sat16(base[i] + ((slope[i] * f + 2**14) >> 15))
        q = sat8u(sat16(y + 32) >> 6)
    if len(inputs) > 1 and inputs[1] is not None:
        r = inputs[1]
        a, b = (F(s) for s in op.scalars[:2])
        q = plus(q, op.ints[1], a, r.values, r.zero, b, out.zero)
        last = op.constants[4] if len(op.constants) > 4 else None
        q = q if last is None else last[q]
    return q


def plus(a: np.ndarray, za: int, sa: Any, b: np.ndarray, zb: int, sb: Any, zero: int) -> np.ndarray:
    left = (a.astype(np.int32) - za).astype(np.float32) * sa
    return sat8u(rne(left + (b.astype(np.int32) - zb).astype(np.float32) * sb) + zero)


def lut(op: Op, number: int, q: np.ndarray) -> np.ndarray:
    table = op.constants[number] if number < len(op.constants) else None
    return q if table is None else table[q]


def codes(p: Picture | None) -> np.ndarray:
    """Codes less their zero point."""
    assert p is not None
    return p.values.astype(np.int32) - p.zero


def add(op: Op, inputs: Inputs, out: Picture) -> np.ndarray:
    a, b = inputs
    assert a is not None and b is not None
    q = plus(a.values, a.zero, F(op.scalars[0]), b.values, b.zero, F(op.scalars[1]), out.zero)
    return lut(op, 0, q)


def mul(op: Op, inputs: Inputs, out: Picture) -> np.ndarray:
    product = codes(inputs[0]) * codes(inputs[1])
    return lut(op, 0, sat8u(rne(product.astype(np.float32) * F(op.scalars[0])) + out.zero))


def windows(op: Op, x: np.ndarray, out: Picture) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each element of the kernel: what it sees [n, h, w, c], and where that is inside the picture."""
    _, h, w, _ = out.values.shape
    found = []
    for ky in range(op.kernel[0]):
        for kx in range(op.kernel[1]):
            y = np.arange(h) * op.stride[0] - op.pad[0] + ky * op.dilation[0]
            x_ = np.arange(w) * op.stride[1] - op.pad[1] + kx * op.dilation[1]
            inside = ((y >= 0) & (y < x.shape[1]))[:, None] & ((x_ >= 0) & (x_ < x.shape[2]))[None, :]
            seen = x[:, np.clip(y, 0, x.shape[1] - 1)][:, :, np.clip(x_, 0, x.shape[2] - 1)]
            found.append((seen, inside[None, :, :, None]))
    return found


def max_pool(op: Op, inputs: Inputs, out: Picture) -> np.ndarray:
    assert inputs[0] is not None
    x = inputs[0].values
    low = -np.inf if out.dtype == Dtype.f32 else 0
    seen = [np.where(inside, values, low) for values, inside in windows(op, x, out)]
    return lut(op, 0, np.max(seen, axis=0).astype(x.dtype))


def counted(op: Op, found: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    count = sum(inside.astype(np.int32) for _, inside in found)
    return (np.full_like(count, len(found)) if op.ints[0] else count).astype(np.float32)


def avg_pool(op: Op, inputs: Inputs, out: Picture) -> np.ndarray:
    found = windows(op, codes(inputs[0]), out)
    total = sum(np.where(inside, values, 0) for values, inside in found)
    return sat8u(rne(total.astype(np.float32) * (F(op.scalars[0]) / counted(op, found))) + out.zero)


def avg_pool_f32(op: Op, inputs: Inputs, out: Picture) -> np.ndarray:
    assert inputs[0] is not None
    found = windows(op, inputs[0].values, out)
    total: Any = F(0)
    for values, inside in found:
        total = np.where(inside, total + values, total)
    return total * (F(1) / counted(op, found))


def nearest(op: Op, inputs: Inputs, out: Picture) -> np.ndarray:
    assert inputs[0] is not None
    return lut(op, 2, inputs[0].values[:, op.constants[0]][:, :, op.constants[1]])


def bilinear(op: Op, inputs: Inputs, out: Picture) -> np.ndarray:
    assert inputs[0] is not None
    v = inputs[0].values if out.dtype == Dtype.f32 else codes(inputs[0]).astype(np.float32)
    rows, wy, columns, wx = op.constants
    assert rows is not None and wy is not None and columns is not None and wx is not None
    (y0, y1), (x0, x1) = rows.reshape(-1, 2).T, columns.reshape(-1, 2).T
    wx, wy = wx[None, None, :, None], wy[None, :, None, None]
    top = v[:, y0][:, :, x0] + (v[:, y0][:, :, x1] - v[:, y0][:, :, x0]) * wx
    bottom = v[:, y1][:, :, x0] + (v[:, y1][:, :, x1] - v[:, y1][:, :, x0]) * wx
    r = top + (bottom - top) * wy
    return r if out.dtype == Dtype.f32 else sat8u(rne(r * F(op.scalars[0])) + out.zero)


def gather(op: Op, inputs: Inputs, out: Picture) -> np.ndarray:
    assert inputs[0] is not None
    return lut(op, 1, inputs[0].values[..., op.constants[0]])


def quantize(op: Op, inputs: Inputs, out: Picture) -> np.ndarray:
    assert inputs[0] is not None
    return quantized(inputs[0].values, op, out)


def quantized(x: np.ndarray, op: Op, out: Picture) -> np.ndarray:
    with np.errstate(over="ignore"):
        v = x * F(op.scalars[0])
    held = np.clip(
        np.where(np.isnan(v), F(0), v), -np.nextafter(F(2**30), F(0)), np.nextafter(F(2**30), F(0))
    )
    return sat8u(rne(held) + out.zero)


def conv_f32(op: Op, inputs: Inputs, out: Picture) -> np.ndarray:
    assert inputs[0] is not None
    w, bias = op.constants[:2]
    assert w is not None and bias is not None
    outs = w.shape[0] // op.group
    each = inputs[0].values.shape[3] // op.group
    bytes = op.ints[0] == 1
    found = windows(op, inputs[0].values, out)
    channels = []
    for o in range(w.shape[0]):
        s: Any = np.zeros(out.values.shape[:3], np.float32) + (F(0) if bytes else bias[o])
        for k, (values, inside) in enumerate(found):
            for c in range(each):
                a = values[..., o // outs * each + c]
                s = np.where(inside[..., 0], fma(a, w[o].reshape(-1, each)[k, c].astype(np.float32), s), s)
        if bytes:
            scale = op.constants[2]
            assert scale is not None
            s = fma(s, scale[o], bias[o])
        channels.append(s)
    found_all = activate(op.act, np.stack(channels, axis=3), *op.scalars[2:4])
    return quantized(found_all, op, out) if out.dtype == Dtype.u8 else found_all


def softmax(op: Op, inputs: Inputs, out: Picture) -> np.ndarray:
    assert inputs[0] is not None
    x = inputs[0].values
    e = exp(x - x.max(axis=3, keepdims=True))
    total = np.zeros_like(x[..., 0])
    for c in range(x.shape[3]):
        total = total + e[..., c]
    return e / total[..., None]


def values(p: Picture | None) -> np.ndarray:
    assert p is not None
    return p.values


REFERENCE: dict[OpType, Callable[[Op, Inputs, Picture], np.ndarray]] = {
    OpType.conv: conv,
    OpType.add: add,
    OpType.mul: mul,
    OpType.table: lambda op, i, o: lut(op, 0, values(i[0])),
    OpType.max_pool: max_pool,
    OpType.avg_pool: avg_pool,
    OpType.nearest: nearest,
    OpType.bilinear: bilinear,
    OpType.gather: gather,
    OpType.quantize: quantize,
    OpType.dequantize: lambda op, i, o: lut(op, 0, values(i[0])),
    OpType.conv_f32: conv_f32,
    OpType.add_f32: lambda op, i, o: values(i[0]) + values(i[1]),
    OpType.mul_f32: lambda op, i, o: values(i[0]) * values(i[1]),
    OpType.unary_f32: lambda op, i, o: activate(op.act, values(i[0]), *op.scalars[2:4]),
    OpType.max_pool_f32: max_pool,
    OpType.avg_pool_f32: avg_pool_f32,
    OpType.softmax_f32: softmax,
    OpType.copy_f32: lambda op, i, o: values(i[0]),
}
