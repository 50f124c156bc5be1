"""For each computing operator: does it keep frames apart, and along which axis do they lie in its result?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import constant, integer, ints, shape

ELEMENTWISE = {
    "Abs", "Relu", "LeakyRelu", "PRelu", "Sigmoid", "Tanh", "Clip", "HardSwish", "HardSigmoid", "Elu", "Selu",
    "Celu", "Gelu", "Mish", "Softplus", "Softsign", "ThresholdedRelu", "Erf", "Exp", "Log", "Sqrt", "Reciprocal",
    "Neg", "Sign", "Floor", "Ceil", "Round", "Sin", "Cos", "Cast", "Not", "Add", "Sub", "Mul", "Div", "Pow", "Max",
    "Min", "Mean", "Sum", "Where", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "And", "Or", "Mod",
}  # fmt: skip
BATCHED = {
    "Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool",
    "BatchNormalization", "InstanceNormalization", "GroupNormalization", "LRN", "DepthToSpace", "SpaceToDepth",
}  # fmt: skip
"""One picture of the batch (axis 0) at a time."""
ALONG = {"Softmax", "LogSoftmax", "Hardmax", "LayerNormalization", "LpNormalization"}
REDUCE = {
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceSumSquare",
    "ReduceLogSum", "ReduceLogSumExp",
}  # fmt: skip
AFFINE = {
    "Add",
    "Sub",
    "Neg",
    "Sum",
    "Conv",
    "ConvTranspose",
    "BatchNormalization",
    "GlobalAveragePool",
    "AveragePool",
    "ReduceMean",
}
"""May follow a mean over time: the mean of their results is their result of the mean."""
WINDOWED = {"Conv", "AveragePool", "MaxPool"}


class Refuse(Exception):
    """The operator cannot be put on one frame; the text says why."""


@dataclass(frozen=True)
class Bound:
    """A value of the clip model and what it is in the one-frame model.

    axis: of the frames in the clip model's value, None after a mean over time (`mean`).
    sizes: shape in the one-frame model. length: frames in the clip's value; more than the clip's after
    a convolution that was padded at its end, until that end is cut off.
    """

    value: ir.Value
    axis: int | None
    sizes: tuple[int, ...]
    length: int

    @property
    def mean(self) -> bool:
        return self.axis is None


def result_axis(node: ir.Node, bound: Mapping[int, Bound], version: int) -> int | None:
    """Axis of the frames in the outputs of `node`, None for a mean over time. Raises: Refuse."""
    op = node.op_type
    if node.domain not in ("", "ai.onnx"):
        raise Refuse("is not a standard operator")
    if any(b.mean for b in bound.values()):
        _after_mean(node, bound)
        return None
    first = bound.get(0)
    axis = -1 if first is None or first.axis is None else first.axis
    rank = 0 if first is None else len(first.sizes)
    if op in ELEMENTWISE:
        return _broadcast(node, bound)
    if op == "MatMul":
        return _matmul(node, bound)
    if set(bound) != {0}:
        raise Refuse("computes with a tensor that the frames make, where a weight is expected")
    if op in BATCHED:
        if axis != 0:
            raise Refuse(f"mixes frames, which lie along axis {axis} of its input, expected axis 0")
        return 0
    if op == "Gemm":
        if axis != 0 or integer(node, "transA", 0):
            raise Refuse("mixes frames")
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is not None and bias.ndim == 2 and bias.shape[0] != 1:
            raise Refuse("adds a bias of its own to every frame")
        return 0
    if op in ALONG:
        along = integer(
            node, "axis", -1 if op in ("LayerNormalization", "LpNormalization") or version >= 13 else 1
        )
        along %= rank
        several = op == "LayerNormalization" or (op in ("Softmax", "LogSoftmax", "Hardmax") and version < 13)
        if (axis >= along) if several else (axis == along):
            raise Refuse("runs along the frames")
        return axis
    if op in REDUCE:
        return _reduce(node, axis, rank)
    if op in ("ArgMax", "ArgMin"):
        along = integer(node, "axis", 0) % rank
        if along == axis:
            raise Refuse("runs along the frames")
        return axis - (not integer(node, "keepdims", 1) and along < axis)
    if op in ("CumSum", "TopK"):
        where = constant(node.inputs[1]) if op == "CumSum" else np.array(integer(node, "axis", -1))
        if where is None or int(where.reshape(-1)[0]) % rank == axis:
            raise Refuse("runs along the frames")
        return axis
    if op == "Resize":
        after = shape(node.outputs[0])
        if axis != 0 or first is None or after is None or after[0] != first.length:
            raise Refuse("resizes along the frames")
        return 0
    raise Refuse("is not known to keep frames apart")


def _broadcast(node: ir.Node, bound: Mapping[int, Bound]) -> int:
    rank = len(shape(node.outputs[0]) or ())
    places = {b.axis + rank - len(b.sizes) for b in bound.values() if b.axis is not None}
    if len(places) != 1:
        raise Refuse("combines tensors whose frames lie along different axes")
    place = places.pop()
    for i, value in enumerate(node.inputs):
        sizes = shape(value)
        if value is None or i in bound:
            continue
        at = None if sizes is None else place - (rank - len(sizes))
        if sizes is None or (at is not None and at >= 0 and sizes[at] != 1):
            raise Refuse("has a weight of its own for every frame")
    return place


def _matmul(node: ir.Node, bound: Mapping[int, Bound]) -> int:
    after = shape(node.outputs[0]) or ()
    places = set()
    for i, b in bound.items():
        assert b.axis is not None
        rank = len(b.sizes)
        if i == 0 and b.axis == rank - 2 and set(bound) == {0} and len(after) >= 2:
            return len(after) - 2  # rows are frames, the weight is the same for all
        if b.axis >= rank - 2:
            raise Refuse("mixes frames")
        places.add(b.axis + len(after) - rank)
    if len(places) != 1:
        raise Refuse("combines tensors whose frames lie along different axes")
    place = places.pop()
    for i, value in enumerate(node.inputs):
        sizes = shape(value) or ()
        at = place - (len(after) - len(sizes))
        if i not in bound and at >= 0 and sizes[at] != 1:
            raise Refuse("has a weight of its own for every frame")
    return place


def given_axes(node: ir.Node, rank: int) -> tuple[int, ...]:
    """Axes of a Reduce operator, Squeeze or Unsqueeze, as attribute or second input; () when there are none."""
    given: Sequence[int] = ints(node, "axes", ())
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        data = constant(node.inputs[1])
        if data is None:
            raise Refuse("has computed axes")
        given = data.reshape(-1).tolist()
    return tuple(int(a) % rank for a in given)


def reduced_axes(node: ir.Node, rank: int) -> tuple[int, ...]:
    """Axes that a Reduce operator runs over."""
    given = given_axes(node, rank)
    if not given:
        return () if integer(node, "noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted(given))


def _reduce(node: ir.Node, axis: int, rank: int) -> int | None:
    axes = reduced_axes(node, rank)
    if axis in axes:
        if node.op_type != "ReduceMean":
            raise Refuse("runs over the frames; only a mean can be left to whoever reads the frames' outputs")
        return None
    return axis if integer(node, "keepdims", 1) else axis - sum(a < axis for a in axes)


def _after_mean(node: ir.Node, bound: Mapping[int, Bound]) -> None:
    """Only what commutes with the mean may follow it: then frames have outputs, whose mean is the clip's."""
    op = node.op_type
    same = all(b.mean for b in bound.values())
    if op in AFFINE and same and (set(bound) == {0} or op in ("Add", "Sub", "Sum")):
        return
    if op in ("Gemm", "MatMul", "Mul", "Div") and same and len(bound) == 1 and (op != "Div" or 0 in bound):
        return
    raise Refuse("follows a mean over the frames and does not commute with it")
