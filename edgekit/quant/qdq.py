"""An annotated model as a Q/DQ ONNX file: QuantizeLinear and DequantizeLinear around every annotated value.

One pair per value. Weights are stored as int8 behind a DequantizeLinear, biases as int32 where the style
wants them so. States enter and leave as codes: half a pair each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.errors import LoweringError, UsageError
from edgekit.passes.graph import clean, constant, new_weight, only_user
from edgekit.quant.annotate import quant, set_quant, state_codes
from edgekit.quant.placement import prepared, saturates
from edgekit.quant.rules import WEIGHTED, Rules, bias, weight
from edgekit.quant.weights import bias_codes, bias_scale, codes
from edgekit.spec import DType, QuantParams

MIN_OPSET = 13
"""The first with scales per channel."""
MIN_OPSET_FLOAT16 = 19
"""The first whose Q and DQ take float16."""


@dataclass(frozen=True)
class Style:
    """How a library wants the file. `activations`: int8, or uint8 (128 added to codes and zero points);
    `int32_bias`: biases as int32 behind a DequantizeLinear; `absorb`: drop a Relu or Clip that the
    quantization of its output repeats."""

    activations: str = "int8"
    int32_bias: bool = True
    absorb: bool = True
    min_opset: int = MIN_OPSET
    pad_codes: bool = True
    """Pad between equal scales works on the codes themselves (ONNX Runtime fuses no Q/DQ around it)."""

    @staticmethod
    def of(rules: Rules) -> Style:
        opset = MIN_OPSET_FLOAT16 if rules.float16_scales else MIN_OPSET
        return Style(rules.codes, rules.int32_bias, bool(rules.absorbed), opset, "Pad" in rules.copies)


def annotated(model: ir.Model) -> bool:
    """Whether any weighted node has a quantized input and weight."""
    return any(integer_operands(node) is not None for node in model.graph)


def integer_operands(node: ir.Node) -> tuple[QuantParams, QuantParams] | None:
    """Params of input and weight of a weighted node, None unless both are quantized."""
    if node.op_type not in WEIGHTED:
        return None
    activation, found = quant(node.inputs[0]), quant(weight(node))
    return None if activation is None or found is None else (activation, found)


def lowered(model: ir.Model, rules: Rules, target: str) -> ir.Model:
    """`to_qdq` in the style of `rules`. Raises: UsageError if nothing is annotated, LoweringError."""
    if not annotated(model):
        raise UsageError(
            f"precision int8 for {target}: the network has no quantization parameters, expected some from a "
            "calibration. Quantize it before lowering"
        )
    return to_qdq(model, Style.of(rules))


def to_qdq(model: ir.Model, style: Style) -> ir.Model:
    """A copy with the annotations written out, of the same inputs and outputs, without annotations.

    States that `annotate.state_codes` names are of the style's integer type, and alone keep their annotation.
    Raises: LoweringError if the opset cannot be raised to `style.min_opset`.
    """
    held = state_codes(model)
    model = raise_opset(prepared(model), style.min_opset)
    graph = model.graph
    for node in list(graph):
        if style.int32_bias:
            _bias(graph, node)
        if style.absorb:
            _drop_absorbed(graph, node)
    values = [*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)]
    marked = [(v, params) for v in values if (params := quant(v)) is not None]
    pads = [n for n in graph if n.op_type == "Pad" and quant(n.inputs[0]) == quant(n.outputs[0]) is not None]
    for value, params in marked:
        set_quant(value, None)
        if constant(value) is not None:
            _store(graph, value, params, style)
        elif value.uses() or value.is_graph_output():
            pair(graph, value, params, style)
    for node in pads if style.pad_codes else ():
        _pad_codes(graph, node)
    _bare_states(graph, {name: stored_as(params, style) for name, params in held.items()})
    clean(model)
    return model


def stored_as(params: QuantParams, style: Style) -> QuantParams:
    """`params` of an activation as the file holds it."""
    if style.activations == "int8":
        return params
    return QuantParams(DType.uint8, params.scale, tuple(zero + 128 for zero in params.zero_point))


def raise_opset(model: ir.Model, least: int) -> ir.Model:
    """`model` at opset `least` or above, annotations kept. Raises: LoweringError."""
    have = model.graph.opset_imports.get("", 0)
    if have >= least:
        return model
    before = [
        *model.graph.inputs,
        *model.graph.initializers.values(),
        *(v for n in model.graph for v in n.outputs),
    ]
    marks = {v.name: params for v in before if (params := quant(v)) is not None}
    from onnx import version_converter

    try:
        raised = ir.from_proto(version_converter.convert_version(ir.to_proto(model), least))
    except Exception as error:  # noqa: BLE001 - the C++ converter raises several kinds
        raise LoweringError(
            f"network: opset {have} cannot be raised to {least}, which int8 needs: {' '.join(str(error).split())[:200]}. "
            f"Export it with opset_version={least}"
        ) from None
    graph = raised.graph
    for value in (*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)):
        if value.name in marks:
            set_quant(value, marks[value.name])
    return prepared(raised)


def pair(graph: ir.Graph, value: ir.Value, params: QuantParams, style: Style) -> ir.Value:
    """Put Q -> DQ behind `value`: whatever read it, graph outputs included, reads the rounded one."""
    offset = 128 if style.activations == "uint8" else 0
    scale = new_weight(graph, f"{value.name}.scale", np.asarray(params.scale[0], np.float32))
    zero = new_weight(
        graph, f"{value.name}.zero", np.asarray(params.zero_point[0] + offset, style.activations)
    )
    q = ir.node("QuantizeLinear", [value, scale, zero])
    dq = ir.node("DequantizeLinear", [q.outputs[0], scale, zero])
    result = dq.outputs[0]
    kind = ir.DataType.UINT8 if offset else ir.DataType.INT8
    q.outputs[0].name = f"{value.name}.codes"
    q.outputs[0].shape, q.outputs[0].type = value.shape, ir.TensorType(kind)
    result.shape, result.type = value.shape, value.type
    name = str(value.name)
    readers = [(user, index) for user, index in value.uses() if user is not q]
    for user, index in readers:
        user.replace_input_with(index, result)
    outputs = [i for i, v in enumerate(graph.outputs) if v is value]
    result.name = f"{name}.real"
    if outputs:
        value.name, result.name = f"{name}.exact", name
        for i in outputs:
            graph.outputs[i] = result
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], [q, dq])
    else:
        graph.insert_after(producer, [q, dq])
    return result


def _bare_states(graph: ir.Graph, held: Mapping[str, QuantParams]) -> None:
    """Graph inputs and outputs of these names become the codes inside their pair of Q and DQ."""
    for i, value in enumerate(graph.inputs):
        params = held.get(str(value.name))
        if params is None:
            continue
        codes_in = ir.Value(name=value.name, shape=value.shape, type=_type(params))
        set_quant(codes_in, params)
        graph.inputs[i] = codes_in
        for q, _ in value.uses():  # none where nothing reads the state
            assert q.op_type == "QuantizeLinear"
            q.outputs[0].replace_all_uses_with(codes_in)
            graph.remove(q, safe=True)
        value.name = None
    for i, value in enumerate(graph.outputs):
        params = held.get(str(value.name))
        if params is None:
            continue
        dq = value.producer()
        assert dq is not None and dq.op_type == "DequantizeLinear" and dq.inputs[0] is not None
        name, value.name = value.name, f"{value.name}.real"
        made = dq.inputs[0]
        if made.is_graph_input():  # a state that only grows old: its own tensor on either side
            identity = ir.node("Identity", [made])
            graph.insert_after(dq, identity)
            made = identity.outputs[0]
        made.name, made.shape, made.type = name, value.shape, _type(params)
        set_quant(made, params)
        graph.outputs[i] = made
        if not value.uses():
            graph.remove(dq, safe=True)


def _type(params: QuantParams) -> ir.TensorType:
    return ir.TensorType(ir.DataType.UINT8 if params.dtype == DType.uint8 else ir.DataType.INT8)


def _pad_codes(graph: ir.Graph, node: ir.Node) -> None:
    """DQ -> Pad -> Q becomes Pad, filled with the code of 0."""
    before, after = (
        node.inputs[0].producer() if node.inputs[0] is not None else None,
        only_user(node.outputs[0]),
    )
    assert before is not None and after is not None
    codes_in, _, zero = before.inputs
    codes_out = after.outputs[0]
    inputs = [codes_in, node.inputs[1], zero, *node.inputs[3:]]
    made = ir.node("Pad", inputs, node.attributes)
    made.outputs[0].shape, made.outputs[0].type = codes_out.shape, codes_out.type
    made.outputs[0].name, codes_out.name = str(codes_out.name), f"{codes_out.name}.old"
    graph.insert_after(after, made)
    codes_out.replace_all_uses_with(made.outputs[0])
    graph.remove([after, node], safe=True)


def _store(graph: ir.Graph, value: ir.Value, params: QuantParams, style: Style) -> None:
    """An initialiser as codes behind a DequantizeLinear."""
    numbers = constant(value)
    assert numbers is not None
    if params.axis is None:  # an operand of Add or Mul, in the style of activations
        offset = 128 if style.activations == "uint8" else 0
        low, high = -128 + offset, 127 + offset
        found = np.rint(numbers / np.float32(params.scale[0])) + params.zero_point[0] + offset
        stored = np.clip(found, low, high).astype(style.activations)
        scale: np.ndarray = np.asarray(params.scale[0], np.float32)
        zero = np.asarray(params.zero_point[0] + offset, style.activations)
        _dequantize(graph, value, stored, scale, zero, None)
    else:
        scale = np.asarray(params.scale, np.float32)
        _dequantize(graph, value, codes(numbers, params), scale, np.zeros(scale.shape, np.int8), params.axis)


def _bias(graph: ir.Graph, node: ir.Node) -> None:
    operands, value = integer_operands(node), bias(node)
    if operands is None or value is None:
        return
    scale = bias_scale(*operands)
    numbers = constant(value)
    assert numbers is not None
    if numbers.size != scale.size:
        return
    own = new_weight(graph, f"{value.name}.of.{node.outputs[0].name}", numbers.reshape(-1))
    node.replace_input_with(2, own)
    _dequantize(graph, own, bias_codes(numbers, scale), scale, None, 0)


def _dequantize(
    graph: ir.Graph,
    value: ir.Value,
    stored: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    axis: int | None,
) -> None:
    """All that read the initialiser `value` read DequantizeLinear(stored) instead."""
    name = str(value.name)
    inputs = [new_weight(graph, f"{name}.codes", stored), new_weight(graph, f"{name}.scale", scale)]
    if zero is not None:
        inputs.append(new_weight(graph, f"{name}.zero", zero))
    node = ir.node("DequantizeLinear", inputs, {} if axis is None else {"axis": axis})
    result = node.outputs[0]
    result.name, result.shape, result.type = f"{name}.real", value.shape, value.type
    for user, index in list(value.uses()):
        user.replace_input_with(index, result)
    graph.insert_before(graph[0], node)


def _drop_absorbed(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a Relu or Clip whose bounds are beyond the ends of the codes of its output."""
    params = quant(node.outputs[0]) if node.op_type in ("Relu", "Clip") else None
    source = node.inputs[0]
    if params is None or source is None or quant(source) is not None or source.producer() is None:
        return
    if len(source.uses()) != 1 or source.is_graph_output():
        return
    if not saturates(node, params):
        return
    output = node.outputs[0]
    set_quant(source, params)
    if output.is_graph_output():
        name, shape, kind = str(output.name), output.shape, output.type
        output.name, source.name = f"{name}.absorbed", name
        source.shape, source.type = shape, kind
    output.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
