"""INT8 of one build: calibrate once, search per library, and say what was done.

Libraries that want the same rules share one search (LiteRT for every board); the others of a target take over
its result (ranges, repairs, float islands) and only place and lower anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from edgekit.backends.base import Payload, half
from edgekit.errors import LoweringError, UsageError
from edgekit.passes.states import picture
from edgekit.project import SEARCHES, ModelEntry
from edgekit.quant import search, simulate
from edgekit.quant.annotate import node_id, quant
from edgekit.quant.calibrate import calibrate
from edgekit.quant.likeness import COMPARED, warnings
from edgekit.quant.lint import NodeReport, integer_share, lint
from edgekit.quant.placement import place
from edgekit.quant.rules import PREFERENCE, WEIGHTED, Rules, rules_for
from edgekit.quant.search import Look, Problem, Quantized
from edgekit.quant.stats import Stats
from edgekit.spec import StateSpec
from edgekit.target import Target
from edgekit.tasks import Spec
from edgekit.toolchain.clips import StateFeeds, calibration_clips, evaluation_clips
from edgekit.toolchain.data import Feeds, calibration_feeds, evaluation_feeds
from edgekit.toolchain.estimate import annotated, estimate
from edgekit.toolchain.lowering import lowered
from edgekit.toolchain.tasks import half as half_of_task

Progress = Callable[[str, int, int], None]
Gate = Callable[[Payload], Look]
Lower = Callable[[ir.Model, str, Target, str], Payload]
"""(network, backend, target, precision) -> its payload: toolchain.lowering."""

FIT, CHECK, RESTAT = 12, 6, 33
"""Pictures that repairs learn from, that trials are measured on, and that changed values are calibrated on anew."""
LAYER_PICTURES = 2


class FeedSet(Protocol):
    """What a network is calibrated on, one dict of its inputs at a time; may be gone through again. digest: of the
    feeds. provenance: for the evidence."""

    @property
    def digest(self) -> str: ...
    @property
    def provenance(self) -> dict[str, Any]: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...
    def spread(self, count: int, skip: Collection[int] = ()) -> list[int]:
        """At most `count` positions, evenly spaced over those not in `skip`."""
        ...

    def first(self, count: int) -> FeedSet:
        """Of `count`, evenly spaced."""
        ...

    def pick(self, which: Collection[int]) -> dict[int, dict[str, np.ndarray]]:
        """The feeds at these positions."""
        ...


@dataclass(frozen=True)
class Calibrated:
    """A prepared network and what its calibration pictures showed."""

    model: ir.Model
    stats: Stats
    feeds: FeedSet
    warnings: tuple[str, ...]

    def restat(self, model: ir.Model, names: Collection[str]) -> Stats:
        """Statistics of some values of a changed float network, of fewer pictures."""
        feeds = self.feeds.first(RESTAT)
        return calibrate(model, lambda: iter(feeds), only=set(names), cache_key=feeds.digest)

    def split(self) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
        """(FIT pictures to repair with, CHECK others to measure on), each spread over the set; the same where
        there are too few for both."""
        check = set(self.feeds.spread(CHECK))
        fit = set(self.feeds.spread(FIT, check) or self.feeds.spread(FIT))
        chosen = self.feeds.pick(fit | check)
        return [chosen[i] for i in sorted(fit)], [chosen[i] for i in sorted(check)]


@dataclass(frozen=True)
class Int8:
    """What goes into a bundle: payloads, the preferred library's first, and the record for its evidence."""

    payloads: tuple[Payload, ...]
    record: dict[str, Any]
    blame: str
    """The values to blame if the budget is missed, for one line."""
    models: tuple[ir.Model, ...] = ()
    """The placed graph of each payload."""


def calibrated(
    entry: ModelEntry, spec: Spec, model: ir.Model, states: Sequence[StateSpec], progress: Progress
) -> Calibrated:
    """Calibrate `model` on the entry's pictures; one with `states` on clips, carrying them as floats.

    Raises: CalibrationError, UsageError (see calibration_feeds).
    """
    name = str(picture(model).name)
    feeds: Feeds | StateFeeds
    judged: Feeds | StateFeeds | None
    if half_of_task(spec.task).CLIPS:
        feeds = calibration_clips(entry, spec, model, states, input_name=name, progress=progress)
        judged = evaluation_clips(entry, spec, model, states, input_name=name, progress=progress)
    else:
        feeds = calibration_feeds(entry, spec, input_name=name, progress=progress)
        judged = evaluation_feeds(entry, spec, COMPARED, input_name=name, progress=progress)
    stats = calibrate(model, lambda: iter(feeds), progress=progress, cache_key=feeds.digest)
    return Calibrated(model, stats, feeds, tuple(warnings(model, stats, judged)))


def quantize(
    known: Calibrated,
    target: Target,
    backends: Sequence[str],
    gate: Gate,
    scheme: str,
    shared: dict[str, Quantized],
    progress: Progress,
    *,
    tighten: bool = False,
    qat_steps: int = 300,
    spec: Spec | None = None,
    make: Lower = lowered,
) -> Int8:
    """Search by the rules of the preferred backend, and lower for all of them.

    shared: results of this build so far, by the rules' repr; added to. scheme: one of project.QUANTIZATIONS.
    tighten: go on from the result that is there, by this `gate` (search.tighten). qat_steps: batches of a training; spec: of
    the task, which says what a training shall imitate. make: how payloads are made (toolchain.lowering).
    Raises: LoweringError when no backend can take the network; MissingExtraError for training without torch.
    """
    order = sorted(backends, key=PREFERENCE.index)
    problems: dict[str, str] = {}
    while len(order) > 1 and (why := _refused(known, target, order[0])):
        problems[order.pop(0)] = why
    first = order[0]
    rules = rules_for(first, target)
    looks: list[int] = []

    def judged(model: ir.Model) -> Look:
        looks.append(1)
        return gate(make(model, first, target, "int8"))

    def seconds(model: ir.Model) -> float | None:
        try:
            return estimate(model, target, annotated(model), backend=first).total_s
        except UsageError:  # a board whose facts do not allow it, such as the host: it is timed at the end
            return None

    learn = None
    if scheme in ("qat", "search+qat"):
        from edgekit.toolchain import learn as training

        learn = training.trainer(known, rules, qat_steps, spec, progress)
    found = shared.get(repr(rules))
    if found is None or tighten:
        problem = Problem(
            known.model,
            known.stats,
            rules,
            *known.split(),
            known.restat,
            judged,
            seconds,
            learn,
            learn_first=scheme == "qat",
        )
        if found is not None:
            found = search.tighten(problem, found, progress)
        else:
            found = search.search(problem, progress) if scheme in SEARCHES else search.plain(problem, scheme)
        shared[repr(rules)] = found
    payloads, models, reports = [], [], {}
    for backend in order:
        own = rules_for(backend, target)
        model = found.model if own == rules else search.carry(found, own)
        try:
            payloads.append(make(model, backend, target, "int8"))
        except LoweringError as error:
            if backend == first:
                raise
            problems[backend] = str(error)
            continue
        models.append(model)
        reports[backend] = lint(model, own)
    if learn is not None and search.LEARNED in found.steps:
        learned = {"learned": learn.record}
    else:
        learned = {}
    record = {
        "scheme": scheme,
        **learned,
        "calibration": known.feeds.provenance,
        "warnings": list(known.warnings),
        "searched_for": rules.name,
        "steps": list(found.steps),
        "trials": search.summary(found.trials),
        "metric_looks": len(looks),
        "output_error": found.error,
        "layers": layers(known, found, rules),
        "worst_values": [
            {"value": search.describe(found.exact, n), "error": e} for n, e in found.ranked[:12] if e > 0
        ],
        "integer": {backend: _integer(rows) for backend, rows in reports.items()},
        "not_lowered": problems,
    }
    return Int8(tuple(payloads), record, search.blame(found), tuple(models))


def joined(made: Int8, backend: str, more: Int8) -> Int8:
    """The payload that `made` has for a library, and those of `more`, which was searched for by rules of others."""
    pairs = [p for p in zip(made.payloads, made.models, strict=True) if p[0].backend == backend]
    pairs += zip(more.payloads, more.models, strict=True)
    found, second = made.record, more.record
    told = ("searched_for", "steps", "trials", "output_error")
    record = {
        **found,
        "integer": {backend: found["integer"][backend], **second["integer"]},
        "not_lowered": {**found["not_lowered"], **second["not_lowered"]},
        "metric_looks": found["metric_looks"] + second["metric_looks"],
        "then": {name: second[name] for name in told},
    }
    return Int8(tuple(p for p, _ in pairs), record, made.blame, tuple(m for _, m in pairs))


def _refused(known: Calibrated, target: Target, backend: str) -> str:
    """Why a library cannot take the network in integers at all, "" if it can: before a search for it begins."""
    rules = rules_for(backend, target)
    if not rules.whole:
        return ""
    try:
        half(backend, "lower").lower(place(known.model, known.stats, rules), target, "int8")
    except LoweringError as error:
        return str(error)
    return ""


def _integer(rows: Sequence[NodeReport]) -> dict[str, Any]:
    """Integer share of MACs, and each node that stays float with the reason."""
    floats = [{"id": r.id, "op": r.op, "reason": r.reason, "macs": r.macs} for r in rows if not r.integer]
    return {
        "mac_share": round(integer_share(rows), 6),
        "nodes": len(rows),
        "integer_nodes": len(rows) - len(floats),
        "float": floats,
    }


def layers(known: Calibrated, found: Quantized, rules: Rules) -> list[dict[str, Any]]:
    """Per weighted node: what it is, its precision, the SQNR of its result and its share of the error seen there.

    share: of the noise power, relative to signal, that the node adds to what its input already carried;
    an account of where error enters, not of how much of it reaches the outputs.
    """
    model = found.model
    nodes = [n for n in model.graph if n.op_type in WEIGHTED]
    names = [str(n.outputs[0].name) for n in nodes]
    fake = simulate.fake_quantized(model, int32_bias=rules.int32_bias)
    held = {str(o.name) for n in fake.graph for o in n.outputs}
    names = [n for n in names if n in held]
    sqnr = simulate.sqnr(found.exact, fake, known.split()[1][:LAYER_PICTURES], names)
    integer = {r.id: r for r in lint(model, rules)}
    ratio = {n: 10 ** (-min(db, 100.0) / 10) for n, db in sqnr.items()}
    total = math.fsum(ratio.values()) or 1.0
    rows = []
    for node in nodes:
        name = node_id(node)
        report = integer[name]
        params = quant(node.outputs[0])
        rows.append(
            {
                "id": name,
                "op": search.describe(model, name),
                "precision": "int8" if report.integer else "float",
                "reason": report.reason,
                "macs": report.macs,
                "sqnr_db": None if name not in sqnr else round(min(float(sqnr[name]), 100.0), 2),
                "share": None if name not in ratio else round(ratio[name] / total, 5),
                "scale": None if params is None else params.scale[0],
            }
        )
    return rows
