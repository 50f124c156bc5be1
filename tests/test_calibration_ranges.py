"""Ranges from histograms: every scheme against its definition, computed directly on the values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.quant.ranges import (
    ENTROPY_TAIL,
    SCHEMES,
    activation_range,
    channel_ranges,
    covered,
    entropy_bins,
    expected_error,
    magnitudes,
    params,
)
from edgekit.quant.stats import Accumulator, TensorStats
from edgekit.spec import DType, QuantParams


def stats_of(values: np.ndarray) -> TensorStats:
    accumulator = Accumulator()
    assert accumulator.add(values.astype(np.float32))
    return accumulator.stats()


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rounded(values: np.ndarray, p: QuantParams, symmetric: bool) -> np.ndarray:
    (scale,), (zero,) = p.scale, p.zero_point
    codes = np.clip(np.rint(values / scale) + zero, -127 if symmetric else -128, 127)
    return (codes - zero) * scale


def error_of(values: np.ndarray, stats: TensorStats, scheme: str, symmetric: bool) -> float:
    p = params(*activation_range(stats, scheme, symmetric), symmetric)
    values = values.astype(np.float32).astype(np.float64)
    return float(np.mean((values - rounded(values, p, symmetric)) ** 2))


def shapes(seed: int) -> dict[str, np.ndarray]:
    """Distributions that activations have."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=40000)
    return {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "silu": silu(3 * normal),
        "sigmoid": 1 / (1 + np.exp(-4 * normal)),
        "far": 100 + normal,
        "negative": -(np.abs(normal) ** 3),
        "outliers": np.concatenate([normal, [60.0, -25.0]]),
        "one sided outliers": np.concatenate([np.maximum(normal, 0), [400.0]]),
        "laplace": rng.laplace(size=40000),
        "uniform": rng.uniform(-1, 3, 40000),
        "few numbers": rng.choice([0.0, 1.0, 6.0], 40000),
    }


KINDS = tuple(shapes(0))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", [*SCHEMES, "percentile:99"])
def test_a_range_holds_zero_and_stays_within_the_data(kind, scheme, symmetric):
    stats = stats_of(shapes(1)[kind])
    low, high = activation_range(stats, scheme, symmetric)
    assert low <= 0 <= high and low < high
    if symmetric:
        assert low == -high and high <= max(-stats.low, stats.high)
    else:
        assert low >= min(stats.low, 0) and high <= max(stats.high, 0)
    p = params(low, high, symmetric)
    assert p.dtype == DType.int8 and -128 <= p.zero_point[0] <= 127
    assert rounded(np.zeros(1), p, symmetric) == 0
    # half a step at each end is what the rounding of the zero point may take
    ends = covered(p)
    assert ends[0] <= low + p.scale[0] * 0.501 and ends[1] >= high - p.scale[0] * 0.501


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_never_worse_than_minmax(kind, symmetric):
    values = shapes(2)[kind]
    stats = stats_of(values)
    best, naive = (error_of(values, stats, scheme, symmetric) for scheme in ("mse", "minmax"))
    assert best <= naive * 1.001
    if kind == "silu" and not symmetric:
        assert best < naive


@pytest.mark.parametrize("kind", ["normal", "silu", "laplace", "outliers", "relu"])
def test_mse_is_near_the_best_of_all_ranges(kind):
    values = shapes(3)[kind]
    stats = stats_of(values)
    found = error_of(values, stats, "mse", False)
    best = math.inf
    for low in np.linspace(0, 1, 13) * min(values.min(), 0):
        for high in np.linspace(0.02, 1, 50) * values.max():
            best = min(best, float(np.mean((values - rounded(values, params(low, high), False)) ** 2)))
    assert found < 1.08 * best


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shrink", [1.0, 0.5, 0.02])
def test_expected_error_is_what_rounding_gives(kind, symmetric, shrink):
    if kind == "few numbers":
        pytest.skip("its values are points, not spread over their bins: the model does not describe them")
    values = shapes(4)[kind].astype(np.float32).astype(np.float64)
    stats = stats_of(values)
    p = params(stats.low * shrink, stats.high * shrink, symmetric)
    direct = float(np.mean((values - rounded(values, p, symmetric)) ** 2))
    # most of "negative" lies in the bin next to zero, and at one end of it
    assert expected_error(stats, p) == pytest.approx(direct, rel=0.06 if kind == "negative" else 0.02)


def test_silu_keeps_its_codes():
    """The low end of a SiLU is at -0.2785 at most, whatever the high end is."""
    stats = stats_of(silu(np.random.default_rng(5).normal(size=40000) * 8))
    for scheme in SCHEMES:
        low, high = activation_range(stats, scheme)
        assert -0.2785 < low <= 0
        (zero,) = params(low, high).zero_point
        assert zero <= -128 + math.ceil(0.2785 * 255 / high) + 1


def test_percentile_is_that_of_the_values():
    for kind in ("normal", "relu", "far", "laplace", "uniform", "outliers"):  # smooth inside a bin
        values = shapes(6)[kind]
        stats = stats_of(values)
        low, high = activation_range(stats, "percentile:99")
        inside = [0.005 if low < 0 else 0, 0.005 if high > 0 else 0]
        assert np.mean(values < low) == pytest.approx(inside[0], abs=3e-4), kind
        assert np.mean(values > high) == pytest.approx(inside[1], abs=3e-4), kind
    assert activation_range(stats, "percentile:100") == activation_range(stats, "minmax")


# --- entropy -------------------------------------------------------------------------------------


def entropy_reference(counts: np.ndarray, levels: int, floor: float = 1e-4) -> int:
    """Migacz's loop as it is written down, a threshold at a time."""
    best, found = math.inf, counts.size
    for i in range(levels, counts.size + 1):
        if counts[i:].sum() > ENTROPY_TAIL * counts.sum():
            continue
        p = counts[:i].copy()
        p[-1] += counts[i:].sum()
        q = np.zeros(i)
        for level in range(levels):
            part = slice(level * i // levels, (level + 1) * i // levels)
            used = counts[part] > 0
            if used.any():
                q[part][used] = counts[part].sum() / used.sum()
        p, q = p / p.sum(), q / q.sum()
        lone = (p > 0) & (q == 0)
        p, q = p + floor * lone, q + floor * lone
        p, q = p / p.sum(), q / q.sum()
        some = p > 0
        divergence = float(np.sum(p[some] * np.log(p[some] / q[some])))
        if divergence < best - 1e-12:
            best, found = divergence, i
    return found


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([8, 32, 128]), st.floats(0.2, 3), st.floats(0, 0.6))
def test_entropy_finds_what_the_plain_loop_finds(seed, levels, decay, empty):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(levels, 3 * levels + 60))
    counts = np.floor(1000 * np.exp(-decay * 4 * np.arange(n) / n) * rng.random(n)) * (rng.random(n) >= empty)
    counts[0] += 1
    counts[-1] += 1
    assert entropy_bins(counts, levels) == entropy_reference(counts, levels)


def test_entropy_drops_outliers():
    """A normal distribution with 0.01 % of outliers at twice its end: they are clipped."""
    rng = np.random.default_rng(8)
    values = np.concatenate([rng.normal(size=200_000), np.full(20, 8.7)])
    low, high = activation_range(stats_of(values), "entropy", symmetric=True)
    assert 3 < high < 5 and low == -high


def test_entropy_ignores_exact_zeros():
    rng = np.random.default_rng(9)
    some = np.abs(rng.normal(size=100_000))
    with_zeros = np.concatenate([some, np.zeros(10**6)])
    counts, width = magnitudes(stats_of(with_zeros))
    plain, same_width = magnitudes(stats_of(some))
    assert width == same_width and np.array_equal(counts, plain)
    assert activation_range(stats_of(with_zeros), "entropy") == activation_range(stats_of(some), "entropy")


def test_magnitudes_fold_both_sides():
    rng = np.random.default_rng(10)
    for shift in (0, 50, -50):
        values = (rng.normal(size=5000) + shift).astype(np.float32)
        counts, width = magnitudes(stats_of(values))
        want = np.bincount((np.abs(values.astype(np.float64)) / width).astype(int), minlength=counts.size)
        assert counts.sum() == 5000
        # a negative value on an edge lies in the bin above it
        assert np.abs(np.cumsum(counts) - np.cumsum(want)).max() <= 1


def test_entropy_never_clips_nearly_everything():
    """All values far from zero: the first bins are empty, and their divergence says nothing."""
    low, high = activation_range(stats_of(np.random.default_rng(11).uniform(0.15, 1, 100_000)), "entropy")
    assert low == 0 and high > 0.85


# --- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("number", [0.0, 5.0, -1e-3, 1e-30, -3e20])
def test_a_value_that_never_changes(scheme, number):
    stats = stats_of(np.full((1, 4, 3), number))
    low, high = activation_range(stats, scheme)
    real = float(np.float32(number))
    assert low == pytest.approx(min(real, 0), rel=0.3) and high == pytest.approx(max(real, 0), rel=0.3)
    p = params(low, high)
    assert rounded(np.array([real]), p, False) == pytest.approx(real, rel=0.3, abs=1e-29)


@pytest.mark.parametrize(
    "scheme", ["max", "", "percentile:5", "percentile:x", "percentile:nan", "mse:3", "MSE"]
)
def test_unknown_schemes(scheme):
    with pytest.raises(UsageError, match="scheme"):
        activation_range(stats_of(np.arange(10)), scheme)


def test_channel_ranges_hold_zero():
    values = np.stack([np.linspace(1, 2, 8), np.linspace(-3, -1, 8), np.linspace(-1, 1, 8)])[None]
    low, high = channel_ranges(stats_of(values))
    assert low.tolist() == [0, -3, -1] and high.tolist() == [2, 0, 1]


@settings(max_examples=200)
@given(st.floats(-(2.0**60), 0, width=32), st.floats(0, 2.0**60, width=32), st.booleans())
def test_params_cover_their_range(low, high, symmetric):
    p = params(low, high, symmetric)
    assert p.scale[0] == float(np.float32(p.scale[0]))
    assert p.zero_point[0] == 0 or not symmetric
    ends = covered(p)
    assert ends[0] <= low + 0.51 * p.scale[0] and ends[1] >= high - 0.51 * p.scale[0]


def test_params_of_what_is_no_range():
    with pytest.raises(ValueError, match="finite"):
        params(0.0, math.inf)
