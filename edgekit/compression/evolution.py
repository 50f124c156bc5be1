"""Searching a space of sub-nets under a limit on their cost: evolution, and its control, random draws.

    found = search(space, score, cost, budget, evaluations=100, seed=0, path=folder / "search.jsonl")
    found.best.choice, found.pareto

Evolution as once-for-all does it (Cai et al. 2020, after Real et al. 2019): a population, its best quarter are parents,
half of the children are mutations and half crossings of two, children over the budget are drawn again. Both methods ask
for as many scores as the other: nets that were scored before are not scored again, and not counted.

A search is resumed by doing it again: what was scored is read back from `path`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.compression.supernet import WIDTH, Choice, Space
from edgekit.errors import UsageError, did_you_mean

METHODS = ("evolution", "random")
TRIES = 200
"""Draws for a child that keeps the budget and is new, before something else is tried."""


@dataclass(frozen=True)
class Scored:
    """score: higher is better. cost: in the unit of the search's `cost`."""

    choice: Choice
    score: float
    cost: float


@dataclass(frozen=True)
class Found:
    """best: highest score within the budget, the cheapest of equals. seen: all that was scored, in order."""

    best: Scored
    seen: tuple[Scored, ...]

    @property
    def pareto(self) -> tuple[Scored, ...]:
        """Those that nothing seen beats in both score and cost, cheapest first."""
        kept: list[Scored] = []
        for each in sorted(self.seen, key=lambda s: (s.cost, -s.score)):
            if not kept or each.score > kept[-1].score:
                kept.append(each)
        return tuple(kept)


def search(
    space: Space, score: Callable[[Choice], float], cost: Callable[[Choice], float], budget: float, *,
    method: str = "evolution", evaluations: int = 100, population: int = 20, parents: float = 0.25,
    mutation: float = 0.1, seed: int = 0, path: Path | None = None, progress: Callable[[int, int], None] = lambda *_: None,
) -> Found:  # fmt: skip
    """The best of `evaluations` scored choices whose cost is within `budget`.

    mutation: chance of each axis to be drawn anew, or to move to a neighbouring value, in a mutated child (at least one
    does). parents: share of the population that has children. path: where scores are kept, one JSON object a line.
    Raises: UsageError for an unknown method, or a budget below the cost of the smallest choice.
    """
    if method not in METHODS:
        raise UsageError(f"search {method!r}: unknown. {did_you_mean(method, METHODS)}")
    run = _Run(
        space,
        score,
        cost,
        budget,
        np.random.default_rng([seed, METHODS.index(method)]),
        evaluations,
        path,
        progress,
    )
    least = run.cost_of(space.smallest())
    if least > budget:
        raise UsageError(
            f"search: the smallest net costs {least:g}, more than the budget of {budget:g}. Allow more, or smaller parts"
        )
    start = evaluations if method == "random" else min(population, evaluations)
    while len(run.seen) < start and run.evaluate(run.drawn()):
        pass
    while len(run.seen) < evaluations and method == "evolution":
        alive = sorted(run.seen, key=lambda s: -s.score)[:population]
        best = alive[: max(2, round(parents * population))]
        before = len(run.seen)
        for child in range(min(population, evaluations - len(run.seen))):
            made = run.mutated(best, mutation) if child % 2 == 0 else run.crossed(best)
            if not run.evaluate(made or run.mutated(best, 1.0) or run.drawn()):
                break
        if len(run.seen) == before:
            break
    best_one = max(run.seen, key=lambda s: (s.score, -s.cost))
    return Found(best_one, tuple(run.seen))


class _Run:
    def __init__(
        self, space: Space, score: Callable[[Choice], float], cost: Callable[[Choice], float], budget: float,
        rng: np.random.Generator, evaluations: int, path: Path | None, progress: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        self.space, self.score, self.cost, self.budget, self.rng = space, score, cost, budget, rng
        self.evaluations, self.path, self.progress = evaluations, path, progress
        self.axes = list(space.axes.values())
        self.costs: dict[Choice, float] = {}
        self.seen: list[Scored] = []
        self.scored: dict[Choice, Scored] = {}
        self.kept = _read(path, space)

    def cost_of(self, choice: Choice) -> float:
        if choice not in self.costs:
            known = self.kept.get(choice)
            self.costs[choice] = self.cost(choice) if known is None else known.cost
        return self.costs[choice]

    def evaluate(self, choice: Choice | None) -> bool:
        """Score it; False where there is nothing left to score."""
        if choice is None:
            return False
        found = self.kept.get(choice)
        if found is None:
            found = Scored(choice, float(self.score(choice)), self.cost_of(choice))
            _append(self.path, self.space, found)
        self.scored[choice] = found
        self.seen.append(found)
        self.progress(len(self.seen), self.evaluations)
        return True

    def fresh(self, make: Callable[[], Choice]) -> Choice | None:
        """A new choice within the budget, None where none was found."""
        for _ in range(TRIES):
            choice = make()
            if choice not in self.scored and self.cost_of(choice) <= self.budget:
                return choice
        return None

    def drawn(self) -> Choice | None:
        return self.fresh(lambda: self.space.random(self.rng)) or self.fresh(self._small)

    def _small(self) -> Choice:
        """A draw with every axis below a drawn share of its span: for budgets that few choices keep."""
        top = self.rng.random()
        return tuple(v[int(self.rng.integers(int(top * (len(v) - 1)) + 1))] for v in self.axes)

    def mutated(self, parents: Sequence[Scored], chance: float) -> Choice | None:
        def make() -> Choice:
            parent = parents[int(self.rng.integers(len(parents)))].choice
            moves = self.rng.random(len(self.axes)) < chance
            moves[int(self.rng.integers(len(self.axes)))] = True
            return tuple(
                self._moved(values, value) if moved else value
                for values, value, moved in zip(self.axes, parent, moves, strict=True)
            )

        return self.fresh(make)

    def _moved(self, values: tuple[Any, ...], value: Any) -> Any:
        at = values.index(value)
        near = [i for i in (at - 1, at + 1) if 0 <= i < len(values)]
        if self.rng.random() < 0.5:
            return values[near[int(self.rng.integers(len(near)))]]
        return values[int(self.rng.integers(len(values)))]

    def crossed(self, parents: Sequence[Scored]) -> Choice | None:
        def make() -> Choice:
            a, b = (
                parents[int(i)].choice for i in self.rng.choice(len(parents), 2, replace=len(parents) < 2)
            )
            first = self.rng.random(len(self.axes)) < 0.5
            return tuple(x if take else y for x, y, take in zip(a, b, first, strict=True))

        return self.fresh(make)


def scaled(space: Space, cost: Callable[[Choice], float], budget: float) -> Choice:
    """The widest choice within the budget with the same share of every part: what one does without a search.

    Raises: UsageError where even the narrowest is over the budget.
    """
    shares = {v for name, values in space.axes.items() if name.startswith(WIDTH) for v in values}
    for share in sorted(shares, reverse=True):
        choice = space.uniform(share)
        if cost(choice) <= budget:
            return choice
    raise UsageError(
        f"search: scaled down as far as it goes, the net costs more than the budget of {budget:g}. Allow more, or search"
    )


def _read(path: Path | None, space: Space) -> dict[Choice, Scored]:
    if path is None or not path.is_file():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row: Mapping[str, Any] = json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was killed
            continue
        choice = space.of(row["choice"])
        found[choice] = Scored(choice, row["score"], row["cost"])
    return found


def _append(path: Path | None, space: Space, found: Scored) -> None:
    if path is not None:
        row = {"choice": space.named(found.choice), "score": found.score, "cost": found.cost}
        cut_off = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size
        with path.open("a", encoding="utf-8") as lines:
            lines.write(("\n" if cut_off else "") + json.dumps(row) + "\n")
