"""Rotated boxes from above and in space: IoU, and greedy non-maximum suppression by IoU or by distance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekit import kernels
from edgekit.errors import UsageError
from edgekit.kernels.boxes3d import reference

MAX_CLASS = 65_535
MAX_CANDIDATES = 30_000

Limit = float | Sequence[float] | np.ndarray
"""One for all classes, or one per class number."""


def bev_iou(a: np.ndarray, b: np.ndarray, *, out: np.ndarray | None = None, threads: int = 0) -> np.ndarray:
    """IoU from above of every box of `a` with every box of `b`: float32 [n, m], in 0..1.

    a: float32 [n, 7], b: float32 [m, 7]: x y z l w h yaw (metres, radians; centre, full sizes; yaw counter-clockwise
    about +z, 0 = length along +x). reference.py states the rule; bev_iou(a, b) is bev_iou(b, a).T bit for bit.
    out: float32 [n, m], C-contiguous, written and returned. threads: 0 = all that the process may use; the result
    does not depend on it.
    Raises: UsageError for arrays of another shape or dtype.
    """
    return _matrix(a, b, out, threads, three_d=False)


def iou_3d(a: np.ndarray, b: np.ndarray, *, out: np.ndarray | None = None, threads: int = 0) -> np.ndarray:
    """IoU of volumes, otherwise as `bev_iou`; boxes stand upright (yaw is their only rotation)."""
    return _matrix(a, b, out, threads, three_d=True)


def nms_rotated(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    iou_threshold: Limit,
    max_detections: int,
    *,
    max_candidates: int = MAX_CANDIDATES,
) -> np.ndarray:
    """Indices of the boxes to keep, best score first (ties: lower index first): int32 [k].

    boxes: float32 [n, 7].  scores: float32 [n].  classes: int32 [n] in 0..65535.  A box is dropped when a better one of
    its class overlaps it from above by IoU > `iou_threshold` (0..1; one number, or one per class), when its
    score is NaN or a value of it not finite. Only the `max_candidates` best are looked at; at most `max_detections` stay.
    Raises: UsageError for arrays of another shape or dtype, or arguments out of range.
    """
    return _nms(boxes, scores, classes, iou_threshold, max_detections, max_candidates, circle=False)


def nms_circle(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    radius: Limit,
    max_detections: int,
    *,
    max_candidates: int = MAX_CANDIDATES,
) -> np.ndarray:
    """As `nms_rotated`, but a box is dropped when the centre of a better one of its class lies within `radius`.

    radius: metres, 0 or more (0 drops equal centres only). Published `min_radius` values are squares of it
    (reference.py).
    """
    return _nms(boxes, scores, classes, radius, max_detections, max_candidates, circle=True)


def _matrix(a: np.ndarray, b: np.ndarray, out: np.ndarray | None, threads: int, three_d: bool) -> np.ndarray:
    for boxes in (a, b):
        _check_boxes(boxes)
    if threads < 0:
        raise UsageError(f"boxes3d: threads: expected 0 or more, got {threads}.")
    if out is None:
        out = np.empty((len(a), len(b)), np.float32)
    elif out.shape != (len(a), len(b)) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise UsageError(
            f"boxes3d: out: expected float32 [{len(a)}, {len(b)}], C-contiguous, got {out.dtype} {list(out.shape)}."
        )
    module = kernels.native()
    if module is None:
        out[...] = reference.iou_matrix(a, b, three_d)
    else:
        module.boxes3d_iou(np.ascontiguousarray(a), np.ascontiguousarray(b), three_d, threads, out)
    return out


def _nms(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    limit: Limit,
    max_detections: int,
    max_candidates: int,
    circle: bool,
) -> np.ndarray:
    _check_boxes(boxes)
    n = len(boxes)
    if scores.shape != (n,) or classes.shape != (n,):
        raise UsageError(
            f"nms: wrong shapes, expected scores [{n}], classes [{n}], got {list(scores.shape)}, {list(classes.shape)}."
        )
    if scores.dtype != np.float32 or classes.dtype != np.int32:
        raise UsageError(f"nms: wrong dtypes, expected float32, int32, got {scores.dtype}, {classes.dtype}.")
    if max_detections < 1 or max_candidates < 1:
        raise UsageError(
            f"nms: expected max_detections and max_candidates at least 1, got {max_detections}, {max_candidates}."
        )
    limits = np.asarray(limit, np.float32)
    top = MAX_CLASS if limits.ndim == 0 else len(limits) - 1
    if n and (classes.min() < 0 or classes.max() > top):
        raise UsageError(f"nms: class out of range, expected 0..{top}, got {classes.min()}..{classes.max()}.")
    if limits.ndim == 0:
        limits = np.full(int(classes.max()) + 1 if n else 1, limits)
    most = np.inf if circle else 1.0
    if limits.ndim != 1 or not ((limits >= 0) & (limits <= most)).all():
        what = "a radius of 0 m or more" if circle else "an IoU threshold in 0..1"
        raise UsageError(f"nms: expected {what}, one number or one per class, got {limit}.")
    module = kernels.native()
    if module is None:
        return reference.nms(boxes, scores, classes, limits, circle, max_detections, max_candidates)
    out = np.empty(min(n, max_detections), np.int32)
    arrays = (np.ascontiguousarray(boxes), np.ascontiguousarray(scores), np.ascontiguousarray(classes))
    count = module.boxes3d_nms(*arrays, limits, circle, max_detections, max_candidates, out)
    return out[:count]


def _check_boxes(boxes: np.ndarray) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 7 or boxes.dtype != np.float32:
        raise UsageError(
            f"boxes: expected float32 [n, 7] (x y z l w h yaw), got {boxes.dtype} {list(boxes.shape)}."
        )
