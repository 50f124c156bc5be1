"""Small ONNX graphs, and running them with LiteRT and with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from edgekit.backends.base import LoadOptions, Payload
from edgekit.backends.litert import engine
from edgekit.backends.litert.lower import lower
from edgekit.manifest import Variant
from edgekit.passes import probe
from edgekit.passes.graph import constant, infer, integer
from edgekit.quant.annotate import set_quant
from edgekit.spec import DType, QuantParams
from edgekit.target import Target

HOST = Target.load("host")


def graph(
    nodes: Sequence[Any],
    inputs: Mapping[str, Sequence[int]],
    weights: Mapping[str, np.ndarray] | None = None,
    outputs: Sequence[str] = ("y",),
    types: Mapping[str, int] | None = None,
) -> ir.Model:
    """Nodes made with onnx.helper.make_node; shapes of everything else are inferred."""
    proto = helper.make_model(
        helper.make_graph(
            list(nodes),
            "g",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in inputs.items()],
            [
                helper.make_tensor_value_info(n, (types or {}).get(n, TensorProto.FLOAT), None)
                for n in outputs
            ],
            [numpy_helper.from_array(np.asarray(w), n) for n, w in (weights or {}).items()],
        ),
        opset_imports=[helper.make_opsetid("", 19)],
        ir_version=9,
    )
    model = ir.from_proto(proto)
    infer(model)
    return model


def open_payload(payload: Payload, threads: int = 1) -> tuple[engine.LiteExecutable, engine.LiteBinding]:
    variant = Variant(
        "t",
        payload.backend,
        payload.precision,
        payload.format,
        "",
        len(payload.data),
        "",
        dict(payload.options),
    )
    executable = engine.load(memoryview(payload.data), variant, LoadOptions(threads=threads))
    return executable, executable.bind()


def run(
    model: ir.Model, feeds: Mapping[str, np.ndarray], precision: str = "float32"
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(outputs, engine facts) of the model in LiteRT."""
    (payload,) = lower(model, HOST, precision)
    executable, binding = open_payload(payload)
    for name, value in feeds.items():
        np.copyto(binding.inputs[name], value)
    binding.run()
    outputs = {name: np.array(value) for name, value in binding.outputs.items()}
    facts = executable.describe()
    binding.close()
    executable.close()
    return outputs, facts


def feeds(model: ir.Model, seed: int = 0, low: float = -2.0, high: float = 2.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        str(v.name): rng.uniform(low, high, tuple(v.shape)).astype(np.float32)  # type: ignore[arg-type]
        for v in model.graph.inputs
    }


def same(
    model: ir.Model, seed: int = 0, tolerance: float = 1e-5, low: float = -2.0, high: float = 2.0
) -> dict[str, Any]:
    """LiteRT gives what ONNX Runtime gives, to `tolerance` of the output's range. Returns the engine's facts."""
    values = feeds(model, seed, low, high)
    want = probe.evaluate(model, values)
    got, facts = run(model, values)
    for name, array in want.items():
        assert got[name].shape == array.shape, name
        assert got[name].dtype == array.dtype, name
        span = max(float(np.abs(array).max(initial=0)), 1.0)
        np.testing.assert_allclose(got[name], array, rtol=tolerance, atol=tolerance * span, err_msg=name)
    return facts


def affine(low: float, high: float) -> QuantParams:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32(max(high - low, 1e-6) / 255))
    return QuantParams(DType.int8, (scale,), (int(np.clip(round(-128 - low / scale), -128, 127)),))


def fake(values: np.ndarray, params: QuantParams) -> np.ndarray:
    """The reals behind the codes of `values`."""
    return ((codes(values, params) - params.zero_point[0]) * params.scale[0]).astype(np.float32)


def codes(values: np.ndarray, params: QuantParams) -> np.ndarray:
    scaled = np.rint(values.astype(np.float64) / params.scale[0]) + params.zero_point[0]
    result: np.ndarray = np.clip(scaled, -128, 127)
    return result


WEIGHT_AXIS = {"Conv": 0, "ConvTranspose": 1}


def annotate(
    model: ir.Model, samples: Sequence[Mapping[str, np.ndarray]], skip: Sequence[str] = ()
) -> ir.Model:
    """A copy with min-max params on every value (but `skip`) and on weights, from runs on `samples`."""
    model = model.clone()
    infer(model)
    ranges = value_ranges(model, samples)
    for value in [*model.graph.inputs, *(v for n in model.graph for v in n.outputs)]:
        if value.name in ranges and value.name not in skip:
            set_quant(value, affine(*ranges[value.name]))
    for node in model.graph:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            weight = node.inputs[1]
            data = constant(weight)
            if data is None or weight is None:
                continue
            axis = WEIGHT_AXIS.get(node.op_type, data.ndim - 1)
            axis = 0 if node.op_type == "Gemm" and integer(node, "transB", 0) else axis
            largest = np.abs(data).max(axis=tuple(i for i in range(data.ndim) if i != axis))
            scale = np.where(largest > 0, largest / 127, 1.0)
            params = tuple(float(np.float32(s)) for s in scale)
            set_quant(weight, QuantParams(DType.int8, params, (0,) * len(params), axis))
    return model


def value_ranges(
    model: ir.Model, samples: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of everything that is float."""
    probed = model.clone()
    present = {v.name for v in probed.graph.outputs}
    for node in probed.graph:
        for value in node.outputs:
            if node.op_type != "Constant" and value.name not in present and value.dtype == ir.DataType.FLOAT:
                probed.graph.outputs.append(value)
    ranges: dict[str, tuple[float, float]] = {}
    for sample in samples:
        for name, array in {**probe.evaluate(probed, sample), **sample}.items():
            low, high = ranges.get(name, (0.0, 0.0))
            ranges[name] = min(low, float(array.min())), max(high, float(array.max()))
    return ranges
