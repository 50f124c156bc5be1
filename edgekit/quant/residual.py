"""Finds the skip input of residual additions, for libraries that fold an Add into the convolution before it.

TensorRT folds `Conv -> Add` and takes the precision of the fusion from the other input: that one is quantized,
the convolution's own result must not be (NVIDIA Model Optimizer, `build_non_residual_input_map`).
"""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

from edgekit.passes.graph import constant, only_user

_POINTWISE = {"Relu", "Clip", "LeakyRelu", "Sigmoid", "Mul", "HardSwish", "HardSigmoid", "Tanh"}


def skip_inputs(graph: ir.Graph, integer: Container[ir.Node]) -> dict[ir.Node, ir.Value]:
    """Add -> its skip input: the one with the shorter way from where the two branches part.

    Only where the longer branch ends in one of the convolutions `integer`, with activations behind it at
    most; branches of equal length are no residual.
    """
    order: dict[ir.Value, int] = {}
    ancestors: dict[ir.Value, int] = {}
    for value in (*graph.inputs, *(v for n in graph for v in n.outputs)):
        order[value] = len(order)
        producer = value.producer()
        known = 0 if producer is None else _join(ancestors, producer)
        ancestors[value] = known | 1 << order[value]
    values = list(order)
    found = {}
    for node in graph:
        if node.op_type != "Add" or len(node.inputs) != 2:
            continue
        a, b = node.inputs
        if a is None or b is None or a is b or a not in order or b not in order:
            continue
        if constant(a) is not None or constant(b) is not None:
            continue
        common = ancestors[a] & ancestors[b]
        if not common:
            continue
        steps = _steps(graph, values[common.bit_length() - 1])
        near, far = sorted((a, b), key=lambda v: steps.get(v, 0))
        if steps.get(near, 0) < steps.get(far, 0) and _ends_in_convolution(far, integer):
            found[node] = near
    return found


def _join(ancestors: dict[ir.Value, int], node: ir.Node) -> int:
    known = 0
    for value in node.inputs:
        if value is not None:
            known |= ancestors.get(value, 0)
    return known


def _steps(graph: ir.Graph, start: ir.Value) -> dict[ir.Value, int]:
    """Operators on the longest way from `start` to each value behind it."""
    steps = {start: 0}
    for node in graph:
        reached = [steps[v] for v in node.inputs if v is not None and v in steps]
        if reached and start not in node.outputs:
            steps.update({v: 1 + max(reached) for v in node.outputs})
    return steps


def _ends_in_convolution(value: ir.Value, integer: Container[ir.Node]) -> bool:
    seen: set[ir.Node] = set()
    while True:
        node = value.producer()
        if node is None or node in seen:
            return False
        seen.add(node)
        if node.op_type in ("Conv", "ConvTranspose"):
            return node in integer
        if node.op_type not in _POINTWISE or only_user(node.outputs[0]) is None:
            return False
        # x * sigmoid(x): the way leads through the gate or past it, to the same convolution
        inputs = [v for v in node.inputs if v is not None and constant(v) is None]
        value = inputs[0]
