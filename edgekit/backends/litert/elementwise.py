"""Operators that work element by element, and the activations."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgekit.backends.litert.emitter import Emitter, quantize_constant
from edgekit.backends.litert.layout import Order, plain, stored
from edgekit.backends.litert.plan import Unit, activation, bounds, full_shape
from edgekit.backends.lowering import Unsupported
from edgekit.passes.graph import constant, integer, number, scalar
from edgekit.spec import DType, QuantParams

_BINARY = {
    "Add": ("ADD", "AddOptions"),
    "Sub": ("SUB", "SubOptions"),
    "Mul": ("MUL", "MulOptions"),
    "Div": ("DIV", "DivOptions"),
    "Max": ("MAXIMUM", "MaximumMinimumOptions"),
    "Min": ("MINIMUM", "MaximumMinimumOptions"),
    "Sum": ("ADD", "AddOptions"),
}
_ACTS = {"ADD", "SUB", "MUL", "DIV"}
_UNARY = {
    "Exp": ("EXP", "ExpOptions"),
    "Sqrt": ("SQRT", ""),
    "Abs": ("ABS", "AbsOptions"),
    "Neg": ("NEG", "NegOptions"),
    "Log": ("LOG", ""),
    "Floor": ("FLOOR", ""),
    "Ceil": ("CEIL", ""),
    "Round": ("ROUND", ""),
    "Sin": ("SIN", ""),
    "Cos": ("COS", "CosOptions"),
}


def order_of(e: Emitter, unit: Unit) -> Order:
    """The order in which an element-wise result is stored: that of an input of the same shape."""
    shape = full_shape(unit.outputs[0])
    data = unit.data()
    same = [v for v in data if full_shape(v) == shape] or [
        v for v in data if len(full_shape(v)) == len(shape)
    ]
    return e.order[same[0]] if same else plain(len(shape))


def binary(e: Emitter, unit: Unit) -> None:
    name, options = _BINARY[unit.op]
    inputs = [v for v in unit.node.inputs if v is not None]
    order = order_of(e, unit)
    rank = len(order)
    if len(inputs) == 1:
        unary_copy(e, unit)
        return
    tensors = [e.operand(unit, v, order, rank) for v in inputs]
    values = {"fusedActivationFunction": e.act(unit)} if name in _ACTS else {}
    version = 2 if unit.integer else 1
    total = tensors[0]
    for tensor in tensors[1:-1]:  # Max, Min and Sum take any number
        shape = stored(full_shape(unit.outputs[0]), order)
        partial = e.temp(shape, None)
        e.op(name, [total, tensor], [partial], options, None, version)
        total = partial
    e.op(name, [total, tensors[-1]], [e.out(unit, order)], options, values, version)


def unary(e: Emitter, unit: Unit) -> None:
    name, options = _UNARY[unit.op]
    simple(e, unit, name, options)


def simple(
    e: Emitter, unit: Unit, name: str, options: str = "", values: dict[str, object] | None = None
) -> None:
    """One input, one output, the same order."""
    x = unit.node.inputs[0]
    assert x is not None
    order = order_of(e, unit)
    source = e.read(x, order, e.params(unit, x))
    e.op(name, [source], [e.out(unit, order)], options, values, 2 if unit.integer else 1)


def unary_copy(e: Emitter, unit: Unit) -> None:
    """Identity and its like."""
    x = unit.node.inputs[0]
    assert x is not None
    rename(e, unit, x, e.order[x])


def rename(e: Emitter, unit: Unit, x: ir.Value, order: Order) -> None:
    """The output is the input's tensor, with its axes counted in another `order`; a copy where it has to be."""
    (out, *_) = unit.outputs
    ends = out.is_graph_output() and (x.is_graph_input() or x.is_graph_output())
    if not ends and (unit.integer or out not in e.plan.params):
        e.alias(x, out, order, e.params(unit, x))
        return
    source = e.read(x, e.order[x], e.params(unit, x))
    e.reshape(source, e.out(unit, order), stored(full_shape(out), order))


def relu(e: Emitter, unit: Unit) -> None:
    """Relu and Clip that no producer takes."""
    if unit.integer:  # by saturation (see plan.saturates)
        x = unit.node.inputs[0]
        assert x is not None
        order = order_of(e, unit)
        e.quantize(e.read(x, order, e.params(unit, x)), e.out(unit, order), 2)
        return
    act = activation(unit.node)
    if act:
        simple(e, unit, act)
        return
    low, high = bounds(unit.node)
    x = unit.node.inputs[0]
    assert x is not None
    limit(e, unit, e.read(x, order_of(e, unit)), low, high)


def limit(e: Emitter, unit: Unit, source: int, low: float | None, high: float | None) -> None:
    order = order_of(e, unit)
    shape = stored(full_shape(unit.outputs[0]), order)
    steps = [(n, v) for n, v in (("MAXIMUM", low), ("MINIMUM", high)) if v is not None]
    if not steps:
        unary_copy(e, unit)
        return
    for i, (name, value) in enumerate(steps):
        target = e.out(unit, order) if i == len(steps) - 1 else e.temp(shape, None)
        e.op(name, [source, number_tensor(e, value)], [target], "MaximumMinimumOptions")
        source = target


def number_tensor(e: Emitter, value: float) -> int:
    return e.writer.constant(np.array([value], np.float32))


def leaky_relu(e: Emitter, unit: Unit) -> None:
    simple(e, unit, "LEAKY_RELU", "LeakyReluOptions", {"alpha": number(unit.node, "alpha", 0.01)})


def prelu(e: Emitter, unit: Unit) -> None:
    x, slope = unit.node.inputs
    assert x is not None and slope is not None
    data = constant(slope)
    if data is None:
        raise Unsupported("PRelu with a computed slope")
    order = e.order[x]
    rank = len(order)
    full = np.transpose(data.reshape((1,) * (rank - data.ndim) + data.shape), order)
    source = e.read(x, order)
    e.op("PRELU", [source, e.floats(np.ascontiguousarray(full[0]))], [e.out(unit, order)])


def elu(e: Emitter, unit: Unit) -> None:
    if number(unit.node, "alpha", 1.0) != 1.0:
        raise Unsupported("Elu with alpha other than 1")
    simple(e, unit, "ELU")


def gelu(e: Emitter, unit: Unit) -> None:
    attribute = unit.node.attributes.get("approximate")
    approximate = attribute is not None and attribute.as_string() == "tanh"
    simple(e, unit, "GELU", "GeluOptions", {"approximate": approximate})


def hard_sigmoid(e: Emitter, unit: Unit) -> None:
    """clip(alpha * x + beta, 0, 1)."""
    alpha, beta = number(unit.node, "alpha", 0.2), number(unit.node, "beta", 0.5)
    x = unit.node.inputs[0]
    assert x is not None
    order = order_of(e, unit)
    shape = stored(full_shape(x), order)
    if unit.integer:
        e.quantize(integer_gate(e, unit, x, order, alpha, beta), e.out(unit, order), 2)
        return
    source = e.read(x, order)
    scaled, shifted = e.temp(shape, None), e.temp(shape, None)
    e.op("MUL", [source, number_tensor(e, alpha)], [scaled], "MulOptions")
    e.op("ADD", [scaled, number_tensor(e, beta)], [shifted], "AddOptions")
    limit(e, unit, shifted, 0.0, 1.0)


GATE = QuantParams(DType.int8, (1 / 255,), (-128,))
"""Codes of [0, 1] to both ends: what lies outside saturates, which is the clipping of a hard sigmoid."""


def integer_gate(e: Emitter, unit: Unit, x: ir.Value, order: Order, alpha: float, beta: float) -> int:
    """clip(alpha * x + beta, 0, 1) in integers: a product that only renames the scale, and a sum."""
    params = e.plan.params[x]
    shape = stored(full_shape(x), order)
    source = e.read(x, order, params)
    factor, factor_codes = quantize_constant(np.full((1,) * len(shape), alpha, np.float32))
    scaled = QuantParams(DType.int8, (float(np.float32(params.scale[0] * alpha)),), params.zero_point)
    product, gate = e.temp(shape, scaled), e.temp(shape, GATE)
    e.op("MUL", [source, e.writer.constant(factor_codes, "", factor)], [product], "MulOptions", None, 2)
    shift, shift_codes = quantize_constant(np.full((1,) * len(shape), beta, np.float32))
    e.op("ADD", [product, e.writer.constant(shift_codes, "", shift)], [gate], "AddOptions", None, 2)
    return gate


def hard_swish(e: Emitter, unit: Unit) -> None:
    if not unit.integer:
        simple(e, unit, "HARD_SWISH", "HardSwishOptions")
        return
    x = unit.node.inputs[0]
    assert x is not None
    order = order_of(e, unit)
    gate = integer_gate(e, unit, x, order, 1 / 6, 0.5)
    source = e.read(x, order, e.plan.params[x])
    e.op("MUL", [source, gate], [e.out(unit, order)], "MulOptions", None, 2)


def power(e: Emitter, unit: Unit) -> None:
    x, exponent = unit.node.inputs
    assert x is not None
    value = scalar(exponent)
    if value == 2:
        simple(e, unit, "SQUARE", "SquareOptions")
    elif value == 0.5:
        simple(e, unit, "SQRT")
    else:
        order = order_of(e, unit)
        tensors = [e.operand(unit, v, order, len(order)) for v in unit.node.inputs if v is not None]
        e.op("POW", tensors, [e.out(unit, order)], "PowOptions")


def reciprocal(e: Emitter, unit: Unit) -> None:
    x = unit.node.inputs[0]
    assert x is not None
    order = order_of(e, unit)
    e.op("DIV", [number_tensor(e, 1.0), e.read(x, order)], [e.out(unit, order)], "DivOptions")


def softplus(e: Emitter, unit: Unit) -> None:
    """log(1 + exp(x)) = max(x, 0) - log(sigmoid(|x|)), which does not overflow."""
    x = unit.node.inputs[0]
    assert x is not None
    order = order_of(e, unit)
    shape = stored(full_shape(x), order)
    source = e.read(x, order)
    size, gate, log, top = (e.temp(shape, None) for _ in range(4))
    e.op("ABS", [source], [size], "AbsOptions")
    e.op("LOGISTIC", [size], [gate])
    e.op("LOG", [gate], [log])
    e.op("RELU", [source], [top])
    e.op("SUB", [top, log], [e.out(unit, order)], "SubOptions")


def cast(e: Emitter, unit: Unit) -> None:
    x = unit.node.inputs[0]
    assert x is not None
    if unit.outputs[0].dtype == x.dtype:
        unary_copy(e, unit)
        return
    order = e.order[x]
    e.op("CAST", [e.read(x, order)], [e.out(unit, order)], "CastOptions")


def softmax(e: Emitter, unit: Unit) -> None:
    from edgekit.backends.litert.layout import last

    x = unit.node.inputs[0]
    assert x is not None
    rank = len(full_shape(x))
    axis = integer(unit.node, "axis", -1) % rank
    order = e.order[x] if e.order[x][-1] == axis else last(e.order[x], axis)
    source = e.read(x, order)
    e.op("SOFTMAX", [source], [e.out(unit, order)], "SoftmaxOptions", {"beta": 1.0})


def layer_norm(e: Emitter, unit: Unit) -> None:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axes (Ba et al. 2016)."""
    x = unit.node.inputs[0]
    assert x is not None
    if len(unit.outputs) > 1 and any(tuple(v.uses()) or v.is_graph_output() for v in unit.outputs[1:]):
        raise Unsupported("LayerNormalization whose mean is used")
    shape = full_shape(x)
    rank = len(shape)
    first = integer(unit.node, "axis", -1) % rank
    order = e.order[x]
    axes = e.ints([order.index(axis) for axis in range(first, rank)])
    source = e.read(x, order)
    full = stored(shape, order)
    reduced = stored([1 if axis >= first else d for axis, d in enumerate(shape)], order)
    mean, variance, safe, inverse = (e.temp(reduced, None) for _ in range(4))
    centred, squared, scaled = (e.temp(full, None) for _ in range(3))
    keep = {"keepDims": True}
    e.op("MEAN", [source, axes], [mean], "ReducerOptions", keep)
    e.op("SUB", [source, mean], [centred], "SubOptions")
    e.op("SQUARE", [centred], [squared], "SquareOptions")
    e.op("MEAN", [squared, axes], [variance], "ReducerOptions", keep)
    e.op("ADD", [variance, number_tensor(e, number(unit.node, "epsilon", 1e-5))], [safe], "AddOptions")
    e.op("RSQRT", [safe], [inverse])
    e.op("MUL", [centred, inverse], [scaled], "MulOptions")
    weights = [v for v in unit.node.inputs[1:] if v is not None]
    tensors = [e.operand(unit, v, order, rank) for v in weights]
    for i, tensor in enumerate(tensors):
        final = i == len(tensors) - 1
        target = e.out(unit, order) if final else e.temp(full, None)
        name, options = (("MUL", "MulOptions"), ("ADD", "AddOptions"))[i]
        e.op(name, [scaled, tensor], [target], options)
        scaled = target


def erf_gelu(erf: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """(last node, x) where `erf` is part of 0.5 * x * (1 + erf(x / sqrt(2))) (Hendrycks & Gimpel 2016)."""
    inner = erf.inputs[0]
    divide = None if inner is None else inner.producer()
    if divide is None or divide.op_type not in ("Div", "Mul"):
        return None
    x, factor = divide.inputs
    want = math.sqrt(2) if divide.op_type == "Div" else math.sqrt(0.5)
    if x is None or abs((scalar(factor) or 0) - want) > 1e-5:
        return None
    plus = _only(erf.outputs[0])
    if plus is None or plus.op_type != "Add" or 1.0 not in [scalar(v) for v in plus.inputs]:
        return None
    product = _only(plus.outputs[0])
    if product is None or product.op_type != "Mul":
        return None
    other = next((v for v in product.inputs if v is not plus.outputs[0]), None)
    if other is x:  # x * (1 + erf) * 0.5
        half = _only(product.outputs[0])
        ok = half is not None and half.op_type == "Mul" and 0.5 in [scalar(v) for v in half.inputs]
        return (half, x) if ok and half is not None else None
    maker = None if other is None else other.producer()  # (0.5 * x) * (1 + erf)
    ok = maker is not None and maker.op_type == "Mul" and x in maker.inputs
    ok = ok and maker is not None and 0.5 in [scalar(v) for v in maker.inputs]
    return (product, x) if ok else None


def _only(value: ir.Value) -> ir.Node | None:
    uses = tuple(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


HANDLERS: dict[str, Callable[[Emitter, Unit], None]] = {
    **dict.fromkeys(_BINARY, binary),
    **dict.fromkeys(_UNARY, unary),
    **dict.fromkeys(("Identity", "Dropout"), unary_copy),
    **dict.fromkeys(("Relu", "Clip"), relu),
    "Sigmoid": lambda e, unit: simple(e, unit, "LOGISTIC"),
    "Tanh": lambda e, unit: simple(e, unit, "TANH"),
    "LeakyRelu": leaky_relu,
    "PRelu": prelu,
    "Elu": elu,
    "Gelu": gelu,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "Pow": power,
    "Reciprocal": reciprocal,
    "Softplus": softplus,
    "Cast": cast,
    "Softmax": softmax,
    "LayerNormalization": layer_norm,
}
