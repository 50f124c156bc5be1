"""Cross-layer equalization, also through SiLU: channels of one tensor get ranges alike, the float network stays equal.

One scale per tensor serves a channel badly whose range is a hundredth of its neighbour's. Where a
convolution writes the tensor and convolutions read it, channel c may be divided by s_c in the first and
multiplied back in the next (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and
Bias Correction", section 4.1; for depthwise readers the factor is exact per filter). Operators between them
must be homogeneous, f(x / s) = f(x) / s: Relu, LeakyRelu, pooling, Resize, Concat. SiLU is not, but

    silu(x) / s = (x / s) * sigmoid(s * (x / s)),

so one multiplication by a constant per channel in front of its Sigmoid makes it exact as well. The factors are
whole multiples of one unit, at most 127 of them: int8 holds them without an error of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import constant, integer, new_weight, only_user, shape
from edgekit.quant.annotate import quant, set_quant
from edgekit.quant.placement import prepared
from edgekit.quant.ranges import channel_ranges
from edgekit.quant.stats import Stats, TensorStats
from edgekit.spec import DType, QuantParams

PAPER = "Nagel et al. 2019 (DFQ), section 4.1, extended to SiLU"
HOMOGENEOUS = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Resize")
STEPS = 127
"""A factor is a whole number of units up to this: an exact int8 constant."""
SHAPES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
"""Candidate ratios of a range's low side to its high side."""
GATE = 8.0
"""Beyond it a Sigmoid is within 0.0004 of 0 or 1: its input needs no wider range."""


@dataclass(frozen=True)
class Candidate:
    """A tensor that can be equalized.

    conv: name of the value that the convolution writes; value: of the one behind its activation (the same
    without one); gate: the Sigmoid's output name for a SiLU. gain: by how much, at most, the noise of the worst
    served half of the channels would fall, as a ratio of scales (see `imbalance`).
    """

    conv: str
    value: str
    gate: str | None
    gain: float


def candidates(model: ir.Model, stats: Stats) -> list[Candidate]:
    """Every tensor of `model` that can be equalized, the largest gain first; `model` is not changed."""
    found = []
    model = prepared(model)
    for node in model.graph:
        if node.op_type != "Conv" or any(v is not None and constant(v) is None for v in node.inputs[1:]):
            continue
        conv = node.outputs[0]
        value, gate = _activation(conv)
        name = str(value.name)
        sizes = shape(conv)
        known = stats.get(name)
        if known is None or sizes is None or value.is_graph_output() or not value.uses():
            continue
        if known.channel_high.size != sizes[1] or not _absorb(value, np.ones(sizes[1]), apply=False):
            continue
        found.append(
            Candidate(
                str(conv.name), name, None if gate is None else str(gate.outputs[0].name), imbalance(known)
            )
        )
    return sorted(found, key=lambda c: (-c.gain, c.value))


def imbalance(stats: TensorStats) -> float:
    """How many times coarser the tensor's scale is than half of its channels need (median over channels)."""
    low, high = channel_ranges(stats)
    span = np.maximum(high - low, 1e-12)
    return float(span.max() / np.median(span))


def factors(before: TensorStats, behind: TensorStats, gated: bool) -> np.ndarray:
    """float32[C]: what each channel is divided by, in whole units of a power of two.

    before, behind: statistics of what the convolution writes and of what stands behind its activation. One range
    [-l, h] must hold every divided channel; of some shapes l / h, the one is taken that comes nearest to a range
    of its own for each channel, in the mean of the squared ratios of their scales.
    """
    low, high = channel_ranges(before if gated else behind)
    # of a gated SiLU's input nothing below -GATE matters
    low = np.maximum(np.minimum(-low, GATE) if gated else -low, 1e-12)
    high = np.maximum(high, 1e-12)
    best: tuple[float, np.ndarray] | None = None
    for ratio in SHAPES:
        reach = np.maximum(low / ratio, high)
        units = np.clip(np.ceil(reach / reach.max() * STEPS - 1e-6), 1, STEPS)
        coarse = units / units.max() * reach.max() * (1 + ratio) / (low + high)
        cost = float(np.mean(coarse**2))
        if best is None or cost < best[0]:
            best = cost, units
    assert best is not None
    # powers of two keep factors exact; their middle is about 1, so that weights keep their size
    return np.asarray(best[1] * 2.0 ** -np.round(np.log2(np.median(best[1]))), np.float32)


def equalize(model: ir.Model, chosen: Sequence[Candidate], stats: Stats) -> tuple[ir.Model, dict[str, str]]:
    """A copy of `model` with `chosen` tensors equalized, equal in float.

    Returns: the model, and value name -> "gate" or "scaled" of every value that now holds other numbers, for
    which statistics have to be gathered again; "gate" is the input of a Sigmoid, useful within +-GATE only.
    """
    model = prepared(model)
    by_name = {str(v.name): v for v in model.graph.inputs}
    by_name |= {str(o.name): o for node in model.graph for o in node.outputs}
    changed: dict[str, str] = {}
    for candidate in chosen:
        conv, value = by_name[candidate.conv], by_name[candidate.value]
        scale = factors(stats[candidate.conv], stats[candidate.value], candidate.gate is not None)
        touched = _absorb(value, scale, apply=True)
        assert isinstance(touched, dict), "a candidate can be absorbed"
        producer = conv.producer()
        assert producer is not None
        _scale_weight(producer, 1, 1 / scale, axis=0)
        if len(producer.inputs) > 2 and producer.inputs[2] is not None:
            _scale_weight(producer, 2, 1 / scale, axis=0)
        changed |= dict.fromkeys((candidate.conv, candidate.value, *dict(touched)), "scaled")
        if candidate.gate is not None:
            sigmoid = by_name[candidate.gate].producer()
            assert sigmoid is not None
            sizes = (1, -1, *(1,) * (len(shape(conv) or ()) - 2))
            factor = new_weight(model.graph, f"{candidate.conv}_factor", scale.reshape(sizes))
            set_quant(factor, QuantParams(DType.int8, (float(scale.max()) / STEPS,), (0,)))
            name = f"{candidate.conv}_gate"
            while name in by_name or name in model.graph.initializers:
                name += "_"
            gate = ir.node("Mul", [conv, factor], name=name)
            gate.outputs[0].name = name
            gate.outputs[0].shape, gate.outputs[0].type = conv.shape, conv.type
            model.graph.insert_before(sigmoid, gate)
            sigmoid.replace_input_with(0, gate.outputs[0])
            changed[name] = "gate"
    return model, changed


def _activation(conv: ir.Value) -> tuple[ir.Value, ir.Node | None]:
    """(the value behind the activation of a convolution, its Sigmoid node if it is a SiLU)."""
    user = only_user(conv)
    if user is not None and user.op_type in ("Relu", "LeakyRelu"):
        return user.outputs[0], None
    users = [node for node, _ in conv.uses()]
    if conv.is_graph_output():
        return conv, None
    if len(users) == 2 and {n.op_type for n in users} == {"Sigmoid", "Mul"}:
        sigmoid, mul = sorted(users, key=lambda n: n.op_type, reverse=True)
        if only_user(sigmoid.outputs[0]) is mul:
            return mul.outputs[0], sigmoid
    return conv, None


def _absorb(value: ir.Value, scale: np.ndarray, *, apply: bool) -> dict[str, None] | bool:
    """Multiply channels of `value` back in every reader. Empty or False: some reader cannot; else the values between."""
    touched: dict[str, None] = {str(value.name): None}
    for node, index in value.uses():
        op = node.op_type
        if op == "Conv" and index == 0 and constant(node.inputs[1]) is not None:
            if apply:
                _scale_input(node, scale)
        elif op in HOMOGENEOUS and index == 0:
            inner = _absorb(node.outputs[0], scale, apply=apply)
            if not inner or node.outputs[0].is_graph_output():
                return False
            touched |= dict.fromkeys(inner) if isinstance(inner, dict) else {}
        elif op == "Concat" and integer(node, "axis", 1) == 1 and not node.outputs[0].is_graph_output():
            parts = []
            for i, other in enumerate(node.inputs):
                sizes = shape(other)
                if sizes is None or (other is value and i != index):
                    return False
                parts.append(scale if i == index else np.ones(sizes[1], np.float32))
            inner = _absorb(node.outputs[0], np.concatenate(parts), apply=apply)
            if not inner:
                return False
            touched |= dict.fromkeys(inner) if isinstance(inner, dict) else {}
        else:
            return False
    return touched


def _scale_input(node: ir.Node, scale: np.ndarray) -> None:
    """Multiply what a Conv reads of each input channel."""
    numbers = constant(node.inputs[1])
    assert numbers is not None
    groups = integer(node, "group", 1)
    outputs, per_group = numbers.shape[:2]
    # output channel o of group g reads input channels g * per_group ...
    rows = scale.reshape(groups, per_group)[np.arange(outputs) // (outputs // groups)]
    _replace(node, 1, numbers * rows.reshape(outputs, per_group, *(1,) * (numbers.ndim - 2)))


def _scale_weight(node: ir.Node, index: int, scale: np.ndarray, axis: int) -> None:
    numbers = constant(node.inputs[index])
    assert numbers is not None
    _replace(node, index, numbers * scale.reshape([-1 if i == axis else 1 for i in range(numbers.ndim)]))


def _replace(node: ir.Node, index: int, numbers: np.ndarray) -> None:
    old = node.inputs[index]
    assert old is not None and node.graph is not None
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    new = new_weight(graph, str(old.name), np.asarray(numbers, np.float32))
    node.replace_input_with(index, new)
    if not old.uses() and not old.is_graph_output():
        name = str(old.name)
        del graph.initializers[name]


def gated_range(stats: TensorStats, scale: np.ndarray, scaled: TensorStats) -> tuple[float, float]:
    """(low, high) for what a convolution in front of a gated SiLU writes, divided by `scale`.

    stats: before, scaled: after the division. Below -GATE the SiLU of a channel is nothing, so each channel
    needs no more than that on its low side.
    """
    reach = np.minimum(np.maximum(-stats.channel_low, 0), GATE) / scale
    return -float(reach.max()), float(np.maximum(scaled.channel_high, 0).max())


def factors_of(model: ir.Model) -> Mapping[str, np.ndarray]:
    """The constants in front of Sigmoids that `equalize` put into `model`, by the name of the value they scale."""
    found = {}
    for node in model.graph:
        user = only_user(node.outputs[0]) if node.op_type == "Mul" else None
        if user is not None and user.op_type == "Sigmoid" and quant(node.inputs[1]) is not None:
            numbers = constant(node.inputs[1])
            assert numbers is not None and node.inputs[0] is not None, "as `equalize` made it"
            found[str(node.inputs[0].name)] = numbers.reshape(-1)
    return found
