"""What calibration keeps of a value: one histogram, its ends, and figures per channel.

Bins have a width of 2**k and lie on the grid of its multiples, so zero is always an edge. When the
range outgrows BINS bins, k grows by one and neighbours merge: bin floor(x / 2w) is exactly the union
of two bins floor(x / w). So nothing is clipped or read again, and the counts depend on the values
alone: not on the order of the pictures and not on how they were fetched.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BINS = 2048
_BLOCK = 1 << 16
"""Elements handled at a time, so that the scratch arrays stay in the cache of the CPU."""
_DEPTH = 22
"""Bins are at least 2**-22 of the largest magnitude: bin numbers stay exact in float32."""
_WIDE = 2.0**50
"""Sums of squares of larger numbers leave float32."""
_LEAST = -100
"""Smallest exponent of a bin width, for values that are all (nearly) zero."""


@dataclass(frozen=True, eq=False)
class TensorStats:
    """Figures of one value over all calibration pictures.

    counts: int64[2048] over bins [bin_low + i * bin_width, bin_low + (i + 1) * bin_width).
    channel_*: float32[C] along axis 1, empty for rank < 2. image_*: float32[pictures], in order.
    count: elements seen, zeros: how many of them were exactly zero; mean_square: mean of x**2.
    """

    low: float
    high: float
    bin_low: float
    bin_width: float
    counts: np.ndarray
    channel_low: np.ndarray
    channel_high: np.ndarray
    channel_mean: np.ndarray
    image_low: np.ndarray
    image_high: np.ndarray
    count: int
    zeros: int
    mean: float
    mean_square: float

    @property
    def edges(self) -> np.ndarray:
        """The ends of all bins, float64[2049]."""
        return self.bin_low + self.bin_width * np.arange(BINS + 1)


Stats = Mapping[str, TensorStats]
"""By value name of the prepared graph."""


def exponent(low: float, high: float) -> int:
    """The smallest k for which bins of width 2**k that hold `low` and `high` are at most BINS apart."""
    top = max(abs(low), abs(high))
    k = _LEAST
    if high > low:
        k = max(k, math.frexp((high - low) / BINS)[1] - 2)
    if top > 0:
        k = max(k, math.frexp(top)[1] - _DEPTH)
    while math.floor(math.ldexp(high, -k)) - math.floor(math.ldexp(low, -k)) >= BINS:
        k += 1
    return k


class Accumulator:
    """Gathers TensorStats of one value, a picture at a time."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self.exponent, self.base = _LEAST, 0
        self.counts = np.zeros(BINS, np.int64)
        self.count = self.zeros = 0
        self.sums = np.zeros((2, 2))
        """Sum of x and of x**2, each as an unevaluated sum of two floats."""
        self.channel_low = self.channel_high = np.zeros(0, np.float32)
        self.channel_sums = np.zeros((2, 0))
        self.image_low: list[float] = []
        self.image_high: list[float] = []

    def add(self, array: np.ndarray) -> bool:
        """Take one picture's value, float of any shape with at least one element.

        Returns: False, with nothing taken, when it holds a NaN or an infinity.
        """
        data = np.ascontiguousarray(array, np.float32)
        rows = data.reshape(data.shape[0], data.shape[1], -1) if data.ndim >= 2 else data.reshape(1, 1, -1)
        # reduce the longest, contiguous axis first: it is the fast one
        lows, highs = (f(f(rows, axis=2), axis=0) for f in (np.min, np.max))
        low, high = float(lows.min()), float(highs.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            return False
        sums = rows.sum(axis=2, dtype=np.float32).sum(axis=0, dtype=np.float64)
        if data.ndim >= 2:
            if not self.channel_low.size:
                self.channel_low, self.channel_high = lows, highs
                self.channel_sums = np.zeros((2, lows.size))
            else:
                self.channel_low = np.minimum(self.channel_low, lows)
                self.channel_high = np.maximum(self.channel_high, highs)
            self.channel_sums = _two_sum(self.channel_sums, sums)
        self._grow(min(self.low, low), max(self.high, high))
        square = self._count(data.reshape(-1), wide=max(-low, high) > _WIDE)
        self.sums = _two_sum(self.sums, np.array([math.fsum(sums), square]))
        self.count += data.size
        self.image_low.append(low)
        self.image_high.append(high)
        return True

    def _grow(self, low: float, high: float) -> None:
        """Make room for values from low to high."""
        if (low, high) == (self.low, self.high):
            return
        k = max(exponent(low, high), self.exponent)
        base = math.floor(math.ldexp(low, -k))
        used = np.flatnonzero(self.counts)
        if used.size and (k, base) != (self.exponent, self.base):
            moved = ((used + self.base) >> (k - self.exponent)) - base
            counts = np.zeros(BINS, np.int64)
            np.add.at(counts, moved, self.counts[used])
            self.counts = counts
        self.low, self.high, self.exponent, self.base = low, high, k, base

    def _count(self, values: np.ndarray, wide: bool) -> float:
        """Count float32[n] into the bins; the sum of squares."""
        size = min(_BLOCK, values.size)
        # by this picture alone, not by those before it: else their order would show
        squares = np.empty(size, np.float64 if wide else np.float32)
        # scaled down, a tiny negative number would vanish in float32 and land above zero
        scaled = np.empty(size, np.float64 if self.exponent > 0 else np.float32)
        index = np.empty(size, np.intp)
        scale, base = scaled.dtype.type(math.ldexp(1.0, -self.exponent)), scaled.dtype.type(self.base)
        square = 0.0
        for start in range(0, values.size, size):
            block = values[start : start + size]
            f, g, i = squares[: block.size], scaled[: block.size], index[: block.size]
            np.multiply(block, block, out=f, dtype=f.dtype)
            square += float(f.sum())
            self.zeros += block.size - int(np.count_nonzero(block))
            np.multiply(block, scale, out=g, dtype=g.dtype)
            np.floor(g, out=g)
            np.subtract(g, base, out=g)
            np.copyto(i, g, casting="unsafe")
            self.counts += np.bincount(i, minlength=BINS)
        return square

    def stats(self) -> TensorStats:
        """What was gathered; at least one picture."""
        assert self.count
        width = math.ldexp(1.0, self.exponent)
        mean, mean_square = self.sums.sum(axis=0) / self.count
        channels = self.channel_low.size
        means = self.channel_sums.sum(axis=0) / (self.count / max(channels, 1))
        return TensorStats(
            low=self.low,
            high=self.high,
            bin_low=self.base * width,
            bin_width=width,
            counts=self.counts,
            channel_low=self.channel_low,
            channel_high=self.channel_high,
            channel_mean=means.astype(np.float32),
            image_low=np.array(self.image_low, np.float32),
            image_high=np.array(self.image_high, np.float32),
            count=self.count,
            zeros=self.zeros,
            mean=float(mean),
            mean_square=float(mean_square),
        )


def _two_sum(total: np.ndarray, term: np.ndarray) -> np.ndarray:
    """total[0] + total[1] + term as such a pair again (Knuth's TwoSum): sums then do not show their order."""
    high = total[0] + term
    virtual = high - total[0]
    error = (total[0] - (high - virtual)) + (term - virtual)
    return np.stack([high, total[1] + error])


# --- to bytes and back ---------------------------------------------------------------------------

_ARRAYS = ("counts", "ends", "grid", "totals", "sums", "channels", "channel_low", "channel_high")
_MORE = ("channel_sums", "image_low", "image_high")


def pack(accumulators: Sequence[Accumulator]) -> bytes:
    """The state of some accumulators over the same pictures, as an .npz file without pickle."""
    every = list(accumulators)
    arrays = {
        "counts": np.stack([a.counts for a in every]),
        "ends": np.array([(a.low, a.high) for a in every]),
        "grid": np.array([(a.exponent, a.base) for a in every], np.int64),
        "totals": np.array([(a.count, a.zeros) for a in every], np.int64),
        "sums": np.stack([a.sums for a in every]),
        "channels": np.array([a.channel_low.size for a in every], np.int64),
        "channel_low": np.concatenate([a.channel_low for a in every]),
        "channel_high": np.concatenate([a.channel_high for a in every]),
        "channel_sums": np.concatenate([a.channel_sums for a in every], axis=1),
        "image_low": np.array([a.image_low for a in every]),
        "image_high": np.array([a.image_high for a in every]),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def unpack(data: bytes, count: int) -> list[Accumulator] | None:
    """The `count` accumulators in `data`, None when it holds something else."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*_ARRAYS, *_MORE)}
        ends = np.cumsum(arrays["channels"])
        found = []
        for i in range(count):
            a = Accumulator()
            a.counts = arrays["counts"][i]
            a.low, a.high = (float(x) for x in arrays["ends"][i])
            a.exponent, a.base = (int(x) for x in arrays["grid"][i])
            a.count, a.zeros = (int(x) for x in arrays["totals"][i])
            a.sums = arrays["sums"][i]
            part = slice(int(ends[i] - arrays["channels"][i]), int(ends[i]))
            a.channel_low, a.channel_high = arrays["channel_low"][part], arrays["channel_high"][part]
            a.channel_sums = arrays["channel_sums"][:, part]
            a.image_low, a.image_high = arrays["image_low"][i].tolist(), arrays["image_high"][i].tolist()
            found.append(a)
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile):
        return None
    return found
