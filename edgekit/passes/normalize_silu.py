"""Writes the two gated activations in one form each, so that later stages match one pattern.

    SiLU       x / (1 + exp(-x)),  Sigmoid(x) * x          ->   Mul(x, Sigmoid(x))
    HardSwish  x * clip(x + 3, 0, 6) / 6 in any grouping,
               x * HardSigmoid(x; 1/6, 1/2)                ->   HardSwish(x)

ONNX has no SiLU operator at this opset; Mul(x, Sigmoid(x)) is what runtimes fuse.
Source: Elfwing et al. 2018 (SiLU), Howard et al. 2019 (hard-swish).
"""

from __future__ import annotations

import onnx_ir as ir

from edgekit.passes.graph import clean, constant, number, scalar, swap_node

TOLERANCE = 1e-5


def run(model: ir.Model) -> int:
    """In place. Returns the number of rewritten activations."""
    count = 0
    for node in list(model.graph):
        if node.graph is None or node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
            continue
        new = _hardswish(node) or _long_silu(node, model.graph)
        if new is not None:
            swap_node(model.graph, node, new)
            count += 1
        elif node.op_type == "Mul" and _made_by(node.inputs[0], "Sigmoid", node.inputs[1]):
            gate, x = node.inputs
            node.replace_input_with(0, x)
            node.replace_input_with(1, gate)
            count += 1
    clean(model)
    return count


def counts(model: ir.Model) -> dict[str, int]:
    """How many activations of each canonical form the graph holds: silu, hardswish."""
    silu = sum(n.op_type == "Mul" and _made_by(n.inputs[1], "Sigmoid", n.inputs[0]) for n in model.graph)
    return {"silu": silu, "hardswish": sum(n.op_type == "HardSwish" for n in model.graph)}


def _made_by(value: ir.Value | None, op: str, source: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == op and producer.inputs[0] is source


def _operands(node: ir.Node | None, op: str) -> tuple[ir.Value, float] | None:
    """(value, c) of a binary node with one scalar constant c; the constant second for Div and Sub."""
    if node is None or node.op_type != op or len(node.inputs) != 2:
        return None
    for i, j in ((0, 1), (1, 0)) if op in ("Add", "Mul") else ((0, 1),):
        value, c = node.inputs[i], scalar(node.inputs[j])
        if value is not None and c is not None and constant(value) is None:
            return value, c
    return None


def _sixth(node: ir.Node | None) -> ir.Value | None:
    """v of v / 6 or v * (1/6)."""
    divided = _operands(node, "Div")
    if divided is not None and divided[1] == 6.0:
        return divided[0]
    scaled = _operands(node, "Mul")
    return scaled[0] if scaled is not None and abs(scaled[1] * 6 - 1) < 1e-5 else None


def _relu6_gate(value: ir.Value | None) -> ir.Value | None:
    """x of clip(x + 3, 0, 6)."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Clip" or len(node.inputs) < 3 or node.inputs[0] is None:
        return None
    if scalar(node.inputs[1]) != 0.0 or scalar(node.inputs[2]) != 6.0:
        return None
    shifted = _operands(node.inputs[0].producer(), "Add")
    return shifted[0] if shifted is not None and shifted[1] == 3.0 else None


def _gate_source(value: ir.Value | None) -> ir.Value | None:
    """x of clip(x + 3, 0, 6) / 6 or HardSigmoid(x; 1/6, 1/2)."""
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if node.op_type == "HardSigmoid":
        exact = abs(number(node, "alpha", 0.2) * 6 - 1) < 1e-5 and number(node, "beta", 0.5) == 0.5
        return node.inputs[0] if exact else None
    return _relu6_gate(_sixth(node))


def _hardswish(node: ir.Node) -> ir.Node | None:
    if node.op_type == "Mul":
        for x, gate in (node.inputs, node.inputs[::-1]):
            if x is not None and _gate_source(gate) is x:
                return ir.node("HardSwish", [x])
    product = _sixth(node)
    inner = product.producer() if product is not None else None
    if inner is not None and inner.op_type == "Mul" and len(inner.inputs) == 2:
        for x, gate in (inner.inputs, inner.inputs[::-1]):
            if x is not None and _relu6_gate(gate) is x:
                return ir.node("HardSwish", [x])
    return None


def _long_silu(node: ir.Node, graph: ir.Graph) -> ir.Node | None:
    """x / (1 + exp(-x))."""
    if node.op_type != "Div" or node.inputs[1] is None:
        return None
    x = node.inputs[0]
    summed = _operands(node.inputs[1].producer(), "Add")
    if x is None or summed is None or summed[1] != 1.0:
        return None
    exp = summed[0].producer()
    if exp is None or exp.op_type != "Exp" or not _made_by(exp.inputs[0], "Neg", x):
        return None
    gate = ir.node("Sigmoid", [x])
    gate.outputs[0].name = f"{node.outputs[0].name}_gate"
    graph.insert_before(node, gate)
    return ir.node("Mul", [x, gate.outputs[0]])
