"""Intervals of a measured share: how much of it is the choice of pictures."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def interval95(values: Iterable[float | None]) -> tuple[float, float] | None:
    """The middle 95 % of bootstrap values; None when there are none (objects so rare that no round drew one)."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    low, high = np.percentile(known, [2.5, 97.5])
    return round(float(low), 4), round(float(high), 4)
