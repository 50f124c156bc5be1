"""Cuts a classifier before its Softmax, which the host computes then.

    y = Softmax(x), along the classes        ->  output x, scores = softmax(x) on the host

Softmax keeps the order of the classes, so nothing is lost for the accuracy, and the largest class
count of any network costs microseconds there. Inside the payload it would be quantized: at 8 bits
all scores below 1/256 become one, and the top 5 with them (its scale is fixed to 1/256 in TFLite's
8-bit specification). LogSoftmax is cut likewise. Operators that only reshape may follow it.

Found by structure; a Softmax along another axis than the classes, or one that the network reads
itself, stays. A network without one is left as it is: `activation` then says whether its output
are scores already (a Sigmoid, or values that add up to 1) or logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.errors import ModelError
from edgekit.passes import probe
from edgekit.passes.graph import clean, integer, only_user, shape
from edgekit.passes.states import answer_values

LIMIT = 1e-5
"""Largest difference of a score, softmax on the host against the one in the graph."""
SUM_LIMIT = 1e-3
_RESHAPES = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"}


@dataclass(frozen=True)
class SoftmaxSplit:
    """A network without its Softmax. activation: what the host applies; note: how that was found."""

    model: ir.Model
    activation: str
    difference: float | None
    note: str


def split(model: ir.Model) -> SoftmaxSplit:
    """A copy of `model`, cut. Raises: ModelError when the cut does not compute the same."""
    original, model = model, model.clone()
    node = _softmax(model)
    if node is None:
        return SoftmaxSplit(model, *_judge(model))
    kind = node.op_type
    (output,), source = answer_values(model), node.inputs[0]
    assert source is not None, "checked by _softmax"
    name = output.name
    place = model.graph.outputs.index(output)
    output.name = f"{name}_was"
    model.graph.outputs[place] = source
    source.name = name  # the output keeps its name: it is what users know
    clean(model)
    feeds, wanted = probe.finite_pictures(original)
    want = wanted[str(name)].astype(np.float64).reshape(-1)
    logits = probe.evaluate(model, feeds)[str(name)].astype(np.float64).reshape(-1)
    got = np.exp(logits - logits.max())
    got /= got.sum()
    want = np.exp(want) if kind == "LogSoftmax" else want
    difference = float(np.abs(got - want).max())
    if not difference <= LIMIT:  # NaN too
        raise ModelError(
            f"model: its {kind} is not one over the classes: scores differ by {difference:.2e}, expected at most "
            f"{LIMIT:.0e}. Export the network without it"
        )
    return SoftmaxSplit(model, "softmax", difference, f"cut before its {kind}; the host computes it")


def _softmax(model: ir.Model) -> ir.Node | None:
    """The Softmax over all classes that the one output (states aside) comes from, through reshapes at most."""
    outputs = answer_values(model)
    if len(outputs) != 1:
        return None
    value: ir.Value | None = outputs[0]
    while value is not None:
        node = value.producer()
        if node is None or (value is not outputs[0] and only_user(value) is None):
            return None
        if node.op_type in ("Softmax", "LogSoftmax"):
            break
        if node.op_type not in _RESHAPES:
            return None
        value = node.inputs[0]
    else:
        return None
    source = node.inputs[0]
    sizes = shape(source)
    if source is None or sizes is None or source.is_graph_input() or source.is_initializer():
        return None
    if only_user(source) is not node:
        return None
    # before opset 13 everything from `axis` on is one axis
    version = model.graph.opset_imports.get("", 13)
    axis = integer(node, "axis", -1 if version >= 13 else 1) % len(sizes)
    over = sizes[axis] if version >= 13 else math.prod(sizes[axis:])
    return node if over == math.prod(sizes) > 1 else None


def _judge(model: ir.Model) -> tuple[str, float | None, str]:
    """(activation, None, note) of a network that has no Softmax to cut."""
    outputs = answer_values(model)
    if len(outputs) != 1:
        return "none", None, ""
    producer = outputs[0].producer()
    if producer is not None and producer.op_type == "Sigmoid":
        return "none", None, "ends in a Sigmoid: its values are taken as scores"
    values = probe.finite_pictures(model)[1][str(outputs[0].name)].astype(np.float64)
    if values.size > 1 and values.min() >= 0 and abs(values.sum() - 1) <= SUM_LIMIT:
        return "none", None, "its values add up to 1: they are taken as scores"
    return "softmax", None, "ends in logits: scores are their softmax, on the host"
