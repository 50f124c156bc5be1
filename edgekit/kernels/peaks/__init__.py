"""Peaks of heat maps: what a head that predicts object centres is decoded from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekit import kernels
from edgekit.errors import UsageError
from edgekit.kernels.peaks import reference


@dataclass(frozen=True)
class Peaks:
    """n peaks, best first.

    scores: float32 [n].  cells: int32 [n, 3], class, row, column.  values: float32 [n, channels], the other maps
    at the peak's cell, channel by channel in the order given.
    """

    scores: np.ndarray
    cells: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)


def peaks(
    heat: np.ndarray,
    maps: Sequence[np.ndarray] = (),
    *,
    threshold: float,
    limit: int,
    window: int | Sequence[int] = 3,
) -> Peaks:
    """The best `limit` local maxima of `heat` with score >= `threshold`, and the values of `maps` there.

    heat: float32 [C, H, W], logits.  maps: float32 [channels, H, W] each, raw.  window: 3 = a peak is the greatest of
    its 3 x 3 cells, 1 = every cell is one; for all classes or one per class.  threshold: 0..1, of the sigmoid.
    Ties: class, row, column. reference.py states the rule.
    Raises: UsageError for arrays of another shape or dtype, or arguments out of range.
    """
    if heat.ndim != 3 or heat.dtype != np.float32:
        raise UsageError(f"peaks: heat map: expected float32 [C, H, W], got {heat.dtype} {list(heat.shape)}.")
    for values in maps:
        if values.ndim != 3 or values.shape[1:] != heat.shape[1:] or values.dtype != np.float32:
            raise UsageError(
                f"peaks: map: expected float32 [channels, {heat.shape[1]}, {heat.shape[2]}], "
                f"got {values.dtype} {list(values.shape)}."
            )
    if not 0 <= threshold <= 1 or limit < 1:
        raise UsageError(f"peaks: expected threshold in 0..1 and limit at least 1, got {threshold}, {limit}.")
    if heat.size >= 2**31:
        raise UsageError(f"peaks: heat map: expected less than 2^31 cells, got {heat.size}.")
    windows = (
        np.full(len(heat), window, np.int32) if isinstance(window, int) else np.asarray(window, np.int32)
    )
    if windows.shape != (len(heat),) or not set(windows.tolist()) <= {1, 3}:
        raise UsageError(f"peaks: window: expected 1 or 3, for all or one per class, got {window}.")
    module = kernels.native()
    if module is None:
        return Peaks(*reference.peaks(heat, maps, windows, threshold, limit))
    most = min(limit, heat.size)
    scores, cells = np.empty(most, np.float32), np.empty((most, 3), np.int32)
    values = np.empty((most, sum(len(m) for m in maps)), np.float32)
    contiguous = [np.ascontiguousarray(m) for m in maps]
    low = reference.cutoff(threshold)
    count = module.peaks(np.ascontiguousarray(heat), contiguous, windows, low, limit, scores, cells, values)
    return Peaks(scores[:count], cells[:count], values[:count])
