"""Convolutions and matrix products, with the activations and additions behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.backends.lowering import Unsupported
from edgekit.backends.native import pointwise
from edgekit.backends.native.emitter import Emitter, full_shape, picture_of
from edgekit.backends.native.factors import sums, with_same_steps
from edgekit.backends.native.format import Act, OpType
from edgekit.backends.native.plan import Unit, act_name
from edgekit.passes.graph import constant, integer, ints, number, text
from edgekit.quant.activations import Function, Stage, bounds, monotone_limits
from edgekit.quant.annotate import quant
from edgekit.quant.rules import bias, weight, weight_axis
from edgekit.quant.weights import bias_codes, bias_scale, codes, weight_params

BYTES_FROM = 256
"""Weights that are stored as int8 where a payload wants small ones: smaller tensors are not worth it."""
REACH = float(2**30)
"""Sums times their multiplier stay below this."""


@dataclass(frozen=True)
class Window:
    """kernel, stride, dilation; pads: top, left, bottom, right."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)

    def options(self) -> dict[str, Any]:
        """As `Emitter.op` takes them."""
        return {"kernel": self.kernel, "stride": self.stride, "dilation": self.dilation, "pad": self.pad}


def window(node: ir.Node, kernel: tuple[int, ...], sizes: tuple[int, ...], out: tuple[int, ...]) -> Window:
    """Of a convolution or pool over pictures of `sizes` [N, C, H, W], whose result is `out`."""
    if len(kernel) == 1 and len(sizes) == 3:  # along one axis
        one = [
            ints(node, name, default)
            for name, default in (("strides", (1,)), ("dilations", (1,)), ("pads", (0, 0)))
        ]
        (stride,), (dilation,), (left, right) = one
        return Window((1, kernel[0]), (1, stride), (1, dilation), (0, left, 0, right))
    if len(kernel) != 2 or len(sizes) != 4:
        raise Unsupported(f"a window of {len(kernel)} axes")
    strides, dilations = ints(node, "strides", (1, 1)), ints(node, "dilations", (1, 1))
    pads = ints(node, "pads", (0, 0, 0, 0))
    how = text(node, "auto_pad", "NOTSET")
    before, after = list(pads[:2]), list(pads[2:])
    for i in range(2):
        reach = dilations[i] * (kernel[i] - 1) + 1
        if how in ("SAME_UPPER", "SAME_LOWER"):
            total = max((out[2 + i] - 1) * strides[i] + reach - sizes[2 + i], 0)
            before[i] = total // 2 if how == "SAME_UPPER" else total - total // 2
        # what the last window needs: less than stated if the stride skips it, more if ONNX rounds sizes up
        after[i] = (out[2 + i] - 1) * strides[i] + reach - sizes[2 + i] - before[i]
        if after[i] < 0:
            after[i] = 0
        if max(before[i], after[i]) >= reach:
            raise Unsupported("pads as large as the window")
    return Window(
        (kernel[0], kernel[1]),
        (strides[0], strides[1]),
        (dilations[0], dilations[1]),
        (before[0], before[1], after[0], after[1]),
    )


@dataclass(frozen=True)
class Product:
    """A convolution as the engine has it. weights: float32 [out, in / group, kh, kw] (or their codes); source: what it reads."""

    source: ir.Value
    weights: np.ndarray
    bias: np.ndarray
    window: Window
    group: int
    scales: np.ndarray | None
    """Of the codes; None if `weights` are real."""

    def laid_out(self) -> np.ndarray:
        return np.ascontiguousarray(self.weights.transpose(0, 2, 3, 1))


def product(e: Emitter, unit: Unit) -> Product:
    """The convolution that the unit's node is. A product of a flattened picture is one as large as the picture."""
    node, op = unit.node, unit.node.op_type
    source = node.inputs[0]
    assert source is not None
    tensor = weight(node)
    numbers = None if tensor is None else constant(tensor)
    if numbers is None:
        raise Unsupported("computed weights")
    if len(node.inputs) > 2 and node.inputs[2] is not None and bias(node) is None:
        raise Unsupported("a computed bias")
    params = quant(tensor) if unit.integer else None
    axis = weight_axis(node)
    values: np.ndarray = numbers.astype(np.float32) if params is None else codes(numbers, params)
    outs = values.shape[axis]
    scales = None if params is None else np.broadcast_to(np.asarray(params.scale, np.float32), (outs,))
    given = constant(bias(node))
    offset = np.zeros(outs, np.float32) if given is None else np.broadcast_to(given.reshape(-1), (outs,))
    if op == "Conv":
        if values.ndim == 3:
            values = values[:, :, None, :]
        kernel = tuple(int(d) for d in numbers.shape[2:])
        geometry = window(node, kernel, full_shape(source), full_shape(node.outputs[0]))
        return Product(source, values, offset, geometry, integer(node, "group", 1), scales)
    if op not in ("Gemm", "MatMul") or values.ndim != 2:
        raise Unsupported("no such kernel")
    scaled = number(node, "alpha", 1.0) != 1 or number(node, "beta", 1.0) != 1
    if op == "Gemm" and (scaled or integer(node, "transA", 0)):
        raise Unsupported("alpha, beta or transA")
    if len(full_shape(source)) != 2:
        raise Unsupported(f"a product of {len(full_shape(source))} axes")
    values = values if axis == 0 else values.T
    flat = e.flat.get(source)
    if flat is None:
        return Product(source, values[:, :, None, None], offset, Window(), 1, scales)
    _, h, w, c = picture_of(flat)
    return Product(flat, values.reshape(outs, c, h, w), offset, Window((h, w)), 1, scales)


def weighted(e: Emitter, unit: Unit) -> None:
    """Conv, Gemm, MatMul."""
    if unit.integer:
        _integer(e, unit, product(e, unit))
    else:
        _real(e, unit, product(e, unit))


def _integer(e: Emitter, unit: Unit, p: Product) -> None:
    before, weights = quant(unit.node.inputs[0]), quant(weight(unit.node))
    assert before is not None and weights is not None and p.scales is not None
    scale_in, zero_in = pointwise.scale_zero(before)
    offsets = bias_codes(p.bias, np.broadcast_to(bias_scale(before, weights), p.scales.shape))
    laid = p.laid_out()
    least, most = sums(laid, offsets.astype(np.int64), int(zero_in))
    largest = np.maximum(np.abs(least), np.abs(most))
    if largest.max() >= 2**31:
        raise Unsupported("sums beyond 32 bits")
    real = p.scales.astype(np.float64) * float(scale_in)
    source, *more = e.pieces(p.source)
    step, ints_, act, third = 1.0, 0, Act.none, None
    rounded_to: int | None = None  # zero point of the codes that sums become first
    skip: int | None = None
    zero, after = 0, None
    scalars: tuple[float, ...] = ()
    if quant(unit.stages[-1].result if unit.stages else unit.pre) is None:
        target = e.put(unit.out, None)  # real numbers, straight from the sums
        if unit.stages:
            act, parameters = real_act(unit.stages[0])
            scalars = (0.0, 0.0, *parameters)
    else:
        target, theirs = e.out_codes(unit)
        if unit.skip is not None:
            skip = e.as_codes(unit.skip)
            summed, after = pointwise.coded(_sum(unit), unit.after, theirs)
            target = e.written_as(target, summed)
            within = quant(unit.stages[-1].result if unit.stages else unit.pre)
            assert within is not None
            theirs = within
            scale, zero = pointwise.scale_zero(theirs)
            parts = float(scale), e.made.tensors[skip].scale
            scalars = tuple(part / float(pointwise.scale_zero(summed)[0]) for part in parts)
        limits = monotone_limits(unit.stages)
        if quant(unit.pre) is None and limits is None:
            composed = _composed(unit.stages)
            found = pointwise.curve(composed, theirs, float((largest * real).max()))
            act, ints_, third, step = Act.curve, found.start, found.points, found.step
        else:
            summed, third = pointwise.coded(unit.pre, unit.stages, theirs)
            scale, first = pointwise.scale_zero(summed)
            step = float(scale)
            rounded_to = zero if third is None and skip is not None else first
            if third is not None:
                act, ints_ = Act.table, first
            elif skip is None:
                target = e.written_as(target, summed)
    factors = (real / step).astype(np.float32)
    if rounded_to is not None:
        factors = with_same_steps(factors, rounded_to, least, most)
    if not (largest * factors.astype(np.float64) < REACH).all():
        raise Unsupported("sums far beyond their codes")
    inputs = [source, skip, *more] if more else [source] if skip is None else [source, skip]
    e.op(
        OpType.conv, inputs, target, str(unit.out.name), act=act, ints=(ints_, zero, len(more)), scalars=scalars,
        constants=_without_end([laid, offsets, factors, third, after]), group=p.group, **p.window.options(),
    )  # fmt: skip


def _sum(unit: Unit) -> ir.Value:
    """The result of the addition that the unit took in."""
    if unit.after:
        return unit.after[0].source
    return unit.out


def _without_end(constants: list[np.ndarray | None]) -> list[np.ndarray | None]:
    while constants and constants[-1] is None:
        constants.pop()
    return constants


def _composed(stages: tuple[Stage, ...]) -> Function:
    def f(x: np.ndarray) -> np.ndarray:
        for one in stages:
            x = one.function(x)
        return x

    return f


def _real(e: Emitter, unit: Unit, p: Product) -> None:
    act, parameters = real_act(unit.stages[0]) if unit.stages else (Act.none, (0.0, 0.0))
    constants: list[np.ndarray] = [p.laid_out().astype(np.float32), p.bias.astype(np.float32)]
    bytes_ = int(e.byte_weights and p.weights.size >= BYTES_FROM)
    if bytes_:
        scales = weight_params(p.weights, 0)
        constants[0] = codes(p.weights, scales).transpose(0, 2, 3, 1)
        constants.append(np.asarray(scales.scale, np.float32))
    source = e.as_real(p.source)
    after = quant(unit.out) if e.plan.only_codes(unit.out) else None
    factor = 0.0 if after is None else 1.0 / float(pointwise.scale_zero(after)[0])
    e.op(
        OpType.conv_f32, [source], e.put(unit.out, after), str(unit.out.name), act=act, ints=(bytes_,),
        scalars=(factor, 0.0, *parameters), constants=constants, group=p.group, **p.window.options(),
    )  # fmt: skip


def real_act(one: Stage) -> tuple[Act, tuple[float, float]]:
    """A float activation of the engine and its two parameters."""
    name = act_name(one)
    if not name:
        raise Unsupported("no such activation in floats")
    node = one.nodes[0]
    if name == "clip":
        low, high = bounds(node)
        limit = float(np.finfo(np.float32).max)
        return Act.clip, (max(low or 0.0, -limit), min(limit if high is None else high, limit))
    if name == "leaky_relu":
        return Act.leaky_relu, (number(node, "alpha", 0.01), 0.0)
    if name == "hard_sigmoid":
        return Act.hard_sigmoid, (number(node, "alpha", 0.2), number(node, "beta", 0.5))
    return Act[name], (0.0, 0.0)


HANDLERS = {"Conv": weighted, "Gemm": weighted, "MatMul": weighted}
