"""ONNX in: any exporter's file becomes one normal form.

Normal form: operators of the default domain at opset `OPSET`, float32 inputs of static shape
(batch 1), weights not listed as inputs, no local functions, shapes inferred, every weight finite.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import onnx.defs
import onnx.inliner
import onnx.shape_inference
import onnx.version_converter
import onnx_ir as ir
from onnx import TensorProto, numpy_helper

from edgekit.errors import ModelError
from edgekit.frontends.onnx_file import named, one_line, read, shown, tensors
from edgekit.schema import printable

OPSET = 19
"""The first opset whose QuantizeLinear takes float16; TensorRT 10 and onnxruntime >= 1.16 read it."""

IR_VERSION = 9
"""The file format version that goes with opset 19."""

MAX_ELEMENTS = 2**28
"""Largest tensor in a graph (1 GiB of float32): a guard against sizes no device could hold."""

MAX_INPUT = 2**25
"""Elements of one input: a 4K picture of 3 channels fits. Checks and calibration make such inputs."""

MAX_ACTIVATIONS = 2**31
"""Elements of all tensors that one inference writes (8 GiB of float32): preparing runs it many times."""

LISTED = 50
"""Unsupported operators named in one message: all of them in any real file."""

_WEIGHTED = {"Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Einsum"}
_QUANTIZED = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul",
    "ConvInteger", "MatMulInteger",
}  # fmt: skip
_CONTROL = {"If", "Loop", "Scan", "SequenceMap"}
_UNFIT = {
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli",
    "StringNormalizer", "StringConcat", "StringSplit", "RegexFullMatch", "TfIdfVectorizer", "ImageDecoder",
    "Optional", "OptionalGetElement", "OptionalHasElement",
}  # fmt: skip
# operators whose meaning (not only their types) changed between OPSET and what onnx knows
_CHANGED_AFTER = {"GroupNormalization", "GridSample", "DFT", "AffineGrid", "ReduceMax", "ReduceMin"}


def load(path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> ir.Model:
    """The network in the ONNX file `path` in normal form (see the top of this file).

    `shapes`: input name -> full static shape, for inputs with open sizes; an open first (batch)
    axis alone is set to 1 without being asked.
    Raises: ModelError, one line: a missing, empty, damaged, foreign or too big file, unsafe external
    data, NaN or Inf weights, unsupported operators (all of them), open shapes, a faulty graph.
    """
    path = Path(path)
    where = named(path)
    model = read(path)
    _drop_weight_inputs(model.graph, where)
    model = _inline(model, where)
    _check_operators(model, where)
    _check_graph(model.graph, where)
    _check_weights(model.graph, where)
    _fix_shapes(model.graph, dict(shapes or {}), where)
    # a size that the exporter has built into constants (grids, reshapes) allows no other
    step = "Give --shape the size it was exported with." if shapes else "Export the model again."
    model = _to_opset(model, where, step)
    model = _infer(model, where, step)
    result = ir.serde.deserialize_model(model)
    result.graph.name = result.graph.name or "main"
    return result


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of subgraphs included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _nodes(subgraph)


def _drop_weight_inputs(graph: onnx.GraphProto, where: str) -> None:
    """Exporters before IR version 4 list every initialiser as an input too."""
    for kind, names in (
        ("input", [i.name for i in graph.input]),
        ("output", [o.name for o in graph.output]),
        ("weight", [t.name for t in graph.initializer]),
    ):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise ModelError(f"{where}: {kind} name {shown(twice[0])} is used twice. Export the model again.")
        if "" in names:
            raise ModelError(f"{where}: an {kind} has no name. Export the model again.")
    if graph.sparse_initializer:
        raise ModelError(f"{where}: sparse weights are not supported, expected dense. Export them dense.")
    weights = {t.name for t in graph.initializer}
    inputs = [i for i in graph.input if i.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)
    if not inputs or not graph.output:
        missing = "input" if not inputs else "output"
        raise ModelError(f"{where}: the graph has no {missing}, expected a picture in and predictions out.")


def _inline(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    for node in _nodes(model.graph):
        if node.domain == "ai.onnx":
            node.domain = ""
    for entry in model.opset_import:
        if entry.domain == "ai.onnx":
            entry.domain = ""
    if not model.functions:
        return model
    try:
        inlined: onnx.ModelProto = onnx.inliner.inline_local_functions(model)
    except Exception as error:  # noqa: BLE001 - onnx's C++ raises RuntimeError and others
        raise ModelError(f"{where}: its local functions cannot be inlined: {one_line(error)}.") from None
    return inlined


def _opset(model: onnx.ModelProto, where: str) -> int:
    versions = {e.version for e in model.opset_import if e.domain == ""}
    if len(versions) != 1:
        raise ModelError(f"{where}: expected one default opset, got {sorted(versions)}. Export it again.")
    version = int(versions.pop())
    newest = onnx.defs.onnx_opset_version()
    if not 7 <= version <= newest:
        raise ModelError(
            f"{where}: opset {version} is not supported, expected 7 to {newest}. "
            f"Export with opset_version={OPSET}."
        )
    return version


def _check_operators(model: onnx.ModelProto, where: str) -> None:
    opset = _opset(model, where)
    counts = Counter((node.domain, node.op_type) for node in _nodes(model.graph))
    known = {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""}
    bad = []
    for (domain, op), count in sorted(counts.items()):
        usable = domain == "" and op in known and _schema(op, opset) is not None
        if not usable or op in _CONTROL | _UNFIT or op.startswith("Sequence") or "Sequence" in op:
            bad.append(printable(f"{domain + '::' if domain else ''}{op}", 60) + f" ({count})")
    if bad:
        more = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        raise ModelError(
            f"{where}: unsupported operators: {', '.join(bad[:LISTED])}{more}. "
            "Export the network without plug-ins, loops and in-graph branches."
        )
    quantized = [f"{op} ({n})" for (_, op), n in sorted(counts.items()) if op in _QUANTIZED]
    if quantized:
        raise ModelError(
            f"{where}: already quantized ({', '.join(quantized)}), expected a float network. "
            "Give the float model; edgekit quantizes for each target."
        )
    if not any(op in _WEIGHTED for _, op in counts):
        raise ModelError(f"{where}: no Conv or MatMul in it, so nothing to run as a network. Check the file.")


def _schema(op: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None


def _check_graph(graph: onnx.GraphProto, where: str) -> None:
    """Every name has one producer, every use a producer, no cycles; unsorted nodes get sorted."""
    ready = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    produced = Counter(name for node in graph.node for name in node.output if name)
    twice = sorted(n for n, count in produced.items() if count > 1 or n in ready)
    if twice:
        raise ModelError(
            f"{where}: tensor {shown(twice[0])} is written more than once. Export the model again."
        )
    dangling = sorted(
        {n for node in graph.node for n in node.input if n and n not in ready and n not in produced}
        | {o.name for o in graph.output if o.name not in produced and o.name not in ready}
    )
    if dangling:
        some = ", ".join(map(shown, dangling[:5]))
        raise ModelError(f"{where}: tensor {some} is used but nothing makes it. Export the model again.")
    waiting = {i: {n for n in node.input if n and n not in ready} for i, node in enumerate(graph.node)}
    users: dict[str, list[int]] = {}
    for i, names in waiting.items():
        for name in names:
            users.setdefault(name, []).append(i)
    queue = [i for i, names in waiting.items() if not names]
    order = []
    for i in queue:  # grows while it runs: Kahn's algorithm
        order.append(i)
        for name in graph.node[i].output:
            for user in users.get(name, ()):
                waiting[user].discard(name)
                if not waiting[user]:
                    queue.append(user)
            users.pop(name, None)
    if len(order) != len(graph.node):
        stuck = next(node for i, node in enumerate(graph.node) if waiting[i])
        raise ModelError(
            f"{where}: the graph has a cycle through {stuck.op_type} {shown(stuck.name or stuck.output[0])}. "
            "Export the model again."
        )
    seen = set(ready)
    for node in graph.node:
        if not all(n in seen or not n for n in node.input):
            nodes = [graph.node[i] for i in order]
            del graph.node[:]
            graph.node.extend(nodes)
            break
        seen.update(node.output)


def _check_weights(graph: onnx.GraphProto, where: str) -> None:
    bad = []
    for tensor in tensors(graph):
        kind = tensor.data_type
        if kind not in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16):
            continue
        values = numpy_helper.to_array(tensor).astype(np.float32, copy=False)
        count = int(values.size - np.isfinite(values).sum())
        # a lone -inf is how attention masks are written; weights hold many values
        if count and values.size > 1:
            bad.append(f"{printable(tensor.name) or '(constant)'} ({count} of {values.size})")
    if bad:
        more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
        raise ModelError(
            f"{where}: NaN or Inf in {len(bad)} weights: {', '.join(bad[:8])}{more}, expected finite. "
            "Export from a checkpoint that did not diverge."
        )


def _fix_shapes(graph: onnx.GraphProto, shapes: dict[str, tuple[int, ...]], where: str) -> None:
    names = [i.name for i in graph.input]
    unknown = sorted(set(shapes) - set(names))
    if unknown:
        raise ModelError(
            f"{where}: no input {shown(unknown[0])} to give a shape, expected one of "
            f"{', '.join(map(shown, names[:5]))}."
        )
    for value in graph.input:
        kind = value.type.tensor_type
        if kind.elem_type != TensorProto.FLOAT:
            known = kind.elem_type in TensorProto.DataType.values()
            got = TensorProto.DataType.Name(kind.elem_type) if known else str(kind.elem_type)
            raise ModelError(
                f"{where}: input {shown(value.name)} has type {got}, expected FLOAT. "
                "Export the float32 network without input casts."
            )
        dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim]
        fixed = _static_shape(value.name, dims if kind.HasField("shape") else None, shapes, where)
        kind.shape.Clear()
        for size in fixed:
            kind.shape.dim.add().dim_value = size
    # what the exporter noted for open sizes is stale now; inference writes it again
    del graph.value_info[:]
    inputs = {value.name: value for value in graph.input}
    for value in graph.output:
        if value.name in inputs:  # passed through: no node infers its shape
            value.type.CopyFrom(inputs[value.name].type)
            continue
        if value.type.HasField("tensor_type") and not value.type.tensor_type.elem_type:
            raise ModelError(
                f"{where}: output {shown(value.name)} has no element type, expected FLOAT. "
                "Export the model again."
            )
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()


def _static_shape(
    name: str, dims: list[int | str] | None, shapes: dict[str, tuple[int, ...]], where: str
) -> tuple[int, ...]:
    """`dims` with open axes filled in; an axis is open when symbolic, missing, 0 or negative."""
    given = shapes.get(name)
    if given is not None:
        shape = tuple(int(d) for d in given)
        fits = dims is None or (
            len(dims) == len(shape)
            and all(w == g or not isinstance(w, int) or w <= 0 for w, g in zip(dims, shape, strict=True))
        )
        if not fits or any(d < 1 for d in shape):
            raise ModelError(
                f"{where}: shape {_x(shape)} does not fit input {shown(name)}, expected {_x(dims or ())}. "
                "Open axes take any size from 1."
            )
    elif dims is None or not dims:
        raise ModelError(
            f"{where}: input {shown(name)} has no shape. Give it: --shape {printable(name)}=1x3xHEIGHTxWIDTH."
        )
    else:
        filled = [1 if i == 0 and (isinstance(d, str) or d <= 0) else d for i, d in enumerate(dims)]
        open_axes = [(i, d) for i, d in enumerate(filled) if isinstance(d, str) or d < 0]
        if open_axes:
            axes = ", ".join(f"axis {i} ({printable(str(d), 20)})" for i, d in open_axes)
            example = "x".join("416" if isinstance(d, str) or d < 0 else str(d) for d in filled)
            raise ModelError(
                f"{where}: input {shown(name)} leaves its size open at {axes}, expected a static shape. "
                f"Give it: --shape {printable(name)}={example}."
            )
        shape = tuple(int(d) for d in filled)
    if any(d < 1 for d in shape) or math.prod(shape) > MAX_INPUT:
        raise ModelError(
            f"{where}: input {shown(name)} has shape {_x(shape)}, expected sizes from 1 and at most "
            f"{MAX_INPUT} elements. Export it with a real picture size."
        )
    return shape


def _x(shape: tuple[int, ...] | list[int | str]) -> str:
    return printable("x".join(str(d) for d in shape)) or "nothing"


def _to_opset(model: onnx.ModelProto, where: str, step: str) -> onnx.ModelProto:
    version = _opset(model, where)
    # tools below judge by the format version: 3 would want weights among the inputs again
    model.ir_version = IR_VERSION
    if version < OPSET:
        if any(not output.type.tensor_type.HasField("shape") for output in model.graph.output):
            model = _infer(model, where, step)  # the checker asks for the outputs' ranks
        _check(model, where)
        try:
            model = onnx.version_converter.convert_version(model, OPSET)
        except Exception as error:  # noqa: BLE001 - C++ converter: RuntimeError, ConvertError, ...
            raise ModelError(
                f"{where}: opset {version} cannot be raised to {OPSET}: {one_line(error)}. "
                f"Export with opset_version={OPSET}."
            ) from None
    elif version > OPSET:
        # newer opsets mostly widen types: the checker below tells where that is not all
        newer = sorted({n.op_type for n in _nodes(model.graph)} & _CHANGED_AFTER)
        if newer:
            raise ModelError(
                f"{where}: opset {version} of {', '.join(newer)} differs from opset {OPSET}. "
                f"Export with opset_version={OPSET}."
            )
        for entry in model.opset_import:
            if entry.domain == "":
                entry.version = OPSET
    used = {node.domain for node in _nodes(model.graph)} | {""}
    imports = [e for e in model.opset_import if e.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    model.ir_version = IR_VERSION
    _check(model, where)
    return model


def _check(model: onnx.ModelProto, where: str) -> None:
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # noqa: BLE001 - ValidationError, and RuntimeError from C++
        raise ModelError(f"{where}: not a valid ONNX graph: {one_line(error)}. Export it again.") from None


def _infer(model: onnx.ModelProto, where: str, step: str) -> onnx.ModelProto:
    try:
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # noqa: BLE001 - InferenceError, and RuntimeError from C++
        raise ModelError(f"{where}: its shapes do not fit together: {one_line(error, 160)}. {step}") from None
    weighted = {
        n for node in model.graph.node if node.op_type in _WEIGHTED for n in (*node.input, *node.output)
    }
    total = 0
    for value in (*model.graph.value_info, *model.graph.output):
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim if d.HasField("dim_value")]
        zero = any(d < 1 for d in dims) and (value.name in weighted or value in model.graph.output)
        total += math.prod(dims)
        if zero or math.prod(dims) > MAX_ELEMENTS:
            raise ModelError(
                f"{where}: tensor {shown(value.name)} has shape {_x(dims)}, expected sizes from 1 and at most "
                f"{MAX_ELEMENTS} elements. Give another input size with --shape."
            )
    if total > MAX_ACTIVATIONS:
        raise ModelError(
            f"{where}: its tensors have {total} elements in all, expected at most {MAX_ACTIVATIONS} "
            "for one inference. Give a smaller input size with --shape or export with one."
        )
    _check_convolutions(model.graph, where)
    return model


def _check_convolutions(graph: onnx.GraphProto, where: str) -> None:
    """What onnx's inference leaves open: channels that match, kernels no larger than their input."""
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.value_info, *graph.output)
    }
    shapes |= {t.name: list(t.dims) for t in graph.initializer}
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        x, w, y = (shapes.get(n, []) for n in (node.input[0], node.input[1], node.output[0]))
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if not x or not w or 0 in x or len(x) != len(w):
            continue
        group, spatial = int(attributes.get("group", 1)), len(x) - 2
        pads = attributes.get("pads", [0] * 2 * spatial)
        dilations = attributes.get("dilations", [1] * spatial)
        small = [
            i
            for i in range(spatial)
            if x[2 + i] + pads[i] + pads[spatial + i] < (w[2 + i] - 1) * dilations[i] + 1
        ]
        if x[1] != w[1] * group or (group > 0 and w[0] % group) or (small and "auto_pad" not in attributes):
            raise ModelError(
                f"{where}: Conv {shown(node.name or node.output[0])} takes {_x(x)} with weights {_x(w)}, "
                f"group {group}, and cannot: its channels or kernel do not fit (output {_x(y)}). "
                "Export the model again."
            )
