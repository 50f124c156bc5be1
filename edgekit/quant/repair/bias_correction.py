"""Bias correction: takes the mean error that quantization adds to each output channel out of the bias.

Rounded weights and clipped inputs shift the mean of what a layer computes, most where few products are
summed (depthwise convolutions), and the shift of one layer feeds the next. E[y_float - y_quantized] per
channel, measured on pictures before the activation, goes into the bias.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from edgekit.quant.repair import Feed, Progress, checked, chosen
from edgekit.quant.repair.layers import add_bias
from edgekit.quant.repair.observe import VALUE_BYTES, Want, groups, observe, size
from edgekit.quant.rules import bias, weight

PAPER = (
    "Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through Weight Equalization and Bias "
    "Correction, ICCV 2019, section 4.2 (the empirical form)"
)
GROUPS = 8
"""Passes over the pictures. Nodes of one pass do not see each other's correction; what is left between them
the next `run` would find."""


def run(
    model: ir.Model,
    float_model: ir.Model,
    feeds: Sequence[Feed],
    *,
    progress: Progress | None = None,
    nodes: Collection[str] | None = None,
    passes: int = GROUPS,
) -> ir.Model:
    """An annotated copy of `model` with corrected biases (added where a Conv or Gemm has none).

    Layers in order, in `passes` groups, each measured behind the corrected ones. Quantized nodes and the
    float ones behind them alike. The mean is shrunk by its uncertainty over pictures (James-Stein, positive
    part), so that few pictures cannot do harm. Raises: CalibrationError without pictures, UsageError.
    """
    checked(feeds)
    result = model.clone()
    known = {str(v.name) for n in float_model.graph for v in n.outputs}
    layers = [n for n in chosen(result, nodes) if _correctable(n) and str(n.outputs[0].name) in known]
    done = 0
    # corrections of a group meet in the next one: where a group ends is part of the result
    for group in groups(layers, [2 * size(n.outputs[0]) for n in layers], passes, VALUE_BYTES):
        if progress:
            progress("bias correction", done, len(layers))
        for node, shift in zip(group, _shifts(result, float_model, feeds, group), strict=True):
            add_bias(result.graph, node, shift)
        done += len(group)
    if progress:
        progress("bias correction", done, done)
    return result


def _correctable(node: ir.Node) -> bool:
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or weight(node) is None:
        return False
    if len(node.inputs) > 2 and node.inputs[2] is not None and bias(node) is None:
        return False
    beta = node.attributes.get("beta")
    return beta is None or beta.as_float() == 1


def _shifts(
    model: ir.Model, float_model: ir.Model, feeds: Sequence[Feed], group: Sequence[ir.Node]
) -> list[np.ndarray]:
    """What to add to the bias of each node of `group`, float64 [output channels]."""
    values = [n.outputs[0] for n in group]
    want = Want(computed=tuple(values), exact=tuple(str(v.name) for v in values))
    means: list[list[np.ndarray]] = [[] for _ in group]
    for seen in observe(model, float_model, feeds, want):
        for rows, node in zip(means, group, strict=True):
            name = str(node.outputs[0].name)
            difference = seen.exact[name] - seen.computed[name]
            channel = 1 if node.op_type != "Gemm" else difference.ndim - 1
            axes = tuple(i for i in range(difference.ndim) if i != channel)
            rows.append(difference.mean(axis=axes, dtype=np.float64))
    return [shrunk(np.stack(rows)) for rows in means]


def shrunk(rows: np.ndarray) -> np.ndarray:
    """The mean of float64 [pictures, channels] over pictures times 1 - (standard error / mean)^2, if positive.

    One picture: its own figures, there is nothing to shrink by.
    """
    mean: np.ndarray = rows.mean(axis=0)
    if len(rows) < 2:
        return mean
    variance = rows.var(axis=0, ddof=1) / len(rows)
    square = mean**2
    keep = np.divide(square - variance, square, out=np.zeros_like(mean), where=square > variance)
    return mean * keep
