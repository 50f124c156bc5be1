"""Greedy non-maximum suppression, class by class."""

from __future__ import annotations

import numpy as np

from edgekit import kernels
from edgekit.errors import UsageError
from edgekit.kernels.nms import reference

MAX_CANDIDATES = 30_000
"""Best-scoring candidates that are looked at, as in Ultralytics' `max_nms`."""
MAX_CLASS = 65_535


def nms(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    iou_threshold: float,
    max_detections: int,
    *,
    max_candidates: int = MAX_CANDIDATES,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Indices of the boxes to keep, best score first (ties: lower index first): int32 [k].

    boxes: float32 [n, 4], x1 y1 x2 y2.  scores: float32 [n].  classes: int32 [n] in 0..65535.
    A box is dropped when a better one of its class overlaps it by IoU > `iou_threshold`, when its
    score is NaN or when a coordinate is not finite; at most `max_detections` remain. Only the
    `max_candidates` best are looked at. `out`: int32 [>= max_detections] to write into; the result is
    then a view of it. reference.py states the rule to the last bit.
    Raises: UsageError for arrays of another shape or dtype, or arguments out of range.
    """
    n = len(boxes)
    if boxes.shape != (n, 4) or scores.shape != (n,) or classes.shape != (n,):
        raise UsageError(
            f"nms: wrong shapes, expected boxes [n, 4], scores [n], classes [n], "
            f"got {list(boxes.shape)}, {list(scores.shape)}, {list(classes.shape)}."
        )
    if boxes.dtype != np.float32 or scores.dtype != np.float32 or classes.dtype != np.int32:
        raise UsageError(
            f"nms: wrong dtypes, expected float32, float32, int32, got {boxes.dtype}, {scores.dtype}, {classes.dtype}."
        )
    if not 0 <= iou_threshold <= 1 or max_detections < 1 or max_candidates < 1:
        raise UsageError(
            f"nms: expected iou_threshold in 0..1, max_detections and max_candidates at least 1, "
            f"got {iou_threshold}, {max_detections}, {max_candidates}."
        )
    assert out is None or (
        out.dtype == np.int32 and out.flags.c_contiguous and len(out) >= min(n, max_detections)
    )
    module = kernels.native()
    if module is None:
        if n and (classes.min() < 0 or classes.max() > MAX_CLASS):
            raise _class_out_of_range(classes)
        kept = reference.nms(boxes, scores, classes, iou_threshold, max_detections, max_candidates)
        if out is None:
            return kept
        out[: len(kept)] = kept
        return out[: len(kept)]
    if out is None:
        out = np.empty(min(n, max_detections), np.int32)
    arrays = (np.ascontiguousarray(boxes), np.ascontiguousarray(scores), np.ascontiguousarray(classes))
    count = module.nms(*arrays, iou_threshold, max_detections, max_candidates, MAX_CLASS, out)
    if count < 0:  # looked at there, where it costs nothing
        raise _class_out_of_range(classes)
    return out[:count]


def _class_out_of_range(classes: np.ndarray) -> UsageError:
    return UsageError(
        f"nms: class out of range, expected 0..{MAX_CLASS}, got {classes.min()}..{classes.max()}."
    )
