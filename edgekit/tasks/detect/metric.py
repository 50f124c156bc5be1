"""Average precision by COCO's rules, computed by pycocotools (Lin et al. 2014, "Microsoft COCO")."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from edgekit.errors import MissingExtraError
from edgekit.tasks.detect.dataset import CocoSet
from edgekit.tasks.detect.detections import Detections
from edgekit.tasks.interval import interval95

__all__ = ["NAMES", "bootstrap", "bootstrap_interval", "evaluate", "interval95"]

NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
"""AP over IoU 0.50:0.95, at 0.50, at 0.75, and by object size; maxDets 100."""


def evaluate(data: CocoSet, results: Iterable[tuple[int, Detections]]) -> dict[str, Any]:
    """AP of `results` (picture id, detections) on `data`.

    Returns: NAMES and AR100, each 0..1 or None where the data has nothing to measure it on, and
    `per_class` (label -> AP). A picture without a result counts as one where nothing was found.

    Raises: MissingExtraError without pycocotools; ValueError for results that do not belong to
    `data` (unknown or repeated picture id, class out of range, numbers that are not finite).
    """
    judged = _judge(data, results)
    if judged is None:
        return {**dict.fromkeys((*NAMES, "AR100")), "per_class": {}}
    stats = judged.stats
    metric: dict[str, Any] = {name: _number(stats[i]) for i, name in enumerate(NAMES)}
    metric["AR100"] = _number(stats[8])
    # precision: [IoU threshold, recall, class, area range, maxDets]
    precision = judged.eval["precision"][:, :, :, 0, -1]
    metric["per_class"] = {
        data.labels[c]: round(float(p[p > -1].mean()), 4)
        for c, p in zip(judged.params.catIds, np.moveaxis(precision, 2, 0), strict=True)
        if (p > -1).any()
    }
    return metric


def bootstrap_interval(
    data: CocoSet, results: Iterable[tuple[int, Detections]], *, rounds: int = 100, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of AP under resampling of the pictures (percentile bootstrap, Efron 1979).

    It says how much of a difference is the choice of pictures. None where AP is not defined.
    """
    return interval95(bootstrap(data, results, rounds=rounds, seed=seed))


def bootstrap(
    data: CocoSet,
    results: Iterable[tuple[int, Detections]],
    *,
    rounds: int = 100,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    at50: bool = False,
) -> list[float | None]:
    """AP of `rounds` samples of the pictures with repetition; None for a sample without objects. at50: AP50.

    Round i draws the same pictures for every `results` with the same data and seed, so two networks
    can be compared round by round (paired bootstrap). Empty where AP is not defined.
    """
    judged = _judge(data, results)
    if judged is None or _number(judged.stats[0]) is None:
        return []
    rng = np.random.default_rng(seed)
    # evalImgs is laid out [class][area range][picture]; only the range "all" counts for AP
    pictures, areas = len(judged.params.imgIds), len(judged.params.areaRng)
    table = [judged.evalImgs[i : i + pictures] for i in range(0, len(judged.evalImgs), pictures)][::areas]
    sample = copy.copy(judged)
    sample.params = copy.deepcopy(judged.params)
    sample.params.areaRng, sample.params.areaRngLbl = judged.params.areaRng[:1], judged.params.areaRngLbl[:1]
    sample.params.maxDets = judged.params.maxDets[-1:]
    values: list[float | None] = []
    for number in range(rounds):
        if progress is not None:
            progress(number, rounds)
        chosen = rng.integers(0, pictures, pictures)
        sample.evalImgs = [row[i] for row in table for i in chosen]
        sample._paramsEval = sample.params
        with contextlib.redirect_stdout(io.StringIO()):
            sample.accumulate(sample.params)
        precision = sample.eval["precision"][:1] if at50 else sample.eval["precision"]
        there = precision > -1
        values.append(float(precision[there].mean()) if there.any() else None)
    return values


def _judge(data: CocoSet, results: Iterable[tuple[int, Detections]]) -> Any:
    """A COCOeval that has run, or None when the data holds no object."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise MissingExtraError("pycocotools", "build", "measure average precision") from None
    results = list(results)
    _check(data, results)
    rows: list[dict[str, Any]] = [
        {
            "image_id": image_id,
            "category_id": int(cls),
            "bbox": [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])],
            "score": float(score),
        }
        for image_id, detections in results
        for box, score, cls in zip(detections.boxes, detections.scores, detections.classes, strict=True)
    ]
    if not data.truths:
        return None
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth = COCO()
        truth.dataset = {
            "images": [{"id": p.id, "width": p.width, "height": p.height} for p in data.images],
            "annotations": [
                {
                    "id": i + 1,
                    "image_id": t.image_id,
                    "category_id": t.cls,
                    "bbox": list(t.box),
                    "area": t.area,
                    "iscrowd": int(t.crowd),
                }
                for i, t in enumerate(data.truths)
            ],
            "categories": [{"id": i, "name": name} for i, name in enumerate(data.labels)],
        }
        truth.createIndex()
        found = COCO()
        found.dataset = {
            "images": truth.dataset["images"],
            "categories": truth.dataset["categories"],
            "annotations": [
                {**row, "id": i + 1, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
                for i, row in enumerate(rows)
            ],
        }
        found.createIndex()
        judged = COCOeval(truth, found, "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return judged


def _check(data: CocoSet, results: list[tuple[int, Detections]]) -> None:
    """pycocotools would drop what it does not know without a word, and the AP would still look right."""
    known = {p.id for p in data.images}
    seen: set[int] = set()
    for image_id, found in results:
        if image_id not in known or image_id in seen:
            raise ValueError(
                f"picture id {image_id} is {'repeated' if image_id in seen else 'not in the data'}"
            )
        seen.add(image_id)
        if len(found) and not 0 <= found.classes.min() <= found.classes.max() < len(data.labels):
            raise ValueError(f"picture {image_id}: a class outside the data's {len(data.labels)} classes")
        if not (np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()):
            raise ValueError(f"picture {image_id}: a box or score that is not finite")


def _number(value: float) -> float | None:
    """pycocotools says -1 for "nothing to measure"."""
    return None if value < 0 else round(float(value), 6)
