"""Quantization facts live on the values of a graph, nowhere else.

Canonical form, which every backend derives its own from:

- activations: int8, affine, one scale per tensor, q in [-128, 127] (a symmetric target: zero point 0);
  ONNX Runtime on x86 adds 128 to codes and zero point and calls them uint8: same reals.
- weights of Conv, ConvTranspose, Gemm, MatMul: int8, symmetric, q in [-127, 127], one scale per output channel.
- biases carry nothing: int32 at scale(input) * scale(weight).

A value without params is float. Where a node that computes in floats reads a value with params, it reads
the real number behind the codes; where it writes one, the result is rounded to codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.passes.states import states
from edgekit.spec import QuantParams

if TYPE_CHECKING:
    import onnx_ir as ir

KEY = "edgekit.quant"


def quant(value: ir.Value | None) -> QuantParams | None:
    """The params of a value, None if it is float."""
    return None if value is None else value.meta.get(KEY)


def set_quant(value: ir.Value, params: QuantParams | None) -> None:
    if params is None:
        value.meta.pop(KEY, None)
    else:
        value.meta[KEY] = params


def node_id(node: ir.Node) -> str:
    """How choices, reports and caches call a node: by the name of its first output."""
    name = node.outputs[0].name
    assert name is not None
    return name


REAL_STATES = "edgekit.real_states"
"""Key of the model's metadata, set where payloads shall hold their states as real numbers whatever the annotations."""


def state_codes(model: ir.Model) -> dict[str, QuantParams]:
    """The graph inputs and outputs that an INT8 payload holds as codes, by name: states with one scale on both sides.

    Raises: ModelError for metadata that do not fit the graph; AssertionError where the sides differ.
    """
    if REAL_STATES in model.metadata_props:
        return {}
    inputs, outputs = ({str(v.name): v for v in side} for side in (model.graph.inputs, model.graph.outputs))
    found: dict[str, QuantParams] = {}
    for state in states(model):
        before, after = quant(inputs[state.input]), quant(outputs[state.output])
        assert before == after, f"state {state.name} has two scales"
        if before is not None:
            found |= {state.input: before, state.output: before}
    return found
