from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.kernels.boxes3d import bev_iou, iou_3d, nms_circle, nms_rotated, reference
from tests.test_kernels import PATHS, using

SPECIAL = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 0, -0.0, 1e-40, 2e6, -1], np.float32)


def boxes_of(rng: np.random.Generator, n: int, kind: str) -> np.ndarray:
    """Boxes close together. `grid`: whole numbers and quarter turns, so that edges and corners coincide; `same`: one
    box and ones that differ from it by rounding; `special`: some values of any kind."""
    boxes = np.empty((n, 7), np.float32)
    boxes[:, :3] = rng.uniform(-4, 4, (n, 3))
    boxes[:, 3:6] = rng.uniform(0.05, 6, (n, 3))
    boxes[:, 6] = rng.uniform(-8, 8, n)
    if kind == "grid":
        boxes = np.round(boxes)
        boxes[:, 6] = np.float32(np.pi / 4) * np.round(boxes[:, 6])
    elif kind == "same" and n:
        boxes[:] = boxes[0]
        boxes += (rng.normal(0, 1e-6, boxes.shape) * (rng.random(boxes.shape) < 0.5)).astype(np.float32)
    elif kind == "special":
        boxes = np.where(rng.random(boxes.shape) < 0.05, rng.choice(SPECIAL, boxes.shape), boxes)
    return boxes


@st.composite
def box_sets(draw: st.DrawFn, most: int = 40) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(("any", "grid", "same", "special")))
    return boxes_of(rng, draw(st.integers(0, most)), kind)


def both(path: str, a: np.ndarray, b: np.ndarray, threads: int = 0) -> tuple[np.ndarray, np.ndarray]:
    with using(path):
        return bev_iou(a, b, threads=threads), iou_3d(a, b, threads=threads)


@settings(deadline=None, max_examples=200)
@given(a=box_sets(), b=box_sets())
def test_native_is_the_reference(a: np.ndarray, b: np.ndarray) -> None:
    for got, expected in zip(both("native", a, b), both("numpy", a, b), strict=True):
        assert got.dtype == expected.dtype == np.float32
        np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=100)
@given(a=box_sets(), b=box_sets())
def test_symmetric_and_within_0_and_1(path: str, a: np.ndarray, b: np.ndarray) -> None:
    for forth, back in zip(both(path, a, b), both(path, b, a), strict=True):
        np.testing.assert_array_equal(forth, back.T)
        assert (forth >= 0).all() and (forth <= 1).all()  # so none is NaN


def corners(box: np.ndarray) -> np.ndarray:
    """float64 [4, 2], counter-clockwise."""
    x, y, _, length, width, _, yaw = box.astype(np.float64)
    c, s = np.cos(yaw), np.sin(yaw)
    half = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * (length, width) / 2
    return half @ np.array([[c, s], [-s, c]]) + (x, y)


def polygon_area(points: list[np.ndarray]) -> float:
    if len(points) < 3:
        return 0.0
    p = np.array(points) - points[0]
    q = np.roll(p, -1, axis=0)
    return float((p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]).sum() / 2)


def clipped(subject: np.ndarray, window: np.ndarray) -> float:
    """Area of two convex polygons' intersection: another way, that of Sutherland and Hodgman (1974)."""
    points = list(subject)
    for p, q in zip(window, np.roll(window, -1, axis=0), strict=True):
        normal = np.array([p[1] - q[1], q[0] - p[0]])
        side = [float(normal @ (v - p)) for v in points]
        kept = []
        for i, v in enumerate(points):
            before, last = side[i - 1], points[i - 1]
            if (side[i] < 0) != (before < 0):
                kept.append(last + (v - last) * (before / (before - side[i])))
            if side[i] >= 0:
                kept.append(v)
        points = kept
    return polygon_area(points)


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(("any", "grid", "same")))
def test_equals_polygon_clipping(path: str, seed: int, kind: str) -> None:
    boxes = boxes_of(np.random.default_rng(seed), 7, kind)
    boxes[:, 3:6] = np.maximum(np.abs(boxes[:, 3:6]), np.float32(0.05))
    flat, solid = both(path, boxes, boxes)
    for i, a in enumerate(boxes.astype(np.float64)):
        for j, b in enumerate(boxes.astype(np.float64)):
            area = clipped(corners(boxes[i]), corners(boxes[j]))
            shared = area * max(
                0.0, min(a[2] + a[5] / 2, b[2] + b[5] / 2) - max(a[2] - a[5] / 2, b[2] - b[5] / 2)
            )
            assert flat[i, j] == pytest.approx(area / (a[3] * a[4] + b[3] * b[4] - area), abs=1e-6)
            whole = a[3] * a[4] * a[5] + b[3] * b[4] * b[5] - shared
            assert solid[i, j] == pytest.approx(shared / whole, abs=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_by_counting_points(path: str) -> None:
    rng = np.random.default_rng(3)
    boxes = boxes_of(rng, 12, "any")
    points = rng.uniform(-12, 12, (200_000, 2))
    inside = []
    for box in boxes.astype(np.float64):
        c, s = np.cos(box[6]), np.sin(box[6])
        local = (points - box[:2]) @ np.array([[c, -s], [s, c]])
        inside.append((np.abs(local) <= box[3:5] / 2).all(axis=1))
    masks = np.array(inside)
    shared = (masks[:, None] & masks[None]).sum(axis=2)
    union = (masks[:, None] | masks[None]).sum(axis=2)
    # the share of `union` points that fall into both: five deviations of a binomial
    bound = 5 * np.sqrt(0.25 / union)
    assert (np.abs(both(path, boxes, boxes)[0] - shared / union) <= bound).all()


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(("any", "grid", "same")),
    turn=st.floats(-7, 7),
    dx=st.floats(-60, 60),
    dy=st.floats(-60, 60),
)
def test_moving_both_changes_nothing(
    path: str, seed: int, kind: str, turn: float, dx: float, dy: float
) -> None:
    boxes = boxes_of(np.random.default_rng(seed), 10, kind)
    boxes[:, 3:6] = np.abs(boxes[:, 3:6]) + np.float32(1)
    c, s = np.cos(turn), np.sin(turn)
    moved = boxes.astype(np.float64)
    moved[:, 0], moved[:, 1] = c * moved[:, 0] - s * moved[:, 1] + dx, s * moved[:, 0] + c * moved[:, 1] + dy
    moved[:, 6] += turn
    moved[:, 2] += dx
    # float32 at 70 m is 4e-6 m coarse, against sides of at least 1 m; 15 rad are 5e-7 coarse, against half diagonals of 5 m
    for before, after in zip(
        both(path, boxes, boxes), both(path, *[moved.astype(np.float32)] * 2), strict=True
    ):
        np.testing.assert_allclose(after, before, atol=1e-4)


def box(*values: float) -> np.ndarray:
    return np.array([values], np.float32)


@pytest.mark.parametrize("path", PATHS)
def test_by_hand(path: str) -> None:
    square, turned = box(0, 0, 0, 2, 2, 2, 0), box(0, 0, 0, 2, 2, 2, np.pi / 4)
    octagon = 8 * (np.sqrt(2) - 1)  # of width 2
    flat, solid = both(path, square, turned)
    assert flat[0, 0] == pytest.approx(octagon / (8 - octagon), abs=1e-7)
    assert solid[0, 0] == pytest.approx(octagon / (8 - octagon), abs=1e-7)
    # a car and the same one, turned round; half of it; on top of it; beside it, touching
    car = box(10, 5, 1, 4, 2, 1.5, 0.3)
    back, half = box(10, 5, 1, 4, 2, 1.5, 0.3 + np.pi), box(10, 5, 1, 4, 1, 1.5, 0.3)
    above, shifted = box(10, 5, 2.5, 4, 2, 1.5, 0.3), box(10, 5, 1.75, 4, 2, 1.5, 0.3)
    others = np.concatenate([car, back, half, above, shifted])
    flat, solid = both(path, car, others)
    np.testing.assert_allclose(flat, [[1, 1, 0.5, 1, 1]], atol=1e-6)
    np.testing.assert_allclose(solid, [[1, 1, 0.5, 0, 1 / 3]], atol=1e-6)
    assert flat[0, 0] == 1 and solid[0, 0] == 1
    touching = box(2, 0, 0, 2, 2, 2, 0)
    assert [m.item() for m in both(path, square, touching)] == [0, 0]


@pytest.mark.parametrize("path", PATHS)
def test_boxes_that_overlap_nothing(path: str) -> None:
    good = box(0, 0, 0, 2, 2, 2, 0)
    for odd in (
        box(np.nan, 0, 0, 2, 2, 2, 0),
        box(0, 0, 0, np.inf, 2, 2, 0),
        box(0, 0, 0, 2, 2, 2, 2e6),
        box(0, 0, 0, 0, 2, 2, 0),
        box(0, 0, 0, 2, -2, 2, 0),
    ):
        assert both(path, odd, good)[0].item() == both(path, odd, odd)[1].item() == 0
    flat, solid = both(path, good, box(0, 0, 0, 2, 2, 0, 0))  # no height, but seen from above it is there
    assert flat.item() == 1 and solid.item() == 0


@pytest.mark.parametrize("path", PATHS)
def test_large_and_small(path: str) -> None:
    huge = box(0, 0, 0, 3e38, 3e38, 3e38, 1)
    assert both(path, huge, huge)[0].item() == 1
    tiny = box(1e-20, 0, 0, 1e-30, 1e-30, 1e-30, 1)
    assert both(path, tiny, tiny)[0].item() == 1
    assert both(path, huge, tiny)[0].item() == 0  # 1e-137 rounds to 0


def test_sine_and_cosine() -> None:
    rng = np.random.default_rng(0)
    angles = np.concatenate(
        [rng.uniform(-8, 8, 20_000), rng.uniform(-1e6, 1e6, 20_000), np.arange(-9, 10) * np.pi / 2]
    )
    s, c = reference.sincos(angles)
    np.testing.assert_allclose(s, np.sin(angles), atol=3e-16, rtol=0)
    np.testing.assert_allclose(c, np.cos(angles), atol=3e-16, rtol=0)


def test_no_more_is_shared_than_the_smaller_box_has() -> None:
    rng = np.random.default_rng(2)
    inner, outer = boxes_of(rng, 3000, "any"), boxes_of(rng, 3000, "any")
    outer[:, :2] = inner[:, :2]
    outer[:, 3:5] = 20
    p, q = reference.prepare(inner), reference.prepare(outer)
    with np.errstate(all="ignore"):
        shared = reference.intersection(p, q)
    assert (shared <= p.area).all() and (shared >= p.area * (1 - 1e-12)).all()


def test_threads_change_no_bit() -> None:
    rng = np.random.default_rng(1)
    a, b = boxes_of(rng, 203, "any"), boxes_of(rng, 177, "any")
    one = both("native", a, b, threads=1)
    for threads in (2, 3, 8):
        for first, other in zip(one, both("native", a, b, threads=threads), strict=True):
            np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("path", PATHS)
def test_out_is_used(path: str) -> None:
    boxes = boxes_of(np.random.default_rng(0), 5, "any")
    out = np.full((5, 5), np.nan, np.float32)
    with using(path):
        assert bev_iou(boxes, boxes, out=out) is out
        assert not np.isnan(out).any()
        np.testing.assert_array_equal(bev_iou(np.repeat(boxes, 2, axis=0)[::2], boxes), out)
        with pytest.raises(UsageError, match=r"out: expected float32 \[5, 5\]"):
            bev_iou(boxes, boxes, out=out[:4])


@st.composite
def nms_cases(draw: st.DrawFn) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], bool, object, int, int]:
    boxes = draw(box_sets(most=80))
    n = len(boxes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = (rng.integers(-2, 12, n) / 8).astype(np.float32)  # with ties
    if draw(st.booleans()):
        scores = np.where(rng.random(n) < 0.1, rng.choice(SPECIAL, n), scores).astype(np.float32)
    count = draw(st.sampled_from((1, 2, 9)))
    classes = rng.integers(0, count, n).astype(np.int32)
    circle = draw(st.booleans())
    choices = (0.0, 0.5, 1.0, 4.0) if circle else (0.0, 0.2, 0.5, 1.0)
    limit: object = draw(st.sampled_from(choices))
    if draw(st.booleans()):
        limit = [draw(st.sampled_from(choices)) for _ in range(count)]
    numbers = draw(st.sampled_from((1, 3, 300))), draw(st.sampled_from((4, 30_000)))
    return (boxes, scores, classes), circle, limit, *numbers


@settings(deadline=None, max_examples=300)
@given(case=nms_cases())
def test_nms_native_is_the_reference(case: tuple) -> None:
    arrays, circle, limit, most, candidates = case
    run = nms_circle if circle else nms_rotated
    results = []
    for path in ("numpy", "native"):
        with using(path):
            results.append(run(*arrays, limit, most, max_candidates=candidates))
    assert results[0].dtype == results[1].dtype == np.int32
    assert results[0].tolist() == results[1].tolist()


def brute_force(arrays: tuple, circle: bool, limit: object, most: int, candidates: int) -> list[int]:
    boxes, scores, classes = arrays
    ok = np.isfinite(boxes).all(axis=1) & ~np.isnan(scores) & (np.abs(boxes[:, 6]) < 1e6)
    order = sorted(np.flatnonzero(ok).tolist(), key=lambda i: (-scores[i], i))[:candidates]
    overlap = bev_iou(boxes, boxes)
    kept: list[int] = []
    for i in order:
        bound = limit if isinstance(limit, float) else limit[classes[i]]  # type: ignore[index]
        rivals = [k for k in kept if classes[k] == classes[i]]
        apart = [float(np.hypot(*(boxes[i, :2].astype(float) - boxes[k, :2]))) for k in rivals]
        hit = [d <= bound for d in apart] if circle else [overlap[i, k] > bound for k in rivals]
        if not any(hit):
            kept.append(i)
    return kept[:most]


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=150)
@given(case=nms_cases())
def test_nms_against_brute_force(path: str, case: tuple) -> None:
    arrays, circle, limit, most, candidates = case
    # thresholds that no rounding of an IoU or distance of these boxes meets
    if circle:
        limit = [r + 1e-3 for r in limit] if isinstance(limit, list) else limit + 1e-3
    else:
        limit = [t * 0.9 + 0.0123 for t in limit] if isinstance(limit, list) else limit * 0.9 + 0.0123
    run = nms_circle if circle else nms_rotated
    with using(path):
        got = run(*arrays, limit, most, max_candidates=candidates)
        assert got.tolist() == brute_force(arrays, circle, limit, most, candidates)


@pytest.mark.parametrize("path", PATHS)
def test_nms_rule(path: str) -> None:
    boxes = np.concatenate(
        [
            box(0, 0, 0, 4, 2, 2, 0),
            box(0, 0, 9, 4, 1, 2, 0),  # half of it, whatever its height
            box(0, 0, 0, 4, 2, 2, np.pi),  # the same, turned round
            box(9, 0, 0, 4, 2, 2, 0),
            box(3, 0, 0, 1, 1, 1, 0),
        ]
    )
    scores, classes = np.array([0.5, 0.9, 0.5, 0.1, 0.4], np.float32), np.zeros(5, np.int32)
    with using(path):
        assert nms_rotated(boxes, scores, classes, 0.5, 10).tolist() == [1, 0, 4, 3]
        assert nms_rotated(boxes, scores, classes, 0.49, 10).tolist() == [1, 4, 3]
        assert nms_rotated(boxes, scores, np.array([0, 1, 0, 0, 0], np.int32), 0.2, 10).tolist() == [
            1,
            0,
            4,
            3,
        ]
        assert nms_rotated(boxes, scores, classes, 0.5, 2).tolist() == [1, 0]
        assert nms_rotated(boxes, scores, classes, 0.5, 9, max_candidates=1).tolist() == [1]
        assert nms_circle(boxes, scores, classes, 0, 10).tolist() == [1, 4, 3]
        assert nms_circle(boxes, scores, classes, 3, 10).tolist() == [1, 3]  # a distance of 3 is within 3
        assert nms_circle(boxes, scores, classes, 2.99, 10).tolist() == [1, 4, 3]
        assert nms_circle(boxes, scores, np.arange(5, dtype=np.int32) % 2, [9.0, 0.0], 10).tolist() == [
            1,
            0,
            3,
        ]


@pytest.mark.parametrize("path", PATHS)
def test_equal_boxes_stay_at_threshold_1(path: str) -> None:
    """No IoU is above 1, whatever the rounding inside: the shared area is never more than the smaller box."""
    boxes = boxes_of(np.random.default_rng(5), 400, "any")
    twice = np.concatenate([boxes, boxes])
    scores, classes = np.ones(800, np.float32), np.tile(np.arange(400, dtype=np.int32), 2)
    with using(path):
        assert nms_rotated(twice, scores, classes, 1.0, 900).tolist() == list(range(800))
        assert nms_rotated(twice, scores, classes, 0.999, 900).tolist() == list(range(400))


@pytest.mark.parametrize("path", PATHS)
def test_nothing(path: str) -> None:
    none = np.zeros((0, 7), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)
    with using(path):
        assert nms_rotated(*none, 0.5, 10).tolist() == nms_circle(*none, [1.0], 10).tolist() == []
        assert bev_iou(none[0], boxes_of(np.random.default_rng(0), 3, "any")).shape == (0, 3)


@pytest.mark.parametrize("path", PATHS)
def test_wrong_arguments(path: str) -> None:
    b, s, c = np.zeros((2, 7), np.float32), np.zeros(2, np.float32), np.zeros(2, np.int32)
    with using(path):
        for arrays, message in (
            ((b[:, :6], s, c), r"float32 \[n, 7\]"),
            ((b.astype(float), s, c), r"got float64 \[2, 7\]"),
            ((b, s[:1], c), "wrong shapes"),
            ((b, s, c.astype(np.int64)), "wrong dtypes"),
            ((b, s, c - 1), "class out of range, expected 0..65535, got -1..-1"),
        ):
            with pytest.raises(UsageError, match=message):
                nms_rotated(*arrays, 0.5, 10)
        for limit in (1.5, -0.1, float("nan"), [0.5, 2.0], [[0.5]]):
            with pytest.raises(UsageError, match=r"IoU threshold in 0\.\.1"):
                nms_rotated(b, s, c, limit, 10)
        with pytest.raises(UsageError, match="radius of 0 m or more"):
            nms_circle(b, s, c, -1, 10)
        with pytest.raises(UsageError, match=r"expected 0..0, got 1..1"):
            nms_circle(b, s, c + 1, [1.0], 10)
        with pytest.raises(UsageError, match="max_detections"):
            nms_circle(b, s, c, 1, 0)
        with pytest.raises(UsageError, match="threads"):
            bev_iou(b, b, threads=-1)
