"""From a calibrated float network to a quantized one inside its accuracy budget: one search for every library.

Everything that costs no time on the device comes first: range schemes, ranges that know their SiLU,
equalization, repairs. Each is tried and kept only where it lowers the error of the network's outputs on
calibration pictures; labels are not looked at. States count by what they do to the other outputs. What is
noisy still gets a few of its worst values back in float, by
the same measure, where few products are lost to it. Then the gate, which runs the real payload and knows the task's
metric, is asked. If it refuses, the values whose rounding does the most damage go back to float, twice as
many each time, until it passes. So the metric is looked at a handful of times, along a path that was ordered
without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import constant
from edgekit.passes.states import answers
from edgekit.quant import repair, simulate
from edgekit.quant.annotate import node_id, quant, set_quant
from edgekit.quant.equalize import GATE, Candidate, candidates, equalize, factors_of, gated_range
from edgekit.quant.lint import integer_share, lint
from edgekit.quant.placement import Choices, place
from edgekit.quant.repair import clip_search, split_channels
from edgekit.quant.rules import Rules, weight
from edgekit.quant.sensitivity import Probe, output_error
from edgekit.quant.silu_range import silu_ranges
from edgekit.quant.simulate import Feed
from edgekit.quant.stats import Stats, TensorStats
from edgekit.quant.weights import codes

Progress = Callable[[str, int, int], None]
"""progress(what, done, of)"""

SCHEMES = ("mse", "percentile:99.99", "minmax")
"""Tried in this order; a later one replaces an earlier one only if it is clearly better."""
CLEARLY = 0.03
"""A step is kept if it lowers the error by this share or more: less is noise of a few pictures."""
IMBALANCED = 2.0
"""Tensors less imbalanced than this gain nothing from equalization."""
LOOKED_AT, TRIED = 12, 4
"""Tensors whose own error is measured for equalization, and how many of them are tried."""
HARMFUL = 0.03
"""Share of the whole error that a tensor must cause to be worth equalizing."""
PROBED = 48
"""Values whose own error is measured before some go back to float."""
CLIPPED = 8
"""Values whose ranges are chosen anew by what their readers make of them, where the budget was missed."""
ISLANDS = (1, 2, 4, 8, 16, 32, 64)
NEXT = 0.25
"""Share of the error that a larger island must take before it is repaired and judged: both take time."""
LEARNED = "weights and scales learned"
"""Name of the step."""
REPAIRS = ("adaround", "bias_correction")
NOISY_REPAIRS = ("compensate", "bias_correction")
"""Where much noise comes in with the inputs of layers, weights are rounded against that too."""
NOISY = 0.04
"""Output error (noise over variance) above which a few values may go back to float unasked: 14 dB."""
LAST = 0.01
"""Share of products, and of weights, up to which the last layer of a classifier may compute in float unasked."""
SMALL, MOSTLY, WORTH = (4, 8), 0.95, 0.3
"""How many values then; the share of products that must stay in integers; the share of the error it must take."""

TABLES = "activations by tables"


@dataclass(frozen=True)
class Look:
    """What the gate found: `passed` None where nothing could be judged; `metric` of the task, its `drop`."""

    passed: bool | None
    metric: float | None = None
    drop: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Trial:
    """One quantized network that was looked at: a point of the Pareto the search saw.

    error: of the outputs (sensitivity.output_error); seconds: on the target, measured or estimated.
    """

    label: str
    error: float
    kept: bool
    seconds: float | None = None
    integer_share: float | None = None
    metric: float | None = None
    drop: float | None = None
    passed: bool | None = None


@dataclass(frozen=True)
class Problem:
    """What to search over. `fit` and `check`: calibration pictures to repair with, and others to measure on.

    restat: statistics of some values of a changed float network. gate: the accuracy budget, on the real
    payload. cost: seconds of an annotated network on its target, None where unknown.
    """

    model: ir.Model
    stats: Stats
    rules: Rules
    fit: Sequence[Feed]
    check: Sequence[Feed]
    restat: Callable[[ir.Model, Collection[str]], Stats]
    gate: Callable[[ir.Model], Look]
    cost: Callable[[ir.Model], float | None] = lambda _: None
    learn: Callable[[Quantized], ir.Model] | None = None
    """A training that goes on from an annotated network: the same places, other weights and scales."""
    learn_first: bool = False
    """Do so whatever the gate says; else only where it refused, before any value goes back to float."""


@dataclass(frozen=True)
class Quantized:
    """The result. model: annotated; exact: the equal float network; ranked: (value, its own error), worst first."""

    model: ir.Model
    exact: ir.Model
    stats: Stats
    choices: Choices
    steps: tuple[str, ...]
    error: float
    trials: tuple[Trial, ...] = ()
    ranked: tuple[tuple[str, float], ...] = ()
    look: Look = field(default_factory=lambda: Look(None))


def plain(problem: Problem, scheme: str) -> Quantized:
    """Everything in integers by one range scheme, nothing repaired: what tools do by default.

    The gate is asked once, and the values to blame are ranked.
    """
    bench = _Bench(problem)
    choices = Choices(scheme=scheme, weights="minmax" if scheme == "minmax" else "mse")
    found = bench.place(problem.model, problem.stats, choices, (f"{scheme} ranges",))
    found = replace(found, look=problem.gate(found.model), ranked=tuple(bench.rank(found)))
    bench.note(found.steps[-1], found, True)
    return replace(found, trials=tuple(bench.trials))


def search(problem: Problem, progress: Progress) -> Quantized:
    """The network to ship; `look.passed` False where even the last resort missed the budget."""
    bench = _Bench(problem)
    best = _last_in_float(bench, _ranges(bench, progress))
    start = _equalized(bench, best, progress)
    best = _repaired(bench, start, _fitting(start), progress)
    if problem.learn is not None and problem.learn_first:
        best = _learned(bench, best, problem.learn)
    elif best.error > NOISY:
        best = _quieter(bench, start, best, progress)
    progress("accuracy of the payload", 0, 1)
    best = replace(best, look=problem.gate(best.model))
    bench.note("what the payload scores", best, True)
    if best.look.passed is False and problem.learn is not None and not problem.learn_first:
        best = _learned(bench, best, problem.learn)
        progress("accuracy of the payload", 0, 1)
        best = replace(best, look=problem.gate(best.model))
        bench.note("after learning", best, best.look.passed is not False)
    if best.look.passed is False:
        best = _costlier(bench, best, progress)
    if best.look.passed is False:
        best = _islands(bench, start, best, progress)
    if best.look.passed and best.choices.curves and LEARNED not in best.steps:
        best = _tabled(bench, best, progress)
    if not best.ranked:
        best = replace(best, ranked=tuple(bench.rank(best, progress)))
    return replace(best, trials=tuple(bench.trials))


def integers(problem: Problem, progress: Progress) -> Quantized:
    """What `search` finds before it gives anything back to float: the start of a training (compression/fake_quant.py)."""
    bench = _Bench(problem)
    start = _equalized(bench, _ranges(bench, progress), progress)
    best = _repaired(bench, start, _fitting(start), progress)
    return replace(best, trials=tuple(bench.trials))


def error_of(problem: Problem, model: ir.Model) -> float:
    """Of the outputs of an annotated network, on the pictures that trials are measured on."""
    bench = _Bench(problem)
    return bench.measured(model, problem.model, problem.stats, Choices(), ()).error


def tighten(problem: Problem, found: Quantized, progress: Progress) -> Quantized:
    """`found` by another gate, one that asks for more than that of its own search: costlier repairs, then values back in
    float, until it passes. As `search`."""
    bench = _Bench(problem)
    progress("accuracy of the payload", 0, 1)
    best = replace(found, look=problem.gate(found.model))
    bench.note("what the payload scores", best, True)
    if best.look.passed is False:
        best = _costlier(bench, best, progress)
    if best.look.passed is False:
        start = bench.place(found.exact, found.stats, found.choices, found.steps)
        best = _islands(bench, start, best, progress)
    return replace(best, trials=(*found.trials, *bench.trials))


def carry(found: Quantized, rules: Rules) -> ir.Model:
    """The network of `found` placed by other rules: the same ranges, weights, repairs and float islands.

    Weights whose codes reach beyond what the rules allow are rounded anew, from the float network.
    """
    model = _unplaced(found.model)
    exact = found.exact.graph.initializers
    for name, value in model.graph.initializers.items():
        params, numbers = quant(value), constant(value)
        if params is None or params.axis is None or numbers is None or name not in exact:
            continue
        if np.abs(codes(numbers, params)).max() > rules.weight_limit:
            set_quant(value, None)
            value.const_value = exact[name].const_value
    return place(model, found.stats, rules, found.choices)


class _Bench:
    """Measures trials and remembers them."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.trials: list[Trial] = []
        self._names = answers(problem.model)
        self._exact = list(simulate.run(problem.model, problem.check))

    def place(self, exact: ir.Model, stats: Stats, choices: Choices, steps: tuple[str, ...]) -> Quantized:
        return self.measured(place(exact, stats, self.problem.rules, choices), exact, stats, choices, steps)

    def measured(
        self, model: ir.Model, exact: ir.Model, stats: Stats, choices: Choices, steps: tuple[str, ...]
    ) -> Quantized:
        int32 = self.problem.rules.int32_bias
        got = simulate.run(simulate.fake_quantized(model, int32_bias=int32), self.problem.check)
        pairs = zip(self._exact, got, strict=True)
        error = float(np.mean([output_error({n: x[n] for n in self._names}, y) for x, y in pairs]))
        return Quantized(model, exact, stats, choices, steps, error)

    def note(self, label: str, found: Quantized, kept: bool) -> None:
        looked = found.look
        self.trials.append(
            Trial(
                label,
                found.error,
                kept,
                self.problem.cost(found.model) if kept else None,
                integer_share(lint(found.model, self.problem.rules)) if kept else None,
                looked.metric,
                looked.drop,
                looked.passed,
            )
        )

    def better(self, best: Quantized, other: Quantized, label: str) -> Quantized:
        kept = other.error < best.error * (1 - CLEARLY)
        self.note(label, other, kept)
        return other if kept else best

    def in_float(
        self, start: Quantized, worst: Sequence[tuple[str, float]], already: Collection[str] = ()
    ) -> tuple[str, Quantized]:
        """`start` with what lies around the `worst` values in float, and `already`; what to call that."""
        nodes = frozenset(_around(start.model, {name for name, _ in worst}, self.problem.rules)) | set(
            already
        )
        choices = replace(start.choices, float_nodes=start.choices.float_nodes | nodes)
        label = f"{len(nodes)} nodes in float around the worst {len(worst)} values"
        return label, self.place(start.exact, start.stats, choices, (*start.steps, label))

    def rank(self, found: Quantized, progress: Progress | None = None) -> list[tuple[str, float]]:
        """Values by the error that their rounding alone causes, of the most suspect ones."""
        probe = Probe(found.model, self.problem.check[:2])
        graph = found.model.graph
        values = {str(v.name): v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
        suspects = sorted(probe.values, key=lambda n: -_suspicion(values.get(n), found.stats.get(n)))[:PROBED]
        return probe.rank(suspects, progress)


def _ranges(bench: _Bench, progress: Progress) -> Quantized:
    p = bench.problem
    best: Quantized | None = None
    for i, scheme in enumerate(SCHEMES):
        progress("try range schemes", i, len(SCHEMES) + 1)
        found = bench.place(p.model, p.stats, Choices(scheme=scheme), (f"{scheme} ranges",))
        if best is None:
            bench.note(f"{scheme} ranges", found, True)
            best = found
        else:
            best = bench.better(best, found, f"{scheme} ranges")
    assert best is not None
    ranges = silu_ranges(p.model, p.stats) if p.rules.outputs else {}
    if ranges:
        progress("try range schemes", len(SCHEMES), len(SCHEMES) + 1)
        choices = replace(best.choices, ranges=tuple(sorted(ranges.items())))
        found = bench.place(p.model, p.stats, choices, (*best.steps, "ranges that know their SiLU"))
        best = bench.better(best, found, "ranges that know their SiLU")
    if p.rules.curves:
        choices = replace(best.choices, curves=True)
        label = "activations straight from sums"
        best = bench.better(best, bench.place(p.model, p.stats, choices, (*best.steps, label)), label)
    return best


def _last_in_float(bench: _Bench, best: Quantized) -> Quantized:
    """The layers that write a classifier's answers in float, where they are next to nothing of the network.

    As codes all classes share the scale that the largest answer needs, which is coarse for those that lie close together.
    """
    answered = answers(best.model)
    weighted = {
        str(v.name): v.const_value.size for v in best.model.graph.initializers.values() if v.const_value
    }
    products = {r.id: r.macs for r in lint(best.model, bench.problem.rules)}
    last = [n for n in best.model.graph if n.op_type in ("Gemm", "MatMul") and n.outputs[0].name in answered]
    weights = [value for n in last if (value := weight(n)) is not None]
    if (
        bench.problem.rules.joins  # the last sums are not rounded
        or not last
        or math.fsum(products[node_id(n)] for n in last) > LAST * math.fsum(products.values())
        or math.fsum(weighted.get(str(v.name), 0) for v in weights) > LAST * math.fsum(weighted.values())
    ):
        return best
    choices = replace(best.choices, float_nodes=best.choices.float_nodes | {node_id(n) for n in last})
    label = "the last layer in float"
    found = bench.place(best.exact, best.stats, choices, (*best.steps, label))
    return bench.better(best, found, label)


def _equalized(bench: _Bench, best: Quantized, progress: Progress) -> Quantized:
    """Equalize the tensors that do the most damage, one after the other, where it helps."""
    p = bench.problem
    known = [c for c in candidates(p.model, p.stats) if c.gain >= IMBALANCED]
    if p.rules.joins:  # a gate with a factor per channel is no function of one number
        known = [c for c in known if c.gate is None]
    known = known[:LOOKED_AT]
    if not known:
        return best
    probe = Probe(best.model, p.check[:2])
    whole = probe.error()
    harms = []
    for i, candidate in enumerate(known):
        progress("look for tensors to equalize", i, len(known))
        names = {candidate.conv, candidate.value} & set(probe.values)
        harms.append((probe.error(names) if names else 0.0, candidate))
    harms = sorted((h for h in harms if h[0] >= HARMFUL * whole), key=lambda h: -h[0])[:TRIED]
    chosen: list[Candidate] = []
    for i, (_, candidate) in enumerate(harms):
        progress("equalize", i, len(harms))
        found = _with_equalized(bench, best, [*chosen, candidate])
        label = f"equalize {describe(p.model, candidate.value)}"
        kept = bench.better(best, found, label)
        if kept is not best:
            chosen.append(candidate)
            best = replace(kept, steps=(*best.steps, label))
    return best


def _with_equalized(bench: _Bench, best: Quantized, chosen: Sequence[Candidate]) -> Quantized:
    p = bench.problem
    exact, changed = equalize(p.model, chosen, p.stats)
    stats = {**p.stats, **p.restat(exact, changed)}
    aware = dict(best.choices.ranges)
    ranges = {name: bounds for name, bounds in aware.items() if name not in changed}
    if aware:
        ranges |= {n: r for n, r in silu_ranges(exact, stats).items() if n not in ranges}
    if p.rules.outputs:
        ranges |= {name: (-GATE, GATE) for name, kind in changed.items() if kind == "gate"}
        for name, scale in factors_of(exact).items():
            ranges[name] = gated_range(p.stats[name], scale, stats[name])
    choices = replace(best.choices, ranges=tuple(sorted(ranges.items())))
    return bench.place(exact, stats, choices, best.steps)


def _fitting(start: Quantized) -> Sequence[str]:
    """The repairs for as much noise as there is."""
    return REPAIRS if start.error <= NOISY else NOISY_REPAIRS


def _repaired(
    bench: _Bench, best: Quantized, names: Sequence[str], progress: Progress, prefix: str = ""
) -> Quantized:
    """`best` with those of the repairs that lower its error. "compensate": adaround against its inputs' error too."""
    for name in names:
        progress(f"repair: {name}", 0, 1)
        run = repair.module("adaround" if name == "compensate" else name).run
        options = {"compensate": True} if name == "compensate" else {}
        model = run(best.model, best.exact, bench.problem.fit, progress=progress, **options)
        label = "adaround, compensating" if options else name
        found = bench.measured(model, best.exact, best.stats, best.choices, (*best.steps, label))
        best = bench.better(best, found, prefix + label)
    return best


def _quieter(bench: _Bench, start: Quantized, best: Quantized, progress: Progress) -> Quantized:
    """A few values in float, and repairs anew, where that takes much of the error and few of the products.

    Labels are not asked: a metric on some hundred pictures would not see what such a network loses on others.
    """
    ranked = bench.rank(start, progress)
    # where activations run as one with their operators, a value seldom takes others along
    for count in (1, *SMALL) if bench.problem.rules.joins else SMALL:
        label, found = bench.in_float(start, ranked[:count])
        if integer_share(lint(found.model, bench.problem.rules)) < MOSTLY:
            break
        kept = found.error < start.error * (1 - WORTH)
        bench.note(label, found, kept)
        if not kept:
            continue
        found = _repaired(bench, found, NOISY_REPAIRS, progress, "with these in float, ")
        if found.error < best.error * (1 - WORTH):
            return found
    return best


def _learned(bench: _Bench, best: Quantized, learn: Callable[[Quantized], ir.Model]) -> Quantized:
    """`best` after a training, where that lowers its error. Its scales become given ranges, for libraries that place anew."""
    model = learn(best)
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    ranges = dict(best.choices.ranges)
    for value in values:
        params = quant(value)
        if params is not None:
            (scale,), (zero,) = params.scale, params.zero_point
            ranges[str(value.name)] = (scale * (-128 - zero), scale * (127 - zero))
    choices = replace(best.choices, ranges=tuple(sorted(ranges.items())))
    found = bench.measured(model, best.exact, best.stats, choices, (*best.steps, LEARNED))
    return bench.better(best, found, LEARNED)


def _costlier(bench: _Bench, best: Quantized, progress: Progress) -> Quantized:
    """Repairs that take longer or seldom help, tried where the budget was missed; the gate is asked once more."""
    p = bench.problem
    start = best
    ranked = bench.rank(best, progress)

    def reader_ranges() -> Quantized:
        worst = [name for name, _ in ranked if name in best.stats][:CLIPPED]
        found = clip_search.search(best.model, best.exact, p.check, best.stats, worst, progress=progress)
        choices = replace(best.choices, ranges=tuple(sorted({**dict(best.choices.ranges), **found}.items())))
        model = place(_unplaced(best.model), best.stats, p.rules, choices)
        return bench.measured(
            model, best.exact, best.stats, choices, (*best.steps, "ranges by their readers")
        )

    def channels_split() -> Quantized:
        splits = split_channels.plan(best.model, best.exact, p.fit)
        model, exact = (split_channels.split(m, splits) for m in (best.model, best.exact))
        return bench.measured(model, exact, best.stats, best.choices, (*best.steps, "split channels"))

    progress("repair: ranges by their readers", 0, 1)
    best = bench.better(best, reader_ranges(), "ranges by their readers")
    progress("repair: split channels", 0, 1)
    best = bench.better(best, channels_split(), "split channels")
    if best is start:
        return replace(best, ranked=tuple(ranked))
    best = replace(best, look=p.gate(best.model), ranked=())
    bench.note("in integers, after more repairs", best, best.look.passed is not False)
    return best


def _islands(bench: _Bench, start: Quantized, best: Quantized, progress: Progress) -> Quantized:
    """Give values back to float, the most damaging first, until the gate passes or no integers are left.

    From `start`, the network before repairs: those make up for roundings that are gone then.
    """
    p = bench.problem
    ranked = bench.rank(best, progress)
    found = replace(best, ranked=tuple(ranked))
    last = best.error
    for count in (n for n in ISLANDS if n // 2 < len(ranked)):
        label, placed = bench.in_float(start, ranked[:count], best.choices.float_nodes)
        if integer_share(lint(placed.model, p.rules)) == 0:
            break  # nothing is left to be called INT8: the last look stands
        if placed.error > last * (1 - NEXT) and count < len(ranked):
            bench.note(label, placed, False)
            continue
        last = placed.error
        found = _repaired(bench, placed, REPAIRS, progress, "with these in float, ")
        progress(f"accuracy with {label}", 0, 1)
        found = replace(found, look=p.gate(found.model), ranked=tuple(ranked))
        bench.note(label, found, found.look.passed is not False)
        if found.look.passed is not False:
            break
    return found


def _tabled(bench: _Bench, best: Quantized, progress: Progress) -> Quantized:
    """The same without `Choices.curves`, repaired anew, where the gate passes that, too: tables are faster than curves.

    Only where the outputs stay quiet: a metric on some hundred pictures would not see all that noise does to others.
    """
    choices = replace(best.choices, curves=False)
    found = bench.place(best.exact, best.stats, choices, (*best.steps, TABLES))
    found = _repaired(bench, found, _fitting(found), progress, "by tables, ")
    if found.error > max(NOISY, best.error):
        bench.note(TABLES, found, False)
        return best
    progress(f"accuracy of {TABLES}", 0, 1)
    found = replace(found, look=bench.problem.gate(found.model))
    bench.note(TABLES, found, bool(found.look.passed))
    return found if found.look.passed else best


def _unplaced(model: ir.Model) -> ir.Model:
    """A copy whose activations carry nothing; weights keep what a repair chose."""
    model = model.clone()
    for value in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]:
        set_quant(value, None)
    return model


def _around(model: ir.Model, values: Collection[str], rules: Rules) -> set[str]:
    """Nodes that must be float for `values` not to be rounded: who reads them and, where outputs are codes, who writes."""
    found = set()
    for node in model.graph:
        if any(v is not None and v.name in values for v in node.inputs):
            found.add(node_id(node))
        if rules.outputs and any(v.name in values for v in node.outputs):
            found.add(node_id(node))
    return found


def _suspicion(value: ir.Value | None, stats: TensorStats | None) -> float:
    """How coarse a value's scale is for its channels: mean square of the ratio to what each alone would need."""
    params = quant(value)
    if stats is None or params is None:
        return 0.0
    span = np.asarray(stats.channel_high - stats.channel_low, np.float64)
    span = span if span.size else np.array([stats.high - stats.low])
    reach = max(float(span.max()), 1e-30)
    ratio = params.scale[0] * 255 / np.maximum(span, reach * 1e-3)
    return float(np.mean(ratio**2))


def describe(model: ir.Model, name: str) -> str:
    """A value for people: its layer's number and kind. `model` needs its node order only."""
    nodes = list(model.graph)
    for i, node in enumerate(nodes, 1):
        if any(o.name == name for o in node.outputs):
            numbers = constant(node.inputs[1]) if len(node.inputs) > 1 else None
            what = node.op_type
            if what == "Mul" and any(
                (p := v.producer()) is not None and p.op_type == "Sigmoid"
                for v in node.inputs
                if v is not None
            ):
                what = "SiLU"
            if what == "Conv" and numbers is not None and numbers.ndim == 4:
                outputs, inputs, height, width = numbers.shape
                what = f"Conv {height}x{width} {inputs}>{outputs}"
            return f"{name} (node {i} of {len(nodes)}, {what})"
    return f"{name} (network input)" if any(v.name == name for v in model.graph.inputs) else name


def blame(found: Quantized, count: int = 3) -> str:
    """The values to blame, for one line of an error."""
    total = math.fsum(error for _, error in found.ranked) or 1.0
    worst = [
        f"{describe(found.exact, name)} {error / total:.0%}"
        for name, error in found.ranked[:count]
        if error > 0
    ]
    return "most of the error comes from " + ", ".join(worst) if worst else "no single value stands out"


def summary(trials: Sequence[Trial]) -> list[Mapping[str, Any]]:
    """The trials as JSON rows, for evidence."""
    return [{k: v for k, v in vars(t).items() if v is not None} for t in trials]
