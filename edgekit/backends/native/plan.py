"""What of a graph becomes one step of the engine: operators with the activations and additions behind them.

A node computes in integers if it has an integer kernel and what it reads is annotated (quant/annotate.py). What it
takes in behind it:

- activations up to the last annotated value, as a table of codes, where its own result is annotated;
- up to the first annotated value, as a curve from the sum, where that is not (a Relu or Clip: by clipping codes);
- of convolutions and products, an addition of codes of the same shape, and the activations behind that.

A convolution whose results carry no annotation as far as that writes real numbers straight from its sums, and
computes the activation behind them in floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import constant, integer, ints, only_user, shape, text
from edgekit.quant.activations import Stage, beginning, monotone_limits, steps
from edgekit.quant.annotate import quant
from edgekit.quant.rules import WEIGHTED, weight

MOVES = ("Identity", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose")
PARTS = ("Slice", "Split", "Gather")
SHUFFLE = "Shuffle"
"""Kind of unit: moves that together put channels in another order."""
POOLS = ("MaxPool", "GlobalMaxPool")
MEANS = ("AveragePool", "GlobalAveragePool", "ReduceMean")
WITH_TABLE = (*WEIGHTED, "Add", "Sub", "Mul", *POOLS, "Table")
"""Kinds that can apply a table to the codes that they write (and a Resize to the nearest)."""


@dataclass
class Unit:
    """A step. kind: operator, or "Table" (activations alone). pre: the node's own result; stages: activations behind
    it; skip: what is added then, after: activations behind that. out: what is written. last: its last node."""

    kind: str
    node: ir.Node
    pre: ir.Value
    out: ir.Value
    last: ir.Node
    integer: bool = False
    stages: tuple[Stage, ...] = ()
    skip: ir.Value | None = None
    after: tuple[Stage, ...] = ()
    channels: tuple[int, ...] = ()
    """Of a shuffle: which channel of its input each one is."""
    apart: bool = False
    """A Concat that is not made: who reads it reads both of its inputs."""

    def data(self) -> list[ir.Value]:
        """Computed inputs of the node."""
        return [v for v in self.node.inputs if v is not None and constant(v) is None]

    @property
    def tables(self) -> bool:
        """Whether a table can be applied to what it writes."""
        return self.integer and (
            self.kind in WITH_TABLE or (self.kind == "Resize" and mode(self.node) == "nearest")
        )


@dataclass
class Plan:
    """units: in the order in which they run. writers: of every value that one of them writes. parts: value -> (the
    Concat's result that it lies in, first channel there)."""

    units: list[Unit]
    writers: dict[ir.Value, Unit] = field(default_factory=dict)
    parts: dict[ir.Value, tuple[ir.Value, int]] = field(default_factory=dict)

    def only_codes(self, value: ir.Value) -> bool:
        """Whether all that read `value` compute in integers."""
        if quant(value) is None or value.is_graph_output():
            return False
        readers = [u for u in self.units if u.skip is value or value in u.data()]
        return bool(readers) and all(u.integer for u in readers)


def mode(node: ir.Node) -> str:
    """Of a Resize."""
    return text(node, "mode", "nearest")


def make(graph: ir.Graph, integers: bool) -> Plan:
    """The plan of a prepared graph. integers: use the annotations, else everything computes in floats."""
    order = {node: i for i, node in enumerate(graph)}
    units: list[Unit] = []
    writers: dict[ir.Value, Unit] = {}
    gone: set[ir.Node] = set()
    for node in graph:
        if node.op_type == "Constant" or node in gone:
            continue
        mixed = shuffle_at(node)
        if mixed is not None:
            units.append(mixed[0])
            gone.update(mixed[1])
            writers[mixed[0].out] = mixed[0]
            continue
        joined = _joined(node, writers, order) if integers and node.op_type == "Add" else None
        if joined is not None:
            del writers[joined.out]
            unit = joined
            _add_to(unit, node)
        else:
            unit = _unit(node, integers)
            units.append(unit)
        for one in (*unit.stages, *unit.after):
            gone.update(one.nodes)
        for value in node.outputs if unit.out in node.outputs else (unit.out,):
            writers[value] = unit
    units.sort(key=lambda u: order[u.last])
    plan = Plan(units, writers)
    for unit in units:
        if unit.kind == "Concat":
            _place(unit, plan)
    return plan


def shuffle_at(node: ir.Node) -> tuple[Unit, list[ir.Node]] | None:
    """(unit, its nodes) where moves that begin here, through more than four axes, only reorder channels."""
    before = shape(node.inputs[0])
    if node.op_type not in MOVES or before is None or len(before) != 4:
        return None
    nodes, places = [node], np.arange(math.prod(before)).reshape(before)
    while True:
        sizes = shape(nodes[-1].outputs[0])
        if sizes is None:
            return None
        if nodes[-1].op_type == "Transpose":
            places = places.transpose(ints(nodes[-1], "perm", tuple(reversed(range(places.ndim)))))
        places = places.reshape(sizes)
        following = only_user(nodes[-1].outputs[0])
        if len(sizes) == 4 and len(nodes) > 1:
            break
        if len(sizes) == 4 or following is None or following.op_type not in MOVES:
            return None
        nodes.append(following)
    out = nodes[-1].outputs[0]
    step = before[2] * before[3]
    channels = places[0, :, 0, 0] // step
    if before != places.shape or not np.array_equal(
        places, np.arange(math.prod(before)).reshape(before)[:, channels]
    ):
        return None
    params = {quant(n.outputs[0]) for n in nodes} | {quant(node.inputs[0])}
    unit = Unit(SHUFFLE, node, out, out, nodes[-1], len(params) == 1 and None not in params)
    unit.channels = tuple(int(c) for c in channels)
    return unit, nodes


def gathers(unit: Unit, writers: dict[ir.Value, Unit]) -> bool:
    """Whether a part is copied channel by channel anyway, so that it may as well be written where it is read."""
    source = writers.get(unit.node.inputs[0])  # type: ignore[arg-type]
    if source is not None and source.kind == SHUFFLE and deferred(source):
        return True
    if unit.kind != "Slice" or len(unit.node.inputs) < 5:
        return unit.kind == "Gather"
    steps = constant(unit.node.inputs[4])
    return steps is not None and bool((steps != 1).any())


def deferred(unit: Unit) -> bool:
    """Whether only parts of a shuffle are read: those are gathered one by one."""
    users = {user for user, _ in unit.out.uses()}
    return (
        bool(users) and not unit.out.is_graph_output() and all(u.op_type in ("Slice", "Split") for u in users)
    )


def _unit(node: ir.Node, integers: bool) -> Unit:
    out = node.outputs[0]
    unit = Unit(node.op_type, node, out, out, node)
    found = beginning(node)
    if found is not None and not (node.op_type in ("Add", "Sub", "Mul", "Div") and len(unit.data()) > 1):
        unit.kind, unit.pre = "Table", found.source
        _table(unit, found, integers and quant(found.source) is not None)
    elif not integers:
        pass
    elif node.op_type in WEIGHTED:
        if quant(node.inputs[0]) is not None and quant(weight(node)) is not None:
            unit.integer = True
            closing = _closing(out)
            _behind(unit, _function(out) if closing is None else closing)
    elif all(quant(v) is not None for v in unit.data()) and len(unit.data()) == _arity(node):
        closing = _closing(out)
        if node.op_type in (*MEANS, *MOVES, *PARTS, "Concat", "Resize", "Gather") and quant(out) is not None:
            unit.integer = True
            if unit.tables and closing is not None:
                _behind(unit, closing)
        elif (
            node.op_type in ("Add", "Sub", "Mul", *POOLS)
            and (quant(out) is not None or (closing and monotone_limits(closing) is not None))
            and _fits(node)
        ):
            unit.integer = True
            _behind(unit, closing)
    if not unit.integer and unit.kind in WEIGHTED:
        _behind(unit, _function(out))
    return unit


def _arity(node: ir.Node) -> int:
    return len(node.inputs) if node.op_type == "Concat" else 2 if node.op_type in ("Add", "Sub", "Mul") else 1


def _fits(node: ir.Node) -> bool:
    """Shapes that the integer kernel takes: equal ones, for Mul also one pixel of the other's channels."""
    if node.op_type in POOLS:
        return True
    a, b = (shape(v) for v in node.inputs)
    if a is None or b is None or a == b:
        return a is not None and a == b
    return (
        node.op_type == "Mul"
        and len(a) == len(b) == 4
        and any(x[:2] == y[:2] and y[2:] == (1, 1) for x, y in ((a, b), (b, a)))
    )


def _closing(value: ir.Value) -> tuple[Stage, ...] | None:
    """Activations behind `value` that its writer takes in: () for none; None if it has to write real numbers."""
    found = steps(value)
    ends = [i for i, one in enumerate(found) if quant(one.result) is not None]
    if quant(value) is not None:
        return tuple(found[: ends[-1] + 1]) if ends else ()
    if not ends:
        return None
    first = tuple(found[: ends[0] + 1])
    if monotone_limits(first) is None:
        return first
    return tuple(found[: ends[-1] + 1])


def _function(value: ir.Value) -> tuple[Stage, ...]:
    """The activation behind real numbers that their writer computes as well, in floats."""
    found = next(iter(steps(value)), None)
    return (found,) if found is not None and quant(value) is None and act_name(found) else ()


def _behind(unit: Unit, stages: Sequence[Stage] | None) -> None:
    if stages:
        unit.stages = tuple(stages)
        unit.out, unit.last = stages[-1].result, stages[-1].nodes[-1]


def _table(unit: Unit, first: Stage, integer: bool) -> None:
    """A unit of activations alone: as many as end in an annotated value, or in floats one by one."""
    stages = (first, *steps(first.result)) if integer else (first,)
    ends = [i for i, one in enumerate(stages) if quant(one.result) is not None]
    unit.integer = integer
    _behind(unit, stages[: ends[-1] + 1] if integer and ends else (first,))


def _joined(node: ir.Node, writers: dict[ir.Value, Unit], order: dict[ir.Node, int]) -> Unit | None:
    """The convolution that takes in the addition `node`, the one that runs last."""
    a, b = node.inputs[:2]
    closing = _closing(node.outputs[0])
    if a is b or a is None or b is None or closing is None or shape(a) != shape(b):
        return None
    if quant(node.outputs[0]) is None and monotone_limits(closing) is None:
        return None
    if any(constant(v) is not None or quant(v) is None for v in (a, b)):
        return None
    found = [
        u
        for v in (a, b)
        if (u := writers.get(v)) is not None
        and u.integer
        and u.kind in WEIGHTED
        and u.out is v
        and u.skip is None
        and only_user(v) is node
    ]
    return max(found, key=lambda u: order[u.last]) if found else None


def _add_to(unit: Unit, node: ir.Node) -> None:
    unit.skip = next(v for v in node.inputs if v is not unit.out)
    result = node.outputs[0]
    closing = _closing(result) or ()
    unit.after = tuple(closing)
    unit.out = closing[-1].result if closing else result
    unit.last = closing[-1].nodes[-1] if closing else node


def concat_axis(unit: Unit) -> int:
    rank = len(shape(unit.out) or ())
    found = unit.node.attributes.get("axis")
    return 0 if found is None or not rank else int(found.as_int()) % rank


def _place(unit: Unit, plan: Plan) -> None:
    """Inputs of a Concat of channels that are written where they belong."""
    if concat_axis(unit) != 1:
        return
    unit.apart = _read_apart(unit, plan)
    if unit.apart:
        return
    offset = 0
    for value in unit.node.inputs:
        assert value is not None
        sizes = shape(value)
        assert sizes is not None
        writer = plan.writers.get(value)
        if (
            writer is not None
            and value not in plan.parts
            and not value.is_graph_output()
            and writer.kind not in MOVES
            and (writer.kind not in PARTS or gathers(writer, plan.writers))
            and not (writer.kind == SHUFFLE and deferred(writer))
            and not (writer.kind == "Concat" and quant(value) != quant(unit.out))
            and (not unit.integer or _same_scale(unit, writer, value))
        ):
            plan.parts[value] = (unit.out, offset)
        offset += sizes[1]


def _read_apart(unit: Unit, plan: Plan) -> bool:
    """Whether two inputs that lie elsewhere anyway (a state, a part of something) are only read by pointwise products,
    which take them as they lie."""
    values = [v for v in unit.node.inputs if v is not None and constant(v) is None]
    if len(values) != 2 or len(unit.node.inputs) != 2 or not unit.integer or unit.out.is_graph_output():
        return False
    if any(quant(v) != quant(unit.out) for v in values):
        return False
    if all((w := plan.writers.get(v)) is not None and w.kind not in PARTS for v in values):
        return False
    readers = [user for user, _ in unit.out.uses()]
    return bool(readers) and all(_pointwise(user, unit.out) for user in readers)


def _pointwise(node: ir.Node, value: ir.Value) -> bool:
    sizes = shape(weight(node)) if node.op_type == "Conv" else None
    return (
        sizes is not None
        and node.inputs[0] is value
        and quant(weight(node)) is not None
        and sizes[2:] == (1, 1)
        and set(ints(node, "strides", (1, 1))) == {1}
        and not any(ints(node, "pads", (0, 0)))
        and integer(node, "group", 1) == 1
    )


def _same_scale(unit: Unit, writer: Unit, value: ir.Value) -> bool:
    if quant(value) == quant(unit.out):
        return True
    return writer.tables and only_user(value) is unit.node


def act_name(one: Stage) -> str:
    """The float activation of the engine that a stage is, "" for none."""
    names = tuple(n.op_type for n in one.nodes)
    if names == ("Sigmoid", "Mul"):
        return "silu"
    if len(names) != 1:
        return ""
    known = {
        "Relu": "relu", "Clip": "clip", "LeakyRelu": "leaky_relu", "Sigmoid": "sigmoid", "HardSwish": "hard_swish",
        "HardSigmoid": "hard_sigmoid", "Tanh": "tanh", "Exp": "exp",
    }  # fmt: skip
    (node,) = one.nodes
    if node.op_type == "Gelu":
        return "" if text(node, "approximate", "none") == "tanh" else "gelu"
    return known.get(names[0], "")
