"""From a histogram to the range that int8 codes cover, and from a range to scale and zero point.

Schemes: `minmax`, `percentile:99.99`, `entropy` (Migacz, "8-bit Inference with TensorRT", GTC 2017)
and `mse` (the two ends that minimise the expected squared error, rounding and clipping together).
"""

from __future__ import annotations

import functools
import math

import numpy as np

from edgekit.errors import UsageError
from edgekit.quant.stats import BINS, TensorStats
from edgekit.spec import DType, QuantParams

SCHEMES = ("minmax", "percentile", "entropy", "mse")
DEFAULT_PERCENTILE = 99.99
MIN_SCALE = 1e-30
"""Keeps scale * scale of an (almost) dead value a normal float32 number in the few places that form it."""
ENTROPY_LEVELS = 128
"""Codes on one side of zero that Migacz's method merges the histogram to."""
ENTROPY_DISTINCT = 128
"""With fewer occupied bins of |x| (distinct values, as far as a histogram tells) the divergence says little:
percentile instead."""
ENTROPY_TAIL = 0.1
"""A threshold that clips more than this share of the values is none: where all values lie far from zero,
the divergence of a few empty bins with everything clipped into the last is nil."""
MSE_STEPS = 12
MSE_GAIN = 0.01
"""Clip only where it lowers the expected error by more than this share: data that was not seen is larger."""


@functools.lru_cache(maxsize=8192)
def activation_range(stats: TensorStats, scheme: str, symmetric: bool = False) -> tuple[float, float]:
    """(low, high) to quantize a value with, low <= 0 <= high.

    scheme: "minmax", "percentile" (99.99) or "percentile:P", "entropy", "mse". symmetric: low = -high.
    Raises: UsageError for an unknown scheme.
    """
    name, _, argument = scheme.partition(":")
    if name not in SCHEMES or (argument and name != "percentile"):
        raise UsageError(f"scheme {scheme!r}: unknown, expected one of {', '.join(SCHEMES)} or percentile:P")
    if name == "minmax":
        low, high = stats.low, stats.high
    elif name == "percentile":
        low, high = _percentile(stats, _share(argument, scheme))
    elif name == "entropy":
        low, high = _entropy(stats, symmetric)
    else:
        low, high = _mse(stats, symmetric)
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    return low, high


def channel_ranges(stats: TensorStats) -> tuple[np.ndarray, np.ndarray]:
    """Min-max per channel (axis 1), zero included: (low, high) float32[C]."""
    return np.minimum(stats.channel_low, 0), np.maximum(stats.channel_high, 0)


def params(low: float, high: float, symmetric: bool = False) -> QuantParams:
    """Canonical int8 params (see `annotate`) for a range that holds zero; zero has a code of its own.

    Asymmetric: 256 codes over [low, high], the zero point rounded, so that an end may move by half a
    step. Symmetric: codes -127..127 over [-m, m], m the larger magnitude. The scale is a float32 number.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"a range must be finite, got {low} to {high}")
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        scale = _scale(max(-low, high) / 127)
        return QuantParams(DType.int8, (scale,), (0,))
    scale = _scale((high - low) / 255)
    zero = min(127, max(-128, round(-128 - low / scale)))
    return QuantParams(DType.int8, (scale,), (zero,))


def _scale(value: float) -> float:
    return float(np.float32(max(value, MIN_SCALE))) if value > 0 else 1.0


def covered(params: QuantParams) -> tuple[float, float]:
    """The real numbers behind the codes -128 (or -127 at zero point 0) and 127 of a per-tensor value."""
    (scale,), (zero,) = params.scale, params.zero_point
    return scale * (-128 - zero), scale * (127 - zero)


# --- percentile ----------------------------------------------------------------------------------


def _share(argument: str, scheme: str) -> float:
    try:
        percent = float(argument) if argument else DEFAULT_PERCENTILE
    except ValueError:
        percent = math.nan
    if not 50 < percent <= 100:
        raise UsageError(
            f"scheme {scheme!r}: expected a percentile above 50 and up to 100, e.g. percentile:99.99"
        )
    return percent / 100


def _percentile(stats: TensorStats, share: float) -> tuple[float, float]:
    """The ends that leave (1 - share) / 2 of the values outside on each side, linear inside a bin."""
    total = np.concatenate([[0.0], np.cumsum(stats.counts, dtype=np.float64)]) / stats.count
    tail = (1 - share) / 2
    low, high = np.interp([tail, 1 - tail], total, stats.edges)
    # interpolation takes the outermost bins as full up to their edges
    return max(float(low), stats.low), min(float(high), stats.high)


# --- entropy -------------------------------------------------------------------------------------


def magnitudes(stats: TensorStats) -> tuple[np.ndarray, float]:
    """Histogram of |x| without exact zeros: (counts float64[n <= 2048], bin width)."""
    first = round(stats.bin_low / stats.bin_width)
    bins = first + np.arange(BINS)
    folded = np.where(bins >= 0, bins, -1 - bins)
    counts = stats.counts.astype(np.float64)
    if first <= 0 < first + BINS:
        counts[-first] -= stats.zeros
    used = np.flatnonzero(counts)
    if not used.size:
        return np.zeros(1), stats.bin_width
    merge = 0
    while folded[used].max() >> merge >= BINS:
        merge += 1
    folded = folded >> merge
    return np.bincount(folded[used], weights=counts[used]), stats.bin_width * 2**merge


def _entropy(stats: TensorStats, symmetric: bool) -> tuple[float, float]:
    """Clip |x| where the divergence from the histogram to its quantized self is smallest.

    A value that is never negative has all 256 codes on one side, unless it is to be symmetric.
    """
    counts, width = magnitudes(stats)
    if np.count_nonzero(counts) < ENTROPY_DISTINCT:
        return _percentile(stats, DEFAULT_PERCENTILE / 100)
    levels = ENTROPY_LEVELS if symmetric or stats.low < 0 else 2 * ENTROPY_LEVELS
    bins = entropy_bins(counts, levels)
    threshold = (bins + 0.5) * width if bins < counts.size else max(-stats.low, stats.high)
    return max(stats.low, -threshold), min(stats.high, threshold)


def entropy_bins(counts: np.ndarray, levels: int = ENTROPY_LEVELS, floor: float = 1e-4) -> int:
    """How many bins of |x| to keep: argmin over i of KL(P_i || Q_i), the smallest on ties.

    P_i: the first i bins, all beyond added to the last. Q_i: the first i bins as they are, merged to
    `levels` groups, each spread evenly over those of its bins that are not empty. Where Q is empty
    and P is not (only the last bin can be so, by the tail), `floor` is added to both shares. Only i
    with a tail of at most ENTROPY_TAIL count.

    All i at once: with p log p in prefix sums, KL needs of each i only its groups' sums and sizes.
    """
    n = counts.size
    if n <= levels:
        return n
    sizes = np.arange(levels, n + 1)
    mass, filled, entropy = (
        np.concatenate([[0.0], np.cumsum(x)]) for x in (counts, counts > 0, _xlogx(counts))
    )
    total = mass[-1]
    bounds = np.arange(levels + 1)[None, :] * sizes[:, None] // levels
    merged, occupied = (np.diff(x[bounds], axis=1) for x in (mass, filled))
    last, kept = counts[sizes - 1], mass[sizes]
    tail = total - kept
    lone = (last == 0) & (tail > 0)
    # sum of p log p, the last bin with its tail; sum of p log q, q = merged / occupied in each group
    plogp = entropy[sizes] - _xlogx(last) + np.where(lone, 0.0, _xlogx(last + tail))
    level = np.log(np.divide(merged, occupied, out=np.ones_like(merged), where=merged > 0))
    plogq = (merged * level).sum(axis=1) + np.where(lone, 0.0, tail * level[:, -1])
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(lone, kept, total)  # of P that the sums above cover
        divergence = (plogp - plogq + shares * np.log(kept / total)) / total
        p = tail / total + floor
        divergence = np.where(lone, (divergence + p * np.log(p / floor)) / (1 + floor), divergence)
    divergence[tail > ENTROPY_TAIL * total] = np.inf
    return int(sizes[np.flatnonzero(divergence <= divergence.min() + 1e-12)[0]])


def _xlogx(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = x * np.log(np.where(x > 0, x, 1.0))
    return result


# --- mean squared error --------------------------------------------------------------------------


def expected_error(stats: TensorStats, params: QuantParams) -> float:
    """Mean squared error of rounding the values to the codes of `params`, clipping included.

    Values are taken as uniform within their bin, exact zeros as zero; the integral over each bin is
    exact (the error of rounding is a sawtooth, beyond the ends a parabola), so steps may be finer
    than bins.
    """
    (scale,), (zero,) = params.scale, params.zero_point
    low = scale * ((-127 if zero == 0 else -128) - zero)
    return float(_errors(stats, np.array([scale]), np.array([low]), np.array([scale * (127 - zero)]))[0])


def _errors(stats: TensorStats, scale: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Expected squared error for K grids of multiples of `scale` from `low` to `high`, each float64[K]."""
    used = np.flatnonzero(stats.counts)
    first, last = int(used[0]), int(used[-1]) + 1
    counts = stats.counts[first:last].astype(np.float64)
    edges = stats.edges[first : last + 1]
    # the outermost bins are filled only up to the ends of the data, which may be one number
    tiny = stats.bin_width * 1e-3
    edges[0] = min(max(edges[0], stats.low), edges[1] - tiny)
    edges[-1] = max(min(edges[-1], stats.high), edges[-2] + tiny)
    zero = round(-stats.bin_low / stats.bin_width) - first
    if 0 <= zero < counts.size:
        counts[zero] -= stats.zeros
    s, a, b = scale[:, None], low[:, None], high[:, None]
    x = edges[None, :]
    inside = np.minimum(np.maximum(x, a), b)
    steps = np.rint(inside * (1 / s))
    rest = inside - steps * s
    # integral of the squared rounding error from 0 to `inside`, then of the clipping error beyond
    beyond = x - inside
    total = steps * (s * s * s / 12)
    total += rest * rest * rest / 3
    total += beyond * beyond * beyond / 3
    widths = np.diff(edges)
    share = np.divide(counts, widths, out=np.zeros_like(counts), where=widths > 0)
    errors: np.ndarray = np.diff(total, axis=1) @ share / stats.count
    return errors


def _mse(stats: TensorStats, symmetric: bool) -> tuple[float, float]:
    """The ends with the least expected error, searched from coarse to fine, one end at a time."""
    low, high = min(stats.low, 0.0), max(stats.high, 0.0)
    if low == high:
        return low, high

    def errors(lows: np.ndarray, highs: np.ndarray) -> np.ndarray:
        if symmetric:
            scale = np.maximum(-lows, highs) / 127
            return _errors(stats, scale, -127 * scale, 127 * scale)
        scale = (highs - lows) / 255
        zero = np.clip(np.rint(-128 - lows / scale), -128, 127)
        return _errors(stats, scale, (-128 - zero) * scale, (127 - zero) * scale)

    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    start = float(errors(np.array([low]), np.array([high]))[0])
    best = (start, low, high)
    full = low, high
    span = 1.0
    """Candidates: from the current end times (1 - span) to times (1 + span), never beyond the data."""
    for _ in range(4):
        for end in (1,) if symmetric else (1, 0):
            _, a, b = best
            factor = np.linspace(1 - span, 1 + span, 2 * MSE_STEPS + 1)
            if end:
                highs = np.minimum(b * factor, full[1])
                lows = -highs if symmetric else np.full_like(highs, a)
            else:
                lows = np.maximum(a * factor, full[0])
                highs = np.full_like(lows, b)
            keep = highs - lows > (full[1] - full[0]) * 1e-3
            if not keep.any():
                continue
            lows, highs = lows[keep], highs[keep]
            found = errors(lows, highs)
            i = int(np.argmin(found))
            if found[i] < best[0]:
                best = (float(found[i]), float(lows[i]), float(highs[i]))
        span /= 4
    return (best[1], best[2]) if best[0] < start * (1 - MSE_GAIN) else full
