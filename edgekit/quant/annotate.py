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
