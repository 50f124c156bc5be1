"""How far two stream networks agree, frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgekit.tasks.classify.agreement import of_scores
from edgekit.tasks.video.result import VideoResult


def agreement(pairs: Sequence[tuple[VideoResult, VideoResult]]) -> dict[str, Any]:
    """How many frames get the same best class, and how the score of the float network's best class moves.

    By the scores of each frame alone: smoothing would hide what differs.
    """
    return of_scores([(first.raw_scores, second.raw_scores) for first, second in pairs])
