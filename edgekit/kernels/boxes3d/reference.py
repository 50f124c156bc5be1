"""Overlap of rotated boxes in numpy: the definition that the native and the CUDA kernel follow bit for bit.

A box is x y z l w h yaw: centre, full sizes, yaw counter-clockwise about +z in radians, at yaw 0 the length lies
along +x. Everything is float64 from float32 inputs, operation by operation without fused multiply-add, sine and
cosine written out because libm's differ between platforms; one rounding to float32 at the end.

Overlap from above. One box of the pair (the first in the order of `precedes`, so that swapping the two changes
no bit) gives the frame: it becomes the rectangle |x| <= L, |y| <= W. By Green's theorem the area that the other
box Q has in it is an integral along the edges of Q alone,

    area = sum over edges of Q:  integral of clamp(x, -L, L) dy  over that part of the edge where |y| <= W

whose parts are trapezia. It is exact, has no list of vertices and no epsilon, and is continuous: shared edges,
touching corners and equal boxes are no special cases. The published kernels (OpenPCDet/mmdet3d `iou3d_nms`, in
float32) collect the edges' crossings and corners inside within 1e-8 or 1e-5 and sort them around their mean; near
parallel or equal boxes that loses or doubles vertices, and values above 1 or 0 for equal boxes are known.

Rules: sizes below 0 count as 0. A box with a value that is not finite, or |yaw| > MAX_YAW, overlaps nothing.
Boxes whose circles round the centre are apart (distance >= sum of the half diagonals) have IoU 0 unlooked. A
union of 0 gives 0. Heights: [z - h/2, z + h/2].

Greedy NMS as in kernels/nms: boxes with a NaN score and unusable boxes are dropped; the rest is ordered by
falling score, equal scores by rising index, and cut to `max_candidates`; going down, a box is kept unless a kept one
of its class suppresses it; it ends with `max_detections`.

    rotated: intersection > threshold * (area_a + area_b - intersection), from above
    circle:  (x_a - x_b)^2 + (y_a - y_b)^2 <= radius^2 (float64 of the float32 centres)

`circle_nms` of CenterPoint, mmdet3d and BEVFusion compares the squared distance with its `min_radius` as it is:
their radius r is our sqrt(r), e.g. 4 -> 2 m. They order by argsort()[::-1], so that ties depend on the sort.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

MAX_YAW = 1e6
"""Radians; float32 knows 0.06 there."""
HALF_PI_HI, HALF_PI_LO = 1.57079632673412561417e00, 6.07710050650619224932e-11  # fdlibm e_rem_pio2.c
TWO_OVER_PI = 0.6366197723675814
SINE = tuple((-1.0) ** (k // 2) / math.factorial(k) for k in range(17, 0, -2))
"""Taylor coefficients of sin r / r in r^2, highest first; the error on |r| <= pi/4 is below 1e-17."""
COSINE = tuple((-1.0) ** (k // 2) / math.factorial(k) for k in range(16, -1, -2))


@dataclass(frozen=True)
class Prepared:
    """What pairs need of each box: float64, all of one shape. Unusable boxes have radius NaN, the rest of theirs 0."""

    x: np.ndarray
    y: np.ndarray
    c: np.ndarray
    s: np.ndarray
    half_l: np.ndarray
    half_w: np.ndarray
    radius: np.ndarray
    area: np.ndarray
    z: np.ndarray
    h: np.ndarray

    def __getitem__(self, index: np.ndarray | int | slice) -> Prepared:
        return Prepared(*(getattr(self, f.name)[index] for f in fields(self)))


def sincos(angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sine and cosine, float64 of |angle| <= MAX_YAW: within 2e-16 of the exact ones."""
    n = np.rint(angle * TWO_OVER_PI)
    r = (angle - n * HALF_PI_HI) - n * HALF_PI_LO
    t = r * r
    sine, cosine = np.full_like(r, SINE[0]), np.full_like(r, COSINE[0])
    for a, b in zip(SINE[1:], COSINE[1:], strict=True):
        sine = sine * t + a
        cosine = cosine * t + b
    sine = sine * r
    quadrant = n.astype(np.int64) & 3
    swap = (quadrant & 1) == 1
    sine, cosine = np.where(swap, cosine, sine), np.where(swap, sine, cosine)
    sine = np.where(quadrant >= 2, -sine, sine)
    cosine = np.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)
    return sine, cosine


def usable(boxes: np.ndarray) -> np.ndarray:
    """bool [n]: finite, and a yaw that means something."""
    result: np.ndarray = np.isfinite(boxes).all(axis=1) & (np.abs(boxes[:, 6]) <= np.float32(MAX_YAW))
    return result


def prepare(boxes: np.ndarray) -> Prepared:
    """float32 [n, 7] -> arrays [n]"""
    ok = usable(boxes)
    x, y, z, length, width, height, yaw = np.where(ok[:, None], boxes, np.float32(0)).astype(np.float64).T
    length, width, height = (np.where(v > 0, v, 0.0) for v in (length, width, height))
    s, c = sincos(yaw)
    half_l, half_w = 0.5 * length, 0.5 * width
    radius = np.where(ok, np.sqrt(half_l * half_l + half_w * half_w), np.nan)
    return Prepared(x, y, c, s, half_l, half_w, radius, length * width, z, height)


def near(a: Prepared, b: Prepared) -> np.ndarray:
    """Whether the circles round two boxes overlap."""
    dx, dy, reach = b.x - a.x, b.y - a.y, a.radius + b.radius
    result: np.ndarray = dx * dx + dy * dy < reach * reach
    return result


def precedes(a: Prepared, b: Prepared) -> np.ndarray:
    """A strict order of boxes as seen from above; those that are equal in it are equal boxes."""
    result = np.zeros(np.broadcast_shapes(a.x.shape, b.x.shape), bool)
    for name in ("s", "c", "half_l", "y", "x", "area"):  # the last one decides first
        p, q = getattr(a, name), getattr(b, name)
        result = (p < q) | ((p == q) & result)
    return result


def _clamp(v: np.ndarray, limit: np.ndarray) -> np.ndarray:
    v = np.where(v < -limit, -limit, v)
    return np.where(v > limit, limit, v)


def _share(v: np.ndarray) -> np.ndarray:
    v = np.where(v > 0.0, v, 0.0)
    return np.where(v < 1.0, v, 1.0)


def _inverse(v: np.ndarray) -> np.ndarray:
    return np.where(v != 0.0, 1.0 / v, 0.0)


def intersection(a: Prepared, b: Prepared) -> np.ndarray:
    """Area that two boxes share from above, float64; a and b broadcast. For pairs that are `near`."""
    swap = precedes(b, a)
    p = {f.name: np.where(swap, getattr(b, f.name), getattr(a, f.name)) for f in fields(Prepared)}
    q = {f.name: np.where(swap, getattr(a, f.name), getattr(b, f.name)) for f in fields(Prepared)}
    limit_x, limit_y = p["half_l"], p["half_w"]
    dx, dy = q["x"] - p["x"], q["y"] - p["y"]
    # q in the frame of p: its centre, and half its length and width as vectors
    ox, oy = p["c"] * dx + p["s"] * dy, p["c"] * dy - p["s"] * dx
    c, s = p["c"] * q["c"] + p["s"] * q["s"], p["c"] * q["s"] - p["s"] * q["c"]
    ux, uy = q["half_l"] * c, q["half_l"] * s
    vx, vy = q["half_w"] * s, q["half_w"] * c  # the vector is (-vx, vy)
    # corners counter-clockwise, and the edges between them: -2u, -2v, 2u, 2v
    corner_x = ((ox + ux) - vx, (ox - ux) - vx, (ox - ux) + vx, (ox + ux) + vx)
    corner_y = ((oy + uy) + vy, (oy - uy) + vy, (oy - uy) - vy, (oy + uy) - vy)
    edge_x = (-2.0 * ux, 2.0 * vx, 2.0 * ux, -2.0 * vx)
    inverse_u, inverse_v = _inverse(2.0 * uy), _inverse(2.0 * vy)
    inverse_y = (-inverse_u, -inverse_v, inverse_u, inverse_v)
    total = np.zeros_like(ox)
    for i in range(4):
        x0, y0, y1 = corner_x[i], corner_y[i], corner_y[(i + 1) % 4]
        ya, yb = _clamp(y0, limit_y), _clamp(y1, limit_y)
        xa = x0 + _share((ya - y0) * inverse_y[i]) * edge_x[i]
        xb = x0 + _share((yb - y0) * inverse_y[i]) * edge_x[i]
        ca, cb = _clamp(xa, limit_x), _clamp(xb, limit_x)
        # of the way from xa to xb, the part cut off before ca minus the part cut off behind cb: within -1 and 1
        cut, way = (ca - xa) - (xb - cb), xb - xa
        part = np.where(way != 0.0, cut / way, 0.0)
        total = total + (yb - ya) * ((ca + cb) + part * (ca - cb))
    total = 0.5 * total
    most = np.where(p["area"] < q["area"], p["area"], q["area"])
    total = np.where(total > 0.0, total, 0.0)
    return np.where(total < most, total, most)


def shared_height(a: Prepared, b: Prepared) -> np.ndarray:
    """Metres of height that two boxes share, float64."""
    top_a, top_b = a.z + 0.5 * a.h, b.z + 0.5 * b.h
    low_a, low_b = a.z - 0.5 * a.h, b.z - 0.5 * b.h
    shared = np.where(top_a < top_b, top_a, top_b) - np.where(low_a > low_b, low_a, low_b)
    most = np.where(a.h < b.h, a.h, b.h)
    shared = np.where(shared > 0.0, shared, 0.0)
    return np.where(shared < most, shared, most)


def iou_matrix(a: np.ndarray, b: np.ndarray, three_d: bool) -> np.ndarray:
    """IoU of every box of `a` with every box of `b`, float32 [n, m], from above or in space."""
    first, second = prepare(a), prepare(b)
    result = np.zeros((len(a), len(b)), np.float32)
    with np.errstate(all="ignore"):
        i, j = np.nonzero(near(first[np.s_[:, None]], second[np.s_[None, :]]))  # type: ignore[index]
        p, q = first[i], second[j]
        shared, size_p, size_q = intersection(p, q), p.area, q.area
        if three_d:
            shared, size_p, size_q = shared * shared_height(p, q), size_p * p.h, size_q * q.h
        union = size_p + size_q - shared
        result[i, j] = np.where(union > 0.0, shared / union, 0.0).astype(np.float32)
    return result


def order_of(boxes: np.ndarray, scores: np.ndarray, max_candidates: int) -> np.ndarray:
    """Candidates, best first."""
    ok = np.flatnonzero(~np.isnan(scores) & usable(boxes))
    result: np.ndarray = ok[np.argsort(-scores[ok], kind="stable")][:max_candidates]
    return result


def nms(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    limits: np.ndarray,
    circle: bool,
    max_detections: int,
    max_candidates: int,
) -> np.ndarray:
    """Indices of the kept boxes, best first: int32 [k]. limits: float32, IoU threshold or radius by class."""
    order = order_of(boxes, scores, max_candidates)
    prepared = prepare(boxes)
    keep: list[int] = []
    with np.errstate(all="ignore"):
        while len(order) and len(keep) < max_detections:
            best, order = order[0], order[1:]
            keep.append(best)
            rivals = order[classes[order] == classes[best]]
            p, q, limit = prepared[best], prepared[rivals], np.float64(limits[classes[best]])
            if circle:
                dx, dy = q.x - p.x, q.y - p.y
                hit = dx * dx + dy * dy <= limit * limit
            else:
                shared = intersection(p, q)
                hit = near(p, q) & (shared > limit * ((p.area + q.area) - shared))
            order = order[~np.isin(order, rivals[hit])]
    return np.array(keep, np.int32)
