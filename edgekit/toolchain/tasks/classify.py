"""What a build asks of the task `classify` (see edgekit.toolchain.tasks.ToolchainTask)."""

from __future__ import annotations

import math
from typing import Any, cast

from edgekit.errors import ModelError, UsageError
from edgekit.passes import Prepared
from edgekit.passes.graph import listed, shape
from edgekit.project import HeadHint, ModelEntry
from edgekit.schema import printable
from edgekit.tasks.classify.dataset import class_names
from edgekit.tasks.classify.spec import Activation, ClassifySpec
from edgekit.toolchain.tasks import STREET, picture_rule

SEGMENT = "classifier"
NO_LABELS = "no labelled pictures were given (--data FOLDER, labels.csv or data.npz)"
CLIPS = False
DEFAULT_SOURCE = STREET


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
    model = prepared.model
    outputs = model.graph.outputs
    sizes = shape(outputs[0]) if len(outputs) == 1 else None
    count = 0 if sizes is None else math.prod(sizes)
    if sizes is None or count < 2 or max(sizes) != count:
        raise ModelError(
            f"model {entry.name}: expected one output [1, classes], got {listed(outputs)}. "
            "A detector is built with --task detect"
        )
    rule, why = picture_rule(entry, prepared)
    labels, note = _labels(entry, count)
    name = outputs[0].name
    assert name is not None, "the frontend names every output"
    activation = cast("Activation", prepared.activation)
    return ClassifySpec(rule, name, labels, activation), why, note


def head_facts(spec: ClassifySpec) -> dict[str, Any]:
    return {"family": "classes", "activation": spec.activation, "classes": len(spec.labels)}


def _labels(entry: ModelEntry, count: int) -> tuple[tuple[str, ...], str]:
    """The names given, else those of the evaluation set where it has as many, else class_0 and on."""
    if entry.classes:
        return entry.labels(count)
    data = None if entry.evaluation is None else entry.evaluation.data
    names = () if data is None else class_names(data)
    if data is not None and len(names) == count:
        return names, f"no class names given: taken from {printable(data.name)}, in its order"
    names = tuple(f"class_{i}" for i in range(count))
    return names, f"no class names given: called {names[0]} to {names[-1]}"
