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
    """False for nodes whose small inputs make a huge output; None leaves it to the folder."""
    if node.op_type == "ConstantOfShape":
        sizes = constant(node.inputs[0])
    elif node.op_type in ("Expand", "Tile"):
        sizes = constant(node.inputs[1])
        data = constant(node.inputs[0])
        if data is not None and sizes is not None:
            sizes = np.append(sizes, data.size)
    elif node.op_type == "Range":
        parts = [constant(v) for v in node.inputs]
        if any(p is None or p.size != 1 for p in parts):
            return None
        start, stop, step = (float(p.reshape(-1)[0]) for p in parts if p is not None)
        return None if step and abs((stop - start) / step) <= MAX_ELEMENTS else False
    else:
        return None
    if sizes is None:
        return None
    return None if np.prod(np.maximum(sizes, 1), dtype=np.float64) <= MAX_ELEMENTS else False
