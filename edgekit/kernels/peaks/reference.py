"""Peaks of heat maps in numpy: the definition that the native and the CUDA kernel follow bit for bit.

Everything is compared as logits, so that no two values become equal by saturation, and a sigmoid is computed for the
peaks alone. A cell of class c is a candidate where its logit is finite and at least `cutoff(threshold)`, the least
float32 whose score reaches the threshold (and is above 0). With window 1 every candidate is a peak. With window 3 it
must be greater than its neighbours in reading order before it (the row above, the cell to the left) and not less than
those after it: of a plateau only its first cells stay, which matters where the map comes from 8-bit codes. Cells beyond
the edge do not count; NaN and -inf are less than all. Peaks are ordered by falling logit, equal ones by class, row,
column, and cut to `limit`. Score: 1 / (1 + exp(-logit)), float64 rounded to float32.

What published code does instead. CenterNet: 3x3 max pooling of the sigmoid with equality, so all cells of a plateau stay
(and all neighbours above logit 17, where float32 sigmoids are 1). TransFusion in BEVFusion: the same, but pooling
without padding, so that a cell on the outermost ring is never a peak of a 3x3 class; pedestrians and cones have
window 1; the threshold comes after the transformer. CenterPoint and mmdet3d's CenterHead: no local maximum (window 1
here), NMS removes the neighbours. Their top k ties depend on the sort.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from edgekit.kernels.decode.reference import sigmoid

LEAST_SCORE = float(np.finfo(np.float32).smallest_subnormal)


def scores_of(logits: np.ndarray) -> np.ndarray:
    """float32 -> float32"""
    result: np.ndarray = sigmoid(logits.astype(np.float64)).astype(np.float32)
    return result


@functools.lru_cache(maxsize=64)
def cutoff(threshold: float) -> float:
    """The least float32 logit with score >= `threshold`, and above 0: found by halving, as scores rise with logits."""
    wanted = np.float32(max(threshold, LEAST_SCORE))
    low, high = _place(-200.0), _place(40.0)  # score 0; score 1
    while high - low > 1:
        middle = (low + high) // 2
        if scores_of(np.array([_at(middle)]))[0] >= wanted:
            high = middle
        else:
            low = middle
    return float(_at(high))


def _place(value: float) -> int:
    """Where a float32 stands among all, 0.0 at 0."""
    bits = int(np.array(value, np.float32).view(np.int32))
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


def _at(place: int) -> np.float32:
    value = np.float32(np.array(abs(place), np.int32).view(np.float32))
    return value if place >= 0 else np.float32(-value)


def candidates(heat: np.ndarray, windows: np.ndarray, low: float) -> np.ndarray:
    """Flat indices of the peaks, in any order."""
    _, height, width = heat.shape
    ok = (heat >= np.float32(low)) & np.isfinite(heat)
    around = np.pad(heat, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    best = np.ones(heat.shape, bool)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            other = around[:, 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
            if (dy, dx) < (0, 0):
                best &= ~(other >= heat)
            elif (dy, dx) > (0, 0):
                best &= ~(other > heat)
    return np.flatnonzero(ok & (best | (windows == 1)[:, None, None]))


def peaks(
    heat: np.ndarray, maps: Sequence[np.ndarray], windows: np.ndarray, threshold: float, limit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores float32 [n], (class, row, column) int32 [n, 3], values of all maps there float32 [n, channels]."""
    index = candidates(heat, windows, cutoff(threshold))
    logits = heat.reshape(-1)[index]
    order = np.argsort(-logits, kind="stable")[:limit]
    index, logits = index[order], logits[order]
    cells = np.stack(np.unravel_index(index, heat.shape), axis=1).astype(np.int32)
    columns = [values[:, cells[:, 1], cells[:, 2]].T for values in maps]
    values = np.concatenate([np.zeros((len(cells), 0), np.float32), *columns], axis=1)
    return scores_of(logits), cells, np.ascontiguousarray(values)
