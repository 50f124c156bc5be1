"""2:4 sparsity of a graph's weights: of each 4 consecutive input channels at least 2 are zero.

Tensor cores from Ampere on skip such zeros (NVIDIA: Accelerating Sparse Deep Neural Networks, 2021), and TensorRT uses them
where all weights of a layer have the pattern. Whoever changes weights keeps it: a zero weight stays zero, and a sparse
layer's input channels stay in their fours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import constant, integer
from edgekit.quant.annotate import node_id

KEPT, OF = 2, 4
WEIGHTED = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class LayerZeros:
    """id: of the node (annotate.node_id); sparse: whether it is 2:4; reason: why not, "" if it is; zeros: their share."""

    id: str
    op: str
    sparse: bool
    reason: str
    zeros: float


def layers(model: ir.Model) -> list[LayerZeros]:
    """Every weighted node of `model`, float or with Q/DQ, in graph order."""
    found = []
    for node in model.graph:
        if node.op_type in (*WEIGHTED, "ConvTranspose") and node.domain in ("", "ai.onnx"):
            weights = _weights(node)
            reason = _reason(node, weights)
            share = 0.0 if weights is None or not weights.size else float((weights == 0).mean())
            found.append(LayerZeros(node_id(node), node.op_type, not reason, reason, share))
    return found


def two_of_four(node: ir.Node) -> bool:
    """Whether the weights of `node` are 2:4."""
    return node.op_type in WEIGHTED and not _reason(node, _weights(node))


def holds(weights: np.ndarray, axis: int = 1) -> bool:
    """Whether of each 4 in line along `axis`, which 4 divides, 2 are zero at least."""
    groups = np.moveaxis(weights, axis, -1).reshape(-1, OF)
    return bool((np.count_nonzero(groups, axis=1) <= KEPT).all())


def _reason(node: ir.Node, weights: np.ndarray | None) -> str:
    if node.op_type == "ConvTranspose":
        return "a transposed convolution"
    if weights is None:
        return "its weight is computed"
    if node.op_type == "Conv" and integer(node, "group", 1) != 1:
        return "it has groups"
    axis = 1 if node.op_type == "Conv" or integer(node, "transB", 0) else weights.ndim - 2
    if weights.ndim < 2 or weights.shape[axis] % OF:
        inputs = weights.shape[axis] if weights.ndim > 1 else 1
        return f"{inputs} input channels do not divide by {OF}"
    if not weights.any():
        return "all its weights are zero"
    return "" if holds(weights, axis) else "dense"


def _weights(node: ir.Node) -> np.ndarray | None:
    """Numbers, or codes without their zero point, of a constant weight."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    numbers = constant(value)
    producer = None if value is None else value.producer()
    if numbers is not None or producer is None:
        return numbers
    if producer.op_type in ("Cast", "Identity"):
        return constant(producer.inputs[0])
    if producer.op_type != "DequantizeLinear":
        return None
    codes = constant(producer.inputs[0])
    zero = constant(producer.inputs[2]) if len(producer.inputs) > 2 else None
    if codes is None or zero is None or not zero.any():
        return codes
    return codes.astype(np.int32) - int(zero.reshape(-1)[0]) if zero.size == 1 else None
