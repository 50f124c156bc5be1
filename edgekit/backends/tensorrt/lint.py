"""Static check of an ONNX graph meant for TensorRT; needs no NVIDIA library.

Catches what NVIDIA's builder refuses and, worse, what it takes but silently runs in float: see
`docs/tensorrt.md` for the rules and their sources. All findings come at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.backends.tensorrt import operators
from edgekit.backends.tensorrt.plan import parse_version

if TYPE_CHECKING:
    import onnx_ir as ir

FLOATS = ("float32", "float16", "bfloat16")
_FP8 = ("float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz")
_WEIGHTED = ("Conv", "ConvTranspose")


@dataclass(frozen=True)
class Finding:
    """One problem: `rule` is its short name, `op` and `node` where it is (empty for the whole graph)."""

    rule: str
    op: str
    node: str
    problem: str

    def __str__(self) -> str:
        place = f"{self.op} {self.node!r}" if self.node else self.op
        return f"{place}: {self.problem}" if place else self.problem


def lint(model: ir.Model, tensorrt: str = "10.3", compute_capability: str = "8.7") -> tuple[Finding, ...]:
    """All that keeps `model` from running as meant under that TensorRT release on that GPU.

    Values need types: run shape inference first (`lower` does). Values of unknown type are not judged.
    """
    release = parse_version(tensorrt)
    found: list[Finding] = []
    found += _graph(model, release)
    for node in model.graph.all_nodes():
        found += _operator(node, release)
        found += _types(
            node, model.graph.opset_imports.get("", 0), release, parse_version(compute_capability)
        )
        found += _attributes(node, release)
        found += _quantization(node)
    return tuple(dict.fromkeys(found))


def summary(findings: tuple[Finding, ...]) -> str:
    """One line for an error message: equal problems of one operator are joined, with the first node."""
    groups: dict[tuple[str, str], list[str]] = {}
    for f in findings:
        groups.setdefault((f.op, f.problem), []).append(f.node)
    parts = []
    for (op, problem), nodes in groups.items():
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        place = f"{op} {nodes[0]!r}{more}" if nodes[0] else op + (f" ({len(nodes)} times)" if more else "")
        parts.append(f"{place}: {problem}" if place else problem)
    return "; ".join(parts)


def dtype_name(value: ir.Value | None) -> str:
    """Element type as ONNX names it in lower case ("float32", "bool"), "" if unknown."""
    if value is None or value.dtype is None:
        return ""
    name = value.dtype.name.lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Numbers of an initialiser or of a Constant node's output, None if the value is computed."""
    import onnx_ir as ir

    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _static(value: ir.Value) -> bool:
    return value.shape is not None and all(isinstance(d, int) for d in value.shape)


def _graph(model: ir.Model, release: tuple[int, ...]) -> Iterator[Finding]:
    opset = model.graph.opset_imports.get("", 0)
    low, high = operators.opsets(release)
    if not low <= opset <= high:
        yield Finding("opset", "", "", f"opset {opset}, expected {low} to {high}")
    if not model.graph.outputs:
        yield Finding("graph", "", "", "the graph has no output")
    for value in model.graph.inputs:
        if not _static(value):
            yield Finding(
                "dynamic", "", "", f"input {value.name!r} has shape {value.shape}, expected fixed sizes"
            )
    for value in (*model.graph.inputs, *model.graph.outputs):
        if dtype_name(value) in ("float64", "string", "complex64"):
            yield Finding(
                "type", "", "", f"tensor {value.name!r} is {dtype_name(value)}, which TensorRT does not take"
            )
    for name, value in model.graph.initializers.items():
        if dtype_name(value) in FLOATS and value.const_value is not None:
            numbers = value.const_value.numpy()
            if np.isnan(np.asarray(numbers, np.float32)).any():
                yield Finding("nan", "", "", f"weights {name!r} hold NaN")


def _operator(node: ir.Node, release: tuple[int, ...]) -> Iterator[Finding]:
    op, name = node.op_type, node.name or ""
    if node.domain not in ("", "ai.onnx"):
        yield Finding("custom", f"{node.domain}::{op}", name, "a custom operator, which would need a plugin")
        return
    since = operators.SINCE.get(op, (10, 0))
    if op in operators.REFUSED:
        yield Finding("unsupported", op, name, f"not supported, {operators.REFUSED[op]}")
    elif op not in operators.TYPES:
        yield Finding("unsupported", op, name, "not supported by TensorRT's ONNX parser")
    elif release < since:
        have, want = ".".join(map(str, release)), ".".join(map(str, since))
        yield Finding("unsupported", op, name, f"needs TensorRT {want}, this target has {have}")
    if op in ("If", "Loop", "Scan"):
        yield Finding("control-flow", op, name, "control flow is not taken, unroll it or fold its condition")


def _types(
    node: ir.Node, opset: int, release: tuple[int, ...], capability: tuple[int, ...]
) -> Iterator[Finding]:
    import onnx

    op, name = node.op_type, node.name or ""
    if node.domain not in ("", "ai.onnx") or op not in operators.TYPES:
        return
    index = operators.TYPED_INPUT.get(op, 0)
    typed = node.inputs[index] if index < len(node.inputs) else next(iter(node.outputs), None)
    kind = dtype_name(typed)
    if capability < (8, 9) and any(dtype_name(v) in _FP8 for v in (*node.inputs, *node.outputs)):
        shown = ".".join(map(str, capability))
        yield Finding("fp8", op, name, f"FP8 needs compute capability 8.9, this GPU has {shown}")
    # int8 operands of DequantizeLinear are judged with the quantization rules, which say more
    elif kind and kind not in operators.TYPES[op] and op != "DequantizeLinear":
        allowed = ", ".join(sorted(operators.TYPES[op]))
        yield Finding("type", op, name, f"computes in {kind}, expected one of {allowed}")

    groups: dict[str, dict[str, str]] = {}
    try:
        schema = onnx.defs.get_schema(op, opset or onnx.defs.onnx_opset_version(), "")
    except onnx.defs.SchemaError:
        return
    for values, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for i, value in enumerate(values):
            # a variadic last parameter repeats
            formal = formals[min(i, len(formals) - 1)] if formals else None
            same = formal is not None and formal.is_homogeneous
            if formal is not None and same and formal.type_str.startswith(("T", "V")) and dtype_name(value):
                groups.setdefault(formal.type_str, {}).setdefault(
                    dtype_name(value), str(value and value.name)
                )
    rule = operators.SAME_TYPE.get(op)
    if rule is not None and (rule[1] is None or release < rule[1]):
        picked = [node.inputs[i] for i in rule[0] if i < len(node.inputs)]
        groups["operands"] = {dtype_name(v): str(v.name) for v in picked if v is not None and dtype_name(v)}
    for kinds in groups.values():
        if len(kinds) > 1:
            shown = ", ".join(f"{value} is {kind}" for kind, value in kinds.items())
            yield Finding("mixed-types", op, name, f"operands of different types without a Cast ({shown})")
            break


def _attr(node: ir.Node, name: str, default: Any) -> Any:
    attr = node.attributes.get(name)
    return default if attr is None else attr.value


def _attributes(node: ir.Node, release: tuple[int, ...]) -> Iterator[Finding]:
    op, name = node.op_type, node.name or ""

    def bad(problem: str) -> Finding:
        return Finding("restriction", op, name, problem)

    def computed(index: int) -> bool:
        given = index < len(node.inputs) and node.inputs[index] is not None
        return given and constant(node.inputs[index]) is None

    def read(values: Sequence[ir.Value]) -> bool:
        return any(v.uses() or v.is_graph_output() for v in values)

    for index in operators.SHAPE_INPUTS.get(op, ()):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and value.is_graph_input():
            yield bad(f"its shape comes from the network input {value.name!r}, expected a constant")

    if op in ("MaxPool", "AveragePool", "LpPool"):
        if any(d != 1 for d in _attr(node, "dilations", ())):
            yield bad("dilated pooling is not supported")
        if op == "LpPool" and _attr(node, "p", 2) not in (1, 2):
            yield bad("only p=1 and p=2 are supported")
        if op == "MaxPool" and read(node.outputs[1:]):
            yield bad("the Indices output is not supported")
        x = node.inputs[0]
        if x is not None and x.shape is not None and len(x.shape) not in (4, 5):
            yield bad(f"only 2D and 3D pooling is supported, the input has {len(x.shape)} axes")
    elif op == "Resize":
        yield from (bad(problem) for problem in _resize(node))
    elif op in ("ScatterND", "ScatterElements") and _attr(node, "reduction", "none") != "none":
        yield bad(f"reduction={_attr(node, 'reduction', 'none')!r} is not supported, expected 'none'")
    elif op == "TopK":
        k = constant(node.inputs[1])
        if k is None or int(k.reshape(-1)[0]) >= 3840:
            yield bad("K must be a constant below 3840")
        if _attr(node, "sorted", 1) != 1:
            yield bad("sorted must be 1")
    elif op in ("Squeeze", "Unsqueeze", "CumSum", "OneHot") and computed(1) and release < (10, 8):
        yield bad("its second input must be a constant")
    elif (op.startswith("Reduce") and computed(1)) or (op == "Slice" and computed(3) and release < (10, 3)):
        yield bad("axes must be a constant")
    elif op == "Pad" and len(node.inputs) > 3 and node.inputs[3] is not None and release < (10, 4):
        yield bad("the axes input needs TensorRT 10.4")
    elif op in ("LayerNormalization", "Dropout", "BatchNormalization") and read(node.outputs[1:]):
        yield bad("only the first output is supported")
    elif op == "BatchNormalization" and _attr(node, "training_mode", 0):
        yield bad("training_mode must be 0, export the model for inference")
    elif op == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        training = constant(node.inputs[2])
        if training is None or training.any():
            yield bad("training_mode must be the constant false, export the model for inference")
    elif op == "STFT" and (computed(1) or computed(2)):
        yield bad("frame_step and window must be constants")
    elif op == "LSTM" and (_attr(node, "input_forget", 0) or _attr(node, "layout", 0)):
        yield bad("input_forget and layout must be 0")
    elif op == "GridSample":
        x = node.inputs[0]
        if x is not None and x.shape is not None and len(x.shape) != 4:
            yield bad(f"only 4 axes are supported, the input has {len(x.shape)}")


def _resize(node: ir.Node) -> Iterator[str]:
    modes = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")
    checks = (
        ("coordinate_transformation_mode", "half_pixel", modes),
        ("mode", "nearest", ("nearest", "linear")),
        (
            "nearest_mode",
            "round_prefer_floor",
            ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"),
        ),
        ("keep_aspect_ratio_policy", "stretch", ("stretch",)),
        ("antialias", 0, (0,)),
        ("exclude_outside", 0, (0,)),
    )
    for attr, default, allowed in checks:
        value = _attr(node, attr, default)
        if value not in allowed:
            yield f"{attr}={value!r} is not supported, expected {' or '.join(map(repr, allowed))}"
    if "axes" in node.attributes:
        yield "axes are not supported, give scales or sizes of every axis"


def _quantization(node: ir.Node) -> Iterator[Finding]:
    op, name = node.op_type, node.name or ""
    if op in ("QuantizeLinear", "DequantizeLinear"):
        yield from (Finding("quantization", op, name, problem) for problem in _qdq(node))
    if op in _WEIGHTED and len(node.inputs) >= 2:
        producers = [v.producer() if v is not None else None for v in node.inputs[:3]]
        quantized = [p is not None and p.op_type == "DequantizeLinear" for p in producers]
        if any(quantized[:2]) and not all(quantized[:2]):
            half = "weights" if quantized[1] else "activations"
            yield Finding(
                "quantization", op, name, f"only its {half} are quantized, so it would run in float"
            )
        if len(quantized) > 2 and quantized[2]:
            yield Finding("quantization", op, name, "its bias is quantized, keep biases in float")
        weight = producers[1]
        if all(quantized[:2]) and weight is not None:
            scale = constant(weight.inputs[1])
            axis, want = _attr(weight, "axis", 1), 1 if op == "ConvTranspose" else 0
            if scale is not None and scale.size > 1 and axis != want:
                problem = f"weight scales lie along axis {axis}, expected {want}, so it would run in float"
                yield Finding("quantization", op, name, problem)


def _qdq(node: ir.Node) -> Iterator[str]:
    scale = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    zero_value = node.inputs[2] if len(node.inputs) > 2 else None
    zero = constant(zero_value)
    if scale is None:
        yield "its scale must be a constant"
    elif not (np.isfinite(scale).all() and (np.asarray(scale, np.float32) > 0).all()):
        yield "every scale must be positive and finite"
    if zero_value is not None and zero is None:
        yield "its zero point must be a constant"
    elif zero is not None and np.any(np.asarray(zero, np.float32) != 0):
        yield "the zero point must be 0 (symmetric quantization)"
    stored = dtype_name(node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0])
    if stored == "int32":
        yield "dequantizes int32 (a quantized bias), keep biases in float"
    elif stored in ("uint8", "int16", "uint16", "uint4"):
        yield f"quantizes to {stored}, expected int8"
    source = node.inputs[0]
    if node.op_type == "DequantizeLinear" and source is not None and source.producer() is not None:
        source = source.producer().inputs[0]  # type: ignore[union-attr]
    if scale is not None and scale.size > 1 and constant(source) is None:
        yield "per-channel scales on an activation, expected one scale"
