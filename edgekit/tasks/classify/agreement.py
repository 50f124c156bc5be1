"""How far two classifiers agree: same best class, and the change of its score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgekit.tasks.classify.classification import Classification

PAIRS = 400


def agreement(pairs: Sequence[tuple[Classification, Classification]]) -> dict[str, Any]:
    """How many pictures get the same best class, and how the score of the float network's best class moves."""
    return of_scores([(first.all_scores, second.all_scores) for first, second in pairs])


def of_scores(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """`agreement` of scores [C] of (float network, payload), one pair per picture.

    Of a picture whose answer changed, half the float network's lead of its best class over the
    second counts as lost: one of two scores moved by at least that.
    """
    scores: list[list[float]] = []
    matched = 0
    lost: float | None = None
    for want, got in pairs:
        best = int(np.argmax(want))
        scores.append([float(want[best]), float(got[best])])
        if int(np.argmax(got)) == best:
            matched += 1
            continue
        lead = float(want[best] - np.delete(want, best).max())
        lost = max(lost or 0.0, lead / 2)
    shift = np.array([got - want for want, got in scores])
    return {
        "images": len(pairs),
        "unit": "answers",
        "answers_reference": len(pairs),
        "answers_matched": matched,
        "answers_payload": len(pairs),
        "score_shift_mean": float(shift.mean()) if len(shift) else None,
        "score_shift_max": float(np.abs(shift).max()) if len(shift) else None,
        "lost_score_max": lost,
        "pairs": [[round(a, 4), round(b, 4)] for a, b in scores[:PAIRS]],
    }
