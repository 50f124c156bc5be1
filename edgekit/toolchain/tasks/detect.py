"""What a build asks of the task `detect` (see edgekit.toolchain.tasks.ToolchainTask)."""

from __future__ import annotations

import dataclasses
from typing import Any

from edgekit.passes import Prepared
from edgekit.project import ModelEntry
from edgekit.tasks.detect.spec import DetectSpec
from edgekit.toolchain.tasks import STREET, declared_rule

SEGMENT = "detector"
NO_LABELS = "no labelled pictures were given (--data instances.json --images DIR)"
CLIPS = False
DEFAULT_SOURCE = STREET


def prepare_options(entry: ModelEntry) -> dict[str, Any]:
    """What the project says about the head."""
    hint = entry.head
    return {
        "head": None if hint.family == "auto" else hint.family,
        "num_classes": len(entry.classes) or None,
        "columns": hint.columns or None,
        "normalized": hint.normalized,
    }


def make_spec(entry: ModelEntry, prepared: Prepared) -> tuple[DetectSpec, str, str]:
    """The spec of the head found, with the family's input rule. Raises: UsageError."""
    assert prepared.head is not None, "the task detect has a head"
    rule, why = prepared.preprocess, prepared.notes[-1]
    if rule is None:
        rule, why = declared_rule(entry, prepared.model), "input rule: declared in the project"
    else:
        given = [
            f.name
            for f in dataclasses.fields(entry.preprocess)
            if getattr(entry.preprocess, f.name) is not None
        ]
        why += f"; the project sets {', '.join(given)}" if given else ""
    labels, note = entry.labels(prepared.head.num_classes)
    return DetectSpec(entry.preprocess.apply(rule), prepared.head, labels), why, note


def head_facts(spec: DetectSpec) -> dict[str, Any]:
    return {"family": spec.head.family}
