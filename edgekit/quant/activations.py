"""Activations: which nodes of a graph make one, and what it computes.

A chain of nodes that works element by element from one value to another is one function of one number, however many
nodes spell it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import constant, number, only_user, scalar, text
from edgekit.quant.annotate import quant
from edgekit.spec import QuantParams

Function = Callable[[np.ndarray], np.ndarray]


def rounded(numbers: np.ndarray, params: QuantParams) -> np.ndarray:
    """float32 numbers behind the codes of `numbers`, as QuantizeLinear and DequantizeLinear round."""
    scale, zero = np.float32(params.scale[0]), params.zero_point[0]
    found = np.clip(np.rint(np.asarray(numbers, np.float32) / scale) + zero, -128, 127)
    back: np.ndarray = (found.astype(np.int32) - zero).astype(np.float32) * scale
    return back


def _erf(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(x))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -80, 80))))


def _gelu(node: ir.Node) -> Function:
    if text(node, "approximate", "none") == "tanh":
        return lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2)))


def _clip(node: ir.Node) -> Function | None:
    low, high = bounds(node)
    return None if low is None or high is None else lambda x: np.clip(x, low, high)


def bounds(node: ir.Node) -> tuple[float | None, float | None]:
    """(low, high) of a Relu or Clip; infinite where there is none, None where it is computed."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    found: list[float | None] = []
    for index, default in ((1, -math.inf), (2, math.inf)):
        given = node.inputs[index] if len(node.inputs) > index else None
        found.append(default if given is None else scalar(given))
    return found[0], found[1]


def _unary(node: ir.Node) -> Function | None:
    """What a node with one data input computes, in float64; None if it is none of these."""
    op = node.op_type
    if op in ("Relu", "Clip"):
        return _clip(node)
    if op == "LeakyRelu":
        slope = number(node, "alpha", 0.01)
        return lambda x: np.where(x >= 0, x, x * slope)
    if op == "HardSigmoid":
        a, b = number(node, "alpha", 0.2), number(node, "beta", 0.5)
        return lambda x: np.clip(x * a + b, 0, 1)
    if op == "Elu":
        alpha = number(node, "alpha", 1.0)
        return lambda x: np.where(x >= 0, x, alpha * np.expm1(np.minimum(x, 0)))
    if op == "Gelu":
        return _gelu(node)
    simple: dict[str, Function] = {
        "Sigmoid": _sigmoid,
        "Tanh": np.tanh,
        "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
        "Softplus": lambda x: np.logaddexp(0, x),
        "Mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
        "Abs": np.abs,
        "Neg": np.negative,
        "Exp": np.exp,
    }
    return simple.get(op)


_BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
}


@dataclass(frozen=True)
class Stage:
    """Nodes that make one function of `source` and nothing else reads what lies between: `result` = f(source)."""

    source: ir.Value
    nodes: tuple[ir.Node, ...]
    result: ir.Value
    function: Function


def stage(value: ir.Value) -> Stage | None:
    """The pointwise function that is all that reads `value`, None if there is none."""
    users = list(dict.fromkeys(user for user, _ in value.uses()))
    if value.is_graph_output() or not 1 <= len(users) <= 2:
        return None
    if len(users) == 1:
        return _alone(value, users[0])
    for gate, end in (users, users[::-1]):
        inner = _alone(value, gate)
        found = None if inner is None else _gated(inner)
        if found is not None and found.nodes == (gate, end):
            return found
    return None


def beginning(node: ir.Node) -> Stage | None:
    """The pointwise function that begins with `node`, whoever else reads its source."""
    for value in node.inputs:
        if value is not None and constant(value) is None:
            found = _alone(value, node)
            return found if found is None else _gated(found) or found
    return None


def _gated(inner: Stage) -> Stage | None:
    """x and `inner`(x) combined, where that is all that `inner` is for."""
    end = only_user(inner.result)
    x = inner.source
    if end is None or end.op_type not in _BINARY or {*end.inputs} != {x, inner.result}:
        return None
    combine, first = _BINARY[end.op_type], end.inputs[0] is x
    f, params = inner.function, quant(inner.result)

    def both(x: np.ndarray) -> np.ndarray:
        y = f(x)
        if params is not None:
            y = rounded(y, params)
        return combine(x, y) if first else combine(y, x)

    return Stage(x, (*inner.nodes, end), end.outputs[0], both)


def _alone(value: ir.Value, node: ir.Node) -> Stage | None:
    if len(node.outputs) != 1 or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type in _BINARY:
        (a, b), combine = node.inputs[:2], _BINARY[node.op_type]
        if a is b:
            return Stage(value, (node,), node.outputs[0], lambda x: combine(x, x))
        other = scalar(b if a is value else a)
        if other is None:
            return None
        if a is value:
            return Stage(value, (node,), node.outputs[0], lambda x: combine(x, np.asarray(other)))
        return Stage(value, (node,), node.outputs[0], lambda x: combine(np.asarray(other), x))
    if node.inputs[0] is not value:
        return None
    found = _unary(node)
    return None if found is None else Stage(value, (node,), node.outputs[0], found)


def steps(value: ir.Value) -> list[Stage]:
    """The pointwise functions behind `value`, one after the other."""
    found = []
    while (one := stage(value)) is not None:
        found.append(one)
        value = one.result
    return found


def monotone_limits(stages: Sequence[Stage]) -> tuple[float, float] | None:
    """(low, high) where all of `stages` only clip: they may then come after the rounding."""
    low, high = -math.inf, math.inf
    for one in stages:
        if len(one.nodes) != 1 or one.nodes[0].op_type not in ("Relu", "Clip"):
            return None
        a, b = bounds(one.nodes[0])
        if a is None or b is None or a > b:
            return None
        low, high = min(max(low, a), b), max(min(high, b), a)
    return low, high
