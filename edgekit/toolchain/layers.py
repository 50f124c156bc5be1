"""The layers that an inference library runs, read off a prepared graph.

A library fuses: a convolution takes its activation (and, in TensorRT and edgekit's own engine, the residual addition) with it, reshapes
cost nothing. One `Layer` here is one launch there. Nothing is computed and no weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from edgekit.passes.graph import integer, ints, shape
from edgekit.quant.annotate import node_id

KINDS = ("conv", "pointwise", "depthwise", "gemm", "elementwise", "copy", "pool", "other", "convert")
"""conv: a dense or grouped convolution wider than 1x1.  gemm: Gemm, MatMul.  copy: moves data (Concat, Resize,
Slice, Transpose).  other: softmax, reductions, sorting.  convert: between precisions."""

_VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"}
_CHEAP = {"Relu", "Clip", "LeakyRelu", "PRelu"}
_SMOOTH = {"Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Softplus", "Mish", "Gelu", "Erf", "Exp"}
_ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "Sqrt", "Neg", "Abs", "Where"}
_POOLS = {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean"}
_COPIES = {"Concat", "Resize", "Upsample", "Slice", "Split", "Transpose", "Pad", "Expand", "Tile", "Gather"} | {
    "DepthToSpace", "SpaceToDepth", "Cast",
}  # fmt: skip
_TABLES = {
    "Add",
    "Mul",
    "Sigmoid",
    "HardSigmoid",
    "HardSwish",
    "Tanh",
}  # of 256 entries, or integer arithmetic
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Layer:
    """What one launch reads, writes and multiplies. Sizes are elements, not bytes.

    node_id: of its first node (quant.annotate). nodes: of all fused ones. As a matrix product it is
    `groups` times [rows, depth] x [depth, columns]; zeros for layers without products.
    reads, writes: (name of the value, elements), weights apart. smooth: ends in an exponential.
    """

    node_id: str
    op: str
    kind: str
    nodes: tuple[str, ...]
    reads: tuple[tuple[str, int], ...]
    writes: tuple[tuple[str, int], ...]
    macs: int = 0
    rows: int = 0
    depth: int = 0
    columns: int = 0
    groups: int = 1
    taps: int = 1
    stride: int = 1
    weights: int = 0
    smooth: bool = False
    int8: bool = True
    """It can run in integers: products, pooling, copies, additions, ReLU."""


def layers(model: ir.Model, whole: bool) -> tuple[Layer, ...]:
    """The layers of `model` (shapes inferred, static) in graph order.

    whole: fuse as TensorRT and edgekit's own engine do (residual addition, any activation), else as other CPU libraries do
    (ReLU, Clip).
    """
    fused: set[ir.Node] = set()
    found: list[Layer] = []
    alias: dict[ir.Value, ir.Value] = {}
    done: set[ir.Value] = set(model.graph.inputs)
    for node in model.graph:
        if node in fused:
            continue
        sources = _activations(node)
        if node.op_type == "Constant" or not sources:
            continue
        if _is_view(node, whole):
            for output in node.outputs:
                alias[output] = alias.get(sources[0], sources[0])
                done.add(output)
            continue
        group = _fuse(node, whole, done)
        fused.update(group)
        for member in group:
            done.update(member.outputs)
        found.append(_layer(group, alias))
    return tuple(found)


def _activations(node: ir.Node) -> list[ir.Value]:
    """Inputs that are computed at run time."""
    return [v for v in node.inputs if v is not None and not _fixed(v) and shape(v) is not None]


def _fixed(value: ir.Value) -> bool:
    """A weight; its data stay unread."""
    return value.const_value is not None and not value.is_graph_input()


def _is_view(node: ir.Node, whole: bool) -> bool:
    if node.op_type in _VIEWS:
        return True
    return node.op_type == "Split" and whole  # channel slices are read in place


def _fuse(first: ir.Node, whole: bool, done: set[ir.Value]) -> list[ir.Node]:
    """`first` and the nodes after it that the library runs in the same launch."""
    group = [first]
    arithmetic = first.op_type in _ARITHMETIC | _SMOOTH | _CHEAP
    if first.op_type not in WEIGHTED and not arithmetic:
        return group
    added = False
    gated = first.op_type in ("Sigmoid", "HardSigmoid") and _gate(first)
    if gated:
        return [first, gated]
    while True:
        value = group[-1].outputs[0]
        users = list(dict.fromkeys(user for user, _ in value.uses()))
        if value.is_graph_output() or not users or len(group[-1].outputs) > 1:
            return group
        if len(users) == 2:  # x * sigmoid(x), and its hard form
            gate = next((u for u in users if u.op_type in ("Sigmoid", "HardSigmoid", "Tanh")), None)
            last = next((u for u in users if u.op_type == "Mul" and u is not gate), None)
            joined = gate is not None and last is not None and {value, gate.outputs[0]} == set(last.inputs)
            if not joined or gate is None or last is None or len(gate.outputs[0].uses()) != 1:
                return group
            if not whole and first.op_type in WEIGHTED:
                return group  # a pass of its own on a CPU
            group += [gate, last]
            continue
        if len(users) > 1:
            return group
        user = users[0]
        others = [v for v in user.inputs if v is not None and v is not value and not _fixed(v)]
        # arithmetic: bias or scale
        joins = _CHEAP | _ARITHMETIC | (_SMOOTH if whole or arithmetic else set())
        if user.op_type in joins and not others:
            group.append(user)
        elif whole and user.op_type in ("Add", "Mul") and not added and all(v in done for v in others):
            if first.op_type in WEIGHTED and user.op_type == "Mul":
                return group
            added = True
            group.append(user)
        else:
            return group


def _gate(first: ir.Node) -> ir.Node | None:
    """The Mul of x * sigmoid(x) that only `first` and its input feed."""
    users = [user for user, _ in first.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Mul" and first.inputs[0] in users[0].inputs:
        return users[0]
    return None


def _layer(group: list[ir.Node], alias: dict[ir.Value, ir.Value]) -> Layer:
    first, inside = group[0], {o for node in group for o in node.outputs}
    reads: dict[str, int] = {}
    for node in group:
        for value in _activations(node):
            source = alias.get(value, value)
            if value not in inside and source.name is not None:
                reads.setdefault(source.name, _elements(value))
    writes = tuple((o.name or "", _elements(o)) for o in group[-1].outputs)
    if first.op_type == "GatherElements" or first.op_type == "Gather":
        reads = {name: min(size, writes[0][1]) for name, size in reads.items()}
    weights = sum(
        math.prod(shape(v) or ()) for node in group for v in node.inputs if v is not None and _fixed(v)
    ) if first.op_type in WEIGHTED else 0  # fmt: skip
    ops = "+".join(node.op_type for node in group)
    smooth = any(node.op_type in _SMOOTH for node in group)
    able = first.op_type in WEIGHTED or first.op_type in _POOLS | _COPIES | _CHEAP | _TABLES
    return Layer(
        node_id(first),
        ops,
        _kind(first),
        tuple(node_id(n) for n in group),
        tuple(reads.items()),
        writes,
        weights=weights,
        smooth=smooth,
        int8=able,
        **_product(first),
    )


def _elements(value: ir.Value) -> int:
    return math.prod(shape(value) or ())


def _kind(node: ir.Node) -> str:
    op = node.op_type
    if op in ("Conv", "ConvTranspose"):
        weight = shape(node.inputs[1]) or (1, 1, 1, 1)
        if op == "Conv" and weight[1] == 1 and integer(node, "group", 1) > 1:
            return "depthwise"
        return "pointwise" if math.prod(weight[2:]) == 1 else "conv"
    if op in ("Gemm", "MatMul"):
        return "gemm"
    if op in _POOLS:
        return "pool"
    if op in _COPIES:
        return "copy"
    return "elementwise" if op in _ARITHMETIC | _SMOOTH | _CHEAP else "other"


def _product(node: ir.Node) -> dict[str, int]:
    """The matrix product that a weighted node is: the fields of `Layer` from macs to stride."""
    if node.op_type not in WEIGHTED:
        return {}
    output, source, weight = (
        shape(node.outputs[0]) or (),
        shape(node.inputs[0]) or (),
        shape(node.inputs[1]) or (),
    )
    if not output or not source or not weight:
        return {}
    if node.op_type == "Conv":
        groups, taps = integer(node, "group", 1), math.prod(weight[2:])
        rows, depth, columns = math.prod(output) // output[1], weight[1] * taps, weight[0] // groups
        stride = max(ints(node, "strides", (1,)))
        return _counts(rows, depth, columns, groups, taps, stride)
    if node.op_type == "ConvTranspose":
        groups, taps = integer(node, "group", 1), math.prod(weight[2:])
        return _counts(math.prod(source) // source[1], source[1] // groups, weight[1] * taps, groups, 1, 1)
    if node.op_type == "Gemm":
        depth = source[0] if integer(node, "transA", 0) else source[-1]
        return _counts(math.prod(output) // output[-1], depth, output[-1], 1, 1, 1)
    batch = math.prod(output[:-2])
    return _counts(output[-2] if len(output) > 1 else 1, source[-1], output[-1], batch, 1, 1)


def _counts(rows: int, depth: int, columns: int, groups: int, taps: int, stride: int) -> dict[str, int]:
    macs = rows * depth * columns * groups
    return {
        "macs": macs,
        "rows": rows,
        "depth": depth,
        "columns": columns,
        "groups": groups,
        "taps": taps,
        "stride": stride,
    }  # fmt: skip


def conversions(
    found: tuple[Layer, ...], precisions: list[str], inputs: dict[str, int]
) -> Iterator[tuple[str, int, str, str]]:
    """(value, elements, from, to) of every change of precision between layers, each once per value.

    inputs: the graph's inputs, which arrive in float32. Outputs leave in float32.
    """
    have = dict.fromkeys(inputs, "float32")
    sizes = dict(inputs)
    seen: set[tuple[str, str]] = set()
    read: set[str] = set()
    for layer, precision in zip(found, precisions, strict=True):
        for name, elements in layer.reads:
            read.add(name)
            before = have.get(name, "float32")
            if before != precision and (name, precision) not in seen:
                seen.add((name, precision))
                yield name, elements, before, precision
        for name, elements in layer.writes:
            have[name], sizes[name] = precision, elements
    for name, precision in have.items():
        if name not in read and precision != "float32":
            yield name, sizes[name], precision, "float32"
