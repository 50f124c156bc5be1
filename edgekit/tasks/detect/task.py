"""What the core asks of the task `detect` (see edgekit.tasks.Task)."""

from __future__ import annotations

from pathlib import Path

from edgekit.errors import UsageError, printable
from edgekit.tasks.detect.agreement import agreement
from edgekit.tasks.detect.dataset import CocoSet, read_coco
from edgekit.tasks.detect.evaluate import evaluate_pipeline as evaluate
from edgekit.tasks.detect.metric import bootstrap
from edgekit.tasks.detect.pipeline import DetectPipeline as open_pipeline
from edgekit.tasks.detect.pipeline import read_spec

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

METRIC = "AP"
UNIT = "boxes"
LABELLED = "pictures"


def read_set(
    data: Path, images: Path | None, *, limit: int | None = None, labels: tuple[str, ...] = ()
) -> CocoSet:
    """COCO annotations and their pictures. Raises: UsageError."""
    if images is None:
        raise UsageError(
            f"annotations {printable(data)}: the folder of the pictures is missing, expected COCO json and "
            "--images DIR (or images = ... in the project)"
        )
    return read_coco(data, images, limit=limit, labels=labels)
