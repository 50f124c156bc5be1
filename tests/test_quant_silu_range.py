"""Ranges that know their SiLU: against brute force on the histogram, and against ranges that do not."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgekit.quant import silu_range as sr
from edgekit.quant.calibrate import calibrate
from edgekit.quant.ranges import activation_range, params
from edgekit.quant.stats import Accumulator, TensorStats
from tests.quant_graphs import between, network, pictures

KINDS = (
    "normal",
    "shifted",
    "outliers",
    "left tail",
    "right tail",
    "narrow",
    "wide",
    "positive",
    "negative",
    "one",
)


def values(kind: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(4000) * rng.uniform(0.2, 6)
    if kind == "shifted":
        x += rng.uniform(-6, 6)
    elif kind == "outliers":
        x[rng.integers(0, x.size, 3)] *= rng.uniform(5, 50, 3)
    elif kind == "left tail":
        x = -(np.abs(x) ** 2) + 1
    elif kind == "right tail":
        x = np.abs(x) ** 2 - 1
    elif kind == "narrow":
        x *= 0.01
    elif kind == "wide":
        x *= 30
    elif kind == "positive":
        x = np.abs(x)
    elif kind == "negative":
        x = -np.abs(x)
    elif kind == "one":
        x[:] = rng.uniform(-10, 10)
    return x.astype(np.float32)


def gathered(x: np.ndarray) -> TensorStats:
    accumulator = Accumulator()
    assert accumulator.add(x.reshape(1, 1, 1, -1))
    return accumulator.stats()


def silu(x: float) -> float:
    return x / (1 + math.exp(-x)) if x > -700 else 0.0


def error(stats: TensorStats, low: float, high: float) -> float:
    """E[(silu(q(x)) - silu(x))^2] * count: a bin at a time, q in words of the definition."""
    found = params(low, high)
    total = 0.0
    for i in np.flatnonzero(stats.counts):
        x = stats.bin_low + stats.bin_width * (i + 0.5)
        x = min(max(x, stats.low), stats.high)
        code = min(max(round(x / found.scale[0]) + found.zero_point[0], -128), 127)
        total += int(stats.counts[i]) * (silu((code - found.zero_point[0]) * found.scale[0]) - silu(x)) ** 2
    return total


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_brute_force_finds_nothing_better(kind: str, seed: int) -> None:
    """Over every pair of candidate ends; what stays is the gain below which the high end is left alone."""
    stats = gathered(values(kind, seed)[:400])
    seen = min(stats.low, 0.0), max(stats.high, 0.0)
    mse = activation_range(stats, "mse")
    lows = {seen[0], mse[0], *(float(x) for x in sr.LOWS if x > seen[0])}
    highs = {seen[1], *(seen[1] * float(share) for share in sr.HIGHS)}
    highs.add(mse[1])
    best = min(error(stats, *ends) for ends in itertools.product(lows, highs))
    found = error(stats, *sr.silu_range(stats))
    assert found * (1 - sr.GAIN) <= best * (1 + 1e-9) + 1e-12


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10_000))
@example(kind="wide", seed=3)
def test_never_worse_behind_a_silu_than_a_range_that_does_not_know_it(kind: str, seed: int) -> None:
    stats = gathered(values(kind, seed)[:1500])
    found = error(stats, *sr.silu_range(stats))
    for scheme in ("mse", "minmax"):
        other = error(stats, *activation_range(stats, scheme))
        # but for the gain below which the high end is left alone
        assert found * (1 - sr.GAIN) <= other * (1 + 1e-9) + 1e-12, scheme


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10_000))
def test_a_value_that_can_be_reached_is_cut_for_a_gain_only(kind: str, seed: int) -> None:
    stats = gathered(values(kind, seed)[:1500])
    low, high = sr.silu_range(stats)
    seen = min(stats.low, 0.0), max(stats.high, 0.0)
    assert seen[0] <= low <= 0 <= high <= seen[1]
    if high < seen[1]:
        lows = {low, seen[0], *(float(x) for x in sr.LOWS if x > seen[0])}
        whole = min(error(stats, candidate, seen[1]) for candidate in lows)
        assert error(stats, low, high) < whole * (1 - sr.GAIN) * (1 + 1e-9)


def test_the_flat_left_side_costs_no_codes() -> None:
    x = np.concatenate([np.linspace(-200, -9, 3000), np.linspace(-1, 4, 1000)]).astype(np.float32)
    low, high = sr.silu_range(gathered(x))
    assert -8 < low < -1 and high == pytest.approx(4.0)
    assert activation_range(gathered(x), "mse")[0] < -100, "which the error of the value itself pays dearly"


def test_what_is_seen_once_is_the_range() -> None:
    low, high = sr.silu_range(gathered(np.full(10, 3.0, np.float32)))
    assert (low, high) == (0.0, 3.0)
    assert sr.silu_range(gathered(np.zeros(10, np.float32))) == (0.0, 0.0)


def test_equal_statistics_give_equal_ranges() -> None:
    x = values("outliers", 5)
    assert sr.silu_range(gathered(x)) == sr.silu_range(gathered(x[::-1]))


# --- which values --------------------------------------------------------------------------------


def names(body: str, outputs: dict[str, tuple[int, ...]] | None = None) -> list[str]:
    model = network(body, outputs=outputs)
    return [str(v.name) for v in sr.silu_inputs(model)]


def test_only_what_a_silu_alone_reads() -> None:
    conv = "a = Conv <pads=[1,1,1,1]> (x, w1, b1)"
    assert names(f"{conv} \n g = Sigmoid(a) \n y = Mul(a, g)") == ["a"]
    assert names(f"{conv} \n g = Sigmoid(a) \n y = Mul(g, a)") == ["a"]
    assert names(f"{conv} \n y = Sigmoid(a)") == []
    assert names(f"{conv} \n g = Sigmoid(a) \n y = Mul(x, g)") == [], "a gate of something else"
    assert names(f"{conv} \n g = Sigmoid(a) \n m = Mul(a, g) \n y = Add(m, a)") == [], "another reader"
    assert names(f"{conv} \n g = Sigmoid(a) \n m = Mul(a, k) \n y = Mul(m, g)") == []
    shape = (1, 16, 8, 8)
    assert names(f"{conv} \n g = Sigmoid(a) \n y = Mul(a, g)", {"y": shape, "a": shape}) == [], "seen outside"


def test_ranges_by_value_name_where_there_are_statistics() -> None:
    model = between("SiLU")
    stats = calibrate(model, pictures())
    assert sr.silu_ranges(model, stats) == {"a": sr.silu_range(stats["a"])}
    assert sr.silu_ranges(model, {}) == {}
    assert sr.silu_ranges(between("Relu"), stats) == {}
