"""What several writers of payloads need: a word for what they cannot take, and where ONNX's Resize reads."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import constant, shape, text


class Unsupported(Exception):
    """An operator, or a use of one, that cannot be written; the message says what. For a list of all of it."""


def positions(node: ir.Node, axis: int) -> np.ndarray:
    """Where each output element of a Resize along `axis` lies in the input, by ONNX's rules: float64 [out].

    Raises: Unsupported for coordinates that are not known.
    """
    size, out = _sizes(node, axis)
    mode = text(node, "coordinate_transformation_mode", "half_pixel")
    scales = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    scale = float(scales[axis]) if scales is not None and scales.size else out / size
    i = np.arange(out, dtype=np.float64)
    if mode == "asymmetric":
        return i / scale
    if mode == "align_corners":
        return i * (size - 1) / (out - 1) if out > 1 else np.zeros(1)
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and out > 1):
        return (i + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return np.zeros(1)
    raise Unsupported(f"Resize with coordinates {mode}")


def nearest(node: ir.Node, axis: int) -> np.ndarray:
    """Which input element each output element is. Raises: Unsupported."""
    where = positions(node, axis)
    rule = text(node, "nearest_mode", "round_prefer_floor")
    chosen = {
        "round_prefer_floor": np.ceil(where - 0.5),
        "round_prefer_ceil": np.floor(where + 0.5),
        "floor": np.floor(where),
        "ceil": np.ceil(where),
    }[rule]
    result: np.ndarray = np.clip(chosen, 0, _sizes(node, axis)[0] - 1).astype(np.int64)
    return result


def _sizes(node: ir.Node, axis: int) -> tuple[int, int]:
    before, after = shape(node.inputs[0]), shape(node.outputs[0])
    assert before is not None and after is not None, f"{node.outputs[0].name} has no static shape"
    return before[axis], after[axis]
