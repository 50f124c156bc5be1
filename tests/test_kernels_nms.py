from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.kernels.nms import nms
from tests.test_kernels import PATHS, using

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Arrays, float, int, int]:
    n = draw(st.one_of(st.integers(0, 5), st.integers(0, 120)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    corner = rng.integers(0, 30, (n, 2))
    # whole numbers, so that exact ties in IoU and score happen; some sides 0 or negative
    boxes = np.hstack([corner, corner + rng.integers(-1, 20, (n, 2))]).astype(np.float32)
    scores = (rng.integers(0, 12, n) / 8).astype(np.float32)
    if draw(st.booleans()) and n:
        special = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38], np.float32)
        boxes = np.where(rng.random(boxes.shape) < 0.05, rng.choice(special, boxes.shape), boxes)
        scores = np.where(rng.random(n) < 0.1, rng.choice(special, n), scores)
    classes = rng.integers(0, draw(st.sampled_from((1, 2, 90))), n).astype(np.int32)
    threshold = draw(st.sampled_from((0.0, 0.25, 0.5, 0.65, 1.0)))
    return (
        (boxes, scores, classes),
        threshold,
        draw(st.sampled_from((1, 3, 300))),
        draw(st.sampled_from((4, 30_000))),
    )


@settings(deadline=None, max_examples=500)
@given(case=cases())
def test_native_is_the_reference(case: tuple[Arrays, float, int, int]) -> None:
    arrays, threshold, limit, candidates = case
    with using("numpy"):
        expected = nms(*arrays, threshold, limit, max_candidates=candidates)
    with using("native"):
        got = nms(*arrays, threshold, limit, max_candidates=candidates)
    assert got.dtype == expected.dtype == np.int32
    assert got.tolist() == expected.tolist()


def iou(a: np.ndarray, b: np.ndarray) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0.0) * max(h, 0.0)
    union = sum(max(x[2] - x[0], 0.0) * max(x[3] - x[1], 0.0) for x in (a, b)) - inter
    return inter / union if union > 0 else 0.0


def brute_force(arrays: Arrays, threshold: float, limit: int, candidates: int) -> list[int]:
    boxes, scores, classes = arrays[0].astype(float), arrays[1], arrays[2]
    usable = [i for i in range(len(boxes)) if scores[i] == scores[i] and np.isfinite(boxes[i]).all()]
    kept: list[int] = []
    for i in sorted(usable, key=lambda i: (-scores[i], i))[:candidates]:
        if all(classes[i] != classes[k] or not iou(boxes[i], boxes[k]) > threshold for k in kept):
            kept.append(i)
    return kept[:limit]


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=300)
@given(case=cases())
def test_against_brute_force(path: str, case: tuple[Arrays, float, int, int]) -> None:
    arrays, threshold, limit, candidates = case
    boxes = arrays[0]
    arrays = (
        np.where(np.abs(boxes) > 1e30, np.float32(np.inf), boxes),
        *arrays[1:],
    )  # float32 areas would overflow
    if threshold in (0.65,):
        threshold = 0.6499  # no IoU of these boxes lies there: the two roundings cannot disagree
    with using(path):
        got = nms(*arrays, threshold, limit, max_candidates=candidates)
    assert got.tolist() == brute_force(arrays, threshold, limit, candidates)


def box(*corners: float) -> np.ndarray:
    return np.array(corners, np.float32)


@pytest.mark.parametrize("path", PATHS)
def test_rule(path: str) -> None:
    boxes = np.stack(
        [box(0, 0, 10, 10), box(0, 0, 10, 5), box(0, 0, 10, 10), box(20, 0, 30, 10), box(0, 0, 10, 10)]
    )
    scores = np.array([0.5, 0.9, 0.5, 0.1, 0.8], np.float32)
    classes = np.array([0, 0, 0, 0, 1], np.int32)
    with using(path):
        # IoU of 0 and 1 is exactly 0.5: kept at 0.5 (not above), dropped below; 2 ties with 0 and loses by index
        assert nms(boxes, scores, classes, 0.5, 10).tolist() == [1, 4, 0, 3]
        assert nms(boxes, scores, classes, 0.49, 10).tolist() == [1, 4, 3]
        assert nms(boxes, scores, classes, 1.0, 10).tolist() == [1, 4, 0, 2, 3]
        assert nms(boxes, scores, classes, 0.5, 2).tolist() == [1, 4]
        assert nms(boxes, scores, classes, 0.5, 10, max_candidates=3).tolist() == [1, 4, 0]


@pytest.mark.parametrize("path", PATHS)
def test_degenerate(path: str) -> None:
    empty = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)
    points = np.zeros((3, 4), np.float32), np.ones(3, np.float32), np.zeros(3, np.int32)
    with using(path):
        assert nms(*empty, 0.5, 10).tolist() == []
        assert nms(*points, 0.0, 10).tolist() == [0, 1, 2]  # no area, no overlap
        lost = np.full(3, np.nan, np.float32)
        assert nms(points[0], lost, points[2], 0.5, 10).tolist() == []


@pytest.mark.parametrize("path", PATHS)
def test_out_is_used(path: str) -> None:
    out = np.full(5, -1, np.int32)
    boxes = np.stack([box(0, 0, 1, 1), box(5, 5, 6, 6)])
    with using(path):
        kept = nms(boxes, np.ones(2, np.float32), np.zeros(2, np.int32), 0.5, 5, out=out)
    assert np.shares_memory(kept, out)
    assert out.tolist() == [0, 1, -1, -1, -1]


@pytest.mark.parametrize("path", PATHS)
def test_wrong_arguments(path: str) -> None:
    b, s, c = np.zeros((2, 4), np.float32), np.zeros(2, np.float32), np.zeros(2, np.int32)
    with using(path):
        for arrays, message in (
            ((b[:1], s, c), "wrong shapes"),
            ((b[:, :3], s, c), "wrong shapes"),
            ((b.astype(float), s, c), "wrong dtypes"),
            ((b, s, c.astype(np.int64)), "wrong dtypes"),
            ((b, s, c - 1), "got -1..-1"),
            ((b, s, c + 70_000), "expected 0..65535"),
        ):
            with pytest.raises(UsageError, match=message):
                nms(*arrays, 0.5, 10)
        for threshold, limit in ((1.5, 10), (float("nan"), 10), (0.5, 0)):
            with pytest.raises(UsageError, match="expected iou_threshold"):
                nms(b, s, c, threshold, limit)
