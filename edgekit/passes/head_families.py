"""One matcher per detector family: (Tail, class count if known) -> HeadMatch, or NoMatch with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import constant, shape
from edgekit.passes.head_tail import SHAPE_ONLY, Branch, Tail, first_split, reaches
from edgekit.tasks.detect.spec import Channels, DetectHead, HeadLevel

Cuts = list[tuple[str, ir.Value]]

COCO_ANCHORS = {
    3: (
        ((10, 13), (16, 30), (33, 23)),
        ((30, 61), (62, 45), (59, 119)),
        ((116, 90), (156, 198), (373, 326)),
    ),
    4: (
        ((19, 27), (44, 40), (38, 94)),
        ((96, 68), (86, 152), (180, 137)),
        ((140, 301), (303, 264), (238, 542)),
        ((436, 615), (739, 380), (925, 792)),
    ),
}
"""(w, h) in pixels by number of levels: the anchors of YOLOv5's own P5 and P6 configurations."""


@dataclass(frozen=True)
class HeadMatch:
    """`cuts`: new output name and the value it names, in order."""

    head: DetectHead
    cuts: tuple[tuple[str, ir.Value], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class NoMatch:
    reason: str


def _yolox(tail: Tail, num_classes: int | None) -> HeadMatch | NoMatch:
    wanted = "wants 4 | 1 | C per level, the last two through Sigmoid"
    if tail.other or tail.bins is not None or "Softmax" in tail.ops:
        return NoMatch(wanted)
    levels, cuts, classes = [], Cuts(), set()
    for stride, branches in tail.levels.items():
        if len(branches) != 3:
            return NoMatch(wanted)
        ordered = tail.order(branches) or _by_channels(branches, (4, 1))
        if ordered is None or [b.channels for b in ordered[:2]] != [4, 1]:
            return NoMatch(wanted)
        box, obj, cls = ordered
        # other three-branch heads (FCOS, PP-YOLO) act on the raw box itself
        if not box.next_ops <= {"Concat", "output", "Slice", "Split", "Gather"}:
            return NoMatch(wanted)
        if ("Sigmoid" in obj.next_ops) != ("Sigmoid" in cls.next_ops):
            return NoMatch(wanted)
        names = (f"box_{stride}", f"obj_{stride}", f"cls_{stride}")
        cuts += zip(names, (box.value, obj.value, cls.value), strict=True)
        levels.append(HeadLevel(stride, Channels(names[0]), Channels(names[2]), Channels(names[1])))
        classes.add(cls.channels)
    if len(classes) != 1:
        return NoMatch(wanted)
    return HeadMatch(DetectHead("yolox", classes.pop(), tuple(levels)), tuple(cuts))


def _by_channels(branches: tuple[Branch, ...], known: tuple[int, ...]) -> tuple[Branch, ...] | None:
    """Branches with the `known` channel counts in that order, then the rest; None if ambiguous."""
    picked = []
    for channels in known:
        fitting = [b for b in branches if b.channels == channels]
        if len(fitting) != 1:
            return None
        picked += fitting
    return (*picked, *(b for b in branches if b not in picked))


def _fastestdet(tail: Tail, num_classes: int | None) -> HeadMatch | NoMatch:
    wanted = "wants one level 1 | 4 | C, the first through Sigmoid, the last through Softmax"
    if tail.other or tail.bins is not None or len(tail.levels) != 1:
        return NoMatch(wanted)
    ((stride, branches),) = tail.levels.items()
    if len(branches) != 3:
        return NoMatch(wanted)
    classes = [b for b in branches if "Softmax" in b.next_ops]
    objects = [b for b in branches if "Sigmoid" in b.next_ops]
    boxes = [b for b in branches if b not in classes and b not in objects]
    if [[b.channels for b in group] for group in (objects, boxes)] != [[1], [4]] or len(classes) != 1:
        return NoMatch(wanted)
    names = (f"obj_{stride}", f"box_{stride}", f"cls_{stride}")
    level = HeadLevel(stride, Channels(names[1]), Channels(names[2]), Channels(names[0]))
    cuts = zip(names, (objects[0].value, boxes[0].value, classes[0].value), strict=True)
    return HeadMatch(DetectHead("fastestdet", classes[0].channels, (level,)), tuple(cuts))


def _yolov8(tail: Tail, num_classes: int | None) -> HeadMatch | NoMatch:
    wanted = "wants 4 * bins | C per level, the first through a DFL Softmax expectation"
    bins = tail.bins
    notes: tuple[str, ...] = ()
    if tail.other or not tail.levels or any(len(b) != 2 for b in tail.levels.values()):
        return NoMatch(wanted)
    if bins is None:
        if "Softmax" in tail.ops or len(tail.levels) < 2:
            return NoMatch(wanted)
        bins = 16
    levels, cuts, classes = [], Cuts(), set()
    for stride, branches in tail.levels.items():
        ordered = tail.order(branches)
        if ordered is None and tail.bins is not None:
            box_like = [b for b in branches if reaches(b.value, "Softmax")]
            if len(box_like) == 1:
                ordered = (box_like[0], *(b for b in branches if b is not box_like[0]))
        ordered = ordered or _by_channels(branches, (4 * bins,))
        if ordered is None or ordered[0].channels != 4 * bins:
            return NoMatch(wanted)
        if tail.bins is None and "Sigmoid" in ordered[0].next_ops:
            return NoMatch(wanted)
        box, cls = ordered
        names = (f"box_{stride}", f"cls_{stride}")
        cuts += zip(names, (box.value, cls.value), strict=True)
        levels.append(HeadLevel(stride, Channels(names[0]), Channels(names[1])))
        classes.add(cls.channels)
    if len(classes) != 1:
        return NoMatch(wanted)
    if tail.bins is None:
        notes = ("no decode in the graph: 16 bins per box side assumed, as YOLOv8 and YOLO11 have",)
    head = DetectHead("yolov8", classes.pop(), tuple(levels), bins=bins, cell_offset=0.5)
    return HeadMatch(head, tuple(cuts), notes)


def _nanodet(tail: Tail, num_classes: int | None) -> HeadMatch | NoMatch:
    wanted = "wants C + 4 * bins, or C | 4 * bins, per level with undecoded distances"
    if tail.other or len(tail.levels) < 3 or tail.bins is not None or {"Exp", "Softmax"} & set(tail.ops):
        return NoMatch(wanted)
    if any(b.value.is_graph_output() for branches in tail.levels.values() for b in branches):
        return NoMatch(wanted)  # NanoDet always flattens; bare convolutions could be anything
    counts = {len(branches) for branches in tail.levels.values()}
    notes: list[str] = []
    levels, cuts, found = [], Cuts(), set()
    for stride, branches in tail.levels.items():
        if counts == {1}:
            (branch,) = branches
            if _anchor_reshape(tail, branch):
                return NoMatch(wanted)
            parts = first_split(branch.value)
            if parts is not None and len(parts) == 2:
                classes = parts[0]
            else:
                classes = num_classes if num_classes is not None else branch.channels - 32
                notes.append("no activation in the graph: class count from 8 bins per box side")
            bins, rest = divmod(branch.channels - classes, 4)
            name = f"pred_{stride}"
            cuts.append((name, branch.value))
            levels.append(HeadLevel(stride, Channels(name, classes), Channels(name)))
        elif counts == {2}:
            ordered = tail.order(branches)  # NanoDet joins classes first
            gated = [b for b in branches if reaches(b.value, "Sigmoid")]
            if ordered is None and len(gated) == 1:
                ordered = (gated[0], *(b for b in branches if b is not gated[0]))
            if ordered is None:
                boxes = _by_channels(branches, (32,))
                ordered = boxes[::-1] if boxes is not None else None
            if ordered is None:
                return NoMatch(wanted)
            cls, box = ordered
            classes, (bins, rest) = cls.channels, divmod(box.channels, 4)
            names = (f"box_{stride}", f"cls_{stride}")
            cuts += zip(names, (box.value, cls.value), strict=True)
            levels.append(HeadLevel(stride, Channels(names[0]), Channels(names[1])))
        else:
            return NoMatch(wanted)
        if rest or bins < 2 or classes < 1:
            return NoMatch(wanted)
        found.add((classes, bins))
    if len(found) != 1:
        return NoMatch(wanted)
    classes, bins = found.pop()
    plus = max(tail.levels) >= 64
    notes.append(
        "cell points at the corner as in NanoDet-Plus (four levels)"
        if plus
        else "cell points at the centre as in NanoDet (three levels)"
    )
    head = DetectHead("nanodet", classes, tuple(levels), bins=bins, cell_offset=0.0 if plus else 0.5)
    return HeadMatch(head, tuple(cuts), tuple(dict.fromkeys(notes)))


def _yolov5(tail: Tail, num_classes: int | None) -> HeadMatch | NoMatch:
    wanted = "wants A * (5 + C) per level, reshaped per anchor, decoded without Exp"
    if tail.other or not tail.levels or {"Exp", "Softmax"} & set(tail.ops) or tail.bins is not None:
        return NoMatch(wanted)
    levels, cuts, found, notes = [], Cuts(), set(), []
    known = COCO_ANCHORS.get(len(tail.levels))
    for i, (stride, branches) in enumerate(tail.levels.items()):
        if len(branches) != 1:
            return NoMatch(wanted)
        (branch,) = branches
        count = _anchor_reshape(tail, branch)
        bare = branch.next_ops == {"output"} and branch.channels % 3 == 0 and len(tail.levels) > 1
        if not count and bare:
            count = 3
        if not count or branch.channels % count or branch.channels // count < 6:
            return NoMatch(wanted)
        anchors = _anchors(tail.region[branch.value], count)
        if anchors is None:
            if any(n.op_type == "Sigmoid" for n in tail.region[branch.value]):
                return NoMatch("decodes in the graph, but its anchors were not found")
            if known is None or count != 3:
                return NoMatch("holds no anchors, and the known ones are for 3 or 4 levels of 3 anchors")
            anchors = tuple((float(w), float(h)) for w, h in known[i])
            notes.append("no anchors in the graph: YOLOv5's COCO anchors are used")
        name = f"pred_{stride}"
        cuts.append((name, branch.value))
        levels.append(
            HeadLevel(stride, Channels(name), Channels(name, 5), Channels(name, 4), anchors=anchors)
        )
        found.add((count, branch.channels // count - 5))
    if len(found) != 1:
        return NoMatch(wanted)
    head = DetectHead("yolov5", found.pop()[1], tuple(levels))
    return HeadMatch(head, tuple(cuts), tuple(dict.fromkeys(notes)))


def _anchor_reshape(tail: Tail, branch: Branch) -> int:
    """A when the branch is reshaped from [1, A * n, h, w] to [1, A, n, h, w], else 0."""
    sizes = shape(branch.value)
    for node in tail.region[branch.value]:
        after = shape(node.outputs[0])
        if node.op_type == "Reshape" and sizes is not None and after is not None:
            if len(after) == 5 and after[1] * after[2] == sizes[1] and after[3:] == sizes[2:]:
                return after[1]
            if len(after) == 4 and after[1] * after[2] == sizes[1] and after[3] == sizes[2] * sizes[3]:
                return after[1]
        if node.op_type not in SHAPE_ONLY:
            break
    return 0


def _anchors(region: tuple[ir.Node, ...], count: int) -> tuple[tuple[float, float], ...] | None:
    """(w, h) per anchor: the constant that multiplies a size, the same in every cell."""
    for node in region:
        if node.op_type != "Mul":
            continue
        for value in node.inputs:
            data = constant(value)
            if data is None or data.ndim < 3 or data.shape[-1] != 2 or count not in data.shape[:-1]:
                continue
            axis = data.shape.index(count)
            per_anchor = np.moveaxis(data, axis, 0).reshape(count, -1, 2)
            if np.ptp(per_anchor, axis=1).max() < 1e-3 and (per_anchor > 0).all():
                return tuple((round(float(w), 4), round(float(h), 4)) for w, h in per_anchor[:, 0])
    return None


FAMILIES: dict[str, Callable[[Tail, int | None], HeadMatch | NoMatch]] = {
    "yolox": _yolox,
    "fastestdet": _fastestdet,
    "yolov8": _yolov8,
    "nanodet": _nanodet,
    "yolov5": _yolov5,
}
"""In the order of trying; each matcher refuses what belongs to another."""
