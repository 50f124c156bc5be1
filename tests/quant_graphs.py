"""Small networks for the quantization tests: one operator between two convolutions, and its statistics."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgekit.quant.calibrate import calibrate
from tests.tensorrt_graphs import graph

Stats = Mapping[str, object]
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
    used = {word.strip(" )\n") for line in body.splitlines() for word in line[line.rindex("(") + 1 :].split(",")}
    kept = {n: a for n, a in weights.items() if n in used}
    made = graph(body, {"x": SHAPE}, dict(outputs or {"y": SHAPE}), kept, opset=19)
    for value in made.graph.output:
        value.type.tensor_type.ClearField("shape")
    import onnx

    return ir.from_proto(onnx.shape_inference.infer_shapes(made, strict_mode=True, data_prop=True))


def between(name: str, seed: int = 0) -> ir.Model:
    """conv -> the operator -> conv (of eight channels after Slice) -> y."""
    last = "y = Conv <pads=[1,1,1,1]> (b, w2, b2)"
    if name == "Slice":
        last = "n = Concat <axis=1> (b, b) \n y = Conv <pads=[1,1,1,1]> (n, w2, b2)"
        body = BETWEEN[name]
    else:
        body = BETWEEN[name]
    return network(f"a = Conv <pads=[1,1,1,1]> (x, w3, b3) \n {body} \n {last}", seed)


def pictures(count: int = 3, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal(SHAPE).astype(np.float32)} for _ in range(count)]


def statistics(model: ir.Model) -> Stats:
    return calibrate(model, pictures())
