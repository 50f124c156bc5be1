"""What a graph costs: parameters, multiply-accumulates, layers."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir

from edgekit.passes.graph import infer, integer, op_counts, shape


def facts(model: ir.Model) -> dict[str, Any]:
    """JSON values; the model is not changed.

    parameters: float initialiser elements.  weight_bytes: bytes of all initialisers.
    macs: multiply-accumulates of Conv, ConvTranspose, Gemm and MatMul for one picture.
    ops: operator -> count.  inputs, outputs: name and shape.
    layers: one entry per weighted node in graph order: name (of its output), op, shape, macs, params.
    """
    model = model.clone()
    infer(model)
    graph = model.graph
    parameters = weight_bytes = 0
    for value in graph.initializers.values():
        if value.const_value is None:
            continue
        weight_bytes += value.const_value.nbytes
        if value.const_value.dtype.is_floating_point():
            parameters += value.const_value.size
    layers = [_layer(node) for node in graph if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    return {
        "parameters": int(parameters),
        "weight_bytes": int(weight_bytes),
        "macs": sum(layer["macs"] for layer in layers),
        "nodes": len(graph),
        "ops": op_counts(graph),
        "inputs": [{"name": v.name, "shape": list(shape(v) or ())} for v in graph.inputs],
        "outputs": [{"name": v.name, "shape": list(shape(v) or ())} for v in graph.outputs],
        "layers": layers,
    }


def _layer(node: ir.Node) -> dict[str, Any]:
    output = shape(node.outputs[0]) or ()
    params = sum(int(v.const_value.size) for v in node.inputs if v is not None and v.const_value is not None)
    return {
        "name": node.outputs[0].name,
        "op": node.op_type,
        "shape": list(output),
        "macs": macs(node),
        "params": params,
    }


def macs(node: ir.Node) -> int:
    """Products per picture of a weighted node: each output element of a Conv takes (I/g) * kh * kw."""
    output = shape(node.outputs[0]) or ()
    source, weight = shape(node.inputs[0]), shape(node.inputs[1])
    if source is None or weight is None or not output:
        return 0
    if node.op_type == "Conv":
        return math.prod(output) * math.prod(weight[1:])
    if node.op_type == "ConvTranspose":  # each input element meets (O/g) * kh * kw weights
        return math.prod(source) * math.prod(weight[1:])
    if node.op_type == "Gemm":
        return math.prod(output) * (source[0] if integer(node, "transA", 0) else source[-1])
    return math.prod(output) * source[-1]
