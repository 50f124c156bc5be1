"""Searches: they keep their budget, find more than chance, count alike, and go on where they stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekit.compression.evolution import Scored, scaled, search
from edgekit.compression.methods import search as method
from edgekit.compression.problem import macs
from edgekit.compression.supernet import Choice, Space
from edgekit.compression.work import Work, begin, digest
from edgekit.errors import UsageError
from edgekit.target import Target
from tests.small_nets import EXAMPLE, Placed, problem_of

SPACE = Space({f"width {i}": (1, 2, 3, 4, 5, 6, 7) for i in range(8)} | {"depth": (0, 1, 2)})
WORTH = np.array([9, 1, 5, 1, 3, 1, 2, 1, 4.0])
PRICE = np.array([1, 4, 1, 4, 2, 4, 3, 4, 5.0])


def score(choice: Choice) -> float:
    """Parts are of unequal worth and price, so that scaling all alike is not the best."""
    return float(WORTH @ np.sqrt(choice))


def cost(choice: Choice) -> float:
    return float(PRICE @ np.array(choice))


BUDGET = 0.5 * cost(SPACE.largest())


def counted(calls: list[Choice]) -> Callable[[Choice], float]:
    def asked(choice: Choice) -> float:
        calls.append(choice)
        return score(choice)

    return asked


@pytest.mark.parametrize("method", ["evolution", "random"])
def test_a_search_keeps_its_budget_and_its_number_of_evaluations(method: str) -> None:
    calls: list[Choice] = []
    found = search(SPACE, counted(calls), cost, BUDGET, method=method, evaluations=60, population=12)
    assert len(calls) == len(set(calls)) == len(found.seen) == 60
    assert all(s.cost == cost(s.choice) <= BUDGET and s.score == score(s.choice) for s in found.seen)
    assert found.best.score == max(s.score for s in found.seen)


def test_evolution_beats_chance_and_chance_beats_scaling() -> None:
    best = {
        method: [
            search(SPACE, score, cost, BUDGET, method=method, evaluations=200, seed=seed).best.score
            for seed in range(5)
        ]
        for method in ("evolution", "random")
    }
    plain = score(scaled(SPACE, cost, BUDGET))
    assert min(best["evolution"]) > max(best["random"])
    assert min(best["random"]) > plain


def test_a_search_depends_on_its_seed_alone() -> None:
    one, same, other = (search(SPACE, score, cost, BUDGET, evaluations=50, seed=s) for s in (1, 1, 2))
    assert one == same != other


def test_the_pareto_front_is_what_nothing_beats() -> None:
    found = search(SPACE, score, cost, BUDGET, evaluations=80)
    front = found.pareto
    assert found.best in front
    assert [s.cost for s in front] == sorted(s.cost for s in front)
    for each in found.seen:
        beaten = any(s.cost <= each.cost and s.score >= each.score and s != each for s in front)
        assert beaten or each in front


@pytest.mark.parametrize("broken", [b"", b'{"choice": {"wid'])
def test_an_interrupted_search_goes_on(tmp_path: Path, broken: bytes) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    wanted = search(SPACE, score, cost, BUDGET, evaluations=60, path=whole)
    calls: list[Choice] = []

    def failing(choice: Choice) -> float:
        if len(calls) == 25:
            raise KeyboardInterrupt
        return counted(calls)(choice)

    with pytest.raises(KeyboardInterrupt):
        search(SPACE, failing, cost, BUDGET, evaluations=60, path=parts)
    with parts.open("ab") as file:
        file.write(broken)
    more: list[Choice] = []
    assert search(SPACE, counted(more), cost, BUDGET, evaluations=60, path=parts) == wanted
    assert len(more) == 35
    rows = [line for line in parts.read_text().splitlines() if line.encode() != broken]
    assert rows == whole.read_text().splitlines()
    first = json.loads(rows[0])
    assert Scored(SPACE.of(first["choice"]), first["score"], first["cost"]) == wanted.seen[0]


def test_a_small_space_ends_when_all_was_seen() -> None:
    space = Space({"a": (1, 2), "b": (1, 2, 3)})
    for way in ("evolution", "random"):
        found = search(space, sum, lambda c: c[0] * c[1], 4, method=way, evaluations=50)  # type: ignore[arg-type]
        assert {s.choice for s in found.seen} == {(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)}
        assert found.best.choice == (1, 3)  # as good as (2, 2), and cheaper


def test_a_budget_that_few_keep() -> None:
    found = search(SPACE, score, cost, cost(SPACE.smallest()) + 3, evaluations=10)
    assert found.seen and all(s.cost <= cost(SPACE.smallest()) + 3 for s in found.seen)


def test_what_cannot_be_searched() -> None:
    with pytest.raises(UsageError, match=r"the smallest net costs 23, more than the budget of 20"):
        search(SPACE, score, cost, 20)
    with pytest.raises(UsageError, match=r"scaled down as far as it goes, the net costs more"):
        scaled(SPACE, cost, 20)
    with pytest.raises(UsageError, match=r"search 'evolutio': unknown. Did you mean 'evolution'"):
        search(SPACE, score, cost, BUDGET, method="evolutio")


# --- as a step of a recipe ------------------------------------------------------------------------------

SHORT = method.Options(
    by="macs", steps=30, nets=1, shares=(0.25, 0.5, 0.75), multiple=4, evaluations=8, population=4, batches=1,
    statistics=2, tune_steps=10,
)  # fmt: skip


def stepped(options: method.Options, **more: object) -> Work:
    torch.manual_seed(0)
    work = begin(problem_of(Placed()), **more)
    work.enter("1-search")
    method.run(work, options)
    return work


def test_the_step_leaves_a_smaller_net_that_has_learned() -> None:
    work = stepped(SHORT)
    facts = work.facts["1-search"]
    assert facts["macs"] == [macs(work.teacher, EXAMPLE), macs(work.model, EXAMPLE)]
    assert facts["macs"][1] <= 0.5 * facts["macs"][0]
    assert facts["cost"] == [float(n) for n in facts["macs"]] and facts["cost_unit"] == "macs"
    assert facts["evaluations"] == 8 and facts["space"] == 24
    assert min(row["loss"] for row in facts["pareto"]) == facts["loss"]
    assert work.problem.evaluate(work.model)["top1"] > 0.6
    json.dumps(facts)


def test_an_interrupted_step_ends_in_the_same_net(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    whole = stepped(SHORT, folder=folders[0])
    calls = 0

    def stop(what: str, done: int, of: int) -> None:
        nonlocal calls
        calls += what.endswith("search")
        if calls == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stepped(SHORT, folder=folders[1], progress=stop)
    assert len((folders[1] / "1-search.seen.jsonl").read_text().splitlines()) == 4
    parts = stepped(SHORT, folder=folders[1])
    assert digest(parts.model) == digest(whole.model)
    assert parts.facts == whole.facts


def test_the_controls() -> None:
    chance = stepped(replace(SHORT, search="random", steps=2, tune_steps=0))
    plain = stepped(replace(SHORT, search="uniform", steps=2, tune_steps=0))
    assert chance.facts["1-search"]["evaluations"] == 8
    assert plain.facts["1-search"]["evaluations"] == 1
    assert plain.facts["1-search"]["choice"] == {"width stem": 0.5, "width stage": 0.5, "depth stage": 2}


def test_a_sub_net_may_see_less() -> None:
    options = replace(SHORT, resolutions=(0.5,), budget=0.1, steps=2, tune_steps=1, evaluations=4)
    work = stepped(options)
    assert work.facts["1-search"]["choice"]["resolution"] == 0.5
    assert macs(work.model, EXAMPLE) == work.facts["1-search"]["cost"][1] <= 0.1 * macs(work.teacher, EXAMPLE)


def test_by_the_seconds_of_a_board() -> None:
    options = replace(SHORT, by="latency", budget=0.8, steps=1, tune_steps=0, evaluations=2)
    facts = stepped(options, target=Target.load("rpi5")).facts["1-search"]
    assert facts["cost_unit"] == "s" and 0 < facts["cost"][1] <= 0.8 * facts["cost"][0] < 1e-3
    with pytest.raises(UsageError, match="search by latency: no target given"):
        stepped(options)


def test_masked_weights_stay_zero() -> None:
    torch.manual_seed(0)
    work = begin(problem_of(Placed()))
    name = "stage.0.0.weight"
    work.masks[name] = (torch.rand(16, 8, 3, 3) > 0.5).float()
    work.enter("1-search")
    method.run(work, replace(SHORT, steps=2, tune_steps=2))
    weight = dict(work.model.named_parameters())[name]
    assert work.masks[name].shape == weight.shape
    assert 0 < int((work.masks[name] == 0).sum()) == int((weight == 0).sum())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"by": "time"}, "by must be one of latency, macs"),
        ({"search": "grid"}, "search must be one of evolution, random, uniform"),
        ({"budget": 0.0}, "budget must be above 0"),
        ({"shares": (0.5, 1.5)}, "shares must be above 0 and at most 1"),
        ({"shares": ()}, "shares must be above 0 and at most 1"),
        ({"resolutions": (0.0,)}, "resolutions must be above 0 and at most 1"),
        ({"evaluations": 0}, "evaluations must be at least 1"),
        ({"population": 1}, "population must be at least 2"),
        ({"steps": -1}, "steps must not be negative"),
        ({"tune_lr": 0.0}, "tune_lr must be above 0"),
        ({"mutation": 2.0}, "mutation must be between 0 and 1"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        method.Options(**options)  # type: ignore[arg-type]


def test_a_budget_that_no_sub_net_keeps() -> None:
    with pytest.raises(UsageError, match="more than the budget"):
        stepped(replace(SHORT, budget=0.01, steps=0))
