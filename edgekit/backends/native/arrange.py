"""Channels in the order in which they are read.

A ShuffleNet joins two values, mixes their channels and takes them apart again: one part goes through convolutions, the
other one waits for the next Concat. Convolutions write and read channels in any order, so here

- what waits is gathered into the next Concat, in the order that suits it;
- both inputs of a Concat are ordered such that the part that convolutions read lies side by side in it, and is no copy;
- a shuffle of which all is read by convolutions becomes the order of their weights, through depthwise ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace as changed
from functools import partial

import numpy as np
import onnx_ir as ir

from edgekit.backends.lowering import Unsupported
from edgekit.backends.native.channels import taken
from edgekit.backends.native.plan import PARTS, shuffle_at
from edgekit.passes.graph import clean, constant, integer, new_weight, only_user, replace, shape
from edgekit.quant.activations import steps
from edgekit.quant.annotate import quant, set_quant
from edgekit.quant.rules import bias, weight

Order = Sequence[int]
"""Which channel lies at each place."""
Part = tuple[ir.Value, tuple[int, ...]]
"""A value, and which channels of another one it is."""


def arrange(model: ir.Model) -> None:
    """Orders the channels of the annotated `model` in place. Inputs and outputs stay as they are."""
    for node in list(model.graph):
        if node.op_type == "Concat" and len(node.inputs) == 2 and quant(node.outputs[0]) is not None:
            _arrange(model.graph, node)
    clean(model)


def _arrange(graph: ir.Graph, node: ir.Node) -> None:
    out = node.outputs[0]
    sizes = [shape(v) for v in node.inputs]
    if integer(node, "axis", 0) != 1 or any(s is None or len(s) != 4 for s in sizes) or out.is_graph_output():
        return
    mixed, channels = _mixed(out)
    if mixed.is_graph_output():
        return
    if mixed is not out:
        order = [int(i) for i in np.argsort(channels)]
        todo = _absorbed(graph, mixed, order)
        if todo is not None:
            for act in todo:
                act()
            replace(mixed, out)
            return
    parts = _parts(mixed, channels)
    read = [p for p in parts if _convolved(p[0])]
    if len(read) != 1 or any(_together(c) or quant(v) != quant(out) or v.is_graph_output() for v, c in parts):
        return
    writers = [None if v is None else _writer(graph, v) for v in node.inputs]
    if None in writers:
        return
    ((value, wanted),) = read
    first = sizes[0][1] if sizes[0] else 0
    total = first + (sizes[1][1] if sizes[1] else 0)
    rests = [[i for i in r if i not in wanted] for r in (range(first), range(first, total))]
    inner = [i for i in range(total) if i in wanted]
    places = [*rests[0], *inner, *rests[1]]
    for write, begin, end in zip(writers, (0, first), (first, total), strict=True):
        assert write is not None
        write([i - begin for i in places[begin:end]])
    at = len(rests[0])
    for user, _ in value.uses():
        _read_in(graph, user, [wanted.index(i) for i in inner])
    _instead(value, ir.node("Slice", [out, *(_index(graph, [i]) for i in (at, at + len(inner), 1))]))
    for other, which in parts:
        if other is not value:
            _instead(
                other, ir.node("Gather", [out, _index(graph, [places.index(i) for i in which])], {"axis": 1})
            )


def _mixed(value: ir.Value) -> tuple[ir.Value, tuple[int, ...]]:
    """(the value behind a shuffle that is all that reads `value`, its channels); `value` itself if there is none."""
    user = only_user(value)
    found = None if user is None else shuffle_at(user)
    if found is not None and found[0].integer:
        return found[0].out, found[0].channels
    sizes = shape(value)
    return value, tuple(range(sizes[1] if sizes else 0))


def _parts(value: ir.Value, channels: tuple[int, ...]) -> list[Part]:
    """All that reads `value`, whose channels are `channels`, where that takes channels; [] if something else does."""
    found: list[Part] = []
    for user in dict.fromkeys(user for user, _ in value.uses()):
        try:
            if user.op_type not in PARTS or user.inputs[0] is not value:
                return []
            found += [(v, tuple(channels[i] for i in which)) for v, which in taken(user)]
        except Unsupported:
            return []
    return [p for p in found if p[0].uses() or p[0].is_graph_output()]


def _together(channels: tuple[int, ...]) -> bool:
    return channels == tuple(range(channels[0], channels[0] + len(channels)))


def _dense(node: ir.Node, value: ir.Value) -> bool:
    """Whether `node` is a convolution of all channels of `value`."""
    return (
        node.op_type == "Conv"
        and node.inputs[0] is value
        and weight(node) is not None
        and integer(node, "group", 1) == 1
    )


def _convolved(value: ir.Value) -> bool:
    return (
        bool(value.uses())
        and not value.is_graph_output()
        and all(_dense(user, value) for user, _ in value.uses())
    )


def _absorbed(graph: ir.Graph, value: ir.Value, order: Order) -> list[Callable[[], None]] | None:
    """What makes the readers of `value` take its channels in `order`; None where one cannot."""
    if value.is_graph_output():
        return None
    found: list[Callable[[], None]] = []
    for user in dict.fromkeys(user for user, _ in value.uses()):
        if _dense(user, value):
            found.append(partial(_read_in, graph, user, order))
            continue
        each = user.op_type == "Conv" and user.inputs[0] is value and _known(user)
        if not each or not (shape(weight(user)) or (0,))[0] == integer(user, "group", 1) == len(order):
            return None
        further = _absorbed(graph, _end(user), order)
        if further is None:
            return None
        found += [partial(_write_in, graph, user, order), *further]
    return found


def _writer(graph: ir.Graph, value: ir.Value) -> Callable[[Order], None] | None:
    """What makes the writer of `value`, which one node reads, put its channels in another order; None where it cannot."""
    node = value.producer()
    if node is None or only_user(value) is None:
        return None
    which = constant(node.inputs[1]) if node.op_type == "Gather" and integer(node, "axis", 0) == 1 else None
    if which is not None:
        return partial(_gather_in, graph, node, which)
    while node is not None and node.op_type != "Conv":
        node = next((v.producer() for v in node.inputs if v is not None and constant(v) is None), None)
    if node is None or not _known(node) or integer(node, "group", 1) != 1:
        return None
    return partial(_write_in, graph, node) if _end(node) is value else None


def _known(node: ir.Node) -> bool:
    """Whether weights and bias of a convolution are constants."""
    return weight(node) is not None and (
        len(node.inputs) < 3 or node.inputs[2] is None or bias(node) is not None
    )


def _end(node: ir.Node) -> ir.Value:
    """The result of the node and the activations behind it."""
    behind = steps(node.outputs[0])
    return behind[-1].result if behind else node.outputs[0]


def _gather_in(graph: ir.Graph, node: ir.Node, which: np.ndarray, order: Order) -> None:
    node.replace_input_with(1, _index(graph, (int(which[i]) for i in order)))


def _read_in(graph: ir.Graph, node: ir.Node, order: Order) -> None:
    _weights(graph, node, 1, constant(weight(node)), lambda w: w[:, list(order)], None)


def _write_in(graph: ir.Graph, node: ir.Node, order: Order) -> None:
    _weights(graph, node, 1, constant(weight(node)), lambda w: w[list(order)], order)
    if bias(node) is not None:
        _weights(graph, node, 2, constant(bias(node)), lambda b: b.reshape(-1)[list(order)], None)


def _weights(
    graph: ir.Graph,
    node: ir.Node,
    place: int,
    numbers: np.ndarray | None,
    f: Callable[[np.ndarray], np.ndarray],
    scales: Order | None,
) -> None:
    """Input `place` of the node with other numbers. scales: the new order of its scales, if that changes."""
    old = node.inputs[place]
    assert old is not None and numbers is not None
    new = new_weight(graph, str(old.name), np.ascontiguousarray(f(numbers)))
    new.meta.update(old.meta)
    params = quant(old)
    if params is not None and scales is not None and len(params.scale) > 1:
        zero = params.zero_point
        zero = tuple(zero[i] for i in scales) if len(zero) > 1 else zero
        set_quant(new, changed(params, scale=tuple(params.scale[i] for i in scales), zero_point=zero))
    node.replace_input_with(place, new)


def _index(graph: ir.Graph, numbers: Iterable[int]) -> ir.Value:
    return new_weight(graph, "channels", np.asarray(list(numbers), np.int64))


def _instead(value: ir.Value, node: ir.Node) -> None:
    """`node` in front of the writer of `value`, read in its place."""
    writer = value.producer()
    assert writer is not None and writer.graph is not None
    writer.graph.insert_before(writer, node)
    new = node.outputs[0]
    new.name, value.name = value.name, None
    new.shape, new.type = value.shape, value.type
    new.meta.update(value.meta)
    replace(value, new)
