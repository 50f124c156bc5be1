"""Turns the Focus stem of YOLOv5/YOLOX into one strided convolution.

Focus stacks the four phases of the picture, F[q * C + c, y, x] = X[c, 2y + dy_q, 2x + dx_q], and a
k x k convolution with padding p reads F. Written out over X this is a 2k x 2k convolution of
stride 2 and padding 2p with the same numbers in other places:

    W'[o, c, 2i + dy_q, 2j + dx_q] = W[o, q * C + c, i, j]

The same multiplications, no slicing or concatenation (a copy on every runtime). Pattern: Concat on
the channel axis of four Slice chains with step 2 over the same tensor, or SpaceToDepth of block 2,
read by one Conv of stride 1, dilation 1, group 1. Source: the algebra above; Focus is from
Ultralytics YOLOv5 (2020) and YOLOX (Ge et al. 2021).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import clean, constant, infer, integer, ints, new_weight, only_user, shape

TOLERANCE = 1e-4

_PHASES = {(0, 0), (0, 1), (1, 0), (1, 1)}


def run(model: ir.Model) -> int:
    """In place. Returns the number of folded stems."""
    graph = model.graph
    count = 0
    for node in list(graph):
        phases = _phases(node)
        if phases is not None and _fold(graph, node, *phases):
            count += 1
    clean(model)
    infer(model)
    return count


def _phases(node: ir.Node) -> tuple[ir.Value, list[tuple[int, int]]] | None:
    """(source, (dy, dx) of each channel block in order)."""
    if node.op_type == "SpaceToDepth" and integer(node, "blocksize", 0) == 2:
        # ONNX: output channel (dy * 2 + dx) * C + c
        return (node.inputs[0], [(0, 0), (0, 1), (1, 0), (1, 1)]) if node.inputs[0] is not None else None
    if node.op_type != "Concat" or integer(node, "axis", 0) not in (1, -3) or len(node.inputs) != 4:
        return None
    sources, phases = [], []
    for value in node.inputs:
        found = _phase(value)
        if found is None:
            return None
        sources.append(found[0])
        phases.append(found[1])
    if any(s is not sources[0] for s in sources) or set(phases) != _PHASES:
        return None
    return sources[0], phases


def _phase(value: ir.Value | None) -> tuple[ir.Value, tuple[int, int]] | None:
    """Walk up Slices of step 2 on height and width: the source tensor and the (dy, dx) taken."""
    taken: dict[int, int] = {}
    while value is not None:
        node = value.producer()
        if node is None or node.op_type != "Slice":
            break
        sizes = shape(node.inputs[0])
        parts = [constant(v) for v in node.inputs[1:5]]
        if sizes is None or len(sizes) != 4 or len(parts) != 4:
            return None
        starts, ends, axes, steps = parts
        if starts is None or ends is None or axes is None or steps is None:
            return None
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            a = int(axis) % 4
            whole = end >= sizes[a] or (end < 0 and end + sizes[a] >= sizes[a] - 1 and start == 0)
            if a not in (2, 3) or a in taken or step != 2 or start not in (0, 1) or not whole:
                return None
            taken[a] = int(start)
        value = node.inputs[0]
    if value is None or set(taken) != {2, 3}:
        return None
    return value, (taken[2], taken[3])


def _fold(graph: ir.Graph, node: ir.Node, source: ir.Value, phases: list[tuple[int, int]]) -> bool:
    conv = only_user(node.outputs[0])
    sizes = shape(source)
    if conv is None or conv.op_type != "Conv" or conv.inputs[0] is not node.outputs[0] or sizes is None:
        return False
    weight = constant(conv.inputs[1])
    plain = (
        integer(conv, "group", 1) == 1
        and set(ints(conv, "strides", (1, 1))) == {1}
        and set(ints(conv, "dilations", (1, 1))) == {1}
        and "auto_pad" not in conv.attributes
    )
    if weight is None or not plain or sizes[2] % 2 or sizes[3] % 2:
        return False
    out, _, kh, kw = weight.shape
    channels = sizes[1]
    wide = np.zeros((out, channels, 2 * kh, 2 * kw), weight.dtype)
    for q, (dy, dx) in enumerate(phases):
        wide[:, :, dy::2, dx::2] = weight[:, q * channels : (q + 1) * channels]
    name = conv.inputs[1].name if conv.inputs[1] is not None else None
    conv.replace_input_with(0, source)
    conv.replace_input_with(1, new_weight(graph, name or "stem", wide))
    conv.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", [2 * kh, 2 * kw])
    conv.attributes["strides"] = ir.AttrInt64s("strides", [2, 2])
    conv.attributes["pads"] = ir.AttrInt64s("pads", [2 * p for p in ints(conv, "pads", (0, 0, 0, 0))])
    return True
