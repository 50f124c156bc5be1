"""Small networks for the quantization tests: one operator between two convolutions, and its statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.backends.onnxruntime.engine import DISABLED
from edgekit.quant.annotate import quant
from edgekit.quant.calibrate import calibrate
from edgekit.quant.placement import Choices, place
from edgekit.quant.rules import Rules
from edgekit.quant.stats import Stats
from edgekit.spec import QuantParams
from tests.tensorrt_graphs import graph

SHAPE = (1, 16, 8, 8)

BETWEEN: dict[str, str] = {
    "nothing": "b = Identity(a)",
    "Relu": "b = Relu(a)",
    "Clip": "b = Clip(a, zero, six)",
    "Sigmoid": "b = Sigmoid(a)",
    "SiLU": "g = Sigmoid(a) \n b = Mul(a, g)",
    "Tanh": "b = Tanh(a)",
    "LeakyRelu": "b = LeakyRelu <alpha=0.1> (a)",
    "HardSwish": "b = HardSwish(a)",
    "Add": "c = Conv <pads=[1,1,1,1]> (x, w1, b1) \n b = Add(a, c)",
    "AddRelu": "c = Conv <pads=[1,1,1,1]> (x, w1, b1) \n s = Add(a, c) \n b = Relu(s)",
    "AddConstant": "b = Add(a, k)",
    "MulConstant": "b = Mul(a, k)",
    "Sub": "c = Conv <pads=[1,1,1,1]> (x, w1, b1) \n b = Sub(a, c)",
    "Concat": "c = Conv <pads=[1,1,1,1]> (x, w1, b1) \n n = Concat <axis=1> (a, c) \n b = Slice(n, s0, s16, s1)",
    "Split": "p, q = Split <axis=1, num_outputs=2> (a) \n b = Concat <axis=1> (q, p)",
    "MaxPool": "b = MaxPool <kernel_shape=[3,3], pads=[1,1,1,1]> (a)",
    "AveragePool": "b = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1]> (a)",
    "GlobalAveragePool": "g = GlobalAveragePool(a) \n b = Add(a, g)",
    "ResizeNearest": 'b = Resize <mode="nearest", coordinate_transformation_mode="asymmetric", '
    'nearest_mode="floor"> (a, , scales)',
    "ResizeLinear": 'b = Resize <mode="linear", coordinate_transformation_mode="half_pixel"> (a, , scales)',
    "Reshape": "b = Reshape(a, flat)",
    "Transpose": "b = Transpose <perm=[0,1,3,2]> (a)",
    "Slice": "b = Slice(a, s0, s8, s1)",
    "Pad": "b = Pad(a, pads)",
    "Gather": "b = Gather <axis=1> (a, picks)",
    "Squeeze": "n = Squeeze(a, s0) \n b = Unsqueeze(n, s0)",
    "Flatten": "n = Flatten(a) \n b = Reshape(n, flat)",
    "Expand": "b = Expand(a, flat)",
    "Tile": "b = Tile(a, ones)",
    "DepthToSpace": "n = DepthToSpace <blocksize=2> (a) \n b = SpaceToDepth <blocksize=2> (n)",
    "Softmax": "b = Softmax <axis=1> (a)",
}


def network(body: str, seed: int = 0, outputs: Mapping[str, tuple[int, ...]] | None = None) -> ir.Model:
    """A network of `body`, from input x [1,16,8,8]; `w1`..`w3`, `b1`..`b3` are weights and biases."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {
        "zero": np.float32(0),
        "six": np.float32(2),
        "k": rng.standard_normal((1, 16, 1, 1)).astype(np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
        "flat": np.array([1, 16, 8, 8]),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "picks": np.arange(16)[::-1].copy(),
        "ones": np.array([1, 1, 1, 1]),
        **{f"s{i}": np.array([i]) for i in (0, 1, 8, 16)},
    }
    for i in range(1, 4):
        spread = np.exp(rng.normal(0, 1, (16, 1, 1, 1)))
        weights[f"w{i}"] = (rng.standard_normal((16, 16, 3, 3)) * spread / 12).astype(np.float32)
        weights[f"d{i}"] = (rng.standard_normal((16, 1, 3, 3)) / 3).astype(np.float32)
        weights[f"b{i}"] = rng.standard_normal(16).astype(np.float32)
    weights["wm"] = rng.standard_normal((16, 16)).astype(np.float32)
    used = {
        word.strip(" )\n") for line in body.splitlines() for word in line[line.rindex("(") + 1 :].split(",")
    }
    kept = {n: a for n, a in weights.items() if n in used}
    made = graph(body, {"x": SHAPE}, dict(outputs or {"y": SHAPE}), kept, opset=19)
    for value in made.graph.output:
        value.type.tensor_type.ClearField("shape")
    import onnx

    return ir.from_proto(onnx.shape_inference.infer_shapes(made, strict_mode=True, data_prop=True))


def between(name: str, seed: int = 0) -> ir.Model:
    """conv -> the operator -> conv -> y."""
    last = "y = Conv <pads=[1,1,1,1]> (b, w2, b2)"
    if name == "Slice":  # which leaves half of the channels
        last = "n = Concat <axis=1> (b, b) \n y = Conv <pads=[1,1,1,1]> (n, w2, b2)"
    return network(f"a = Conv <pads=[1,1,1,1]> (x, w3, b3) \n {BETWEEN[name]} \n {last}", seed)


def pictures(count: int = 3, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal(SHAPE).astype(np.float32)} for _ in range(count)]


def statistics(model: ir.Model) -> Stats:
    return calibrate(model, pictures())


def annotated(model: ir.Model, rules: Rules, **choices: Any) -> ir.Model:
    """Calibrated on `pictures` and placed; min-max ranges unless `choices` say otherwise."""
    return place(model, statistics(model), rules, Choices(**{"scheme": "minmax", **choices}))


def unmeasured(model: ir.Model, rules: Rules) -> ir.Model:
    """Placed with the range -4 to 4 for every value, where nothing can be run."""
    values = [*model.graph.inputs, *(v for n in model.graph for v in n.outputs)]
    return place(model, {}, rules, Choices(ranges=tuple((str(v.name), (-4.0, 4.0)) for v in values)))


def produced(model: ir.Model, output: str) -> ir.Node:
    """The node that writes the value `output`."""
    return next(n for n in model.graph if any(v.name == output for v in n.outputs))


def params(model: ir.Model) -> dict[str, QuantParams]:
    """Params by value name."""
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [v for n in model.graph for v in n.outputs]
    return {str(v.name): q for v in values if (q := quant(v)) is not None}


def session(data: bytes, *, arm: bool = False, workdir: Path | None = None) -> Any:
    """ONNX Runtime as the engine opens it; `arm`: with the integer kernels that it takes on ARM."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if arm:
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    if workdir is not None:
        options.optimized_model_filepath = str(workdir / "optimised.onnx")
    return onnxruntime.InferenceSession(
        data, options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED
    )


def executed(data: bytes, workdir: Path, *, arm: bool = False) -> Counter[str]:
    """Operators of the network as ONNX Runtime will run it, layout changes aside."""
    import onnx

    session(data, arm=arm, workdir=workdir)
    found = Counter(n.op_type for n in onnx.load(str(workdir / "optimised.onnx")).graph.node)
    del found["Transpose"]
    return found
