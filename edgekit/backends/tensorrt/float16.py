"""Turns a float32 graph into a strongly typed float16 one: every Cast explicit, inputs and outputs float32.

Which nodes stay float32 follows AutoCast of NVIDIA's Model Optimizer (docs/source/guides/8_autocast.rst):
those whose weights or known activations leave the range in which float16 is safe, and those of `KEEP`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgekit.backends.tensorrt.lint import constant, dtype_name

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

INIT_MAX = 65504.0
"""Largest finite float16 (AutoCast `init_max`)."""
DATA_MAX = 512.0
"""Largest activation that a float16 node may see, leaving 2^7 of headroom for sums (AutoCast `data_max`)."""

KEEP: dict[str, str] = {
    "BatchNormalization": "its variance may underflow, and TensorRT before 10.7 wants operands of one type",
    "CumSum": "a running sum loses small terms",
    "EyeLike": "its result type is an attribute",
    "GridSample": "coordinates need more than 11 bits",
    "GroupNormalization": "sums of squares overflow",
    "InstanceNormalization": "sums of squares overflow",
    "LayerNormalization": "sums of squares overflow",
    "LpNormalization": "sums of squares overflow",
    "LpPool": "sums of powers overflow",
    "LRN": "sums of squares overflow",
    "MeanVarianceNormalization": "sums of squares overflow",
    "NonMaxSuppression": "ONNX defines it for float32 only",
    "RandomNormal": "its result type is an attribute",
    "RandomNormalLike": "its result type is an attribute",
    "RandomUniform": "its result type is an attribute",
    "RandomUniformLike": "its result type is an attribute",
    "Range": "counts above 2048 are not exact",
    "ReduceL2": "sums of squares overflow",
    "ReduceLogSum": "the sum overflows",
    "ReduceLogSumExp": "the sum overflows",
    "ReduceProd": "products overflow",
    "ReduceSumSquare": "sums of squares overflow",
    "RMSNormalization": "sums of squares overflow",
    "STFT": "TensorRT computes it in float32 only",
}
"""Operators that stay float32, and why."""


def to_float16(
    model: ir.Model,
    ranges: Mapping[str, float] | None = None,
    *,
    init_max: float = INIT_MAX,
    data_max: float = DATA_MAX,
) -> dict[str, int]:
    """Converts `model` in place; returns reason -> number of nodes that stay float32.

    Q and DQ become float16 with what is around them, their scales too: those must be exact in float16.

    `ranges`: largest absolute value seen per value name; a node that reads or writes more than `data_max`
    stays float32. Initialisers are rounded to nearest even; the bounds of Clip saturate. Needs typed values.
    """
    graph = model.graph
    opset = graph.opset_imports.get("", 0)
    state = _State(graph)
    kept: dict[str, int] = {}
    reasons = {n: _why_float32(n, _schema(n, opset), ranges or {}, init_max, data_max) for n in graph}
    for node in [n for n, reason in reasons.items() if reason and _quantized(n)]:
        for value in node.inputs[:2]:  # a Cast between DequantizeLinear and the product would part them
            reasons[value.producer()] = reasons[node]  # type: ignore[union-attr, index]
    for node in list(graph):
        if not any(dtype_name(v) == "float32" for v in (*node.inputs, *node.outputs)) and not any(
            v in state.halves for v in node.inputs if v is not None
        ):
            continue
        schema = _schema(node, opset)
        reason = reasons[node]
        if reason:
            kept[reason] = kept.get(reason, 0) + 1
            for i, value in enumerate(node.inputs):
                if value is not None and value in state.halves:
                    node.replace_input_with(i, state.single(value))
        else:
            _convert(node, schema, state)
    _restore_outputs(graph, state)
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[name]
    return dict(sorted(kept.items()))


class _State:
    """Which values are float16 by now, and the casts made so far (one per value and direction)."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.halves: set[ir.Value] = set()
        self._singles: dict[ir.Value, ir.Value] = {}
        self._cast: dict[ir.Value, ir.Value] = {}
        self._first = next(iter(graph), None)

    def single(self, value: ir.Value) -> ir.Value:
        """The float32 form of a float16 value."""
        import onnx_ir as ir

        if value not in self._singles:
            self._singles[value] = self._insert(value, ir.DataType.FLOAT, "_f32")
        return self._singles[value]

    def half(self, value: ir.Value, saturate: bool) -> ir.Value:
        """The float16 form of a float32 value: a rounded initialiser or a Cast."""
        import onnx_ir as ir

        if value in self._cast:
            return self._cast[value]
        numbers = constant(value)
        if numbers is None:
            made = self._insert(value, ir.DataType.FLOAT16, "_f16")
        else:
            if saturate:
                numbers = np.clip(numbers, -INIT_MAX, INIT_MAX)
            rounded = numbers.astype(np.float16)
            name = f"{value.name}_f16"
            made = ir.Value(
                name=name,
                shape=ir.Shape(rounded.shape),
                type=ir.TensorType(ir.DataType.FLOAT16),
                const_value=ir.Tensor(rounded, name=name),
            )
            self.graph.register_initializer(made)
        self._cast[value] = made
        self.halves.add(made)
        return made

    def _insert(self, value: ir.Value, dtype: ir.DataType, suffix: str) -> ir.Value:
        import onnx_ir as ir

        cast = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=f"{value.name}{suffix}")
        made = cast.outputs[0]
        made.name, made.shape, made.type = f"{value.name}{suffix}", value.shape, ir.TensorType(dtype)
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, cast)
        elif self._first is not None:
            self.graph.insert_before(self._first, cast)
        return made


def _schema(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    import onnx

    try:
        return onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def _formal(schema: onnx.defs.OpSchema, index: int, output: bool = False) -> str:
    """Type parameter ("T") or fixed type ("tensor(float)") of an operand; a variadic last one repeats."""
    formals = schema.outputs if output else schema.inputs
    return formals[min(index, len(formals) - 1)].type_str if formals else ""


def _halvable(schema: onnx.defs.OpSchema, index: int, output: bool = False) -> bool:
    type_str = _formal(schema, index, output)
    return any(
        t.type_param_str == type_str and "tensor(float16)" in t.allowed_type_strs
        for t in schema.type_constraints
    )


def _why_float32(
    node: ir.Node,
    schema: onnx.defs.OpSchema | None,
    ranges: Mapping[str, float],
    init_max: float,
    data_max: float,
) -> str:
    """Why `node` stays float32, "" if it need not."""
    op = node.op_type
    if schema is None or node.domain not in ("", "ai.onnx"):
        return f"{op}: not an operator of this opset"
    if op in KEEP:
        return f"{op}: {KEEP[op]}"
    if any(a.type.name in ("GRAPH", "GRAPHS") for a in node.attributes.values()):
        return f"{op}: it holds a subgraph"
    floats = [i for i, v in enumerate(node.inputs) if dtype_name(v) in ("float32", "float16")]
    if floats and not _halvable(schema, floats[0]):
        return f"{op}: ONNX defines it for float32 only"
    if op != "Clip":  # bounds of Clip saturate instead
        for i in floats:
            numbers = constant(node.inputs[i])
            if numbers is None or not _halvable(schema, i):
                continue
            finite = np.abs(numbers[np.isfinite(numbers)])
            if finite.size and float(finite.max()) > init_max:
                return f"{op}: constants above {init_max:g}"
    # codes are summed in int32: a quantized product needs no headroom, only a result that float16 holds
    limit = INIT_MAX / 2 if op in ("QuantizeLinear", "DequantizeLinear") or _quantized(node) else data_max
    for value in (*node.inputs, *node.outputs):
        if value is not None and ranges.get(value.name or "", 0.0) > limit:
            return f"{op}: activations above {limit:g}"
    return ""


def _quantized(node: ir.Node) -> bool:
    """Its operands come from DequantizeLinear: it computes on codes."""
    producers = [v.producer() if v is not None else None for v in node.inputs[:2]]
    return len(producers) == 2 and all(p is not None and p.op_type == "DequantizeLinear" for p in producers)


def _convert(node: ir.Node, schema: onnx.defs.OpSchema | None, state: _State) -> None:
    import onnx_ir as ir

    assert schema is not None
    op = node.op_type
    if op == "Cast":
        # its input keeps its type; a Cast to float becomes one to float16
        if node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT16))
    else:
        for i, value in enumerate(node.inputs):
            if dtype_name(value) == "float32" and _halvable(schema, i):
                assert value is not None
                node.replace_input_with(i, state.half(value, saturate=op == "Clip"))
        if op == "ConstantOfShape" and dtype_name(node.outputs[0]) == "float32":
            attr = node.attributes.get("value")
            fill = np.zeros(1) if attr is None else attr.as_tensor().numpy()
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(fill.astype(np.float16)))
    for i, value in enumerate(node.outputs):
        if dtype_name(value) == "float32" and _halvable(schema, i, output=True):
            value.type = ir.TensorType(ir.DataType.FLOAT16)
            state.halves.add(value)


def _restore_outputs(graph: ir.Graph, state: _State) -> None:
    """Graph outputs keep name and float32; the float16 value behind them gets a name of its own."""
    for i, value in enumerate(graph.outputs):
        if value in state.halves:
            made = state.single(value)
            name, value.name = value.name, f"{value.name}_f16_out"
            made.name = name
            graph.outputs[i] = made
