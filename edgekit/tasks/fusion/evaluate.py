"""Runs a pipeline over labelled moments for its metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from edgekit.errors import UsageError
from edgekit.rig import RigFrame, in_picture
from edgekit.tasks.fusion import metric
from edgekit.tasks.fusion.boxes import Boxes3D
from edgekit.tasks.fusion.pipeline import FusionPipeline

EVAL_SCORE = 0.02
"""AP integrates over all scores: keep nearly everything."""


class Labelled(Protocol):
    """Labelled moments (dataset.Moments, or another set of the same shape)."""

    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def images(self) -> Any: ...
    def read(self, index: int) -> Any: ...


def evaluate(
    pipeline: FusionPipeline, data: Labelled, *, progress: Callable[[int, int], None] | None = None
) -> tuple[dict[str, Any], metric.Judged]:
    """AP by distance of centres of `pipeline` on `data` (`metric.evaluate`), and which boxes were found.

    Raises: UsageError for a moment without labels, StreamError when the engine fails.
    """
    labels = pipeline.spec.labels
    if tuple(data.labels) != labels:
        raise UsageError(f"moments: labelled with {list(data.labels)}, the network knows {list(labels)}")
    covered = getattr(data, "labelled_in", ())
    truths, results = [], []
    for i in range(len(data.images)):
        frame = data.read(i)
        if frame.truth is None:
            raise UsageError(f"moments: moment {i} has no labels. Leave it out")
        found = replace(pipeline(frame, score_threshold=EVAL_SCORE), moment=None)
        truths.append(frame.truth)
        results.append(_seen_by(frame, found, covered) if covered else found)
        if progress is not None:
            progress(i + 1, len(data.images))
    judged = metric.judge(truths, results, labels, metric.Rules(ranges=pipeline.spec.ranges))
    return metric.evaluate(judged), judged


def bootstrap(
    data: Any, results: metric.Judged, *, progress: Callable[[int, int], None] | None = None
) -> list[float | None]:
    """mAP of resampled moments (`metric.bootstrap`), the same ones for every result on the same moments."""
    return metric.bootstrap(results, progress=progress)


def _seen_by(frame: RigFrame, found: Boxes3D, cameras: tuple[str, ...]) -> Boxes3D:
    """The boxes whose centre is in the picture of one of the cameras."""
    kept = np.zeros(len(found), bool)
    for name in cameras:
        if name in frame.rig.cameras:
            kept |= in_picture(frame.rig.cameras[name], *frame.project(name, found.boxes))
    return replace(found, boxes=found.boxes[kept], scores=found.scores[kept], classes=found.classes[kept])
