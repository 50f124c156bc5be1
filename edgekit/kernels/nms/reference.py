"""Greedy class-aware NMS in numpy: the definition that the native kernel follows exactly.

Boxes with a NaN score or a coordinate that is not finite are dropped. The rest is ordered by
falling score, equal scores by rising index, and cut to the first `max_candidates`. Going down that
order, a box is kept unless a kept box of its class overlaps it by IoU > threshold, computed in
float32 without a division:

    inter > threshold * (area_a + area_b - inter),  sides below 0 counted as 0

so that an empty box neither suppresses nor is suppressed. It ends with `max_detections` kept.
"""

from __future__ import annotations

import numpy as np


def areas(boxes: np.ndarray) -> np.ndarray:
    """float32 [n, 4] -> float32 [n]"""
    zero = np.float32(0)
    result: np.ndarray = np.maximum(boxes[:, 2] - boxes[:, 0], zero) * np.maximum(
        boxes[:, 3] - boxes[:, 1], zero
    )
    return result


def overlapping(
    box: np.ndarray, area: np.float32, boxes: np.ndarray, area_of: np.ndarray, threshold: np.float32
) -> np.ndarray:
    """Which of `boxes` overlap `box` by more than `threshold`: bool [n]."""
    zero = np.float32(0)
    w = np.maximum(np.minimum(box[2], boxes[:, 2]) - np.maximum(box[0], boxes[:, 0]), zero)
    h = np.maximum(np.minimum(box[3], boxes[:, 3]) - np.maximum(box[1], boxes[:, 1]), zero)
    inter = w * h
    result: np.ndarray = inter > threshold * (area + area_of - inter)
    return result


def nms(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    iou_threshold: float,
    max_detections: int,
    max_candidates: int,
) -> np.ndarray:
    """Indices of the kept boxes, best first: int32 [k]."""
    usable = np.flatnonzero(~np.isnan(scores) & np.isfinite(boxes).all(axis=1))
    order = usable[np.argsort(-scores[usable], kind="stable")][:max_candidates]
    threshold = np.float32(iou_threshold)
    keep: list[int] = []
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # huge boxes: the comparison is false, as in IEEE arithmetic
        area_of = areas(boxes)
        while len(order) and len(keep) < max_detections:
            best, order = order[0], order[1:]
            keep.append(best)
            hit = overlapping(boxes[best], area_of[best], boxes[order], area_of[order], threshold)
            order = order[~(hit & (classes[order] == classes[best]))]
    return np.array(keep, np.int32)
