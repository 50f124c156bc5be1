"""What the core asks of the task `fusion` (see edgekit.tasks.Task)."""

from __future__ import annotations

from edgekit.tasks.fusion.agreement import agreement
from edgekit.tasks.fusion.dataset import read_set
from edgekit.tasks.fusion.evaluate import bootstrap, evaluate
from edgekit.tasks.fusion.pipeline import FusionPipeline as open_pipeline
from edgekit.tasks.fusion.pipeline import read_spec

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

METRIC = "mAP"
UNIT = "boxes"
LABELLED = "moments"
