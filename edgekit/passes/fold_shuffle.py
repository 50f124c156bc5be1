"""Replaces a channel shuffle followed by a split by one strided Slice per part.

ShuffleNetV2 (Ma et al. 2018) mixes two branches by Reshape, Transpose, Reshape and two Gathers (or
a Split). What each part holds is every second channel of the input,

    part[:, i] = x[:, start + i * step]

and one Slice says the same with one copy instead of two. Pattern: a chain of at least three
operators that only move data, from [1, C, h, w] to [1, C', h, w]. Which channel goes where is found
by sending indices through the chain, so any spelling of the shuffle is recognised. Exact.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import clean, constant, infer, integer, ints, new_weight, replace, shape

TOLERANCE = 0.0
_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Gather", "Split", "Slice"}
_MAX_ELEMENTS = 2**22


def run(model: ir.Model) -> int:
    """In place. Returns the number of parts rewritten."""
    graph = model.graph
    count = 0
    for node in list(graph):
        if node.op_type not in _MOVES:
            continue
        for value in node.outputs:
            if not all(user.op_type in _MOVES for user, _ in value.uses()) and _rewrite(graph, value):
                count += 1
    clean(model)
    if count:
        infer(model)
    return count


def _rewrite(graph: ir.Graph, value: ir.Value) -> bool:
    target = shape(value)
    if target is None or len(target) != 4 or target[0] != 1:
        return False
    chain: list[ir.Value] = []  # last first
    current: ir.Value | None = value
    while current is not None:
        node = current.producer()
        if node is None or node.op_type not in _MOVES:
            break
        chain.append(current)
        current = node.inputs[0]
    source = shape(current)
    if current is None or len(chain) < 3 or source is None or len(source) != 4:
        return False
    if (source[0], *source[2:]) != (1, *target[2:]) or math.prod(source) > _MAX_ELEMENTS:
        return False
    indices = np.arange(math.prod(source), dtype=np.int64).reshape(source)
    for step in reversed(chain):
        result = _move(step, indices)
        if result is None:
            return False
        indices = result
    area = source[2] * source[3]
    channels = indices.reshape(target[1], -1)[:, 0] // area
    moved = channels[:, None] * area + np.arange(area)
    strides = np.diff(channels)
    if not np.array_equal(indices.reshape(target[1], -1), moved) or len(set(strides)) != 1 or strides[0] < 1:
        return False
    stop = channels[-1] + 1
    bounds = [new_weight(graph, "slice", np.array([v], np.int64)) for v in (channels[0], stop, 1, strides[0])]
    slice_ = ir.node("Slice", [current, *bounds])
    slice_.outputs[0].name = f"{value.name}_part"
    last = value.producer()
    assert last is not None
    graph.insert_before(last, slice_)
    slice_.outputs[0].shape, slice_.outputs[0].type = ir.Shape(target), value.type
    return replace(value, slice_.outputs[0])


def _move(value: ir.Value, data: np.ndarray) -> np.ndarray | None:
    """What the operator that makes `value` does to `data`; None when it cannot be told."""
    node, sizes = value.producer(), shape(value)
    if node is None or sizes is None:
        return None
    if node.op_type == "Transpose":
        return data.transpose(ints(node, "perm", range(data.ndim)[::-1]))
    if node.op_type == "Gather":
        picked = constant(node.inputs[1])
        return None if picked is None else np.take(data, picked, axis=integer(node, "axis", 0)).reshape(sizes)
    if node.op_type == "Split":
        axis = integer(node, "axis", 0) % data.ndim
        parts = [shape(o) for o in node.outputs]
        if any(p is None for p in parts):
            return None
        widths = [p[axis] for p in parts if p is not None]
        start = sum(widths[: value.index() or 0])
        return data.take(range(start, start + sizes[axis]), axis=axis)
    if node.op_type == "Slice":
        bounds = [constant(v) for v in node.inputs[1:5]]
        if len(bounds) < 3 or any(b is None for b in bounds):
            return None
        starts, ends, axes = (b.tolist() for b in bounds[:3] if b is not None)
        steps = bounds[3].tolist() if len(bounds) > 3 and bounds[3] is not None else [1] * len(axes)
        where = [slice(None)] * data.ndim
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            if step < 1:
                return None
            where[axis] = slice(start, end, step)
        data = data[tuple(where)]
    return data.reshape(sizes) if data.size == math.prod(sizes) else None
