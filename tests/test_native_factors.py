"""Multipliers whose fixed-point product makes the codes of the floating-point one: by what the two definitions say of single sums."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.backends.native.factors import MOST, sums, with_same_steps


def codes(of: np.ndarray, multiplier: np.float32, zero: int) -> np.ndarray:
    return np.clip(np.rint(of.astype(np.float32) * multiplier) + zero, 0, 255)


def fixed(of: np.ndarray, multiplier: np.float32, zero: int) -> np.ndarray:
    """As aarch64's sqrdmulh: 2 * sum * factor in 64 bits, half added, the high half."""
    factor = int(np.rint(np.float64(multiplier) * 2**31))
    return np.clip(((2 * of * factor + 2**31) >> 32) + zero, 0, 255)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.floats(-10, -0.5), st.integers(0, 255))
def test_every_sum_has_the_same_code(seed: int, power: float, zero: int) -> None:
    rng = np.random.default_rng(seed)
    wanted = np.exp2(rng.uniform(power, 0, 3)).astype(np.float32) * np.float32(0.99)
    span = (300 / wanted).astype(np.int64)
    found = with_same_steps(wanted, zero, -span, span)
    if np.array_equal(found, wanted) and power < -9:
        return  # none was found, which is rare for such small ones
    for m, before, reach in zip(found, wanted, span, strict=True):
        assert abs(float(m) / float(before) - 1) * 256 <= MOST
        every = np.arange(-reach, reach + 1)
        assert np.array_equal(fixed(every, m, zero), codes(every, m, zero))


def test_most_multipliers_would_not_do() -> None:
    """What the search is for: taken as they come, some sum has another code."""
    rng = np.random.default_rng(0)
    every = np.arange(-200_000, 200_000)
    wrong = 0
    for m in rng.uniform(0.0005, 0.002, 50).astype(np.float32):
        wrong += not np.array_equal(fixed(every, m, 128), codes(every, m, 128))
    assert wrong > 10


def test_all_channels_or_none() -> None:
    wanted = np.array([0.01, 1.5], np.float32)
    span = np.array([10_000, 100])
    assert with_same_steps(wanted, 128, -span, span) is wanted
    none = np.zeros(1, np.float32)  # a channel without weights
    assert np.array_equal(with_same_steps(none, 128, span[:1] * 0, span[:1] * 0), none)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(0, 255))
def test_sums_stay_within(seed: int, zero: int) -> None:
    rng = np.random.default_rng(seed)
    weights, bias = rng.integers(-128, 128, (4, 3, 3)), rng.integers(-500, 500, 4)
    least, most = sums(weights, bias, zero)
    extreme = np.where(weights > 0, 255, 0)
    assert np.array_equal(most, bias + ((extreme - zero) * weights).sum((1, 2)))
    assert np.array_equal(least, bias + ((255 - extreme - zero) * weights).sum((1, 2)))
