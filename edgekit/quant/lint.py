"""States, node by node, what of an annotated network runs in integers on its target, and why the rest does not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from edgekit.passes.graph_facts import macs
from edgekit.quant.activations import beginning, stage
from edgekit.quant.annotate import node_id, quant
from edgekit.quant.placement import absorber, prepared, saturates, written
from edgekit.quant.rules import WEIGHTED, Rules, data_inputs, refusal, weight


@dataclass(frozen=True)
class NodeReport:
    """One node: `id` as `annotate.node_id`, `reason` a sentence where it does not run in integers, `macs`
    multiply-accumulates (weighted operators only)."""

    id: str
    op: str
    integer: bool
    reason: str
    macs: int


def lint(model: ir.Model, rules: Rules) -> list[NodeReport]:
    """A report per node of the annotated `model`, in graph order."""
    model = prepared(model)
    taken: dict[ir.Node, bool] = {}
    reports = []
    for node in model.graph:
        cost = macs(node) if node.op_type in WEIGHTED else 0
        if node in taken:
            reason = "" if taken[node] else "what feeds it runs in float"
        else:
            activation = absorber(node, rules)
            if activation is not None and not _takes_in(node, activation):
                activation = None
            reason = refusal(node, rules) or _missing(node, activation, rules)
            if activation is not None:
                taken[activation] = not reason
            elif rules.joins and not reason:
                taken.update(dict.fromkeys(_joined(node, rules), True))
        if node.op_type in rules.absorbed - rules.pointwise and node not in taken:
            reason = f"it stands alone: {rules.name} runs {node.op_type} in integers only behind an integer operator"
        reports.append(NodeReport(node_id(node), node.op_type, not reason, reason, cost))
    return reports


def _takes_in(node: ir.Node, activation: ir.Node) -> bool:
    params = quant(activation.outputs[0])
    return params is not None and quant(node.outputs[0]) is None and saturates(activation, params)


def _of_joined(node: ir.Node, outputs: list[ir.Value], rules: Rules) -> list[ir.Value]:
    """The values that must be codes for `node` to run in integers, of what it writes."""
    if node.op_type not in rules.weighted:
        found = beginning(node)
        return outputs if found is None else [found.result]
    result = node.outputs[0]
    if quant(result) is None and quant(written(node, rules)) is None:
        return []  # it writes real numbers
    return [result if quant(result) is not None else written(node, rules)]


def _joined(node: ir.Node, rules: Rules) -> tuple[ir.Node, ...]:
    """The nodes of an activation that run as one with `node`."""
    if node.op_type in rules.weighted:
        found = stage(node.outputs[0]) if quant(node.outputs[0]) is None else None
    else:
        found = beginning(node)
    return () if found is None else tuple(n for n in found.nodes if n is not node)


def integer_share(reports: Iterable[NodeReport]) -> float:
    """The share of multiply-accumulates that run in integers, 0 for a network without any."""
    reports = list(reports)
    total = math.fsum(r.macs for r in reports)
    return math.fsum(r.macs for r in reports if r.integer) / total if total else 0.0


def _missing(node: ir.Node, activation: ir.Node | None, rules: Rules) -> str:
    """What its values lack for an integer kernel."""
    sources = data_inputs(node)
    bare = [str(v.name) for v in sources if quant(v) is None]
    if node.op_type in WEIGHTED and quant(weight(node)) is None:
        return "the plan leaves it in float: its weight is not quantized"
    outputs = [v for v in (activation or node).outputs if v.uses() or v.is_graph_output()]
    if rules.joins and activation is None:
        outputs = _of_joined(node, outputs, rules)
    if (
        node.op_type not in WEIGHTED
        and not any(quant(v) for v in outputs)
        and not any(v.uses() for v in outputs)
    ):
        return "nothing behind it computes in integers"
    if bare:
        return f"its input {bare[0]} is not quantized"
    if rules.outputs or node.op_type not in WEIGHTED:
        bare = [str(v.name) for v in outputs if quant(v) is None]
        if bare:
            return f"its output {bare[0]} is not quantized"
    if (
        node.op_type in rules.copies
        and node.op_type not in rules.rescales
        and len({quant(v) for v in (*sources, *outputs)}) > 1
    ):
        return "the scales of its input and output differ"
    if rules.symmetric and any(set(q.zero_point) != {0} for v in sources if (q := quant(v)) is not None):
        return "its input has a zero point other than 0"
    return ""
