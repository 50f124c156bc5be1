"""Bias correction: takes the mean error that quantization adds to each output channel out of the bias.

Rounded weights and clipped inputs shift the mean of what a layer computes, most where few products are
summed (depthwise convolutions), and the shift of one layer feeds the next. E[y_float - y_quantized] per
channel, measured on pictures before the activation, goes into the bias.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from edgekit.passes.graph import number, shape
from edgekit.quant.repair import Feed, Progress, checked, chosen
from edgekit.quant.repair.layers import add_bias
from edgekit.quant.repair.walk import Walk
from edgekit.quant.rules import bias, weight

PAPER = (
    "Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through Weight Equalization and Bias "
    "Correction, ICCV 2019, section 4.2 (the empirical form)"
)


def run(
    model: ir.Model,
    float_model: ir.Model,
    feeds: Sequence[Feed],
    *,
    progress: Progress | None = None,
    nodes: Collection[str] | None = None,
    share: float = 0.05,
) -> ir.Model:
    """An annotated copy of `model` with corrected biases (added where a Conv or Gemm has none).

    Layer by layer, each measured behind the corrected ones, so that no shift is taken out twice; quantized
    nodes and the float ones behind them alike. The mean is shrunk by its uncertainty over pictures
    (James-Stein, positive part): few pictures do little harm. Nodes that
    the float network does not have in this shape are left alone. share: a channel is corrected where its mean
    makes up this much of its squared error, or more; less would not pay for the uncertainty. Raises: CalibrationError without pictures,
    UsageError for an unknown node.
    """
    checked(feeds)
    result = model.clone()
    with Walk(result, feeds, quantized=True) as rounded, Walk(float_model, feeds, quantized=False) as exact:
        layers = [
            n
            for n in chosen(result, nodes)
            if _correctable(n) and exact.has(str(n.outputs[0].name), shape(n.outputs[0]))
        ]
        for done, node in enumerate(layers):
            if progress:
                progress("bias correction", done, len(layers))
            output = node.outputs[0]
            name, before = str(output.name), rounded.computed(output)
            rounded.advance(before)
            exact.advance(name)
            channel = 1 if node.op_type != "Gemm" else -1
            rows, squares = [], []
            for a, b in zip(exact.values([name]), rounded.values([before]), strict=True):
                difference = a[name] - b[before]
                rows.append(_means(difference, channel))
                squares.append(_means(difference**2, channel))
            shift = shrunk(np.stack(rows))
            shift[shift**2 < share * np.mean(squares, axis=0)] = 0
            if shift.any():
                rounded.set_bias(before, add_bias(result.graph, node, shift))
    if progress:
        progress("bias correction", len(layers), len(layers))
    return result


def _correctable(node: ir.Node) -> bool:
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or weight(node) is None:
        return False
    if len(node.inputs) > 2 and node.inputs[2] is not None and bias(node) is None:
        return False
    return number(node, "beta", 1.0) == 1


def _means(difference: np.ndarray, channel: int) -> np.ndarray:
    """Per channel, float64."""
    rows = np.moveaxis(difference, channel, 0)
    found: np.ndarray = rows.reshape(len(rows), -1).mean(axis=1, dtype=np.float64)
    return found


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
    result: np.ndarray = mean * keep
    return result
