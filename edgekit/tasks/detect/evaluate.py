"""Runs a detector over labelled pictures for its metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgekit.errors import UsageError
from edgekit.optional import load_cv2
from edgekit.tasks.detect.dataset import CocoSet
from edgekit.tasks.detect.detections import Detections
from edgekit.tasks.detect.metric import evaluate
from edgekit.tasks.detect.pipeline import DetectPipeline

EVAL_SCORE = 0.001
"""AP integrates over all scores: keep nearly everything, as the COCO evaluation scripts do."""
EVAL_DETECTIONS = 100
"""COCO's maxDets."""


def evaluate_pipeline(
    pipeline: DetectPipeline, data: CocoSet, *, progress: Callable[[int, int], None] | None = None
) -> tuple[dict[str, Any], list[tuple[int, Detections]]]:
    """AP of `pipeline` on `data` (COCO rules), and the detections per picture id."""
    cv2 = load_cv2("read pictures")
    results: list[tuple[int, Detections]] = []
    for i, item in enumerate(data.images):
        image = cv2.imread(str(item.path), cv2.IMREAD_COLOR)
        if image is None:
            raise UsageError(
                f"picture {item.path}: cannot be read. Replace it or remove it from the annotations"
            )
        detections = pipeline(
            image, score_threshold=EVAL_SCORE, max_detections=EVAL_DETECTIONS, for_metric=True
        )
        results.append((item.id, detections))
        if progress is not None:
            progress(i + 1, len(data.images))
    return evaluate(data, results), results
