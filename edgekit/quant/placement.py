"""Where a network computes in integers: from statistics and a library's rules to annotated values.

`place` decides, node by node, by `rules` (what the library can run) and `choices` (what a search wants); the
result is a copy of the model whose values carry `QuantParams` (quant/annotate.py) and nothing else new.

What goes round has one scale: a state's input and its next value carry the same params, or none, whatever is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from edgekit.errors import CalibrationError, UsageError, did_you_mean
from edgekit.passes.graph import constant, infer, only_user
from edgekit.passes.states import states
from edgekit.quant.activations import beginning, bounds, stage
from edgekit.quant.annotate import node_id, quant, set_quant
from edgekit.quant.ranges import activation_range, params
from edgekit.quant.residual import skip_inputs
from edgekit.quant.rules import WEIGHTED, Rules, bias, data_inputs, refusal, weight, weight_axis
from edgekit.quant.stats import TensorStats
from edgekit.quant.weights import exact_in_float16, rounded, weight_params
from edgekit.spec import DType, QuantParams

Range = tuple[float, float]


@dataclass(frozen=True)
class Choices:
    """What a search decides. Hashable, and JSON: a cache key.

    scheme: how ranges of activations are found (a name of quant/ranges.py). schemes: (value name, scheme)
    where another one is wanted. ranges: (value name, (low, high)) where the range is given; with values that
    share one scale, given ranges of any of them decide for all. float_nodes: `node_id` of nodes that stay
    float. own_scales: `node_id` of Concats whose inputs keep scales of their own, where the rules allow it.
    weights: scheme of quant/weights.py.
    """

    scheme: str = "mse"
    schemes: tuple[tuple[str, str], ...] = ()
    ranges: tuple[tuple[str, Range], ...] = ()
    float_nodes: frozenset[str] = frozenset()
    own_scales: frozenset[str] = frozenset()
    weights: str = "mse"
    curves: bool = False
    """What a weighted operator sums up is not rounded before the activation behind it, where the rules know how."""

    def to_json(self) -> dict[str, Any]:
        """JSON values, the same for equal choices."""
        return {
            "scheme": self.scheme,
            "schemes": [list(s) for s in sorted(self.schemes)],
            "ranges": [[name, list(bounds)] for name, bounds in sorted(self.ranges)],
            "float_nodes": sorted(self.float_nodes),
            "own_scales": sorted(self.own_scales),
            "weights": self.weights,
            **({"curves": True} if self.curves else {}),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Choices:
        """What `to_json` wrote."""
        return Choices(
            scheme=data["scheme"],
            schemes=tuple((name, scheme) for name, scheme in data["schemes"]),
            ranges=tuple((name, (low, high)) for name, (low, high) in data["ranges"]),
            float_nodes=frozenset(data["float_nodes"]),
            own_scales=frozenset(data["own_scales"]),
            weights=data["weights"],
            curves=bool(data.get("curves", False)),
        )


def place(
    model: ir.Model, stats: Mapping[str, TensorStats], rules: Rules, choices: Choices | None = None
) -> ir.Model:
    """An annotated copy of `model`. `stats` by value name, of every float value of this very graph.

    A weight initialiser that carries params already keeps them (a repair chose its codes).
    Raises: UsageError for a choice that names nothing; CalibrationError for a value without statistics.
    """
    choices = choices or Choices()
    model = prepared(model)
    graph = model.graph
    _check(graph, choices)
    pairs = _pairs(model)
    plan = (
        _full(graph, stats, rules, choices, pairs)
        if rules.outputs
        else _inputs_only(graph, rules, choices, pairs)
    )
    pictures = set(graph.inputs) - {before for before, _ in pairs}
    _annotate(plan, stats, rules, choices, pictures)
    if rules.joins:
        _bare(model, plan, rules, choices, {after for _, after in pairs})
    for node in plan.integer:
        if node.op_type in WEIGHTED:
            _annotate_weight(node, rules, choices)
    return model


def prepared(model: ir.Model) -> ir.Model:
    """A copy with constants as initialisers and every shape and type known; annotations stay."""
    model = model.clone()
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    infer(model)
    return model


def _bare(model: ir.Model, plan: _Plan, rules: Rules, choices: Choices, later: set[ir.Value]) -> None:
    """Values that `rules.joins` and `choices.curves` leave unrounded."""
    state = later | {before for before, _ in _pairs(model)}
    for node in plan.integer:
        behind = written(node, rules)
        for value in inside(node):
            set_quant(value, None)
        if node.op_type not in rules.weighted:
            continue
        result = node.outputs[0]
        if result not in state and not any(user in plan.integer for user, _ in result.uses()):
            set_quant(result, None)  # real numbers straight from its sums
        elif choices.curves and rules.curves and behind is not result and quant(behind) is not None:
            set_quant(result, None)


def inside(node: ir.Node) -> list[ir.Value]:
    """Values between the nodes of the activation that begins with `node`."""
    found = beginning(node)
    return [] if found is None else [v for n in found.nodes[:-1] for v in n.outputs]


def written(node: ir.Node, rules: Rules) -> ir.Value:
    """The value behind the activation that `rules.curves` lets a weighted operator compute, else its own result."""
    result = node.outputs[0]
    found = stage(result) if rules.curves and node.op_type in rules.weighted else None
    return result if found is None else found.result


Pairs = tuple[tuple[ir.Value, ir.Value], ...]


def _pairs(model: ir.Model) -> Pairs:
    """(input, next value) of every state."""
    inputs, outputs = ({str(v.name): v for v in side} for side in (model.graph.inputs, model.graph.outputs))
    return tuple((inputs[s.input], outputs[s.output]) for s in states(model))


def absorber(node: ir.Node, rules: Rules) -> ir.Node | None:
    """The activation behind `node` that its output range can take in, None if there is none."""
    if node.op_type not in rules.absorbing or len(node.outputs) != 1:
        return None
    user = only_user(node.outputs[0])
    if user is None or user.op_type not in rules.absorbed:
        return None
    bounds = _bounds(user)
    if bounds is None or (user.op_type == "Clip" and rules.clips is not None and bounds not in rules.clips):
        return None
    return user


def saturates(node: ir.Node, params: QuantParams) -> bool:
    """Whether the codes of `params` end where the activation `node` does, so that rounding does its work."""
    limits = _bounds(node)
    if limits is None:
        return False
    ends = [np.clip(np.rint(limit / params.scale[0]) + params.zero_point[0], -128, 127) for limit in limits]
    return ends == [-128, 127]


def _bounds(node: ir.Node) -> Range | None:
    """(low, high) of a Relu or a Clip with constant bounds around 0."""
    low, high = bounds(node)
    return None if low is None or high is None or not low <= 0 < high else (low, high)


@dataclass
class _Plan:
    """Integer nodes, and the values to annotate in groups of one scale each."""

    integer: dict[ir.Node, None] = field(default_factory=dict)
    parent: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def add(self, *values: ir.Value) -> None:
        for value in values:
            self.parent.setdefault(value, value)

    def root(self, value: ir.Value) -> ir.Value:
        while self.parent[value] is not value:
            value = self.parent[value]
        return value

    def unite(self, values: Iterable[ir.Value]) -> None:
        first, *others = values
        self.add(first, *others)
        for other in others:
            self.parent[self.root(other)] = self.root(first)

    def close(self, pairs: Pairs) -> bool:
        """One scale for both sides of every state that has one on either side. Whether a value was added."""
        known = len(self.parent)
        for pair in pairs:
            if any(value in self.parent for value in pair):
                self.unite(pair)
        return len(self.parent) > known

    def groups(self) -> list[list[ir.Value]]:
        found: dict[ir.Value, list[ir.Value]] = {}
        for value in self.parent:
            found.setdefault(self.root(value), []).append(value)
        return list(found.values())


def _full(
    graph: ir.Graph, stats: Mapping[str, TensorStats], rules: Rules, choices: Choices, pairs: Pairs
) -> _Plan:
    """Everything between weighted integer nodes; a float node's surroundings stay float where they can."""
    allowed = [n for n in graph if not refusal(n, rules) and node_id(n) not in choices.float_nodes]
    alone = rules.weighted | rules.pointwise | rules.copies
    later = {after: before for before, after in pairs}
    integer = {n: None for n in allowed if n.op_type in alone}
    free = {n for n in allowed if n.op_type in rules.absorbed}
    while True:
        taken = {n: a for n in integer if (a := absorber(n, rules)) is not None and a in free}
        gone = set(taken.values())
        writers = {
            **{v: n for n in integer for v in n.outputs},
            **{a.outputs[0]: n for n, a in taken.items()},
        }
        inner = {n.outputs[0] for n in taken}
        origins = _origins(graph, integer)
        dropped = [
            n
            for n in integer
            if n.op_type not in rules.weighted
            and n not in gone
            and not (_fed(n, writers, inner, origins, rules) and _read(n, taken.get(n), integer, later))
        ]
        if not dropped:
            break
        for node in dropped:
            del integer[node]
    fixed: set[ir.Value] = set()
    while True:
        plan = _Plan()
        for node in integer:
            plan.integer[node] = None
            if node in gone:
                continue
            outputs = node.outputs if node not in taken else taken[node].outputs
            plan.add(*data_inputs(node), *(v for v in outputs if v.uses() or v.is_graph_output()))
            if node.op_type in rules.fixed:
                fixed.update(node.outputs)
            if node.op_type in rules.copies:
                _share(node, plan, fixed, rules, choices)
        plan.close(pairs)
        late = {before for before, after in pairs if after in fixed} | _squeezing(plan, stats, rules, choices)
        if late <= fixed:  # else a Concat further up must know that these stand aside
            return plan
        fixed |= late


def _squeezing(
    plan: _Plan, stats: Mapping[str, TensorStats], rules: Rules, choices: Choices
) -> set[ir.Value]:
    """Results of activations whose codes must end where the activation does, sharing a scale with values that
    reach further: those would be cut off."""
    found: set[ir.Value] = set()
    given = {name for name, _ in choices.ranges}
    for group in plan.groups():
        bounds = {
            v: limits
            for v in group
            if (node := v.producer()) is not None
            and node.op_type in rules.absorbed
            and (limits := _bounds(node)) is not None
        }
        seen = [stats[str(v.name)] for v in group if str(v.name) in stats]
        if not bounds or not seen or any(str(v.name) in given for v in group):
            continue
        low, high = min(s.low for s in seen), max(s.high for s in seen)
        code = (high - low) / 255
        found |= {v for v, (least, most) in bounds.items() if low < least - code or high > most + code}
    return found


def _origins(graph: ir.Graph, integer: Mapping[ir.Node, None]) -> dict[ir.Value, bool]:
    """Whether a value comes from a weighted integer node or the network's input, other operators aside."""
    found: dict[ir.Value, bool] = dict.fromkeys(graph.inputs, True)
    for node in graph:
        if node.op_type in WEIGHTED:
            known = node in integer
        else:
            known = any(found.get(v, False) for v in node.inputs if v is not None)
        found.update(dict.fromkeys(node.outputs, known))
    return found


def _fed(
    node: ir.Node,
    writers: Mapping[ir.Value, ir.Node],
    inner: set[ir.Value],
    origins: Mapping[ir.Value, bool],
    rules: Rules,
) -> bool:
    """Its inputs are codes already, or, for one that only moves them, come from some."""
    sources = data_inputs(node)
    if node.op_type in rules.copies:
        return any(origins.get(v, False) for v in sources)
    computed = [v for v in sources if constant(v) is None]
    return bool(computed) and all(v in writers and v not in inner for v in computed)


def _read(
    node: ir.Node,
    taken: ir.Node | None,
    integer: Mapping[ir.Node, None],
    later: Mapping[ir.Value, ir.Value],
) -> bool:
    """Some integer node reads its result, in this frame or, of a state, in the next: else there is no reason for codes."""
    results = (taken or node).outputs
    return any(
        user in integer
        for v in (*results, *(later[v] for v in results if v in later))
        for user, _ in v.uses()
    )


def _inputs_only(graph: ir.Graph, rules: Rules, choices: Choices, pairs: Pairs) -> _Plan:
    """Inputs of weighted nodes, skip inputs, states read there, and what shares a scale with them."""
    plan = _Plan()
    for node in graph:
        if (
            node.op_type in rules.weighted
            and not refusal(node, rules)
            and node_id(node) not in choices.float_nodes
        ):
            plan.integer[node] = None
            plan.add(*data_inputs(node))
    if rules.residual:
        plan.add(*skip_inputs(graph, plan.integer).values())
    while True:
        for node in reversed(list(graph)):
            if node.op_type in rules.copies and not refusal(node, rules):
                if node_id(node) in choices.float_nodes or node_id(node) in choices.own_scales:
                    continue
                if any(v in plan.parent for v in node.outputs):
                    plan.integer[node] = None
                    plan.unite([*data_inputs(node), *(v for v in node.outputs if v in plan.parent)])
        if not plan.close(pairs):
            return plan


def _share(node: ir.Node, plan: _Plan, fixed: set[ir.Value], rules: Rules, choices: Choices) -> None:
    """One scale for both sides of an operator that moves codes; a fixed one wins, or stands aside of a Concat."""
    sides = [v for v in (*data_inputs(node), *node.outputs) if v in plan.parent]
    if node.op_type in rules.rescales:
        sides = [v for v in sides if v not in fixed]
        if node_id(node) in choices.own_scales:
            return
    elif any(v in fixed for v in sides):
        fixed.update(sides)
    if len(sides) > 1:
        plan.unite(sides)


def _annotate(
    plan: _Plan, stats: Mapping[str, TensorStats], rules: Rules, choices: Choices, pictures: set[ir.Value]
) -> None:
    for group in plan.groups():
        found = _fixed(group, rules) or _params(_range(group, stats, rules, choices, pictures), rules)
        for value in group:
            set_quant(value, found)


def _fixed(group: list[ir.Value], rules: Rules) -> QuantParams | None:
    if len(group) == 1 and constant(group[0]) is not None:  # whoever made the constant knows its codes
        return quant(group[0])
    for value in group:
        producer = value.producer()
        if producer is not None and producer.op_type in rules.fixed:
            scale, zero = rules.fixed[producer.op_type]
            return QuantParams(DType.int8, (scale,), (zero,))
    return None


def _range(
    group: list[ir.Value],
    stats: Mapping[str, TensorStats],
    rules: Rules,
    choices: Choices,
    pictures: set[ir.Value],
) -> Range:
    """The union of what the values of a group need; given ranges alone decide where there are any."""
    given = dict(choices.ranges)
    found = [given[str(v.name)] for v in group if str(v.name) in given]
    if not found:
        schemes = dict(choices.schemes)
        found = [_seen(v, stats, rules, choices, schemes, pictures) for v in group]
    low, high = min(low for low, _ in found), max(high for _, high in found)
    for value in group:
        producer = value.producer()
        if producer is not None and producer.op_type in rules.absorbed and (limits := _bounds(producer)):
            low, high = max(low, limits[0]), min(high, limits[1])  # or the codes could not do its work
    return low, high


def _seen(
    value: ir.Value,
    stats: Mapping[str, TensorStats],
    rules: Rules,
    choices: Choices,
    schemes: Mapping[str, str],
    pictures: set[ir.Value],
) -> Range:
    name = str(value.name)
    numbers = constant(value)
    if numbers is not None:
        return float(numbers.min()), float(numbers.max())
    if name not in stats:
        raise CalibrationError(
            f"value {name}: has no statistics, expected them for every value of the network. "
            "Calibrate the graph that is quantized"
        )
    # pictures have 256 levels: the whole range keeps them exact
    scheme = schemes.get(name, "minmax" if value in pictures else choices.scheme)
    return activation_range(stats[name], scheme, rules.symmetric)


def _params(bounds: Range, rules: Rules) -> QuantParams:
    found = params(*bounds, rules.symmetric)
    if rules.float16_scales:
        found = replace(found, scale=(float(exact_in_float16(np.asarray(found.scale[0]))),))
    return found


def _annotate_weight(node: ir.Node, rules: Rules, choices: Choices) -> None:
    value = weight(node)
    assert value is not None and value.const_value is not None
    if quant(value) is not None:
        return
    axis = weight_axis(node)
    numbers = value.const_value.numpy()
    chosen = weight_params(
        numbers,
        axis,
        choices.weights,
        limit=rules.weight_limit,
        least=_least(value, numbers.shape[axis], rules),
        float16_scales=rules.float16_scales,
    )
    set_quant(value, chosen)
    if rules.weight_limit < 127:  # params do not say how far the codes reach, the weights themselves do
        value.const_value = ir.tensor(rounded(numbers, chosen, rules.weight_limit), name=value.name)


def _least(value: ir.Value, channels: int, rules: Rules) -> np.ndarray | None:
    """Smallest weight scales at which the int32 biases of all users do not overflow."""
    least = np.zeros(channels)
    for user, _ in value.uses():
        offset, source = bias(user), quant(user.inputs[0])
        if not rules.int32_bias or offset is None or source is None:
            continue
        numbers = np.abs(offset.const_value.numpy().reshape(-1))  # type: ignore[union-attr]
        if numbers.size == channels:
            least = np.maximum(least, numbers.astype(np.float64) / source.scale[0] / 2.0**30)
    return least


def _check(graph: ir.Graph, choices: Choices) -> None:
    nodes = {node_id(n) for n in graph}
    values = {str(v.name) for n in graph for v in n.outputs} | {str(v.name) for v in graph.inputs}
    for what, given, known in (
        ("node", choices.float_nodes | choices.own_scales, nodes),
        ("value", {n for n, _ in (*choices.schemes, *choices.ranges)}, values),
    ):
        for name in sorted(given - known):
            raise UsageError(f"choice for {what} {name!r}: not in this network. {did_you_mean(name, known)}")
