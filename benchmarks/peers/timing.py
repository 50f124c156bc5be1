"""Times several runners beside each other in one process, so that whatever disturbs one disturbs all."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Times:
    """Of one runner, milliseconds, over rounds of a few calls each.

    median_ms, min_ms, p90_ms: over all calls. ratio: baseline's time / this one's, the median over rounds
    of the quotient of each round's best calls; spread: its quartiles. ratio_of_min: of the best calls of all.
    """

    median_ms: float
    min_ms: float
    p90_ms: float
    ratio: float
    spread: tuple[float, float]
    ratio_of_min: float


def interleave(
    runners: Mapping[str, Callable[[], object]],
    baseline: str,
    *,
    rounds: int = 40,
    calls: int = 3,
    warmup: int = 5,
    seed: int = 0,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Times]:
    """Run each of `runners` `calls` times per round, in a new order every round.

    The first call of each turn is not counted: it finds the caches full of its neighbour's data.
    Raises: KeyError when `baseline` is none of them.
    """
    order, draw = list(runners), random.Random(seed)
    for _ in range(warmup):
        for name in order:
            runners[name]()
    samples = {name: np.empty((rounds, calls)) for name in order}
    for number in range(rounds):
        draw.shuffle(order)
        for name in order:
            run = runners[name]
            run()
            for call in range(calls):
                start = clock()
                run()
                samples[name][number, call] = (clock() - start) / 1e6
    base = samples[baseline]
    found = {}
    for name in runners:
        mine = samples[name]
        quotients = base.min(1) / mine.min(1)
        found[name] = Times(
            float(np.median(mine)),
            float(mine.min()),
            float(np.percentile(mine, 90)),
            float(np.median(quotients)),
            (float(np.percentile(quotients, 25)), float(np.percentile(quotients, 75))),
            float(base.min() / mine.min()),
        )
    return found
