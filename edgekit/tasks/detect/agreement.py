"""How far two detectors agree: boxes found again, and the change of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgekit.tasks.detect.detections import Detections

MATCH_IOU = 0.5
AGREEMENT_PAIRS = 400


def agreement(pairs: Sequence[tuple[Detections, Detections]]) -> dict[str, Any]:
    """How many boxes of the float network the payload finds (same class, IoU >= 0.5), and at what score."""
    scores: list[list[float]] = []
    wanted = found = 0
    lost = 0.0
    for reference, candidate in pairs:
        wanted += len(reference)
        free = np.ones(len(candidate), bool)
        overlaps = _iou(reference.boxes, candidate.boxes)
        for i in range(len(reference)):
            ok = free & (candidate.classes == reference.classes[i]) & (overlaps[i] >= MATCH_IOU)
            if ok.any():
                j = int(np.argmax(np.where(ok, overlaps[i], -1)))
                free[j] = False
                found += 1
                scores.append([float(reference.scores[i]), float(candidate.scores[j])])
            else:
                lost = max(lost, float(reference.scores[i]))
    shift = np.array([got - ref for ref, got in scores]) if scores else np.zeros(0)
    return {
        "images": len(pairs),
        "unit": "boxes",
        "boxes_reference": wanted,
        "boxes_matched": found,
        "boxes_payload": sum(len(candidate) for _, candidate in pairs),
        "score_shift_mean": float(shift.mean()) if len(shift) else None,
        "score_shift_max": float(np.abs(shift).max()) if len(shift) else None,
        "lost_score_max": lost if found < wanted else None,
        "pairs": [[round(a, 4), round(b, 4)] for a, b in scores[:AGREEMENT_PAIRS]],
    }


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of every box pair, [len(a), len(b)]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = np.clip(high - low, 0, None).prod(axis=2)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(axis=1), (b[:, 2:] - b[:, :2]).prod(axis=1)
    overlap = np.asarray(inter / np.maximum(area_a[:, None] + area_b[None] - inter, 1e-9))
    # a box that the picture's edge clips to a line has no area, yet agrees with itself
    overlap[(a[:, None] == b[None]).all(axis=2)] = 1.0
    return overlap
