"""Outlier channel splitting: an output channel far larger than the others becomes several smaller ones.

One scale serves all channels of a tensor. A convolution's outlier channel is computed twice at half the size
(weights and bias halved, exactly), and each convolution that reads the tensor has the channel's weights twice:
the same sums, half the range, so half the rounding error of every other channel. Operators in between
must work channel by channel and be homogeneous, f(x / 2) = f(x) / 2. It costs the arithmetic of a channel, so it
is done within the tile of channels that the kernels compute anyway, or for a few channels of many.

The paper also splits weights; scales per output channel leave nothing to gain there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import constant, integer, new_weight, shape
from edgekit.quant import simulate
from edgekit.quant.annotate import node_id, quant, set_quant
from edgekit.quant.placement import prepared
from edgekit.quant.ranges import covered, params
from edgekit.quant.repair import Feed, Progress, checked, chosen
from edgekit.quant.repair.layers import drop_unused
from edgekit.quant.rules import bias, weight
from edgekit.quant.sparsity import two_of_four
from edgekit.quant.weights import exact_in_float16
from edgekit.spec import QuantParams

PAPER = (
    "Zhao, Hu, Dotzel, De Sa, Zhang: Improving Neural Network Quantization without Retraining using Outlier "
    "Channel Splitting, ICML 2019"
)
HOMOGENEOUS = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool")
EXPAND = 0.02
"""Share of the channels that may be added beyond a tile (the paper: 0.01 to 0.05)."""
WORTH = 0.8
"""A split must bring the range to this share of what it was."""


@dataclass(frozen=True)
class Split:
    """How a tensor is split. conv: `node_id` of the convolution; `copies`: (channel, 1 / 2^n) of every new
    channel, in order; ranges: value name -> (low, high) that its channels reach afterwards."""

    conv: str
    copies: tuple[tuple[int, float], ...]
    ranges: tuple[tuple[str, tuple[float, float]], ...]


def run(
    model: ir.Model,
    float_model: ir.Model,
    feeds: Sequence[Feed],
    *,
    progress: Progress | None = None,
    nodes: Collection[str] | None = None,
    granularity: int = 8,
    expand: float = EXPAND,
) -> ir.Model:
    """An annotated copy of `model` with outlier channels split and the ranges of their tensors narrowed.

    granularity: channels of a tile (`Target.channel_granularity`), free to fill; expand: share of the channels
    that may be added beyond. Inner values of the result have more channels than those of `float_model`;
    `split(float_model, plan(...))` gives one to compare with. Raises: CalibrationError without pictures, UsageError.
    """
    found = plan(model, float_model, feeds, nodes=nodes, granularity=granularity, expand=expand)
    if progress:
        progress("channel splitting", len(found), len(found))
    return split(model, found)


def plan(
    model: ir.Model,
    float_model: ir.Model,
    feeds: Sequence[Feed],
    *,
    nodes: Collection[str] | None = None,
    granularity: int = 8,
    expand: float = EXPAND,
) -> tuple[Split, ...]:
    """What is worth splitting; the arguments are those of `run`."""
    checked(feeds)
    places = {}
    for node in chosen(model, nodes):
        tree = _tree(node)
        room = _room(node, granularity, expand) if tree else 0
        if tree and room:
            places[node] = tree, [v for v in tree[0] if quant(v) is not None], room
    names = dict.fromkeys(str(v.name) for _, values, _ in places.values() for v in values)
    ends = _ends(float_model, feeds, list(names))
    found = []
    for node, (_, values, room) in places.items():
        if values and all(str(v.name) in ends for v in values):
            one = _split(node, values, ends, room)
            if one is not None:
                found.append(one)
    return tuple(found)


def split(model: ir.Model, splits: Sequence[Split]) -> ir.Model:
    """A copy of `model`, annotated or float, split as `plan` says: the same outputs but for the order of sums."""
    model = model.clone()
    by_name = {node_id(n): n for n in model.graph}
    for one in splits:
        node = by_name[one.conv]
        tree = _tree(node)
        assert tree is not None, "planned on this network"
        values, readers = tree
        index = np.array([c for c, _ in one.copies])
        factor = np.array([f for _, f in one.copies], np.float32)
        _replace(model.graph, node, 1, 0, index, factor)
        if bias(node) is not None:
            _replace(model.graph, node, 2, 0, index, factor)
        for reader in readers:
            _replace(model.graph, reader, 1, 1, index, np.ones(len(index), np.float32))
        ranges = dict(one.ranges)
        for value in values:
            old = quant(value)
            if old is not None and str(value.name) in ranges:
                set_quant(value, _narrowed(old, ranges[str(value.name)]))
    drop_unused(model.graph)
    return prepared(model)


def _tree(node: ir.Node) -> tuple[list[ir.Value], list[ir.Node]] | None:
    """(values from the output of the convolution `node` on, convolutions that read them), None if something
    else does or the operators between are not homogeneous."""
    if node.op_type != "Conv" or weight(node) is None:
        return None
    if len(node.inputs) > 2 and node.inputs[2] is not None and bias(node) is None:
        return None
    values, readers = [node.outputs[0]], []
    for value in values:
        if value.is_graph_output() or not value.uses():
            return None
        for user, index in value.uses():
            if user.op_type in HOMOGENEOUS and index == 0 and not any(o.uses() for o in user.outputs[1:]):
                values.append(user.outputs[0])
            elif user.op_type == "Conv" and index == 0 and weight(user) is not None:
                # more channels would move those of a 2:4 sparse reader out of their fours
                if integer(user, "group", 1) != 1 or two_of_four(user):
                    return None
                readers.append(user)
            else:
                return None
    return values, readers


def _room(node: ir.Node, granularity: int, expand: float) -> int:
    """How many channels may be added. A grouped convolution has none: its input would have to grow as well."""
    if integer(node, "group", 1) != 1:
        return 0
    channels = (shape(node.inputs[1]) or (0,))[0]
    return max(-channels % max(granularity, 1), int(expand * channels))


def _ends(model: ir.Model, feeds: Sequence[Feed], names: Sequence[str]) -> dict[str, np.ndarray]:
    """float64 [2, channels] of each value: its least and largest number per channel over all pictures."""
    made = {str(v.name) for n in model.graph for v in n.outputs}
    found: dict[str, np.ndarray] = {}
    for group in simulate.batches(model, [n for n in names if n in made]):
        for row in simulate.run(model, feeds, group):
            for name, array in row.items():
                axes = (0, *range(2, array.ndim))
                now = np.stack([array.min(axis=axes), array.max(axis=axes)]).astype(np.float64)
                old = found.get(name, now)
                found[name] = np.stack([np.minimum(old[0], now[0]), np.maximum(old[1], now[1])])
    return found


def _split(node: ir.Node, values: Sequence[ir.Value], ends: dict[str, np.ndarray], room: int) -> Split | None:
    """The largest copy of a channel is halved, again and again, while there is room."""
    covers = {str(v.name): covered(p) for v in values if (p := quant(v)) is not None}
    # in units of the range that the codes cover now: what is clipped today need not be covered tomorrow
    reach = np.max(
        [np.max(np.abs(ends[n]), axis=0) / max(-low, high) for n, (low, high) in covers.items()], 0
    )
    copies = [(c, 1.0) for c in range(len(reach))]
    best = list(copies)
    least = float(reach.max())
    for _ in range(room):
        top = max(range(len(copies)), key=lambda i: (reach[copies[i][0]] * copies[i][1], -i))
        channel, factor = copies[top]
        copies[top] = (channel, factor / 2)
        copies.append((channel, factor / 2))
        largest = max(reach[c] * f for c, f in copies)
        if largest < least * 0.999:  # a copy that leaves another as large gains nothing yet
            best, least = list(copies), largest
    if least > WORTH * min(float(reach.max()), 1.0):
        return None
    index = np.array([c for c, _ in best])
    factor_ = np.array([f for _, f in best])
    groups: dict[QuantParams | None, list[str]] = {}
    for value in values:  # values of one scale keep one scale
        groups.setdefault(quant(value), []).append(str(value.name))
    ranges = []
    for members in groups.values():
        low = min(float((ends[n][0][index] * factor_).min()) for n in members)
        high = max(float((ends[n][1][index] * factor_).max()) for n in members)
        low, high = max(low, covers[members[0]][0]), min(high, covers[members[0]][1])
        ranges += [(n, (low, high)) for n in members]
    return Split(node_id(node), tuple(best), tuple(ranges))


def _narrowed(old: QuantParams, bounds: tuple[float, float]) -> QuantParams:
    found = params(*bounds, symmetric=old.zero_point[0] == 0)
    if float(np.float16(old.scale[0])) == old.scale[0]:
        scale = float(exact_in_float16(np.asarray(found.scale[0])))
        found = QuantParams(found.dtype, (scale,), found.zero_point)
    return found


def _replace(
    graph: ir.Graph, node: ir.Node, position: int, axis: int, index: np.ndarray, factor: np.ndarray
) -> None:
    """Give `node` slices `index` along `axis` of an initialiser, times `factor`, as an initialiser of its own."""
    old = node.inputs[position]
    numbers = constant(old)
    assert old is not None and numbers is not None
    sizes = [1] * numbers.ndim
    sizes[axis] = -1
    taken = np.take(numbers, index, axis) * factor.reshape(sizes)
    value = new_weight(graph, f"{old.name}.split", taken.astype(np.float32))
    known = quant(old)
    if known is not None:
        if known.axis == axis:
            scale = tuple(float(np.float32(known.scale[i]) * f) for i, f in zip(index, factor, strict=True))
            known = QuantParams(known.dtype, scale, (0,) * len(scale), axis)
        set_quant(value, known)
    node.replace_input_with(position, value)
