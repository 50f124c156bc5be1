"""How far two detectors agree: boxes found again, and the change of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgekit.tasks.agreement import found_again
from edgekit.tasks.detect.detections import Detections

MATCH_IOU = 0.5


def agreement(pairs: Sequence[tuple[Detections, Detections]]) -> dict[str, Any]:
    """How many boxes of the float network the payload finds (same class, IoU >= 0.5), and at what score."""
    return found_again(pairs, lambda a, b: _iou(a.boxes, b.boxes), MATCH_IOU)[0]


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
