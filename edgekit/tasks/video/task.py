"""What the core asks of the task `video` (see edgekit.tasks.Task)."""

from __future__ import annotations

from edgekit.tasks.video.agreement import agreement
from edgekit.tasks.video.dataset import read_set
from edgekit.tasks.video.metric import bootstrap, evaluate
from edgekit.tasks.video.pipeline import VideoPipeline as open_pipeline
from edgekit.tasks.video.pipeline import read_spec

__all__ = [
    "LABELLED",
    "METRIC",
    "UNIT",
    "agreement",
    "bootstrap",
    "evaluate",
    "open_pipeline",
    "read_set",
    "read_spec",
]

METRIC = "top1"
UNIT = "events"
LABELLED = "clips"
