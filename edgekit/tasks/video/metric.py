"""Top-1 accuracy of clips, played through the stream network frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from edgekit.errors import UsageError
from edgekit.tasks.classify.metric import Answer, accuracy, bootstrap, judge
from edgekit.tasks.video.dataset import Frames, VideoSet
from edgekit.tasks.video.pipeline import VideoPipeline

__all__ = ["Answer", "bootstrap", "evaluate", "score_clip"]

CROPS = (1, 3, 5)


def evaluate(
    pipeline: VideoPipeline,
    data: VideoSet,
    *,
    progress: Callable[[int, int], None] | None = None,
    segments: int = 1,
    crops: int = 1,
) -> tuple[dict[str, Any], list[Answer]]:
    """Accuracy of `pipeline` on `data`, and the answer per clip: that of the mean of all outputs (`score_clip`).

    Returns: top1 and top5 (None with fewer than 6 classes), 0..1; per_class (label -> share of its clips that are
    answered right); confusions (the most frequent wrong answers).
    """
    answers: list[Answer] = []
    for i, item in enumerate(data.images):
        answers.append(judge(score_clip(pipeline, data.clip(i), segments=segments, crops=crops), item.cls))
        if progress is not None:
            progress(i + 1, len(data.images))
    return accuracy(data, answers), answers


def score_clip(pipeline: VideoPipeline, clip: Frames, *, segments: int = 1, crops: int = 1) -> np.ndarray:
    """The mean of the network's raw outputs over the frames of a clip, float64 [C] (the segment consensus of TSN,
    Wang et al. 2016). No smoothing counts, and the pipeline is reset before each segment and crop.

    A clip with a known frame rate is played in the network's step (VideoSpec.dt_s). segments: 1 plays it whole; n plays n
    runs of `VideoSpec.frames` frames, evenly spread from its begin to its end, which may overlap. crops: 1
    is the picture as the pipeline takes it, 3 are squares of the shorter side at the begin, middle and
    end of the longer one, 5 are squares of 7/8 of it in the corners and the middle. None are mirrored: in a
    mirror left is right.
    Raises: UsageError for another number, StreamError when the engine fails.
    """
    if segments < 1 or crops not in CROPS:
        raise UsageError(
            f"clip: {segments} segments of {crops} crops: expected at least 1, and 1, 3 or 5 crops"
        )
    spec = pipeline.spec
    images = clip.played(spec.dt_s)
    total = np.zeros(len(spec.labels), np.float64)
    runs = 0
    for part in _segments(len(images), segments, spec.frames):
        for crop in range(crops):
            pipeline.reset()
            for i in part:
                total += pipeline(_crop(images[i], crop, crops)).logits
                runs += 1
    return total / runs


def _segments(total: int, segments: int, frames: int) -> Iterator[range]:
    if segments == 1:
        yield range(total)
        return
    length = min(frames, total)
    for n in range(segments):
        begin = round(n * (total - length) / (segments - 1))
        yield range(begin, begin + length)


def _crop(image: np.ndarray, number: int, crops: int) -> np.ndarray:
    if crops == 1:
        return image
    height, width = image.shape[:2]
    short = min(height, width)
    if crops == 3:
        down, right = (height - short) * number // 2, (width - short) * number // 2
        side = short
    else:
        side = max(1, short * 7 // 8)
        places: Sequence[tuple[float, float]] = ((0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5))
        y, x = places[number]
        down, right = int((height - side) * y), int((width - side) * x)
    return np.ascontiguousarray(image[down : down + side, right : right + side])
