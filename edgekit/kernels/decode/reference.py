"""Decoding in numpy: the definition that the native kernel follows bit for bit.

Only cells that can reach the threshold are looked at: an objectness or class value below
`screen(threshold)` ends it before any exponential. The survivors are computed in float64 with the
elementary functions below, written out operation by operation because libm's differ between
platforms, and rounded once to float32. Distributions over bins alone are float32, as most of the time
goes there: a side is within 5e-6 bins of the exact one, 2e-4 pixels at stride 32.

The best class of a cell only (the first of equals), as detectors are deployed; with `all_classes` one
candidate for every class above the threshold, as AP is measured. NaN counts as -inf where classes
are compared; a score below the threshold, 0 or not finite, or a box that is not finite, gives
nothing. Candidates come level by level, anchor by anchor, row by row, class by class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.tasks.detect.spec import Family

LOG2E = 1.4426950408889634
LN2_HI, LN2_LO = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # fdlibm e_exp.c
LN2_HI32, LN2_LO32 = np.float32(0.693359375), np.float32(-2.12194440e-4)  # Cephes expf.c
SQRT_HALF = 0.7071067811865476
INVERSE_FACTORIALS = tuple(1.0 / math.factorial(k) for k in range(14))


@dataclass(frozen=True)
class Grid:
    """Where the values of one level and anchor are. Tensors are views [1, C, H, W], named by index.

    `box`: channels of the four box values, or of the first of 4 * bins. `score`, `label`: rows that
    carry them instead of class values. -1: not there.
    """

    family: Family
    height: int
    width: int
    stride: float
    anchor: tuple[float, float]
    bins: int
    offset: float
    num_classes: int
    box_tensor: int
    box: tuple[int, int, int, int]
    class_tensor: int
    class_start: int
    object_tensor: int
    object_start: int
    score: int
    label: int
    corners: bool
    scale: tuple[float, float]
    """fastestdet: the input's size; rows: what coordinates are multiplied with."""


def exp(x: np.ndarray) -> np.ndarray:
    """e^x, float64: x = n ln 2 + r, Taylor series of degree 13 in r (2 ulp). 0 below -708, inf above 708."""
    ok = np.abs(x) <= 708.0
    n = np.rint(np.where(ok, x, 0.0) * LOG2E)
    r = (np.where(ok, x, 0.0) - n * LN2_HI) - n * LN2_LO
    p = np.full_like(r, INVERSE_FACTORIALS[13])
    for k in range(12, -1, -1):
        p = p * r + INVERSE_FACTORIALS[k]
    edge = np.where(x > 0, np.inf, np.where(x < 0, 0.0, np.nan))
    return np.where(ok, np.ldexp(p, n.astype(np.int32)), edge)


def exp32(x: np.ndarray) -> np.ndarray:
    """e^x of x <= 0, float32 as `exp`: Taylor series of degree 7 (1 ulp). 0 below -87."""
    ok = x >= np.float32(-87.0)
    inside = np.where(ok, x, np.float32(0))
    n = np.rint(inside * np.float32(LOG2E))
    r = (inside - n * LN2_HI32) - n * LN2_LO32
    p = np.full_like(r, np.float32(INVERSE_FACTORIALS[7]))
    for k in range(6, -1, -1):
        p = p * r + np.float32(INVERSE_FACTORIALS[k])
    edge = np.where(x < 0, np.float32(0), x)  # NaN stays
    result: np.ndarray = np.where(ok, np.ldexp(p, n.astype(np.int32)), edge)
    return result


def log(x: np.ndarray) -> np.ndarray:
    """ln x for 0 <= x <= 1, float64: x = m 2^e, artanh series in (m - 1) / (m + 1). Within 3 ulp."""
    m, e = np.frexp(x)
    low = m < SQRT_HALF
    m, e = np.where(low, m * 2.0, m), np.where(low, e - 1, e).astype(np.float64)
    t = (m - 1.0) / (m + 1.0)
    u = t * t
    p = np.full_like(t, 1.0 / 21.0)
    for k in range(19, 0, -2):
        p = p * u + 1.0 / k
    return np.where(x > 0, (e * LN2_HI + 2.0 * t * p) + e * LN2_LO, np.where(x == 0, -np.inf, np.nan))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + exp(-x))


def tanh(x: np.ndarray) -> np.ndarray:
    e = exp(-2.0 * np.abs(x))
    result: np.ndarray = np.copysign((1.0 - e) / (1.0 + e), x)
    return result


def screen(family: Family, threshold: float) -> tuple[float, float]:
    """Least raw objectness and class value with which a cell may reach `threshold`, a little below the exact one."""

    def logit(p: float) -> float:
        p = min(p, 0.999)  # beyond, float32 scores are too coarse for a margin in the logit
        return math.log(p / (1.0 - p)) - 1e-3 if p > 0 else -math.inf

    if threshold <= 0:
        return -math.inf, -math.inf
    if family == "rows":
        return threshold * (1 - 1e-6), threshold * (1 - 1e-6)
    if family == "fastestdet":
        return logit(threshold ** (1 / 0.6)), -math.inf
    return logit(threshold), logit(threshold)


def decode(
    grids: Sequence[Grid], tensors: Sequence[np.ndarray], threshold: float, all_classes: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes float32 [n, 4] (x1 y1 x2 y2, input pixels), scores float32 [n], classes int32 [n]."""
    parts = []
    with np.errstate(all="ignore"):  # overflow and NaN are part of the definition
        for grid in grids:
            parts.append(_decode_grid(grid, tensors, threshold, all_classes))
    boxes, scores, classes = (np.concatenate(column) for column in zip(*parts, strict=True))
    return boxes, scores, classes


def to_picture(boxes: np.ndarray, mapping: np.ndarray, clip: bool) -> np.ndarray:
    """Boxes float32 [n, 4] from pixels of the input to pixels of the picture, in place: (x - offset) / scale.

    mapping: float32 [3, 4], offset, scale and limit of x1 y1 x2 y2. `clip`: to 0..limit, where what is
    not above 0 becomes +0.
    """
    offset, scale, limit = mapping
    boxes -= offset
    boxes /= scale
    if clip:
        boxes[~(boxes > 0)] = 0
        np.minimum(boxes, limit, out=boxes)
    return boxes


@dataclass(frozen=True)
class _Cells:
    """Some cells of a grid: flat indices, row by row."""

    tensors: Sequence[np.ndarray]
    index: np.ndarray

    def values(self, tensor: int, channel: int, count: int = 1) -> np.ndarray:
        """float64 [count, cells]"""
        planes = self.tensors[tensor][0, channel : channel + count].reshape(count, -1)
        return planes[:, self.index].astype(np.float64)

    def where(self, keep: np.ndarray) -> _Cells:
        return _Cells(self.tensors, self.index[keep])


def _decode_grid(
    grid: Grid, tensors: Sequence[np.ndarray], threshold: float, all_classes: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    low_object, low_class = screen(grid.family, threshold)
    cells = _Cells(tensors, np.arange(grid.height * grid.width))
    if grid.object_tensor >= 0:
        cells = cells.where(cells.values(grid.object_tensor, grid.object_start)[0] >= np.float32(low_object))
    cells, exact, label = _scores(grid, cells, low_class, all_classes)
    score = exact.astype(np.float32)
    keep = (score >= np.float32(threshold)) & (score > 0) & np.isfinite(score)
    keep &= (label >= 0) & (label < grid.num_classes)
    boxes = _boxes(grid, cells.where(keep)).astype(np.float32)
    finite = np.isfinite(boxes).all(axis=1)
    return boxes[finite], score[keep][finite], label[keep][finite].astype(np.int32)


def _scores(
    grid: Grid, cells: _Cells, low_class: float, all_classes: bool
) -> tuple[_Cells, np.ndarray, np.ndarray]:
    """Candidates: their cells, scores and classes; class -1 where the value lies below `low_class`."""
    if grid.score >= 0:
        value = best = cells.values(grid.box_tensor, grid.score)[0]
        label = (
            np.rint(cells.values(grid.box_tensor, grid.label)[0]) if grid.label >= 0 else np.zeros_like(best)
        )
        total = np.ones_like(best)
    else:
        logits = cells.values(grid.class_tensor, grid.class_start, grid.num_classes)
        logits[np.isnan(logits)] = -np.inf
        label = np.argmax(logits, axis=0)
        value = best = np.take_along_axis(logits, label[None], axis=0)[0]
        total = np.zeros_like(best)
        for row in logits:
            total = total + exp(row - best)
        if all_classes:
            column, label = np.nonzero(np.float32(low_class) <= logits.T)
            cells, value = _Cells(cells.tensors, cells.index[column]), logits[label, column]
            best, total = best[column], total[column]
    label = np.where(value >= np.float32(low_class), label, -1)
    objectness = cells.values(grid.object_tensor, grid.object_start)[0] if grid.object_tensor >= 0 else None
    if grid.family == "rows":
        return cells, (value if objectness is None else objectness * value), label
    if grid.family == "fastestdet":
        assert objectness is not None
        return cells, exp(0.6 * log(sigmoid(objectness)) + 0.4 * log(exp(value - best) / total)), label
    return cells, (sigmoid(value) if objectness is None else sigmoid(objectness) * sigmoid(value)), label


def _boxes(grid: Grid, cells: _Cells) -> np.ndarray:
    """float64 [n, 4], x1 y1 x2 y2."""
    y, x = np.divmod(cells.index, grid.width)
    if grid.family in ("yolov8", "nanodet"):
        sides = [_expected_bin(cells.values(grid.box_tensor, grid.box[k], grid.bins)) for k in range(4)]
        left, top, right, bottom = sides
        cx, cy = x + grid.offset, y + grid.offset
        corners = [cx - left, cy - top, cx + right, cy + bottom]
        return np.stack(corners, axis=1) * grid.stride
    a, b, c, d = (cells.values(grid.box_tensor, k)[0] for k in grid.box)
    if grid.family == "yolox":
        cx, cy = (a + x) * grid.stride, (b + y) * grid.stride
        w, h = exp(c) * grid.stride, exp(d) * grid.stride
    elif grid.family == "yolov5":
        cx = (2.0 * sigmoid(a) - 0.5 + x) * grid.stride
        cy = (2.0 * sigmoid(b) - 0.5 + y) * grid.stride
        u, v = 2.0 * sigmoid(c), 2.0 * sigmoid(d)
        w, h = u * u * grid.anchor[0], v * v * grid.anchor[1]
    elif grid.family == "fastestdet":
        cx, cy = (x + tanh(a)) * grid.stride, (y + tanh(b)) * grid.stride
        w, h = sigmoid(c) * grid.scale[0], sigmoid(d) * grid.scale[1]
    else:
        cx, cy, w, h = a * grid.scale[0], b * grid.scale[1], c * grid.scale[0], d * grid.scale[1]
        if grid.corners:
            return np.stack([cx, cy, w, h], axis=1)
    return np.stack([cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h], axis=1)


def _expected_bin(logits: np.ndarray) -> np.ndarray:
    """Mean bin under softmax, [bins, n] -> [n] (Generalized Focal Loss, Li et al. 2020, eq. 3), in float32."""
    logits = logits.astype(np.float32)
    top = np.fmax.reduce(logits, axis=0)
    total, mean = np.zeros_like(top), np.zeros_like(top)
    for k, row in enumerate(logits):
        e = exp32(row - top)
        total, mean = total + e, mean + e * np.float32(k)
    result: np.ndarray = (mean / total).astype(np.float64)
    return result
