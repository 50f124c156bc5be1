"""Cuts a detector at its raw head convolutions: what follows becomes the bundle's decoder.

Found by structure alone (operators, weight shapes, feature-map sizes), never by node names:

1. Walk up from the graph's outputs to the first convolutions: the head. A 1x1 convolution or
   product with 0, 1, 2, ... after a Softmax is the expectation of Distribution Focal Loss
   (Li et al. 2020) and belongs to the tail.
2. Group the head by stride = input size / feature-map size.
3. Match the branches of each level against the families:

   yolox       three branches 4 | 1 | C, the last two through Sigmoid (Ge et al. 2021)
   yolov5      one branch of 3 * (5 + C), reshaped per anchor (YOLOv5, YOLOv7)
   yolov8      two branches 4 * bins | C with the DFL expectation (YOLOv8, YOLO11)
   nanodet     one branch C + 4 * bins, or C | 4 * bins, not decoded in the graph (NanoDet, -Plus)
   fastestdet  one level 1 | 4 | C, classes through Softmax (FastestDet)

The new outputs are the untouched values of those convolutions, named by role and stride: `box_8`,
`obj_8`, `cls_8`, or `pred_8` where one branch holds all. See tasks.detect.spec for their decoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgekit.errors import ModelError, UsageError, did_you_mean
from edgekit.passes.graph import clean, shape
from edgekit.passes.head_families import FAMILIES, HeadMatch, NoMatch
from edgekit.passes.head_tail import Tail, find_tail
from edgekit.tasks.detect.spec import DetectHead


@dataclass(frozen=True)
class Split:
    """A network that ends at its raw head. `notes`: what had to be assumed, for the user."""

    model: ir.Model
    head: DetectHead
    notes: tuple[str, ...]


def split_head(
    model: ir.Model, *, family: str | None = None, num_classes: int | None = None
) -> tuple[ir.Model, DetectHead]:
    """A copy of `model` whose outputs are the raw head convolutions, and how to decode them.

    `model` must have static shapes and folded constants (passes `fold_constants`,
    `remove_identity`, `fuse_batchnorm`). `family` narrows the search, `num_classes` is checked.
    Raises: ModelError for an unknown head, another class count, or a decode that the family's
    rule does not reproduce; UsageError for an unknown family name.
    """
    result = split(model, family=family, num_classes=num_classes)
    return result.model, result.head


def detect_family(model: ir.Model) -> str | None:
    """The family of the head in `model`, None when no family fits."""
    try:
        return _find(model, find_tail(model), None, None).head.family
    except ModelError:
        return None


def split(model: ir.Model, *, family: str | None = None, num_classes: int | None = None) -> Split:
    """As `split_head`, with the notes."""
    if family is not None and family not in FAMILIES:
        raise UsageError(f"head {family!r}: unknown. {did_you_mean(family, [*FAMILIES, 'rows'])}")
    model = model.clone()
    match = _find(model, find_tail(model), family, num_classes)
    if num_classes is not None and match.head.num_classes != num_classes:
        raise ModelError(
            f"model: the {match.head.family} head has another class count, expected {num_classes}, "
            f"got {match.head.num_classes}. Give the names of the classes that it was trained on."
        )
    _cut(model, match.cuts)
    return Split(model, match.head, match.notes)


def _find(model: ir.Model, tail: Tail, family: str | None, num_classes: int | None) -> HeadMatch:
    reasons = {}
    for name in [family] if family else FAMILIES:
        found = FAMILIES[name](tail, num_classes)
        if not isinstance(found, NoMatch):
            return found
        reasons[name] = found.reason
    tried = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ModelError(
        f"model: its head is not recognised, expected one of {', '.join(reasons)} ({tried}), "
        f"got {tail.describe()}. Declare the output instead: --head rows --columns, "
        "e.g. cx,cy,w,h,obj,cls*." + _classifier(model)
    )


def _classifier(model: ir.Model) -> str:
    """A hint, where the one output is a vector."""
    sizes = [shape(o) or () for o in model.graph.outputs]
    vector = len(sizes) == 1 and len(sizes[0]) >= 2 and max(sizes[0]) == math.prod(sizes[0])
    return " A classifier is built with --task classify." if vector else ""


def _cut(model: ir.Model, cuts: Sequence[tuple[str, ir.Value]]) -> None:
    graph = model.graph
    wanted = {name for name, _ in cuts}
    values = [o for node in graph for o in node.outputs] + list(graph.initializers.values())
    for i, value in enumerate(v for v in values if v.name in wanted):
        value.name = f"{value.name}_was_{i}"
    graph.outputs.clear()
    for name, value in cuts:
        value.name = name
        graph.outputs.append(value)
    clean(model)
