"""How far two networks that see from above agree: boxes found again, and the change of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgekit.tasks.fusion.boxes import Boxes3D

MATCH_M = 0.5
"""The strictest distance at which the metric takes a box for found."""
AGREEMENT_PAIRS = 400


def agreement(pairs: Sequence[tuple[Boxes3D, Boxes3D]]) -> dict[str, Any]:
    """How many boxes of the float network the payload finds (same class, centres within 0.5 m from above, the nearest
    one that is free), at what score, and how far off.

    Keys: those of `tasks.Task.agreement` with the unit `boxes`, and centre_shift_mean, centre_shift_max (metres).
    """
    scores: list[list[float]] = []
    apart: list[float] = []
    wanted = found = 0
    lost = 0.0
    for reference, candidate in pairs:
        wanted += len(reference)
        free = np.ones(len(candidate), bool)
        way = reference.boxes[:, None, :2].astype(np.float64) - candidate.boxes[None, :, :2]
        distance = np.sqrt((way * way).sum(axis=2))
        for i in range(len(reference)):
            ok = free & (candidate.classes == reference.classes[i]) & (distance[i] <= MATCH_M)
            if ok.any():
                j = int(np.argmin(np.where(ok, distance[i], np.inf)))
                free[j] = False
                found += 1
                scores.append([float(reference.scores[i]), float(candidate.scores[j])])
                apart.append(float(distance[i, j]))
            else:
                lost = max(lost, float(reference.scores[i]))
    shift = np.array([got - ref for ref, got in scores])
    return {
        "images": len(pairs),
        "unit": "boxes",
        "boxes_reference": wanted,
        "boxes_matched": found,
        "boxes_payload": sum(len(candidate) for _, candidate in pairs),
        "score_shift_mean": float(shift.mean()) if found else None,
        "score_shift_max": float(np.abs(shift).max()) if found else None,
        "centre_shift_mean": float(np.mean(apart)) if found else None,
        "centre_shift_max": max(apart) if found else None,
        "lost_score_max": lost if found < wanted else None,
        "pairs": [[round(a, 4), round(b, 4)] for a, b in scores[:AGREEMENT_PAIRS]],
    }
