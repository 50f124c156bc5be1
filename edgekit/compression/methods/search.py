"""Search for the widths and depths that a budget allows: train a super-net of the network, search its sub-nets, keep one.

The network as it is becomes the super-net (compression/supernet.py): the sandwich rule trains it and its sub-nets together
for `steps` batches. Then `search` asks for the loss of sub-nets whose cost is within `budget` of the whole's, each with
batch norm statistics of its own, on batches of the training data that no training draws; the best one is cut out and
trained on for `tune_steps`. Controls: search = "random" draws as many, "uniform" scales all parts alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgekit.compression import evolution, latency
from edgekit.compression.batchnorm import recalibrate
from edgekit.compression.problem import Problem, macs, parameters
from edgekit.compression.supernet import SHARES, Choice, Sandwich, SuperNet
from edgekit.compression.work import Work
from edgekit.errors import UsageError

SEARCHES = (*evolution.METHODS, "uniform")
COSTS = ("latency", "macs")
FIRST_JUDGED = 2**30
"""Number of the first batch that sub-nets are judged on: trainings count from 0."""


@dataclass(frozen=True)
class Options:
    """budget: share of the network's cost, by "latency" (estimated seconds on the target) or "macs". search: evolution,
    random or uniform.

    steps, lr: of the super-net's training (lr None: the problem's, from scratch), with `nets` random sub-nets in each
    besides the smallest. shares: of its channels that a part may keep, in multiples of `multiple`. resolutions: shares of
    the input's sides that a sub-net may see (not for detectors; empty: all see everything). evaluations: sub-nets
    that are judged, on `batches` batches after `statistics` batches for their norms. population, mutation: of evolution.
    tune_steps, tune_lr: of the training of the sub-net that was found (None: a tenth of the problem's).
    """

    budget: float = 0.5
    by: str = "latency"
    search: str = "evolution"
    steps: int = 1000
    lr: float | None = None
    nets: int = 2
    shares: tuple[float, ...] = SHARES
    multiple: int = 8
    resolutions: tuple[float, ...] = ()
    evaluations: int = 100
    population: int = 20
    mutation: float = 0.1
    batches: int = 8
    statistics: int = 4
    tune_steps: int = 300
    tune_lr: float | None = None

    def __post_init__(self) -> None:
        if self.by not in COSTS:
            raise ValueError(f"by must be one of {', '.join(COSTS)}, got {self.by!r}")
        if self.search not in SEARCHES:
            raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {self.search!r}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget must be above 0 and at most 1, got {self.budget:g}")
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"shares must be above 0 and at most 1, got {list(self.shares)}")
        if not all(0 < share <= 1 for share in self.resolutions):
            raise ValueError(f"resolutions must be above 0 and at most 1, got {list(self.resolutions)}")
        if not 0 <= self.mutation <= 1:
            raise ValueError(f"mutation must be between 0 and 1, got {self.mutation:g}")
        for name in ("evaluations", "batches", "statistics", "multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.population < 2:
            raise ValueError(f"population must be at least 2, got {self.population}")
        for name in ("steps", "nets", "tune_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("lr", "tune_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 10:
                raise ValueError(f"{name} must be above 0 and at most 10, got {value:g}")


def needs_target(options: Options) -> bool:
    return options.by == "latency"


def run(work: Work, options: Options) -> None:
    """Replace `work.model` by the sub-net that was found. Facts: the choice, MACs, parameters, costs, the Pareto front.

    Raises: UsageError where nothing can be chosen, or the budget is below the smallest sub-net's cost.
    """
    problem, model = work.problem, work.model
    before = macs(model, problem.example), parameters(model)
    try:
        net = SuperNet(
            model, problem.example, problem.head, shares=options.shares, multiple=options.multiple,
            resolutions=options.resolutions,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(f"search in {problem.name}: {error}. Change multiple or resolutions") from None
    price = cost(net, problem, work, options.by)
    if options.steps:
        sandwich = Sandwich(net, problem, count=options.nets, seed=work.seed)
        work.train(options.steps, lr=options.lr or problem.lr, hooks=[sandwich])
    found = work.remember("found", lambda: _found(work, net, price, options))
    work.model = net.extract(net.space.of(found["choice"]), work.masks)
    recalibrate(work.model, (problem.batch(i)[0] for i in range(options.statistics)))
    if options.tune_steps:
        work.train(options.tune_steps, lr=options.tune_lr)
    work.facts[work.stage] = {
        "macs": [before[0], macs(work.model, problem.example)],
        "parameters": [before[1], parameters(work.model)],
        "space": net.space.size,
        "cost_unit": "s" if options.by == "latency" else "macs",
        **found,
    }


def cost(net: SuperNet, problem: Problem, work: Work, by: str) -> Callable[[Choice], float]:
    """What a sub-net costs: multiply-accumulates, or estimated seconds on the target of `work`, in its precision.

    Raises: UsageError without a target, or for a board without the facts of an estimate.
    """
    if by == "macs":
        return lambda choice: float(macs(net.extract(choice), problem.example))
    target = work.target
    if target is None:
        raise UsageError("search by latency: no target given. Give one, or search by macs")
    known: dict[Choice, float] = {}

    def seconds(choice: Choice) -> float:
        if choice not in known:
            known[choice] = latency.Estimated(net.extract(choice), [], problem.write, target, work.precision)(
                []
            )
        return known[choice]

    return seconds


def loss_of(problem: Problem, net: SuperNet, options: Options) -> Callable[[Choice], float]:
    """The negative loss of a sub-net with statistics of its own, on batches of the training data that no training draws."""
    judged = [problem.batch(FIRST_JUDGED + i) for i in range(options.batches)]
    seen = [problem.batch(FIRST_JUDGED + options.batches + i)[0] for i in range(options.statistics)]

    def score(choice: Choice) -> float:
        small: nn.Module = net.extract(choice).eval()
        recalibrate(small, seen)
        with torch.no_grad():
            losses = [float(problem.loss(small(inputs), targets)) for inputs, targets in judged]
        return -sum(losses) / len(losses)

    return score


def _found(work: Work, net: SuperNet, price: Callable[[Choice], float], options: Options) -> dict[str, Any]:
    whole = price(net.largest())
    budget = options.budget * whole
    score = loss_of(work.problem, net, options)
    if options.search == "uniform":
        choice = evolution.scaled(net.space, price, budget)
        best = evolution.Scored(choice, score(choice), price(choice))
        found = evolution.Found(best, (best,))
    else:
        path = work.folder / f"{work.stage}.seen.jsonl" if work.folder else None
        found = evolution.search(
            net.space, score, price, budget, method=options.search, evaluations=options.evaluations,
            population=options.population, mutation=options.mutation, seed=work.seed, path=path,
            progress=lambda done, of: work.progress(f"{work.stage}.search", done, of),
        )  # fmt: skip
    work.say(
        {
            "stage": work.stage,
            "evaluations": len(found.seen),
            "score": found.best.score,
            "cost": found.best.cost,
        }
    )
    return {
        "choice": net.space.named(found.best.choice),
        "cost": [whole, found.best.cost],
        "loss": -found.best.score,
        "evaluations": len(found.seen),
        "pareto": [
            {"choice": net.space.named(s.choice), "loss": -s.score, "cost": s.cost} for s in found.pareto
        ],
    }
