"""Computes at build time what does not depend on the picture.

Constant nodes become initialisers, nodes with constant inputs (Shape of a static tensor included)
are evaluated, equal small constants are stored once, dead code goes.
Source: onnxscript's constant folder, onnx_ir's common passes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer

from edgekit.passes.graph import clean, constant, infer

TOLERANCE = 1e-5
MAX_ELEMENTS = 2**22
"""Nothing larger is stored or evaluated: a folded Expand could outgrow the weights."""


def run(model: ir.Model) -> int:
    """In place. Returns the number of nodes that went."""
    before = len(model.graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for _ in range(4):  # a folded Reshape target gives new shapes, which fold further
        infer(model)
        size = len(model.graph)
        optimizer.fold_constants(
            model, input_size_limit=MAX_ELEMENTS, output_size_limit=MAX_ELEMENTS, should_fold=_may_fold
        )
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        clean(model)
        if len(model.graph) == size:
            break
    common.DeduplicateInitializersPass()(model)
    clean(model)
    infer(model)
    return before - len(model.graph)


def _may_fold(node: ir.Node) -> bool | None:
    """For nodes whose small inputs may make a huge output: whether it stays small enough.

    None leaves every other node to the folder's own rules.
    """
    inputs = [constant(v) for v in node.inputs]
    if node.op_type not in ("ConstantOfShape", "Expand", "Tile", "Range"):
        return None
    if any(data is None for data in inputs):
        return False
    data = [d.reshape(-1).astype(np.float64) for d in inputs if d is not None]
    if node.op_type == "Range":
        start, stop, step = (d[0] for d in data)
        size = abs((stop - start) / step) if step else np.inf
    elif node.op_type == "ConstantOfShape":
        size = np.prod(np.maximum(data[0], 1))
    else:
        size = np.prod(np.maximum(data[1], 1)) * data[0].size
    return bool(size <= MAX_ELEMENTS)
