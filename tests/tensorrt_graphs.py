"""Small networks for the tensorrt tests: random good ones, and one bad one per lint rule."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int | str, ...]


def graph(
    body: str,
    inputs: dict[str, Shape],
    outputs: dict[str, Shape],
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 13,
    types: dict[str, int] | None = None,
) -> onnx.ModelProto:
    """A model from lines of ONNX text such as `y = Relu(x)`; tensors are float32 unless `types` says."""
    kinds = types or {}
    lines = " ".join(line.strip() + "\n" for line in body.splitlines())
    nodes = onnx.parser.parse_graph(f"g (float[1] {next(iter(inputs))}) => () {{ {lines} }}").node

    def infos(side: dict[str, Shape]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), shape)
            for n, shape in side.items()
        ]

    initializers = [numpy_helper.from_array(np.asarray(a), n) for n, a in (weights or {}).items()]
    made = helper.make_graph(nodes, "test", infos(inputs), infos(outputs), initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


KINDS = (
    *("conv", "depthwise", "relu", "sigmoid", "silu", "add", "mul", "concat", "pool", "resize", "clip"),
    *("transpose", "reshape", "slice", "softmax"),
)


def random_network(seed: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A random image network and an input for it: convolutions with the operators that detectors use."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    lines: list[str] = []
    count = 0

    def fresh() -> str:
        nonlocal count
        count += 1
        return f"v{count}"

    def weight(*shape: int, scale: float = 1.0) -> str:
        name = f"w{len(weights)}"
        weights[name] = (rng.standard_normal(shape) * scale).astype(np.float32)
        return name

    def constant(value: np.ndarray) -> str:
        name = f"w{len(weights)}"
        weights[name] = value
        return name

    size, channels = 8, int(rng.integers(1, 5))
    start = (1, channels, size, size)
    values = [("x", start)]
    for _ in range(int(rng.integers(3, 12))):
        source, shape = values[int(rng.integers(len(values)))]
        _, c, h, w = shape
        out = fresh()
        kind = rng.choice(KINDS)
        if kind == "conv":
            n = int(rng.integers(1, 6))
            scale = 1 / np.sqrt(9 * c)
            lines.append(
                f"{out} = Conv <pads=[1,1,1,1]> ({source}, {weight(n, c, 3, 3, scale=scale)}, {weight(n, scale=0.1)})"
            )
            shape = (1, n, h, w)
        elif kind == "depthwise":
            lines.append(f"{out} = Conv <group={c}> ({source}, {weight(c, 1, 1, 1)})")
        elif kind in ("relu", "sigmoid"):
            lines.append(f"{out} = {kind.capitalize()}({source})")
        elif kind == "silu":
            gate = fresh()
            lines += [f"{gate} = Sigmoid({source})", f"{out} = Mul({source}, {gate})"]
        elif kind in ("add", "mul"):
            lines.append(f"{out} = {kind.capitalize()}({source}, {weight(1, c, 1, 1, scale=0.5)})")
        elif kind == "concat":
            lines.append(f"{out} = Concat <axis=1> ({source}, {source})")
            shape = (1, 2 * c, h, w)
        elif kind == "pool" and h > 1 and w > 1:
            lines.append(f"{out} = MaxPool <kernel_shape=[2,2], strides=[2,2]> ({source})")
            shape = (1, c, h // 2, w // 2)
        elif kind == "resize" and h < 16:
            scales = constant(np.array([1, 1, 2, 2], np.float32))
            mode = 'mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"'
            lines.append(f'{out} = Resize <{mode}> ({source}, "", {scales})'.replace('""', ""))
            shape = (1, c, 2 * h, 2 * w)
        elif kind == "clip":
            low, high = constant(np.float32(0)), constant(np.float32(6))
            lines.append(f"{out} = Clip({source}, {low}, {high})")
        elif kind == "transpose":
            lines.append(f"{out} = Transpose <perm=[0,1,3,2]> ({source})")
            shape = (1, c, w, h)
        elif kind == "reshape":
            lines.append(f"{out} = Reshape({source}, {constant(np.array([1, c, w, h]))})")
            shape = (1, c, w, h)
        elif kind == "slice" and w > 1:
            at = [constant(np.array([v])) for v in (0, w - 1, 3)]
            lines.append(f"{out} = Slice({source}, {', '.join(at)})")
            shape = (1, c, h, w - 1)
        else:
            lines.append(f"{out} = Softmax <axis=1> ({source})")
        values.append((out, shape))
    ends = {n: s for n, s in values[1:] if n not in {w for line in lines for w in _operands(line)}}
    model = graph("\n".join(lines), {"x": start}, ends, weights)
    return model, {"x": rng.standard_normal(start).astype(np.float32)}


def _operands(line: str) -> list[str]:
    return [name.strip() for name in line[line.rindex("(") + 1 : -1].split(",")]


@dataclass(frozen=True)
class Bad:
    """A network with one fault: the lint's `rule` for it and words of its message."""

    model: onnx.ModelProto
    rule: str
    says: str
    tensorrt: str = "10.3"
    compute_capability: str = "8.7"
    refused_by_nvidia: bool = True
    """Whether NVIDIA's builder refuses it too; the others run, but not as meant or not on every release."""
    weights: dict[str, np.ndarray] = field(default_factory=dict)


def build(bad: Bad) -> ir.Model:
    return common.ShapeInferencePass()(ir.from_proto(bad.model)).model


def _unary(line: str, shape: Shape = (1, 4, 8, 8), weights: dict | None = None, opset: int = 13, **kwargs):
    return graph(line, {"x": shape}, {"y": kwargs.pop("out", shape)}, weights, opset, **kwargs)


def qdq(
    *,
    activation: bool = True,
    weight: bool = True,
    bias: bool = False,
    zero: int = 0,
    dtype: type = np.int8,
    scale: float = 0.05,
    axis: int = 0,
    activation_scales: int = 1,
    transpose: bool = False,
) -> onnx.ModelProto:
    """Quantize -> dequantize -> Conv with one thing changed from what TensorRT wants."""
    rng = np.random.default_rng(0)
    data = {
        "as": np.full(activation_scales, scale, np.float32) if activation_scales > 1 else np.float32(scale),
        "az": np.full(activation_scales, zero, dtype) if activation_scales > 1 else dtype(zero),
        "wq": rng.integers(-100, 100, (4, 4, 3, 3)).astype(np.int8),
        "wf": rng.standard_normal((4, 4, 3, 3)).astype(np.float32),
        "ws": np.full(4, 0.01, np.float32),
        "wz": np.zeros(4, np.int8),
        "bq": np.arange(4, dtype=np.int32),
        "bs": np.full(4, 0.0005, np.float32),
        "bf": np.arange(4, dtype=np.float32),
    }
    lines = ["q = QuantizeLinear <axis=1> (x, as, az)", "a = DequantizeLinear <axis=1> (q, as, az)"]
    lines = lines if activation else []
    if weight:
        lines.append(f"w = DequantizeLinear <axis={axis}> (wq, ws, wz)")
    if bias:
        lines.append("b = DequantizeLinear <axis=0> (bq, bs)")
    operands = ("a" if activation else "x", "w" if weight else "wf", "b" if bias else "bf")
    op = "ConvTranspose" if transpose else "Conv"
    lines.append(f"y = {op} <pads=[1,1,1,1]> ({', '.join(operands)})")
    text = "\n".join(lines)
    used = {n: a for n, a in data.items() if n in {w for line in lines for w in _operands(line)}}
    return graph(text, {"x": (1, 4, 8, 8)}, {"y": (1, 4, 8, 8)}, used)


def _with_if() -> onnx.ModelProto:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["b"])], "b", [], [helper.make_tensor_value_info("b", 1, (4,))]
    )
    model = graph("y = Relu(x)", {"x": (4,), "c": ()}, {"y": (4,)}, types={"c": TensorProto.BOOL})
    model.graph.node[0].CopyFrom(helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch))
    return model


def _fp8() -> onnx.ModelProto:
    model = graph(
        "q = QuantizeLinear(x, s, z) \n y = DequantizeLinear(q, s)",
        {"x": (4,)},
        {"y": (4,)},
        {"s": np.float32(0.1)},
        opset=19,
    )
    model.graph.initializer.append(helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, (), [0.0]))
    return model


_F16 = TensorProto.FLOAT16

BAD: dict[str, Bad] = {
    "unknown operator": Bad(_unary("y = Det(x)", (3, 3), out=()), "unsupported", "Det"),
    "custom operator": Bad(_unary("y = custom.Mine(x)"), "custom", "custom::Mine"),
    "NonMaxSuppression": Bad(
        graph(
            "y = NonMaxSuppression(b, s)",
            {"b": (1, 8, 4), "s": (1, 1, 8)},
            {"y": ("n", 3)},
            types={"y": TensorProto.INT64},
        ),
        "unsupported",
        "cut it from the network",
        refused_by_nvidia=False,
    ),
    "QLinear": Bad(
        graph(
            "y = ConvInteger(x, w)",
            {"x": (1, 4, 8, 8)},
            {"y": (1, 4, 8, 8)},
            {"w": np.ones((4, 4, 1, 1), np.int8)},
            types={"x": TensorProto.INT8, "y": TensorProto.INT32},
        ),
        "unsupported",
        "QuantizeLinear",
    ),
    "operator of a later release": Bad(
        _unary("y = RMSNormalization(x, s)", weights={"s": np.ones(8, np.float32)}, opset=23),
        "unsupported",
        "needs TensorRT 10.15",
        tensorrt="10.11",
        refused_by_nvidia=False,
    ),
    "opset": Bad(
        _unary("y = Relu(x)", opset=8), "opset", "opset 8, expected 9 to 20", refused_by_nvidia=False
    ),
    "newer opset": Bad(_unary("y = Relu(x)", opset=21), "opset", "9 to 20", refused_by_nvidia=False),
    "dynamic shape": Bad(
        _unary("y = Relu(x)", (1, 4, "h", "w")), "dynamic", "expected fixed sizes", refused_by_nvidia=False
    ),
    "float64": Bad(
        _unary("y = Relu(x)", types={"x": TensorProto.DOUBLE, "y": TensorProto.DOUBLE}),
        "type",
        "float64",
        refused_by_nvidia=False,
    ),
    "NaN": Bad(
        _unary("y = Add(x, w)", weights={"w": np.full((4, 1, 1), np.nan, np.float32)}),
        "nan",
        "'w' hold NaN",
        refused_by_nvidia=False,
    ),
    "mixed types": Bad(
        graph("y = Add(x, h)", {"x": (4,), "h": (4,)}, {"y": (4,)}, types={"h": _F16}),
        "mixed-types",
        "without a Cast",
    ),
    "mixed Pow": Bad(
        graph("y = Pow(x, h)", {"x": (4,), "h": (4,)}, {"y": (4,)}, types={"h": _F16}),
        "mixed-types",
        "without a Cast",
        refused_by_nvidia=False,  # by releases before 10.12
    ),
    "dilated pooling": Bad(
        _unary("y = MaxPool <kernel_shape=[3,3], dilations=[2,2], pads=[2,2,2,2]> (x)"),
        "restriction",
        "dilated pooling",
    ),
    "1D pooling": Bad(
        _unary("y = MaxPool <kernel_shape=[3], pads=[1,1]> (x)", (1, 4, 8)),
        "restriction",
        "2D and 3D",
        refused_by_nvidia=False,
    ),
    "cubic resize": Bad(
        graph(
            'y = Resize <mode="cubic"> (x, , s)',
            {"x": (1, 4, 8, 8)},
            {"y": (1, 4, 16, 16)},
            {"s": np.array([1, 1, 2, 2], np.float32)},
        ),
        "restriction",
        "mode='cubic'",
        refused_by_nvidia=False,
    ),
    "scatter add": Bad(
        graph(
            'y = ScatterND <reduction="add"> (x, i, u)',
            {"x": (8, 4), "u": (2, 4)},
            {"y": (8, 4)},
            {"i": np.array([[0], [1]])},
            opset=16,
        ),
        "restriction",
        "reduction='add'",
    ),
    "large TopK": Bad(
        graph(
            "y, i = TopK(x, k)",
            {"x": (1, 4000)},
            {"y": (1, 3900), "i": (1, 3900)},
            {"k": np.array([3900])},
            types={"i": TensorProto.INT64},
        ),
        "restriction",
        "below 3840",
    ),
    "indices of MaxPool": Bad(
        graph(
            "y, i = MaxPool <kernel_shape=[2,2]> (x)",
            {"x": (1, 1, 4, 4)},
            {"y": (1, 1, 3, 3), "i": (1, 1, 3, 3)},
            types={"i": TensorProto.INT64},
        ),
        "restriction",
        "Indices",
    ),
    "shape as input": Bad(
        graph(
            "y = Expand(x, s)",
            {"x": (1, 4), "s": (2,)},
            {"y": (3, 4)},
            types={"s": TensorProto.INT64},
        ),
        "restriction",
        "network input 's'",
        refused_by_nvidia=False,
    ),
    "training mode": Bad(
        graph(
            "y = BatchNormalization <training_mode=1> (x, s, s, s, s)",
            {"x": (1, 4, 8, 8)},
            {"y": (1, 4, 8, 8)},
            {"s": np.ones(4, np.float32)},
            opset=15,
        ),
        "restriction",
        "training_mode",
    ),
    "non-zero zero point": Bad(qdq(zero=3), "quantization", "zero point must be 0"),
    "negative scale": Bad(qdq(scale=-0.1), "quantization", "positive"),
    "uint8": Bad(qdq(dtype=np.uint8, zero=0), "quantization", "uint8", refused_by_nvidia=False),
    "int32 bias": Bad(qdq(bias=True), "quantization", "bias"),
    "weights only": Bad(qdq(activation=False), "quantization", "only its weights", refused_by_nvidia=False),
    "activations only": Bad(
        qdq(weight=False), "quantization", "only its activations", refused_by_nvidia=False
    ),
    "weight axis": Bad(qdq(axis=1), "quantization", "axis 1, expected 0", refused_by_nvidia=False),
    "transposed weight axis": Bad(
        qdq(transpose=True), "quantization", "axis 0, expected 1", refused_by_nvidia=False
    ),
    "per-channel activation": Bad(
        qdq(activation_scales=4), "quantization", "on an activation", refused_by_nvidia=False
    ),
    "control flow": Bad(_with_if(), "control-flow", "control flow", refused_by_nvidia=False),
    "FP8 on Orin": Bad(_fp8(), "fp8", "FP8 needs compute capability 8.9, this GPU has 8.7"),
    "quantized activation of a computed scale": Bad(
        graph(
            "s = Abs(t) \n q = QuantizeLinear(x, s, z) \n y = DequantizeLinear(q, s, z)",
            {"x": (4,), "t": ()},
            {"y": (4,)},
            {"z": np.int8(0)},
        ),
        "quantization",
        "constant",
        refused_by_nvidia=False,
    ),
}
