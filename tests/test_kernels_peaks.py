from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.kernels.peaks import Peaks, peaks, reference
from tests.test_kernels import PATHS, using

SPECIAL = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0, -0.0, 40.0, -90.0], np.float32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, list[np.ndarray], float, int, object]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 20)), draw(st.integers(1, 40))
    heat = rng.normal(-1, 2, shape).astype(np.float32)
    if draw(st.booleans()):
        heat = np.round(heat)  # plateaus
    if draw(st.booleans()):
        heat = np.where(rng.random(shape) < 0.1, rng.choice(SPECIAL, shape), heat)
    maps = [
        rng.normal(0, 1, (k, *shape[1:])).astype(np.float32)
        for k in draw(st.lists(st.integers(0, 3), max_size=3))
    ]
    window: object = draw(st.sampled_from((1, 3)))
    if draw(st.booleans()):
        window = [draw(st.sampled_from((1, 3))) for _ in range(shape[0])]
    threshold = draw(st.sampled_from((0.0, 0.1, 0.2689414, 0.5, 0.9, 1.0)))
    return heat, maps, threshold, draw(st.sampled_from((1, 7, 500))), window


def run(path: str, case: tuple) -> Peaks:
    heat, maps, threshold, limit, window = case
    with using(path):
        return peaks(heat, maps, threshold=threshold, limit=limit, window=window)


@settings(deadline=None, max_examples=400)
@given(case=cases())
def test_native_is_the_reference(case: tuple) -> None:
    got, expected = run("native", case), run("numpy", case)
    for name in ("scores", "cells", "values"):
        a, b = getattr(got, name), getattr(expected, name)
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def brute_force(case: tuple) -> list[tuple[int, int, int]]:
    heat, _, threshold, limit, window = case
    classes, height, width = heat.shape
    found = []
    for c in range(classes):
        for y in range(height):
            for x in range(width):
                v = float(heat[c, y, x])
                if not np.isfinite(v):
                    continue
                around = [
                    (float(heat[c, j, i]), (j, i) < (y, x))
                    for j in range(max(0, y - 1), min(height, y + 2))
                    for i in range(max(0, x - 1), min(width, x + 2))
                    if (j, i) != (y, x)
                ]
                wide = (window if isinstance(window, int) else window[c]) == 3
                if wide and any(u > v or (u == v and before) for u, before in around):
                    continue
                found.append((-v, (c, y, x)))
    best = [cell for _, cell in sorted(found)[:limit]]
    with np.errstate(over="ignore"):
        scores = [np.float32(1 / (1 + np.exp(-np.float64(heat[cell])))) for cell in best]
    return [cell for cell, s in zip(best, scores, strict=True) if s >= np.float32(threshold) and s > 0]


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_against_brute_force(path: str, case: tuple) -> None:
    heat, maps, _, _, _ = case
    got = run(path, case)
    cells = brute_force(case)
    assert got.cells.tolist() == [list(cell) for cell in cells]
    with np.errstate(over="ignore"):
        expected = [1 / (1 + np.exp(-np.float64(heat[cell]))) for cell in cells]
    np.testing.assert_allclose(got.scores, expected, rtol=1e-7, atol=1e-30)
    for k, (_, y, x) in enumerate(cells):
        np.testing.assert_array_equal(
            got.values[k], np.concatenate([np.zeros(0), *(m[:, y, x] for m in maps)])
        )


@pytest.mark.parametrize("path", PATHS)
def test_plateaus_edges_and_ties(path: str) -> None:
    heat = np.full((2, 3, 20), -9, np.float32)
    heat[0, 1, 4:7] = 2.0  # a plateau: its first cell alone
    heat[0, 0, 0] = 2.0  # a corner is a peak as any other
    heat[1, 2, 19] = 2.0
    heat[1, 0, 10] = 3.0
    with using(path):
        found = peaks(heat, threshold=0.5, limit=9)
        assert found.cells.tolist() == [[1, 0, 10], [0, 0, 0], [0, 1, 4], [1, 2, 19]]
        assert found.values.shape == (4, 0) and len(found) == 4
        all_of_them = peaks(heat, threshold=0.5, limit=9, window=(1, 3))
        assert all_of_them.cells.tolist()[1:5] == [[0, 0, 0], [0, 1, 4], [0, 1, 5], [0, 1, 6]]
        assert peaks(heat, threshold=0.5, limit=2).cells.tolist() == [[1, 0, 10], [0, 0, 0]]
        assert found.scores[0] == np.float32(1 / (1 + np.exp(-3.0)))


@pytest.mark.parametrize("path", PATHS)
def test_a_threshold_is_met_exactly(path: str) -> None:
    heat = np.zeros((1, 1, 3), np.float32)
    heat[0, 0] = (0.0, -5.0, np.nextafter(np.float32(0), np.float32(-1)) - np.float32(1e-6))
    with using(path):
        assert peaks(heat, threshold=0.5, limit=5, window=1).cells[:, 2].tolist() == [0]
        assert len(peaks(heat, threshold=0.0, limit=5, window=1)) == 3
        assert len(peaks(heat, threshold=1.0, limit=5, window=1)) == 0
        # saturated logits still differ
        heat[0, 0] = (30.0, 40.0, 35.0)
        assert peaks(heat, threshold=1.0, limit=5).cells[:, 2].tolist() == [1]


@pytest.mark.parametrize("threshold", [0.0, 1e-30, 0.05, 0.1, 0.3, 0.5, 0.7, 0.999, 1.0])
def test_the_cutoff_is_the_least_logit_that_reaches_the_threshold(threshold: float) -> None:
    low = np.float32(reference.cutoff(threshold))
    at, below = reference.scores_of(np.array([low, np.nextafter(low, np.float32(-np.inf))]))
    assert at >= np.float32(threshold) and at > 0
    assert below < np.float32(threshold) or below == 0


@pytest.mark.parametrize("path", PATHS)
def test_views_and_empty_maps(path: str) -> None:
    rng = np.random.default_rng(0)
    whole = rng.normal(0, 2, (5, 9, 40)).astype(np.float32)
    with using(path):
        for view in (whole[::2], whole[:, ::-1], whole[:, :, 3:30], whole.transpose(1, 0, 2)):
            a = peaks(view, [view[1:3]], threshold=0.3, limit=50)
            b = peaks(view.copy(), [view[1:3].copy()], threshold=0.3, limit=50)
            assert len(a) and a.cells.tolist() == b.cells.tolist() and a.values.tolist() == b.values.tolist()
        for shape in ((0, 4, 4), (2, 0, 4), (2, 4, 0)):
            assert len(peaks(np.zeros(shape, np.float32), threshold=0.1, limit=3)) == 0


@pytest.mark.parametrize("path", PATHS)
def test_wrong_arguments(path: str) -> None:
    heat = np.zeros((2, 4, 5), np.float32)
    with using(path):
        with pytest.raises(UsageError, match=r"float32 \[C, H, W\], got float64"):
            peaks(heat.astype(float), threshold=0.1, limit=5)
        with pytest.raises(UsageError, match=r"float32 \[channels, 4, 5\]"):
            peaks(heat, [heat[:, :3]], threshold=0.1, limit=5)
        for threshold, limit in ((1.1, 5), (float("nan"), 5), (0.1, 0)):
            with pytest.raises(UsageError, match="expected threshold"):
                peaks(heat, threshold=threshold, limit=limit)
        for window in (2, [3], [1, 5]):
            with pytest.raises(UsageError, match="window: expected 1 or 3"):
                peaks(heat, threshold=0.1, limit=5, window=window)
