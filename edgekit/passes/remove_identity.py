"""Removes nodes that change nothing at inference.

Identity, Dropout, Cast to the same type; Reshape, Flatten, Squeeze, Unsqueeze, Expand, Tile and
forward Slice whose output has the input's shape; Transpose in order and pairs that cancel;
Reshape of a Reshape; Pad by zero; Concat of one; +0, -0, *1, /1 by a constant that does not
broadcast; Relu after Relu. Exact: no value changes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import clean, constant, infer, ints, only_user, replace, shape

TOLERANCE = 0.0
_SAME_SHAPE = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile"}
_RESHAPES = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}


def run(model: ir.Model) -> int:
    """In place. Returns the number of nodes that went."""
    graph = model.graph
    before = len(graph)
    changed = True
    while changed:
        changed = False
        for node in list(graph):
            source = _source(node)
            if source is not None and replace(node.outputs[0], source):
                if not any(o.uses() or o.is_graph_output() for o in node.outputs):
                    graph.remove(node, safe=True)
                changed = True
            elif _shortcut(graph, node):
                changed = True
        clean(model)
    infer(model)
    return before - len(graph)


def _source(node: ir.Node) -> ir.Value | None:
    """The value that the first output of `node` equals, if it equals one of its inputs."""
    op = node.op_type
    source = node.inputs[0] if node.inputs else None
    if source is None or (node.outputs and not (node.outputs[0].uses() or node.outputs[0].is_graph_output())):
        return None
    before, after = shape(source), shape(node.outputs[0])
    same = before is not None and before == after
    if op == "Identity":
        return source
    if op == "Dropout":  # inference: the mask output is unused and training_mode false
        training = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        masked = len(node.outputs) > 1 and bool(node.outputs[1].uses())
        return source if not masked and (training is None or not training.any()) else None
    if op == "Cast":
        return source if source.dtype is not None and source.dtype.value == _int(node, "to") else None
    if op in _SAME_SHAPE:
        return source if same else None
    if op == "Slice":
        steps = (
            constant(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else np.ones(1)
        )
        return source if same and steps is not None and (steps > 0).all() else None
    if op == "Pad":
        pads = constant(node.inputs[1])
        return source if same and pads is not None and not pads.any() else None
    if op == "Concat":
        return source if len(node.inputs) == 1 else None
    if op == "Transpose":
        perm = ints(node, "perm", range(len(before or ()))[::-1])
        if list(perm) == sorted(perm) and before is not None:
            return source
        first = source.producer()
        if first is not None and first.op_type == "Transpose" and first.inputs[0] is not None:
            inner = ints(first, "perm", range(len(perm))[::-1])
            if [inner[p] for p in perm] == list(range(len(perm))):
                return first.inputs[0]
        return None
    if op == "Relu":
        first = source.producer()
        return source if first is not None and first.op_type == "Relu" else None
    if op in ("Add", "Sub", "Mul", "Div") and len(node.inputs) == 2:
        neutral = 0.0 if op in ("Add", "Sub") else 1.0
        for value, other in ((0, 1), (1, 0)) if op in ("Add", "Mul") else ((0, 1),):
            data, kept = constant(node.inputs[other]), node.inputs[value]
            if (
                data is not None
                and data.size
                and (data == neutral).all()
                and shape(kept) == after is not None
            ):
                return kept
    return None


def _shortcut(graph: ir.Graph, node: ir.Node) -> bool:
    """Reshape(Reshape(x)) reads x: only the last shape counts."""
    if node.op_type != "Reshape" or node.inputs[0] is None:
        return False
    first = node.inputs[0].producer()
    target = constant(node.inputs[1])
    if first is None or first.op_type not in _RESHAPES or only_user(first.outputs[0]) is not node:
        return False
    if target is None or (target == 0).any() or first.inputs[0] is None:
        return False  # a 0 copies a size of the tensor in between
    node.replace_input_with(0, first.inputs[0])
    graph.remove(first, safe=True)
    return True


def _int(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int())
