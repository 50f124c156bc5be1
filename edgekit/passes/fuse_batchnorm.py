"""Folds a per-channel affine map into the linear operator before it.

    y = s * (W x + b) + t   ->   y = (s W) x + (s b + t)

Pattern: Conv, ConvTranspose or Gemm, read by nothing else, then BatchNormalization
(s = gamma / sqrt(var + eps), t = beta - s * mean; Ioffe & Szegedy 2015) or Mul, Div, Add, Sub with
a constant per channel (a bias of its own, LayerScale, YOLOv7's implicit knowledge).
The products are formed in float64 and rounded once.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import (
    clean,
    constant,
    integer,
    new_weight,
    number,
    only_user,
    replace,
    shape,
)

TOLERANCE = 1e-4


def run(model: ir.Model) -> int:
    """In place. Returns the number of fused nodes."""
    graph = model.graph
    count = 0
    for node in list(graph):
        while node.op_type in ("Conv", "ConvTranspose", "Gemm") and _fuse_next(graph, node):
            count += 1
    clean(model)
    return count


@np.errstate(all="ignore")  # what overflows is not fused
def _fuse_next(graph: ir.Graph, node: ir.Node) -> bool:
    user = only_user(node.outputs[0])
    weight = constant(node.inputs[1])
    sizes = shape(node.outputs[0])
    if user is None or weight is None or sizes is None or weight.dtype != np.float32:
        return False
    if node.op_type == "Gemm" and (number(node, "alpha", 1.0) != 1.0 or number(node, "beta", 1.0) != 1.0):
        return False
    bias = np.zeros(sizes[1], np.float32)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        stored = constant(node.inputs[2])
        if stored is None or (stored.ndim == 2 and stored.shape[0] != 1):
            return False
        bias = np.broadcast_to(stored.reshape(-1), (sizes[1],))
    affine = _affine(user, node.outputs[0], sizes)
    if affine is None:
        return False
    scale, offset = affine
    new_w = (weight.astype(np.float64) * _along_outputs(node, weight, scale)).astype(np.float32)
    new_b = (scale * bias + offset).astype(np.float32)
    if not (np.isfinite(new_w).all() and np.isfinite(new_b).all()):
        return False
    if not replace(user.outputs[0], node.outputs[0]):
        return False
    graph.remove(user, safe=True)
    name = node.inputs[1].name if node.inputs[1] is not None else None
    node.replace_input_with(1, new_weight(graph, name or "weight", new_w))
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, new_weight(graph, f"{name or 'weight'}_bias", new_b))
    return True


def _affine(user: ir.Node, value: ir.Value, sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray] | None:
    """(s, t), float64 [channels], such that `user` computes s * value + t."""
    channels = sizes[1]
    if user.op_type == "BatchNormalization" and user.inputs[0] is value:
        if integer(user, "training_mode", 0) or any(o.uses() for o in user.outputs[1:]):
            return None
        parts = [constant(v) for v in user.inputs[1:5]]
        gamma, beta, mean, var = (None if p is None else p.astype(np.float64) for p in parts)
        if gamma is None or beta is None or mean is None or var is None:
            return None
        scale = gamma / np.sqrt(var + number(user, "epsilon", 1e-5))
        return scale, beta - scale * mean
    if user.op_type not in ("Mul", "Div", "Add", "Sub") or len(user.inputs) != 2:
        return None
    first = user.inputs[0] is value
    data = constant(user.inputs[1 if first else 0])
    if data is None or (not first and user.op_type in ("Div", "Sub")) or shape(user.outputs[0]) != sizes:
        return None
    full = data.reshape((1,) * (len(sizes) - data.ndim) + data.shape) if data.ndim <= len(sizes) else None
    if full is None or any(d != 1 for i, d in enumerate(full.shape) if i != 1):
        return None
    c = np.broadcast_to(full.reshape(-1).astype(np.float64), (channels,))
    one, zero = np.ones(channels), np.zeros(channels)
    if user.op_type in ("Mul", "Div"):
        if user.op_type == "Div" and (c == 0).any():
            return None
        return (c if user.op_type == "Mul" else one / c), zero
    return one, (c if user.op_type == "Add" else -c)


def _along_outputs(node: ir.Node, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """`scale` [out] shaped to multiply the weight: Conv [O, I/g, ...], ConvTranspose [I, O/g, ...], Gemm."""
    if node.op_type == "Conv":
        return scale.reshape(-1, *(1,) * (weight.ndim - 1))
    if node.op_type == "Gemm":
        return scale.reshape(-1, 1) if integer(node, "transB", 0) else scale.reshape(1, -1)
    group = integer(node, "group", 1)
    per_group = np.repeat(scale.reshape(group, -1), weight.shape[0] // group, axis=0)
    return per_group.reshape(weight.shape[0], weight.shape[1], *(1,) * (weight.ndim - 2))
