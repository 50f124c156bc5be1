"""What a build asks of the task `classify` (see edgekit.toolchain.tasks.ToolchainTask)."""

from __future__ import annotations

from typing import Any, cast

from edgekit.errors import UsageError
from edgekit.passes import Prepared
from edgekit.project import HeadHint, ModelEntry
from edgekit.tasks.classify.dataset import class_names
from edgekit.tasks.classify.spec import Activation, ClassifySpec
from edgekit.toolchain.tasks import STREET, class_facts, class_labels, class_output, picture_rule

SEGMENT = "classifier"
NO_LABELS = "no labelled pictures were given (--data FOLDER, labels.csv or data.npz)"
CLIPS = False
DEFAULT_SOURCE = STREET
head_facts = class_facts


def prepare_options(entry: ModelEntry) -> dict[str, Any]:
    """None. Raises: UsageError for a detector's head, which a classifier has not."""
    if entry.head != HeadHint():
        raise UsageError(
            f"model {entry.name}: head {entry.head.family!r} is a detector's, but the task is classify. "
            "Leave the head out, or build it as a detector"
        )
    return {}


def make_spec(entry: ModelEntry, prepared: Prepared) -> tuple[ClassifySpec, str, str]:
    """The spec of a network with one vector of classes as its output. Raises: ModelError, UsageError."""
    outputs = prepared.model.graph.outputs
    output, count = class_output(
        entry, outputs, "one output [1, classes]", "A detector is built with --task detect"
    )
    rule, why = picture_rule(entry, prepared)
    where = None if entry.evaluation is None else entry.evaluation.data
    labels, note = class_labels(entry, count, where, class_names)
    return ClassifySpec(rule, output, labels, cast("Activation", prepared.activation)), why, note
