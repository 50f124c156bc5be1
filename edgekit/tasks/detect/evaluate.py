"""Runs a detector over labelled pictures for its metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgekit.errors import UsageError
from edgekit.picture import read_picture
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
    results: list[tuple[int, Detections]] = []
    for i, item in enumerate(data.images):
        image = read_picture(item.path)
        if image.shape[:2] != (item.height, item.width):
            raise UsageError(
                f"picture {item.path}: {image.shape[1]}x{image.shape[0]} pixels, but the annotations say "
                f"{item.width}x{item.height}. Give the pictures that were annotated"
            )
        detections = pipeline(
            image, score_threshold=EVAL_SCORE, max_detections=EVAL_DETECTIONS, for_metric=True
        )
        results.append((item.id, detections))
        if progress is not None:
            progress(i + 1, len(data.images))
    return evaluate(data, results), results
