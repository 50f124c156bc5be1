from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.tasks.fusion.agreement import agreement
from edgekit.tasks.fusion.boxes import Boxes3D, no_boxes
from edgekit.tasks.fusion.metric import (
    ERRORS,
    NDS,
    NUSCENES_RANGES,
    Judged,
    Rules,
    bootstrap,
    evaluate,
    judge,
)
from edgekit.tasks.interval import interval95

LABELS = ("car", "pedestrian", "barrier", "traffic_cone")


@dataclass(frozen=True)
class Truth:
    boxes: np.ndarray
    classes: np.ndarray
    points: np.ndarray


def rows(*boxes: tuple[float, ...]) -> np.ndarray:
    """x, y, yaw, vx, vy -> boxes of 4 x 2 x 1.5 m."""
    table = np.zeros((len(boxes), 9), np.float32)
    table[:, 3:6] = 4, 2, 1.5
    for row, values in zip(table, boxes, strict=True):
        full = (*values, 0, 0, 0)[:5]
        row[[0, 1, 6, 7, 8]] = full
    return table


def truth(*boxes: tuple[float, ...], cls: int = 0) -> Truth:
    return Truth(rows(*boxes), np.full(len(boxes), cls, np.int32), np.full(len(boxes), 9, np.int32))


def result(scores: list[float], *boxes: tuple[float, ...], cls: int = 0) -> Boxes3D:
    return Boxes3D(rows(*boxes), np.array(scores, np.float32), np.full(len(boxes), cls, np.int32), LABELS)


def test_all_found_is_1() -> None:
    frame = truth((0, 0), (10, 0, 1), (20, 5, 2, 3, 1))
    metric = evaluate(judge([frame], [result([0.9, 0.8, 0.7], (0, 0), (10, 0, 1), (20, 5, 2, 3, 1))], LABELS))
    assert metric["mAP"] == pytest.approx(1) and metric[NDS] == pytest.approx(1)
    assert [metric[name] for name in ERRORS] == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert metric["per_class"] == pytest.approx({"car": 1}) and metric["classes"]["car"]["truths"] == 3


def test_by_hand() -> None:
    """Four truths; boxes by score: found at 0.3 m, wrong, found at 1.5 m. The other truths are not found.

    Below 1 m: one hit of four, so precision 1 at recall 0 .. 0.25, of which 0.11 .. 0.25 count: 15 of 90 points.
    From 2 m: (recall, precision) = (1/4, 1), (1/4, 1/2), (1/2, 2/3), linear in between and 0 beyond.
    """
    frame = truth((0, 0, 0.5), (20, 0), (40, 0), (60, 0))
    found = result([0.9, 0.6, 0.3], (0.3, 0, 0.1), (30, 30), (20, 1.5, -0.3))
    metric = evaluate(judge([frame], [found], LABELS))["classes"]["car"]
    # numpy's interp takes the last of the points at one recall: at 0.25 the precision is 1/2
    assert (
        metric["AP@0.5"] == metric["AP@1"] == pytest.approx((14 * 0.9 + (1 / 3 - 0.1)) / 90 / 0.9, abs=1e-12)
    )
    between = [0.5 + (r / 100 - 0.25) / 0.25 * (2 / 3 - 0.5) for r in range(25, 51)]
    expected = (14 * 0.9 + sum(p - 0.1 for p in between)) / 90 / 0.9
    assert metric["AP@2"] == metric["AP@4"] == pytest.approx(expected, abs=1e-12)
    assert metric["AP"] == pytest.approx((metric["AP@1"] + metric["AP@2"]) / 2)
    # running means 0.3, 0.9 at scores 0.9, 0.3. The score at recall r: 0.9 up to 0.24, then from 0.6 down to 0.3.
    scores = [0.9] * 14 + [0.6 - (r / 100 - 0.25) / 0.25 * 0.3 for r in range(25, 51)]
    distance = [0.3 + (0.9 - s) / 0.6 * 0.6 for s in scores]
    assert metric["ATE"] == pytest.approx(np.mean(distance), abs=1e-6)
    turn = [0.4 + (0.9 - s) / 0.6 * (0.35 - 0.4) for s in scores]
    assert metric["AOE"] == pytest.approx(np.mean(turn), abs=1e-6)
    assert metric["ASE"] == pytest.approx(0) and metric["AVE"] == pytest.approx(0)


def test_each_truth_is_found_once_and_the_nearest_free_one_counts() -> None:
    frame = truth((0, 0), (1.5, 0))
    # the second box is nearest to the first truth, which is taken: it gets the other one, 1.4 m away
    judged = judge([frame], [result([0.9, 0.8, 0.7], (0, 0), (0.1, 0), (0.2, 0))], LABELS).classes[0]
    assert judged.found.tolist() == [[True, False, False]] * 2 + [[True, True, False]] * 2
    assert judged.errors[:2, 0] == pytest.approx([0, 1.4], abs=1e-6) and np.isnan(judged.errors[2]).all()
    # a box exactly at the distance is too far
    edge = judge([truth((0, 0))], [result([0.5], (0.5, 0))], LABELS).classes[0]
    assert edge.found[:, 0].tolist() == [False, True, True, True]


def test_frames_and_classes_stand_apart() -> None:
    there, empty = truth((0, 0)), truth()
    assert evaluate(judge([there, empty], [no_boxes(LABELS), result([0.9], (0, 0))], LABELS))["mAP"] == 0
    other = evaluate(judge([there], [result([0.9], (0, 0), cls=1)], LABELS))
    assert other["per_class"] == {"car": 0} and other[NDS] == 0  # pedestrian has no truth: no AP


def test_turns() -> None:
    for cls, expected in ((0, np.pi - 0.1), (2, 0.1)):
        metric = evaluate(
            judge([truth((0, 0, 3.0), cls=cls)], [result([0.9], (0, 0, -0.0415926), cls=cls)], LABELS)
        )
        assert metric["AOE"] == pytest.approx(expected, abs=1e-6)
    wrapped = evaluate(judge([truth((0, 0, 3.1))], [result([0.9], (0, 0, -3.1))], LABELS))
    assert wrapped["AOE"] == pytest.approx(2 * np.pi - 6.2, abs=1e-6)


def test_labels_without_an_error() -> None:
    frame = truth((0, 0, 0, 1, 1), cls=3)
    metric = evaluate(judge([frame], [result([0.9], (0, 0, 2, 0, 0), cls=3)], LABELS))
    assert metric["AOE"] is None and metric["AVE"] is None and metric[NDS] is None
    assert metric["ATE"] == pytest.approx(0) and metric["mAP"] == pytest.approx(1)


def test_unknown_velocities() -> None:
    nan = float("nan")
    frame = truth((0, 0, 0, nan, nan), (20, 0, 0, 2, 0))
    metric = evaluate(judge([frame], [result([0.9, 0.8], (0, 0, 0, 5, 5), (20, 0, 0, 2, 1))], LABELS))
    # one velocity is known: the running mean is 0 before it, 1 from it on, over scores from 0.9 to 0.8
    assert 0 < metric["AVE"] < 1
    blind = evaluate(judge([frame], [result([0.9, 0.8], (0, 0, 0, nan, nan), (20, 0, 0, nan, nan))], LABELS))
    assert blind["AVE"] == 1 and blind["mAP"] == pytest.approx(1)


def test_scale_is_of_boxes_on_each_other() -> None:
    half = result([0.9], (0, 0))
    half.boxes[0, 3:6] = 2, 2, 3  # shared 2 x 2 x 1.5 = 6; 12 + 12 - 6
    assert evaluate(judge([truth((0, 0))], [half], LABELS))["ASE"] == pytest.approx(1 - 6 / 18)


def test_what_is_left_out() -> None:
    frame = truth((0, 0), (45, 0), (5, 5))
    frame.points[2] = 0
    found = result([0.9, 0.8], (0, 0), (45, 0))
    assert evaluate(judge([frame], [found], LABELS))["classes"]["car"]["truths"] == 2
    near = Rules(ranges={"car": 40.0})
    judged = judge([frame], [found], LABELS, near).classes[0]
    assert judged.truths.tolist() == [1] and len(judged.scores) == 1
    assert judge([frame], [found], LABELS, Rules(ranges=NUSCENES_RANGES)).classes[0].truths.tolist() == [2]
    frame.points[2] = -1  # nobody counted
    assert judge([frame], [found], LABELS).classes[0].truths.tolist() == [3]
    assert judge([frame], [found], LABELS, Rules(min_points=10)).classes[0].truths.tolist() == [1]


def test_nothing_at_all() -> None:
    metric = evaluate(judge([], [], LABELS))
    assert metric["mAP"] is None and metric[NDS] is None and metric["per_class"] == {}
    judged = judge([truth()], [no_boxes(LABELS)], LABELS)
    assert evaluate(judged)["mAP"] is None and bootstrap(judged, rounds=3) == [None] * 3


def test_a_miss_below_the_least_recall_has_error_1() -> None:
    frame = truth(*((10.0 * i, 0) for i in range(20)))
    metric = evaluate(judge([frame], [result([0.9, 0.8], (0, 0), (10, 0))], LABELS))
    assert metric["mAP"] == 0 and [metric[name] for name in ERRORS] == [1] * 4  # recall 0.1 is not passed


def test_refusals() -> None:
    frame, found = truth((0, 0)), result([0.9], (0, 0))
    with pytest.raises(ValueError, match="1 results for 2 frames"):
        judge([frame, frame], [found], LABELS)
    with pytest.raises(ValueError, match=r"result has a class outside 0\.\.3"):
        judge([frame], [result([0.9], (0, 0), cls=4)], LABELS)
    with pytest.raises(ValueError, match="score or box that is not finite"):
        judge([frame], [result([float("nan")], (0, 0))], LABELS)
    frame.boxes[0, 4] = 0
    with pytest.raises(ValueError, match="without size"):
        judge([frame], [found], LABELS)
    with pytest.raises(ValueError, match="error_distance"):
        Rules(distances=(1.0,))


def random_frames(seed: int, count: int) -> tuple[list[Truth], list[Boxes3D]]:
    rng = np.random.default_rng(seed)
    truths, results = [], []
    for _ in range(count):
        n = int(rng.integers(0, 12))
        boxes = np.zeros((n, 9), np.float32)
        boxes[:, :2] = rng.uniform(-30, 30, (n, 2))
        boxes[:, 3:6] = rng.uniform(0.5, 5, (n, 3))
        boxes[:, 6:] = rng.normal(0, 2, (n, 3))
        classes = rng.integers(0, 4, n).astype(np.int32)
        truths.append(Truth(boxes, classes, np.full(n, 5, np.int32)))
        found = boxes + rng.normal(0, 0.4, boxes.shape).astype(np.float32)
        found[:, 3:6] = np.abs(found[:, 3:6]) + np.float32(0.1)
        results.append(Boxes3D(found, (rng.integers(1, 9, n) / 8).astype(np.float32), classes, LABELS))
    return truths, results


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 6))
def test_a_sample_of_frames_is_their_metric(seed: int, count: int) -> None:
    """What the bootstrap computes by counts is the metric of the drawn frames, but for the order among equal scores."""
    truths, results = random_frames(seed, count)
    rng = np.random.default_rng(seed)
    for r in results:  # no two scores are equal
        r.scores[:] = rng.random(len(r)).astype(np.float32)
    judged = judge(truths, results, LABELS)
    drawn = np.random.default_rng(3).integers(0, count, count)
    chosen = np.sort(drawn)
    again = judge([truths[i] for i in chosen], [results[i] for i in chosen], LABELS)
    assert bootstrap(judged, rounds=1, seed=3)[0] == pytest.approx(evaluate(again)["mAP"], abs=1e-12)


def test_interval() -> None:
    judged = judge(*random_frames(1, 12), LABELS)
    values = bootstrap(judged, rounds=60)
    assert values == bootstrap(judged, rounds=60) and values != bootstrap(judged, rounds=60, seed=1)
    bounds = interval95(values)
    assert bounds is not None and bounds[0] < evaluate(judged)["mAP"] < bounds[1]
    seen: list[tuple[int, int]] = []
    bootstrap(judged, rounds=2, progress=lambda *at: seen.append(at))
    assert seen == [(0, 2), (1, 2)]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 5))
def test_bounds_and_what_never_helps(seed: int, count: int) -> None:
    truths, results = random_frames(seed, count)
    metric = evaluate(judge(truths, results, LABELS))
    if metric["mAP"] is None:
        return
    assert 0 <= metric["mAP"] <= 1
    names = [f"AP@{d:g}" for d in Rules().distances]
    for row in metric["classes"].values():
        assert all(0 <= row[name] <= 1 for name in names)
    nothing = evaluate(judge(truths, [no_boxes(LABELS)] * count, LABELS))
    assert nothing["mAP"] == 0 and all(nothing[name] in (1, None) for name in ERRORS)
    # a wrong box above all others never raises the AP
    far = [
        Boxes3D(
            np.concatenate([r.boxes, rows((500, 500))]),
            np.append(r.scores, np.float32(2)),
            np.append(r.classes, np.int32(0)),
            LABELS,
        )
        for r in results
    ]
    worse = evaluate(judge(truths, far, LABELS))
    assert worse["mAP"] <= metric["mAP"] + 1e-12


def test_judged_is_plain() -> None:
    judged = judge(*random_frames(2, 3), LABELS)
    assert isinstance(judged, Judged) and judged.frames == 3
    assert dataclasses.replace(judged, rules=Rules(min_recall=0.0)).rules.min_recall == 0


def test_agreement() -> None:
    first = result([0.9, 0.8, 0.7, 0.6], (0, 0), (10, 0), (20, 0), (30, 0))
    second = Boxes3D(
        rows((0.5, 0), (10.1, 0), (10.2, 0), (20, 0.6)),
        np.array([0.95, 0.5, 0.4, 0.3], np.float32),
        np.zeros(4, np.int32),
        LABELS,
    )
    found = agreement([(first, second), (no_boxes(), no_boxes())])
    assert (found["images"], found["unit"], found["boxes_reference"], found["boxes_payload"]) == (
        2,
        "boxes",
        4,
        4,
    )
    assert found["boxes_matched"] == 2 and found["lost_score_max"] == pytest.approx(0.7)
    assert found["centre_shift_mean"] == pytest.approx(0.3, abs=1e-6)
    assert found["centre_shift_max"] == pytest.approx(0.5, abs=1e-6)
    assert found["score_shift_max"] == pytest.approx(0.3, abs=1e-6)
    assert found["pairs"] == [[0.9, 0.95], [0.8, 0.5]]
    crowd = result([0.9, 0.8], (0, 0), (0.1, 0))
    assert agreement([(crowd, result([0.7], (0, 0)))])["boxes_matched"] == 1  # one box is not found twice
    same = agreement([(first, first)])
    assert same["boxes_matched"] == 4 and same["lost_score_max"] is None and same["centre_shift_max"] == 0
    none = agreement([(no_boxes(), first)])
    assert none["score_shift_mean"] is None and none["centre_shift_mean"] is None
