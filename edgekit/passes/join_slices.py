"""Concatenates a tensor as it is where all its slices were concatenated again.

    Concat(.., x[:k], x[k:], ..)   ->   Concat(.., x, ..)          slices along the axis of the Concat

Split in two and kept beside what is computed from one half: the C2f and ELAN blocks of YOLO networks.
Each slice and each input of a Concat is a copy in pieces of one pixel's channels; slices that nothing else
reads go.
"""

from __future__ import annotations

import onnx_ir as ir

from edgekit.passes.graph import clean, constant, integer, replace, shape, swap_node

TOLERANCE = 0.0

Piece = tuple[ir.Value, int, int]
"""(source, start, end) along the axis asked for."""


def run(model: ir.Model) -> int:
    """In place. Returns the number of slices that are read no more where they were joined."""
    joined = 0
    for node in list(model.graph):
        if node.op_type == "Concat" and node.domain in ("", "ai.onnx"):
            joined += _join(model.graph, node)
    if joined:
        clean(model)
    return joined


def _join(graph: ir.Graph, node: ir.Node) -> int:
    sizes = shape(node.outputs[0])
    inputs = [v for v in node.inputs if v is not None]
    if sizes is None:
        return 0
    axis = integer(node, "axis", 0) % len(sizes)
    pieces = [_piece(v, axis) for v in inputs]
    found: list[ir.Value] = []
    i = 0
    while i < len(inputs):
        count = _whole(pieces[i:], axis)
        piece = pieces[i]
        if count > 1 and piece is not None:
            found.append(piece[0])
            i += count
        else:
            found.append(inputs[i])
            i += 1
    gone = len(inputs) - len(found)
    if not gone or (len(found) == 1 and not _pass_on(graph, node, found[0])):
        return 0
    if len(found) > 1:
        new = ir.Node("", "Concat", found, [ir.AttrInt64("axis", axis)], num_outputs=1)
        swap_node(graph, node, new)
    return gone


def _pass_on(graph: ir.Graph, node: ir.Node, value: ir.Value) -> bool:
    """The Concat gave back what was sliced: its readers take that."""
    if not replace(node.outputs[0], value):
        return False
    graph.remove(node, safe=True)
    return True


def _whole(pieces: list[Piece | None], axis: int) -> int:
    """How many of the first pieces lie side by side and are together their whole source; 0 if they are not."""
    source, end = None, 0
    for count, piece in enumerate(pieces, 1):
        if piece is None or piece[1] != end or (source is not None and piece[0] is not source):
            return 0
        source, _, end = piece
        sizes = shape(source)
        if sizes is None or end >= sizes[axis]:
            return count if sizes is not None and end == sizes[axis] else 0
    return 0


def _piece(value: ir.Value, axis: int) -> Piece | None:
    """What part of which tensor a value is: the result of a Slice or Split along `axis` alone."""
    node = value.producer()
    source = None if node is None else node.inputs[0]
    sizes = shape(source)
    if node is None or source is None or sizes is None or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Split" and integer(node, "axis", 0) % len(sizes) == axis:
        ends = [shape(v) for v in node.outputs]
        index = list(node.outputs).index(value)
        if any(s is None for s in ends):
            return None
        start = sum(s[axis] for s in ends[:index] if s is not None)
        mine = ends[index]
        return None if mine is None else (source, start, start + mine[axis])
    if node.op_type != "Slice" or len(node.inputs) < 3:
        return None
    starts, stops, axes, steps = (
        constant(node.inputs[i]) if len(node.inputs) > i and node.inputs[i] is not None else None
        for i in range(1, 5)
    )
    computed = [i for i in (1, 2, 3, 4) if len(node.inputs) > i and node.inputs[i] is not None]
    known = (starts, stops, axes, steps)
    if starts is None or stops is None or any(known[i - 1] is None for i in computed):
        return None
    along = list(range(len(starts))) if axes is None else [int(a) % len(sizes) for a in axes]
    if along != [axis] or (steps is not None and steps.tolist() != [1]):
        return None
    start, stop, _ = slice(int(starts[0]), int(stops[0])).indices(sizes[axis])
    return source, start, stop
