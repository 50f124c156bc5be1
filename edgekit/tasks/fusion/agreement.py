"""How far two networks that see from above agree: boxes found again, and the change of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgekit.tasks.agreement import found_again
from edgekit.tasks.fusion.boxes import Boxes3D

MATCH_M = 0.5
"""The strictest distance at which the metric takes a box for found."""


def agreement(pairs: Sequence[tuple[Boxes3D, Boxes3D]]) -> dict[str, Any]:
    """How many boxes of the float network the payload finds (same class, centres within 0.5 m from above, the nearest
    one that is free), at what score, and how far off.

    Keys: those of `tasks.Task.agreement` with the unit `boxes`, and centre_shift_mean, centre_shift_max (metres).
    """
    keys, close = found_again(pairs, _nearness, -MATCH_M)
    apart = [-value for value in close]
    return keys | {
        "centre_shift_mean": float(np.mean(apart)) if apart else None,
        "centre_shift_max": max(apart) if apart else None,
    }


def _nearness(a: Boxes3D, b: Boxes3D) -> np.ndarray:
    """Minus the metres between centres, seen from above, [len(a), len(b)]."""
    way = a.boxes[:, None, :2].astype(np.float64) - b.boxes[None, :, :2]
    distance: np.ndarray = np.sqrt((way * way).sum(axis=2))
    return -distance
