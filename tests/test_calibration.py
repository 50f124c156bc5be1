"""Calibration: streamed statistics, independent of how and in which order values are fetched."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekit.quant.stats import BINS, Accumulator

FLOATS = st.floats(-1e6, 1e6, width=32)


def gather(pictures: list[np.ndarray]) -> Accumulator:
    accumulator = Accumulator()
    for picture in pictures:
        assert accumulator.add(picture)
    return accumulator


@settings(deadline=None, max_examples=60)
@given(st.lists(hnp.arrays(np.float32, (1, 3, 4), elements=FLOATS), min_size=1, max_size=6), st.randoms())
def test_histogram_grows_without_losing_anything(pictures, random):
    stats = gather(pictures).stats()
    every = np.concatenate([p.ravel() for p in pictures])
    assert stats.count == stats.counts.sum() == every.size
    # a one-shot histogram over the same bins, in float64
    bins = np.floor(every.astype(np.float64) / stats.bin_width) - stats.bin_low / stats.bin_width
    assert np.array_equal(np.bincount(bins.astype(int), minlength=BINS), stats.counts)
    assert (stats.low, stats.high) == (every.min(), every.max())
    shuffled = list(pictures)
    random.shuffle(shuffled)
    again = gather(shuffled).stats()
    assert np.array_equal(again.counts, stats.counts)
    assert (again.bin_low, again.bin_width) == (stats.bin_low, stats.bin_width)
