"""What each library runs in integers, as data: the placement asks here, never a backend's name.

Sources: the selectors of ONNX Runtime's QDQ transformer (core/optimizer/qdq_transformer) tried out node by
node; TensorRT's developer guide on explicit quantization and the choices of NVIDIA's Model Optimizer
(modelopt/onnx/quantization); LiteRT's 8-bit quantization specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from edgekit.errors import UsageError, did_you_mean
from edgekit.passes.graph import integer, number, scalar, shape, text
from edgekit.target import Target

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
COPIES = (
    *("Concat", "MaxPool", "Resize", "Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze"),
    *("Flatten", "Pad", "Gather", "Expand", "Tile", "DepthToSpace", "SpaceToDepth"),
)
"""They move codes about (Resize: also averages them) without computing on them."""

NATIVE_POINTWISE = frozenset(
    {
        "Sub",
        "Tanh",
        "HardSwish",
        "HardSigmoid",
        "Elu",
        "Gelu",
        "Softplus",
        "Mish",
        "ReduceMean",
        "Relu",
        "Clip",
    }
)
"""The native engine has a table for any function of one number."""

PREFERENCE = ("tensorrt", "native", "litert", "onnxruntime", "openvino")
"""Whose rules the search of a target uses: the library expected to be fastest in INT8 there."""

SKINNY = 16
"""TensorRT: a convolution with fewer channels seldom gains from INT8 (Model Optimizer's graph_utils)."""


@dataclass(frozen=True)
class Rules:
    """How one library on one kind of board wants a network quantized."""

    name: str
    """For reports: what runs the network."""
    weighted: frozenset[str]
    """Operators with weights that have an integer kernel."""
    pointwise: frozenset[str] = frozenset()
    """Other operators that compute on codes: both sides quantized, each with its own scale."""
    copies: frozenset[str] = frozenset()
    """Operators that run on codes if input and output have the same scale and zero point."""
    rescales: frozenset[str] = frozenset()
    """Of these, those that also run if the scales differ, at some cost."""
    absorbed: frozenset[str] = frozenset()
    """Activations that vanish in the output range of the integer node in front of them."""
    absorbing: frozenset[str] = frozenset()
    """The operators that can stand in front of these."""
    clips: frozenset[tuple[float, float]] | None = None
    """Bounds of a Clip that is absorbed; None: any around 0."""
    outputs: bool = True
    """A weighted operator needs its output quantized; False: its inputs only, the rest is float."""
    symmetric: bool = False
    """Zero point 0 for activations."""
    codes: str = "int8"
    """How activations are stored in a Q/DQ file: int8, or uint8 (codes and zero point + 128)."""
    int32_bias: bool = True
    """Biases become int32; False: they stay float."""
    weight_limit: int = 127
    """Largest weight code. 64 where sums of two products saturate at 16 bits."""
    interpolates: bool = False
    """A Resize that averages runs on codes; False: only one that picks the nearest."""
    fixed: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Operator -> the (scale, zero point) that its int8 output must have."""
    skinny: bool = False
    """Leave thin convolutions and matrix products in float, which integers do not make faster."""
    residual: bool = False
    """Quantize the skip input of an Add that a convolution could take in, and only that one."""
    joins: bool = False
    """Activations of several nodes run as one: what lies within them is not rounded, and results of the network that a
    weighted operator writes are real numbers."""
    curves: bool = False
    """A weighted operator can compute the activation behind it from its sums, without rounding those before
    (Choices.curves)."""
    whole: bool = False
    """It takes whole networks or none: what it cannot compute, others run in float."""
    float16_scales: bool = False
    """The rest of the network is float16, and so are the scales: they must be exact in it."""


def rules_for(backend: str, target: Target) -> Rules:
    """The rules of `backend` on `target`. Raises: UsageError for a backend without static INT8."""
    isa = target.cpus[0].isa
    if backend == "tensorrt":
        return Rules(
            name="TensorRT",
            weighted=frozenset(WEIGHTED),
            copies=frozenset({"Concat", "MaxPool", "Resize", "Reshape", "Transpose", "Slice", "Split"}),
            rescales=frozenset({"Concat"}),
            outputs=False,
            symmetric=True,
            int32_bias=False,
            skinny=True,
            residual=True,
            float16_scales=True,
        )
    weighted = frozenset({"Conv", "Gemm", "MatMul"})
    pointwise = frozenset(
        {"Add", "Mul", "Sigmoid", "LeakyRelu", "AveragePool", "GlobalAveragePool", "Softmax"}
    )
    full = Rules(
        name="",
        weighted=weighted,
        pointwise=pointwise,
        copies=frozenset(COPIES) - {"DepthToSpace", "SpaceToDepth"},
        rescales=frozenset({"Concat"}),
        absorbed=frozenset({"Relu", "Clip"}),
        absorbing=weighted | pointwise,
    )
    if backend in ("onnxruntime", "openvino"):
        library = "ONNX Runtime" if backend == "onnxruntime" else "OpenVINO"
        if target.arch == "aarch64":
            return replace(full, name=f"{library} on ARM")
        vnni = {"avx512_vnni", "avx_vnni", "amx_int8"} & set(isa)
        # without VNNI, vpmaddubsw adds two 8x8-bit products in 16 bits, saturating
        return replace(
            full, name=f"{library} on x86", codes="uint8", weight_limit=127 if vnni or not isa else 64
        )
    if backend == "litert":
        return replace(
            full,
            name="LiteRT",
            weighted=weighted | {"ConvTranspose"},
            pointwise=pointwise - {"Softmax"}
            | {"Sub", "Tanh", "HardSwish", "HardSigmoid", "ReduceMean", "Relu", "Clip"},
            copies=frozenset(COPIES) - {"Tile", "Expand"} | {"ReduceMax", "GlobalMaxPool"},
            interpolates=True,
            # what an operator of TensorFlow Lite takes as its fused activation
            absorbing=weighted | {"ConvTranspose", "Add", "Sub", "Mul"},
            clips=frozenset({(0.0, 6.0), (-1.0, 1.0)}),
            fixed={"Sigmoid": (1 / 256, -128), "Tanh": (1 / 128, 0)},
        )
    if backend == "native":
        return replace(
            full,
            name="edgekit's engine",
            pointwise=pointwise - {"Softmax"} | NATIVE_POINTWISE,
            copies=frozenset({"Concat", "MaxPool", "GlobalMaxPool", "Resize", "Slice", "Split", "Reshape"})
            | {"Flatten", "Squeeze", "Unsqueeze", "Transpose", "Pad", "Gather"},
            interpolates=True,
            joins=True,
            curves=True,
            whole=True,
        )
    known = ("litert", "native", "onnxruntime", "openvino", "tensorrt")
    raise UsageError(f"backend {backend!r}: has no rules for int8. {did_you_mean(backend, known)}")


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """The float tensors that `node` computes on, its weights, bias and parameters aside."""
    op = node.op_type
    if op in ("Concat", "Add", "Sub", "Mul", "Div"):
        return [v for v in node.inputs if v is not None]
    return [v for v in node.inputs[:1] if v is not None]


def weight(node: ir.Node) -> ir.Value | None:
    """The constant weight of a weighted operator."""
    value = node.inputs[1] if node.op_type in WEIGHTED and len(node.inputs) > 1 else None
    return value if value is not None and value.const_value is not None else None


def bias(node: ir.Node) -> ir.Value | None:
    """The constant bias of a weighted operator."""
    value = node.inputs[2] if node.op_type in WEIGHTED and len(node.inputs) > 2 else None
    return value if value is not None and value.const_value is not None else None


def weight_axis(node: ir.Node) -> int:
    """The axis of output channels in the weight of `node`."""
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if integer(node, "transB", 0) else 1
    return 0 if node.op_type == "Conv" else len(shape(node.inputs[1]) or ()) - 1


def refusal(node: ir.Node, rules: Rules) -> str:
    """Why `node` cannot, or by these rules should not, run in integers: a sentence, "" if it may.

    Values need types and shapes.
    """
    op = node.op_type
    if node.domain not in ("", "ai.onnx") or op not in (
        rules.weighted | rules.pointwise | rules.copies | rules.absorbed
    ):
        return f"{op} runs in float on {rules.name}"
    if any(not _is_float(v) for v in (*data_inputs(node), node.outputs[0])):
        return "it computes no float tensor"
    if op in WEIGHTED:
        tensor = weight(node)
        if tensor is None:
            return "its weight is computed, not constant"
        if len(node.inputs) > 2 and node.inputs[2] is not None and bias(node) is None:
            return "its bias is computed, not constant"
        if op == "Gemm" and (number(node, "alpha", 1.0) != 1 or number(node, "beta", 1.0) != 1):
            return "it scales its product by alpha or beta"
        if op == "Gemm" and integer(node, "transA", 0):
            return "it transposes its input"
        if op == "MatMul" and len(shape(tensor) or ()) != 2:
            return "its weight is no matrix"
        if rules.skinny:
            return _skinny(node)
    if op == "MaxPool" and len([v for v in node.outputs if v.uses()]) > 1:
        return "its Indices output is used"
    if op == "Resize" and _mode(node) != "nearest" and not (rules.interpolates and _mode(node) == "linear"):
        return f"{_mode(node)} interpolation runs in float on {rules.name}"
    if op in ("AveragePool", "MaxPool") and len(shape(node.inputs[0]) or ()) != 4:
        return f"{rules.name} pools in integers only over pictures"
    if op == "Pad" and (text(node, "mode", "constant") != "constant" or _fill(node) != 0.0):
        return f"{op} with anything but zeros runs in float on {rules.name}"
    return ""


def _fill(node: ir.Node) -> float | None:
    given = node.inputs[2] if len(node.inputs) > 2 else None
    return 0.0 if given is None else scalar(given)


def _mode(node: ir.Node) -> str:
    return text(node, "mode", "nearest")


def _is_float(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT


def _skinny(node: ir.Node) -> str:
    """Model Optimizer's `find_nodes_from_convs_to_exclude` and `_exclude_matmuls`: what is not worth INT8."""
    sizes = shape(node.inputs[1]) or ()
    if node.op_type in ("Gemm", "MatMul"):
        rows = (shape(node.inputs[0]) or (0, 0))[-2]
        if rows == 1:
            return "a product of one row reads each weight once: memory decides its time, not arithmetic"
        k, n = sizes if node.op_type == "MatMul" or not integer(node, "transB", 0) else sizes[::-1]
        return f"a product of {k} by {n} is too small to gain" if min(k, n) < SKINNY else ""
    group = integer(node, "group", 1)
    if node.op_type == "Conv":
        c_out, c_in = sizes[0], sizes[1] * group
    else:
        c_in, c_out = sizes[0], sizes[1] * group
    if c_in >= SKINNY and c_out >= SKINNY:
        return ""
    kernel = sizes[2:]
    if group > 1:
        fits = c_out % 8 == 0 and min(kernel) >= 3
    else:
        source = node.inputs[0]
        first = source is not None and source.is_graph_input()
        square = len(set(kernel)) == 1
        fits = square and (
            (c_out % 8 == 0 and (first or c_in >= SKINNY)) or (c_in % 8 == 0 and c_out >= SKINNY)
        )
    return "" if fits else f"{c_in} input and {c_out} output channels are too few to gain"
