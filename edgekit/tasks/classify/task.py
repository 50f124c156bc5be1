"""What the core asks of the task `classify` (see edgekit.tasks.Task)."""

from __future__ import annotations

from edgekit.tasks.classify.agreement import agreement
from edgekit.tasks.classify.dataset import read_set
from edgekit.tasks.classify.metric import bootstrap, evaluate
from edgekit.tasks.classify.pipeline import ClassifyPipeline as open_pipeline
from edgekit.tasks.classify.pipeline import read_spec

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
UNIT = "classes"
LABELLED = "pictures"
