"""Holds a found head against the decode that the graph itself carries.

The raw outputs of the cut network, decoded by the family's rule (tasks.detect.spec.DetectHead),
must give the rows that the original graph computes before its NMS. A YOLOv3-style exp decode, other
anchors or another cell offset would otherwise pass by shape alone and cost all accuracy silently.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgekit.errors import ModelError
from edgekit.passes import probe
from edgekit.passes.graph import shape
from edgekit.passes.head_tail import find_tail
from edgekit.tasks.detect.spec import Channels, DetectHead

LIMIT = 1e-3
"""Largest difference: of scores, absolute; of boxes, as a fraction of the largest coordinate."""


@np.errstate(all="ignore")  # a network may overflow: not finite counts as infinitely different
def check_head(
    original: ir.Model, cut: ir.Model, head: DetectHead, feeds: Mapping[str, np.ndarray]
) -> tuple[float | None, str]:
    """(largest difference, note). None when the original graph holds no decoded rows to compare with.

    Raises: ModelError when an output of the original has the rows' size but other values.
    """
    tables = candidates(head, probe.evaluate(cut, feeds), find_tail(original).size)
    if not tables:
        return None, ""
    rows, columns = tables[0].shape
    probed = original.clone()
    outputs = [v.name for v in probed.graph.outputs]
    for node in find_tail(probed).nodes:  # rows that go into an NMS are no outputs yet
        value = node.outputs[0]
        if (
            node.op_type in ("Concat", "Transpose")
            and not value.is_graph_output()
            and _fits(value, rows, columns)
        ):
            probed.graph.outputs.append(value)
    inner: list[float] = []
    final: list[float] = []
    for name, result in probe.evaluate(probed, feeds).items():
        differences = [
            _difference(candidate, table, head)
            for table in _as_rows(result, rows, columns)
            for candidate in tables
        ]
        (final if name in outputs else inner).extend(differences)
    # an output of the graph is what counts; rows before an NMS only stand in for it
    best = min(final or inner, default=None)
    if best is None or (best > LIMIT and not final):
        return (
            None,
            "the graph holds no decoded rows to compare with: the decoding rule rests on its structure",
        )
    if best > LIMIT:
        raise ModelError(
            f"model: its decode differs from the {head.family} rule by {best:.1e}, expected at most "
            f"{LIMIT:.0e}. "
            "Declare the output instead: --head rows --columns, e.g. cx,cy,w,h,obj,cls*."
        )
    return best, ""


def candidates(head: DetectHead, raw: Mapping[str, np.ndarray], size: tuple[int, int]) -> list[np.ndarray]:
    """The tables [N, D] that exporters of this family write: decoded first, then undecoded.

    Rows by level, then anchor, then cell; columns as the family's own output has them.
    """
    parts = [_level(head, i, raw, size) for i in range(len(head.levels))]
    box, cell, obj, logits = (np.concatenate(p) for p in zip(*parts, strict=True))
    scores = _softmax(logits) if head.family == "fastestdet" else _sigmoid(logits)
    gate = _sigmoid(obj)
    if head.family == "yolox":
        return [np.hstack((box, gate, scores)), np.hstack((cell, gate, scores))]
    if head.family == "yolov5":
        return [np.hstack((box, gate, scores))]
    if head.family == "yolov8":
        corners = np.hstack((box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2))
        return [np.hstack((box, scores)), np.hstack((corners, scores))]
    if head.family == "nanodet":
        return [np.hstack((scores, cell)), np.hstack((logits, cell))]
    if head.family == "fastestdet":
        return [np.hstack((gate, cell, scores))]
    return []


def _level(
    head: DetectHead, index: int, raw: Mapping[str, np.ndarray], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(boxes cx cy w h in pixels, raw box channels, raw objectness, raw class channels), one row per box."""
    level = head.levels[index]
    h, w = raw[level.box.tensor].shape[2:]
    ys, xs = np.mgrid[:h, :w].reshape(2, -1).astype(np.float64)
    cells = np.stack((xs, ys), 1)
    boxes, kept, objects, classes = [], [], [], []
    for a in range(max(1, len(level.anchors))):
        step = a * (5 + head.num_classes)
        width = 4 * head.bins if head.bins else 4
        box = _take(raw, level.box, step, width)
        kept.append(box)
        classes.append(_take(raw, level.classes, step, head.num_classes))
        if level.objectness is not None:
            objects.append(_take(raw, level.objectness, step, 1))
        else:
            objects.append(np.zeros((h * w, 0)))
        xy, wh = box[:, :2], box[:, 2:4]
        if head.family == "yolox":
            centre, sides = (xy + cells) * level.stride, np.exp(wh) * level.stride
        elif head.family == "yolov5":
            centre = (2 * _sigmoid(xy) - 0.5 + cells) * level.stride
            sides = (2 * _sigmoid(wh)) ** 2 * np.asarray(level.anchors[a])
        elif head.family == "fastestdet":
            centre = (np.tanh(xy) + cells) * level.stride
            sides = _sigmoid(wh) * np.asarray(size[::-1], np.float64)
        else:
            ltrb = _softmax(box.reshape(-1, 4, head.bins)) @ np.arange(head.bins) * level.stride
            point = (cells + head.cell_offset) * level.stride
            centre = point + (ltrb[:, 2:] - ltrb[:, :2]) / 2
            sides = ltrb[:, 2:] + ltrb[:, :2]
        boxes.append(np.hstack((centre, sides)))
    return (np.vstack(boxes), np.vstack(kept), np.vstack(objects), np.vstack(classes))


def _take(raw: Mapping[str, np.ndarray], channels: Channels, step: int, count: int) -> np.ndarray:
    start = channels.start + step
    part: np.ndarray = raw[channels.tensor][0, start : start + count].astype(np.float64)
    return part.reshape(count, -1).T


def _sigmoid(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = 1 / (1 + np.exp(-x))
    return result


def _softmax(x: np.ndarray) -> np.ndarray:
    e: np.ndarray = np.exp(x - x.max(-1, keepdims=True))
    result: np.ndarray = e / e.sum(-1, keepdims=True)
    return result


def _fits(value: ir.Value, rows: int, columns: int) -> bool:
    sizes = shape(value)
    return sizes in ((1, rows, columns), (1, columns, rows))


def _as_rows(result: np.ndarray, rows: int, columns: int) -> list[np.ndarray]:
    """`result` as [rows, columns], in each way that fits."""
    tables = []
    if result.dtype.kind == "f" and result.size == rows * columns:
        if result.shape[-1] == columns:
            tables.append(result.reshape(rows, columns))
        if result.shape[0] == 1 and result.ndim > 1 and result.shape[1] == columns:
            tables.append(result.reshape(columns, rows).T)
    return tables


def _difference(candidate: np.ndarray, table: np.ndarray, head: DetectHead) -> float:
    box = np.zeros(candidate.shape[1], bool)
    width = 4 * head.bins if head.family == "nanodet" else 4
    start = {"nanodet": head.num_classes, "fastestdet": 1}.get(head.family, 0)
    box[start : start + width] = True
    difference = np.abs(candidate - table)
    if not np.isfinite(difference).all():
        return float("inf")
    reach = max(1.0, float(np.abs(table[:, box]).max()))
    return float(max(difference[:, box].max() / reach, difference[:, ~box].max(initial=0.0)))
