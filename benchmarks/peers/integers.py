"""Which share of a network's multiplications is done in integers: read from what the library made of the file,
not from the file alone, which may promise more than runs."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.peers.cases import Layer, layers_in
from edgekit.backends.native.format import OpType, decode

INTEGER_OPS = {
    "QLinearConv",
    "QLinearMatMul",
    "QGemm",
    "ConvInteger",
    "MatMulInteger",
    "DynamicQuantizeMatMul",
}


def share(layers: Sequence[Layer], integer: set[int]) -> float:
    return sum(layers[i].macs for i in integer) / sum(layer.macs for layer in layers)


def onnxruntime(data: bytes, layers: Sequence[Layer]) -> float:
    """Of the graph that ONNX Runtime optimises the file to."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        config = ort.SessionOptions()
        config.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        config.log_severity_level = 4
        ort.InferenceSession(data, config, providers=["CPUExecutionProvider"])
        graph = onnx.load(config.optimized_model_filepath).graph
    found: set[int] = set()
    for node in graph.node:
        if node.op_type in INTEGER_OPS:
            found |= layers_in(" ".join((node.name, *node.input)), layers)
    return share(layers, found)


def openvino(compiled: Any, layers: Sequence[Layer]) -> float:
    """Of the graph that OpenVINO's CPU plugin runs."""
    found: set[int] = set()
    for op in compiled.get_runtime_model().get_ordered_ops():
        facts = op.get_rt_info()

        def fact(key: str, facts: Any = facts) -> str:
            return (
                str(facts[key].astype(str) if hasattr(facts[key], "astype") else facts[key])
                if key in facts
                else ""
            )

        if fact("layerType") in ("Convolution", "FullyConnected", "MatMul") and re.search(
            r"_I8$", fact("primitiveType")
        ):
            found |= layers_in(fact("originalLayersNames"), layers)
    return share(layers, found)


def litert(data: bytes) -> tuple[float, float]:
    """(static, with weights only) shares of a .tflite file, by the types of each operator's tensors: XNNPACK
    runs these as they are written."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    graph = model.subgraphs[0]
    kinds = schema.BuiltinOperator
    weighted = {kinds.CONV_2D, kinds.DEPTHWISE_CONV_2D, kinds.FULLY_CONNECTED, kinds.TRANSPOSE_CONV}
    total = static = dynamic = 0
    for op in graph.operators:
        if model.operatorCodes[op.opcodeIndex].builtinCode not in weighted:
            continue
        x, w = (graph.tensors[i] for i in op.inputs[:2])
        kind = model.operatorCodes[op.opcodeIndex].builtinCode
        inner = np.prod(w.shape[1:3]) if kind == kinds.DEPTHWISE_CONV_2D else np.prod(w.shape[1:])
        macs = int(np.prod(graph.tensors[op.outputs[0]].shape) * inner)
        total += macs
        if w.type == schema.TensorType.INT8:
            static, dynamic = (
                (static + macs, dynamic) if x.type == schema.TensorType.INT8 else (static, dynamic + macs)
            )
    return static / total, dynamic / total


def native(data: bytes) -> float:
    """Of a payload of edgekit's engine: products of its convolutions on codes, of all its convolutions."""
    program = decode(data)
    products = {OpType.conv: 0, OpType.conv_f32: 0}
    for op in program.ops:
        if op.type in products:
            weights, out = op.constants[0], program.tensors[op.output].shape
            assert weights is not None
            products[op.type] += int(np.prod(out[:3])) * weights.size  # each once a pixel
    total = sum(products.values())
    return products[OpType.conv] / total if total else 0.0


def q_dq(data: bytes) -> float:
    """Of an ONNX file, by its structure: layers whose two operands both come from codes."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(data))
    made = {output: node for node in model.graph.node for output in node.output}
    known = [*model.graph.value_info, *model.graph.output]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in known}
    sizes = {t.name: list(t.dims) for t in model.graph.initializer}
    total = integer = 0
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        sources = [made.get(name) for name in node.input[:2]]
        quantized = [s is not None and s.op_type == "DequantizeLinear" for s in sources]
        source = sources[1]
        size = sizes.get(source.input[0] if source is not None else node.input[1], [])
        if not size:
            continue
        out = shapes[node.output[0]]
        inner = int(np.prod(size[1:])) if node.op_type == "Conv" else int(np.prod(size)) // out[-1]
        macs = int(np.prod(out)) * inner
        total += macs
        integer += macs if all(quantized) else 0
    return integer / total if total else 0.0
