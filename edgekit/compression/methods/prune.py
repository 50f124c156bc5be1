"""Structured pruning: channels that matter least per second saved leave, in rounds with training between them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.compression import importance, latency, measure
from edgekit.compression.batchnorm import recalibrate
from edgekit.compression.groups import Group, groups, remove
from edgekit.compression.problem import macs, parameters
from edgekit.compression.surgery import MIXING, channels
from edgekit.compression.work import Work
from edgekit.errors import UsageError

WAYS = ("latency", "macs", "global", "uniform")


@dataclass(frozen=True)
class Options:
    """importance: one of importance.IMPORTANCES. speedup: of the estimated seconds (without a target, or by "macs": of
    multiply-accumulates), or ratio: share of channels that leave; one of the two.

    by: "latency" (least importance per second saved on the target), "macs" (per multiply-accumulate), "global" (one
    threshold), "uniform" (the same share of every layer). rounds: of pruning and training; the goal is approached
    geometrically. steps, lr: of the training after every round (None: a tenth of the problem's); finish_steps: steps more after
    the last. granularity: channels that layers keep come in multiples of it (0: as the target says). minimum and keep: channels and
    share of them that every layer keeps. batches: of gradients (taylor, fisher) and of recalibrated batch norms.
    measured: seconds are taken on this machine, of builds for `backend` (the target's first), not estimated.
    sparsify_steps: of training with L1 on batch norms' factors beforehand (slimming), of strength `strength`.
    """

    importance: str = "taylor"
    speedup: float = 0.0
    ratio: float = 0.0
    by: str = "latency"
    rounds: int = 1
    steps: int = 200
    finish_steps: int = 0
    lr: float | None = None
    granularity: int = 0
    minimum: int = 8
    keep: float = 0.25
    batches: int = 16
    measured: bool = False
    backend: str = ""
    sparsify_steps: int = 0
    strength: float = 1e-4

    def __post_init__(self) -> None:
        if self.importance not in importance.IMPORTANCES:
            raise ValueError(
                f"importance must be one of {', '.join(importance.IMPORTANCES)}, got {self.importance!r}"
            )
        if self.by not in WAYS:
            raise ValueError(f"by must be one of {', '.join(WAYS)}, got {self.by!r}")
        if (self.speedup > 0) == (self.ratio > 0):
            raise ValueError("either speedup or ratio must be given")
        if self.speedup and self.speedup <= 1:
            raise ValueError(f"speedup must be above 1, got {self.speedup}")
        if not 0 <= self.ratio < 1 or not 0 <= self.keep <= 1:
            raise ValueError(f"ratio and keep must be shares, got {self.ratio} and {self.keep}")
        for name in ("rounds", "minimum", "batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("steps", "finish_steps", "granularity", "sparsify_steps", "strength"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


def needs_target(options: Options) -> bool:
    return options.by == "latency"


def run(work: Work, options: Options) -> None:
    """Prune `work.model` in place and train it. Facts: channels per layer before and after, MACs, parameters, cost.

    Raises: UsageError where the goal cannot be reached.
    """
    model, example = work.model, work.problem.example
    before, widths = (macs(model, example), parameters(model)), _widths(model)
    left: dict[str, str] = {}
    found = groups(model, example, work.problem.head, left)
    if not found:
        raise UsageError(f"prune: nothing in {work.problem.name} can be pruned: {left}")
    if options.sparsify_steps:
        work.train(
            options.sparsify_steps, lr=options.lr, hooks=[importance.Slimming(found, options.strength)]
        )
    whole = {group.name: group.units for group in found}
    full, chosen = 0.0, _Choice({}, 0.0, 0.0, "")
    for number in range(options.rounds):
        if number:
            found = groups(model, example, work.problem.head)
        choose = functools.partial(_choose, work, options, found, whole, full, number)
        chosen = _Choice(**work.remember(f"gone.{number}", choose))
        full = full or chosen.before
        remove(model, [(group, chosen.gone.get(group.name, [])) for group in found], work.masks)
        recalibrate(model, (work.problem.batch(i)[0] for i in range(options.batches)))
        work.say({"stage": work.stage, "round": number, "macs": macs(model, example), "cost": chosen.after})
        last = number + 1 == options.rounds
        if options.steps or (last and options.finish_steps):
            work.train(options.steps + options.finish_steps * last, lr=options.lr)
    work.facts[work.stage] = {
        "macs": [before[0], macs(model, example)],
        "parameters": [before[1], parameters(model)],
        "cost": [full, chosen.after],
        "cost_unit": chosen.unit,
        "target": work.target.name if work.target and chosen.unit == "s" else None,
        "channels": {
            name: [n, now] for (name, n), now in zip(widths.items(), _widths(model).values(), strict=True)
        },
        "left_alone": left,
    }


def _widths(model: nn.Module) -> dict[str, int]:
    return {name: channels(part, "out") for name, part in model.named_modules() if isinstance(part, MIXING)}


def _cost(work: Work, options: Options, found: Sequence[Group], number: int) -> latency.Cost:
    """In round `number`."""
    if options.by == "macs" or (work.target is None and options.by != "latency"):
        return latency.Macs(work.model, found, work.problem.example)
    if work.target is None:
        raise UsageError("prune by latency: no target given. Give one, or prune by macs")
    if not options.measured:
        return latency.Estimated(work.model, found, work.problem.write, work.target, work.precision)
    target, backend = work.target, options.backend or work.target.backend

    def seconds(networks: Sequence[Callable[[], nn.Module]]) -> list[float]:
        pictures = work.problem.batch(0)[0]
        graphs = (measure.read(make(), work.problem.write) for make in networks)
        built = [measure.payload(graph, target, backend, work.precision, pictures) for graph in graphs]
        return measure.times(built)

    def once(networks: Sequence[Callable[[], nn.Module]]) -> list[float]:
        known: list[float] = work.remember(f"seconds.{number}", lambda: seconds(networks))
        return known

    return latency.Measured(work.model, found, work.problem.example, once)


def scores(work: Work, options: Options, found: Sequence[Group]) -> list[Tensor]:
    """Importance of every unit of every group: comparable between groups."""
    if options.importance == "random":
        return [importance.random(group, work.seed) / group.units for group in found]
    if options.importance in importance.GRADIENTS:
        batches = (work.problem.batch(i) for i in range(options.batches))
        gates = importance.Gates(work.model, found, work.problem.loss, batches)
        return [gates.taylor(g) if options.importance == "taylor" else gates.fisher(g) for g in found]
    return [importance.normalised(importance.score(work.model, g, options.importance)) for g in found]


@dataclass(frozen=True)
class _Choice:
    """gone: units that leave, by group. before, after: the cost, in `unit`."""

    gone: dict[str, list[int]]
    before: float
    after: float
    unit: str


def _choose(
    work: Work, options: Options, found: Sequence[Group], whole: Mapping[str, int], full: float, number: int
) -> dict[str, Any]:
    """The fields of _Choice: what leaves in round `number`. whole: units at first, by group; full: cost then."""
    share = (number + 1) / options.rounds
    cost = _cost(work, options, found, number)
    before = cost([group.units for group in found])
    goal = (full or before) / options.speedup**share if options.speedup else 0.0
    ratio = 1 - (1 - options.ratio) ** share
    rated = scores(work, options, found)
    grain = options.granularity or latency.granularity(work.target, work.precision)
    steps = [max(1, -(-grain // group.per_unit)) for group in found]
    least = [max(-(-options.minimum // g.per_unit), int(whole[g.name] * options.keep)) for g in found]
    channels = sum(n for n in whole.values())

    def done(kept: Sequence[int]) -> bool:
        return bool(sum(kept) <= (1 - ratio) * channels if ratio else cost(kept) <= goal)

    ranks = {"global": latency.least_important(rated), "uniform": latency.evenly(found)}
    rank = ranks.get(options.by) or latency.per_saved(cost, rated)
    together = cost.together if options.by not in ranks else np.eye(len(found), dtype=bool)
    kept = latency.choose(found, steps, least, rank, done, together)
    if kept is None:
        wanted = f"ratio {options.ratio:g}" if options.ratio else f"speedup {options.speedup:g}"
        raise UsageError(
            f"prune: {wanted} cannot be reached: no layer may lose more channels (granularity {grain}, minimum "
            f"{options.minimum}, keep {options.keep:g}). Lower one of them, or the goal"
        )
    gone = {
        group.name: sorted(torch.argsort(rating, stable=True)[: group.units - n].tolist())
        for group, rating, n in zip(found, rated, kept, strict=True)
        if n < group.units
    }
    return vars(_Choice(gone, before, cost(kept), cost.unit))
