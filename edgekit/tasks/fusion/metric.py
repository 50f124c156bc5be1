"""Average precision by distance of centres, as nuScenes measures it (Caesar et al. 2020, section 3.1).

Per class and distance (0.5, 1, 2, 4 m): boxes of all frames, best score first, each take the nearest truth of
its class and frame that is still free, if its centre lies nearer than the distance, seen from above. Precision is read
off at recall 0, 0.01, .. 1, linearly between the points of the curve and 0 beyond its end. AP is the mean over recall
above 0.1 of max(precision - 0.1, 0) / 0.9. mAP: mean over distances, then over classes.

Errors of found boxes, at 2 m: distance of centres from above (ATE, m), 1 - IoU of the boxes moved and turned onto
each other (ASE), smallest turn between the yaws (AOE, rad; up to half a turn where the two ends look the same), difference of
velocities (AVE, m/s). Each is a running mean by falling score, read off at the scores that belong to recall 0.11 up
to the highest one reached, and averaged; 1 where recall 0.1 is not passed. Then the mean over classes.

NDS without attributes = (5 mAP + sum of max(0, 1 - error) over the four) / 9. The published NDS has attributes
(moving, parked, ..) as a fifth error and divides by 10; the two are not comparable.

Details as the published devkit has them: among equal scores the box that comes later counts first; an unknown velocity
is left out of the running mean, and AVE is 1 where none is known. Different here: a class without truth has no AP
and is not part of any mean (there 0), which matters on small sets only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from edgekit.tasks.fusion.boxes import Boxes3D

ERRORS = ("ATE", "ASE", "AOE", "AVE")
NDS = "NDS_without_attributes"
ROUNDS = 200
POINTS = 101
MAP_WEIGHT = 5


class Labelled(Protocol):
    """The truth of one frame: boxes float32 [n, 9] (`boxes.FIELDS`), classes int [n], points int [n] (LiDAR points
    inside; below 0 = not counted)."""

    @property
    def boxes(self) -> np.ndarray: ...
    @property
    def classes(self) -> np.ndarray: ...
    @property
    def points(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Rules:
    """What counts. The defaults are nuScenes' (configuration detection_cvpr_2019), but for `ranges`.

    ranges: by label, metres from the frame's origin seen from above: truths and boxes whose centre is not
    nearer are left out; a label that is not there has no limit (`NUSCENES_RANGES`).
    min_points: truths with fewer LiDAR points inside are left out; what is found there counts as wrong.
    half_turn: labels whose two ends look the same. no_yaw, no_velocity: labels without that error.
    """

    distances: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    error_distance: float = 2.0
    min_recall: float = 0.1
    min_precision: float = 0.1
    ranges: Mapping[str, float] = field(default_factory=dict)
    min_points: int = 1
    half_turn: tuple[str, ...] = ("barrier",)
    no_yaw: tuple[str, ...] = ("traffic_cone",)
    no_velocity: tuple[str, ...] = ("traffic_cone", "barrier")

    def __post_init__(self) -> None:
        if self.error_distance not in self.distances:
            raise ValueError(f"error_distance {self.error_distance} must be one of {self.distances}")
        if not 0 <= self.min_recall < 1 or not 0 <= self.min_precision < 1:
            raise ValueError("min_recall and min_precision must be between 0 and 1")


NUSCENES_RANGES = {
    "car": 50.0, "truck": 50.0, "bus": 50.0, "trailer": 50.0, "construction_vehicle": 50.0, "pedestrian": 40.0,
    "motorcycle": 40.0, "bicycle": 40.0, "traffic_cone": 30.0, "barrier": 30.0,
}  # fmt: skip


@dataclass(frozen=True)
class ClassJudged:
    """Boxes of one class in all frames, in the order in which they count.

    scores: float64 [n].  frames: int [n].  found: bool [distances, n].  errors: float64 [n, 4], NaN where not found
    at `error_distance` or unknown.  truths: int [frames], how many there are to find.
    """

    scores: np.ndarray
    frames: np.ndarray
    found: np.ndarray
    errors: np.ndarray
    truths: np.ndarray


@dataclass(frozen=True)
class Judged:
    """Which boxes were found: all that the metric of any sample of the frames needs."""

    labels: tuple[str, ...]
    rules: Rules
    frames: int
    classes: tuple[ClassJudged, ...]


def judge(
    truths: Sequence[Labelled],
    results: Sequence[Boxes3D],
    labels: tuple[str, ...],
    rules: Rules | None = None,
) -> Judged:
    """Match the boxes of every frame with its truths. results[i] belongs to truths[i], classes of both count in `labels`.

    Raises: ValueError for unequal numbers of frames, classes that are no label, a score or a place that is not finite.
    """
    rules = rules or Rules()
    if len(truths) != len(results):
        raise ValueError(f"{len(results)} results for {len(truths)} frames of truth")
    for i, (truth, result) in enumerate(zip(truths, results, strict=True)):
        for what, classes in (("truth", truth.classes), ("result", result.classes)):
            if len(classes) and (classes.min() < 0 or classes.max() >= len(labels)):
                raise ValueError(f"frame {i}: {what} has a class outside 0..{len(labels) - 1}")
        if not (np.isfinite(result.scores).all() and np.isfinite(result.boxes[:, :7]).all()):
            raise ValueError(f"frame {i}: the result has a score or box that is not finite")
        if not (np.isfinite(truth.boxes[:, :7]).all() and (truth.boxes[:, 3:6] > 0).all()):
            raise ValueError(f"frame {i}: the truth has a box that is not finite or without size")
    judged = [_judge_class(c, label, truths, results, rules) for c, label in enumerate(labels)]
    return Judged(labels, rules, len(truths), tuple(judged))


def evaluate(judged: Judged) -> dict[str, Any]:
    """The metric over all frames.

    Returns: mAP, NDS_without_attributes, ATE, ASE, AOE, AVE (None where not defined), AP@<distance> (mean over classes),
    per_class (label -> AP), classes (label -> truths, AP, AP@<distance> and the errors; only labels with truths).
    """
    return _metric(judged, np.ones(judged.frames, np.int64))


def bootstrap(
    judged: Judged, *, rounds: int = ROUNDS, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> list[float | None]:
    """mAP of `rounds` samples of the frames with repetition (Efron 1979); round i draws the same frames for every result
    on the same truths. `tasks.interval.interval95` makes an interval of it. None for a sample without truths."""
    rng = np.random.default_rng(seed)
    values: list[float | None] = []
    for number in range(rounds):
        if progress is not None:
            progress(number, rounds)
        drawn = np.bincount(rng.integers(0, judged.frames, judged.frames), minlength=judged.frames)
        aps = [ap for c in judged.classes if (ap := _precisions(c, judged.rules, drawn)) is not None]
        values.append(float(np.mean([np.mean(ap) for ap in aps])) if aps else None)
    return values


def _judge_class(
    cls: int, label: str, truths: Sequence[Labelled], results: Sequence[Boxes3D], rules: Rules
) -> ClassJudged:
    reach = rules.ranges.get(label, np.inf)
    scores, frames, found, errors, counts = [], [], [], [], []
    for i, (truth, result) in enumerate(zip(truths, results, strict=True)):
        wanted = (truth.classes == cls) & ((truth.points < 0) | (truth.points >= rules.min_points))
        there = truth.boxes[wanted].astype(np.float64)
        there = there[np.hypot(there[:, 0], there[:, 1]) < reach]
        mine = np.flatnonzero(result.classes == cls)
        boxes, score = result.boxes[mine].astype(np.float64), result.scores[mine].astype(np.float64)
        near = np.hypot(boxes[:, 0], boxes[:, 1]) < reach
        boxes, score = boxes[near], score[near]
        way = boxes[:, None, :2] - there[None, :, :2]
        distance = np.sqrt((way * way).sum(axis=2))
        order = np.argsort(score, kind="stable")[::-1]
        matched = np.array([_match(distance, order, limit) for limit in rules.distances])
        at = matched[rules.distances.index(rules.error_distance)]
        hit = at >= 0
        error = np.full((len(boxes), len(ERRORS)), np.nan)
        error[hit] = _errors(boxes[hit], there[at[hit]], distance[hit, at[hit]], label, rules)
        scores.append(score)
        frames.append(np.full(len(boxes), i))
        found.append(matched >= 0)
        errors.append(error)
        counts.append(len(there))
    if not scores:
        nothing = np.zeros(0)
        return ClassJudged(nothing, nothing.astype(int), np.zeros((len(rules.distances), 0), bool),
                           np.zeros((0, len(ERRORS))), nothing.astype(int))  # fmt: skip
    all_scores = np.concatenate(scores)
    order = np.argsort(all_scores, kind="stable")[::-1]
    return ClassJudged(
        all_scores[order],
        np.concatenate(frames)[order],
        np.concatenate(found, axis=1)[:, order],
        np.concatenate(errors)[order],
        np.array(counts),
    )


def _match(distance: np.ndarray, order: np.ndarray, limit: float) -> np.ndarray:
    """Which truth each box takes, going down `order`: int [boxes], -1 = none."""
    taken = np.full(len(distance), -1)
    if not distance.shape[1]:
        return taken
    free = np.zeros(distance.shape[1])  # inf once taken
    for box in order:
        away = distance[box] + free
        nearest = int(np.argmin(away))
        if away[nearest] < limit:
            taken[box] = nearest
            free[nearest] = np.inf
    return taken


def _errors(
    boxes: np.ndarray, truths: np.ndarray, distance: np.ndarray, label: str, rules: Rules
) -> np.ndarray:
    """float64 [n, 4] of matched pairs."""
    shared = np.minimum(boxes[:, 3:6], truths[:, 3:6]).prod(axis=1)
    scale = 1 - shared / (boxes[:, 3:6].prod(axis=1) + truths[:, 3:6].prod(axis=1) - shared)
    turn = np.pi if label in rules.half_turn else 2 * np.pi
    yaw = np.abs((truths[:, 6] - boxes[:, 6] + turn / 2) % turn - turn / 2)
    move = boxes[:, 7:9] - truths[:, 7:9]
    return np.stack([distance, scale, yaw, np.sqrt((move * move).sum(axis=1))], axis=1)


@dataclass(frozen=True)
class _Curve:
    """precision, score: float64 [101], at recall 0, 0.01, .. 1. The errors' means by falling score."""

    precision: np.ndarray
    score: np.ndarray


def _curve(scores: np.ndarray, found: np.ndarray, truths: int) -> _Curve | None:
    """None where nothing was found."""
    if not found.any():
        return None
    hits = np.cumsum(found).astype(np.float64)
    recall, at = hits / truths, np.linspace(0, 1, POINTS)
    precision = np.interp(at, recall, hits / np.arange(1, len(hits) + 1), right=0)
    return _Curve(precision, np.interp(at, recall, scores, right=0))


def _first(rules: Rules) -> int:
    return round((POINTS - 1) * rules.min_recall) + 1


def _precision(curve: _Curve | None, rules: Rules) -> float:
    if curve is None:
        return 0.0
    over = np.maximum(curve.precision[_first(rules) :] - rules.min_precision, 0)
    return min(1.0, float(over.mean()) / (1 - rules.min_precision))


def _sample(judged: ClassJudged, drawn: np.ndarray) -> tuple[np.ndarray, int]:
    """Indices of the boxes, each as often as its frame was drawn, and how many truths there are."""
    index = np.arange(len(judged.scores))
    return np.repeat(index, drawn[judged.frames]), int((judged.truths * drawn).sum())


def _precisions(judged: ClassJudged, rules: Rules, drawn: np.ndarray) -> list[float] | None:
    """AP by distance; None without truths."""
    index, truths = _sample(judged, drawn)
    if not truths:
        return None
    return [_precision(_curve(judged.scores[index], found[index], truths), rules) for found in judged.found]


def _error_means(judged: ClassJudged, label: str, rules: Rules, drawn: np.ndarray) -> list[float | None]:
    index, truths = _sample(judged, drawn)
    found = judged.found[rules.distances.index(rules.error_distance)][index]
    curve = _curve(judged.scores[index], found, truths)
    means: list[float | None] = []
    for name, column in zip(ERRORS, judged.errors.T, strict=True):
        if (name == "AOE" and label in rules.no_yaw) or (name == "AVE" and label in rules.no_velocity):
            means.append(None)
            continue
        last = int(np.flatnonzero(curve.score).max(initial=0)) if curve is not None else 0
        if curve is None or last < _first(rules):
            means.append(1.0)
            continue
        errors = column[index][found]
        known = ~np.isnan(errors)
        count = np.cumsum(known)
        running = np.nancumsum(errors) / np.maximum(count, 1) if known.any() else np.ones(len(errors))
        scores = judged.scores[index][found]
        # np.interp wants rising places
        by_recall = np.interp(curve.score[::-1], scores[::-1], running[::-1])[::-1]
        means.append(float(by_recall[_first(rules) : last + 1].mean()))
    return means


def _metric(judged: Judged, drawn: np.ndarray) -> dict[str, Any]:
    rules = judged.rules
    names = [f"AP@{distance:g}" for distance in rules.distances]
    classes: dict[str, dict[str, Any]] = {}
    for label, c in zip(judged.labels, judged.classes, strict=True):
        aps = _precisions(c, rules, drawn)
        if aps is None:
            continue
        errors = _error_means(c, label, rules, drawn)
        classes[label] = {"truths": int((c.truths * drawn).sum()), "AP": float(np.mean(aps))}
        classes[label] |= dict(zip(names, aps, strict=True)) | dict(zip(ERRORS, errors, strict=True))

    def mean(key: str) -> float | None:
        known = [row[key] for row in classes.values() if row[key] is not None]
        return float(np.mean(known)) if known else None

    result: dict[str, Any] = {"mAP": mean("AP"), NDS: None}
    result |= {name: mean(name) for name in (*ERRORS, *names)}
    means = [result[name] for name in ERRORS]
    if result["mAP"] is not None and None not in means:
        kept = sum(max(0.0, 1 - error) for error in means)
        result[NDS] = (MAP_WEIGHT * result["mAP"] + kept) / (MAP_WEIGHT + len(ERRORS))
    result["per_class"] = {label: row["AP"] for label, row in classes.items()}
    result["classes"] = classes
    return result
