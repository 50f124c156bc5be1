"""What each node becomes: activations joined to their producers, integers or floats, the scales of tensors.

The rule. A node computes in integers if it has an integer kernel and every tensor that it reads or
writes is annotated (constants of element-wise operators are quantized here, to their own range). A
value is stored as codes if it is annotated and the node that writes it, or one that reads it,
computes in integers. Nodes that compute in floats read such a value dequantized, and what they write
to it is rounded to codes. An annotated value between two nodes that compute in floats stays float.

Scales that are not those of the annotation, since the kernels want it or for less work:

- Sigmoid and Tanh write 1/256 (zero point -128) and 1/128 (0), which TensorFlow Lite fixes.
- Operators that only move or choose values (Reshape, Slice, MaxPool, Resize ...) keep the scale that they read:
  nothing is rounded a second time.
- A value that is only read by operators which need it at one other scale (Concat) is written at that scale.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from edgekit.passes.graph import constant, number, scalar, shape
from edgekit.quant.annotate import quant
from edgekit.spec import DType, QuantParams

SIGMOID = QuantParams(DType.int8, (1 / 256,), (-128,))
TANH = QuantParams(DType.int8, (1 / 128,), (0,))

MOVES = {
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "MaxPool", "Resize", "Pad",
    "DepthToSpace", "SpaceToDepth", "Identity", "Dropout", "Gather", "ReduceMax", "GlobalMaxPool", "Expand",
}  # fmt: skip
"""One data input, and every output value is an input value (or, for Resize, between two): same scale."""

FREE = {
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "ReduceMean", "GlobalAveragePool",
    "AveragePool", "LeakyRelu", "HardSwish", "HardSigmoid",
}  # fmt: skip
"""Integer kernels that write any scale."""

FUSED_INTO = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Div"}
"""Producers whose TensorFlow Lite operator takes an activation."""


@dataclass
class Unit:
    """A node with the activation that follows it."""

    node: ir.Node
    outputs: list[ir.Value]
    act: str = "NONE"
    """Of schema.ActivationFunctionType."""
    integer: bool = False

    @property
    def op(self) -> str:
        return self.node.op_type

    def input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def data(self) -> list[ir.Value]:
        """Inputs that are computed (not constants, weights or shapes)."""
        return [v for v in self.node.inputs if v is not None and constant(v) is None]


@dataclass
class Plan:
    units: list[Unit]
    params: dict[ir.Value, QuantParams] = field(default_factory=dict)
    """Values stored as codes."""
    readers: dict[ir.Value, list[Unit]] = field(default_factory=dict)


def activation(node: ir.Node) -> str:
    """The fusible activation that a node is, "" for anything else."""
    if node.op_type == "Relu":
        return "RELU"
    if node.op_type != "Clip":
        return ""
    low, high = bounds(node)
    if low == 0 and high == 6:
        return "RELU6"
    if low == 0 and (high is None or high >= 3e38):
        return "RELU"
    return "RELU_N1_TO_1" if (low, high) == (-1, 1) else ""


def bounds(node: ir.Node) -> tuple[float | None, float | None]:
    """Limits of a Clip."""
    low = scalar(node.inputs[1]) if len(node.inputs) > 1 else None
    high = scalar(node.inputs[2]) if len(node.inputs) > 2 else None
    return low, high


def make(model: ir.Model, integers: bool) -> Plan:
    """The plan of a prepared graph. `integers`: use the annotations, else everything is float."""
    units: list[Unit] = []
    maker: dict[ir.Value, Unit] = {}
    for node in model.graph:
        if node.op_type == "Constant":
            continue
        act = activation(node)
        source = node.inputs[0] if act else None
        if source is not None and (unit := maker.get(source)) is not None and _takes(unit, source):
            unit.act = act
            unit.outputs = list(node.outputs)
        else:
            unit = Unit(node, list(node.outputs))
            units.append(unit)
        for value in unit.outputs:
            maker[value] = unit
    plan = Plan(units)
    for unit in units:
        for value in unit.data():
            plan.readers.setdefault(value, []).append(unit)
    if integers:
        _choose(plan)
        _scales(plan, maker)
    return plan


def _takes(unit: Unit, value: ir.Value) -> bool:
    alone = len(tuple(value.uses())) == 1 and not value.is_graph_output()
    return unit.op in FUSED_INTO and unit.act == "NONE" and alone and len(unit.outputs) == 1


def _choose(plan: Plan) -> None:
    annotated = {v: p for u in plan.units for v in [*u.data(), *u.outputs] if (p := quant(v)) is not None}
    for unit in plan.units:  # the gate of a SiLU may carry nothing: its scale is fixed anyway
        (out, *_) = unit.outputs
        if unit.op == "Sigmoid" and out not in annotated and not out.is_graph_output():
            readers = plan.readers.get(out, [])
            gates = [r.op == "Mul" and all(v is out or v in annotated for v in r.data()) for r in readers]
            outs = [o in annotated for r in readers for o in r.outputs]
            if readers and all(gates) and all(outs) and unit.node.inputs[0] in annotated:
                annotated[out] = SIGMOID
    for unit in plan.units:
        data = unit.data()
        unit.integer = (
            bool(data)
            and all(v in annotated for v in [*data, *unit.outputs])
            and _has_integer_kernel(unit, annotated)
        )
    for value, params in annotated.items():
        writers = [u for u in plan.units if value in u.outputs]
        if any(u.integer for u in [*writers, *plan.readers.get(value, [])]):
            plan.params[value] = params


def _has_integer_kernel(unit: Unit, annotated: dict[ir.Value, QuantParams]) -> bool:
    op, node = unit.op, unit.node
    if op in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        weight = node.inputs[1]
        return len(unit.data()) == 1 and constant(weight) is not None and quant(weight) is not None
    if op in ("Concat", "Add", "Sub", "Mul", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid"):
        return True
    if op in ("Relu", "Clip"):  # by saturation: what lies outside the codes of the output
        low, high = (0.0, None) if op == "Relu" else bounds(node)
        return saturates(annotated[unit.outputs[0]], low, high)
    if op == "LeakyRelu":
        return number(node, "alpha", 0.01) > 0
    if op == "AveragePool":
        pads = node.attributes.get("pads")
        auto = node.attributes.get("auto_pad")
        padded = (pads is not None and any(pads.as_ints())) or (
            auto is not None and auto.as_string() not in ("NOTSET", "VALID")
        )
        return not padded and "ceil_mode" not in node.attributes
    if op == "Resize":
        mode = node.attributes.get("mode")
        return mode is None or mode.as_string() in ("nearest", "linear")
    if op == "Pad":
        value = scalar(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else 0.0
        mode = node.attributes.get("mode")
        return (value or 0.0) == 0.0 and (mode is None or mode.as_string() == "constant")
    return op in FREE or op in MOVES


def saturates(params: QuantParams, low: float | None, high: float | None) -> bool:
    """The codes of `params` reach to `low` and `high` and no further (to half a step)."""
    (scale,), (zero,) = params.scale, params.zero_point
    bottom, top = (-128 - zero) * scale, (127 - zero) * scale
    fits_low = low is None or abs(bottom - low) <= scale / 2
    return fits_low and (high is None or top <= high + scale / 2)


def _scales(plan: Plan, maker: dict[ir.Value, Unit]) -> None:
    params = plan.params
    for unit in plan.units:  # forwards: fixed scales, and those that are kept
        if not unit.integer:
            continue
        if unit.op in ("Sigmoid", "Tanh"):
            params[unit.outputs[0]] = SIGMOID if unit.op == "Sigmoid" else TANH
        elif unit.op in MOVES:
            for value in unit.outputs:
                params[value] = params[unit.data()[0]]
    wanted: dict[ir.Value, QuantParams | None] = {}
    for unit in reversed(plan.units):  # backwards: who reads a value at another scale only
        for value in unit.outputs:
            if value not in params:
                continue
            asked = {_asks(r, params, wanted) for r in plan.readers.get(value, [])}
            one = asked.pop() if len(asked) == 1 and not value.is_graph_output() else None
            movable = unit.integer and (unit.op in FREE or unit.op in MOVES)
            wanted[value] = one if movable or not unit.integer else None
    for unit in plan.units:
        for value in unit.outputs:
            new = wanted.get(value)
            if unit.integer and unit.op in MOVES:  # follows what it reads, which may have moved
                params[value] = params[unit.data()[0]]
            elif new is not None:
                params[value] = new


def _asks(
    reader: Unit, params: dict[ir.Value, QuantParams], wanted: dict[ir.Value, QuantParams | None]
) -> QuantParams | None:
    """The one scale at which `reader` can use its inputs, None if it takes any."""
    if not reader.integer:
        return None
    if reader.op == "Concat":
        return params[reader.outputs[0]]
    if reader.op in MOVES:
        asked = {wanted.get(value) for value in reader.outputs}
        return asked.pop() if len(asked) == 1 else None
    return None


def full_shape(value: ir.Value) -> tuple[int, ...]:
    found = shape(value)
    assert found is not None, f"{value.name} has no static shape"
    return found
